"""Scoring by several processes: ranks and Ray give the files of one process, killed or not."""

import http.server
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest

import philens
from conftest import make_llama
from philens import cli
from philens.bases.tokenizer import character_tokenizer
from philens.scoring.corpus import Corpus
from philens.support.errors import ConfigError
from philens.support.processes import Rank, device, rank

LINES = "".join("x" * length + f"{length}\n" for length in np.random.default_rng(0).integers(0, 60, 350))
SHARDS = 9
WROTE = f"350 documents with {len(LINES) - 350:,} tokens.\n"  # one for each character but the line ends
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Else workers of Ray wait until the rest of the tests has no use for the processor.
ENVIRONMENT["RAY_worker_niceness"] = "0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus, and its scores by one process as JSON Lines."""
    folder = tmp_path_factory.mktemp("scale")
    lens = philens.attach(make_llama(), philens.PHiConfig(layer=1, prior_heads=2))
    lens.base.save_pretrained(folder / "model" / "model")  # pyright: ignore[reportCallIssue]
    character_tokenizer().save_pretrained(folder / "model" / "model")
    lens.save_pretrained(folder / "model" / "adapter")
    (folder / "many.txt").write_text(LINES)
    texts = LINES.splitlines()
    pd.DataFrame({"text": texts[:200]}).to_parquet(folder / "a.parquet")
    pd.DataFrame({"text": texts[200:]}).to_parquet(folder / "b.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(score_words("one")) == 0
    assert len(files(folder / "one")) == SHARDS + 1
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def score_words(output: str, form: str = "jsonl", source: str = "many.txt") -> list[str]:
    words = ["score", source, "--batch-tokens", "500", "--shard-characters", "1300", "--model", "model"]
    return [*words, "--by", "line", "--format", form, "--output", output]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def rows(folder: str) -> list[dict[str, Any]]:
    """Records without their ids."""
    lines = [line for path in sorted(Path(folder).glob("*.jsonl")) for line in path.open()]
    return [{name: value for name, value in json.loads(line).items() if name == "columns"} for line in lines]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env=ENVIRONMENT | environment
    )


# Ranks


def test_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank() == Rank(0, 1)
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    assert rank() == Rank(1, 2)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert [unit for unit in range(9) if rank().takes(unit)] == [2, 5, 8]
    for number in ("3", "x", "-1"):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(ConfigError, match=f"RANK={number} and WORLD_SIZE=3 in the environment do not"):
            rank()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert device() is None


@pytest.mark.slow  # as torchrun in tests/test_distributed.py it sets what `rank` reads
def test_accelerate_launch_writes_what_one_process_writes() -> None:
    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    done = run(*launch, "-m", "philens", *score_words("launched"))
    assert (done.returncode, done.stdout) == (0, f"Wrote launched: {WROTE}"), done.stderr
    assert Path("launched/.lock-1").exists()  # there were two
    assert files(Path("launched")) == files(Path("one"))


def test_of_several_processes_one_says_what_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for number, said in (("2", ""), ("0", ""), ("1", f"Wrote said: {WROTE}"), ("0", "")):
        monkeypatch.setenv("RANK", number)
        assert cli.main(score_words("said")) == 0
        assert capsys.readouterr().out == said
    monkeypatch.delenv("RANK")
    assert cli.main(score_words("said")) == 0
    assert capsys.readouterr().out == f"Already finished: said: {WROTE}"
    assert files(Path("said")) == files(Path("one"))


