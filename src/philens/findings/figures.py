"""Findings as matplotlib figures: functions from results to a Figure; `write_finding` saves it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from philens.findings.complexity import PARTS
from philens.findings.tasks import INTERESTING
from philens.show.estimates import numbers
from philens.show.plots import (
    FONT,
    PHI_LABEL,
    SURPRISAL_LABEL,
    TASK_STYLES,
    draw_bars,
    draw_estimates,
    draw_series,
    error_of,
    grid_of_x,
    legend_below,
    log_if_wide,
    name_rows,
    new_figure,
    series_style,
    set_fonts,
)
from philens.show.terminal import count_of
from philens.tasks.automata import task_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OTHER_STYLE = ("#000000", "o")
_LEVEL_STYLES = {  # as above; warm colours are what should be interesting
    "trivial": ("#5F5F5F", "X"),
    "memorised": ("#0072B2", "s"),
    "shuffled": ("#CC79A7", "D"),
    "code": ("#E69F00", "^"),
    "prose": ("#D55E00", "o"),
    "own": ("#D55E00", "o"),
}
# Where a point's label may go: distance in points, then the side (right, left, above, below, corners).
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_PLACES = [(distance, *side) for distance in (8, 12, 17, 23, 30, 40, 52, 66) for side in _SIDES]


def figure_tasks(results: Mapping[str, Any]) -> Figure:
    """phi against surprisal, one point per task with both 95 % intervals, and beside it phi as bars."""
    tasks = results["tasks"]
    figure = new_figure(height=3.9)
    scatter, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(tasks)
    points = [(tasks[name]["surprisal"]["mean"], tasks[name]["phi"]["mean"]) for name in names]
    for name, point in zip(names, points, strict=True):
        colour, marker = TASK_STYLES.get(name, _OTHER_STYLE)
        scatter.errorbar(
            *point,
            xerr=error_of(tasks[name]["surprisal"]),
            yerr=error_of(tasks[name]["phi"]),
            **{"fmt": marker, "color": colour, "markersize": 6, "elinewidth": 1.5},
        )
    scatter.set(xlabel=SURPRISAL_LABEL, ylabel=PHI_LABEL)
    scatter.margins(0.15)
    scatter.set_ylim(0, 1.12 * max([scatter.dataLim.y1, 1e-3]))

    labels = [task_label(name).replace(" ", "\n", 1) for name in names]
    means = {text: tasks[name]["phi"] for text, name in zip(labels, names, strict=True)}
    styles = (TASK_STYLES.get(name, _OTHER_STYLE) for name in names)
    colours = [
        (one[0], 1.0 if name == INTERESTING else 0.75) for one, name in zip(styles, names, strict=True)
    ]
    draw_bars(bars, means, colours, height=0.7)
    bars.set(xlabel=PHI_LABEL)
    for label, name in zip(bars.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == INTERESTING else "normal")
    scatter.set_title("phi against surprisal, 95 % intervals", fontsize=FONT + 1, loc="left")
    bars.set_title("phi", fontsize=FONT + 1, loc="left")
    set_fonts(figure)
    _label_points(figure, scatter, points, [task_label(name) for name in names])
    return figure


def figure_complexity(results: Mapping[str, Any]) -> Figure:
    """Mean phi against surprisal for each bin of description length, and the correlations beside it."""
    figure = new_figure(height=4.2)
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    spans = [curve["description_length"] for curve in results["curves"]]
    points = [
        [(one["surprisal"]["mean"], one["phi"]) for one in curve["points"]] for curve in results["curves"]
    ]
    labels = [f"{span['low']:.0f} to {span['high']:.0f}" for span in spans]
    _draw_curves(curves, labels, points, "description length (nats)")
    curves.set(xlabel=SURPRISAL_LABEL, ylabel=PHI_LABEL)
    curves.set_title("in-context language, tokens", fontsize=FONT + 1, loc="left")

    kinds = (
        ("spearman", "phi (Spearman)", "#56B4E9"),
        ("partial_given_surprisal", "phi given surprisal", "#D55E00"),
        ("partial_given_surprisal_and_square", "phi given surprisal, surprisal²", "#E69F00"),
        ("spearman_of_surprisal", "surprisal (Spearman)", "#999999"),
    )
    groups = [(level, part) for level in ("token_wise", "document_means") for part in PARTS]
    height = 0.8 / len(kinds)
    for number, (name, label, colour) in enumerate(kinds):
        places = -np.arange(len(groups)) - (number - (len(kinds) - 1) / 2) * height
        found = [results[level][part][name] for level, part in groups]
        known = [(place, one) for place, one in zip(places, found, strict=True) if one["value"] is not None]
        errors = np.concatenate([np.zeros((2, 0)), *(error_of(one) for _, one in known)], axis=1)
        style = {"height": height, "color": colour, "label": label, "error_kw": {"elinewidth": 0.8}}
        bars.barh([place for place, _ in known], [one["value"] for _, one in known], xerr=errors, **style)
    headings = {"token_wise": "tokens", "document_means": "document\nmeans"}
    labels = [
        headings[level] + "\nwhole" if part == "whole" else part.replace("_", " ") for level, part in groups
    ]
    bars.set_yticks(-np.arange(len(groups)), labels)
    bars.axvline(0, color="black", linewidth=0.8)
    bars.axhline(-len(PARTS) + 0.5, color="#BBBBBB", linewidth=0.8)
    bars.set(xlabel="correlation with description length")
    bars.set_title("95 % intervals over documents", fontsize=FONT + 1, loc="left")
    bars.legend(fontsize=FONT - 1, loc="upper right", bbox_to_anchor=(1, -0.18), frameon=False)
    set_fonts(figure)
    return figure


def figure_gain(results: Mapping[str, Any]) -> Figure:
    """Mean phi against an ideal learner's gain, a curve for each bin of surprisal, and the correlations."""
    figure = new_figure(height=4.2)
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    bins: dict[tuple[float, float], list[tuple[float, Mapping[str, Any]]]] = {}
    for cell in results["cells"]:
        span = cell["surprisal_low"], cell["surprisal_high"]
        bins.setdefault(span, []).append((cell["gain"], cell["phi"]))
    labels = [f"{low:.2f} to {high:.2f}" for low, high in bins]
    _draw_curves(curves, labels, list(bins.values()), "surprisal (nats)")
    # Most letters tell nearly nothing: linear near zero, then logarithmic.
    curves.set_xscale("symlog", linthresh=0.01)
    curves.set_xlim(left=0)
    curves.set(xlabel="information gain of an ideal learner (nats)", ylabel=PHI_LABEL)
    curves.set_title("in-context language, letters", fontsize=FONT + 1, loc="left")
    kinds = {
        "spearman_of_surprisal": "surprisal",
        "spearman": "phi",
        "given_surprisal": "phi given surprisal",
        "given_surprisal_and_position": "... and position",
        "given_learners_surprisal": "... and learner's surprisal",
        "given_neighbours": "... and neighbours' gains",
    }
    correlations = {label: results["correlations"][name] for name, label in kinds.items()}
    draw_bars(bars, correlations, ["#999999", *["#D55E00"] * (len(kinds) - 1)])
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set(xlabel="rank correlation with information gain")
    bars.set_title("95 % intervals over documents", fontsize=FONT + 1, loc="left")
    set_fonts(figure)
    return figure


