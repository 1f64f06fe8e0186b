"""Texts by level, from trivial to interesting: read from a folder, or built from one's own texts."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from philens.errors import InputError
from philens.hub import reason
from philens.tasks.sources import TEXTS

logger = logging.getLogger(__name__)

# What the paper's levels are called, in its order; other names are free and come after them.
ROLES = {
    "trivial": ("trivial", "predictable"),
    "memorised": ("memorised", "memorized", "licences", "licenses"),
    "shuffled": ("shuffled",),
    "code": ("code",),
    "prose": ("prose", "literature"),
    "own": ("own",),
}
BORING, INTERESTING = ("trivial", "memorised", "shuffled"), ("code", "prose", "own")
_FIELDS = {"level", "text", "assistant", "user"}
_RECORDS = (".json", ".jsonl", ".ndjson")
# Built trivial texts are as long as half of the others, within these characters.
_TRIVIAL_LENGTH = (500, 4000)


@dataclass(frozen=True)
class LevelText:
    """A text of some level.

    Attributes:
        level: its level's name.
        name: the file in the folder, with the line in JSON Lines; of a built text what it is.
        text: what is measured.
        user: what a user asked to get this text, if there was one.
        built: whether philens made it.
    """

    level: str
    name: str
    text: str
    user: str | None = None
    built: bool = False


def role(level: str) -> str | None:
    """Which of the paper's levels this name stands for, one of ROLES; None for other names."""
    return next((name for name, aliases in ROLES.items() if level.casefold() in aliases), None)


def in_order(levels: Iterable[str]) -> list[str]:
    """Level names, each once, in the paper's order; others after them by name."""
    places = {name: place for place, name in enumerate(ROLES)}
    return sorted(set(levels), key=lambda level: (places.get(role(level) or "", len(places)), level))


def load_levels(
    folder: str | os.PathLike[str], documents: int | None = None, seed: int = 0
) -> list[LevelText]:
    """The texts in a folder, with trivial and shuffled ones built where it has none, in order of levels.

    Args:
        folder: as for `read_levels`.
        documents: texts of each level at most, drawn at random; None means all.
        seed: of what is built and drawn.

    Raises:
        InputError: a folder without texts, or with nothing that they could be compared with.
    """
    texts = with_built(read_levels(folder), seed)
    chosen = []
    for number, level in enumerate(in_order(text.level for text in texts)):
        found = [text for text in texts if text.level == level]
        if documents is not None and documents < len(found):
            random = np.random.default_rng([seed, 2, number])
            found = [found[i] for i in sorted(random.choice(len(found), documents, replace=False))]
        chosen += found
    return chosen


