"""Insertion points side by side: a PHi layer after each of several blocks of one frozen base.

All are trained at once and share the base's forward pass; each has its own pass through the blocks above it.
Their gradients are clipped together; else each is trained as it would be alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from philens.findings import write_finding
from philens.lens.adapter import save_adapter
from philens.lens.model import PHiModel, attach
from philens.support.columns import column_name
from philens.support.errors import ConfigError
from philens.support.typed import numbers
from philens.support.versions import versions
from philens.training.evaluated import key_of
from philens.training.folder import RunFolder
from philens.training.recipe import load_recipe

logger = logging.getLogger(__name__)

# The training run of all layers, below a sweep's folder.
RUN_FOLDER = "run"
MEASURES = ("phi", "surprisal", "loss_gap", "phi_static", "surprisal_base")


def parse_layers(text: str) -> list[int]:
    """Blocks named as `4,8,12` or, like a range of Python, as `4:28:4`.

    Raises:
        ConfigError: anything else, or none.
    """
    layers = numbers(text)
    if not layers:
        raise ConfigError(
            f"layers must name blocks as 4,8,12 or 4:28:4 (from, to before, step), not {text!r}."
        )
    return layers


def sweep(
    base: str,
    layers: Sequence[int],
    output: Path,
    recipe: str = "any_model",
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train a PHi layer after each of several blocks of a frozen base and compare them.

    `output/run` is the training run; `output/layer-N` is each layer by itself, an adapter in the path;
    `output` holds results.json, sweep.csv, course.csv and a figure. Called again, it goes on. What is
    given are the options of `philens sweep`; a block's number counts from 0, negative from the end.

    Returns:
        The results; None if the user stopped the training.

    Raises:
        PhilensError: as `philens.training.trainer.train`.
    """
    from philens.findings.figures import figure_sweep
    from philens.training.trainer import train

    points = {"phi.layers": list(layers), "phi.mode": "observe", "phi.pressure": "next_token"}
    chosen = load_recipe(recipe, {**(overrides or {}), "model.base": base, **points})
    if not chosen.model.frozen:
        raise ConfigError("A sweep shares one frozen base; leave out model.frozen.")
    lens = train(chosen, output / RUN_FOLDER, resume=True)
    if lens is None:
        return None
    save_each(lens, output)
    results = compare(lens.module_paths, RunFolder(output / RUN_FOLDER).metrics())
    table = [{"insertion_point": path, **values} for path, values in results["points"].items()]
    run = {"base": Path(base).name, "recipe": recipe, "seed": chosen.seed, "versions": versions()}
    tables = {"sweep": table, "course": results["course"]}
    write_finding(output, results, tables, {"sweep": figure_sweep(results)}, run)
    return run | results


def save_each(lens: PHiModel, output: Path) -> None:
    """Save each layer of a lens with several as an adapter of its own, to be put into the path."""
    blocks, layers = lens.config.layers or [], lens.layers
    lens.disable()
    for block, layer in zip(blocks, layers, strict=True):
        one = attach(lens.base, replace(lens.config, layers=None, layer=block, mode="bottleneck"))
        one.disable()
        one.phi.load_state_dict(layer.state_dict())
        one.record = lens.record
        save_adapter(one, output / f"layer-{block}")
    lens.enable()


def compare(paths: Sequence[str], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last evaluation of each insertion point, and the course of all evaluations."""
    evaluations = [record for record in records if key_of(None, "surprisal_base") in record]
    if not evaluations:
        raise ConfigError("The run was never evaluated on held-out text; give data.parts that have some.")

    def values(record: Mapping[str, Any], path: str) -> dict[str, float]:
        shared = {"surprisal_base": record[key_of(None, "surprisal_base")]}
        own = {name: record.get(key_of(None, column_name(name, path))) for name in MEASURES[:-1]}
        return {name: value for name, value in (own | shared).items() if value is not None}

    return {
        "points": {path: values(evaluations[-1], path) for path in paths},
        "course": [
            {"step": record["step"], "insertion_point": path, **values(record, path)}
            for record in evaluations
            for path in paths
        ],
        "collapsed": bool(evaluations[-1].get("collapsed", 0.0)),
    }
