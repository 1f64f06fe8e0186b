"""Where real text comes from: files, folders, data sets of the Hub, what is installed, formal languages.

A document is a text, or a chat as a list of messages with `role` and `content`. Text files are read when they
are asked for; tables are kept on disk by `datasets` and mapped into memory.
"""

import contextlib
import json
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from philens.support.errors import ConfigError, InputError
from philens.support.files import PACKAGE
from philens.support.typed import listed
from philens.tasks.arithmetic import LEVELS, problem_at
from philens.tasks.automata import TaskConfig, generate
from philens.tasks.chat import check_chat, is_message
from philens.tasks.records import PACKED, Kind, kind_of

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Document: TypeAlias = str | list[dict[str, Any]]

# The source of what the base itself writes (`philens.training.own_text`).
SELF = "self"


@dataclass
class TextPart:
    """One part of the training text.

    Attributes:
        source: a file or folder; `math`, `gsm8k`, `arithmetic`, `automata`, `installed`; `self`, text that
            the base itself writes before training; or the id of a data set on the Hub. Write `./math` for a
            folder of that name.
        weight: share of this part among the documents; the weights need not add up to 1.
        files: patterns of the files that are read of a folder, such as `**/*.py`.
        name: configuration of a Hub data set; of `automata`, the task; of `arithmetic`, the level (all
            five without it); of `installed`, one of `code`, `documentation`, `licences` (all three without
            it); of `self`, `chat` or `text` (chats where the tokenizer has a template, without it).
        split: split of a Hub data set.
        text: the field that holds the text.
        user: the field that holds the user's message; needs `assistant`.
        assistant: the field that holds the reply; needs `user`.
        messages: the field that holds a chat, a list of messages with `role` and `content`.
        documents: take at most the first so many; of `self`, write so many (1,024 without it).
        streaming: whether only the first `documents` of a Hub data set are fetched, and kept on disk.
    """

    source: str = ""
    weight: float = 1.0
    files: list[str] | None = None
    name: str | None = None
    split: str = "train"
    text: str | None = None
    user: str | None = None
    assistant: str | None = None
    messages: str | None = None
    documents: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(
                "source must be given: a file, a folder, math, gsm8k, arithmetic, automata, installed, self, "
                "or the id of a data set on the Hub."
            )
        if not (self.weight >= 0 and np.isfinite(self.weight)):
            raise ConfigError(f"weight must be a finite number of at least 0, not {self.weight}.")
        if self.documents is not None and self.documents < 1:
            raise ConfigError(f"documents must be at least 1, not {self.documents}.")
        if (self.user is None) != (self.assistant is None):
            raise ConfigError("user and assistant name the two sides of a chat; give both fields.")
        if sum(name is not None for name in (self.text, self.user, self.messages)) > 1:
            raise ConfigError("Give one of text, messages, and user with assistant, not several.")
        if self.source == SELF and self.name not in (None, "chat", "text"):
            raise ConfigError(f"name must be chat or text for the source self, not {self.name!r}.")
        if self.streaming and self.documents is None:
            raise ConfigError("streaming needs documents: how many of the first to fetch.")


