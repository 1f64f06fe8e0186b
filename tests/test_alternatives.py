"""Alternatives are what the model's own distribution says, whatever batch, window, tokenizer and way out."""

import json
import re
from html import unescape
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import make_llama, make_text_model
from philens import cli
from philens.bases.tokenizer import character_tokenizer
from philens.lens.metrics import METRICS
from philens.scoring.alternatives import COVERED, MOST, Alternatives, TokenTexts, percent
from philens.scoring.score import score
from philens.scoring.scores import TokenScores
from philens.support.errors import InputError
from test_score import TEXTS, Calls, distributions, lens_of
from test_score_cost import watched
from test_scores import TOKENIZERS

CHARACTERS = character_tokenizer()


def check(found: Alternatives, log_probabilities: torch.Tensor, ids: list[int]) -> None:
    """Against the distributions (T, V) after each token."""
    assert found[0] == []
    assert found.ranks[0] == 0
    for number, some in enumerate(found):
        assert some == found[number] == found[number - len(found)]
        if number == 0:
            continue
        p = log_probabilities[number - 1].exp().double()
        order = p.argsort(descending=True)
        needed = int((p[order].cumsum(0) < COVERED).sum()) + 1
        assert [one.token_id for one in some] == order[: min(needed, MOST)].tolist()
        np.testing.assert_allclose([one.probability for one in some], p[order[: len(some)]], rtol=1e-4)
        assert found.ranks[number] == (order == ids[number]).nonzero().item() + 1
        assert [one.text for one in some] == [chr(one.token_id) for one in some]


def test_they_are_the_likeliest_tokens_of_the_base(base) -> None:
    lens = lens_of(base)
    for one in score(lens, CHARACTERS, TEXTS, alternatives=True):
        ids = one.token_ids.tolist()
        assert one.alternatives is not None
        assert one.alternatives.of == "surprisal"
        check(one.alternatives, distributions(lens, ids), ids)


def test_there_are_few_where_the_model_is_sure() -> None:
    lens, counts = lens_of(make_llama()), set()
    with torch.no_grad():
        lens.base.model.norm.weight.mul_(6)
    for one in score(lens, CHARACTERS, TEXTS, alternatives=True):
        ids = one.token_ids.tolist()
        assert one.alternatives is not None
        check(one.alternatives, distributions(lens, ids), ids)
        counts |= set(one.alternatives.counts.tolist())
    assert len(counts) > 5


