"""What pages and terminals need of a scored text, wherever it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Others(Protocol):
    """What else could have stood in each of T tokens' places; `philens.scoring.alternatives` has it."""

    def notes(self) -> list[str]:
        """(T,) in words, of several lines; empty where there is nothing to say."""
        ...

    def lines(self) -> list[tuple[str, str]]:
        """(T,) the token's rank, and the likeliest ones in a line."""
        ...


class PartMeans(Protocol):
    """A named part of a text, how many tokens it has, and the mean of each column over them."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def means(self) -> Mapping[str, float]: ...


class ScoredText(Protocol):
    """A text of T tokens with values; `philens.TokenScores` is one and says more of each field."""

    def __len__(self) -> int: ...

    def pieces(self) -> list[str]:
        """The text of each token."""
        ...

    def means(self) -> dict[str, float]:
        """The mean of each column."""
        ...

    @property
    def name(self) -> str | None:
        """What it is called."""
        ...

    @property
    def columns(self) -> Mapping[str, NDArray[np.float32]]:
        """(T,) each, NaN where there is no value."""
        ...

    @property
    def units(self) -> Mapping[str, str]:
        """The unit of each column, empty where it is a plain number."""
        ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(T, 2) the characters of each token."""
        ...

    @property
    def spans(self) -> Sequence[tuple[str, int, int]]:
        """Named parts of the text: name, start and end in characters."""
        ...

    def span_means(self) -> Sequence[PartMeans]:
        """The means of each of the spans."""
        ...

    @property
    def sinks(self) -> NDArray[np.bool_]:
        """(T,) the tokens that are left out of the means of phi."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the values were made with."""
        ...

    @property
    def alternatives(self) -> Others | None:
        """What else could have stood in each token's place, if it is known."""
        ...
