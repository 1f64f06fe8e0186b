"""Scores of a corpus in a folder, shard by shard: killed at any moment, the same command goes on.

A folder holds `part-00000.jsonl` (or `.parquet`) and so on, in the order of the input, and `_manifest.json`:
how the scores are made, and how far they have come. A shard is a unit of work with a number. It is written
whole or not at all, and its documents are batched by themselves, so that its rows are the same whoever writes
it and whether or not there was a stop before it.

Shards may be written in any order by any number of processes. Beside a written shard comes its record,
`_part-00000.json`, which the manifest takes in when its turn has come; a shard without a record is written
again. The input is known by a hash of its documents, chained from shard to shard. Going on reads it from the
start, which takes little time against scoring it, and works for standard input too.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from philens.scoring.corpus import Document
from philens.scoring.scores import OF_GROUPS, TokenScores
from philens.support.columns import Column, column_name
from philens.support.errors import InputError, OutputError
from philens.support.files import locked, write_atomically
from philens.support.processes import ALONE, Rank
from philens.tasks.chat import content_text

FORMAT = 1
MANIFEST_FILE = "_manifest.json"  # readers of Parquet folders pass over what begins with an underscore
_MANIFEST_LOCK = ".lock-manifest"
# Parquet keeps as many documents in memory before it writes them.
_ROW_GROUP_TOKENS = 1 << 18

Form = Literal["jsonl", "parquet"]
Scored = tuple[Document, TokenScores]
ScoreShard = Callable[[Sequence[Document]], Iterator[TokenScores]]
# Called with documents and tokens scored, and bytes of the input read.
Done = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Progress:
    """How far a folder has come.

    Attributes:
        shards: from the first on that are written, and `documents` and `tokens` in them, `overflowed` those
            without a value because the model overflowed.
        digest: hash of those documents.
        finished: whether the input ended there.
    """

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    digest: str = ""
    finished: bool = False
    overflowed: int = 0


@dataclass(frozen=True)
class Shard:
    """Documents that are scored and written together.

    Attributes:
        number: number from 0 on.
        digest: hash of all documents up to its last.
    """

    number: int
    documents: list[Document]
    digest: str


@dataclass(frozen=True)
class Record:
    """What is known of a written shard; `provenance` is that of its scores."""

    documents: int
    tokens: int
    digest: str
    provenance: dict[str, Any]
    overflowed: int = 0


@dataclass(frozen=True)
class _Manifest:
    options: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)  # of the scores, once there are any
    progress: Progress = Progress()
    format: int = FORMAT


def chunks(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Documents in groups; a group ends with the document that brings it to as many characters."""
    group: list[Document] = []
    length = 0
    for document in documents:
        group.append(document)
        content = document.content
        texts = [content] if isinstance(content, str) else [content_text(one) or "" for one in content]
        length += sum(map(len, texts))
        if length >= characters:
            yield group
            group, length = [], 0
    if group:
        yield group


def read_shards(documents: Iterable[Document], characters: int) -> Iterator[Shard]:
    """The shards of an input; one ends with the document that brings it to as many characters of text."""
    digest = ""
    for number, group in enumerate(chunks(documents, characters)):
        state = hashlib.blake2b(digest.encode(), digest_size=16)
        for document in group:
            state.update(json.dumps([document.id, document.content]).encode())
        digest = state.hexdigest()
        yield Shard(number, group, digest)


@dataclass(frozen=True)
class Known:
    """The shards that a folder has: those of its `progress`, and others `ahead`: by number, their digests."""

    folder: Path
    progress: Progress
    ahead: dict[int, str]

    def has(self, shard: Shard) -> bool:
        """Whether a shard is there.

        Raises:
            OutputError: it was written from another input.
        """
        number, count = shard.number, self.progress.shards
        expected = self.progress.digest if number == count - 1 else self.ahead.get(number)
        if expected is not None and expected != shard.digest:
            raise self._changed_input()
        return number < count or expected is not None

    def check_end(self, total: int) -> None:
        """Raise an OutputError if the input ended after fewer shards than are there."""
        if total < max(self.progress.shards, *(number + 1 for number in self.ahead), 0):
            raise self._changed_input()

    def _changed_input(self) -> OutputError:
        return OutputError(
            f"The input is not the one that {self.folder} was begun with, or has changed within its first "
            f"{self.progress.documents:,} documents (or others scored already); give that input again or "
            "choose another --output."
        )


