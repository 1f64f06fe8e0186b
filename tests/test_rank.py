"""Candidates in order, from Python and from files."""

import csv
import io
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from conftest import make_llama
from philens.bases.tokenizer import byte_tokenizer, character_tokenizer
from philens.lens.config import MetricOptions
from philens.reasoning.ranking import CandidatesFile, rank, rank_file
from philens.reasoning.solutions import METRICS, measure_replies
from philens.reasoning.tables import ranking_table
from philens.scoring.score import score
from philens.support.errors import ConfigError, InputError, OutputError
from test_score import lens_of

CHARACTERS = character_tokenizer()
BYTES = byte_tokenizer()
CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
PROMPTS = ["2 + 3 = ", "The sea is "]
CANDIDATES = [["5", "6, I think", "5"], ["wide and blue", "a sea"]]


@pytest.fixture(scope="module")
def small():
    return lens_of(make_llama())


@pytest.fixture(scope="module")
def lens():
    return lens_of(make_llama(vocab_size=512))


def write(tmp_path, *records):
    path = tmp_path / "candidates.jsonl"
    path.write_text(
        "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    )
    return path


# From Python.


@pytest.mark.parametrize(
    "rule", ["highest_phi", "lowest_phi", "lowest_surprisal", "shortest", "highest_entropy_sum"]
)
def test_the_best_come_first(small, rule):
    table = rank(small, CHARACTERS, PROMPTS, CANDIDATES, rule=rule)
    assert list(table)[:6] == ["prompt", "candidate", "rank", "score", "tokens", "phi_mean"]
    assert list(table)[-1] == "text"
    assert table["prompt"].tolist() == [0, 0, 0, 1, 1]
    flat = [(prompt, text) for prompt, texts in zip(PROMPTS, CANDIDATES, strict=True) for text in texts]
    measured = measure_replies(small, CHARACTERS, *zip(*flat, strict=True))
    column = {
        "highest_phi": "phi_mean",
        "lowest_phi": "phi_mean",
        "lowest_surprisal": "surprisal_mean",
        "shortest": "tokens",
        "highest_entropy_sum": "entropy_sum",
    }[rule]
    sign = 1 if rule.startswith("highest") else -1
    for number, rows in table.groupby("prompt"):
        texts = CANDIDATES[number]
        assert rows["text"].tolist() == [texts[candidate] for candidate in rows["candidate"]]
        own = measured.iloc[:3] if number == 0 else measured.iloc[3:]
        expected = sign * own[column].to_numpy()
        np.testing.assert_allclose(rows["score"], np.sort(expected)[::-1], rtol=1e-5)
        np.testing.assert_allclose(rows["score"], expected[rows["candidate"]], rtol=1e-5)
        np.testing.assert_allclose(rows["phi_max"], own["phi_max"].to_numpy()[rows["candidate"]], rtol=1e-5)
    # The same answer twice: both have the better rank, and the next has the third.
    first = table[table["prompt"] == 0]
    twice = first[first["text"] == "5"]
    assert twice["candidate"].tolist() == [0, 2]
    assert twice["rank"].nunique() == 1
    assert sorted(first["rank"]) in ([1, 1, 3], [1, 2, 2])


def test_one_prompt_as_text_or_chat(lens):
    one = rank(lens, BYTES, "2 + 3 = ", ["5", "6"])
    pd.testing.assert_frame_equal(one, rank(lens, BYTES, ["2 + 3 = "], [["5", "6"]]))
    chat = rank(lens, BYTES, CHAT, ["5", "6"])
    pd.testing.assert_frame_equal(chat, rank(lens, BYTES, [CHAT], [["5", "6"]]))
    assert (abs(one["score"] - chat["score"]) > 1e-4).all()


def test_groups_of_an_answer_are_of_its_own_tokens(small):
    small.metric_options = MetricOptions(group=4)
    prompt, answers = "2 + 3 = ", ["6, I think so", "it is five", "5"]
    tables = {
        rule: rank(small, CHARACTERS, prompt, answers, rule=rule)
        for rule in ("highest_confidence_lowest_group", "lowest_confidence_tail")
    }
    small.metric_options = MetricOptions()
    for number, answer in enumerate(answers):
        values = score(small, CHARACTERS, prompt + answer, metrics=["confidence"])[0].columns["confidence"]
        own = values[len(prompt) :]
        groups = [own[k : k + 4].mean() for k in range(max(1, len(own) - 3))]
        for table in tables.values():
            row = table[table["candidate"] == number].iloc[0]
            assert row["confidence_lowest_group"] == pytest.approx(min(groups), rel=1e-4)
            assert row["confidence_tail"] == pytest.approx(groups[-1], rel=1e-4)
    first, second = tables.values()
    assert (first["score"] == first["confidence_lowest_group"]).all()
    assert (second["score"] == -second["confidence_tail"]).all()
    with pytest.raises(InputError, match="needs a column phi_tail and there is none"):
        rank(small, CHARACTERS, prompt, answers, rule="highest_phi_tail")


LONG = ["5, as 2 + 3 is 5", "6, I think", "5", "57 and no more", "5, as I said"]


@pytest.mark.parametrize(
    ("rule", "prefix_rule", "metric", "sign"),
    [
        ("highest_phi", None, "phi", 1),
        ("lowest_surprisal_max", None, "surprisal", -1),
        ("shortest", "highest_deep_thinking", "deep_thinking", 1),
        ("highest_phi", "lowest_entropy", "entropy", -1),
    ],
)
def test_the_better_half_by_first_tokens_is_ranked(small, rule, prefix_rule, metric, sign):
    """The first tokens are scored as a text of their own; those kept are what they are in any ranking."""
    prompt, prefix = PROMPTS[0], 3
    table = rank(small, CHARACTERS, prompt, LONG, rule=rule, prefix=prefix, prefix_rule=prefix_rule)
    early = []
    for text in LONG:
        (scores,) = score(small, CHARACTERS, prompt + text[:prefix], metrics=[metric])
        early.append(scores.columns[metric][len(prompt) :].mean())
    by_candidate = table.set_index("candidate").sort_index()
    np.testing.assert_allclose(by_candidate[f"{metric}_prefix"], early, rtol=1e-4)
    assert by_candidate["tokens"].tolist() == [len(text) for text in LONG]
    assert by_candidate["tokens_prefix"].tolist() == [min(len(text), prefix) for text in LONG]
    assert by_candidate["kept"].sum() == 3
    kept, dropped = (sign * np.array(early)[by_candidate["kept"] == which] for which in (True, False))
    assert kept.min() >= dropped.max()
    whole = rank(small, CHARACTERS, prompt, LONG, rule=rule).set_index("candidate")
    for number in np.flatnonzero(by_candidate["kept"]):
        assert by_candidate["score"][number] == pytest.approx(whole["score"][number], rel=1e-5)
    assert sorted(table["rank"][:3]) == table["rank"][:3].tolist() == table["score"][:3].rank(
        method="min", ascending=False
    ).astype(int).tolist()  # fmt: skip
    assert not table["kept"][3:].any()
    assert table["rank"][3:].min() == 4
    assert table[["score", "phi_mean"]][3:].isna().all(axis=None)
    unwritten = sum(max(0, len(LONG[number]) - prefix) for number in table["candidate"][3:])
    assert table.attrs["saved"] == pytest.approx(unwritten / sum(map(len, LONG)))


def test_only_those_kept_are_read_to_their_end(small, monkeypatch):
    read = []
    original = type(small).forward
    monkeypatch.setattr(
        type(small),
        "forward",
        lambda self, ids, *args, **options: read.append(ids.shape) or original(self, ids, *args, **options),
    )
    first, longest = len(PROMPTS[0]) + 2, len(PROMPTS[0]) + max(map(len, LONG))
    rank(small, CHARACTERS, PROMPTS[0], [*LONG, LONG[0] * 40], prefix=2, prefix_rule="shortest")
    assert read[0] == (6, first)
    assert max(length for _, length in read) == longest


def test_of_equal_beginnings_the_earlier_are_kept(small):
    table = rank(small, CHARACTERS, "a", ["xx1", "xx2", "xx3", "xx4", "xx5"], prefix=2)
    assert sorted(table["candidate"][table["kept"]]) == [0, 1, 2]
    assert table["rank"].tolist()[3:] == [4, 4]


def test_columns_of_a_table(small):
    """By position, whatever the index."""
    prompts, answers = ["2 + 3 = ", "1 + 1 = "], [["5", "6", "7"], ["2", "3", "4"]]
    expected = rank(small, CHARACTERS, prompts, answers)
    table = pd.DataFrame({"prompt": prompts, "answers": answers}, index=[7, 0])
    pd.testing.assert_frame_equal(rank(small, CHARACTERS, table["prompt"], table["answers"]), expected)
    found = rank(small, CHARACTERS, np.array(prompts), np.array(answers))
    pd.testing.assert_frame_equal(found, expected)
    found = rank(small, CHARACTERS, prompts[0], pd.Series(answers[0]))
    pd.testing.assert_frame_equal(found, rank(small, CHARACTERS, prompts[:1], answers[:1]))
    pairs = table.explode("answers")
    pd.testing.assert_frame_equal(
        measure_replies(small, CHARACTERS, pairs["prompt"], pairs["answers"]),
        measure_replies(small, CHARACTERS, pairs["prompt"].tolist(), pairs["answers"].tolist()),
    )
    with pytest.raises(InputError, match=r"candidates is a whole table \(DataFrame\); give"):
        rank(small, CHARACTERS, prompts, table)


def test_what_a_rule_needs_is_scored(small):
    table = rank(small, CHARACTERS, "a", ["b", "cd"], rule="lowest_margin", metrics=("phi",))
    assert [name for name in table if name.endswith("_mean")] == ["phi_mean", "margin_mean"]
    assert table["score"].tolist() == (-table["margin_mean"]).tolist()


@pytest.mark.parametrize(
    ("prompts", "candidates", "options", "sentence"),
    [
        (["a"], [["b"]], {}, "Prompt 0 has one candidate; choosing takes at least two"),
        (["a", "b"], [["b", "c"], []], {}, "Prompt 1 has no candidate"),
        ("a", ["b", ""], {}, "Prompt 0: candidate 1 is empty"),
        ("a", ["b", None], {}, "Prompt 0: candidate 1 is of type NoneType"),
        ("a", "bc", {}, "Prompt 0 has str for candidates"),
        ("a", ["b", "\x03"], {}, "Candidate 1 of prompt 0 has no token"),
        (["a"], [["b", "c"], ["d", "e"]], {}, "1 prompts and 2 lists of candidates"),
        ([], [], {}, "nothing to rank"),
        ([[]], [["b", "c"]], {}, "the prompt of candidate 0 of prompt 0 is a chat without messages"),
        ("a", ["b", "c"], {"rule": "highest_phy"}, "needs a column phy .*did you mean highest_phi "),
    ],
)
def test_what_cannot_be_ranked(small, prompts, candidates, options, sentence):
    with pytest.raises(InputError, match=sentence):
        rank(small, CHARACTERS, prompts, candidates, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prefix": 0}, "prefix must be at least 1 token, not 0"),
        ({"prefix_rule": "lowest_phi"}, "A prefix_rule needs a prefix"),
        ({"prefix": 2, "prefix_rule": "best"}, "There is no rule 'best'"),
    ],
)
def test_no_prefix(small, tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        rank(small, CHARACTERS, "a", ["b", "c"], **options)
    with pytest.raises(ConfigError, match=sentence):
        rank_file(tmp_path / "none.jsonl", lambda: pytest.fail("loaded"), **options)


def test_no_rule(small):
    with pytest.raises(ConfigError, match="There is no rule 'best'"):
        rank(small, CHARACTERS, "a", ["b", "c"], rule="best")


# Files.


def test_forms_of_candidates(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "a", "candidates": ["x", "y"], "id": "first"},
        {"prompt": CHAT, "response": "five"},
        "",
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"problem_id": "p/1", "problem": "1 + 1?", "solution": "2", "answer": "2", "id": 7},
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "six"}]},
        {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "c"}], "rejected": "d"},
        {"problem_id": "p/1", "problem": "1 + 1?", "solution": "3", "id": 8},
        {"prompt": CHAT, "candidate": "seven"},
    )
    found = CandidatesFile(path)
    assert len(found) == 5
    question = [{"role": "user", "content": "1 + 1?"}]
    for _ in range(2):  # as often as one likes
        assert [(group.id, group.prompt, list(group.texts)) for group in found] == [
            ("first", "a", ["x", "y"]),
            (1, CHAT, ["five", "six", "seven"]),
            (2, "a", ["good", "bad"]),
            ("p/1", question, ["2", "3"]),
            (4, CHAT, ["c", "d"]),
        ]


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([], "has no candidates"),
        (["", "{"], r"line 2 is not JSON"),
        (["[1]"], r"line 1 has no candidates of a prompt: it must have a \"prompt\""),
        ([{"text": "a"}], "line 1 has no candidates of a prompt"),
        ([{"prompt": "a"}], "line 1 has a prompt and no candidate"),
        ([{"prompt": 3, "candidates": ["a", "b"]}], "line 1 is of type int"),
        ([{"prompt": [{"role": "user"}], "candidates": ["a", "b"]}], "line 1 holds .*each with role"),
        ([{"prompt": "a", "candidates": ["a"]}], "line 1 has one candidate; choosing"),
        ([{"prompt": "a", "candidates": "ab"}], "line 1 has str for candidates"),
        ([{"prompt": "a", "candidates": ["a", " ", ""]}], "line 1: candidate 2 is empty"),
        ([{"prompt": "a", "response": ""}], "line 1: candidate 0 is empty"),
        ([{"prompt": "a", "response": 5}], "line 1: candidate 0 is of type int"),
        (
            [{"prompt": name, "response": "x"} for name in "aba"],
            "line 2 has the only candidate of its prompt",
        ),
    ],
)  # fmt: skip
def test_files_that_hold_something_else(tmp_path, records, sentence):
    with pytest.raises(InputError, match=sentence):
        CandidatesFile(write(tmp_path, *records))


