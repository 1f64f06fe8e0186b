"""Faults in scoring a corpus and in solving problems: every row is there exactly once, the same to the last
byte as without them, or one sentence says why not."""

import contextlib
import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from faults import process
from faults.process import Command, Setup
from faults.table import Case, Outcome
from faults.trials import Trials, Undisturbed

# What fills a folder: scores as JSON Lines and as Parquet, and solutions.
KINDS = ("jsonl", "parquet", "solve")
_DOCUMENTS, _PROBLEMS = 150, 12


@functools.cache
def _corpus(root: Path) -> Path:
    """Documents of letters, of very different lengths."""
    path, draw = root / "corpus.jsonl", random.Random(0)
    with path.open("w") as file:
        for number in range(_DOCUMENTS):
            text = "".join(draw.choices("abcdefgh ", k=draw.choice((1, 20, 100, 400))))
            file.write(json.dumps({"text": f"x{text}{number}"}) + "\n")
    return path


@functools.cache
def _solver(root: Path) -> tuple[Path, Path]:
    """A small model that has learned nothing, and problems for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from philens.bases.hub import quiet
    from philens.bases.tokenizer import byte_tokenizer

    tokenizer, folder = byte_tokenizer(), root / "solver"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    problems = root / "problems.jsonl"
    rows = [{"problem": f"{number} + {number}?", "answer": str(2 * number)} for number in range(_PROBLEMS)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, problems


def words(root: Path, kind: str, output: Path) -> list[str]:
    """The command line that fills a folder, or goes on with it."""
    if kind == "solve":
        model, problems = _solver(root)
        options = ["--samples", "4", "--max-new-tokens", "12", "--batch-size", "2", "--prompt", "arithmetic"]
        return [
            "solve",
            "--model",
            str(model),
            "--problems",
            str(problems),
            "--output",
            str(output),
            *options,
        ]
    from philens import SHIPPED

    options = ["--shard-characters", "900", "--batch-tokens", "512", "--model", str(SHIPPED)]
    return ["score", str(_corpus(root)), "--format", kind, "--output", str(output), *options]


@functools.cache
def undisturbed(root: Path, kind: str) -> Undisturbed:
    """Each kind once."""
    folder, count = root / f"undisturbed-{kind}", root / f"undisturbed-{kind}.count"
    watch = partial(process.die_at_change, str(folder), 0, str(count))
    ended = process.run(words(root, kind, folder), root / f"undisturbed-{kind}.log", [watch])
    if (problem := process.finished(ended)) is not None:
        raise RuntimeError(f"undisturbed, it failed: {problem}")
    return Undisturbed(folder, ended.seconds, count.stat().st_size)


def result(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but locks."""
    return {name: data for name, data in process.files_below(folder).items() if not name.startswith(".lock")}


def completed(root: Path, kind: str, folder: Path) -> str | None:
    """What is wrong with a folder once the same command has gone on, and left alone what was there."""
    before = written(folder)
    ended = process.run(words(root, kind, folder), folder.with_suffix(".again"))
    problem = process.finished(ended) or same(root, kind, folder)
    if problem is None and (again := sorted(before - written(folder))):
        problem = f"{len(again)} shards were written again, first {again[0][0]}"
    return problem


def written(folder: Path) -> set[tuple[str, int, int]]:
    """The shards that a folder knows to be written, each with its file's number and the moment."""
    manifest = folder / "_manifest.json"
    count = json.loads(manifest.read_text())["progress"]["shards"] if manifest.exists() else 0
    known = {f"part-{number:05}" for number in range(count)}
    known |= {path.stem.removeprefix("_") for path in folder.glob("_part-*.json")}
    files = [path for path in folder.glob("part-*") if path.stem in known]
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def same(root: Path, kind: str, folder: Path) -> str | None:
    """How a folder differs from the undisturbed one, and whether each row is there once."""
    found = result(folder)
    if (problem := process.differences(found, result(undisturbed(root, kind).folder))) is not None:
        return problem
    if kind == "jsonl":
        rows = [
            json.loads(line)["id"]
            for name in sorted(found)
            if name.startswith("part-")
            for line in found[name].splitlines()
        ]
        expected = [f"{_corpus(root)}:{number}" for number in range(1, _DOCUMENTS + 1)]
        return None if rows == expected else f"{len(rows)} rows, not each of {len(expected)} once"
    return None


def start(root: Path, kind: str, folder: Path, setup: Sequence[Setup] = ()) -> Command:
    return Command(words(root, kind, folder), folder.with_suffix(".log"), setup)