def figure_texts(results: Mapping[str, Any]) -> Figure:
    """phi and surprisal of each level of text: means with 95 % intervals, and a dot for every text."""
    levels, texts = results["levels"], results["texts"]
    figure = new_figure(height=1.1 + 0.62 * len(levels))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, quantity, label in ((panels[0], "phi", PHI_LABEL), (panels[1], "surprisal", SURPRISAL_LABEL)):
        for row, (name, level) in enumerate(levels.items()):
            colour, marker = _LEVEL_STYLES.get(level["role"], _OTHER_STYLE)
            values = [text[quantity] for text in texts if text["level"] == name]
            values = [value for value in values if value is not None]
            # Below each other, so that equal ones are seen.
            rows = row + np.linspace(0.1, 0.42, len(values) + 2)[1:-1]
            axes.plot(values, rows, "o", color=colour, markersize=3.5, alpha=0.5, markeredgewidth=0)
            if level[quantity] is not None:
                style = {"fmt": marker, "color": colour, "markersize": 6, "elinewidth": 1.6, "capsize": 6}
                style |= {"xerr": error_of(level[quantity])}
                axes.errorbar(level[quantity]["mean"], row - 0.1, **style)
        axes.set(xlabel=label)
        axes.margins(x=0.06)
        axes.set_xlim(0, max(axes.get_xlim()[1], 1e-3))
        axes.set_title(quantity, fontsize=FONT + 1, loc="left")
        grid_of_x(axes)
    labels = [
        f"{name}{', built' * level['built']}\n{count_of(level['texts'], 'text')}"
        for name, level in levels.items()
    ]
    name_rows(panels[0], labels)
    panels[1].set_title("95 % intervals over texts; dots: texts", fontsize=FONT - 1, loc="right")
    set_fonts(figure)
    return figure