def test_what_solve_wrote_may_be_empty(tmp_path, caplog):
    rows = [{"problem_id": "p", "problem": "1 + 1?", "solution": text} for text in ("2", "", "3", "")]
    path = write(tmp_path, *rows, {"problem_id": "q", "problem": "2 + 2?", "solution": ""})
    assert [list(group.texts) for group in CandidatesFile(path)] == [["2", "3"]]
    assert f"Empty solutions in {path} left out: 3." in caplog.text


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*missing.jsonl; check the path"):
        CandidatesFile(tmp_path / "missing.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        CandidatesFile(tmp_path / "bytes.jsonl")


def test_a_large_file_is_not_held(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for half in range(2):  # the candidates of a prompt are far apart
            for number in range(200):
                file.write(json.dumps({"prompt": f"prompt {number}", "response": f"{half} " * 50_000}) + "\n")
    assert path.stat().st_size > 40e6
    tracemalloc.start()
    count = sum(len(group.texts) for group in CandidatesFile(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 400
    assert peak < 4e6


def test_rows_are_written(small, tmp_path, capsys):
    path = write(
        tmp_path,
        {"prompt": PROMPTS[0], "candidates": CANDIDATES[0]},
        {"prompt": PROMPTS[1], "candidates": CANDIDATES[1], "prompt_id": "sea/1"},
    )
    expected = rank(small, CHARACTERS, PROMPTS, CANDIDATES, rule="lowest_surprisal")
    expected["prompt"] = expected["prompt"].map({0: 0, 1: "sea/1"})

    def load():
        return small, CHARACTERS

    assert rank_file(path, load, "jsonl", tmp_path / "out.jsonl", rule="lowest_surprisal") == (2, None)
    text = (tmp_path / "out.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    pd.testing.assert_frame_equal(pd.DataFrame(rows), pd.DataFrame(expected), check_dtype=False)
    assert rank_file(path, load, "jsonl", rule="lowest_surprisal") == (2, None)
    assert capsys.readouterr().out == text
    rank_file(path, load, "csv", tmp_path / "out.csv", rule="lowest_surprisal")
    read = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    assert [row["text"] for row in read] == expected["text"].tolist()
    np.testing.assert_allclose([float(row["phi_mean"]) for row in read], expected["phi_mean"])
    assert list(read[0]) == list(expected)
    assert not [name for name in tmp_path.iterdir() if name.suffix == ".tmp"]


def test_the_terminal_has_a_table_for_each_prompt(small, tmp_path, capsys):
    path = write(
        tmp_path, *({"prompt": p, "candidates": c} for p, c in zip(PROMPTS, CANDIDATES, strict=True))
    )
    assert rank_file(path, lambda: (small, CHARACTERS), rule="shortest") == (2, None)
    shown = capsys.readouterr().out
    assert shown.count("By shortest") == 2
    assert shown.index("2 + 3 =") < shown.index("6, I think") < shown.index("The sea is")
    for heading in ("rank", "score", "tokens", *METRICS):
        assert heading in shown


def test_the_terminal_says_which_were_kept(small, tmp_path, capsys):
    records = [{"prompt": PROMPTS[0], "candidates": LONG}, {"prompt": "a", "candidates": ["b", "c"]}]
    path = write(tmp_path, *records)
    ranked = rank_file(path, lambda: (small, CHARACTERS), prefix=3)
    shown = capsys.readouterr().out
    assert sorted(re.findall(r" (yes|no) +\d", shown)) == ["no"] * 3 + ["yes"] * 4
    assert "nan" not in shown
    assert "Kept by their first 3 tokens" in shown
    table = rank(small, CHARACTERS, PROMPTS[0], LONG, prefix=3)
    total = sum(map(len, LONG))
    assert ranked.saved == pytest.approx(table.attrs["saved"] * total / (total + 2))
    assert str(ranked) == f"candidates of 2 prompts; choosing early saved {ranked.saved:.1%} of their tokens"
    assert "kept" in table._repr_html_()


def test_a_table_shows_what_a_terminal_would_obey(small):
    candidates = ["red \x1b[31m", "[bold]not bold[/bold]\nsecond line" + "x" * 500]
    table = rank(small, CHARACTERS, "go\x07 " * 200, candidates)
    console = Console(file=io.StringIO(), width=100)
    console.print(ranking_table(table, "go\x07 " * 200, "highest_phi"))
    shown = console.file.getvalue()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold]not" in shown
    assert "⏎" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert len(shown.splitlines()) < 20


def test_options_are_checked_before_a_model_is_loaded(tmp_path):
    def load():
        raise AssertionError

    path = write(tmp_path, {"prompt": "a", "candidates": ["b", "c"]})
    with pytest.raises(ConfigError, match="--format terminal goes to the terminal"):
        rank_file(path, load, "terminal", tmp_path / "out")
    with pytest.raises(ConfigError, match="There is no rule"):
        rank_file(path, load, rule="best")
    with pytest.raises(InputError, match="There is no file"):
        rank_file(tmp_path / "none.jsonl", load)
    with pytest.raises(InputError, match="line 1 has one candidate"):
        rank_file(write(tmp_path, {"prompt": "a", "candidates": ["b"]}), load)


def test_output_that_cannot_be_written(small, tmp_path):
    path = write(tmp_path, {"prompt": "a", "candidates": ["b", "c"]})
    with pytest.raises(OutputError, match="Cannot write"):
        rank_file(path, lambda: (small, CHARACTERS), "csv", tmp_path / "none" / "out.csv")


# Docs.


def test_the_docs_run_as_they_stand():
    text = (Path(__file__).parent.parent / "docs" / "ranking.md").read_text(encoding="utf-8")
    names = {}
    # The block after it needs a policy to train.
    exec("\n".join(re.findall(r"```python\n(.*?)```", text.partition("<!-- not run")[0], re.DOTALL)), names)
    assert sorted(names["best"]["prompt"]) == [0, 1]
    assert names["table"]["score"].is_monotonic_decreasing
    for line in re.search(r"```json\n(.*?)```", text, re.DOTALL)[1].splitlines():
        assert {"prompt"} < set(json.loads(line))
