"""Values from files and command lines checked against type annotations, with errors in plain words."""

import json
import re
import types
from collections import abc
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from philens.support.errors import ConfigError

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
    Any: "what JSON can hold",
}
_MAPPINGS = (dict, abc.Mapping)


def describe(kind: Any) -> str:
    """What a value of this type is, in plain words: `int | None` is "a whole number or null"."""
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in (types.UnionType, Union):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in _MAPPINGS:
        return f"keys with a value each, {describe(arguments[1])}"
    if origin is list:
        return f"a list, each item {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    return _WORDS[kind]


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as a value of the type annotation `kind`.

    Raises:
        ConfigError: it is none, in one sentence that begins with `name`.
    """
    try:
        return _convert(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be {describe(kind)}, not {shown(value)}.") from None


def numbers(text: str) -> list[int]:
    """Whole numbers named as `4,8,12` or, like a range of Python, as `4:28:4`; none for anything else."""
    if re.fullmatch(r"\d+:\d+(:[1-9]\d*)?", text):
        return list(range(*map(int, text.split(":"))))
    return [int(number) for number in text.split(",")] if re.fullmatch(r"-?\d+(,-?\d+)*", text) else []


def words(text: str | None) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def pairs(texts: Iterable[str], name: str) -> dict[str, Any]:
    """Texts such as `a=false` as keys and values, which are read as YAML; what JSON does not have is text.

    Raises:
        ConfigError: one has no key or no value; the sentence begins with `name`.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"{name} must be KEY=VALUE, not {shown(text)}.")
        try:
            found[key] = yaml.safe_load(value)
            json.dumps(found[key], allow_nan=False)
        except (yaml.YAMLError, TypeError, ValueError):
            found[key] = value
    return found


def plain(value: Any) -> Any:
    """A value of a table or an array in Python's own types: arrays and columns are lists, at any depth."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for name in ("as_py", "to_pylist", "tolist", "to_list"):  # of Arrow, numpy, pandas, torch and polars
        if callable(convert := getattr(value, name, None)):
            return plain(convert())
    return value


def is_missing(value: Any) -> bool:
    """Whether this is what a table has where it has no value: None, NaN, or NA of pandas."""
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)


def shown(value: Any) -> str:
    """A value as a part of a sentence: one line, and not long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = f"a number of {value.bit_length():,} bits"
    return text if len(text) <= 100 else f"{text[:100]}..."


def listed(names: Iterable[Any], most: int = 30) -> str:
    """Names as a part of a sentence: not many of them, and none long."""
    texts = [name if len(name) <= 80 else f"{name[:80]}..." for name in map(str, names)]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _convert(value: Any, kind: Any) -> Any:
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in (types.UnionType, Union):
        for option in arguments:
            try:
                return _convert(value, option)
            except (TypeError, ValueError, OverflowError):
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin in _MAPPINGS:
        if isinstance(value, Mapping):
            # JSON has only text as keys.
            key = int if arguments[0] is int else lambda name: _convert(name, arguments[0])
            return {key(name): _convert(item, arguments[1]) for name, item in value.items()}
    elif origin is list:
        # On a command line, one thing is a list of one.
        items = value if isinstance(value, list | tuple) else [value]
        return [_convert(item, arguments[0]) for item in items]
    elif origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(arguments):
            return tuple(_convert(item, arguments[0]) for item in value)
    elif kind is float:
        # YAML reads 1e-3, without a point, as text.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    elif kind is Any:
        json.dumps(value, allow_nan=False)
        return value
    elif kind is Path:
        return Path(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise TypeError


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that was most likely meant: spelled alike, or with the same last part elsewhere."""

    def likeness(candidate: str) -> float:
        same_end = name.rsplit(".", 1)[-1] == candidate.rsplit(".", 1)[-1]
        return SequenceMatcher(None, name, candidate).ratio() + 0.3 * same_end

    return max(valid, key=likeness)
