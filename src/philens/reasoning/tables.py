"""Grading and ranking as tables for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from philens.reasoning.rules import PREFIX
from philens.show.colours import plain_label
from philens.show.estimates import number_text
from philens.show.terminal import new_table
from philens.support.columns import Column, column_name
from philens.support.output import visible
from philens.tasks.chat import content_text

if TYPE_CHECKING:
    import pandas as pd

    from philens.scoring.texts import Text as Prompt

# More rows would fill the screen.
LISTED = 40
# What is shown of a prompt or an answer.
_CHARACTERS = 200


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
    headings = ("solutions of", "solutions", "agreed", "marked right", "graded right", "without answer")
    table = new_table("The grader against the marks", "", *headings, whole=(True, False))
    for origin, counts in report["origins"].items():
        table.add_row(
            escape(origin),
            f"{counts['solutions']:,}",
            f"{counts['rate']:.2%}",
            *(f"{counts[name]:,}" for name in ("marked_right", "graded_right", "without_answer")),
        )
    yield table
    if report["without_problem"]:
        yield f"{report['without_problem']:,} solutions belong to none of the problems and were left out."
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


def ranking_table(ranked: "pd.DataFrame", prompt: "Prompt", rule: str) -> Table:
    """The candidates of one prompt, the best first, with the means of their metrics.

    Args:
        ranked: rows of one prompt from `philens.rank`.
        prompt: the prompt; of a chat the last message is shown.
        rule: what they are ranked by.
    """
    shown = prompt if isinstance(prompt, str) else content_text(prompt[-1]) or ""
    shown = shown if len(shown) <= _CHARACTERS else "…" + shown[-_CHARACTERS:]
    name = ranked["prompt"].iloc[0]
    caption, kinds = f"By {rule}; the metrics are means per token.", ("mean", PREFIX)
    early = column_name("tokens", statistic=PREFIX)
    if early in ranked:
        caption += f" Kept by their first {ranked[early].max()} tokens; others were not read any further."
    table = new_table(visible(f"Prompt {name}: {shown}"), caption)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    columns = [Column(str(name), kinds) for name in ranked if name != early]
    means = [name for name in columns if name.statistic]
    if "kept" in ranked:
        table.add_column("kept", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in means:
        heading = plain_label(column_name(name.metric, name.point))
        first = "first\n" if name.statistic == PREFIX else ""
        table.add_column(f"{first}{heading}", justify="right", no_wrap=True)
    # The only column that wraps, so that the numbers keep their room.
    table.add_column("candidate")
    for row in ranked.to_dict("records"):
        values = ["" if isnan(row[name]) else number_text(row[name], 3) for name in means]
        answer = row["text"] if len(row["text"]) <= _CHARACTERS else row["text"][:_CHARACTERS] + "…"
        text = Text(f"{row['candidate']}: {visible(answer)}")
        score = "" if isnan(row["score"]) else f"{row['score']:z.4g}"
        kept = ["yes" if row["kept"] else "no"] if "kept" in row else []
        table.add_row(
            str(row["rank"]), score, *kept, str(row["tokens"]), *values, text,
            style="bold" if row["rank"] == 1 else "",
        )  # fmt: skip
    return table