def figure_levels_by_surprisal(results: Mapping[str, Any]) -> Figure:
    """Phi of each level at equal surprisal, and of memorised text where it is recited and where it is not."""
    figure = new_figure(height=3.9)
    bins, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    labels: list[str] = []
    for number, (name, level) in enumerate(results["levels"].items()):
        colour, marker = _LEVEL_STYLES.get(level["role"], _OTHER_STYLE)
        found = level["by_surprisal"]
        labels = [
            f"{one['from']:g} to {one['below']:g}"
            if one["below"] is not None
            else f"{one['from']:g} and more"
            for one in found
        ]
        places = np.arange(len(found)) + (number - (len(results["levels"]) - 1) / 2) * 0.11
        style = {"color": colour, "fmt": marker, "markersize": 5, "linestyle": "-", "linewidth": 0.8}
        draw_estimates(bins, places, found, elinewidth=1.2, label=name.replace("$", r"\$"), **style)
    bins.set_xticks(range(len(labels)), labels)
    bins.set(xlabel="surprisal of the token (nats)", ylabel=PHI_LABEL)
    bins.set_ylim(bottom=0)
    bins.set_title("phi at equal surprisal", fontsize=FONT + 1, loc="left")
    bins.legend(fontsize=FONT - 1, frameon=False, ncols=2)
    verbatim = results["verbatim"] or {}
    rows = {"recited": "recited", "sure, in\nthe rest": "sure_rest", "the rest": "rest"}
    colours = (_LEVEL_STYLES["memorised"][0], "#8A8A8A", "#8A8A8A")
    draw_bars(bars, {label: verbatim.get(key) for label, key in rows.items()}, colours, capsize=0)
    bars.set(xlabel=PHI_LABEL)
    bars.set_title("memorised text", fontsize=FONT + 1, loc="left")
    set_fonts(figure)
    return figure