class Source(Protocol):
    """Documents by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


# Ids on the Hub, with the name of the configuration.
HUB_SETS = {"math": ("DigitalLearningGmbH/MATH-lighteval", "default"), "gsm8k": ("openai/gsm8k", "main")}
# Fields looked for when a part names none, in this order; two are a user's message and the reply.
KNOWN_FIELDS = (
    ("messages",),
    ("text",),
    ("user", "assistant"),
    ("problem", "solution"),
    ("question", "answer"),
    ("prompt", "completion"),
)
TABLES = {".jsonl", ".json", ".parquet"}
# How `datasets` reads a kind of table.
_LOADERS: dict[Kind, tuple[str, dict[str, Any]]] = {
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "csv": ("csv", {"keep_default_na": False}),
    "tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    "parquet": ("parquet", {}),
}
_PROSE = {".txt", ".md", ".rst", ".tex", ".html"}
_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".rb"}
_OTHER = {".r", ".jl", ".lua", ".pl", ".sh", ".sql", ".css", ".xml", ".toml", ".yaml", ".yml", ".ini", ".cfg"}
TEXTS = _PROSE | _CODE | _OTHER


def open_source(part: TextPart, tasks: TaskConfig | None = None, seed: int = 0) -> Source:
    """The documents of a part.

    Args:
        tasks: sizes of the formal languages of `automata`.
        seed: seed of these, and of arithmetic problems.

    Raises:
        InputError: there is nothing to read, or it cannot be read.
        ConfigError: options that do not fit the source.
    """
    path = Path(part.source)
    if part.source == SELF:
        raise ConfigError("source self is text that a base writes in training; name a file to read one.")
    if part.source == "automata":
        task = part.name or "in_context_language"
        source: Source = Made(partial(_formal, tasks or TaskConfig(), seed, task))
    elif part.source == "arithmetic":
        source = Made(partial(_arithmetic, seed, _level(part.name)))
    elif part.source == "installed":
        source = TextFiles(installed_files(part.name), errors="replace")
    elif part.source not in HUB_SETS and path.exists():
        source = _open_path(path, part)
    else:
        source = _open_hub(part)
    if not len(source):
        raise InputError(f"{part.source} is empty; give a source with at least one document.")
    return source if part.documents is None else First(source, part.documents)


@dataclass(frozen=True)
class First:
    """The first documents of a source."""

    source: Source
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Document:
        return self.source[index]


PROMPT = "Write strings of a formal language."
# To be measured, so never read in training.
SHIPPED_TEXTS = PACKAGE / "shipped" / "texts"


@dataclass(frozen=True)
class Made:
    """Documents made by their number, without end."""

    make: Callable[[int], Document]

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> Document:
        return self.make(index)


def _formal(config: TaskConfig, seed: int, task: str, index: int) -> Document:
    """A document of a formal task as the assistant's reply to a user who asks for one."""
    return chat_of(PROMPT, generate(config, seed, task, index).text(0))


def _arithmetic(seed: int, level: int | None, index: int) -> Document:
    """An arithmetic problem for training with its solution as the assistant's reply; without a level, each in
    turn."""
    problem = problem_at(index, level or index % len(LEVELS) + 1, "train", seed)
    return chat_of(problem.problem, str(problem.solution))


def _level(name: str | None) -> int | None:
    if name is None:
        return None
    if name not in map(str, LEVELS):
        raise ConfigError(f"name must be a level of arithmetic, from 1 to {len(LEVELS)}, not {name!r}.")
    return int(name)