def read_levels(folder: str | os.PathLike[str]) -> list[LevelText]:
    """The texts in a folder and the folders in it, in order of their names.

    `.json` files hold a record, `.jsonl` files one on each line: `text` or `assistant`, and, if wanted,
    `level` and `user` (what an assistant was asked). Text files, and those without a suffix, are a text each.
    The level of a text is its record's, else the name of the folder it is in (the first one below `folder`),
    else `own`. Other files, hidden ones and empty texts are left out.

    Raises:
        InputError: there is no such folder, there is no text in it, or something in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; give a folder with texts of several levels.")
    texts, empty = [], 0
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if any(part.startswith(".") for part in place.parts) or not path.is_file():
            continue
        level = place.parts[0] if len(place.parts) > 1 else "own"
        for text in _read_file(path, place.as_posix(), level):
            if text.text.strip():
                texts.append(text)
            else:
                empty += 1
    if not texts:
        raise InputError(f"{folder} holds no text; put JSON records, or text files by level, into it.")
    if empty:
        logger.info("Left out %d empty texts of %s.", empty, folder)
    return texts


def _read_file(path: Path, name: str, level: str) -> Iterator[LevelText]:
    suffix = path.suffix.lower()
    if suffix not in (*_RECORDS, *TEXTS, ""):
        return
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8 (byte {error.start}); convert or remove it."
        ) from error
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; make it readable or remove it.") from error
    if suffix == ".json":
        yield _text_of(content, str(path), name, level)
    elif suffix in _RECORDS:
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _text_of(line, f"{path} line {number}", f"{name}:{number}", level)
    else:
        yield LevelText(level, name, content)


def _text_of(content: str, where: str, name: str, level: str) -> LevelText:
    """The text in a JSON record; InputErrors begin with `where`."""
    try:
        record: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({reason(error)}); correct or remove it.") from error
    if not isinstance(record, dict):
        raise InputError(f'{where} is no record: it must look like {{"level": "code", "text": "..."}}.')
    unknown = sorted(record.keys() - _FIELDS)
    if unknown:
        raise InputError(
            f"{where} has an unknown field {unknown[0]!r}; records have level, user, and text or assistant."
        )
    if ("text" in record) == ("assistant" in record):
        problem = "both" if "text" in record else "neither"
        raise InputError(f"{where} has {problem} of the fields text and assistant; give one of them.")
    wrong = [key for key in sorted(record) if not isinstance(record[key], str) and record[key] is not None]
    key = "text" if "text" in record else "assistant"
    if wrong or record[key] is None or record.get("level", level) in (None, ""):
        raise InputError(f"{where}: {(wrong or [key if record[key] is None else 'level'])[0]} must be text.")
    return LevelText(record.get("level", level), name, record[key], record.get("user"))


def with_built(texts: Sequence[LevelText], seed: int = 0) -> list[LevelText]:
    """`texts`, and trivial and shuffled ones made here if there are none.

    Raises:
        InputError: there is one level and nothing to build another from.
    """
    roles = {role(text.level) for text in texts}
    added = []
    if "shuffled" not in roles:
        added += build_shuffled([text for text in texts if role(text.level) != "trivial"], seed)
    if "trivial" not in roles:
        added += build_trivial(texts, seed)
    levels = {text.level for text in [*texts, *added]}
    if len(levels) < 2:
        raise InputError(f"There is one level, {min(levels)}; give texts of another to compare it with.")
    return [*texts, *added]


def build_shuffled(texts: Sequence[LevelText], seed: int = 0) -> list[LevelText]:
    """The words of all texts in random order, dealt out into as many texts of as many words each.

    They have a user's message if all of `texts` have one.
    """
    lengths = [len(text.text.split()) for text in texts]
    words = [word for text in texts for word in text.text.split()]
    order = np.random.default_rng([seed, 0]).permutation(len(words))
    user = "Write random text without structure" if _are_replies(texts) else None
    built, start = [], 0
    for text, length in zip(texts, lengths, strict=True):
        shuffled = " ".join(words[i] for i in order[start : start + length])
        built.append(LevelText("shuffled", f"shuffled, as long as {text.name}", shuffled, user, built=True))
        start += length
    return built


def build_trivial(texts: Sequence[LevelText], seed: int = 0) -> list[LevelText]:
    """Eight texts that go on and on: counting, times tables, the alphabet, repetitions.

    They are as long as the median of `texts`, between 500 and 4,000 characters, and end at a line's end. They
    have a user's message if all of `texts` have one.
    """
    length = int(np.clip(np.median([len(text.text) for text in texts]), *_TRIVIAL_LENGTH))
    random = np.random.default_rng([seed, 1])
    first, step, factor, shift, day, number, word = (
        int(random.integers(low, high))
        for low, high in ((1, 50), (2, 10), (3, 20), (0, 26), (0, 365), (1, 64), (0, 8))
    )
    letters = "".join(chr(97 + (i + shift) % 26) for i in range(26))
    named = ("apple", "house", "river", "stone", "green", "table", "water", "light")[word]
    start = date(2024, 1, 1) + timedelta(days=day)
    lines: dict[str, tuple[str, Iterator[str]]] = {
        "counting": (f"Count from {first} on", (str(i) for i in count(first))),
        "steps": (f"Count from {first} on in steps of {step}", (str(i) for i in count(first, step))),
        "times table": (
            f"Write the times table of {factor}",
            (f"{i} x {factor} = {i * factor}" for i in count(1)),
        ),
        "binary": (f"Write the numbers from {number} on in binary", (f"{i} - {i:b}" for i in count(number))),
        "alphabet": ("Write the alphabet again and again", (" ".join(letters) for _ in count())),
        "dates": (
            f"List the dates from {start} on with their days of the week",
            (
                f"{one:%Y-%m-%d} {_DAYS[one.weekday()]}"
                for one in (start + timedelta(days=i) for i in count())
            ),
        ),
        "repeated word": (f"Write {named} again and again", (" ".join([named] * 12) for _ in count())),
        "repeated sentence": (
            "Write the same sentence again and again",
            (f"This is the same {named} as on the line before." for _ in count()),
        ),
    }
    are_replies = _are_replies(texts)
    return [
        LevelText("trivial", name, _first_lines(found, length), prompt if are_replies else None, built=True)
        for name, (prompt, found) in lines.items()
    ]


# Not by strftime, whose names follow the user's language.
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _first_lines(lines: Iterable[str], length: int) -> str:
    """As many of endless lines as make `length` characters."""
    taken, done = [], 0
    for line in lines:
        taken.append(line)
        done += len(line) + 1
        if done > length:
            break
    return "\n".join(taken)


def _are_replies(texts: Iterable[LevelText]) -> bool:
    return all(text.user is not None for text in texts)


def without_users(texts: Iterable[LevelText]) -> list[LevelText]:
    """The texts alone."""
    return [replace(text, user=None) for text in texts]
