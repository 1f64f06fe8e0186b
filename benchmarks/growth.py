"""How cost grows: tokens a second against T, B, D, blocks, insertion depth and layers watched at once.

    python -m benchmarks.growth [--scale smoke|full] [--output FOLDER]

Each curve changes one thing about a small Transformer and leaves the others: T tokens in a row at a constant
number of tokens in all, B rows, width D, number of blocks, the block that the layer stands after, and the
number of layers that observe. `growth.json` is written after every point and `growth` (PNG, SVG) at the end,
also after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import philens
from benchmarks.__main__ import add_options, make_bench
from benchmarks.harness import Bench, Series, describe_machine
from benchmarks.models import packed_batch, random_texts
from benchmarks.report import SMOKE, machine_text, write_figure, write_json
from benchmarks.training import lens_step
from philens.lens.model import PHiModel
from philens.support.errors import PhilensError
from philens.training.build import start_model
from philens.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING, SCORING, PHI_ONLY = "training step", "scoring phi and surprisal", "scoring phi only"
COLOURS = {TRAINING: ("#0072B2", "s"), SCORING: ("#D55E00", "o"), PHI_ONLY: ("#009E73", "^")}
LABELS = {
    "length": "T, tokens in a row",
    "rows": "B, rows",
    "width": "D, width",
    "blocks": "blocks",
    "depth": "blocks below the layer",
    "watched": "layers that observe",
}


@dataclass(frozen=True)
class Shape:
    """One point: a Transformer, a batch, and where layers stand.

    Attributes:
        length: T. rows: B. width: D. blocks: of the base.
        depth: blocks up to and including the one that the layer stands after; with `watched`, not used.
        watched: layers that observe, spread over the blocks; 0 means one layer in the path.
    """

    length: int = 512
    rows: int = 4
    width: int = 256
    blocks: int = 4
    depth: int = 3
    watched: int = 0


def curves(bench: Bench) -> dict[str, list[Shape]]:
    """The points of each curve, by the name of what changes."""
    if bench.scale == "smoke":
        start = Shape(64, 2, 32, 2, 1)
        points: dict[str, tuple[int, ...]] = {"length": (64, 128), "rows": (1, 2), "width": (32, 64)}
        points |= {"blocks": (1, 2), "depth": (1, 2), "watched": (1, 2)}
    else:
        start = bench.pick(Shape(), Shape(), Shape(rows=16, width=768, blocks=12, depth=6))
        points = {
            "length": (256, 512, 1024, 2048, 4096, 8192),
            "rows": (1, 2, 4, 8, 16),
            "width": bench.pick((), (128, 256, 512, 768, 1024), (256, 512, 1024, 2048)),
            "blocks": bench.pick((), (2, 4, 8, 16), (4, 8, 16, 32)),
            "depth": bench.pick((), (1, 2, 3, 4), (1, 3, 6, 9, 12)),
            "watched": bench.pick((), (1, 2, 4), (1, 2, 4, 8, 12)),
        }
    found = {name: [replace(start, **{name: value}) for value in values] for name, values in points.items()}
    tokens = max(points["length"])  # as many in every batch of this curve
    found["length"] = [replace(shape, rows=tokens // shape.length) for shape in found["length"]]
    found["blocks"] = [replace(shape, depth=max(1, shape.blocks * 2 // 3)) for shape in found["blocks"]]
    return found


def make(bench: Bench, shape: Shape) -> tuple[PHiModel, Any, Recipe]:
    """The lens, its tokenizer and its recipe: the paper's in another size, and not compiled."""
    heads = max(1, shape.width // 64)
    values: dict[str, Any] = {
        "model.hidden_size": shape.width,
        "model.intermediate_size": 8 * round(shape.width / 3),
        "model.layers": shape.blocks,
        "model.heads": heads,
        "phi.prior_heads": heads,
        "phi.layer": shape.depth - 1,
        "data.length": shape.length,
        "train.batch_size": shape.rows,
        "train.compile": False,
    }
    if shape.watched:
        del values["phi.layer"]
        places = [(number + 1) * shape.blocks // shape.watched - 1 for number in range(shape.watched)]
        values |= {"phi.layers": places, "phi.mode": "observe", "phi.pressure": "reconstruction"}
    recipe = load_recipe("transformer_pfa", values)
    lens, tokenizer = start_model(recipe)
    return lens.to(bench.device), tokenizer, recipe


def measure(bench: Bench, shape: Shape) -> dict[str, Series]:
    """Tokens a second of training steps on packed rows, and of scoring texts of T characters each."""
    lens, tokenizer, recipe = make(bench, shape)
    texts = [" ".join(random_texts([shape.length + 1], seed)) for seed in range(shape.rows)]
    tokens = shape.rows * shape.length

    def score(*metrics: str) -> Callable[[], object]:
        return lambda: philens.score(lens, tokenizer, texts, metrics=metrics, batch_tokens=tokens)

    step = lens_step(bench, lens, recipe, packed_batch(bench, recipe))
    seconds = bench.alternate({TRAINING: step, SCORING: score("phi", "surprisal"), PHI_ONLY: score("phi")})
    return {name: series.per_second(tokens, "tokens") for name, series in seconds.items()}


def run(bench: Bench, folder: Any, console: Console) -> None:
    """All points; the JSON is written after each, the figure at the end or when the user stops it."""
    content: dict[str, Any] = {
        "scale": bench.scale,
        "repetitions": bench.repetitions,
        "machine": describe_machine(bench.device),
        "curves": {},
    }
    planned = [(name, shape) for name, shapes in curves(bench).items() for shape in shapes]
    known: dict[Shape, dict[str, Series]] = {}  # a shape on two curves is measured once
    try:
        for number, (name, shape) in enumerate(planned, 1):
            with console.status("") as status:
                where = f"{number}/{len(planned)} {name} {getattr(shape, name)}"
                bench.say = lambda text, where=where: status.update(f"{where}: {text}")
                if shape not in known:
                    torch.manual_seed(0)
                    known[shape] = measure(bench, shape)
                    bench.tidy()
            point = {"at": getattr(shape, name), "shape": asdict(shape)}
            for work, series in known[shape].items():
                ends = {"smallest": min(series.values), "largest": max(series.values)}
                point[work] = {"unit": series.unit, "median": series.median, **ends, "values": series.values}
            content["curves"].setdefault(name, []).append(point)
            write_json(folder, "growth.json", content)
            speed = ", ".join(f"{work} {point[work]['median']:,.0f}" for work in known[shape])
            console.print(f"{where}: {speed} tokens/s", highlight=False, markup=False, soft_wrap=True)
    finally:
        if content["curves"]:
            write_figure(folder, "growth", figure(content))


def figure(content: dict[str, Any]) -> "Figure":
    """Small multiples: tokens a second of each work along each curve with its spread, logarithmic axes."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    from philens.show.plots import FONT, new_figure, set_fonts

    found = content["curves"]
    drawing = new_figure(height=6.2)
    panels = drawing.subplots(2, 3, sharey=True)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes, name in zip(panels.flat, LABELS, strict=True):
        points = found.get(name, [])
        at = [point["at"] for point in points]
        for work, (colour, marker) in COLOURS.items():
            median, low, high = (
                [point[work][end] for point in points] for end in ("median", "smallest", "largest")
            )
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(at, median, color=colour, marker=marker, markersize=4, linewidth=1.3, label=work)
        axes.set(xlabel=LABELS[name], xscale="log", yscale="log")
        axes.xaxis.set_major_locator(FixedLocator(at))
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="#E5E5E5", linewidth=0.6)
    for axes in panels[:, 0]:
        axes.set_ylabel("tokens a second")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=FONT - 1, frameon=False)
    smoke = f"{SMOKE}\n" if content["scale"] == "smoke" else ""
    drawing.suptitle(f"{smoke}{machine_text(content['machine'])}", fontsize=FONT - 1, x=0.01, ha="left")
    set_fonts(drawing)
    for axes in panels.flat:
        axes.tick_params(axis="x", labelsize=FONT - 1)
    return drawing


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the curves; returns the exit code: 0, 2 for bad input, 130 if stopped."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.growth", description=__doc__, formatter_class=raw)
    add_options(parser, "runs/growth")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        options.repetitions = options.repetitions or 3
        run(make_bench(options, lambda text: None), options.output, console)
    except PhilensError as error:
        console.print(f"benchmarks: error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("benchmarks: stopped; what was measured so far is written.", highlight=False)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