@dataclass(frozen=True)
class Writer:
    """Scores shards and writes them, in any process.

    Attributes:
        form: form of the files in `folder`.
        score: function from documents to their scores, in order; called once for each shard.
        provenance: provenance of the scores that are there; empty if there are none.
    """

    folder: Path
    form: Form
    score: ScoreShard
    provenance: dict[str, Any]

    def write(self, shard: Shard, done: Done = lambda documents, tokens, end: None) -> Record:
        """A shard, then its record; `done` is called for each document.

        Raises:
            OutputError: it cannot be written, or the scores are of another model than those that are there.
        """
        provenance, tokens, overflowed = self.provenance, 0, 0

        def scored() -> Iterator[Scored]:
            nonlocal provenance, tokens, overflowed
            for document, scores in zip(shard.documents, self.score(shard.documents), strict=True):
                model = {
                    key: item
                    for key, item in json.loads(json.dumps(scores.provenance)).items()
                    if key not in ("versions", "overflowed")
                }
                provenance = provenance or model
                check_same_settings(self.folder, provenance, model)
                tokens += len(scores)
                overflowed += scores.provenance.get("overflowed", 0)
                done(1, len(scores), document.end)
                yield document, scores

        content = {"jsonl": _write_jsonl, "parquet": _write_parquet}[self.form]
        write_atomically(_part(self.folder, shard.number, self.form), lambda file: content(file, scored()))
        record = Record(len(shard.documents), tokens, shard.digest, provenance, overflowed)
        _write_json(_record(self.folder, shard.number), record)
        return record


@dataclass
class Job:
    """What there is to do.

    Attributes:
        documents: all of them, from the first on, to be read as shards of about as many `characters`.
        known: shards not to be written again.
        total: number of shards of the input, when it has been read.
    """

    documents: Iterable[Document]
    characters: int
    known: Known
    writer: Writer
    total: int = 0

    def shards(self) -> Iterator[tuple[Shard, bool]]:
        """Each shard of the input, and whether it is known; sets `total` in the end.

        Raises:
            OutputError: the known ones are from another input.
        """
        if self.known.ahead:
            # What lies before them shall not be written from another input.
            count = 1 + max(self.known.ahead)
            read = [
                self.known.has(one) for one in islice(read_shards(self.documents, self.characters), count)
            ]
            self.known.check_end(len(read))
        self.total = 0
        for shard in read_shards(self.documents, self.characters):
            self.total += 1
            yield shard, self.known.has(shard)
        self.known.check_end(self.total)


# Has the shards of a job written that are not known, and yields after each.
Schedule = Callable[[Job, Done], Iterator[None]]


def one_by_one(job: Job, done: Done, rank: Rank = ALONE) -> Iterator[None]:
    """A schedule: in this process, of several processes those whose turn it is."""
    for shard, known in job.shards():
        if known or not rank.takes(shard.number):
            done(0, 0, shard.documents[-1].end)
        else:
            job.writer.write(shard, done)
            yield


def write_shards(
    folder: Path,
    documents: Iterable[Document],
    score: ScoreShard,
    options: dict[str, Any],
    form: Form,
    characters: int = 1_000_000,
    done: Done = lambda documents, tokens, end: None,
    schedule: Schedule | None = None,
    rank: Rank = ALONE,
) -> tuple[Progress, bool]:
    """Score the documents that are not yet in the folder, and write them there.

    Args:
        folder: made if there is none.
        documents: all documents, from the first on.
        score: function from documents to their scores, in order; called once for each shard.
        options: what the rows depend on, as JSON, but for the model, which is known by its scores.
        characters: characters of text in a shard, about.
        done: called for what is scored, or found there.
        schedule: who writes the shards; by default this process, its part where it is one of several.
        rank: which of several processes this is. They may end at any time: the last one finishes the folder.

    Returns:
        How far the folder has come, and whether this process finished it; of several, one does.

    Raises:
        OutputError: the folder holds something else, belongs to other options, another input or model, or
            a running process, or cannot be written.
        InputError: there is no document.
    """
    options = json.loads(json.dumps(options | {"format": form, "shard_characters": characters}))
    with locked(folder, MANIFEST_FILE, f"-{rank.number}" if rank.number else ""):
        _check_alone(folder, rank)
        with _one_at_a_time(folder, rank):
            before, provenance, ahead = _begin(folder, options, form)
        job = Job(
            documents, characters, Known(folder, before, ahead), Writer(folder, form, score, provenance)
        )
        for _ in schedule(job, done) if schedule is not None else one_by_one(job, done, rank):
            if rank.number == 0:
                with _one_at_a_time(folder, rank):
                    _take_in(folder, options)
        if not job.total:
            raise InputError("There is nothing to score: the input has no text; give a file with text.")
        with _one_at_a_time(folder, rank):
            return _finish(folder, options, form, job.total)


