"""Draws meaning.png, the picture of docs/meaning.md, from the model that comes with philens.

python docs/images/meaning.py
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

import philens
from philens.show.colours import LIGHT, Scale, palette
from philens.tasks.automata import generate

PAGE, INK, FAINT, LINE = "#fbfaf6", "#22242a", "#676c76", "#dcd8cd"
FORECAST, CAME, SURPRISAL = "#8d929c", "#0d62a8", "#c9742b"
MONO = "DejaVu Sans Mono"
# Task, heading, what the model does. The letters shown come from the middle of a document, where a context
# has been read.
TEXTS = (
    ("memorized_sequences", "Strings known by heart", "The forecast comes true: it recites."),
    ("in_context_language", "A new language", "States leave the forecast: it works out the rule."),
    ("random", "Random letters", "Nothing is made of them: it gives up."),
)
PART = slice(92, 108)
# Drawn large, of a column: the place of a letter, and what it is an example of.
LARGE = {0: (2, "foretold"), 1: (14, "not foretold")}
ROWS = ("one direction\nof the latent", "colour:\nphi", "phi", "surprisal")
TOP = 26.0  # of the phi axes, nats
ROOM = (-5.8, 8.6)  # of the direction, in usual widths of a forecast


@dataclass
class Reading:
    """What the model makes of some letters of a text, T of them.

    Attributes:
        letters: the letters.
        phi, surprisal: (T,) nats.
        posterior, prior: (2, T, L) mean and variance of the latents.
    """

    letters: str
    phi: NDArray[np.float32]
    surprisal: NDArray[np.float32]
    posterior: torch.Tensor
    prior: torch.Tensor


@torch.no_grad()
def read(lens: philens.PHiModel, tasks: object, task: str, part: slice) -> Reading:
    """Read a document of a task and keep a part of it."""
    docs = generate(tasks, seed=1, task=task, indices=0).cut(256)  # pyright: ignore[reportArgumentType]
    table = philens.score_documents(lens, docs)
    output = lens(torch.from_numpy(docs.tokens.astype(np.int64))[None], returns="phi").layer_outputs[0]
    posterior = torch.stack((output.posterior_mean[0, part], output.posterior_logvar[0, part].exp()))
    prior = torch.stack((output.prior_mean[0, part], output.prior_logvar[0, part].exp()))
    return Reading(docs.text(0)[part], table.phi[part], table.surprisal[part], posterior, prior)


def along(direction: torch.Tensor, gaussians: torch.Tensor) -> torch.Tensor:
    """(2, T) mean and variance of (2, T, L) diagonal Gaussians along a direction (L,)."""
    return torch.stack((gaussians[0] @ direction, gaussians[1] @ direction.square()))


def divergence(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """(T,) KL(q || p) in nats of Gaussians in one dimension."""
    return 0.5 * (torch.log(p[1] / q[1]) + (q[1] + (q[0] - p[0]).square()) / p[1] - 1)


def telling_direction(readings: list[Reading]) -> torch.Tensor:
    """The direction of the latent along which posterior and prior differ most, on average over all texts."""
    torch.manual_seed(0)
    direction = torch.randn(readings[0].prior.shape[-1], requires_grad=True)
    optimizer = torch.optim.Adam([direction], lr=0.05)
    for _ in range(400):
        found = [divergence(along(direction, one.posterior), along(direction, one.prior)) for one in readings]
        loss = -torch.cat(found).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return direction.detach()


def bell(gaussian: torch.Tensor, places: NDArray[np.float64]) -> NDArray[np.float64]:
    """The shape of a Gaussian, given as mean and variance, with height 1."""
    mean, variance = gaussian.tolist()
    return np.exp(-0.5 * (places - mean) ** 2 / variance)


def reach(gaussian: torch.Tensor) -> NDArray[np.float64]:
    """The places where a Gaussian is drawn."""
    mean, variance = gaussian.tolist()
    return np.linspace(max(mean - 3.2 * variance**0.5, ROOM[0]), min(mean + 3.2 * variance**0.5, 6.0), 160)


def draw_track(axes: Axes, prior: torch.Tensor, posterior: torch.Tensor, colours: list[str]) -> None:
    """At each letter the forecast, to the left, and what came, to the right."""
    for place, colour in enumerate(colours):
        forecast, came = reach(prior[:, place]), reach(posterior[:, place])
        edge = place - 0.42 * bell(prior[:, place], forecast)
        axes.fill_betweenx(forecast, place, edge, color=FORECAST, alpha=0.5, linewidth=0)
        edge = place + 0.42 * bell(posterior[:, place], came)
        axes.fill_betweenx(came, place, edge, facecolor=colour, edgecolor=CAME, linewidth=0.7)


def draw_large(axes: Axes, prior: torch.Tensor, posterior: torch.Tensor) -> None:
    """One letter's forecast and what came, along the axis."""
    axes.fill_between(reach(prior), bell(prior, reach(prior)), color=FORECAST, alpha=0.5, linewidth=0)
    came = reach(posterior), bell(posterior, reach(posterior))
    axes.fill_between(*came, color=CAME, alpha=0.3, linewidth=0)
    axes.plot(*came, color=CAME, linewidth=1.4)
    axes.axhline(0, color=LINE, linewidth=1.2, zorder=0)
    axes.set(xlim=(-6.2, 6.2), ylim=(-0.05, 1.75))
    if abs(float(prior[0] - posterior[0])) > 2:
        ends = (float(prior[0]), 1.1), (float(posterior[0]), 1.1)
        axes.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": INK, "linewidth": 0.9})
        for gaussian, name, colour in ((prior, "forecast", FAINT), (posterior, "what came", CAME)):
            axes.text(float(gaussian[0]), 1.16, name, fontsize=9.5, color=colour, ha="center")


