"""Token scores in a terminal: texts with coloured tokens, as they come, or plain rows of values."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TextIO

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from philens.show.colours import DARK, LEVELS, Scale, palette, plain_label
from philens.show.page import MAX_PARTS
from philens.show.scored import ScoredText
from philens.support.output import visible, visible_spaces

# The scale is that of as many tokens as a screen or two can hold.
SCALE_TOKENS = 10_000
# Background and text are both set, so that a terminal's own colours, light or dark, do not matter.
STYLES = [Style(bgcolor=ground, color=text) for ground, text in palette(DARK)]


def has_colour(console: Console) -> bool:
    """Whether the console shows colours: a terminal that can, without NO_COLOR."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def print_coloured(console: Console, scored: Iterable[tuple[str, ScoredText]]) -> None:
    """Print texts, each under its name, every token coloured by the first column.

    The scale is made from the first SCALE_TOKENS tokens and then stays, so that texts can be compared.
    """
    scored = iter(scored)
    head: list[tuple[str, ScoredText]] = []
    while sum(len(item) for _, item in head) < SCALE_TOKENS and (found := next(scored, None)):
        head.append(found)
    if not head:
        return
    column = next(iter(head[0][1].columns))
    scale = Scale.of([item.columns[column] for _, item in head])
    for name, item in chain(head, scored):
        console.print(Text(visible(name), style="bold"), Text(summary(item), style="italic"))
        for part in parts(item):
            console.print(Text(part, style="italic"))
        line = Text()
        for piece, level in zip(item.pieces(), scale.levels(item.columns[column]), strict=True):
            line.append_text(coloured(piece, level))
        console.print(line, soft_wrap=True)
        console.print()
    console.print(legend(column, scale, head[0][1].units[column]))


def coloured(piece: str, level: int | None) -> Text:
    """A token in its colour; without a value underlined. Line breaks are kept, after a sign for them."""
    shown = visible(piece) or "∅"
    style = Style(underline=True, dim=True) if level is None else STYLES[level]
    text = Text()
    for number, line in enumerate(shown.split("⏎")):
        if number:
            text.append("⏎", style)
            text.append("\n")
        text.append(line, style)
    return text


def legend(column: str, scale: Scale, unit: str) -> Text:
    """The colours and what they mean."""
    text = Text(f"{plain_label(column)} {scale.low:.3g} ")
    for level in range(0, LEVELS, 2):
        text.append(" ", STYLES[level])
    return text.append(f" {scale.high:.3g} {unit} and more")


def summary(scores: ScoredText) -> str:
    """Number of tokens and mean of each column in a line."""
    means = (f"{plain_label(name)} {_number(mean)}" for name, mean in scores.means().items())
    sinks = int(scores.sinks.sum())
    left_out = [f"{sinks} attention sink{'s' * (sinks > 1)} left out of phi"] if sinks else []
    return ", ".join([f"{len(scores):,} tokens", *means, *left_out])


def parts(scores: ScoredText) -> list[str]:
    """The same of each span, in a line each."""
    lines = []
    for part in scores.span_means()[:MAX_PARTS]:
        means = (f"{plain_label(name)} {_number(mean)}" for name, mean in part.means.items())
        lines.append(", ".join([f"  {visible(part.name)}: {part.tokens:,} tokens", *means]))
    more = len(scores.spans) - MAX_PARTS
    return [*lines, f"  and {more:,} more"] if more > 0 else lines


def _number(value: float) -> str:
    return "none" if np.isnan(value) else f"{value:.3f}"


def print_rows(file: TextIO, scored: Iterable[tuple[str, ScoredText]]) -> None:
    """Print texts as plain rows, a token each: its number, its text, and its value in every column."""
    for name, item in scored:
        file.write(f"{visible(name)}: {summary(item)}\n")
        file.writelines(f"{part}\n" for part in parts(item))
        file.writelines(_rows(item))
        file.write("\n")


def _rows(scores: ScoredText) -> Iterator[str]:
    beside = [""] * len(scores)
    if scores.alternatives is not None:
        beside = [f"  {rank:>6}  {likeliest}".rstrip() for rank, likeliest in scores.alternatives.lines()]
    yield _heads(scores.columns, "" if scores.alternatives is None else "    rank  likeliest")
    widths = [_width(name) for name in scores.columns]
    values = zip(*scores.columns.values(), strict=True)
    for number, (piece, row, more) in enumerate(zip(scores.pieces(), values, beside, strict=True)):
        yield _row(number, piece, row, widths, more)


def _width(column: str) -> int:
    return max(len(plain_label(column)), 9)


def _heads(columns: Iterable[str], more: str = "") -> str:
    cells = (f"{plain_label(name):>{_width(name)}}" for name in columns)
    return f"{'':>7}  {'token':16}  {'  '.join(cells)}{more}\n"


def _row(number: int, piece: str, values: Iterable[float], widths: Iterable[int], more: str = "") -> str:
    shown = visible_spaces(piece)
    cells = (f"{_number(value):>{width}}" for value, width in zip(values, widths, strict=True))
    return f"{number:>7}  {shown}{' ' * (16 - cell_len(shown))}  {'  '.join(cells)}{more}\n"


class LiveTokens:
    """Tokens printed one by one, as they come: in colours where there are any, else in rows.

    The colour scale follows the tokens so far.

    Args:
        console: where to.
        column: what the first of the two values of a token is called; it gives the colour.
    """

    def __init__(self, console: Console, column: str = "phi") -> None:
        self.console, self.column = console, column
        self.colour = has_colour(console)
        self.seen: list[float] = []

    def write(self, piece: str, value: float, surprisal: float) -> None:
        """Print a token with its value and surprisal in nats."""
        self.seen.append(value)
        if self.colour:
            level = Scale.of([self.seen]).levels([value])[0]
            self.console.print(coloured(piece, level), end="", soft_wrap=True)
        else:
            if len(self.seen) == 1:
                self.console.file.write(_heads([self.column, "surprisal"]))
            self.console.file.write(_row(len(self.seen) - 1, piece, (value, surprisal), (9, 9)))
        self.console.file.flush()

    def close(self) -> None:
        """End the text; in colours, with what they meant at last."""
        if self.colour:
            self.console.print()
            self.console.print(legend(self.column, Scale.of([self.seen]), "nats"))