def test_they_are_of_the_surprisal_that_is_asked_for() -> None:
    lens = lens_of(make_llama())
    for metrics, of in (
        (["phi"], "surprisal"),
        (["surprisal", "surprisal_with_layer"], "surprisal"),
        (["surprisal_with_layer", "entropy"], "surprisal_with_layer"),
    ):
        (one,) = score(lens, CHARACTERS, TEXTS[0], metrics=metrics, alternatives=True)
        assert list(one.columns) == [name for name in METRICS if name in metrics]
        ids = one.token_ids.tolist()
        with torch.no_grad():
            ours = lens(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        assert one.alternatives is not None
        assert one.alternatives.of == of
        check(one.alternatives, distributions(lens, ids) if of == "surprisal" else ours, ids)
    assert score(lens, CHARACTERS, TEXTS[0])[0].alternatives is None


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_batches_windows_and_parts_change_nothing(batch_tokens: int, monkeypatch) -> None:
    lens, texts = lens_of(make_llama()), [*TEXTS, "abcab " * 50]

    def found(**options) -> list[dict]:
        scores = score(lens, CHARACTERS, texts, alternatives=True, window=64, **options)
        return [one.alternatives.to_lists() for one in scores]

    whole = found()
    monkeypatch.setattr("philens.lens.losses.POSITIONS_AT_ONCE", 3)
    monkeypatch.setattr("philens.lens.losses.LOGITS_READ_AT_ONCE", 700)
    for one, other in zip(found(batch_tokens=batch_tokens), whole, strict=True):
        for name in ("ranks", "token_ids", "texts"):
            assert one[name] == other[name]
        assert all(one["ranks"][1:])
        flat = [[*chain.from_iterable(lists["probabilities"])] for lists in (one, other)]
        np.testing.assert_allclose(*flat, rtol=1e-4)


def test_they_cost_no_pass_of_their_own() -> None:
    lens = lens_of(make_llama(vocab_size=1013, max_position_embeddings=2048))
    calls, text = Calls(lens), "abcdefghij " * 250
    score(lens, CHARACTERS, "warm")
    without = calls.of(lens, CHARACTERS, text, metrics=["phi", "surprisal"])
    assert calls.of(lens, CHARACTERS, text, metrics=["phi", "surprisal"], alternatives=True) == without
    shapes = watched(lambda: score(lens, CHARACTERS, text, metrics=["phi"], alternatives=True)).shapes
    vocabulary = [shape for shape in shapes if shape[-1:] == (1013,)]
    rows = 2**21 // 1013
    assert len(text) > rows
    assert vocabulary
    assert all(np.prod(shape[:-1]) <= rows for shape in vocabulary)


def test_a_distribution_that_overflowed_has_none() -> None:
    lens = lens_of(make_llama())
    with torch.no_grad():
        lens.base.lm_head.weight.data = lens.base.lm_head.weight.data.clone()
        lens.base.model.norm.weight.mul_(torch.nan)
    with pytest.raises(InputError, match="float32"):
        score(lens, CHARACTERS, "abc", metrics=["phi"], alternatives=True)
    (one,) = score(lens, CHARACTERS, "abc", metrics=["phi"], alternatives=True, overflow="nan")
    assert one.provenance["overflowed"] == 2
    assert one.alternatives is not None
    assert one.alternatives.to_lists()["ranks"] == [None] * 3
    assert [*one.alternatives] == [[], [], []]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_what_tokens_add(name: str) -> None:
    """Put together, the texts of a text's tokens are the text, but for what cuts a character in pieces."""
    tokenizer, text = TOKENIZERS[name], "the cat sat on the mat, hello world"
    texts = TokenTexts(tokenizer)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    texts.learn(ids)
    assert "".join(texts[token] for token in ids.tolist()).removeprefix(" ") == text
    if name.startswith("byte-level"):
        texts.learn(np.array([0, *tokenizer("語", add_special_tokens=False)["input_ids"]]))
        assert texts[0] == "<s>"


def made(text: str = "ab") -> TokenScores:
    (one,) = score(lens_of(make_llama()), CHARACTERS, text, metrics=["phi", "surprisal"], alternatives=True)
    return one


def test_json_and_tables() -> None:
    one = made("abcab abd")
    again = TokenScores.from_json(one.to_json())
    assert again.to_json() == one.to_json()
    assert one.alternatives is not None
    assert again.alternatives is not None
    assert [*again.alternatives] == [*one.alternatives]
    assert again.alternatives.of == "surprisal"
    assert "alternatives" not in json.loads(score(lens_of(make_llama()), CHARACTERS, "ab")[0].to_json())
    table = one.to_pandas()
    assert pd.isna(table["rank"][0])
    assert table["rank"][1:].tolist() == one.alternatives.ranks[1:].tolist()
    for number, some in enumerate(one.alternatives):
        assert table["alternatives"][number] == [other.text for other in some]
        expected = [other.probability for other in some]
        np.testing.assert_array_equal(np.float32(table["probabilities"][number]), expected)


def test_shapes_that_do_not_fit() -> None:
    one, none = np.ones(1, np.int64), np.zeros(0, np.float32)
    with pytest.raises(InputError, match=r"ranks must have shape \(1,\) like counts, not \(2,\)"):
        Alternatives("surprisal", np.ones(2, np.int64), one, one, none, {})
    with pytest.raises(InputError, match=r"probabilities must have shape \(1,\), not \(0,\)"):
        Alternatives("surprisal", one, one, one, none, {})
    scores = made()
    with pytest.raises(InputError, match="alternatives for 1 tokens, not 2"):
        TokenScores("a", scores.token_ids[:1], scores.offsets[:1], {}, alternatives=scores.alternatives)
    with pytest.raises(IndexError):
        scores.alternatives[2]  # pyright: ignore[reportOptionalSubscript]
    assert len(scores.alternatives[-5:]) == 2  # pyright: ignore[reportOptionalSubscript, reportArgumentType]


def test_percentages() -> None:
    assert [percent(share) for share in (1.0, 0.4211, 0.0996, 0.0994, 0.0123, 0.0004)] == [
        "100 %",
        "42 %",
        "10 %",
        "9.9 %",
        "1.2 %",
        "<0.1 %",
    ]


def test_hover_of_hostile_tokens() -> None:
    texts = {1: '"><script>x</script>', 2: " \n"}
    ranks, counts, ids, shares = np.array([0, 12]), np.array([0, 2]), np.array([1, 2]), [0.5, 0.25]
    found = Alternatives("surprisal", ranks, counts, ids, np.float32(shares), texts)
    assert found.notes() == ["", 'rank 12\n  50 % "><script>x</script>\n  25 % ␣⏎']


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), {"adapter": 1})


def test_the_command_line_has_them_in_every_form(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the cat < sat")

    def run(*words: str) -> str:
        assert cli.main(["score", "a.txt", "--model", str(model), "--alternatives", *words]) == 0
        return capsys.readouterr().out

    scores = TokenScores.from_json(run("--format", "jsonl"))
    lists = scores.alternatives.to_lists()  # pyright: ignore[reportOptionalMemberAccess]
    run("--format", "jsonl", "--output", "lines")
    assert '"alternatives": true' in Path("lines/_manifest.json").read_text()
    assert TokenScores.from_json(Path("lines/part-00000.jsonl").read_text()).alternatives.to_lists() == lists  # pyright: ignore[reportOptionalMemberAccess]
    run("--format", "parquet", "--output", "rows")
    row = pd.read_parquet("rows").iloc[0]
    assert [None if np.isnan(rank) else rank for rank in row["ranks"]] == lists["ranks"]
    for column, name in (("alternatives", "texts"), ("alternative_ids", "token_ids")):
        assert [list(some) for some in row[column]] == lists[name]
    for some, expected in zip(row["alternative_probabilities"], lists["probabilities"], strict=True):
        np.testing.assert_array_equal(some, np.float32(expected))
    rows = run("--format", "table").splitlines()
    assert rows[1].endswith("surprisal with layer    rank  likeliest")
    assert rows[2].endswith("none")
    rank, first = lists["ranks"][3], percent(lists["probabilities"][3][0])
    assert re.search(rf" {rank}  \S+ {first}, ", rows[5])
    run("--format", "html", "--output", "page.html")
    titles = [unescape(one) for one in re.findall(r'title="([^"]*)"', Path("page.html").read_text())]
    notes = scores.alternatives.notes()  # pyright: ignore[reportOptionalMemberAccess]
    assert [title.partition("\n")[2] for title in titles] == notes * 2


def test_coloured_tokens_have_no_place_for_them(model: Path, capsys, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    assert cli.main(["score", str(tmp_path / "a.txt"), "--model", str(model), "--alternatives"]) == 2
    assert "--alternatives has no place among coloured tokens" in capsys.readouterr().err
