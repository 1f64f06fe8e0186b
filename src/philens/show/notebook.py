"""What is seen in a notebook: markup for light and dark ground alike, with no script or style sheet.

Notebooks are shown by programs that keep different parts of it: some drop style sheets, others every style.
So colours are in the elements themselves and let through what is below them; where they are dropped, texts,
tables and what is read on hover remain.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from philens.show.colours import LEVELS, Scale
from philens.show.page import (
    PageDocument,
    beginnings,
    chosen_metrics,
    clean,
    hovers,
    label,
    mean_heads,
    mean_rows,
    shown_piece,
)

if TYPE_CHECKING:
    from rich.table import Table

# Of a cell; to_html writes pages of more.
MOST_TOKENS, MOST_TEXTS = 2_000, 20
# Black and white text can both be read on every shade of it, on white and on black ground.
_COLOUR, _STRONGEST = "255,120,0", 0.48
_LONG = 24
_CELL = "padding:.15em 1em .15em 0;text-align:"


def texts_markup(documents: Sequence[PageDocument]) -> str:
    """Texts coloured by their first metrics, one scale for all, values on hover; and a table of means."""
    shown = beginnings(documents, MOST_TEXTS, MOST_TOKENS)
    metrics = chosen_metrics(documents, None)
    values = [{name: np.asarray(array, np.float64) for name, array in one.columns.items()} for one in shown]
    scales = {name: Scale.of([columns[name] for columns in values]) for name in metrics}
    told = documents[: len(shown)]
    parts = [table_markup(mean_heads(told), mean_rows(told))]
    for one, columns in zip(shown, values, strict=True):
        titles, pieces = hovers(one, columns), [shown_piece(piece) for piece in one.pieces]
        for name, scale in scales.items():
            levels = scale.levels(columns[name])
            spans = "".join(map(_span, pieces, levels, titles))
            said = f"<b>{clean(one.name)}</b>, {label(name, one.units[name])}: {_legend(scale)}"
            parts.append(f"<div>{said}</div>{_PRE}{spans}</pre>")
    if sum(len(one.pieces) for one in shown) < sum(len(one.pieces) for one in documents):
        parts.append("<div><i>There is more; to_html() writes it as a page.</i></div>")
    return f"<div>{''.join(parts)}</div>"


def table_markup(
    heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", caption: str = ""
) -> str:
    """A table of plain texts: the first column to the left, the others to the right unless they are long."""
    rows = [[*row] for row in rows]
    sides = [
        "left" if place == 0 or any(len(row[place]) > _LONG for row in rows) else "right"
        for place in range(len(heads))
    ]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(cells, sides, strict=True)
        return "".join(f'<{tag} style="{_CELL}{side}">{clean(cell)}</{tag}>' for cell, side in pairs)

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    above = f"<div><b>{clean(title)}</b></div>" if title else ""
    below = "".join(f"<div><small>{clean(text)}</small></div>" for text in caption.splitlines())
    return f"{above}<table><thead><tr>{line('th', heads)}</tr></thead><tbody>{body}</tbody></table>{below}"


def terminal_markup(tables: "Iterable[Table]") -> str:
    """Tables of a terminal."""
    return "".join(
        table_markup(
            [str(column.header) for column in table.columns],
            zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True),
            str(table.title or ""),
            str(table.caption or ""),
        )
        for table in tables
    )


_PRE = '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0 .8em">'


def _span(piece: str, level: int | None, title: str) -> str:
    style = "text-decoration:underline dotted" if level is None else _shade(level)
    return f'<span style="{style}" title="{title}">{piece}</span>'


def _shade(level: int) -> str:
    return f"background-color:rgba({_COLOUR},{_STRONGEST * level / (LEVELS - 1):.2f})"


def _legend(scale: Scale) -> str:
    cells = "".join(f'<span style="{_shade(level)}">&nbsp;</span>' for level in range(0, LEVELS, 2))
    return f"{scale.low:.3g} {cells} {scale.high:.3g} and more"
