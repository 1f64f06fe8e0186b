"""Texts and chats with an id each, read from files, object stores, standard input or the Hub, however much.

At no time is more in memory than one document (a Parquet file: one batch of its rows).
"""

import codecs
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal

from philens.bases.hub import reason
from philens.support.errors import InputError
from philens.support.typed import listed
from philens.tasks.chat import check_chat, is_message
from philens.tasks.records import (
    MAX_RECORD_BYTES,
    begins_as_json,
    csv_records,
    is_packed,
    json_values,
    kind_of,
    unpacked,
)

# A longer text becomes several documents, cut at line ends where there are any.
MAX_CHARACTERS = 1 << 20
_PARQUET_ROWS = 64
_HUB = "hub:"

Message = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A text, or a chat.

    Attributes:
        id: where it is from: `FILE`, or `FILE:LINE` from 1 on (in a table the row), or `FILE:LINE:CHARACTER`
            where a line (a record) was cut.
        content: the text, or the messages, each with `role` and `content`.
        end: bytes of all inputs read when it had been read, as far as is known.
    """

    id: str
    content: str | list[Message]
    end: int


class Corpus:
    """Documents from `inputs`, in order. Iterating reads from the beginning; standard input only once.

    Args:
        inputs: text files; tables: JSON Lines (`.jsonl`, `.ndjson`), `.json`, `.csv`, `.tsv` and `.parquet`;
            all but the last also compressed (`.gz`, `.zst`); the same, and folders of records, as
            `s3://bucket/path`, `gs://` or what else pyarrow or fsspec opens; `-` for text or JSON from
            standard input; Hub data sets, streamed, as `hub:owner/name` or `hub:owner/name:config`.
        field: field (column) of records with the text or the messages; by default `text`, else `messages`.
        by: what in a text file is a document: the `file` or a `line`. Texts of more than MAX_CHARACTERS
            become several documents either way.
        split: split of Hub data sets.
        limit: stop after as many documents.

    Attributes:
        inputs: as given, without what in an address is only for access.
        once: an input that can be read only once, None if there is none.
        size: bytes of all inputs, None where that is not known.
        skipped: empty documents, or only of white space, left out in the last iteration.

    Raises:
        InputError: an input does not exist, or the options do not fit. While iterating: text that is not
            UTF-8, what is damaged, or a record without the field.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        field: str | None = None,
        by: Literal["file", "line"] = "file",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        if not inputs:
            raise InputError(
                "There is nothing to score; give files, - for standard input, or hub:owner/name."
            )
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}.")
        self.inputs = [_public(name) for name in inputs]
        self.field, self.by, self.split, self.limit = field, by, split, limit
        self.skipped = 0
        files = [one for name in inputs for one in (_remote_files(name) if _REMOTE in name else [name])]
        self._sizes = [(name, self._check(name)) for name in files]
        sizes = [size for _, size in self._sizes if size is not None]
        self.size = sum(sizes) if len(sizes) == len(files) else None
        self.once = next((name for name in files if _is_stream(name)), None)

    def _check(self, name: str) -> int | None:
        """Raise an InputError if an input cannot be read; its size in bytes, None if not known."""
        kind, packed = kind_of(_public(name)), is_packed(_public(name))
        if kind == "text" and not (name.startswith(_HUB) or _is_stream(name)):
            self._check_no_field(_public(name))
        if kind == "parquet" and packed:
            raise InputError(
                f"{_public(name)} is Parquet, which is compressed in itself, compressed once more; unpack it."
            )
        if name == "-" and sys.stdin is None:
            raise InputError("Standard input is closed; give a file, or put a text into it.")
        if name == "-" or name.startswith(_HUB):
            return None
        if _REMOTE in name:
            filesystem, path = _remote(name)
            return None if packed else filesystem.get_file_info(path).size
        path = Path(name)
        if name and path.is_dir():
            raise InputError(f"{name} is a folder; give the files in it.")
        if not (name and path.exists()):
            raise InputError(f"There is no file {name or repr(name)}; check the path.")
        return path.stat().st_size if path.is_file() and not packed else None

    def _check_no_field(self, name: str) -> None:
        if self.field is not None:
            raise InputError(
                f"{name} is read as text and has no fields; "
                "--field goes with .jsonl, .json, .csv, .tsv, .parquet and hub:."
            )

    def __iter__(self) -> Iterator[Document]:
        self.skipped = count = start = 0
        for name, size in self._sizes:
            for document in self._read(name):
                content = document.content
                if not (content.strip() if isinstance(content, str) else content):
                    self.skipped += 1
                    continue
                yield Document(document.id, content, start + document.end)
                count += 1
                if count == self.limit:
                    return
            start += size or 0

    def _read(self, name: str) -> Iterator[Document]:
        if name.startswith(_HUB):
            yield from self._read_hub(name)
            return
        shown = _public(name)
        with nullcontext(sys.stdin.buffer) if name == "-" else _open(name) as file:
            kind = kind_of(shown)
            if kind == "parquet":
                yield from self._read_parquet(shown, file)
                return
            stream = unpacked(shown, file)
            if kind == "text" and _is_stream(name) and begins_as_json(stream):
                kind = "json"
            if kind == "jsonl":
                yield from self._read_json_lines(shown, stream)
            elif kind == "json":
                yield from self._read_json(shown, stream)
            elif kind != "text":
                yield from self._read_csv(shown, stream, "," if kind == "csv" else "\t")
            else:
                self._check_no_field(shown)
                yield from (_read_lines if self.by == "line" else _read_whole)(shown, stream)

    def _read_json_lines(self, name: str, file: BinaryIO) -> Iterator[Document]:
        end = 0
        for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES), b""), start=1):
            end += len(line)
            place = f"{name} line {number}"
            if len(line) == MAX_RECORD_BYTES:
                raise InputError(f"{place} is longer than {MAX_RECORD_BYTES >> 20} MB; it is no JSON Lines.")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON ({reason(error)}); correct or remove it.") from error
            yield from self._documents(self._record(record, place), place, f"{name}:{number}", end)

    def _read_json(self, name: str, stream: io.BufferedReader) -> Iterator[Document]:
        """Records, or texts, in a list or one after the other; a list of messages is a chat."""
        number = 0
        for listed_in, values in groupby(json_values(name, stream), key=lambda value: value[1]):
            for place, _, value in values:
                if listed_in and is_message(value) and "text" not in value:
                    value = [value, *(message for *_, message in values)]
                record = {"text": value} if isinstance(value, str) and self.field is None else value
                number += 1
                identity, end = f"{name}:{number}", _position(stream)
                yield from self._documents(self._record(record, place), place, identity, end)

    def _record(self, value: Any, place: str) -> dict[str, Any]:
        """A value of JSON as a record; a chat alone is one."""
        if isinstance(value, list) and is_message(value[0] if value else None) and self.field is None:
            check_chat(value, place)
            value = {"messages": value}
        if not isinstance(value, dict):
            raise InputError(f'{place} is no record: it must look like {{"text": ...}}.')
        return value

    def _read_csv(self, name: str, stream: io.BufferedReader, separator: str) -> Iterator[Document]:
        for number, (place, record) in enumerate(csv_records(name, stream, separator), 1):
            yield from self._documents(record, place, f"{name}:{number}", _position(stream))

    def _read_parquet(self, name: str, file: BinaryIO) -> Iterator[Document]:
        import pyarrow
        from pyarrow import parquet

        try:
            size = file.seek(0, io.SEEK_END)
            with parquet.ParquetFile(file, buffer_size=1 << 20) as table:
                fields, number = table.schema_arrow.names, 0
                columns = [self._field(fields, name)]
                rows = max(table.metadata.num_rows, 1)
                for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
                    for record in batch.to_pylist():
                        number += 1
                        place, end = f"{name} row {number}", size * number // rows
                        yield from self._documents(record, place, f"{name}:{number}", end)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{name} cannot be read as Parquet ({reason(error)}); it is damaged or something else."
            ) from error

    def _read_hub(self, name: str) -> Iterator[Document]:
        from datasets import load_dataset

        from philens.bases.hub import quiet

        repository, _, config = name.removeprefix(_HUB).partition(":")
        try:
            with quiet():
                records = iter(load_dataset(repository, config or None, split=self.split, streaming=True))
        except Exception as error:  # anything a network can do
            raise InputError(
                f"The data set {repository} cannot be read ({reason(error)}); check its name, the split and "
                "the connection."
            ) from error
        number = 0
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # the same
                raise InputError(
                    f"The data set {repository} broke off after row {number} ({reason(error)}); try again."
                ) from error
            number += 1
            yield from self._documents(record, f"{name} row {number}", f"{name}:{number}", 0)

    def _field(self, fields: Sequence[str], place: str) -> str:
        """The field that holds the text or the messages."""
        for wanted in [self.field] if self.field is not None else ["text", "messages"]:
            if wanted in fields:
                return wanted
        have = listed(map(repr, fields)) or "none"
        missing = self.field or "text"
        raise InputError(f"{place} has no field {missing!r}; it has {have}: choose one with --field.")

    def _documents(self, record: dict[str, Any], place: str, identity: str, end: int) -> Iterator[Document]:
        field = self._field(list(record), place)
        value = record[field]
        if isinstance(value, list) and all(map(is_message, value)):
            if value:
                check_chat(value, place)
            yield Document(identity, value, end)
        elif isinstance(value, str) or value is None:
            text = value or ""
            if not _is_unicode(text):
                raise InputError(f"{place}: field {field!r} holds half a character; correct or remove it.")
            for start, part in _cut(text):
                yield Document(identity if part is text else f"{identity}:{start + 1}", part, end)
        else:
            raise InputError(
                f"{place}: field {field!r} must be text, or a list of messages with role and content, "
                f"not {str(value)[:40]!r}."
            )