def figure_levels_course(results: Mapping[str, Any]) -> Figure:
    """Phi of each level at each point: along the steps of a training, else side by side."""
    points, along = results["points"], results["course"]["along"]
    places = [point["step"] for point in points] if along else list(range(len(points)))
    figure = new_figure(height=3.9)
    axes = figure.subplots()
    beside = 0 if along else 0.08
    for number, (name, level) in enumerate(results["levels"].items()):
        colour, marker = _LEVEL_STYLES.get(level["role"], _OTHER_STYLE)
        at = np.array(places) + beside * (number - (len(results["levels"]) - 1) / 2)
        found = [numbers(point["levels"][name]["phi"]) for point in points]
        means, low, high = np.array(found, dtype=float).T  # None becomes NaN
        style = {"color": colour, "marker": marker, "markersize": 5, "label": name.replace("$", r"\$")}
        axes.plot(at, means, linewidth=1.3 if along else 0, **style)
        if along:
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(at, low, high, color=colour, linewidth=1.2)
    if not along:
        axes.set_xticks(places, [point["label"] for point in points])
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
    axes.set(xlabel="step" if along else "", ylabel=PHI_LABEL)
    title = "phi of each level along the training" if along else "phi of each level"
    axes.set_title(f"{title}, 95 % intervals over texts", fontsize=FONT + 1, loc="left")
    axes.legend(fontsize=FONT - 1, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    set_fonts(figure)
    log_if_wide(axes)
    return figure


def figure_sweep(results: Mapping[str, Any]) -> Figure:
    """Phi and loss gap of each insertion point at the end (above), and on the way there (below)."""
    points, course = results["points"], results["course"]
    figure = new_figure(height=5.4)
    above, below = figure.subplots(2, 2)
    for top, bottom, name, label in (
        (above[0], below[0], "phi", PHI_LABEL),
        (above[1], below[1], "loss_gap", "loss gap (nats per token)"),
    ):
        values = [found.get(name) for found in points.values()]
        top.plot(range(len(points)), values, color="#8A8A8A", linewidth=1)
        for place, point in enumerate(points):
            style = series_style(point, list(points))
            top.plot([place], [values[place]], linestyle="", markersize=6, **style)
            history = [record for record in course if record["insertion_point"] == point]
            draw_series(bottom, history, name, label=point, markersize=4, **style)
        top.set_xticks(range(len(points)), [point.rsplit(".", 1)[-1] for point in points])
        low, high = min(0.0, *values), max(0.0, *values)
        margin = 0.1 * (high - low or 1.0)
        top.set(
            xlabel="insertion point (block)", ylabel=label, ylim=(low - margin * (low < 0), high + margin)
        )
        bottom.set(xlabel="step", ylabel=label)
    log_if_wide(below[0])
    handles, labels = below[0].get_legend_handles_labels()
    legend_below(figure, handles, labels, 3)
    set_fonts(figure)
    return figure


# Columns of settings that a band of knobs has room for.
_BAND = 15
_KNOB_LINES = {
    "ratios": {
        "memorized_sequences": "in-context ÷ memorized sequences",
        "memorized_programs": "in-context ÷ memorized programs",
        "random": "in-context ÷ random",
    },
    "correlations": {
        "given_surprisal": "with description length, given surprisal",
        "given_letters": "the same, given the number of letters, too",
        "gain": "with an ideal learner's gain, given surprisal and position",
    },
}
_KNOB_STYLES = {
    "given_surprisal": ("#D55E00", "o"),
    "given_letters": ("#E69F00", "^"),
    "gain": ("#009E73", "D"),
}


def figure_knobs(results: Mapping[str, Any]) -> Figure:
    """Ratios of phi (above) and its correlations (below) at every setting, a panel a knob. Dotted: those of
    an untrained layer; grey: what is the recipe of all."""
    knobs: dict[str, list[Mapping[str, Any]]] = {}
    for one in results["settings"]:
        knobs.setdefault(one["knob"], []).append(one)
    bands: list[list[str]] = [[]]
    for knob, settings in knobs.items():
        if bands[-1] and sum(len(knobs[name]) for name in bands[-1]) + len(settings) > _BAND:
            bands.append([])
        bands[-1].append(knob)
    figure = new_figure(height=0.8 + 4.2 * len(bands))
    first: dict[str, Axes] = {}
    for band, part in zip(bands, figure.subfigures(len(bands), 1, squeeze=False)[:, 0], strict=True):
        widths = [max(len(knobs[knob]), 2) for knob in band]
        rows = part.subplots(2, len(band), sharex="col", squeeze=False, width_ratios=widths)
        for column, knob in zip(rows.T, band, strict=True):
            for axes, kind in zip(column, _KNOB_LINES, strict=True):
                axes.sharey(first.setdefault(kind, axes))
                _draw_knob(axes, kind, knobs[knob], results["untrained"])
                for place, one in enumerate(knobs[knob]):
                    if one["run"] == results["common"]:
                        axes.axvspan(place - 0.4, place + 0.4, color="#EEEEEE", zorder=0)
            column[0].set_title(knob, fontsize=FONT + 1)
            column[1].set_xticks(range(len(knobs[knob])), [one["setting"] for one in knobs[knob]])
            column[1].tick_params(axis="x", rotation=30)
        for axes in rows[:, 1:].flat:
            axes.tick_params(labelleft=False)
        rows[0, 0].set_ylabel("ratio of phi")
        rows[1, 0].set_ylabel("partial correlation of phi")
    handles, labels = zip(
        *(pair for row in rows for pair in zip(*row[0].get_legend_handles_labels(), strict=True)), strict=True
    )
    legend_below(figure, handles, labels, 2)
    set_fonts(figure)
    return figure


def _draw_knob(
    axes: "Axes", kind: str, settings: Sequence[Mapping[str, Any]], untrained: Mapping[str, Any]
) -> None:
    lines = {key: label for key, label in _KNOB_LINES[kind].items() if key in untrained[kind]}
    for number, (key, label) in enumerate(lines.items()):
        colour, marker = (_KNOB_STYLES if kind == "correlations" else TASK_STYLES)[key]
        found = [one[kind][key] for one in settings]
        places = np.arange(len(found)) + 0.1 * (number - 1)
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 0.7, "elinewidth": 1.5}
        draw_estimates(axes, places, found, label=label, **style)
        if (value := numbers(untrained[kind][key])[0]) is not None:
            axes.axhline(value, color=colour, linewidth=1, linestyle=":")
    axes.axhline(1 if kind == "ratios" else 0, color="black", linewidth=0.8)
    axes.set_xlim(-0.5, len(settings) - 0.5)
    if kind == "ratios":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_curves(
    axes: "Axes",
    labels: Sequence[str],
    curves: Sequence[Sequence[tuple[float, Mapping[str, Any]]]],
    title: str,
) -> None:
    """Estimates along x with bands, from pale to dark; and a legend below."""
    colours = colormaps["viridis"](np.linspace(0.85, 0.0, max(len(curves), 2)))  # pale yellow is hard to see
    for label, points, colour in zip(labels, curves, colours, strict=False):
        x = [place for place, _ in points]
        # A cell with one document has a mean but no interval: no band there.
        values, low, high = np.array([numbers(found) for _, found in points], dtype=float).T
        axes.plot(x, values, "o-", markersize=4, color=colour, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    style = {"fontsize": FONT - 1, "title_fontsize": FONT - 1, "frameon": False, "ncols": 2}
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(0, -0.18), **style)


