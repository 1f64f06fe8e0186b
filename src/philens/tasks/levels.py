"""Texts by level, from trivial to interesting: read from a folder, or built from one's own texts."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from itertools import count, cycle, repeat
from pathlib import Path
from typing import Any

import numpy as np

from philens.bases.hub import reason
from philens.support.errors import InputError
from philens.tasks.licences import find_licences
from philens.tasks.sources import SHIPPED_TEXTS, TEXTS

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
# Licences taken at most, and how many works of a level are enough to say something about it.
LICENCES, LEAST = 24, 20
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
    folder: str | os.PathLike[str] | None = None, documents: int | None = None, seed: int = 0
) -> list[LevelText]:
    """Texts of several levels, with trivial and shuffled ones built where there are none, in order of levels.

    Args:
        folder: as for `read_levels`; None takes the texts that come with philens and on this machine, of all
            of the paper's levels (`own_levels`).
        documents: texts of each level at most, drawn at random; None means all.
        seed: seed of what is built and drawn.

    Raises:
        InputError: a folder without texts, or with nothing that they could be compared with.
    """
    texts = own_levels(seed) if folder is None else with_built(read_levels(folder), seed)
    chosen = []
    for number, level in enumerate(in_order(text.level for text in texts)):
        found = [text for text in texts if text.level == level]
        if documents is not None and documents < len(found):
            random = np.random.default_rng([seed, 2, number])
            found = [found[i] for i in sorted(random.choice(len(found), documents, replace=False))]
        chosen += found
    return chosen


def own_levels(seed: int = 0) -> list[LevelText]:
    """Texts of the paper's five levels, without a folder and without a network; all have a user's message.

    Prose and code were written for philens in November 2026 and come with it, 20 each: no model made before
    can have read them. Licences are those on this machine, at most `LICENCES`, each work once; trivial texts
    are built, and shuffled ones from the words of prose and code.
    """
    prompts = json.loads((SHIPPED_TEXTS / "prompts.json").read_text(encoding="utf-8"))
    written = [
        LevelText(
            (path := Path(name)).parts[0],
            path.stem if Path(path.stem).suffix else path.stem.replace("_", " "),
            (SHIPPED_TEXTS / path).read_text(encoding="utf-8").rstrip("\n"),
            prompt,
        )
        for name, prompt in prompts.items()
    ]
    licences = [
        LevelText("memorised", name, text, f"Write the text of this licence: {name}")
        for name, text in find_licences(SHIPPED_TEXTS / "LICENSE", LICENCES)
    ]
    if len(licences) < LEAST:
        many = "licence" if len(licences) == 1 else "licences"
        logger.info("Found %d different %s on this machine, fewer than %d.", len(licences), many, LEAST)
    # Of every second one: half of them as long as prose, half as code.
    shuffled = build_shuffled(written, seed)[::2]
    return [*build_trivial(written, seed), *licences, *shuffled, *written]


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
        raise InputError(f"{folder} has no text; put JSON records, or text files by level, into it.")
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
    """Two dozen texts that go on and on: countings, tables, alphabets, dates, repetitions, patterns.

    They are as long as the median of `texts`, between 500 and 4,000 characters, and end at a line's end. They
    have a user's message if all of `texts` have one.
    """
    length = int(np.clip(np.median([len(text.text) for text in texts]), *_TRIVIAL_LENGTH))
    are_replies = _are_replies(texts)
    return [
        LevelText("trivial", name, _first_lines(found, length), prompt if are_replies else None, built=True)
        for name, prompt, found in _endless(np.random.default_rng([seed, 1]))
    ]


def _endless(random: np.random.Generator) -> Iterator[tuple[str, str, Iterator[str]]]:
    """Name, what a user asks for, and lines without end, of each kind of trivial text."""

    def draw(low: int, high: int) -> int:
        return int(random.integers(low, high))

    first, step, factor, other = draw(1, 50), draw(2, 10), draw(3, 20), draw(3, 10)
    yield "counting", f"Count from {first} on", map(str, count(first))
    yield "steps", f"Count from {first} on in steps of {step}", map(str, count(first, step))
    high = draw(5000, 9999)
    yield "counting down", f"Count down from {high}", map(str, count(high, -1))
    yield (
        "times table",
        f"Write the times table of {factor}",
        (f"{i} x {factor} = {i * factor}" for i in count(1)),
    )
    yield (
        "grid of products",
        "Write a table of products",
        (" ".join(str(i * j) for j in range(1, 11)) for i in count(other)),
    )
    yield "sums", f"Add {other} to every number", (f"{i} + {other} = {i + other}" for i in count(first))
    number = draw(1, 64)
    yield "binary", f"Write the numbers from {number} on in binary", (f"{i} - {i:b}" for i in count(number))
    yield (
        "hexadecimal",
        f"Write the numbers from {number} on in hexadecimal",
        (f"{i} - {i:x}" for i in count(number)),
    )
    yield "ordinals", f"Write the ordinals from {first} on", (f"{i}{_ending(i)}" for i in count(first))
    yield "squares of a board", "List the squares of a chessboard, again and again", cycle(_BOARD)

    shift = draw(0, 26)
    letters = "".join(chr(97 + (i + shift) % 26) for i in range(26))
    yield "alphabet", "Write the alphabet again and again", repeat(" ".join(letters))
    yield "alphabet backwards", "Write the alphabet backwards", repeat(" ".join(letters[::-1]))
    triples = [f"{letter}{letter.upper()}{letter}" for letter in letters]
    yield "letters in threes", "Write each letter three times", cycle(triples)

    start = date(2024, 1, 1) + timedelta(days=draw(0, 365))
    days = (start + timedelta(days=i) for i in count())
    yield (
        "dates",
        f"List the dates from {start} on with their days of the week",
        (f"{day:%Y-%m-%d} {_DAYS[day.weekday()]}" for day in days),
    )
    yield "days of the week", "List the days of the week, again and again", cycle(_DAYS)
    year = draw(1900, 2020)
    yield (
        "months",
        f"List the months from {year} on",
        (f"{month} {i}" for i in count(year) for month in _MONTHS),
    )
    minutes = draw(5, 30)
    yield (
        "times of the day",
        f"List times of the day, every {minutes} minutes",
        (f"{i // 60 % 24:02}:{i % 60:02}" for i in count(0, minutes)),
    )

    named, colour = _WORDS[draw(0, len(_WORDS))], _COLOURS[draw(0, len(_COLOURS))]
    yield "repeated word", f"Write {named} again and again", repeat(" ".join([named] * 12))
    yield (
        "repeated sentence",
        "Write the same sentence again and again",
        repeat(f"This is the same {named} as on the line before."),
    )
    yield (
        "song",
        "Write a song that counts down",
        (f"{i} {colour} birds sat on a wall; one flew away and {i - 1} were left." for i in count(900, -1)),
    )
    yield "words in turn", "Write the same words in turn", cycle(_WORDS)
    yield (
        "rows of a table",
        "Write a table in which nothing happens",
        (f"{i},{colour},{named},0.00,ok" for i in count(number)),
    )
    yield "file names", "List file names", (f"{named}_{i:04}.txt" for i in count(first))
    yield "triangles", "Draw triangles of stars", cycle("*" * width for width in range(1, 9))


def _ending(number: int) -> str:
    if number // 10 % 10 == 1:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


_WORDS = ("apple", "house", "river", "stone", "garden", "table", "water", "light")
_COLOURS = ("red", "green", "blue", "yellow", "black", "white")
_BOARD = [f"{column}{row}" for row in range(1, 9) for column in "abcdefgh"]
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August"),
    *("September", "October", "November", "December"),
)
# Not by strftime, whose names follow the user's language.
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _first_lines(lines: Iterable[str], length: int) -> str:
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
