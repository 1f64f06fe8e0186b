"""`philens score`: from files to what is shown and written, stopped and started again."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import philens
from conftest import make_gpt2, make_llama
from philens import cli
from philens.bases.hub import quiet
from philens.bases.tokenizer import character_tokenizer
from philens.lens.core import LensCore
from philens.scoring.score import score
from philens.scoring.scores import TokenScores
from philens.training.opening import load_lens

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "<b>Ho</b>"}]
TEXTS = ["The cat sat.", "on the mat\nof <script>alert(1)</script>", "a", "b" * 200]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, its tokenizer, and an adapter, as a run leaves it."""
    folder = tmp_path_factory.mktemp("model")
    lens = philens.attach(make_llama(), philens.PHiConfig(layer=1, prior_heads=2))
    lens.base.save_pretrained(folder / "model")  # pyright: ignore[reportCallIssue]
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    lens.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(TEXTS):
        Path(f"{number}.txt").write_text(text)


FILES = [f"{number}.txt" for number in range(len(TEXTS))]


@pytest.fixture
def run(model: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `philens score` in this process: exit code, standard output and error."""

    def run(*words: Any, model: Path | str = model) -> tuple[int, str, str]:
        code = cli.main(["score", *map(str, words), "--model", str(model)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def written(run: Any) -> Any:
    """The records of JSON Lines on standard output."""

    def written(*words: Any, **options: Any) -> list[dict[str, Any]]:
        code, out, err = run(*words, "--format", "jsonl", **options)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return written


@pytest.fixture
def error_of(run: Any) -> Any:
    def error_of(*words: Any, **options: Any) -> str:
        code, out, err = run(*words, **options)
        assert code == 2
        assert out == ""
        assert re.fullmatch(r"philens: error: [^\n]+[.?]\n", err), err
        return err.removeprefix("philens: error: ").strip()

    return error_of


def test_every_form_has_the_same_scores(run: Any, written: Any, model: Path) -> None:
    lens, tokenizer = load_lens(str(model))
    expected = score(lens, tokenizer, TEXTS, metrics=["phi", "surprisal"])
    records = written(*FILES)
    assert [record["id"] for record in records] == FILES
    code, out, err = run(*FILES, "--format", "parquet", "--output", "parquet")
    assert (code, err) == (0, "")
    assert out == "Wrote parquet: 4 documents with 252 tokens.\n"
    frame = pd.read_parquet("parquet")
    code, table, err = run(*FILES, "--format", "table")
    assert err == "Scored 4 documents with 252 tokens.\n"
    assert table == run(*FILES)[1]  # the terminal is none, so it shows a table
    rows = [line.split() for line in table.splitlines() if re.match(r" +\d", line)]
    code, _, _ = run(*FILES, "--format", "html", "--output", "page.html")
    assert code == 0
    titles = re.findall(
        r'title="[^"]*: phi (\S+) nats, surprisal (\S+?)(?: nats)?, surprisal with layer',
        Path("page.html").read_text(),
    )
    values = [
        (f"{phi:.3f}", "none" if np.isnan(s) else f"{s:.3f}")
        for e in expected
        for phi, s in zip(e.phi, e.surprisal, strict=True)
    ]
    assert [tuple(row[-3:-1]) for row in rows] == values  # and with the layer, which is in the path
    shown = [pair for scores in expected for pair in [values.pop(0) for _ in range(len(scores))] * 2]
    assert titles == shown
    for record, row, wanted in zip(records, frame.itertuples(), expected, strict=True):
        found = TokenScores.from_json(json.dumps(record))
        assert found.text == row.text == wanted.text
        for name in ("phi", "surprisal"):
            np.testing.assert_array_equal(found.columns[name], wanted.columns[name])
            np.testing.assert_array_equal(getattr(row, name), wanted.columns[name])
        assert found.provenance["fingerprint"] == wanted.provenance["fingerprint"]


def test_metrics_and_windows(written: Any) -> None:
    records = written("3.txt", "--metrics", "entropy, phi", "--window", 50, "--batch-tokens", 100)
    assert list(records[0]["columns"]) == ["phi", "entropy"]
    assert records[0]["provenance"]["window"] == 50


def test_groups_and_depths_by_options_are_in_every_form(run: Any, written: Any, model: Path) -> None:
    lens, tokenizer = load_lens(str(model))
    lens.metric_options = philens.MetricOptions(settled_at=0.1, deep_from=0.9, group=3)
    metrics = ["confidence", "deep_thinking"]
    expected = [one.means() for one in score(lens, tokenizer, TEXTS, metrics=metrics)]
    assert expected[0]["confidence_lowest_group"] < expected[0]["confidence"]
    assert 0 < expected[0]["deep_thinking"] < 1
    options = ["--metrics", ",".join(metrics), "--steps", "lines"]
    for option in ("settled_at=0.1", "deep_from=0.9", "group=3"):
        options += ["--metric-option", option]
    records = written(*FILES, *options)
    for form in ("jsonl", "parquet"):
        assert run(*FILES, *options, "--format", form, "--output", form)[0] == 0
    lines = [json.loads(line) for line in Path("jsonl/part-00000.jsonl").read_text().splitlines()]
    frame = pd.read_parquet("parquet")
    columns = [name if "_" in name[10:] else f"{name}_mean" for name in expected[0]]
    assert columns[0] == "confidence_mean"
    for number, means in enumerate(expected):
        for record in (records[number], lines[number]):
            found = {name: np.nan if mean is None else mean for name, mean in record["means"].items()}
            assert found == pytest.approx(means, rel=1e-5, nan_ok=True)
            again = TokenScores.from_json(json.dumps(record))
            assert again.means() == pytest.approx(means, rel=1e-5, nan_ok=True)
        assert [*frame.loc[number, columns]] == pytest.approx([*means.values()], rel=1e-5, nan_ok=True)
    assert set(lines[1]["span_means"][0]["means"]) == set(expected[0])
    assert set(columns) < set(frame["spans"][1][0])
    shown = f"{expected[0]['confidence_lowest_group']:.3f}"
    assert f"confidence lowest group {shown}" in run(*FILES, *options, "--format", "table")[1]
    assert run(*FILES, *options, "--format", "html", "--output", "page.html")[0] == 0
    page = Path("page.html").read_text()
    assert re.search(rf"<th>confidence lowest group[^<]*nats.*<td>{shown}</td>", page, re.DOTALL)
    # The folder was begun with these options.
    again = run(*FILES, *options[:-1], "group=4", "--format", "jsonl", "--output", "jsonl")
    assert again[0] == 2
    assert "metric option" in again[2], again[2]


def test_all_inputs(written: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl").write_text(f'{{"body": "one"}}\n{{"body": ""}}\n{json.dumps({"body": CHAT})}\n')
    records = written("a.jsonl", "--field", "body")
    assert [record["id"] for record in records] == ["a.jsonl:1", "a.jsonl:3"]
    assert records[1]["text"] == "[user]Hi?\n[assistant]<b>Ho</b>\n"
    assert [span[0] for span in records[1]["spans"]] == ["user", "assistant"]
    assert run("a.jsonl", "--field", "body")[2] == "Scored 2 documents with 34 tokens, 1 empty left out.\n"
    assert [record["text"] for record in written("1.txt", "--by", "line")] == TEXTS[1].split("\n")
    # Options may stand between files.
    assert [record["text"] for record in written("0.txt", "--limit", 2, "2.txt", "1.txt")] == [
        TEXTS[0],
        TEXTS[2],
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert [(record["id"], record["text"]) for record in written("-")] == [("-", "piped")]
    pd.DataFrame({"text": TEXTS}).to_parquet("a.parquet")
    assert [record["text"] for record in written("a.parquet")] == TEXTS


def test_a_page_of_chats(run: Any) -> None:
    Path("a.jsonl").write_text(json.dumps({"messages": CHAT}))
    assert run("a.jsonl", "0.txt", "--format", "html", "--output", "p.html")[1].startswith(
        "Wrote p.html: 2 doc"
    )
    text = Path("p.html").read_text()
    assert text.count('<span class="span"><b>assistant</b>') == 2
    assert "<h2>a.jsonl:1</h2>" in text
    assert "<h2>0.txt</h2>" in text
    assert "<b>Ho" not in text


def test_a_page_of_more_than_fits(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("philens.show.page.MAX_TOKENS", 15)
    Path("many.txt").write_text("0123456789\n" * 100)
    code, out, _ = run("many.txt", "--by", "line", "--format", "html", "--output", "p.html")
    assert (code, out) == (0, "Wrote p.html: 2 documents with 20 tokens.\n")
    assert "This page ends after 15 tokens in 2 documents" in Path("p.html").read_text()


def test_where_models_come_from(written: Any, error_of: Any, model: Path, tmp_path: Path) -> None:
    expected = written("0.txt")
    apart = written("0.txt", "--adapter", model / "adapter", model=model / "model")
    assert apart[0]["columns"] == expected[0]["columns"]
    assert "give --adapter, or the folder of a run." in error_of("0.txt", model=model / "model")
    assert "nowhere" in error_of("0.txt", "--adapter", "nowhere", model="nowhere")
    other = tmp_path / "other"
    with quiet():
        make_gpt2().save_pretrained(other)
    character_tokenizer().save_pretrained(other)
    message = error_of("0.txt", "--adapter", model / "adapter", model=other)
    assert "was trained in another base model" in message
    shipped = written("0.txt", model=philens.SHIPPED)
    assert shipped[0]["columns"] != expected[0]["columns"]


def test_float_types(written: Any) -> None:
    assert written("0.txt", "--dtype", "bfloat16")[0]["provenance"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is nothing to score; give files, - for standard input, or hub:owner/name."),
        (["nothing.txt"], "There is no file nothing.txt; check the path."),
        (["."], ". is a folder; give the files in it."),
        (["0.txt", "--field", "body"], "0.txt is read as text and has no fields"),
        (["0.txt", "--by", "word"], "--by must be one of file, line, not 'word'."),
        (["0.txt", "--format", "csv"], "--format must be one of terminal, table, jsonl, parquet, html"),
        (["0.txt", "--format", "parquet"], "needs a place to write to; give --output FOLDER."),
        (["0.txt", "--format", "html"], "needs a place to write to; give --output PAGE.html."),
        (["0.txt", "--format", "html", "--output", "no/p.html"], "There is no folder no for the page"),
        (["0.txt", "--output", "x"], "--format terminal goes to the terminal; with --output give --format"),
        (
            ["0.txt", "--format", "jsonl", "--output", "x.jsonl"],
            "x.jsonl is named like a file; name a folder.",
        ),
        (["0.txt", "--metrics", "fhi"], "There is no metric 'fhi'; did you mean 'phi'"),
        (["0.txt", "--metrics", ","], "No metric was asked for"),
        (["0.txt", "--window", "1"], "A window of 1 leaves a token no context"),
        (["0.txt", "--window", "513"], "longer than the model's context of 512"),
        (["0.txt", "--batch-tokens", "0"], "batch_tokens must be at least 1, not 0."),
        (["0.txt", "--shard-characters", "0"], "shard_characters must be at least 1, not 0."),
        (["0.txt", "--limit", "0"], "limit must be at least 1, not 0."),
        (["0.txt", "--limit", "x"], "--limit must be a whole number or null, not 'x'."),
        (
            ["0.txt", "--dtype", "int8"],
            "--dtype must be one of auto, float32, bfloat16, float16, not 'int8'.",
        ),
        (["0.txt", "--revision", "main"], "is a folder here and has no revisions"),
        (["0.txt", "--filed", "x"], "no option --filed; the nearest valid one is --field."),
        (["0.txt", "--field"], "--field: expected one argument"),
        (["0.txt", "--generate", "a"], "--generate writes a text of its own; leave out 0.txt."),
        (
            ["--generate", "a", "--metrics", "phi,margin"],
            "--generate shows phi, or mtd, and surprisal; leave out --metrics.",
        ),
        (["0.txt", "--steer", "0.5"], "--steer is for a text that the model writes; give --generate, or"),
        (["--generate", "a", "--steer", "0.5"], "Steering needs a shallow head, and this model has a PHi"),
        (["empty.txt"], "There is nothing to score: the input has no text; give a file with text."),
    ],
)
def test_errors_are_one_sentence(error_of: Any, words: list[str], message: str) -> None:
    Path("empty.txt").write_text("\n \n")
    before = set(Path().iterdir())
    assert message in error_of(*words)
    assert set(Path().iterdir()) == before


def test_a_text_that_cannot_be_scored_is_named(error_of: Any) -> None:
    Path("a.jsonl").write_text(
        f'{{"text": "one"}}\n{json.dumps({"text": [{"role": "user", "content": 3}]})}\n'
    )
    assert "a.jsonl line 2 has a content that is no text in message 1 (3); give text" in error_of(
        "a.jsonl", "--format", "jsonl", "--output", "out"
    )
    Path("b.txt").write_bytes(b"one\ntwo\xff\n")
    assert "b.txt is not UTF-8: byte 8 is 0xff" in error_of("b.txt", "--format", "jsonl", "--output", "out")


def test_options_that_failed_do_not_bind_a_folder(run: Any, error_of: Any) -> None:
    words = ("0.txt", "--format", "jsonl", "--output", "out")
    assert "A window of 1" in error_of(*words, "--window", 1)
    assert run(*words)[0] == 0
    assert "begun with another window (None, now 9)" in error_of(*words, "--window", 9)
    assert "begun with another inputs" in error_of("1.txt", *words[1:])
    code, out, _ = run(*words)
    assert (code, out) == (0, "Already finished: out: 1 document with 12 tokens.\n")


LINES = "".join("x" * length + f"{length}\n" for length in np.random.default_rng(0).integers(0, 60, 350))


def many() -> list[str]:
    """A corpus in a file, and the words that score it, in 9 shards."""
    Path("many.txt").write_text(LINES)
    return ["many.txt", "--by", "line", "--batch-tokens", "500", "--shard-characters", "1300"]


@pytest.fixture(scope="module")
def mishaps(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """What came of scoring with each mishap, and the folder it was in."""
    folder = tmp_path_factory.mktemp("mishaps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["score", *many()]
    to_model = ["--model", str(model)]
    scenarios = [
        {"mishap": "none", "words": [*words, "--format", "jsonl", "--output", "undisturbed", *to_model]},
        {
            "mishap": "kill",
            "kill_after": [2, 5],
            "folder": "killed",
            "words": [*words, "--format", "jsonl", "--output", "killed", *to_model],
        },
        {"mishap": "full_disk", "words": [*words, "--format", "parquet", "--output", "full", *to_model]},
        {"mishap": "reader_goes_away", "words": [*words, "--format", "jsonl", *to_model]},
    ]
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("stopped_scores.py"), "scenarios.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = map(json.loads, done.stdout.splitlines())
    return folder, {one["mishap"]: result for one, result in zip(scenarios, results, strict=True)}


def test_killed_twice_and_started_again_the_rows_are_the_same(mishaps: Any) -> None:
    folder, results = mishaps
    assert [(result["code"], result["err"]) for result in (results["none"], results["kill"])] == [(0, "")] * 2
    first, second = results["kill"]["kills"]
    assert 2 <= first < 5 <= second < 9
    files = {
        name: {path.name: path.read_bytes() for path in (folder / name).iterdir() if path.name != ".lock"}
        for name in ("undisturbed", "killed")
    }
    assert len(files["undisturbed"]) == 10
    assert files["killed"] == files["undisturbed"]
    rows = [json.loads(line) for path in sorted((folder / "killed").glob("*.jsonl")) for line in path.open()]
    assert [row["text"] for row in rows] == LINES.splitlines()


def test_a_full_disk(mishaps: Any) -> None:
    folder, results = mishaps
    result = results["full_disk"]
    assert (result["code"], result["out"]) == (2, "")
    assert re.fullmatch(r"philens: error: Cannot write full/part-00000.parquet: [^\n]+\.\n", result["err"])
    assert sorted(path.name for path in (folder / "full").iterdir()) == [".lock", "_manifest.json"]


def test_a_reader_that_goes_away(mishaps: Any) -> None:
    assert mishaps[1]["reader_goes_away"] == {"code": 141, "out": "", "err": "", "kills": []}


def test_ctrl_c(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*many(), "--format", "jsonl"]
    expected = [line.split('"provenance"')[0] for line in run(*words)[1].splitlines()]
    replace, count = os.replace, 0

    def interrupted(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            signal.raise_signal(signal.SIGINT)
        replace(source, target)

    # A process that was started in the background may ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        code, out, err = run(*words, "--output", "out")
    signal.signal(signal.SIGINT, before)
    assert (code, out, err) == (130, "", "philens: stopped; the same command goes on.\n")
    assert run(*words, "--output", "out")[0] == 0
    parts = sorted(Path("out").glob("*.jsonl"))
    assert len(parts) > 2
    lines = "".join(path.read_text() for path in parts).splitlines()
    assert [line.split('"provenance"')[0] for line in lines] == expected
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Interrupting())
        code = run(*words)[0]
    assert code == 130


class Interrupting(io.StringIO):
    def write(self, text: str) -> int:
        raise KeyboardInterrupt


def test_what_a_model_does_not_have_is_refused_before_it_reads(
    error_of: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens, _ = load_lens(str(model))
    base, passes = lens.detach(), []
    watching = philens.attach(base, philens.PHiConfig(layer=1, prior_heads=2, mode="observe"))
    watching.save_pretrained(tmp_path / "watching")
    reason = watching.supports()["surprisal_with_layer"]
    monkeypatch.setattr(LensCore, "forward", lambda *_, **__: passes.append(1))
    words = ["--adapter", tmp_path / "watching", "--metrics", "phi,surprisal_with_layer"]
    assert error_of("0.txt", *words) == reason
    assert error_of("0.txt", *words, "--format", "jsonl", "--output", "scores") == reason
    assert not passes


def test_colours_in_a_terminal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, out, _ = run("0.txt", "1.txt")
    assert code == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "\x1b" not in shown
    assert TEXTS[0] in shown
    assert TEXTS[1].replace("\n", "⏎\n") in shown
    assert "nats and more" in shown
    assert out.count("\x1b[") > 40
    code, out, _ = run("0.txt", "--metrics", "margin")  # the first of those asked for
    assert code == 0
    assert re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()[-1].startswith("margin 0 ")
    Path("a.txt").write_text("a\x1b[2Jb")
    assert "\x1b[2J" not in run("a.txt")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in run("0.txt")[1]


def test_generation(run: Any) -> None:
    code, out, err = run("--generate", "The cat", "--max-new-tokens", 5)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == 1 + len("The cat") + 5
    assert [row[1] for row in rows[1:8]] == list("The␣cat")
    assert rows[1][3] == "none"
    assert out == run("--generate", "The cat", "--max-new-tokens", 5)[1]
    code, other, _ = run("--generate", "The cat", "--max-new-tokens", 50, "--sample", "--temperature", "5.0")
    assert code == 0
    assert len(other.splitlines()) == 1 + len("The cat") + 50
