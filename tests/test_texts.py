"""Levels of text: read, built, measured in a language model that was trained here, drawn and told."""

import csv
import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

import philens
from philens import cli
from philens.errors import ConfigError, InputError
from philens.findings import statistics
from philens.findings.reproduce import reproduce, reproduce_texts
from philens.findings.statistics import difference
from philens.findings.texts import EARLY, measure_texts, score_texts, text_rows
from philens.report.figures import figure_texts
from philens.report.terminal import text_pairs_table, texts_table
from philens.scoring.scores import Span, TokenScores
from philens.tasks.levels import (
    LevelText,
    build_shuffled,
    build_trivial,
    in_order,
    load_levels,
    read_levels,
    role,
    with_built,
)
from philens.training import trainer as trainer_module
from philens.training.recipe import load_recipe
from philens.training.run import load_run, load_tokenizer
from philens.training.trainer import train
from tiny import TINY

WORDS = ["the", "river", "stood", "still", "and", "nobody", "asked", "why", "it", "did", "so", "that", "day"]
FILES = {"results.json", "texts.csv", "documents.csv", "texts.png", "texts.svg"}


def sentence(seed: int, words: int = 30) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


# --- reading


def fill(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def test_every_form_of_a_folder_is_read(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "a.json": {"level": "code", "user": "Write code", "assistant": "x = 1"},
            "b.json": {"text": "without a level", "user": None},
            "c.jsonl": '{"level": "poems", "text": "one"}\n\n{"level": "poems", "text": "two\\u2028lines"}\n',
            "d.txt": b"\xef\xbb\xbfwith a mark",
            "licences/LICENSE": "Permission is hereby granted",
            "prose/deep/e.md": "Once upon",
            "prose/f.json": {"text": "by its folder"},
            "prose/g.json": {"level": "shuffled", "text": "by itself"},
            "prose/empty.txt": " \n",
            "prose/picture.png": b"\x89PNG",
            ".hidden/h.txt": "no",
            "prose/.i.txt": "no",
        },
    )
    assert read_levels(tmp_path) == [
        LevelText("code", "a.json", "x = 1", "Write code"),
        LevelText("own", "b.json", "without a level"),
        LevelText("poems", "c.jsonl:1", "one"),
        LevelText("poems", "c.jsonl:3", "two\u2028lines"),
        LevelText("own", "d.txt", "with a mark"),
        LevelText("licences", "licences/LICENSE", "Permission is hereby granted"),
        LevelText("prose", "prose/deep/e.md", "Once upon"),
        LevelText("prose", "prose/f.json", "by its folder"),
        LevelText("shuffled", "prose/g.json", "by itself"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no text; put JSON records, or text files by level, into it."),
        ({"a.txt": "", "b.png": b"x"}, "holds no text;"),
        ({"a.json": "{"}, r"a.json is not JSON \(.*\); correct or remove it."),
        ({"a.jsonl": '{"text": "a"}\n{"text": '}, r"a.jsonl line 2 is not JSON \("),
        ({"a.json": ["x"]}, r'a.json is no record: it must look like \{"level": "code", "text": "..."\}.'),
        (
            {"a.json": {"level": "a", "txet": "x"}},
            "a.json has an unknown field 'txet'; records have level, user",
        ),
        ({"a.json": {"level": "a"}}, "a.json has neither of the fields text and assistant;"),
        ({"a.json": {"text": "a", "assistant": "b"}}, "a.json has both of the fields text and assistant;"),
        ({"a.json": {"level": 3, "text": "a"}}, "a.json: level must be text."),
        ({"a.json": {"level": "", "text": "a"}}, "a.json: level must be text."),
        ({"a.json": {"level": None, "text": "a"}}, "a.json: level must be text."),
        ({"a.json": {"text": None}}, "a.json: text must be text."),
        ({"a.json": {"text": "a", "user": ["b"]}}, "a.json: user must be text."),
        ({"a.txt": b"abc\xff"}, r"a.txt is not text in UTF-8 \(byte 3\); convert or remove it."),
        (
            {"a.json": {"level": "trivial", "text": "1 2 3"}},
            "There is one level, trivial; give texts of another",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_levels(fill(tmp_path, files))
    assert re.fullmatch(r"[^\n]+[.]", str(caught.value))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; give a folder"):
        read_levels(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; give a folder"):
        read_levels(tmp_path / "file")


def test_levels_come_in_the_papers_order() -> None:
    names = ["zebra", "literature", "own", "code", "Shuffled", "code", "licenses", "predictable", "apple"]
    expected = ["predictable", "licenses", "Shuffled", "code", "literature", "own", "apple", "zebra"]
    assert in_order(names) == expected
    assert [role(name) for name in expected[:4]] == ["trivial", "memorised", "shuffled", "code"]
    assert role("zebra") is None


# --- building


def test_shuffled_texts_are_the_same_words_in_texts_as_long() -> None:
    texts = [LevelText("own", f"{n}", sentence(n, words)) for n, words in enumerate((5, 40, 17))]
    built = build_shuffled(texts)
    assert [len(text.text.split()) for text in built] == [5, 40, 17]
    words, theirs = ([word for text in group for word in text.text.split()] for group in (built, texts))
    assert Counter(words) == Counter(theirs)
    assert words != theirs
    assert all(text.built and text.level == "shuffled" and text.user is None for text in built)
    assert built == build_shuffled(texts)
    assert built != build_shuffled(texts, seed=1)
    replies = build_shuffled([replace(text, user="Write") for text in texts])
    assert {text.user for text in replies} == {"Write random text without structure"}
    assert build_shuffled([replace(texts[0], user="Write"), *texts[1:]]) == built


def test_trivial_texts_are_predictable_and_as_long_as_the_median() -> None:
    texts = [LevelText("own", f"{n}", "x" * length) for n, length in enumerate((10, 900, 9000))]
    built = build_trivial(texts)
    assert built == build_trivial(texts)
    assert len({text.text for text in built}) == len({text.name for text in built}) == 8
    assert all(900 <= len(text.text) <= 1000 and text.built and text.user is None for text in built)
    found = {text.name: text.text.split("\n") for text in built}
    numbers = [int(line) for line in found["counting"]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    steps = np.diff([int(line) for line in found["steps"]])
    assert (steps == steps[0]).all()
    assert steps[0] > 1
    for line in found["binary"]:
        number, binary = line.split(" - ")
        assert int(binary, 2) == int(number)
    for line in found["times table"]:
        first, second, product = map(int, re.findall(r"\d+", line))
        assert first * second == product
    assert len(set(found["alphabet"])) == len(set(found["repeated sentence"])) == 1
    assert sorted(found["alphabet"][0].split()) == [chr(code) for code in range(97, 123)]
    assert len({line.split()[1] for line in found["dates"]}) == 7
    assert built != build_trivial(texts, seed=1)
    # The length of a book is not needed, nor that of a word.
    assert max(len(text.text) for text in build_trivial([LevelText("own", "", "x" * 99_999)])) < 4100
    assert min(len(text.text) for text in build_trivial([LevelText("own", "", "x")])) >= 500
    assert all(text.user for text in build_trivial([replace(text, user="Write") for text in texts]))


def test_only_what_is_missing_is_built() -> None:
    own, trivial, shuffled = (LevelText(name, name, "a b c") for name in ("own", "predictable", "shuffled"))
    levels = [
        {text.level for text in with_built(texts)} for texts in ([own], [own, trivial], [own, shuffled])
    ]
    assert levels == [{"own", "trivial", "shuffled"}, {"own", "predictable", "shuffled"}, levels[0]]
    assert with_built([own, trivial, shuffled]) == [own, trivial, shuffled]
    # Shuffled words of trivial texts would be trivial.
    words = {word for text in with_built([own, trivial]) if text.built for word in text.text.split()}
    assert words == {"a", "b", "c"}
    assert len([text for text in with_built([own, trivial]) if text.built]) == 1


def test_documents_are_drawn_from_each_level(tmp_path: Path) -> None:
    fill(tmp_path, {f"{level}/{n}.txt": f"{level} {n}" for level in ("code", "prose") for n in range(9)})
    texts = load_levels(tmp_path, 4)
    assert Counter(text.level for text in texts) == dict.fromkeys(["trivial", "shuffled", "code", "prose"], 4)
    assert [text.level for text in texts] == [
        name for name in ("trivial", "shuffled", "code", "prose") for _ in range(4)
    ]
    assert texts == load_levels(tmp_path, 4)
    assert texts != load_levels(tmp_path, 4, seed=1)
    assert len(load_levels(tmp_path)) == 8 + 18 + 18


# --- measuring


def made_scores(phi: Any, surprisal: Any, with_layer: Any = None, spans: Any = ()) -> TokenScores:
    count = len(phi)
    offsets = np.stack([np.arange(count), np.arange(1, count + 1)], 1)
    columns = {"phi": phi, "surprisal": surprisal}
    if with_layer is not None:
        columns["surprisal_with_layer"] = with_layer
    columns = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    return TokenScores("x" * count, np.zeros(count, np.int64), offsets, columns, spans)


PHI = {"predictable": 2.0, "licenses": 3.0, "shuffled": 4.0, "code": 6.0, "literature": 7.0}
SURPRISAL = {"predictable": 0.3, "licenses": 2.5, "shuffled": 6.5, "code": 1.9, "literature": 3.4}


def made(
    phi: dict[str, float] = PHI, surprisal: dict[str, float] = SURPRISAL, texts: int = 6, spread: float = 0.3
) -> tuple[list[LevelText], list[TokenScores]]:
    """Texts of other lengths and means each."""
    random = np.random.default_rng(0)
    levels, scores = [], []
    for level in phi:
        for number in range(texts):
            length = int(random.integers(20, 60))
            own = random.normal(size=3) * spread
            values = random.gamma(9, 1 / 9, size=(3, length)) * [[phi[level]], [surprisal[level]], [0.1]]
            values += own[:, None] * [[1.0], [0.1], [0.1]]
            values[1:, 0] = np.nan
            levels.append(LevelText(level, f"{level} {number}", "x" * length))
            scores.append(made_scores(values[0], values[1], values[1] + values[2]))
    return levels, scores


def test_levels_are_those_of_the_scores_numbers() -> None:
    texts, scores = made(texts=12)
    results = measure_texts(texts, scores)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert list(results["levels"]) == list(PHI)
    for name, level in results["levels"].items():
        own = [found for text, found in zip(texts, scores, strict=True) if text.level == name]
        columns = {key: [found.columns[key].astype(float) for found in own] for key in own[0].columns}
        columns["gap"] = [
            a - b for a, b in zip(columns["surprisal_with_layer"], columns["surprisal"], strict=True)
        ]
        columns["phi_later"] = [values[EARLY:] for values in columns["phi"]]
        assert level["texts"] == level["tokens_without_surprisal"] == 12
        assert level["tokens"] == sum(map(len, own))
        assert not level["built"]
        for key, values in columns.items():
            assert level[key]["mean"] == pytest.approx(np.nanmean(np.concatenate(values)), rel=1e-9)
            assert level[key]["ci95"] == pytest.approx(direct_interval(values), rel=0.03, abs=0.02)
        found = [text for text in results["texts"] if text["level"] == name]
        assert [text["document"] for text in found] == [text.name for text in texts if text.level == name]
        for key, values in columns.items():
            means = [np.nanmean(value) for value in values]
            assert [text[key] for text in found] == pytest.approx(means, rel=1e-9)
    rows = text_rows(results)
    assert [row["level"] for row in rows] == list(PHI)
    assert rows[3]["phi_low"] == results["levels"]["code"]["phi"]["ci95"][0]
    assert rows[3]["role"] == "code"


def direct_interval(values: list[np.ndarray], resamples: int = 20_000) -> list[float]:
    """Resample texts, average their tokens, take quantiles widened for few texts: written out."""
    sums = np.array([np.nansum(value) for value in values])
    counts = np.array([np.isfinite(value).sum() for value in values])
    draws = np.random.default_rng(1).integers(len(values), size=(resamples, len(values)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    width = stats.t.ppf(0.975, len(values) - 1) * np.sqrt(len(values) / (len(values) - 1))
    tail = stats.norm.cdf(-width)
    return np.quantile(means, [tail, 1 - tail]).tolist()


def test_pairs_and_the_claim() -> None:
    results = measure_texts(*made())
    assert results["phi_order"] == ["literature", "code", "shuffled", "licenses", "predictable"]
    assert results["surprisal_order"] == ["shuffled", "literature", "licenses", "code", "predictable"]
    assert results["orders_differ"]
    assert results["holds"]
    pairs = {(pair["first"], pair["second"]): pair for pair in results["pairs"]}
    assert len(pairs) == 10
    claimed = {names for names, pair in pairs.items() if pair["claim"]}
    assert claimed == {
        (first, second)
        for first in ("code", "literature")
        for second in ("predictable", "licenses", "shuffled")
    }
    means = {name: level["phi"]["mean"] for name, level in results["levels"].items()}
    for (first, second), pair in pairs.items():
        assert pair["difference"]["value"] == pytest.approx(means[first] - means[second])
        assert pair["ratio"]["value"] == pytest.approx(means[first] / means[second])
        for key in ("difference", "ratio"):
            low, high = pair[key]["ci95"]
            assert low < pair[key]["value"] < high
        ours, theirs = (results["levels"][name]["phi"]["ci95"] for name in (first, second))
        assert pair["separated"] == (ours[0] > theirs[1] or ours[1] < theirs[0])
    assert all(pairs[names]["separated"] for names in claimed)


@pytest.mark.parametrize(
    ("phi", "surprisal", "spread"),
    [
        (PHI | {"licenses": 9.0}, SURPRISAL, 0.3),  # one is higher
        (PHI | {"shuffled": 5.9}, SURPRISAL, 0.6),  # one is as high
        (PHI, PHI, 0.3),  # surprisal says the same
        ({name: PHI[name] for name in ("code", "literature")}, SURPRISAL, 0.3),  # nothing to compare
    ],
)
def test_the_claim_does_not_hold(phi: dict[str, float], surprisal: dict[str, float], spread: float) -> None:
    results = measure_texts(*made(phi, surprisal, spread=spread))
    assert results["holds"] is False
    text = printed(texts_table(results))
    if any(pair["claim"] for pair in results["pairs"]):
        assert "does not hold here" in text
    else:
        assert "Nothing to compare" in text


def test_differences_are_as_wide_as_those_of_independent_means() -> None:
    random = np.random.default_rng(0)
    values, documents = random.normal(size=(2, 40)), np.arange(40)
    first, second = (statistics.mean(values[i], documents, seed=(0, i)) for i in range(2))
    found = difference(first, second)
    assert found.value == pytest.approx(values[0].mean() - values[1].mean())
    half = stats.t.ppf(0.975, 39) * np.sqrt(values.var(axis=1, ddof=1).sum() / 40)
    assert found.ci95 == pytest.approx((found.value - half, found.value + half), abs=0.05)
    assert (found.documents, found.rows) == (40, 80)


def test_one_text_has_a_mean_and_no_interval() -> None:
    results = measure_texts(*made(texts=1))
    json.dumps(results, allow_nan=False)  # raises at a NaN
    assert results["levels"]["code"]["phi"]["ci95"] == [None, None]
    assert not any(pair["separated"] for pair in results["pairs"])
    assert not results["holds"]
    assert "1 text\n" in re.sub(r" +\n", "\n", printed(texts_table(results)).replace("  ", "\n"))
    assert len(figure_texts(results).axes) == 2


def test_tokens_that_count() -> None:
    """Of a chat the assistant's, else those with text: neither BOS nor the template."""
    values = np.arange(10.0)
    chat = made_scores(values, values * 2, spans=[Span("user", 1, 4), Span("assistant", 5, 9)])
    bos = made_scores(values, values * 2)
    bos.offsets[0] = 0
    texts = [LevelText("code", "chat", "x"), LevelText("trivial", "bos", "x")]
    results = measure_texts(texts, [chat, bos])["levels"]
    assert results["code"]["phi"]["mean"] == np.mean([5, 6, 7, 8])
    assert results["code"]["surprisal"]["mean"] == 13
    assert (results["code"]["tokens"], results["trivial"]["tokens"]) == (4, 9)
    assert results["trivial"]["phi"]["mean"] == 5
    assert results["code"]["gap"] is None
    assert results["code"]["phi_later"] is None
    empty = made_scores(values, values, spans=[Span("user", 1, 9), Span("assistant", 9, 9)])
    with pytest.raises(InputError, match="chat template leaves out chat; score texts alone"):
        measure_texts(texts, [empty, bos])


# --- telling and drawing


def printed(table: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table_says_what_the_results_say() -> None:
    texts, scores = made({**PHI, "[b]zebra[/b]": 1.0}, {**SURPRISAL, "[b]zebra[/b]": 1.0})
    built = [replace(text, built=text.level == "shuffled") for text in texts]
    results = measure_texts(built, scores)
    lines = printed(texts_table(results)).splitlines()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "[b]zebra[/b]" in text
    assert re.search(r"shuffled .* 448 / 6.51", text)
    assert "6 texts, built" in text
    low, high = results["levels"]["code"]["phi"]["ci95"]
    assert f"[{low:.2f}, {high:.2f}]" in text
    said = " ".join(text.split())
    assert (
        "The claim that the phi of code and literature stands above that of predictable, licenses and "
        "shuffled holds here: 6 of 6 pairs are above with separate intervals; surprisal orders these levels "
        "otherwise."
    ) in said
    assert "an interval says little" not in said
    pairs = printed(text_pairs_table(results))
    assert len(re.findall(r"  above$", pairs, re.MULTILINE)) == 6
    assert "zebra" not in pairs
    few = " ".join(printed(texts_table(measure_texts(*made(texts=3)))).split())
    assert "Fewer than 5 texts, so that an interval says little: predictable, licenses, shuffled, code" in few


def test_the_figure_has_a_dot_for_every_text() -> None:
    texts, scores = made(PHI | {"$odd_{": 3.0}, SURPRISAL | {"$odd_{": 1.0}, texts=3)
    results = measure_texts([replace(text, built=text.level == "code") for text in texts], scores)
    figure = figure_texts(results)
    figure.canvas.draw()
    for axes, quantity in zip(figure.axes, ("phi", "surprisal"), strict=True):
        drawn = np.sort(np.concatenate([line.get_xdata() for line in axes.lines if line.get_alpha()]))  # pyright: ignore
        assert drawn == pytest.approx(sorted(text[quantity] for text in results["texts"]))
        means = [container.lines[0].get_xdata()[0] for container in axes.containers]  # pyright: ignore
        assert means == [level[quantity]["mean"] for level in results["levels"].values()]
        assert axes.get_xlim()[0] == 0
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[3:] == ["code, built\n3 texts", "literature\n3 texts", "$odd_{\n3 texts"]
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # the first is above


# --- a model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base trained on text for a moment, and a run that gives it, frozen, a layer."""
    folder = tmp_path_factory.mktemp("runs")
    fill(folder / "data", {f"{n}.txt": sentence(n, 60) for n in range(30)})
    keys = {key: value for key, value in TINY.items() if not key.startswith(("phi", "data."))}
    keys |= {
        "model.tokenizer": "bytes",
        "data.parts": {"mine": {"source": str(folder / "data")}},
        "data.length": 64,
        "data.group": 3,
        "optimizer.name": "adamw",
        "train.compile": False,
        "train.save_every": 0,
    }
    layer = {"phi": {"layer": 0, "prior_heads": 2}, "model.base": str(folder / "base" / "model")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "draw_course", lambda folder: None)
        assert train(load_recipe("text_base", keys), folder / "base") is not None
        assert train(load_recipe("text_base", keys | layer), folder / "layer") is not None
    assert not (folder / "layer" / "model").exists()
    return folder / "base", folder / "layer"


@pytest.fixture
def levels(tmp_path: Path) -> Path:
    return fill(
        tmp_path / "levels",
        {
            **{f"p{n}.json": {"level": "prose", "user": "Write", "assistant": sentence(n)} for n in range(3)},
            **{
                f"t{n}.json": {"level": "predictable", "user": "Count", "assistant": "12345 " * (20 + n)}
                for n in range(3)
            },
        },
    )


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: Any) -> tuple[int, str, str]:
        code = cli.main(["reproduce", "texts", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "texts" / "results.json").read_text(), parse_constant=pytest.fail)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_from_a_run_to_a_finding(runs: tuple[Path, Path], levels: Path, command: Any) -> None:
    code, out, err = command("--model", runs[1], "--levels", levels, "--plain", "--output", "out")
    assert (code, err) == (0, "")
    assert "phi and surprisal per level of text" in out
    assert "phi of one level against another" in out
    assert "Wrote out/texts." in out
    assert {path.name for path in Path("out/texts").iterdir()} == FILES
    results = results_of(Path("out"))
    assert list(results)[:6] == ["finding", "model", "adapter", "form", "seed", "kl"]
    assert (results["finding"], results["form"], results["kl"]) == ("texts", "text", "exact")
    assert results["provenance"]["window"] == 64
    assert results["recipe"]["data"]["length"] == 64
    assert list(results["levels"]) == ["predictable", "shuffled", "prose"]
    assert [level["built"] for level in results["levels"].values()] == [False, True, False]

    # The same, from philens.score.
    lens, _ = load_run(runs[1])
    tokenizer = load_tokenizer(runs[0] / "model")
    scores = philens.score(lens, tokenizer, [sentence(n) for n in range(3)], window=64)
    for name in ("phi", "surprisal", "surprisal_with_layer"):
        # BOS, the first token, is not of the text.
        values = np.concatenate([found.columns[name][1:] for found in scores])
        assert results["levels"]["prose"][name]["mean"] == pytest.approx(values.mean(dtype=float), rel=1e-5)
    prose = results["levels"]["prose"]
    gap = prose["surprisal_with_layer"]["mean"] - prose["surprisal"]["mean"]
    assert prose["gap"]["mean"] == pytest.approx(gap, abs=1e-6)
    assert prose["tokens"] == sum(len(sentence(n).encode()) for n in range(3))
    assert prose["tokens_without_surprisal"] == 0
    assert results["levels"]["shuffled"]["tokens"] == prose["tokens"]

    rows = rows_of(Path("out/texts/texts.csv"))
    assert [row["level"] for row in rows] == list(results["levels"])
    assert float(rows[2]["phi"]) == prose["phi"]["mean"]
    assert float(rows[2]["gap_high"]) == prose["gap"]["ci95"][1]
    documents = rows_of(Path("out/texts/documents.csv"))
    assert [row["document"] for row in documents[-3:]] == ["p0.json", "p1.json", "p2.json"]
    assert float(documents[-1]["phi"]) == results["texts"][-1]["phi"]
    assert Path("out/texts/texts.png").read_bytes().startswith(b"\x89PNG")

    assert command("--model", runs[1], "--levels", levels, "--plain", "--output", "again")[0] == 0
    for name in FILES - {"texts.png"}:
        assert (Path("again/texts") / name).read_bytes() == (Path("out/texts") / name).read_bytes(), name


def test_chats_count_the_assistants_tokens(runs: tuple[Path, Path], levels: Path, command: Any) -> None:
    code, _, err = command("--model", runs[1], "--levels", levels, "--documents", 2)
    assert (code, err) == (0, "")
    results = results_of(Path("runs/reproduce-layer"))
    assert results["form"] == "chat"
    assert all(level["texts"] == 2 for level in results["levels"].values())
    plain = reproduce_texts(runs[1], levels, Path("plain"), documents=2, plain=True)
    for name, level in results["levels"].items():
        assert level["tokens"] == plain["levels"][name]["tokens"]
        assert level["phi"]["mean"] != plain["levels"][name]["phi"]["mean"]
    fill(levels, {"last.json": {"level": "prose", "assistant": "no user"}})
    code, _, err = command("--model", runs[1], "--levels", levels)
    assert code == 2
    assert "last.json has no user's message and other texts have one; give each one, or score" in err
    assert command("--model", runs[1], "--levels", levels, "--plain")[0] == 0


def test_a_base_and_an_adapter(runs: tuple[Path, Path], levels: Path) -> None:
    base, layer = runs
    options: dict[str, Any] = {"levels": levels, "plain": True}
    run = reproduce_texts(layer, output=Path("run"), **options)
    options |= {"model": base / "model"}
    both = reproduce_texts(adapter=layer / "adapter", output=Path("both"), window=64, **options)
    assert both["levels"] == run["levels"]
    assert both["recipe"] is None
    whole = reproduce_texts(adapter=layer, output=Path("whole"), **options)
    assert whole["provenance"]["window"] == 2048
    assert whole["levels"] != run["levels"]


def test_the_users_own_texts_alone(runs: tuple[Path, Path], tmp_path: Path, command: Any) -> None:
    fill(tmp_path / "mine", {f"{n}.txt": sentence(n, 40) for n in range(3)})
    code, out, _ = command("--model", runs[1], "--levels", "mine", "--kl", "official")
    assert code == 0
    assert "The claim that the phi of own stands above that of trivial and shuffled" in " ".join(out.split())
    results = results_of(Path("runs/reproduce-layer"))
    assert {name: level["texts"] for name, level in results["levels"].items()} == {
        "trivial": 8,
        "shuffled": 3,
        "own": 3,
    }
    # There is no user, so this is no chat, and neither are built texts.
    assert (results["form"], results["kl"]) == ("text", "official")
    exact = reproduce_texts(runs[1], Path("mine"), Path("exact"))
    assert exact["levels"]["own"]["phi"] != results["levels"]["own"]["phi"]
    assert exact["levels"]["own"]["surprisal"] == results["levels"]["own"]["surprisal"]


def test_a_lens_that_observes_has_no_gap_and_one_layer(runs: tuple[Path, Path]) -> None:
    base, _ = load_run(runs[1])
    tokenizer, texts = load_tokenizer(runs[0] / "model"), [LevelText("own", "a", sentence(0))]
    texts = with_built(texts)
    lens = philens.attach(base.detach(), philens.PHiConfig(layer=0, prior_heads=2, mode="observe"))
    results = measure_texts(texts, score_texts(lens, tokenizer, texts, 64))
    assert all(level["gap"] is None for level in results["levels"].values())
    assert results["levels"]["own"]["surprisal"]["mean"] > 0
    assert " none " in printed(texts_table(results))
    several = philens.PHiConfig(layers=[0, 1], prior_heads=2, mode="observe")
    with pytest.raises(ConfigError, match="texts measures one layer and this model has 2"):
        score_texts(philens.attach(lens.detach(), several), tokenizer, texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("texts --levels x", "texts are measured in a language model; give --model, a run or a base model."),
        (
            "texts --model x",
            "No texts were named; give --levels, a folder of texts of several levels, or of your own.",
        ),
        ("texts --model x --levels nowhere", "nowhere does not exist; give a folder with texts"),
        ("texts --model x --levels . --documents 1", "documents must be at least 2, not 1."),
        ("texts --scale smoke", "There is no option --scale; the nearest valid one is --"),
        ("texts --train.steps 3", "There is no option --train.steps; the nearest valid one is --"),
        ("texts --model levels --levels levels", "No PHi layer was named for levels; give --adapter,"),
        ("tasks --levels x", "There is no option --levels; the nearest valid one is --"),
        ("complexity --adapter x", "There is no option --adapter; the nearest valid one is --"),
    ],
)
def test_bad_options(words: str, message: str, levels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"philens: error: {message}")
    assert err.endswith(".\n")
    assert not Path("runs").exists()


def test_other_findings_are_not_of_texts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finding 'texts'; there are tasks, complexity"):
        reproduce("texts", "smoke", tmp_path)


def test_models_that_cannot_be_measured(runs: tuple[Path, Path], levels: Path, command: Any) -> None:
    code, _, err = command("--model", runs[0], "--levels", levels)
    assert code == 2
    assert "has no PHi layer; give it one by training" in err
    code, _, err = command("--model", runs[1], "--levels", levels, "--window", 5000)
    assert (code, err.count("\n")) == (2, 1)
    assert "A window of 5000 tokens is longer than the model's context of 2048" in err
