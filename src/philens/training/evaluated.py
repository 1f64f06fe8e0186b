"""Rows of evaluation, and their form in a run's records: `eval/PART/METRIC@POINT`."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from philens.support.columns import Column, column_name


class Evaluated(NamedTuple):
    """A mean over held-out documents.

    Attributes:
        step: step of the training.
        part: part of the text, or the formal language; None where it is over all of them.
        metric: what was measured.
        point: the insertion point, where there are several.
        value: nats per token; of `sinks` a share.
    """

    step: int
    part: str | None
    metric: str
    point: str | None
    value: float

    @property
    def column(self) -> str:
        """The metric with its point."""
        return column_name(self.metric, self.point)

    @property
    def key(self) -> str:
        """What it is called in a record."""
        return key_of(self.part, self.column)


def key_of(part: str | None, column: str) -> str:
    """What a column of a part is called in a record."""
    return f"eval/{column}" if part is None else f"eval/{part}/{column}"


def record_of(rows: Iterable[Evaluated]) -> dict[str, float]:
    """Rows of one step as a record."""
    return {row.key: row.value for row in rows}


def rows_of(record: Mapping[str, Any]) -> list[Evaluated]:
    """The rows in a record; none in one of a training step."""
    rows = []
    for key, value in record.items():
        start, *parts = key.split("/", 1)
        if start == "eval" and parts:
            part, slash, name = parts[0].rpartition("/")
            column = Column(name)
            rows.append(
                Evaluated(record.get("step", 0), part if slash else None, column.metric, column.point, value)
            )
    return rows
