"""Estimates as results have them, a number with its interval: `{"mean": 1.2, "ci95": [1.0, 1.4]}`."""

from collections.abc import Iterable, Mapping
from typing import Any

# What the number of an estimate may be called.
NUMBERS = ("value", "mean", "ratio", "accuracy", "share")

Estimate = Mapping[str, Any]
Numbers = tuple[float | None, float | None, float | None]


def numbers(estimate: Estimate | None) -> Numbers:
    """The number and both ends of its interval; None thrice where there is no estimate."""
    if estimate is None:
        return None, None, None
    low, high = estimate["ci95"] if "ci95" in estimate else estimate["interval"]
    return next(estimate[name] for name in NUMBERS if name in estimate), low, high


def flat(name: str, estimate: Estimate | None, ends: str | None = None) -> dict[str, Any]:
    """An estimate as columns of a CSV file: `NAME`, and `NAME_low` and `NAME_high`, or these after `ends`."""
    ends = f"{name}_" if ends is None else ends
    return dict(zip((name, f"{ends}low", f"{ends}high"), numbers(estimate), strict=True))


def flat_all(found: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, Any]:
    """The columns of several estimates by name, by default of all that there are."""
    if names is None:
        names = [name for name, one in found.items() if isinstance(one, Mapping)]
    return {column: number for name in names for column, number in flat(name, found.get(name)).items()}


def estimate_text(estimate: Estimate | None, digits: int = 2, scale: float = 1) -> str:
    """A number with its interval, where it has one; `none` where there is none."""
    value, low, high = (None if number is None else scale * number for number in numbers(estimate))
    between = "" if low is None or high is None else f" [{low:z.{digits}f}, {high:z.{digits}f}]"
    return number_text(value, digits) + between


def number_text(value: float | None, digits: int) -> str:
    """A number, `none` where there is none."""
    return "none" if value is None else f"{value:z.{digits}f}"
