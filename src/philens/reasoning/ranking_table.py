"""Ranked answers as a table for a terminal."""

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from philens.findings.tables import new_table, number_text
from philens.show.colours import plain_label
from philens.support.output import visible
from philens.tasks.chat import content_text

if TYPE_CHECKING:
    import pandas as pd

    from philens.scoring.texts import Text as Prompt

# What is shown of a prompt or an answer.
_CHARACTERS = 200


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
    table = new_table(visible(f"Prompt {name}: {shown}"), f"By {rule}; the metrics are means per token.")
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    means = [column for column in ranked if str(column).endswith("_mean")]
    for heading in ("tokens", *(plain_label(str(name).removesuffix("_mean")) for name in means)):
        table.add_column(heading, justify="right", no_wrap=True)
    # The only column that wraps, so that the numbers keep their room.
    table.add_column("candidate")
    for row in ranked.to_dict("records"):
        values = [number_text(row[name], 3) for name in means]
        answer = row["text"] if len(row["text"]) <= _CHARACTERS else row["text"][:_CHARACTERS] + "…"
        text = Text(f"{row['candidate']}: {visible(answer)}")
        table.add_row(
            str(row["rank"]), f"{row['score']:z.4g}", str(row["tokens"]), *values, text,
            style="bold" if row["rank"] == 1 else "",
        )  # fmt: skip
    return table