@dataclass(frozen=True)
class TextFiles:
    """Text files; one longer than `PIECE` bytes is as many documents as it has pieces of that size.

    Pieces begin at the start of a line where there is one near.

    Attributes:
        paths: paths of the files.
        errors: `strict` raises an InputError where a file is not UTF-8, `replace` does not.
    """

    paths: list[Path]
    errors: str = "strict"
    PIECE = 2**15

    @cached_property
    def _ends(self) -> np.ndarray:
        """(files,) number of pieces up to and with each file; an empty file has none."""
        sizes = np.array([path.stat().st_size for path in self.paths], np.int64)
        return np.cumsum(-(-sizes // self.PIECE))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self.paths) else 0

    def __getitem__(self, index: int) -> Document:
        number = int(np.searchsorted(self._ends, index, side="right"))
        pieces = np.diff(self._ends, prepend=0)[number] if number else self._ends[0]
        piece, path = index - int(self._ends[number] - pieces), self.paths[number]
        with path.open("rb") as file:
            size = path.stat().st_size
            start, end = (_line_start(file, size * k // int(pieces), size) for k in (piece, piece + 1))
            file.seek(start)
            data = file.read(end - start)
        try:
            return data.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not text in UTF-8 (byte {start + error.start}); convert it or leave it out."
            ) from error


def _line_start(file: Any, position: int, size: int) -> int:
    """The first start of a line from `position` on, or of a character where no line starts nearby."""
    if position in (0, size):
        return position
    file.seek(position - 1)
    near = file.read(4097)
    found = near.find(b"\n")
    if found >= 0:
        return position + found
    return position + next((k for k, byte in enumerate(near[1:]) if byte & 0xC0 != 0x80), 0)


def installed_files(kind: str | None = None) -> list[Path]:
    """Text that every machine with Python has: of the running Python's library and installed packages.

    Args:
        kind: `code` (.py), `documentation` (.rst, .md, .txt and packages' METADATA), `licences`, or None for
            all.

    Returns:
        In an order that depends on nothing but the files' names.

    Raises:
        ConfigError: another kind.
    """
    kinds = ("code", "documentation", "licences")
    if kind is not None and kind not in kinds:
        raise ConfigError(f"Installed text has the kinds {', '.join(kinds)}, not {kind!r}.")
    return [path for which, path in _installed() if kind in (None, which)]


@cache
def _installed() -> list[tuple[str, Path]]:
    """Kind and path of every installed text, by roots and then by names."""
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"]).resolve()
    found = []
    for root in sorted({library} | {Path(paths[key]).resolve() for key in ("purelib", "platlib")}):
        here = []
        for folder, folders, names in os.walk(root):
            inside = Path(folder).relative_to(root)
            # Packages beside the library are read only where this Python sees them: then they are a root.
            skipped = {"__pycache__", "site-packages"}
            folders[:] = [
                name for name in folders if name not in skipped and Path(folder, name) != SHIPPED_TEXTS
            ]
            here += [(kind, inside / name) for name in names if (kind := _installed_kind(inside / name))]
        found += [(kind, root / path) for kind, path in sorted(here, key=lambda pair: pair[1].as_posix())]
    return found


_LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
_LISTS = {"top_level.txt", "entry_points.txt", "SOURCES.txt", "requires.txt", "dependency_links.txt"}
_DATA = {"test", "tests", "testing", "data", "lib2to3"}  # where .txt is data more often than words


def _installed_kind(path: Path) -> str | None:
    if path.suffix == ".py":
        return "code"
    if path.suffix not in ("", ".txt", ".md", ".rst"):
        return None
    if _LICENCE.match(path.name) or "licenses" in path.parts[:-1]:
        return "licences"
    is_words = path.suffix and path.name not in _LISTS and _DATA.isdisjoint(path.parts)
    return "documentation" if is_words or path.name == "METADATA" else None


def _open_path(path: Path, part: TextPart) -> Source:
    if path.is_dir():
        patterns = part.files or ["**/*"]
        found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
        if part.files is None:
            found = [file for file in found if file.suffix.lower() in TEXTS or kind_of(file.name) != "text"]
        if not found:
            wanted = " or ".join(part.files) if part.files else "text, JSON, CSV or parquet"
            raise InputError(
                f"{path} has no file that is {wanted}; give another folder, or patterns as files."
            )
    elif part.files is not None:
        raise ConfigError(f"files chooses among the files of a folder, and {path} is a file; leave it out.")
    else:
        found = [path]
    kinds: set[Kind] = {"jsonl" if (kind := kind_of(file.name)) == "json" else kind for file in found}
    if len(kinds) > 1:
        suffixes = ", ".join(sorted({file.suffix for file in found}))
        raise InputError(
            f'{path} holds files of different kinds ({suffixes}); choose with files, such as ["**/*.jsonl"].'
        )
    for file in found:
        suffix = file.suffix.lower()
        if suffix in PACKED and (kinds == {"text"} or suffix != ".gz"):
            raise InputError(
                f"{file} is compressed, and training reads of that only tables in .gz; unpack it."
            )
    if kinds == {"text"}:
        return TextFiles(found)
    return Table(_load_table(kinds.pop(), found), part)


def _load_table(table: Kind, paths: list[Path]) -> "datasets.Dataset":
    import datasets
    from datasets.exceptions import DatasetGenerationError

    kind, options = _LOADERS[table]
    filled = [str(path) for path in paths if path.stat().st_size]
    if not filled:
        raise InputError(f"{paths[0]} is empty; give a file with at least one document.")
    try:
        with _quiet():
            return datasets.load_dataset(kind, data_files=filled, split="train", **options)  # pyright: ignore[reportReturnType]
    except (DatasetGenerationError, ValueError, StopIteration, OSError) as error:
        if kind == "json":
            _find_broken_line(paths)
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"{paths[0]} cannot be read as {kind} ({reason}); correct it.") from error


def _find_broken_line(paths: Iterable[Path]) -> None:
    """Raise an InputError about the first line that is no JSON object."""
    for path in paths:
        if path.suffix.lower() in PACKED:
            continue
        lines = kind_of(path.name) == "jsonl"
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file if lines else [file.read()], 1):
                try:
                    fine = not text.strip() or isinstance(json.loads(text), dict if lines else object)
                except (ValueError, RecursionError):
                    fine = False
                if not fine:
                    where = f"Line {number} of {path} is" if lines else f"{path} is"
                    raise InputError(f"{where} not a JSON object; correct it or leave it out.")


def _open_hub(part: TextPart) -> Source:
    first = part.documents if part.streaming else None
    return Table(load_hub(part.source, part.name, part.split, first), part)


def load_hub(
    source: str, subset: str | None = None, split: str = "train", first: int | None = None
) -> "datasets.Dataset":
    """A data set of the Hub.

    Args:
        source: its id, or a name of `HUB_SETS`.
        subset: its configuration.
        split: split of it.
        first: fetch only so many rows, and keep those on disk.

    Raises:
        InputError: there is no such thing.
    """
    import datasets
    from datasets.fingerprint import Hasher

    name, usual = HUB_SETS.get(source, (source, None))
    subset = subset or usual
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or Path(name).suffix in TABLES | TEXTS:
        raise InputError(f"There is no file or folder {source}; check the path.")
    try:
        with _quiet():
            if first is None:
                return datasets.load_dataset(name, subset, split=split)  # pyright: ignore[reportReturnType]
            # The generator runs only where its rows are not yet in the cache.
            wanted = {"name": name, "subset": subset, "split": split, "count": first}
            return datasets.Dataset.from_generator(  # pyright: ignore[reportReturnType]
                _first_rows, gen_kwargs=wanted, fingerprint=Hasher.hash(wanted)
            )
    except Exception as error:  # what datasets raises is of many kinds
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")[:300]
        raise InputError(
            f"{source} is neither a file or folder nor a data set that the Hub gives "
            f"({reason or type(error).__name__}); check the name and the connection, or give a local copy."
        ) from error


def _first_rows(name: str, subset: str | None, split: str, count: int) -> Iterator[dict[str, Any]]:
    import datasets

    logger.info("Fetching the first %d documents of %s.", count, name)
    yield from datasets.load_dataset(name, subset, split=split, streaming=True).take(count)  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and logged errors of `datasets`: what went wrong is said in a sentence."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


class Table:
    """Rows of a `datasets.Dataset`, the fields taken that a part names, or that are known.

    Raises:
        InputError: there is no such field.
    """

    def __init__(self, rows: "datasets.Dataset", part: TextPart) -> None:
        names = rows.column_names
        given = (part.user, part.assistant) if part.user else (part.text or part.messages,)
        if given != (None,):
            found = given
        else:
            found = next((fields for fields in KNOWN_FIELDS if set(fields) <= set(names)), ())
        missing = [name for name in found if name not in names]
        if missing or not found:
            what = f"no field {missing[0]!r}" if missing else "none of the fields that are known"
            raise InputError(
                f"{part.source} has {what}; it has {listed(names)}: name one as text or messages, or two "
                "as user and assistant."
            )
        self.source, self.fields = part.source, [str(name) for name in found]
        self.rows = rows.select_columns(self.fields)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        row = self.rows[index]
        values = [row[name] for name in self.fields]
        if len(values) == 2 and all(isinstance(value, str) for value in values):
            return chat_of(*values)
        value = values[0]
        if value is None:
            return ""
        if len(values) == 1 and isinstance(value, str):
            return value
        if len(values) == 1 and isinstance(value, list) and all(map(is_message, value)):
            if value:
                check_chat(value, f"Document {index} of {self.source}")
            return value
        raise InputError(
            f"The field {self.fields[0]} of document {index} of {self.source} is neither text nor a list of "
            "messages with role and content; name another field."
        )


def chat_of(user: str, assistant: str) -> list[dict[str, str]]:
    """A chat of one message and its reply."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
