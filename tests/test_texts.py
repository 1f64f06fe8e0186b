"""Levels of text: read, built, measured in a language model that was trained here, drawn and told."""

import csv
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

import philens
from philens import cli
from philens.findings import statistics
from philens.findings.figures import figure_levels_by_surprisal, figure_levels_course, figure_texts
from philens.findings.language_tables import (
    recitation_table,
    text_pairs_table,
    text_points_table,
    texts_table,
)
from philens.findings.reproduce import reproduce
from philens.findings.reproduce_texts import reproduce_texts
from philens.findings.statistics import difference
from philens.findings.text_tokens import (
    CountedTokens,
    extremes,
    measure_recitation,
    phi_by_surprisal,
    recited,
)
from philens.findings.texts import (
    EARLY,
    compare_points,
    cut_texts,
    measure_texts,
    score_texts,
    text_rows,
)
from philens.scoring.scores import Span, TokenScores
from philens.support.errors import ConfigError, InputError
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
from philens.training.build import load_tokenizer
from philens.training.opening import load_run
from philens.training.recipe import load_recipe
from philens.training.trainer import train
from tiny import TINY

WORDS = ["the", "river", "stood", "still", "and", "nobody", "asked", "why", "it", "did", "so", "that", "day"]
FILES = {"results.json", "texts.csv", "documents.csv", "tokens.csv", "surprisal.csv", "page.html"}
FILES |= {f"{name}.{kind}" for name in ("texts", "surprisal") for kind in ("png", "svg")}


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
        ({}, "has no text; put JSON records, or text files by level, into it."),
        ({"a.txt": "", "b.png": b"x"}, "has no text;"),
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
    assert len({text.text for text in built}) == len({text.name for text in built}) == len(built) == 24
    assert all(900 <= len(text.text) <= 1000 and text.built and text.user is None for text in built)
    found = {text.name: text.text.split("\n") for text in built}
    numbers = [int(line) for line in found["counting"]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    down = [int(line) for line in found["counting down"]]
    assert down == list(range(down[0], down[0] - len(down), -1))
    steps = np.diff([int(line) for line in found["steps"]])
    assert (steps == steps[0]).all()
    assert steps[0] > 1
    for line in found["binary"]:
        number, binary = line.split(" - ")
        assert int(binary, 2) == int(number)
    for line in found["hexadecimal"]:
        number, digits = line.split(" - ")
        assert int(digits, 16) == int(number)
    for line in found["sums"]:
        first, second, total = map(int, re.findall(r"\d+", line))
        assert first + second == total
    for line in found["song"]:
        before, after = map(int, re.findall(r"\d+", line))
        assert before - 1 == after
    assert {"101st", "102nd", "103rd", "104th", "111th", "112th", "113th"} < set(found["ordinals"])
    for line in found["times table"]:
        first, second, product = map(int, re.findall(r"\d+", line))
        assert first * second == product
    assert len(set(found["alphabet"])) == len(set(found["repeated sentence"])) == 1
    assert sorted(found["alphabet"][0].split()) == [chr(code) for code in range(97, 123)]
    assert len({line.split()[1] for line in found["dates"]}) == 7
    assert len(set(found["squares of a board"])) == 64
    assert len(set(found["days of the week"])) == 7
    assert len({line.split()[0] for line in found["months"]}) == 12
    assert found["alphabet backwards"][0] == found["alphabet"][0][::-1]
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
    assert len(load_levels(tmp_path)) == 24 + 18 + 18


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
    assert max(map(len, pairs.splitlines())) <= 80
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

    # A layer that has learned nothing, and the size of the state, stand beside phi.
    for control in ("phi_untrained", "state_norm"):
        assert prose[control]["mean"] > 0
        assert prose[control]["mean"] != prose["phi"]["mean"]
        pair = next(pair for pair in results["pairs"] if pair["second"] == "predictable" and pair["claim"])
        other = results["levels"]["predictable"][control]["mean"]
        assert pair["controls"][control]["value"] == pytest.approx(prose[control]["mean"] / other)

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


@pytest.mark.usefixtures("quick_findings")
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


@pytest.mark.usefixtures("quick_findings")
def test_a_base_and_an_adapter(runs: tuple[Path, Path], levels: Path) -> None:
    base, layer = runs
    options: dict[str, Any] = {"levels": levels, "plain": True}
    run = reproduce_texts(layer, output=Path("run"), **options)
    options |= {"model": base / "model"}
    both = reproduce_texts(adapters=[layer / "adapter"], output=Path("both"), window=64, **options)
    assert both["levels"] == run["levels"]
    assert both["recipe"] is None
    whole = reproduce_texts(adapters=[layer], output=Path("whole"), **options)
    assert whole["provenance"]["window"] == 2048
    assert whole["levels"] != run["levels"]


@pytest.mark.usefixtures("quick_findings")
def test_the_users_own_texts_alone(runs: tuple[Path, Path], tmp_path: Path, command: Any) -> None:
    fill(tmp_path / "mine", {f"{n}.txt": sentence(n, 40) for n in range(3)})
    code, out, _ = command("--model", runs[1], "--levels", "mine", "--kl", "official")
    assert code == 0
    assert "The claim that the phi of own stands above that of trivial and shuffled" in " ".join(out.split())
    results = results_of(Path("runs/reproduce-layer"))
    assert {name: level["texts"] for name, level in results["levels"].items()} == {
        "trivial": 24,
        "shuffled": 3,
        "own": 3,
    }
    # There is no user, so this is no chat, and neither are built texts.
    assert (results["form"], results["kl"]) == ("text", "official")
    exact = reproduce_texts(runs[1], Path("mine"), Path("exact"))
    assert exact["levels"]["own"]["phi"] != results["levels"]["own"]["phi"]
    assert exact["levels"]["own"]["surprisal"] == results["levels"]["own"]["surprisal"]


def test_a_lens_that_observes_has_no_gap(runs: tuple[Path, Path]) -> None:
    base, _ = load_run(runs[1])
    tokenizer, texts = load_tokenizer(runs[0] / "model"), [LevelText("own", "a", sentence(0))]
    texts = with_built(texts)
    lens = philens.attach(base.detach(), philens.PHiConfig(layer=0, prior_heads=2, mode="observe"))
    results = measure_texts(texts, score_texts(lens, tokenizer, texts, 64))
    assert all(level["gap"] is None for level in results["levels"].values())
    assert results["levels"]["own"]["surprisal"]["mean"] > 0
    assert " none " in printed(texts_table(results))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("texts --model x --levels nowhere", "nowhere does not exist; give a folder with texts"),
        ("texts --model x --levels . --documents 1", "documents must be at least 2, not 1."),
        (
            "texts --model x --levels . --tokens -1",
            "tokens must be at least 1, or 0 for whole texts, not -1.",
        ),
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


# --- several layers, and the course of a training


@pytest.fixture(scope="module")
def observing(runs: tuple[Path, Path]) -> Path:
    """An adapter with two layers that observe, beside the run of one that is in the path."""
    lens, _ = load_run(runs[1])
    config = philens.PHiConfig(layers=[0, 1], prior_heads=2, mode="observe")
    philens.attach(lens.detach(), config).save_pretrained(runs[1].parent / "several")
    return runs[1].parent / "several"


@pytest.mark.usefixtures("quick_findings")
def test_each_insertion_point_is_measured(runs: tuple[Path, Path], observing: Path, levels: Path) -> None:
    base = runs[0] / "model"
    results = reproduce_texts(base, levels, Path("out"), [observing, runs[1]], plain=True)
    first, second, third = results["points"]
    assert [point["insertion_point"] for point in (first, second, third)] == [
        "model.layers.0",
        "model.layers.1",
        "model.layers.0",
    ]
    assert [point["label"] for point in (first, second, third)] == [
        "several after model.layers.0",
        "several after model.layers.1",
        "layer after model.layers.0",
    ]
    assert results["levels"] == third["levels"]
    assert first["levels"]["prose"]["phi"] != second["levels"]["prose"]["phi"]
    # The base's own surprisal is read once, and its gap only where a layer is in the path.
    assert first["levels"]["prose"]["surprisal"] == third["levels"]["prose"]["surprisal"]
    assert first["levels"]["prose"]["gap"] is None
    alone = reproduce_texts(base, levels, Path("alone"), [runs[1]], plain=True)
    assert "points" not in alone
    assert alone["levels"] == results["levels"]
    rows = rows_of(Path("out/texts/texts.csv"))
    assert [row["label"] for row in rows[::3]] == [point["label"] for point in results["points"]]
    assert Path("out/texts/course.png").exists()
    assert results_of(Path("out"))["course"]["along"] is False
    assert "several after" in printed(text_points_table(results), 120)


@pytest.mark.usefixtures("quick_findings")
def test_checkpoints_are_the_course_of_a_training(
    runs: tuple[Path, Path], levels: Path, tmp_path: Path, command: Any
) -> None:
    run = tmp_path / "run"
    lens, _ = load_run(runs[1])
    for step in (2, 5):
        lens.save_pretrained(run / f"checkpoint-{step}" / "adapter")
        with torch.no_grad():
            lens.phi.encoder.weight.mul_(0.5)
    for folder in (run, run / "checkpoint-9"):
        shutil.copytree(runs[1] / "adapter", folder / "adapter")
    (run / "checkpoint-10.tmp").mkdir()
    options = ("--model", runs[0] / "model", "--levels", levels, "--plain", "--output", "out")
    code, out, err = command(*options, "--adapter", run, "--checkpoints")
    assert (code, err) == (0, "")
    results = results_of(Path("out"))
    # The run's own adapter is that of step 9, its last checkpoint.
    assert [point["label"] for point in results["points"]] == ["step 2", "step 5", "step 9"]
    assert results["course"]["along"] is True
    phi = [point["levels"]["prose"]["phi"]["mean"] for point in results["points"]]
    assert phi[0] == phi[2] != phi[1]  # the same layer was saved at step 2 and step 9
    assert results["levels"]["prose"]["phi"]["mean"] == phi[-1]
    assert "phi of each level along the training" in out
    assert {path.name for path in Path("out/texts").iterdir()} == FILES | {"course.png", "course.svg"}
    assert command(*options, "--adapter", run)[0] == 0
    assert "points" not in results_of(Path("out"))


def point(label: str, phi: dict[str, float]) -> dict[str, Any]:
    return {"label": label, **measure_texts(*made(PHI | phi, spread=0.05), resamples=200)}


def test_since_when_a_level_is_above_another() -> None:
    high, level = {"licenses": 30.0}, {"licenses": 6.5}
    points = [point("a", {}), point("b", high), point("c", level), point("d", {})]
    course = compare_points(points, along=True)
    pairs = {(pair["first"], pair["second"]): pair for pair in course["pairs"]}
    assert len(pairs) == 6
    assert pairs["code", "licenses"]["above_since"] == pairs["code", "licenses"]["separated_since"] == "d"
    assert pairs["literature", "licenses"]["above_since"] == "c"
    assert pairs["code", "shuffled"]["above_since"] == "a"
    falling = compare_points([point("a", {}), point("b", high)], along=True)["pairs"]
    assert [pair["above_since"] for pair in falling if pair["second"] == "licenses"] == [None, None]
    results = points[-1] | {"points": points, "course": course}
    said = " ".join(printed(text_points_table(results), 100).split())
    assert "code, licenses: above from d on, separate from d on." in said
    figure = figure_levels_course(
        results | {"points": [one | {"step": n} for n, one in enumerate(points)], "course": course}
    )
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn["licenses"] == pytest.approx([one["levels"]["licenses"]["phi"]["mean"] for one in points])


# --- texts cut, tokens of their own


def test_texts_are_cut_to_their_first_tokens(runs: tuple[Path, Path], levels: Path, command: Any) -> None:
    tokenizer = load_tokenizer(runs[0] / "model")
    texts = [LevelText("own", "a", "caf\u00e9 and more"), LevelText("own", "b", "x")]
    assert [text.text for text in cut_texts(tokenizer, texts, 6)] == ["caf\u00e9 ", "x"]
    assert cut_texts(tokenizer, texts, 99) == texts
    counts = {}
    for tokens in (0, 7):
        options = ("--model", runs[1], "--levels", levels, "--plain", "--tokens", tokens)
        assert command(*options, "--output", "out")[0] == 0
        results = results_of(Path("out"))
        counts[tokens] = [text["tokens"] for text in results["texts"]]
        assert results["tokens_read"] == (tokens or None)
    assert set(counts[7]) == {7}
    assert min(counts[0]) > 100


def test_sinks_are_left_out_of_phi_and_counted() -> None:
    texts, scores = made(texts=2)
    scores[0].columns["phi"][3] = 1e6
    scores[0].sinks[3] = True
    results = measure_texts(texts, scores)
    level = results["levels"]["predictable"]
    assert (level["sinks"], results["levels"]["code"]["sinks"]) == (1, 0)
    assert level["phi"]["mean"] < 10
    assert level["tokens"] == len(scores[0]) + len(scores[1])
    assert level["surprisal"]["mean"] == pytest.approx(
        np.nanmean(np.concatenate([one.surprisal.astype(float) for one in scores[:2]]))
    )
    assert all(token["phi"] < 100 for token in results["tokens"]["predictable"]["highest"])
    assert "1 attention sink left out of phi." in printed(texts_table(results))


def counted(surprisal: Any, phi: Any, name: str = "a") -> CountedTokens:
    columns = {"surprisal": np.asarray(surprisal, float), "phi": np.asarray(phi, float)}
    scores = made_scores(columns["phi"], columns["surprisal"])
    places = np.arange(len(columns["phi"]))
    return CountedTokens(
        LevelText("licences", name, "x"), scores, places, columns, np.zeros(len(places), bool)
    )


def test_runs_of_sure_tokens_are_recited() -> None:
    surprisal = np.array([np.nan, *[0.05] * 10, 0.1, *[0.0] * 9, 3.0, *[0.09] * 12])
    expected = np.zeros(33, bool)
    expected[1:11] = expected[22:] = True
    assert np.array_equal(recited(surprisal)[:33], expected)
    assert not recited(np.full(9, 0.0)).any()
    assert recited(np.full(10, 0.0)).all()
    assert not recited(np.array([])).any()


def test_recited_text_against_the_rest_of_the_same_text() -> None:
    """Texts differ in level; the difference within each is 3 nats, and 1 nat to sure tokens outside runs."""
    texts = [
        counted(
            [0.01] * 20 + [2.0] * 10 + [0.01] * 5 + [2.0],
            [own + 5.0] * 20 + [own + 2.5] * 10 + [own + 4.0] * 5 + [own - 5.0],
        )
        for own in (0.0, 10.0, 50.0)
    ]
    texts.append(counted([2.0] * 30, [900.0] * 30))  # nothing in it is recited
    found = measure_recitation(texts)
    rest = (10 * 2.5 + 5 * 4.0 - 5.0) / 16
    assert found["recited"]["mean"] == pytest.approx(5 + 20)
    assert found["recited_less_rest"]["mean"] == pytest.approx(5 - rest)
    assert found["recited_less_rest"]["ci95"] == pytest.approx([5 - rest] * 2)
    assert found["recited_less_sure_rest"]["mean"] == pytest.approx(1.0)
    assert (found["texts"], found["tokens"], found["recited_less_rest"]["texts"]) == (3, 60, 3)
    assert found["share"] == pytest.approx(60 / (3 * 36 + 30))
    low, high = found["recited"]["ci95"]
    assert low < 25 < high
    assert "recited less sure" in printed(recitation_table(found))
    none = measure_recitation([counted([2.0] * 3, [1.0] * 3)])
    assert (none["recited"], none["tokens"], none["recited_less_rest"]) == (None, 0, None)
    assert "none" in printed(recitation_table(none))


def test_phi_in_bins_of_surprisal() -> None:
    texts = [
        counted([np.nan, 0.0, 0.005, 0.01, 0.5, 7.0], [99, 1, 2, 3, 4, np.nan]),
        counted([0.009, 1.0], [6, 5]),
    ]
    bins = phi_by_surprisal(texts)
    assert [one["mean"] for one in bins] == [3.0, 3.0, 4.0, 5.0, None]
    assert [one["tokens"] for one in bins] == [3, 1, 1, 1, 0]
    assert [one["texts"] for one in bins] == [2, 1, 1, 1, 0]
    assert bins[-1]["below"] is None


def test_the_extreme_tokens_stand_in_their_text() -> None:
    scores = [
        TokenScores(
            "abcdef",
            np.zeros(6, np.int64),
            np.stack([np.arange(6), np.arange(1, 7)], 1),
            {"phi": np.float32([5, 1, 9, np.nan, 2, 3]), "surprisal": np.float32([np.nan, 1, 2, 3, 4, 5])},
        ),
        made_scores([7.0], [0.5]),
    ]
    texts = [
        CountedTokens(
            LevelText("code", f"text {n}", "x"),
            one,
            np.arange(len(one)),
            {name: values.astype(float) for name, values in one.columns.items()},
            one.sinks,
        )
        for n, one in enumerate(scores)
    ]
    found = extremes(texts, 2)
    assert [(token["token"], token["phi"]) for token in found["highest"]] == [("c", 9.0), ("x", 7.0)]
    assert [(token["token"], token["phi"]) for token in found["lowest"]] == [("b", 1.0), ("e", 2.0)]
    first = found["highest"][0]
    assert (first["before"], first["after"], first["document"], first["surprisal"]) == (
        "ab",
        "def",
        "text 0",
        2.0,
    )
    assert found["lowest"][1]["before"] == "abcd"


def test_the_page_shows_extremes_and_whole_texts(runs: tuple[Path, Path], levels: Path) -> None:
    fill(levels, {"script.json": {"level": "prose", "user": "Write", "assistant": "a <script> b " * 9}})
    results = reproduce_texts(runs[1], levels, Path("out"))
    page = Path("out/texts/page.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:2] == ["predictable: t0.json", "predictable: t1.json"]
    assert headings.index("prose: highest phi") > headings.index("prose: p0.json")
    # Means are those of the text, without what the template put around it.
    (mean,) = (one["phi"] for one in results["texts"] if one["document"] == "t0.json")
    assert f"{mean:.3f}" in page
    assert "<script>" not in page
    rows = rows_of(Path("out/texts/tokens.csv"))
    assert len(rows) == 3 * 2 * 10
    top = results["tokens"]["prose"]["highest"][0]
    assert f"{top['phi']:.0f} nats, in {top['document']}" in page
    assert max(text["phi"] for text in results["texts"]) < top["phi"]


def test_the_figure_of_phi_at_equal_surprisal() -> None:
    results = measure_texts(*made())
    figure = figure_levels_by_surprisal(results)
    figure.canvas.draw()
    drawn = [container.lines[0].get_ydata() for container in figure.axes[0].containers]  # pyright: ignore
    for values, level in zip(drawn, results["levels"].values(), strict=True):
        expected = [one["mean"] for one in level["by_surprisal"]]
        assert np.asarray(values, float) == pytest.approx(np.array(expected, float), nan_ok=True)


def test_columns_of_one_of_several_layers() -> None:
    scores = made_scores([1.0, 2.0], [3.0, 4.0])
    scores.columns["phi@a"], scores.columns["phi@b"] = scores.columns.pop("phi"), np.float32([5, 6])
    assert scores.at_point("b").phi.tolist() == [5, 6]
    assert scores.at_point("a").columns.keys() == {"phi", "surprisal"}
    assert scores.at_point(None) is scores
