"""The names of columns, written and read in one place."""

from collections.abc import Iterable


def column_name(metric: str, point: str | None = None, statistic: str | None = None) -> str:
    """A column's name: `phi`, `phi_mean`, `phi@model.layers.8` or `phi@model.layers.8_mean`.

    Args:
        metric: what is measured.
        point: the insertion point, where there are several.
        statistic: what is taken over many tokens.
    """
    at = "" if point is None else f"@{point}"
    return f"{metric}{at}" if statistic is None else f"{metric}{at}_{statistic}"


class Column(str):
    """What `column_name` wrote, read again.

    Attributes:
        metric: what is measured.
        point: the insertion point; None where there is but one, or the metric is of none.
        statistic: what is taken over many tokens; None of a token's own value.

    Args:
        name: name of the column.
        statistics: that a name may end with; a token's own values have none.
    """

    metric: str
    point: str | None
    statistic: str | None

    def __new__(cls, name: str, statistics: Iterable[str] = ()) -> "Column":
        self = super().__new__(cls, name)
        self.statistic = next((one for one in statistics if name.endswith(f"_{one}")), None)
        whole = name if self.statistic is None else name[: -len(self.statistic) - 1]
        self.metric, at, point = whole.partition("@")
        self.point = point if at else None
        return self

    def of(self, metric: str) -> str:
        """The name of the same column of another metric."""
        return column_name(metric, self.point, self.statistic)
