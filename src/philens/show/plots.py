"""What matplotlib figures share: their style, labels, and series over steps.

Figures are 8 inches wide at 150 dpi and are drawn on Agg without pyplot, so nothing global is touched and no
display is needed. Colours are Okabe and Ito's for tasks (with a marker each) and viridis for ordered bins.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike, NDArray

from philens.show.estimates import Estimate, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASK_STYLES = {  # colour (Okabe-Ito; grey for random), marker
    "memorized_sequences": ("#0072B2", "s"),
    "memorized_programs": ("#56B4E9", "D"),
    "new_vocabulary": ("#009E73", "^"),
    "in_context_language": ("#D55E00", "o"),
    "random": ("#5F5F5F", "X"),
    "copy": ("#CC79A7", "v"),
}
PHI_LABEL = "PHi loss (nats per token)"
MTD_LABEL = "multiple-token divergence (nats)"
SURPRISAL_LABEL = "surprisal (nats per token)"
FONT = 9

Floats = NDArray[np.float64]


def new_figure(height: float) -> Figure:
    """An empty figure in the style of all of them, `height` inches high."""
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def set_fonts(figure: Figure) -> None:
    """The fonts and spines of a figure whose axes are made."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT)
        axes.xaxis.label.set_fontsize(FONT)
        axes.yaxis.label.set_fontsize(FONT)


def error_of(estimate: Estimate | None) -> Floats:
    """Distances (2, 1) from the number to its interval's ends, NaN where there is no interval."""
    value, low, high = np.array(numbers(estimate), dtype=float)  # None becomes NaN
    # A percentile interval need not contain the estimate; matplotlib takes no negative distances.
    return np.maximum([[value - low], [high - value]], 0.0)


def draw_estimates(axes: "Axes", places: ArrayLike, found: Sequence[Estimate | None], **style: Any) -> None:
    """Numbers at their places, with intervals."""
    values = np.array([numbers(one)[0] for one in found], dtype=float)
    errors = np.concatenate([error_of(one) for one in found], axis=1)
    axes.errorbar(places, values, yerr=errors, **style)


def draw_bars(
    axes: "Axes", found: Mapping[str, Estimate | None], colours: Sequence[Any], **style: Any
) -> None:
    """Bars with intervals, each beside its name, from the top down."""
    for row, (one, colour) in enumerate(zip(found.values(), colours, strict=True)):
        if (value := numbers(one)[0]) is not None:
            axes.barh(row, value, xerr=error_of(one), color=colour, **{"height": 0.6, "capsize": 3} | style)
    name_rows(axes, list(found))


def draw_dots(axes: "Axes", found: Mapping[str, Estimate | None], **style: Any) -> None:
    """Dots with intervals, each beside its name, from the top down."""
    for row, one in enumerate(found.values()):
        if (value := numbers(one)[0]) is not None:
            axes.errorbar(value, row, xerr=error_of(one), **{"fmt": "o", "capsize": 3} | style)
    name_rows(axes, list(found))
    grid_of_x(axes)


def name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Names of rows, the first at the top; whatever they hold is shown as it is."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)


def grid_of_x(axes: "Axes") -> None:
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, handles: Sequence[Any], texts: Sequence[Any], columns: int) -> None:
    style: dict[str, Any] = {"fontsize": FONT - 1, "frameon": False}
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, **style)


def series_style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a series: a task's own, else by its place among all."""
    if name in TASK_STYLES:
        colour, marker = TASK_STYLES[name]
    else:
        # Grey stays for what is random.
        styles = [style for task, style in TASK_STYLES.items() if task != "random"]
        colour, marker = styles[names.index(name) % len(styles)]
    return {"color": colour, "marker": marker}


def draw_series(axes: "Axes", history: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    """A line of `key` over the steps of the records that have it."""
    records = [(record["step"], record[key]) for record in history if record.get(key) is not None]
    if records:
        steps, values = zip(*records, strict=True)
        axes.plot(steps, values, linewidth=1.3, **style)


def log_if_wide(axes: "Axes") -> None:
    """phi falls from thousands of nats to a few while a fresh layer learns: show that on a log scale."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [[1.0]])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
