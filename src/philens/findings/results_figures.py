"""Where a result is worked out, as matplotlib figures; and a text with its tokens coloured."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from philens.findings.results_tables import PREDICTOR_LABELS, ROLE_LABELS, label
from philens.scoring.scores import TokenScores, unit
from philens.show.colours import LEVELS, LIGHT, Scale, palette, plain_label
from philens.show.estimates import numbers
from philens.show.plots import FONT, error_of, grid_of_x, legend_below, name_rows, new_figure, set_fonts
from philens.support.output import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROLES = {  # colour (Okabe-Ito), marker
    "worked": ("#D55E00", "o"),
    "other": ("#5F5F5F", "s"),
    "variant": ("#E69F00", "D"),
    "problem": ("#0072B2", "^"),
    "written": ("#009E73", "v"),
}


def figure_results(layer: Mapping[str, Any], places: Mapping[str, Sequence[float]]) -> Figure:
    """Phi of each kind of place, the same of an untrained layer, surprisal of the next token, and
    classifiers.

    Args:
        layer: results of one layer, of `measure_results`.
        places: phi of every place, by kind.
    """
    kinds = layer["kinds"]
    figure = new_figure(height=1.9 + 0.27 * len(kinds))
    panels = figure.subplots(1, 4, width_ratios=(4, 2.4, 2.4, 3))
    rows = _rows(kinds)
    for axes, name, title in zip(
        panels,
        ("phi", "phi_untrained", "surprisal_next"),
        ("phi", "untrained layer", "surprisal, next token"),
        strict=False,
    ):
        for kind, row in rows.items():
            colour, marker = _ROLES[kinds[kind]["role"]]
            if name == "phi":
                values = np.asarray(places[kind])
                spread = row + np.linspace(-0.25, 0.25, len(values))
                axes.plot(values, spread, "o", color=colour, markersize=1.8, alpha=0.35, markeredgewidth=0)
            estimate = kinds[kind][name]
            style = {"fmt": marker, "color": colour, "markersize": 4.5, "elinewidth": 1.4, "capsize": 2.5}
            axes.errorbar(estimate["mean"], row, xerr=error_of(estimate), **style)
        axes.set_ylim(max(rows.values()) + 0.7, -0.7)
        axes.set_yticks(list(rows.values()), [label(kind) for kind in rows] if name == "phi" else [])
        axes.set_xlim(0, None)
        axes.set(xlabel="nats")
        axes.set_title(title, fontsize=FONT, loc="left")
        grid_of_x(axes)
    _classifiers(panels[3], layer["classifiers"])
    set_fonts(figure)
    for axes in panels:
        axes.tick_params(labelsize=FONT - 1.5)
    handles = [
        figure.axes[0].plot([], [], _ROLES[role][1], color=_ROLES[role][0], label=ROLE_LABELS[role])[0]
        for role in dict.fromkeys(kind["role"] for kind in kinds.values())
    ]
    legend_below(figure, handles, [handle.get_label() for handle in handles], 3)
    return figure


def _rows(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Where each kind stands, with a gap between roles."""
    rows, place, last = {}, 0.0, None
    for kind, found in kinds.items():
        place += 0.6 if last not in (None, found["role"]) else 0.0
        rows[kind], last = place, found["role"]
        place += 1
    return rows


def _classifiers(axes: "Axes", classifiers: Mapping[str, Mapping[str, Any]]) -> None:
    """AUROC of each classifier on held-out sentences, and on solutions where there are some."""
    style: dict[str, Any] = {"markersize": 4.5, "elinewidth": 1.4, "capsize": 2.5}
    for where, offset, colours in (
        ("sentences", -0.15, {"color": "#D55E00"}),
        ("problems", 0.15, {"color": "#0072B2", "markerfacecolor": "white"}),
    ):
        for number, found in enumerate(classifiers.values()):
            if (value := numbers(found.get(where))[0]) is not None:
                place = number + offset
                axes.errorbar(value, place, xerr=error_of(found[where]), fmt="o", **colours, **style)
    axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    name_rows(axes, [PREDICTOR_LABELS[name] for name in classifiers])
    axes.set(xlabel="AUROC")
    both = any("problems" in found for found in classifiers.values())
    axes.set_title("worked out or not" + ("\n(open: solutions)" if both else ""), fontsize=FONT, loc="left")


def figure_tokens(scores: TokenScores, metrics: Sequence[str] | None = None, width: int = 84) -> Figure:
    """A text once for each metric, its tokens on a ground of that metric's colour.

    Args:
        scores: scores of the text; made for a few lines.
        metrics: columns of the scores; None means phi and surprisal.
        width: characters in a line.

    Raises:
        InputError: the scores lack a metric.
    """
    metrics = scores._chosen(metrics)
    pieces = [visible(piece) for piece in scores.pieces()]
    lines = _lines(pieces, width)
    figure = new_figure(height=len(metrics) * (0.62 + 0.25 * len(lines)))
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    colours = palette(LIGHT)
    for axes, name in zip(panels, metrics, strict=True):
        values = scores.columns[name]
        scale = Scale.of([values])
        levels = scale.levels(values)
        axes.set(xlim=(0, width), ylim=(len(lines), 0))
        axes.set_axis_off()
        for row, line in enumerate(lines):
            for token, start, piece in line:
                level = levels[token]
                ground, ink = ("white", "#777777") if level is None else colours[level]
                axes.add_patch(Rectangle((start, row + 0.06), len(piece), 0.88, color=ground, linewidth=0))
                for place, character in enumerate(piece):
                    axes.text(
                        *(start + place + 0.5, row + 0.52, character),
                        color=ink,
                        fontsize=FONT,
                        family="monospace",
                        ha="center",
                        va="center",
                        parse_math=False,
                    )
        units = f" ({unit(name)})" if unit(name) else ""
        axes.set_title(f"{plain_label(name)}{units}", fontsize=FONT + 1, loc="left")
        _key(axes, scale, colours)
    return figure


def _lines(pieces: Sequence[str], width: int) -> list[list[tuple[int, int, str]]]:
    """Lines of (token, first column, text), broken before a token that begins with a space."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for token, piece in enumerate(pieces):
        following = next((k for k in range(token + 1, len(pieces)) if pieces[k].startswith(" ")), len(pieces))
        word = sum(len(part) for part in pieces[token:following])
        if column and (column + len(piece) > width or (piece.startswith(" ") and column + word > width)):
            lines.append([])
            column = 0
        lines[-1].append((token, column, piece))
        column += len(piece)
    return lines


def _key(axes: "Axes", scale: Scale, colours: Sequence[tuple[str, str]]) -> None:
    """The colours, from low to high, above the text at the right."""
    key = axes.inset_axes((0.72, 1.04, 0.2, 0.12), transform=axes.transAxes)
    key.set_axis_off()
    key.set(xlim=(0, LEVELS), ylim=(0, 1))
    for number, (ground, _) in enumerate(colours):
        key.add_patch(Rectangle((number, 0), 1, 1, color=ground, linewidth=0))
    key.text(-0.6, 0.5, f"{scale.low:.3g}", fontsize=FONT - 1, ha="right", va="center")
    key.text(LEVELS + 0.6, 0.5, f"{scale.high:.3g}", fontsize=FONT - 1, ha="left", va="center")