def _check_alone(folder: Path, rank: Rank) -> None:
    """Raise an OutputError if a process of a larger number of them still writes here."""
    for path in folder.glob(".lock-*"):
        number = path.name.removeprefix(".lock-")
        if number.isdecimal() and int(number) >= rank.of:
            with locked(folder, MANIFEST_FILE, f"-{number}"):
                pass


def _one_at_a_time(folder: Path, rank: Rank) -> contextlib.AbstractContextManager[object]:
    """What reads and replaces the manifest; a single process has the folder for itself."""
    if rank.of == 1:
        return contextlib.nullcontext()
    from filelock import FileLock

    return FileLock(folder / _MANIFEST_LOCK)


def _begin(
    folder: Path, options: dict[str, Any], form: Form
) -> tuple[Progress, dict[str, Any], dict[int, str]]:
    """What is there: progress, provenance of the scores, and digests of shards beyond."""
    waiting = [int(found[1]) for path in folder.iterdir() if (found := _RECORD.fullmatch(path.name))]
    manifest = _read_manifest(folder)
    if manifest is None or not (manifest.progress.shards or waiting):
        # Nothing is lost with other options.
        manifest = _Manifest(options)
        _write_json(folder / MANIFEST_FILE, manifest)
    manifest = _take_in(folder, options)
    shards, provenance = manifest.progress.shards, manifest.provenance
    ahead = {}
    for number in sorted(waiting):
        if number >= shards and (record := _read_record(folder, number)) is not None:
            ahead[number], provenance = record.digest, provenance or record.provenance
    for number in (*range(shards), *ahead):
        if not (part := _part(folder, number, form)).is_file():
            raise OutputError(f"{folder} has lost {part.name}; choose another --output.")
    return manifest.progress, provenance, ahead


def _take_in(folder: Path, options: dict[str, Any]) -> _Manifest:
    """Let the manifest know of the shards whose turn has come."""
    manifest = _read_manifest(folder) or _Manifest(options)
    check_same_settings(folder, manifest.options, options)
    first = now = manifest.progress
    while (record := _read_record(folder, now.shards)) is not None:
        if manifest.provenance:
            check_same_settings(folder, manifest.provenance, record.provenance)
        manifest = replace(manifest, provenance=record.provenance)
        now = replace(
            now,
            shards=now.shards + 1,
            documents=now.documents + record.documents,
            tokens=now.tokens + record.tokens,
            digest=record.digest,
            overflowed=now.overflowed + record.overflowed,
        )
    if now != first:
        manifest = replace(manifest, progress=now)
        _write_json(folder / MANIFEST_FILE, manifest)
        for number in range(first.shards, now.shards):
            _record(folder, number).unlink(missing_ok=True)
    return manifest


def _finish(folder: Path, options: dict[str, Any], form: Form, total: int) -> tuple[Progress, bool]:
    """How far the folder has come, and whether it is finished now: all shards, none of what was left over."""
    manifest = _take_in(folder, options)
    now = manifest.progress
    if now.shards < total or now.finished:
        return now, False
    for path in folder.iterdir():
        found = _LEFT.fullmatch(path.name)
        if found and not (found["form"] == form and int(found["number"]) < total):
            path.unlink()
    now = replace(now, finished=True)
    _write_json(folder / MANIFEST_FILE, replace(manifest, progress=now))
    return now, True


_RECORD = re.compile(r"_part-(\d+)\.json")
# Parts, records, and what was not wholly written of them.
_LEFT = re.compile(r"part-(?P<number>\d+)\.(?P<form>\w+)|_part-.*|\.(part-|_part-|_manifest).*")


def _part(folder: Path, number: int, form: str) -> Path:
    return folder / f"part-{number:05}.{form}"


def _record(folder: Path, number: int) -> Path:
    return folder / f"_part-{number:05}.json"


def _read_record(folder: Path, number: int) -> Record | None:
    path = _record(folder, number)
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}); choose another --output.") from error


