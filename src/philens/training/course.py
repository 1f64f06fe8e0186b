"""The course of a training as a figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from philens.support.columns import Column, column_name
from philens.support.errors import InputError
from philens.support.files import write_atomically
from philens.tasks.automata import task_label
from philens.training.evaluated import key_of, rows_of
from philens.training.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_course(run: RunFolder) -> None:
    """Draw what a run has recorded.

    Raises:
        OutputError: it cannot be written.
    """
    records = run.metrics()
    if not any("loss" in record for record in records):
        return
    figure = figure_training(records)
    if [record["collapsed"] for record in records if "collapsed" in record][-1:] == [1.0]:
        figure.suptitle("The PHi layer has collapsed: its latents carry almost no information.")
    write_atomically(run.picture, lambda file: figure.savefig(file, format="png"))


def figure_training(history: Sequence[Mapping[str, Any]]) -> "Figure":
    """Training curves from log records: losses per step, and what every evaluation found.

    A record has `step` and any of `loss`, `phi`, `surprisal`, `eval/PART/phi`, `eval/PART/surprisal`,
    `eval/PART/loss_gap` for the parts of a text or for tasks. With several layers at once, evaluations are
    drawn by insertion point (`eval/phi@POINT`), not by part; of layers in a trained base with the loss gap.
    """
    from philens.show.plots import (
        FONT,
        MTD_LABEL,
        PHI_LABEL,
        SURPRISAL_LABEL,
        draw_series,
        log_if_wide,
        new_figure,
        series_style,
        set_fonts,
    )

    if not history:
        raise InputError("There is no training history to draw; train for at least one logged step.")
    figure = new_figure(height=5.4)
    (losses, train_value), (left, right) = figure.subplots(2, 2, sharex=True)
    keys = dict.fromkeys(key for record in history for key in record)
    points = list(dict.fromkeys(point for key in keys if (point := Column(key).point) is not None))
    rows = [row for record in history for row in rows_of(record)]
    parts = list(dict.fromkeys(row.part for row in rows if row.part is not None))
    metrics = {Column(key).metric for key in keys} | {row.metric for row in rows}
    has_phi = "phi" in metrics or "mtd" not in metrics
    value, value_label = ("phi", PHI_LABEL) if has_phi else ("mtd", MTD_LABEL)
    draw_series(losses, history, "loss", color="#000000", label="loss")
    for point in points or [None]:
        of_base, of_phi, name = "#0072B2", "#D55E00", "surprisal"
        if point is not None:
            of_base = of_phi = series_style(point, points)["color"]
            name = None
        draw_series(losses, history, column_name("surprisal", point), color=of_base, label=name)
        draw_series(train_value, history, column_name(value, point), color=of_phi)
    losses.set(ylabel="nats per token")
    losses.set_title("training loss", fontsize=FONT + 1, loc="left")
    train_value.set(ylabel=value_label)
    train_value.set_title(f"training {value}", fontsize=FONT + 1, loc="left")
    quantity, label = "surprisal", SURPRISAL_LABEL
    if any(row.metric == "surprisal_shallow" for row in rows):
        quantity = "surprisal_shallow"
    if any(row.metric == "loss_gap" for row in rows):
        quantity, label = "loss_gap", "loss gap (nats per token)"
    for axes, name, ylabel in ((left, quantity, label), (right, value, value_label)):
        for series in points or parts:
            key = key_of(None, column_name(name, series)) if points else key_of(series, name)
            style = series_style(series, points or parts)
            draw_series(axes, history, key, label=task_label(series), markersize=4, **style)
        axes.set(xlabel="step", ylabel=ylabel)
        kind = "insertion point" if points else "task" if quantity == "surprisal" else "part"
        axes.set_title(f"{name.replace('_', ' ')} per {kind}", fontsize=FONT + 1, loc="left")
    for axes in (train_value, right):
        log_if_wide(axes)
    if losses.get_legend_handles_labels()[1]:
        losses.legend(fontsize=FONT - 1, frameon=False)
    handles, labels = right.get_legend_handles_labels()
    if not handles:
        handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=FONT - 1, frameon=False)
    set_fonts(figure)
    return figure