def test_as_a_module_it_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["philens", "score", "nothing.txt"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("philens", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "philens: error: There is no file nothing.txt; check the path.\n"


@pytest.fixture(scope="module")
def stopped(folder: Path) -> dict[str, dict[str, Any]]:
    """What came of ranks that were killed and started again, as many or others."""
    scenarios = [
        {
            "mishap": output,
            "folder": output,
            "ranks": ranks,
            "kill_after": kill_after,
            "words": score_words(output, form),
        }
        for output, form, ranks, kill_after in (
            ("fewer", "jsonl", [3, 2, 1], [2, 5]),
            ("more", "jsonl", [1, 2, 4], [1, 4]),
            ("tables", "parquet", [2, 3], [3]),
            ("undisturbed", "parquet", [1], []),
        )
    ]
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    script = Path(__file__).with_name("stopped_scores.py")
    done = subprocess.run(
        [sys.executable, script, "scenarios.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    results = map(json.loads, done.stdout.splitlines())
    return {scenario["mishap"]: result for scenario, result in zip(scenarios, results, strict=True)}


@pytest.mark.parametrize("name", ["fewer", "more"])
def test_killed_and_started_again_with_other_numbers_of_processes(stopped: Any, name: str) -> None:
    assert stopped[name]["code"] == 0, stopped[name]["err"]
    assert stopped[name]["out"] == f"Wrote {name}: {WROTE}"  # once
    assert all(1 <= kill < SHARDS for kill in stopped[name]["kills"])
    assert files(Path(name)) == files(Path("one"))


def test_parquet_of_several_processes(stopped: Any) -> None:
    assert stopped["tables"]["code"] == 0, stopped["tables"]["err"]
    pd.testing.assert_frame_equal(pd.read_parquet("tables"), pd.read_parquet("undisturbed"))
    assert files(Path("tables")).keys() == files(Path("undisturbed")).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["many.txt"], "Several processes write a folder together; give --format jsonl or parquet and"),
        (["many.txt", "--format", "jsonl"], "Several processes write a folder together"),
        (["many.txt", "--format", "html", "--output", "p.html"], "Several processes write a folder"),
        (["-", "--format", "jsonl", "--output", "x"], "- can be read only once, and each of several"),
        (["pipe", "--format", "jsonl", "--output", "x"], "pipe can be read only once, and each of several"),
        (["many.txt", "--engine", "ray"], "--engine ray starts its own workers; start it as one process."),
        (["--generate", "a"], "--generate writes one text; start it as one process."),
        (["many.txt", "--workers", "2"], "--workers needs --engine ray"),
    ],
)
def test_what_several_processes_cannot_do(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("pipe").exists():
        os.mkfifo("pipe")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["score", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"philens: error: {message}")
    assert not Path("x").exists()


# Object stores


def test_object_stores_are_read_like_files(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.parquet", "b.parquet"):
        with fsspec.open(f"memory://store/below/{name}", "wb") as file:
            file.write(Path(name).read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    with fsspec.open("memory://store/readme.txt", "wb") as file:
        file.write(b"one\ntwo\n")  # pyright: ignore[reportAttributeAccessIssue]
    documents = list(corpus := Corpus(["memory://store"]))
    assert [document.content for document in documents] == LINES.splitlines()
    assert documents[200].id == "memory://store/below/b.parquet:1"
    assert (
        corpus.size
        == documents[-1].end
        == sum(Path(name).stat().st_size for name in ("a.parquet", "b.parquet"))
    )
    assert corpus.once is None
    assert [one.content for one in Corpus(["memory://store/readme.txt"], by="line")] == ["one", "two"]
    assert cli.main(score_words("stored", source="memory://store")) == 0
    assert capsys.readouterr().out == f"Wrote stored: {WROTE}"
    assert rows("stored") == rows("one")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory://nowhere", "There is no file memory://nowhere; check the path."),
        ("nothing://a/b", "nothing://a/b cannot be read (Protocol not known: nothing); check the address"),
    ],
)
def test_object_stores_that_cannot_be_read(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", name]) == 2
    assert capsys.readouterr().err.startswith(f"philens: error: {message}")


class Store(http.server.BaseHTTPRequestHandler):
    """As much of an S3 server as it takes to read: a bucket that is the current folder."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = Path(self.path.partition("?")[0].removeprefix("/bucket/"))
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = path.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content, status = content[int(wanted[1]) : int(wanted[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def s3() -> Iterator[str]:
    """An address of the current folder as a bucket of S3."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    access = f"scheme=http&endpoint_override=127.0.0.1:{server.server_port}&region=here"
    yield f"s3://key:secret@bucket/a.parquet?{access}"
    server.shutdown()


def test_parquet_on_s3(s3: str) -> None:
    corpus = Corpus([s3])
    assert [document.content for document in corpus] == LINES.splitlines()[:200]
    assert next(iter(corpus)).id == "s3://bucket/a.parquet:1"
    assert corpus.inputs == ["s3://bucket/a.parquet"]  # no keys where scores are


# Ray


def start_ray(output: str, *words: str, source: str = "many.txt") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "philens", *score_words(output, source=source), "--engine", "ray", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def descendants(process: int) -> dict[int, str]:
    """Processes that a process started, and those they started, with their command lines."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            number = int(path.name)
            parents[number] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[number] = (path / "cmdline").read_text()
        except (OSError, ValueError):
            continue
    found, new = set(), {process}
    while new:
        found |= new
        new = {number for number, parent in parents.items() if parent in new} - found
    return {number: commands[number] for number in found - {process}}


def wait_for_shards(process: subprocess.Popen[str], output: str, count: int) -> None:
    while len(list(Path(output).glob("_part-*"))) + len(list(Path(output).glob("part-*"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_ray_writes_what_one_process_writes_with_a_worker_killed_on_the_way() -> None:
    process = start_ray("by_ray", "--workers", "2")
    workers = []
    while len(workers) < 2:
        assert process.poll() is None, process.communicate()
        workers = [number for number, command in descendants(process.pid).items() if "(_Worker)" in command]
        time.sleep(0.02)
    wait_for_shards(process, "by_ray", 1)
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate()
    assert (process.returncode, out.splitlines()[-1:]) == (0, [f"Wrote by_ray: {WROTE}".strip()]), err
    assert "killed" in out + err  # Ray says that it saw it
    assert files(Path("by_ray")) == files(Path("one"))


@pytest.mark.slow
def test_ray_goes_on_after_the_driver_was_killed(s3: str) -> None:
    assert cli.main(score_words("s3_one", source=s3)) == 0
    process = start_ray("driver", "--workers", "2", source=s3)
    wait_for_shards(process, "driver", 2)
    process.kill()
    process.communicate()
    assert len(list(Path("driver").glob("part-*"))) < len(list(Path("s3_one").glob("part-*")))
    process = start_ray("driver", "--workers", "1", source=s3)
    out, err = process.communicate()
    assert (process.returncode, out[:13]) == (0, "Wrote driver:"), err
    assert files(Path("driver")) == files(Path("s3_one"))


@pytest.mark.slow
def test_what_ray_workers_complain_of_is_one_sentence() -> None:
    Path("wrong.jsonl").write_text(json.dumps({"text": "a"}) + "\n{")
    out, err = start_ray("wrong", source="wrong.jsonl").communicate()
    assert out == ""
    assert err.splitlines()[-1].startswith("philens: error: wrong.jsonl line 2 is not JSON")


def test_ray_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    assert cli.main([*score_words("x"), "--engine", "ray"]) == 2
    message = "The engine ray needs ray: install it with `pip install 'philens[ray]'`."
    assert capsys.readouterr().err == f"philens: error: {message}\n"
    monkeypatch.undo()
    assert cli.main(["score", "many.txt", "--engine", "ray", "--workers", "0"]) == 2
    assert capsys.readouterr().err == "philens: error: workers must be at least 1, not 0.\n"