_REMOTE = "://"


def _is_stream(name: str) -> bool:
    """Whether an input can be read only once: standard input, or something here that is no file."""
    elsewhere = name.startswith(_HUB) or _REMOTE in name
    return name == "-" or (not elsewhere and Path(name).exists() and not Path(name).is_file())


def _position(stream: io.BufferedReader) -> int:
    """Bytes read so far, where that can be told."""
    return stream.tell() if stream.seekable() else 0


def _public(name: str) -> str:
    """A name for people and files: what is not Unicode in it as an escape, and without what in an address is
    only for access: keys, and options behind a question mark."""
    name = name.encode(errors="backslashreplace").decode()
    return re.sub(r"(?<=://)[^/?]*@|\?.*", "", name) if _REMOTE in name else name


def _remote(name: str) -> tuple[Any, str]:
    """The file system that an address leads to, as pyarrow has it, and the path there."""
    import pyarrow
    from fsspec.core import url_to_fs
    from pyarrow import fs

    try:
        try:
            return fs.FileSystem.from_uri(name)
        except pyarrow.ArrowInvalid:  # none of its own
            system, path = url_to_fs(name)
            return fs.PyFileSystem(fs.FSSpecHandler(system)), path
    except (ImportError, ValueError, OSError) as error:
        raise _unreachable(name, error) from error