TRIALS = Trials(KINDS, undisturbed, start, completed)


def kill_again_and_again(place: Path) -> Outcome:
    """One folder of each kind, kill -9 at 20 random moments, then completed."""
    root, kills = place.parent, 20

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        folder, draw = own / "output", random.Random(fraction)
        killed = 0
        while killed < kills:
            command = start(root, kind, folder)
            # Short, or it would be finished long before.
            time.sleep(draw.random() * undisturbed(root, kind).seconds / 6)
            command.signal(signal.SIGKILL)
            ended = command.wait()
            if ended.code not in (0, -signal.SIGKILL):
                return f"{kind} after {killed} kills: {ended}"
            if ended.code == 0:  # all is there already: once more from the beginning
                if (problem := same(root, kind, folder)) is not None:
                    return f"{kind} after {killed} kills: {problem}"
                folder = own / f"output-{killed}"
            killed += ended.code != 0
        problem = completed(root, kind, folder)
        return None if problem is None else f"{kind} after {kills} kills: {problem}"

    outcome = TRIALS.each(len(KINDS), place, attempt)
    return Outcome(outcome.tried * kills, outcome.survived * kills, outcome.notes)


def kill_rank(place: Path) -> Outcome:
    """kill -9 of one of three processes that fill a folder together: the others go on, and the same command
    completes it."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        root, folder = place.parent, own / "output"
        commands = [
            Command(words(root, kind, folder), own / f"{number}.log", (), environment)
            for number, environment in enumerate(process.ranks(3))
        ]
        time.sleep(fraction * undisturbed(root, kind).seconds)
        commands[int(fraction * 997) % 3].signal(signal.SIGKILL)
        for ended in [command.wait() for command in commands]:
            if ended.code not in (0, -signal.SIGKILL) or "Traceback" in ended.text:
                return f"{kind}, one killed at {fraction:.1%}: another has {ended}"
        problem = completed(root, kind, folder)
        return None if problem is None else f"{kind}, one killed at {fraction:.1%}: {problem}"

    return TRIALS.each(6, place, attempt, ("jsonl", "parquet"))


def two_into_one(place: Path) -> Outcome:
    """Two runs into one folder, begun at once or while one runs: the second is refused."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        root, folder = place.parent, own / "output"
        first = Command(words(root, kind, folder), own / "first.log")
        if int(own.name) >= len(KINDS):
            while first.running() and not (folder / ".lock").exists():
                time.sleep(0.001)
        second = Command(words(root, kind, folder), own / "second.log")
        ends = sorted((first.wait(), second.wait()), key=lambda end: end.code)
        if [end.code for end in ends] == [0, 0] and "Already finished" in ends[0].text + ends[1].text:
            return f"{kind}: the second came too late to be refused"
        problem = process.finished(ends[0]) or process.one_sentence(ends[1]) or same(root, kind, folder)
        return None if problem is None else f"{kind}: {problem}"

    return TRIALS.each(6, place, attempt)


