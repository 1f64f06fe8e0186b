"""What pages and terminals need of a scored text, wherever it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Others(Protocol):
    """What else could have stood in each of T tokens' places; `philens.scoring.alternatives` has it."""

    def notes(self) -> list[str]: ...

    def lines(self) -> list[tuple[str, str]]: ...


class PartMeans(Protocol):
    """A named part of a text, how many tokens it has, and the mean of each column over them."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def means(self) -> Mapping[str, float]: ...


class ScoredText(Protocol):
    """A text of T tokens with values; `philens.TokenScores` is one and says what each field is."""

    def __len__(self) -> int: ...

    def pieces(self) -> list[str]: ...

    def means(self) -> dict[str, float]: ...

    def span_means(self) -> Sequence[PartMeans]: ...

    @property
    def name(self) -> str | None: ...

    @property
    def columns(self) -> Mapping[str, NDArray[np.float32]]: ...

    @property
    def units(self) -> Mapping[str, str]: ...

    @property
    def offsets(self) -> NDArray[np.int64]: ...

    @property
    def spans(self) -> Sequence[tuple[str, int, int]]: ...

    @property
    def sinks(self) -> NDArray[np.bool_]: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    @property
    def alternatives(self) -> Others | None: ...