def _remote_files(name: str) -> list[str]:
    """The address of a file, or those of all files with records in a folder and those below it, in order."""
    from pyarrow import fs

    filesystem, path = _remote(name)
    try:
        kind = filesystem.get_file_info(path).type
        found = (
            filesystem.get_file_info(fs.FileSelector(path, recursive=True))
            if kind.name == "Directory"
            else []
        )
    except OSError as error:
        raise _unreachable(name, error) from error
    if kind.name == "File":
        return [name]
    head, mark, access = name.partition("?")
    below = sorted(one.path for one in found if one.is_file and kind_of(one.path) in ("jsonl", "parquet"))
    if not below:
        what = "no .jsonl or .parquet in" if kind.name == "Directory" else "no file"
        raise InputError(f"There is {what} {_public(name)}; check the path.")
    return [f"{head.rstrip('/')}{one.removeprefix(path.rstrip('/'))}{mark}{access}" for one in below]


def _open(name: str) -> BinaryIO:
    if _REMOTE not in name:
        return open(name, "rb")
    filesystem, path = _remote(name)
    try:
        return io.BufferedReader(filesystem.open_input_file(path), 1 << 20)
    except OSError as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> InputError:
    return InputError(
        f"{_public(name)} cannot be read ({reason(error)}); check the address and your access to it."
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return False
    return True


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """Parts of at most MAX_CHARACTERS and where each begins; they end at line ends where there are any."""
    start = 0
    while len(text) - start > MAX_CHARACTERS:
        end = text.rfind("\n", start, start + MAX_CHARACTERS) + 1 or start + MAX_CHARACTERS
        yield start, text[start:end]
        start = end
    yield start, text[start:]


@dataclass(frozen=True, slots=True)
class _Line:
    """A line with its end, or a part of a line that is too long."""

    text: str
    number: int  # from 1 on
    character: int  # where in its line it begins, from 1 on
    whole: bool
    end: int  # bytes of the file up to its end

    def id(self, name: str) -> str:
        return f"{name}:{self.number}" if self.whole else f"{name}:{self.number}:{self.character}"


def _lines(name: str, file: BinaryIO) -> Iterator[_Line]:
    """The lines of a text in UTF-8, never more than MAX_CHARACTERS at once."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = character = 1
    end, ended = 0, False
    while not ended:
        raw = file.readline(MAX_CHARACTERS)
        ended = not raw
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final=ended)
        except UnicodeDecodeError as error:
            place, byte = end - waiting + error.start, error.object[error.start]
            raise InputError(
                f"{name} is not UTF-8: byte {place + 1} is 0x{byte:02x}; "
                "if it is text, convert it (iconv -t UTF-8)."
            ) from error
        text = text.removeprefix("\ufeff") if end == 0 else text
        end += len(raw)
        complete = raw.endswith(b"\n")
        if text:
            whole = character == 1 and (complete or len(raw) < MAX_CHARACTERS)
            yield _Line(text, number, character, whole, end)
        number, character = (number + 1, 1) if complete else (number, character + len(text))


def _read_lines(name: str, file: BinaryIO) -> Iterator[Document]:
    for line in _lines(name, file):
        yield Document(line.id(name), line.text.removesuffix("\n").removesuffix("\r"), line.end)


def _read_whole(name: str, file: BinaryIO) -> Iterator[Document]:
    """A text as one document, or in several of whole lines where it is longer than MAX_CHARACTERS."""
    lines: list[_Line] = []
    length, alone = 0, True
    for line in _lines(name, file):
        if lines and length + len(line.text) > MAX_CHARACTERS:
            yield Document(lines[0].id(name), "".join(one.text for one in lines), lines[-1].end)
            lines, length, alone = [], 0, False
        lines.append(line)
        length += len(line.text)
    if lines:
        identity = name if alone else lines[0].id(name)
        yield Document(identity, "".join(one.text for one in lines), lines[-1].end)