def _label_points(
    figure: Figure,
    axes: "Axes",
    points: Sequence[tuple[float | None, float | None]],
    texts: Sequence[str],
) -> None:
    """Write each text beside its point, where it covers no point and no text already placed."""
    figure.draw_without_rendering()  # fixes the layout, so that pixels can be compared
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    unit = figure.dpi / 72
    known = [(point, text) for point, text in zip(points, texts, strict=True) if None not in point]
    pixels = [axes.transData.transform(np.array(point, dtype=float)) for point, _ in known]
    taken = [_box(x, y, (0, 0), 10 * unit, 10 * unit) for x, y in pixels]
    line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 4}
    for (point, text), (x, y) in zip(known, pixels, strict=True):
        note = axes.annotate(text, point, (0, 0), textcoords="offset points", fontsize=FONT, arrowprops=line)
        size = Text.get_window_extent(note)  # of the text alone, without the line

        def box_at(place: tuple[int, int, int], x: float = x, y: float = y, size: Bbox = size) -> Bbox:
            distance, *side = place
            reach = distance * unit
            return _box(x + side[0] * reach, y + side[1] * reach, side, size.width, size.height)

        def cost(place: tuple[int, int, int], box_at: Callable[..., Bbox] = box_at) -> int:
            box = box_at(place)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            return sum(box.overlaps(other) for other in taken) + 10 * (not inside)

        place = distance, horizontal, vertical = min(_PLACES, key=cost)  # of equals the first: the nearest
        note.set(ha=("center", "left", "right")[horizontal], va=("center", "bottom", "top")[vertical])
        note.xyann = (horizontal * distance, vertical * distance)
        taken.append(box_at(place))
        if distance < 20 and note.arrow_patch is not None:
            note.arrow_patch.set_visible(False)  # beside its point a label needs no line


def _box(x: float, y: float, side: Sequence[int], width: float, height: float) -> Bbox:
    """The box whose middle (side 0), left or bottom (1), right or top (-1) is at x, y."""
    left, bottom = x + (side[0] - 1) * width / 2, y + (side[1] - 1) * height / 2
    return Bbox.from_extents(left, bottom, left + width, bottom + height)
