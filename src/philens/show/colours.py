"""Values as colours, the same in pages and terminals.

Both palettes change lightness steadily, so they can be told without seeing hue, and every colour carries text
of at least 4.5:1 contrast.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from philens.support.columns import Column

LEVELS = 24
# Lightness from that of the page to its opposite. Dark is viridis without its darkest purple.
LIGHT = ("#fffbea", "#d6eec4", "#8fd3b6", "#41b0c3", "#2580b8", "#254f9d", "#0d1c5c")
DARK = ("#2b1a4a", "#3e4a89", "#2c728e", "#21918c", "#3fbc73", "#a2da37", "#fde725")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """A colour scale from `low` to `high`; values beyond have the end colours."""

    low: float
    high: float

    @classmethod
    def of(cls, arrays: Iterable[ArrayLike]) -> "Scale":
        """One scale for all arrays: from 0 (or the lowest value, if negative) to the 99th percentile.

        Each array's first value does not count: predicted from nothing, it is often far above all others.
        """
        floats = [np.asarray(array, dtype=np.float64)[1:] for array in arrays]
        present = np.concatenate([array[np.isfinite(array)] for array in floats] or [np.zeros(0)])
        if not len(present):
            return cls(0.0, 1.0)
        low = min(0.0, float(present.min()))
        high = float(np.quantile(present, 0.99))
        return cls(low, high if high > low else low + 1.0)

    def levels(self, values: ArrayLike) -> list[int | None]:
        """Each value's colour, 0 to LEVELS - 1; None where there is no value."""
        floats = np.asarray(values, dtype=np.float64)
        share = np.nan_to_num((floats - self.low) / (self.high - self.low), posinf=1.0, neginf=0.0)
        numbers = np.clip((share * LEVELS).astype(np.int64), 0, LEVELS - 1)
        return [None if none else int(number) for number, none in zip(numbers, np.isnan(floats), strict=True)]


def palette(anchors: Sequence[str]) -> list[tuple[str, str]]:
    """Background and text colour of each level, the background interpolated between the anchors."""
    corners = np.array([list(bytes.fromhex(anchor[1:])) for anchor in anchors], dtype=float)
    places = np.linspace(0, len(anchors) - 1, LEVELS)
    mixed = np.stack([np.interp(places, np.arange(len(anchors)), channel) for channel in corners.T], axis=1)
    return [
        # Where black and white contrast alike lies a luminance of 0.179.
        (f"#{bytes(colour.tolist()).hex()}", "#000000" if luminance(colour) > 0.179 else "#ffffff")
        for colour in mixed.round().astype(int)
    ]


def luminance(colour: NDArray[np.int64]) -> float:
    """Relative luminance of an sRGB colour (3,), as WCAG defines it."""
    share = colour / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def plain_label(column: str) -> str:
    """A column's name in words: `surprisal_with_layer` becomes `surprisal with layer`."""
    read = Column(column)
    return read.metric.replace("_", " ") + ("" if read.point is None else f" at {read.point}")
