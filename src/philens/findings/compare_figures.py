"""A comparison of instruments: a figure for each question, and a page of the tokens they disagree on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from philens.findings.compare import ranks
from philens.findings.text_tokens import AFTER, BEFORE
from philens.show.page import PageDocument, write_page
from philens.show.plots import FONT, draw_bars, draw_dots, new_figure, set_fonts

if TYPE_CHECKING:
    import pandas as pd

    from philens.scoring.scores import TokenScores
    from philens.tasks.levels import LevelText

_BLUE, _ORANGE = "#0072B2", "#D55E00"
_PAIRS = 6


def compare_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures, by name."""
    figures = {"levels": _levels(results), "cost": _cost(results)}
    figures |= {"agreement": _agreement(results)} if results["agreement"] else {}
    figures |= {"complexity": _complexity(results)} if results["complexity"] else {}
    figures |= {"disagreement": _disagreement(results)} if results["disagreement"] else {}
    return figures


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    """Three panels in a row, and as many rows as it takes."""
    rows = -(-count // 3)
    figure = new_figure(height * rows)
    panels = figure.subplots(rows, min(3, count), squeeze=False).ravel().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _levels(results: Mapping[str, Any]) -> Figure:
    """Means of each column at each level."""
    levels = results["levels"]
    figure, panels = _panels(len(results["columns"]), 0.7 + 0.22 * len(levels))
    for number, (axes, name) in enumerate(zip(panels, results["columns"], strict=True)):
        draw_dots(axes, {level: one["columns"][name] for level, one in levels.items()}, color=_BLUE)
        axes.set_yticklabels([level.replace("_", " ") if number % 3 == 0 else "" for level in levels])
        axes.set_title(name, fontsize=FONT, loc="left")
    set_fonts(figure)
    return figure


def _complexity(results: Mapping[str, Any]) -> Figure:
    found = results["complexity"]
    given = {name: f"\ngiven {one['given']}" if one["given"] else "" for name, one in found.items()}
    label = "correlation with description length, in-context language"
    return _dots({name + given[name]: one for name, one in found.items()}, 0, label)


def _dots(found: Mapping[str, Mapping[str, Any]], nothing: float, label: str) -> Figure:
    """Dots with intervals, and a line at what says nothing."""
    figure = new_figure(0.9 + 0.3 * len(found))
    axes = figure.subplots()
    draw_dots(axes, found, color=_BLUE)
    axes.axvline(nothing, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    set_fonts(figure)
    return figure


def _agreement(results: Mapping[str, Any]) -> Figure:
    """Rank correlations over all tokens below the diagonal, within texts above it."""
    columns = results["columns"]
    values = np.full((len(columns), len(columns)), np.nan)
    for one in results["agreement"]:
        first, second = (columns.index(one[key]) for key in ("first", "second"))
        values[second, first] = np.nan if one["value"] is None else one["value"]
        within = one["within_texts"]["value"]
        values[first, second] = np.nan if within is None else within
    figure = new_figure(1.6 + 0.5 * len(columns))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        colour = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=FONT, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(columns)), columns)
    axes.set_title("rank correlation over tokens; above the diagonal within texts", fontsize=FONT, loc="left")
    figure.colorbar(image, ax=axes, shrink=0.7)
    set_fonts(figure)
    return figure


def _disagreement(results: Mapping[str, Any]) -> Figure:
    """Kinds of token with the largest differences of ranks, of the first pairs."""
    pairs = results["disagreement"][:_PAIRS]
    figure, panels = _panels(len(pairs), 3.2)
    for axes, pair in zip(panels, pairs, strict=True):
        kinds = sorted(pair["kinds"], key=lambda kind: -kind["difference"]["value"])
        found = {_shown(kind["token"]): kind["difference"] for kind in kinds}
        colours = [_BLUE if one["value"] > 0 else _ORANGE for one in found.values()]
        draw_bars(axes, found, colours, capsize=0, error_kw={"linewidth": 1})
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{pair['first']}\nless {pair['second']}", fontsize=FONT, loc="left")
    set_fonts(figure)
    figure.supxlabel("mean difference of ranks (0 to 1)", fontsize=FONT)
    return figure


def _cost(results: Mapping[str, Any]) -> Figure:
    spread = {
        one["column"]: {"value": one["median"], "ci95": [one["lowest"], one["highest"]]}
        for one in results["cost"]
    }
    figure = _dots(spread, 1, "time ÷ a plain forward pass: median, lowest and highest")
    figure.axes[0].set_xlim(left=0)
    return figure


def write_compare_page(
    path: Path,
    results: Mapping[str, Any],
    texts: "Sequence[LevelText]",
    scores: "Sequence[TokenScores]",
    frame: "pd.DataFrame",
) -> Path:
    """Write where instruments disagree: of each pair and kind of token, one occurrence in its text, with the
    ranks of all tokens around it; raises OutputError."""
    documents = []
    names = ("rank in the first", "rank in the second")
    for pair in results["disagreement"]:
        pieces, spans = [], []
        columns: dict[str, list[float]] = {name: [] for name in names}
        found = frame[["text", "place"]].assign(first=ranks(frame[pair["first"]]))
        found = found.assign(second=ranks(frame[pair["second"]])).set_index(["text", "place"])
        for number, kind in enumerate(pair["kinds"], 1):
            whole = scores[kind["text"]].pieces()
            around = range(max(kind["place"] - BEFORE, 0), min(kind["place"] + AFTER + 1, len(whole)))
            here = found.loc[kind["text"]].reindex(around)
            pieces += [whole[place] for place in around]
            for name, key in zip(names, ("first", "second"), strict=True):
                columns[name] += here[key].tolist()
            told = f"{number}. {_shown(kind['token'])}: {kind['difference']['value']:+.2f} on average"
            spans += [f"{told}, {kind['occurrences']} times, here in {texts[kind['text']].name}"] * len(
                around
            )
        if pieces:
            about = "Ranks from 0 to 1 among all tokens; the last but six of each part is the token told of."
            title = f"{pair['first']} and {pair['second']}"
            units: dict[str, str] = dict.fromkeys(names, "")
            documents.append(PageDocument(title, about, pieces, columns, spans, units=units))
    return write_page(path, "Tokens that instruments disagree on", documents, names if documents else None)


def _shown(token: str) -> str:
    return repr(token)
