"""What was measured, as a table, as JSON and as a figure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from benchmarks.harness import Comparison, Series
from philens.show.terminal import new_table
from philens.support.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MET, MISSED, INFORMATION = "#0072B2", "#D55E00", "#8A8A8A"
DRAWN = (0.03, 30.0)  # ratios beyond are drawn as an arrow at the edge
SMOKE = "SMOKE SCALE: shows that everything runs; the figures mean nothing."


@dataclass(frozen=True)
class Row:
    """What became of one row.

    Attributes:
        status: `measured`, `unavailable` on this machine, or `failed`.
        reason: why, unless measured.
        trace: of a failure that was not expected.
    """

    name: str
    status: Literal["measured", "unavailable", "failed"]
    comparisons: Sequence[Comparison] = ()
    reason: str = ""
    trace: str = ""
    seconds: float = 0.0


def value_text(value: float, unit: str) -> str:
    """A number in the prefix that makes it readable."""
    if unit == "s":
        steps = ((1.0, "s"), (1e-3, "ms"), (0.0, "µs"))
        scale, name = next((size, name) for size, name in steps if value >= size)
        return f"{value / (scale or 1e-6):.3g} {name}"
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def series_text(series: Series) -> str:
    """The median, and from the smallest to the largest below it."""
    text = value_text(series.median, series.unit)
    if len(series.values) > 1:
        low, high = (value_text(end, series.unit) for end in ends(series.values))
        if low.split()[1] == high.split()[1]:
            low = low.split()[0]
        text += f"\n{low} to {high}"
    return text


def ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def ratio_text(comparison: Comparison) -> str:
    ratios = comparison.ratios
    text = f"{comparison.ratio:.3g}"
    return text if len(ratios) == 1 else f"{text}\n{min(ratios):.3g} to {max(ratios):.3g}"


def machine_text(machine: Mapping[str, Any]) -> str:
    device = machine["gpu"] or f"CPU ({machine['cpu_capability']})"
    allowed = machine["cores_allowed"]
    return (
        f"{machine['cpu']}, {allowed} core{'s' * (allowed != 1)}, {machine['threads']} "
        f"thread{'s' * (machine['threads'] != 1)}, {machine['memory_gb']:g} GB; on {device}; "
        f"torch {machine['torch']}; load {machine['load_average']:g} at the start"
    )


def table(rows: Sequence[Row], machine: Mapping[str, Any], scale: str, repetitions: int) -> Table:
    """All rows, the compared works beside each other, and below what must be known to read them."""
    notes = [f"{row.name}: {one.note}" for row in rows for one in row.comparisons if one.note]
    notes += [f"{row.name} {row.status}: {row.reason}" for row in rows if row.reason]
    caption = [f"Medians of {repetitions} repetitions in turn, smallest to largest below."]
    caption += [f"{machine_text(machine)}.", *notes]
    found = new_table(
        "philens and what it is compared with", "\n".join([SMOKE] * (scale == "smoke") + caption)
    )
    for heading in ("row", "philens", "compared with"):
        found.add_column(heading)
    for heading in ("ratio", "target", "met"):
        found.add_column(heading, justify="right", no_wrap=True)
    marks = {True: Text("yes", style="green"), False: Text("no", style="red"), None: Text("")}
    for row in rows:
        if row.status != "measured":
            found.add_row(Text(row.name, style="bold"), Text(row.status, style="italic"), end_section=True)
        for number, one in enumerate(row.comparisons):
            found.add_row(
                Text(row.name * (number == 0), style="bold"),
                *(Text(f"{side.name}\n{series_text(side)}") for side in (one.ours, one.theirs)),
                ratio_text(one),
                str(one.target or ""),
                marks[one.is_met],
                end_section=number == len(row.comparisons) - 1,
            )
    return found


def as_json(rows: Sequence[Row], machine: Mapping[str, Any], scale: str, repetitions: int) -> dict[str, Any]:
    """Everything that was measured, each value included."""

    def series(one: Series) -> dict[str, Any]:
        ends = {"median": one.median, "smallest": min(one.values), "largest": max(one.values)}
        return {"name": one.name, "unit": one.unit, **ends, "values": one.values}

    def comparison(one: Comparison) -> dict[str, Any]:
        return {
            "philens": series(one.ours),
            "compared_with": series(one.theirs),
            "ratio": one.ratio,
            "ratio_smallest": min(one.ratios),
            "ratio_largest": max(one.ratios),
            "target": None if one.target is None else str(one.target),
            "met": one.is_met,
            "note": one.note,
            "details": dict(one.details),
        }

    return {
        "scale": scale,
        "meaningful": scale == "full",
        "repetitions": repetitions,
        "machine": dict(machine),
        "rows": [
            {
                "row": row.name,
                "status": row.status,
                "seconds": round(row.seconds, 2),
                "comparisons": [comparison(one) for one in row.comparisons],
            }
            | ({"reason": row.reason} if row.reason else {})
            | ({"trace": row.trace} if row.trace else {})
            for row in rows
        ],
    }


def figure(rows: Sequence[Row], machine: Mapping[str, Any], scale: str) -> "Figure":
    """The ratio of every comparison with its spread, and the side of the target on which it should lie."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from philens.show.plots import FONT, new_figure, set_fonts

    lines = [(row.name, one) for row in rows for one in row.comparisons]
    drawing = new_figure(height=1.9 + 0.36 * max(1, len(lines)))
    axes = drawing.subplots()
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, (_, one) in enumerate(lines):
        colour = {True: MET, False: MISSED, None: INFORMATION}[one.is_met]
        at, low, high = (min(max(value, DRAWN[0]), DRAWN[1]) for value in (one.ratio, *ends(one.ratios)))
        axes.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.35, solid_capstyle="butt")
        beyond = {DRAWN[0]: "<", DRAWN[1]: ">"}
        axes.plot([at], [place], marker=beyond.get(at, "o"), color=colour, markersize=6)
        axes.annotate(
            f"{one.ratio:.3g}", (max(high, at), place), (6, 0), textcoords="offset points",
            va="center", fontsize=FONT - 1, color=colour,
        )  # fmt: skip
        if one.target is not None:
            style = {"color": "#444444", "markersize": 7, "linestyle": ""}
            axes.plot([one.target.limit], [place], marker="|", markeredgewidth=1.6, **style)
            end = "<" if one.target.at_most else ">"
            axes.annotate(
                end, (one.target.limit, place), (-7 if one.target.at_most else 7, 0),
                textcoords="offset points", ha="center", va="center", fontsize=FONT, color="#444444",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(
        range(len(lines)), [f"{name}:  {one.ours.name}\nagainst {one.theirs.name}" for name, one in lines]
    )
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set(xlabel="philens ÷ what it is compared with; spread over repetitions")
    title = f"{SMOKE}\n" if scale == "smoke" else ""
    drawing.suptitle(f"{title}{machine_text(machine)}", fontsize=FONT - 1, x=0.01, ha="left")
    kinds = (("target met", MET), ("target missed", MISSED), ("for information", INFORMATION))
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=text) for text, colour in kinds]
    handles.append(Line2D([], [], marker="|", linestyle="", color="#444444", label="target and its side"))
    drawing.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=FONT - 1, frameon=False)
    set_fonts(drawing)
    axes.tick_params(axis="y", labelsize=FONT - 1.5)
    return drawing


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / name, lambda file: file.write(text.encode()))


def write_figure(folder: Path, name: str, drawing: "Figure") -> None:
    """As PNG and SVG."""
    for suffix in ("png", "svg"):
        write_atomically(folder / f"{name}.{suffix}", lambda file, s=suffix: drawing.savefig(file, format=s))