def files_stop_growing(place: Path) -> Outcome:
    """From a random moment on, no file may grow beyond a random size; then completed without that."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        root, folder, size = place.parent, own / "output", int(300 * 60 ** random.Random(fraction).random())
        command = start(root, kind, folder)
        time.sleep(fraction * undisturbed(root, kind).seconds)
        command.limit_files(size)
        ended = command.wait()
        problem = process.finished(ended) if ended.code == 0 else process.one_sentence(ended)
        problem = problem or completed(root, kind, folder)
        return None if problem is None else f"{kind}, {size:,} bytes from {fraction:.1%} on: {problem}"

    return TRIALS.each(9, place, attempt)


def disk_fills_up(place: Path) -> Outcome:
    """A disk that something else fills, or that becomes read-only, at a random moment; then completed."""
    outcome, root = Outcome(), place.parent
    for number, kind in enumerate((*KINDS, *KINDS)):
        disk, fraction, read_only = place / f"disk-{number}", random.random(), number >= len(KINDS)
        try:
            with process.mounted(disk, "size=8m"):
                folder = disk / "output"
                command = Command(words(root, kind, folder), place / f"{number}.log")
                time.sleep(fraction * undisturbed(root, kind).seconds)
                if read_only:
                    process.remount(disk, "ro")
                else:
                    process.fill(disk / "filler")
                ended = command.wait()
                problem = process.finished(ended) if ended.code == 0 else process.one_sentence(ended)
                if read_only:
                    process.remount(disk, "rw")
                else:
                    (disk / "filler").unlink()
                problem = problem or process.finished(
                    process.run(words(root, kind, folder), place / f"{number}.again")
                )
                problem = problem or same(root, kind, folder)
        except OSError as error:
            outcome.notes.append(f"not tried, a file system in memory: {error.strerror}")
            break
        what = "read-only" if read_only else "full"
        outcome.record(None if problem is None else f"{kind}, {what} from {fraction:.1%} on: {problem}")
    return outcome


def nowhere_to_write(place: Path) -> Outcome:
    """Outputs that cannot be written, of every command that writes: one sentence."""
    from philens import SHIPPED

    root = place.parent
    candidates = place / "candidates.jsonl"
    candidates.write_text(json.dumps({"prompt": "ab", "candidates": ["cd", "ef"]}) + "\n")
    lines: dict[str, Callable[[Path], list[str]]] = {kind: partial(words, root, kind) for kind in KINDS}
    lines["html"] = lambda output: [
        "score",
        str(_corpus(root)),
        "--model",
        str(SHIPPED),
        "--limit",
        "2",
        "--format",
        "html",
        "--output",
        str(output),
    ]
    lines["rank"] = lambda output: [
        "rank",
        str(candidates),
        "--model",
        str(SHIPPED),
        "--format",
        "csv",
        "--output",
        str(output),
    ]
    lines["demo"] = lambda output: ["demo", "--documents", "2", "--output", str(output)]
    with contextlib.ExitStack() as stack:
        places, notes = process.unwritable(place, stack)
        tried = [(kind, name) for kind in lines for name in places]
        # A file is what these write; a link in a loop gives way to it.
        files = ("a file", "a link in a loop")
        tried = [pair for pair in tried if pair[0] not in ("html", "rank") or pair[1] not in files]

        def attempt(kind: str, name: str) -> str | None:
            output, setup = places[name]
            log = place / f"{kind}-{list(places).index(name)}.log"
            if kind in ("html", "rank") and os.path.isdir(output):
                output = output / "page.html"
            problem = process.one_sentence(process.run(lines[kind](output), log, setup))
            return None if problem is None else f"{kind} into {name}: {problem}"

        outcome = process.two_at_a_time([partial(attempt, *pair) for pair in tried])
    outcome.notes += notes
    return outcome


def full_standard_output(place: Path) -> Outcome:
    """Standard output on a full disk: one sentence; or closed: as if nobody read. From fresh interpreters."""
    from philens import SHIPPED

    outcome = Outcome()
    text = place / "text.txt"
    text.write_text("abc abc")
    score = ["score", str(text), "--model", str(SHIPPED), "--format"]
    for line in ([*score, "jsonl"], [*score, "table"], ["train", "smoke", "--print-config"]):
        for where, check in ((">/dev/full", process.one_sentence), (">&-", process.finished)):
            shell = ["sh", "-c", f'exec "$@" {where}', "sh", *process.PHILENS, *line]
            problem = check(process.launch(shell, place / "log"))
            outcome.record(None if problem is None else f"{line[0]} {line[-1]} {where}: {problem}")
    return outcome


def clock_set_back(place: Path) -> Outcome:
    """A clock that is years off and set back every second, killed, completed with a clock of 1970."""

    def attempt(kind: str, own: Path, fraction: float) -> str | None:
        root = place.parent
        begin = partial(start, root, kind, setup=[partial(process.set_clock, -1e8, 1.0)])
        folder, _ = process.stopped_at(begin, own, signal.SIGKILL, fraction, undisturbed(root, kind).seconds)
        for path in folder.rglob("*"):
            os.utime(path, (4e9, 4e9))
        in_1970 = [partial(process.set_clock, -1e11)]
        ended = process.run(words(root, kind, folder), own / "again.log", in_1970)
        problem = process.finished(ended) or same(root, kind, folder)
        return None if problem is None else f"{kind}: {problem}"

    return TRIALS.each(3, place, attempt)


def cases() -> Iterable[Case]:
    for name, run in {
        "kill -9 twenty times, each kind of output": kill_again_and_again,
        "kill -9 at a random moment": TRIALS.kill_at_random,
        "kill -9 at a random change on disk, twice": TRIALS.kill_at_changes,
        "Ctrl-C or SIGTERM at a random moment": TRIALS.stop_at_random,
        "one of three processes killed": kill_rank,
        "two runs into one folder": two_into_one,
        "files stop growing at a random moment": files_stop_growing,
        "disk full or read-only at a random moment": disk_fills_up,
        "output cannot be written, every command": nowhere_to_write,
        "standard output cannot be written": full_standard_output,
        "clock set back": clock_set_back,
    }.items():
        yield Case("scoring", name, run)