def explain(axes: Axes) -> None:
    """The words beside the large ones."""
    words = (
        (FORECAST, 0.97, "forecast (prior)", "what the states before this letter foretell"),
        (CAME, 0.70, "what came (posterior)", "what the letter's own state says"),
        (
            None,
            0.43,
            "phi",
            "how far what came is from the forecast:\nKL(posterior ‖ prior) in nats, summed over\n"
            "128 directions; the most telling is drawn.",
        ),
    )
    for colour, height, name, meaning in words:
        if colour is not None:
            patch = Rectangle((0.02, height - 0.095), 0.05, 0.085, facecolor=colour, alpha=0.55, linewidth=0)
            axes.add_patch(patch)
        axes.text(0.1, height, name, fontsize=10.5, fontweight="bold", color=INK, va="top")
        axes.text(0.1, height - 0.12, meaning, fontsize=9.5, color=INK, va="top", linespacing=1.4)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], facecolor="none")
    axes.spines[:].set_visible(False)


def main() -> None:
    lens, recipe = philens.load_run(philens.SHIPPED)
    readings = [read(lens, recipe.data.tasks, task, PART) for task, _, _ in TEXTS]
    direction = telling_direction(readings)
    usual = torch.cat([along(direction, one.prior) for one in readings], 1)
    direction /= usual[1].mean().sqrt()  # one unit is the usual width of a forecast
    middle = (usual[0] / usual[1].mean().sqrt()).mean()
    tracks = [(along(direction, one.prior), along(direction, one.posterior)) for one in readings]
    for gaussians in (gaussians for pair in tracks for gaussians in pair):
        gaussians[0] -= middle

    figure = Figure(figsize=(11.2, 7.7), dpi=150, facecolor=PAGE)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        5, 3, height_ratios=(2.2, 3.3, 0.36, 1.25, 0.8), left=0.095, right=0.985, top=0.985, bottom=0.025,
        hspace=0.1, wspace=0.06,
    )  # fmt: skip
    scale, grounds = Scale(0.0, TOP), palette(LIGHT)
    for column, ((_, heading, does), one, pair) in enumerate(zip(TEXTS, readings, tracks, strict=True)):
        levels = [level or 0 for level in scale.levels(one.phi)]
        colours = [grounds[level][0] for level in levels]
        places = np.arange(len(one.letters))
        panels = [figure.add_subplot(grid[row, column]) for row in range(5)]
        large, track, tiles, bars, surprise = panels
        for axes in panels:
            bare(axes)
        for axes in panels[1:]:
            axes.set_xlim(-0.6, len(places) - 0.4)
        draw_track(track, *pair, colours)
        track.set_ylim(*ROOM)
        track.text(-0.5, ROOM[1] - 0.2, heading, fontsize=12.5, fontweight="bold", color=INK, va="top")
        track.text(-0.5, ROOM[1] - 1.7, does, fontsize=9.5, color=FAINT, va="top")
        for place, (letter, level) in enumerate(zip(one.letters, levels, strict=True)):
            ground, ink = grounds[level]
            tile = Rectangle((place - 0.46, 0), 0.92, 1, facecolor=ground, edgecolor=LINE, linewidth=0.8)
            tiles.add_patch(tile)
            tiles.text(place, 0.47, letter.replace(" ", "␣"), color=ink, ha="center", va="center",
                       fontsize=11, family=MONO)  # fmt: skip
        tiles.set_ylim(-0.05, 1.05)
        bars.bar(places, one.phi, 0.86, color=colours, edgecolor=CAME, linewidth=0.6)
        bars.set_ylim(0, TOP)
        surprise.bar(places, one.surprisal, 0.86, color=SURPRISAL, alpha=0.85)
        surprise.set_ylim(0, 7.5)
        for axes, mean in ((bars, one.phi.mean()), (surprise, one.surprisal.mean())):
            axes.text(
                -0.5, axes.get_ylim()[1], f"{mean:.1f} nats on average", fontsize=9.5, color=INK, va="top"
            )
            axes.axhline(0, color=LINE, linewidth=1.2)
        if column in LARGE:
            place, kind = LARGE[column]
            prior, posterior = pair[0][:, place], pair[1][:, place]
            draw_large(large, prior, posterior)
            large.text(0, 1.72, f"“{one.letters[place]}”, {kind}: phi {one.phi[place]:.1f} nats",
                       fontsize=11, color=INK, va="top", ha="center")  # fmt: skip
            ring = Rectangle((place - 0.46, 0), 0.92, 1, fill=False, edgecolor=INK, linewidth=1.8, zorder=3)
            tiles.add_patch(ring)
        else:
            explain(large)
        if column == 0:
            for axes, name in zip(panels[1:], ROWS, strict=True):
                axes.text(-0.02, 0.5, name, transform=axes.transAxes, fontsize=9.5, color=FAINT, ha="right",
                          va="center", linespacing=1.4)  # fmt: skip
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
