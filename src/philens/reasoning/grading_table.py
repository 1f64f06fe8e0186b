"""What the grader does where the truth is known, for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from philens.findings.tables import new_table

# More would fill the screen.
LISTED = 40


def reference_tables(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """Of `philens.reasoning.grading.reference_report`: the rates, and what was graded wrongly."""
    yield (
        f"{report['right']:,} of {report['solved']:,} own solutions graded as right ({report['rate']:.3%}); "
        f"{len(report['accepted']):,} of {report['wrong']:,} solutions of other problems too."
    )
    if report["exceptions"]:
        columns = ("id", "reference", "answer", "ending")
        yield _listed("own solutions graded as wrong", columns, report["exceptions"])
    if report["accepted"]:
        columns = ("id", "reference", "answer", "other")
        yield _listed("solutions of other problems graded as right", columns, report["accepted"])


def marks_tables(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """Of `philens.reasoning.grading.marks_report`: agreement with the marks, and every disagreement."""
    table = new_table("The grader against the marks", "")
    table.add_column("solutions of", no_wrap=True)
    for heading in ("solutions", "agreed", "marked right", "graded right", "without answer"):
        table.add_column(heading, justify="right")
    for origin, counts in report["origins"].items():
        table.add_row(
            escape(origin),
            f"{counts['solutions']:,}",
            f"{counts['rate']:.2%}",
            *(f"{counts[name]:,}" for name in ("marked_right", "graded_right", "without_answer")),
        )
    yield table
    if report["without_problem"]:
        yield f"{report['without_problem']:,} solutions are of none of the problems and were left out."
    if report["disagreements"]:
        columns = ("origin", "id", "reference", "answer", "marked", "graded", "ending")
        yield _listed("graded otherwise than marked", columns, report["disagreements"])


def _listed(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    more = f", the first {LISTED}" if len(rows) > LISTED else ""
    table = Table(*columns, title=f"{len(rows):,} {title}{more}", show_lines=True)
    for row in rows[:LISTED]:
        table.add_row(*(_cell(row[name]) for name in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "right" if value else "wrong"
    return escape(" ".join(str(value).split())[-120:])
