"""The findings on solutions of problems as figures.

Of one seed they show its intervals over problems; of several the mean over seeds, and a dot for each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from philens.findings.reasoning_tables import headline_names, label
from philens.findings.solutions import GIVEN, PHI
from philens.show.estimates import numbers
from philens.show.plots import FONT, PHI_LABEL, SURPRISAL_LABEL, legend_below, new_figure, set_fonts

_PHI_COLOUR, _BASELINE_COLOUR = "#D55E00", "#0072B2"
_AGAINST_COLOUR, _CORRELATION_COLOUR = "#009E73", "#5F5F5F"


def figures(finding: str, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A finding's figures by their names: one for each insertion point, and `sweep` over several of these."""
    draw = figure_correctness if finding == "correctness" else figure_difficulty
    points = list(dict.fromkeys(point for one in seeds for point in one["points"]))
    found = {
        finding if len(points) == 1 else f"{finding}-{point}": draw(
            [one["points"][point] for one in seeds if point in one["points"]], f"after {point}"
        )
        for point in points
    }
    sweeps = [one["sweep"] for one in seeds if "sweep" in one]
    if sweeps:
        found["sweep"] = figure_points(sweeps)
    return found


def figure_correctness(results: Sequence[Mapping[str, Any]], of: str = "") -> Figure:
    """Choice accuracy by level, with phi's partial correlation on a second axis; beside it every rule.

    Levels as in the paper (arXiv 2503.13431): the highest phi and the lowest surprisal over all pairs, and
    the highest phi over the counter-intuitive ones. The second axis has its 0 where accuracy is by chance.
    """
    figure = new_figure(height=4.4)
    by_level, by_rule = figure.subplots(1, 2, width_ratios=(3, 2))
    levels = _levels(results)
    places = np.arange(len(levels))
    lines = (
        ("all", "highest_phi", "highest phi", _PHI_COLOUR, "o"),
        ("all", "lowest_surprisal", "lowest surprisal", _BASELINE_COLOUR, "s"),
        ("counterintuitive", "highest_phi", "highest phi, counter-intuitive pairs", _AGAINST_COLOUR, "^"),
    )
    second = by_level.twinx()
    for number, (subset, rule, text, colour, marker) in enumerate(lines):
        found = [
            [_at(one, "levels", level, "choice", subset, "rules", rule) for level in levels]
            for one in results
        ]
        _draw(by_level, places + 0.09 * (number - 1.5), found, 100, colour, marker, text)
    found = [
        [_at(one, "levels", level, "partial", "pooled", "phi_mean", "surprisal") for level in levels]
        for one in results
    ]
    text = "partial correlation given surprisal (right axis)"
    _draw(second, places + 0.13, found, 1, _CORRELATION_COLOUR, "X", text, linestyle=":")
    # Chance, 50 % and 0, is at the same height on both axes.
    by_level.set_ylim(-3, 103)
    farthest = max(map(abs, second.get_ylim()))
    second.set_ylim(-farthest, farthest)
    by_level.axhline(50, color="black", linewidth=0.8)
    by_level.set_xticks(places, levels)
    by_level.set(xlabel=results[0]["by"], ylabel="right one picked (%)")
    second.set_ylabel("partial correlation", color=_CORRELATION_COLOUR)
    second.tick_params(axis="y", colors=_CORRELATION_COLOUR)
    title = f"by {results[0]['by']}" if levels else f"without a {results[0]['by']}"
    title += f", {of}" if of else ""
    by_level.set_title(title, fontsize=FONT + 1, loc="left")

    rules = [name for name in results[0]["choice"]["all"]["rules"] if name != "lowest_phi"]
    rows = -np.arange(len(rules))
    for subset, colour, marker, shift in (
        ("all", _PHI_COLOUR, "o", 0.15),
        ("balanced", _CORRELATION_COLOUR, "D", -0.15),
    ):
        found = [[_at(one, "choice", subset, "rules", rule) for rule in rules] for one in results]
        text = "all pairs" if subset == "all" else "balanced over counter-intuitive and intuitive"
        _draw(by_rule, rows + shift, found, 100, colour, marker, text, linestyle="", flat=True)
    by_rule.axvline(50, color="black", linewidth=0.8)
    by_rule.set_yticks(rows, [label(rule) for rule in rules])
    by_rule.set(xlabel="right one picked (%)")
    by_rule.set_title("all levels", fontsize=FONT + 1, loc="left")
    set_fonts(figure)
    second.spines["right"].set_visible(True)
    _legend_below(figure, [by_level, second, by_rule], _note(results))
    return figure