def _read_manifest(folder: Path) -> _Manifest | None:
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["format"]
        if version == FORMAT:
            return _Manifest(**found | {"progress": Progress(**found["progress"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}); choose another --output.") from error
    raise OutputError(f"{folder} was begun by another version of philens; choose another --output.")


def check_same_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise an OutputError if a folder was begun with other settings than it is to go on with."""
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise OutputError(
                f"{folder} was begun with another {key.replace('_', ' ')} ({before.get(key)!r}, now "
                f"{now.get(key)!r}); give the same command again or choose another --output."
            )


def _write_json(path: Path, content: _Manifest | Record) -> None:
    text = json.dumps(asdict(content), indent=2, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


def json_line(document: Document, scores: TokenScores) -> str:
    """One line of JSON: id, means, also of spans, and what `to_json` gives and `from_json` reads."""
    first: dict[str, Any] = {"id": document.id, "means": _numbers(scores.means())}
    if scores.spans:
        of_spans = scores.span_means()
        first["span_means"] = [one._asdict() | {"means": _numbers(one.means)} for one in of_spans]
    return f"{json.dumps(first, ensure_ascii=False)[:-1]}, {scores.to_json()[1:]}"


def _numbers(means: dict[str, float]) -> dict[str, float | None]:
    return {name: None if isnan(mean) else mean for name, mean in means.items()}


def _write_jsonl(file: BinaryIO, scored: Iterable[Scored]) -> None:
    for document, scores in scored:
        # The manifest says the rest once, instead of every line again.
        kept = ("overflowed", "metric_options")
        own = {key: scores.provenance[key] for key in kept if key in scores.provenance}
        brief = replace(scores, name=document.id, provenance=own)
        file.write(f"{json_line(document, brief)}\n".encode())


def _write_parquet(file: BinaryIO, scored: Iterable[Scored]) -> None:
    """One row per document: texts and means as values, tokens as lists; the provenance as metadata."""
    import pyarrow

    writer, rows, tokens = None, [], 0
    try:
        for document, scores in scored:
            if writer is None:
                writer = _parquet_writer(file, scores)
            rows.append(_row(document, scores))
            tokens += len(scores)
            if tokens >= _ROW_GROUP_TOKENS:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=writer.schema))
                rows, tokens = [], 0
        if writer is not None and rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _row(document: Document, scores: TokenScores) -> dict[str, Any]:
    others = {} if scores.alternatives is None else scores.alternatives.to_lists()
    return {
        "id": document.id,
        "text": scores.text,
        "token_ids": scores.token_ids,
        "starts": scores.offsets[:, 0],
        "ends": scores.offsets[:, 1],
        **scores.columns,
        **_mean_columns(scores.means()),
        "spans": [
            span._asdict() | {"tokens": part.tokens} | _mean_columns(part.means)
            for span, part in zip(scores.spans, scores.span_means(), strict=True)
        ],
        "sinks": np.flatnonzero(scores.sinks),
        **{_OF_ALTERNATIVES[name]: values for name, values in others.items()},
    }


def _mean_columns(means: dict[str, float]) -> dict[str, float]:
    return {
        name if Column(name, OF_GROUPS).statistic else column_name(name, statistic="mean"): mean
        for name, mean in means.items()
    }


# What a row calls the lists of `Alternatives.to_lists`, which have an entry for each token.
_OF_ALTERNATIVES = {
    "ranks": "ranks",
    "token_ids": "alternative_ids",
    "texts": "alternatives",
    "probabilities": "alternative_probabilities",
}


def _parquet_writer(file: BinaryIO, scores: TokenScores) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    numbers, places = pa.list_(pa.float32()), pa.list_(pa.int32())
    means = dict.fromkeys(_mean_columns(scores.means()), pa.float64())
    span = pa.struct({"name": pa.string(), **dict.fromkeys(("start", "end", "tokens"), pa.int32()), **means})
    fields = {"id": pa.string(), "text": pa.string(), "token_ids": places, "starts": places, "ends": places}
    fields |= dict.fromkeys(scores.columns, numbers)
    fields |= means
    fields |= {"spans": pa.list_(span), "sinks": places}
    if scores.alternatives is not None:
        of_each = {"ranks": pa.int32(), "token_ids": places, "texts": pa.list_(pa.string())}
        of_each["probabilities"] = numbers
        fields |= {_OF_ALTERNATIVES[name]: pa.list_(kind) for name, kind in of_each.items()}
    origin = {key: item for key, item in scores.provenance.items() if key != "overflowed"}
    return parquet.ParquetWriter(file, pa.schema(fields).with_metadata({"philens": json.dumps(origin)}))
