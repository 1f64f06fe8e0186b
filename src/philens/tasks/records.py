"""Tables by their names and first characters: JSON, JSON Lines, CSV, TSV, Parquet, also compressed.

Whatever the size, no more is held than one record.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO, Literal, cast

from philens.bases.hub import reason
from philens.support.errors import InputError

Kind = Literal["text", "json", "jsonl", "csv", "tsv", "parquet"]
# A longer line or record is none.
MAX_RECORD_BYTES = 1 << 26
_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
PACKED = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*["}]|\[\s*[{"])')
_CHUNK = 1 << 16


def kind_of(name: str) -> Kind:
    """What a file's name says it holds; `text` where that is none of the tables known."""
    path = PurePath(name.lower())
    return _KINDS.get(PurePath(path.stem if path.suffix in PACKED else path).suffix, "text")


def is_packed(name: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return PurePath(name.lower()).suffix in PACKED


def unpacked(name: str, file: BinaryIO) -> io.BufferedReader:
    """A file as it is, or what it holds where it begins like gzip or Zstandard.

    Raises:
        InputError: while it is read, where it is damaged or ends too early.
    """
    stream = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(Any, file), 1 << 20)
    head = stream.peek(4)
    packing = next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), None)
    if packing is None:
        return stream
    if packing == "gzip":
        inner: Any = gzip.GzipFile(fileobj=stream)
    else:
        import pyarrow

        inner = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), packing)
    return io.BufferedReader(_Unpacked(name, inner), 1 << 20)


class _Unpacked(io.RawIOBase):
    """What is compressed in a stream, with one kind of error for all that can be wrong with it."""

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner = name, inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.inner.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(
                f"{self.name} cannot be unpacked ({reason(error)}); it is damaged or broken off."
            ) from error
        buffer[: len(data)] = data
        return len(data)


def begins_as_json(stream: io.BufferedReader) -> bool:
    """Whether a stream begins like a JSON object, or a list of objects or texts; nothing is read from it."""
    return _JSON.match(stream.peek(_CHUNK)) is not None


def json_values(name: str, stream: BinaryIO) -> Iterator[tuple[str, int, Any]]:
    """The values of JSON lists, or those that stand one after the other: the place of each for errors, the
    number of its list from 1 on (0 in none), and the value.

    Raises:
        InputError: something is not JSON, or not UTF-8.
    """
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decode, number, lists, inside, text, place = json.JSONDecoder().raw_decode, 0, 0, False, "", 0
    try:
        while True:
            while place < len(text) and (text[place].isspace() or (inside and text[place] == ",")):
                place += 1
            where = f"{name} record {number + 1}"
            if place == len(text):
                text, place = reader.read(_CHUNK), 0
                if text:
                    continue
                if inside:
                    raise InputError(
                        f"{name} breaks off within its list, after record {number}; complete it."
                    )
                return
            if text[place] == ("]" if inside else "["):
                inside, lists, place = not inside, lists + (not inside), place + 1
                continue
            try:
                value, end = decode(text, place)
            except (ValueError, RecursionError) as error:
                more = reader.read(max(_CHUNK, len(text) - place))
                if not more or len(text) - place > MAX_RECORD_BYTES:
                    # Not where: it counts from what was read last.
                    why = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
                    raise InputError(f"{where} is not JSON ({why}); correct or remove it.") from error
                text, place = text[place:] + more, 0
                continue
            number += 1
            yield where, lists if inside else 0, value
            place = end
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error) from error
    finally:
        _let_go(reader)


def csv_records(name: str, stream: BinaryIO, separator: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table below its first row, which names the columns, each with its place for errors.

    Raises:
        InputError: no such row, another number of fields, an open quote, or not UTF-8.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        rows = csv.reader(reader, delimiter=separator, strict=True)
        names, number = next((row for row in rows if row), None), 0
        if names is None:
            raise InputError(f"{name} is empty; its first row must name the columns.")
        for row in rows:
            if not row:
                continue
            number += 1
            where = f"{name} row {number}"
            if len(row) != len(names):
                raise InputError(
                    f"{where} has {len(row)} fields and the first row names {len(names)}; put quotes around "
                    "fields with separators or line ends in them."
                )
            yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{name} cannot be read as a table ({reason(error)}, after row {number}); correct its quotes."
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error) from error
    finally:
        _let_go(reader)


def _let_go(reader: io.TextIOWrapper) -> None:
    """Leave the stream below to its owner, who may have closed it."""
    with contextlib.suppress(ValueError):
        reader.detach()


def _not_utf8(name: str, error: UnicodeDecodeError) -> InputError:
    return InputError(f"{name} is not UTF-8 ({error.reason}); convert it (iconv -t UTF-8).")