def figure_difficulty(results: Sequence[Mapping[str, Any]], of: str = "") -> Figure:
    """phi and surprisal by level, and the correlations of phi, of what is left of it, and of the others."""
    figure = new_figure(height=3.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 5))
    levels = _levels(results)
    places = np.arange(len(levels))
    for axes, name, text, colour, marker in (
        (left, "phi_mean", PHI_LABEL, _PHI_COLOUR, "o"),
        (middle, "surprisal_mean", SURPRISAL_LABEL, _BASELINE_COLOUR, "s"),
    ):
        found = [[_at(one, "levels", level, name) for level in levels] for one in results]
        _draw(axes, places, found, 1, colour, marker, None)
        axes.set_xticks(places, levels)
        axes.set(xlabel=results[0]["by"], ylabel=text)
    left.set_title(of, fontsize=FONT + 1, loc="left")
    bars = [("phi", ("spearman", "phi_mean"), _PHI_COLOUR, "o")]
    bars += [
        (f"phi given {label(given)}", ("partial", "phi_mean", given), _PHI_COLOUR, "o")
        for given in GIVEN[1:]
        if given in results[0]["partial"]["phi_mean"]
    ]
    bars += [(f"phi {name[4:].replace('_', ' ')}", ("spearman", name), _PHI_COLOUR, "o") for name in PHI[1:]]
    bars += [
        (label(name), ("spearman", name), _BASELINE_COLOUR, "s")
        for name in results[0]["spearman"]
        if name not in PHI
    ]
    for row, (_, path, colour, marker) in enumerate(bars):
        found = [[_at(one, *path)] for one in results]
        _draw(right, np.array([-row]), found, 1, colour, marker, None, linestyle="", flat=True)
    right.set_yticks(-np.arange(len(bars)), [text for text, *_ in bars])
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel=f"Spearman's correlation with {results[0]['by']}")
    set_fonts(figure)
    _legend_below(figure, [], _note(results))
    return figure


def figure_points(sweeps: Sequence[Mapping[str, Any]]) -> Figure:
    """The headline numbers at each insertion point, with intervals that hold all at once."""
    names, points = headline_names(sweeps[0]), list(sweeps[0]["points"])
    rows = -(-len(names) // 3)
    figure = new_figure(height=0.5 + 2.4 * rows)
    panels = figure.subplots(rows, 3, squeeze=False).ravel()
    places = np.arange(len(points))
    for axes, name in zip(panels, names, strict=False):
        found = [[_at(one, "points", point, name) for point in points] for one in sweeps]
        _draw(axes, places, found, 1, _PHI_COLOUR, "o", None)
        axes.axhline(sweeps[0]["points"][points[0]][name]["chance"], color="black", linewidth=0.8)
        axes.set_xticks(places, [point.rsplit(".", 1)[-1] for point in points])
        axes.set_xlabel("after block")
        axes.margins(x=0.15)
        axes.set_title(label(name), fontsize=FONT, loc="left")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    set_fonts(figure)
    note = (
        f"{100 * sweeps[0]['level']:.2f} % intervals: all {sweeps[0]['comparisons']} hold together with 95 %"
    )
    _legend_below(figure, [], note if len(sweeps) == 1 else _note(sweeps))
    return figure


def _levels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({level for one in results for level in one["levels"]}, key=float)


def _at(found: Any, *path: str) -> Any:
    """What stands under the keys of `path`, None where there is nothing."""
    for key in path:
        if found is None:
            return None
        found = found.get(key)
    return found


def _draw(
    axes: Axes,
    places: np.ndarray,
    seeds: Sequence[Sequence[Mapping[str, Any] | None]],
    scale: float,
    colour: str,
    marker: str,
    text: str | None,
    linestyle: str = "-",
    flat: bool = False,
) -> None:
    """Estimates at `places`: with intervals of one seed, else their mean and a dot for each seed."""
    found = [numbers(estimate) for one in seeds for estimate in one]
    values = scale * np.array(found, dtype=float).reshape(len(seeds), len(places), 3)  # None becomes NaN
    present = np.isfinite(values[..., 0])
    middle = np.nansum(values[..., 0], axis=0) / np.where(present.any(axis=0), present.sum(axis=0), np.nan)
    style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": linestyle, "linewidth": 1.1}
    if len(seeds) == 1:
        # A percentile interval need not contain the estimate; matplotlib takes no negative distances.
        error = np.maximum([middle - values[0, :, 1], values[0, :, 2] - middle], 0.0)
        style |= {"elinewidth": 1.3, "capsize": 2.5, "label": text}
        axes.errorbar(
            *((middle, places) if flat else (places, middle)), **{"xerr" if flat else "yerr": error}, **style
        )
        return
    axes.plot(*((middle, places) if flat else (places, middle)), label=text, **style)
    for one in values[..., 0]:
        axes.plot(*((one, places) if flat else (places, one)), "o", color=colour, markersize=2.5, alpha=0.55)


def _note(results: Sequence[Any]) -> str:
    if len(results) == 1:
        return "95 % intervals over problems"
    return f"means over {len(results)} seeds; small dots: each seed"


def _legend_below(figure: Figure, panels: Sequence[Axes], note: str) -> None:
    pairs = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    pairs.append((Line2D([], [], linestyle=""), note))
    handles, texts = zip(*pairs, strict=True)
    legend_below(figure, handles, texts, min(2, len(pairs)))
