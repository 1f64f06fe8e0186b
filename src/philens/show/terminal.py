"""Tables for a terminal: their style, and numbers as they stand in them."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from philens.show.estimates import Estimate, estimate_text


def new_table(
    title: str, caption: str, *headings: str | Text, whole: tuple[bool, bool] = (False, True)
) -> Table:
    """An empty table in the style of all of them: the first column to the left, the others to the right.

    Args:
        whole: whether lines are never broken in the first column, and in the others.
    """
    # Text, not str: rich would read square brackets as markup.
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=whole[number > 0])
    return table


def counts_text(numbers: list[int], unit: str) -> str:
    """From the smallest to the largest of some numbers, with their unit."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}"


def count_of(number: int, unit: str) -> str:
    """A number with its unit, in the plural where it is not one."""
    return f"{number:,} {unit}{'s' * (number != 1)}"


def cell(estimate: Estimate | None, digits: int = 2, scale: float = 1, between: str = "\n") -> Text:
    """An estimate, its interval on a line of its own, so that a table fits 80 characters; or nothing."""
    text = "" if estimate is None else estimate_text(estimate, digits, scale)
    return Text(text.replace(" [", f"{between}["))
