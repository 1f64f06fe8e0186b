"""Rules for choosing among answers, written as `highest_COLUMN` or `lowest_COLUMN`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from philens.scoring.scores import OF_GROUPS
from philens.support.columns import Column, column_name
from philens.support.errors import ConfigError, InputError
from philens.support.typed import nearest

if TYPE_CHECKING:
    import pandas as pd

# How a metric of the tokens becomes a number of the answer; the first is meant where none is named.
AGGREGATES = ("mean", "sum", "max", "last_fifth")
PREFIX = "prefix"  # the mean over an answer's first tokens, where a number of them was given
STATISTICS = (*AGGREGATES, PREFIX, *OF_GROUPS)  # those of groups where the metric has them
ALIASES = {"shortest": "lowest_tokens"}
_SIGNS: dict[str, Literal[1, -1]] = {"highest": 1, "lowest": -1}


@dataclass(frozen=True)
class Rule:
    """The better of two answers is the one with the higher `sign` times `column`.

    Attributes:
        name: the rule as it was written.
        column: column of the tables that `philens.reasoning.solutions` makes.
        sign: 1 where the highest value is the best, -1 where the lowest is.
    """

    name: str
    column: str
    sign: Literal[1, -1]

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """The rule that a text writes.

        Args:
            text: `highest_COLUMN` or `lowest_COLUMN`; a metric alone means its mean over the answer's tokens,
                so that `highest_phi` is `highest_phi_mean`. `shortest` is `lowest_tokens`.

        Raises:
            ConfigError: it is no rule.
        """
        direction, _, column = ALIASES.get(text, text).partition("_")
        if direction not in _SIGNS or not column:
            raise ConfigError(
                f"There is no rule {text!r}; write highest_COLUMN or lowest_COLUMN, such as highest_phi or "
                f"lowest_surprisal, or {' or '.join(ALIASES)}."
            )
        read = Column(column, STATISTICS)
        if read.statistic is None and _is_metric(read.metric):
            column = column_name(column, statistic=AGGREGATES[0])
        return cls(text, column, _SIGNS[direction])

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric of the tokens that the column is made from, as `philens.score` takes it; or none."""
        metric = Column(self.column, STATISTICS).metric
        return (metric,) if _is_metric(metric) else ()

    @property
    def of_prefix(self) -> "Rule":
        """The rule that looks at the same metric of an answer's first tokens alone."""
        read = Column(self.column, STATISTICS)
        return Rule(self.name, column_name(read.metric, read.point, PREFIX), self.sign)

    def scores(self, table: "pd.DataFrame") -> NDArray[np.float64]:
        """(N,) the sign times the column of a table of N answers: the higher the better.

        Raises:
            InputError: the table has no such column.
        """
        if self.column not in table:
            valid = [_short(name) for name in table.select_dtypes("number")]
            direction = "highest" if self.sign > 0 else "lowest"
            close = f"{direction}_{nearest(_short(self.column), valid)}" if valid else ""
            meant = f"; did you mean {close} (there are {', '.join(valid)})?" if valid else "."
            raise InputError(f"The rule {self.name} needs a column {self.column} and there is none{meant}")
        return self.sign * table[self.column].to_numpy(np.float64)


def check_prefix(prefix: int) -> int:
    """Raise a ConfigError unless this is a number of first tokens."""
    if prefix < 1:
        raise ConfigError(f"prefix must be at least 1 token, not {prefix}.")
    return prefix


def best_half(scores: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) which are among the better half of their group (N,), rounded up; of equal ones the earlier."""
    order = np.lexsort((-scores, groups))
    sizes = np.bincount(groups)
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - (np.cumsum(sizes) - sizes)[groups[order]]
    return place < ((sizes + 1) // 2)[groups]


def _is_metric(name: str) -> bool:
    from philens.lens.metrics import METRICS

    return name in METRICS


def _short(column: str) -> str:
    """A column's name as a rule writes it."""
    read = Column(column, AGGREGATES[:1])
    return column_name(read.metric, read.point)
