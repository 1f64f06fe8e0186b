"""The folder of a run of `philens solve`, which can be killed at any moment and goes on.

It holds `solutions.jsonl`, a solution on each line by problem and sample, and `solve.json`: what they were
sampled with, from and by, and how many are right. While sampling goes on, solutions are in
`solutions.part.jsonl` in the order in which they are drawn; a batch there counts when it is whole.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from philens.scoring.shards import check_same_settings
from philens.support.errors import OutputError
from philens.support.files import write_atomically
from philens.support.versions import versions
from philens.tasks.problem import Problem

FORMAT = 1
SOLUTIONS_FILE, RECORD_FILE, PART_FILE = "solutions.jsonl", "solve.json", "solutions.part.jsonl"

Row = tuple[int, int]
"""A problem's number and a sample's."""


def begin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the folder's record says, or that of a new one; what a killed process left half written goes.

    Raises:
        OutputError: it is of other settings, or damaged.
    """
    fresh = {"format": FORMAT, "settings": settings, "origin": {}, "prompt": {}, "counts": {}}
    path = folder / RECORD_FILE
    for left in (*folder.glob(f".{RECORD_FILE}.*.tmp"), *folder.glob(f".{SOLUTIONS_FILE}.*.tmp")):
        left.unlink()
    if not path.exists():
        return fresh
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, before = record["format"], record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}); choose another --output.") from error
    if version != FORMAT:
        raise OutputError(f"{folder} was begun by another version of philens; choose another --output.")
    part, whole = folder / PART_FILE, folder / SOLUTIONS_FILE
    if not (part.is_file() and part.stat().st_size) and not whole.is_file():
        return fresh  # nothing would be lost with other settings
    check_same_settings(folder, before, settings)
    if record["counts"] and whole.is_file():
        part.unlink(missing_ok=True)
        return record
    return record | {"counts": {}}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps({"versions": versions(), **record}, indent=2, ensure_ascii=False)
    write_atomically(folder / RECORD_FILE, lambda file: file.write(f"{text}\n".encode()))


def whole_batches(path: Path, problems: Sequence[Problem], plan: Sequence[list[Row]]) -> int:
    """How many batches are in the file; the rest of it is cut off."""
    if not path.exists():
        return 0
    size = done = 0
    with path.open("r+b") as file:
        for batch in plan:
            lines = [file.readline() for _ in batch]
            rows = [(problems[number].id, sample) for number, sample in batch]
            if [_row_of(line) for line in lines] != rows:
                break
            size += sum(map(len, lines))
            done += 1
        file.truncate(size)
    return done


def _row_of(line: bytes) -> tuple[str, int] | None:
    try:
        value = json.loads(line) if line.endswith(b"\n") else {}
        return value["problem_id"], value["sample"]
    except (ValueError, KeyError, TypeError):
        return None


def append(path: Path, lines: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"Cannot write {path}: {reason}; free some space, and the same command goes on."
        ) from error


def in_order(folder: Path, plan: Sequence[list[Row]]) -> dict[str, Any]:
    """Write all solutions by problem and sample, and count."""
    counts = dict.fromkeys(("solutions", "tokens", "correct", "unparsed", "cut_off"), 0)
    levels: dict[str, list[bool]] = defaultdict(list)
    with (folder / PART_FILE).open("rb") as part:
        places = {}
        for row in (row for batch in plan for row in batch):
            places[row] = part.tell()
            part.readline()

        def content(file: BinaryIO) -> None:
            for row in sorted(places):
                part.seek(places[row])
                line = part.readline()
                file.write(line)
                one = json.loads(line)
                counts["solutions"] += 1
                counts["tokens"] += one["tokens"]
                counts["correct"] += one["correct"]
                counts["unparsed"] += one["answer"] is None
                counts["cut_off"] += not one["finished"]
                if one["level"] is not None:
                    levels[str(one["level"])].append(one["correct"])

        write_atomically(folder / SOLUTIONS_FILE, content)
    shares = {level: round(sum(found) / len(found), 4) for level, found in sorted(levels.items())}
    return {"problems": len({problem for problem, _ in places}), **counts, "levels": shares}
