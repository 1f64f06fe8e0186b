"""What moves phi: layers in one frozen base, trained alike but for one knob; findings 1 and 2 of each.

It says where a finding would be another one, had the layer been trained otherwise.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from philens.findings import Results, statistics, write_finding
from philens.findings.complexity import measure_complexity
from philens.findings.figures import figure_knobs
from philens.findings.gain import measure_gain
from philens.findings.language_tables import knobs_table
from philens.findings.reproduce import measure, prepare, trained, untrained
from philens.findings.tasks import BORING, INTERESTING, measure_tasks
from philens.lens.model import PHiModel
from philens.scoring.documents import TokenTable
from philens.show.estimates import flat_all
from philens.support.errors import ConfigError, RecipeError
from philens.support.typed import shown
from philens.support.versions import versions
from philens.training.folder import RunFolder
from philens.training.recipe import Recipe, check_key, flatten, load_recipe, read_keys

logger = logging.getLogger(__name__)

GRID = Path(__file__).with_name("knobs.yaml")
"""The knobs that are turned unless others are given."""
CORRELATIONS = ("given_surprisal", "given_letters", "gain")
UNTRAINED, COMMON = "untrained", "common"
_OVER = [f"over_{task}" for task in BORING]


class Setting(NamedTuple):
    """One way to train a layer."""

    knob: str  # what differs from the recipe of all
    name: str  # what it is set to
    recipe: Recipe  # the whole of it
    run: str  # name of the run's folder; settings that are the recipe of all share one


def read_settings(grid: Path, recipe: str, overrides: Mapping[str, Any]) -> list[Setting]:
    """The settings of a file of knobs, in its order.

    Raises:
        RecipeError: the file, or a recipe, cannot be read.
        ConfigError: the file holds something else than knobs, or two settings whose runs would have one name.
    """
    common, settings = load_recipe(recipe, {**overrides}), []
    for knob, values in read_keys(grid).items():
        if not isinstance(values, dict) or not all(isinstance(keys, dict) for keys in values.values()):
            raise ConfigError(
                f"{grid} must hold settings by name under {shown(knob)}, each with keys of a recipe, such as "
                f'"first: {{phi.layer: 0}}", not {shown(values)}.'
            )
        for name, keys in values.items():
            where = f"{grid}, {knob} {name}"
            for key in flatten(keys):
                check_key(key, where)
            try:
                one = load_recipe(recipe, {**overrides, **keys})
            except RecipeError as error:
                raise RecipeError(f"{where}: {error}") from error
            if one.phi is None or one.phi.layers is not None:
                raise ConfigError(f"{where}: Only a single PHi layer is measured; set phi.layer.")
            run = COMMON if one == common else re.sub(r"[^\w.-]+", "-", f"{knob}-{name}")
            settings.append(Setting(str(knob), str(name), one, run))
    recipes = {one.run: one for one in settings}
    for one in settings:
        if one.recipe != (other := recipes[one.run]).recipe:
            raise ConfigError(
                f"{grid}: {one.knob} {one.name} and {other.knob} {other.name} would have the same folder, "
                f"{one.run}; name one of them otherwise."
            )
    if not settings:
        raise ConfigError(f"{grid} holds no setting; give knobs with settings by name.")
    return settings


def reproduce_knobs(
    base: str | None,
    output: Path,
    grid: Path = GRID,
    recipe: str = "small_layer",
    documents: int = 100,
    overrides: Mapping[str, Any] | None = None,
) -> Results:
    """Train a layer for each setting of `grid` in one base of formal languages, and measure findings 1 and 2.

    `output/RUN` is each training, made or resumed as needed; `output/knobs` holds the results. What else is
    given are the options of `philens reproduce knobs`.

    Args:
        base: the base, which stays frozen unless a setting says otherwise; None trains one in `output/base`,
            by the recipe `small` without a layer.
        overrides: recipe keys to replace in all.

    Raises:
        ConfigError: too few documents, or the file holds something else than knobs.
        PhilensError: the base, the file or a recipe cannot be read, or as `philens.training.trainer.train`.
        KeyboardInterrupt: the user stopped a training; the same call goes on.
    """
    if documents < 2:
        raise ConfigError(f"documents must be at least 2, not {documents}.")
    own = output / "base"
    every = {**(overrides or {}), "model.base": base or str(RunFolder(own).model)}
    # Before anything is trained.
    common, settings = load_recipe(recipe, every), read_settings(grid, recipe, every)
    if base is None:
        trained(load_recipe("small", {"phi": None, "phi_schedule.start_step": 0}), own)
    runs: dict[str, dict[str, Any]] = {}
    alone: Any = None  # the base without a layer
    # First the recipe of all: whether it works is seen before the others are trained.
    for one in [Setting("", "", common, COMMON), *settings]:
        if one.run in runs:
            continue
        lens = trained(one.recipe, output / one.run)
        if not runs:
            fresh = untrained(lens, common, common.seed, base_too=False)
            with fresh.disabled():
                alone = measure(fresh, common, (INTERESTING,), 4 * documents)
            runs[UNTRAINED] = _read(fresh, common, documents, alone)
        prepare(lens, None)
        runs[one.run] = _read(lens, common, documents, alone)
        logger.info("%s: phi of in-context language %.2f nats.", one.run, runs[one.run]["phi"]["mean"])
    results = {
        "documents": documents,
        "common": COMMON,
        "untrained": runs[UNTRAINED],
        "settings": [
            {"knob": one.knob, "setting": one.name, "run": one.run, **runs[one.run]} for one in settings
        ],
    }
    run = {
        "finding": "knobs",
        "base": Path(every["model.base"]).name,
        "versions": versions(),
        "recipe": asdict(common),
    }
    tables, figures = {"knobs": knob_rows(results)}, {"knobs": figure_knobs(results)}
    write_finding(output / "knobs", results, tables, figures, run)
    return Results(run | results, partial(lambda one: [knobs_table(one)]))


def _read(lens: PHiModel, recipe: Recipe, documents: int, alone: TokenTable) -> dict[str, Any]:
    """Findings 1 and 2 of one layer, and what it costs in surprisal, which the base `alone` has, too."""
    seed: dict[str, Any] = {"seed": recipe.seed}
    tasks = measure_tasks(measure(lens, recipe, (INTERESTING, *BORING), documents), **seed)
    table = measure(lens, recipe, (INTERESTING,), 4 * documents)
    with_layer, without = (statistics.mean(one.surprisal, one.document, **seed) for one in (table, alone))
    complexity = measure_complexity(table, **seed)
    correlations = {
        "given_surprisal": complexity["token_wise"]["whole"]["partial_given_surprisal"],
        "given_letters": complexity["controls"]["phi"]["given_letters"],
    }
    if not recipe.data.tasks.noise_probability:
        gain = measure_gain(table, recipe.data.tasks, **seed)
        correlations["gain"] = gain["correlations"]["given_surprisal_and_position"]
    return {
        "phi": statistics.mean(table.phi, table.document, **seed).as_dict("mean"),
        "surprisal": with_layer.as_dict("mean"),
        "loss_gap": statistics.difference(with_layer, without).as_dict(),
        "ratios": tasks["ratios"],
        "correlations": correlations,
    }


def knob_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of `reproduce_knobs` as rows for a CSV file, one for each setting."""
    every = [{"knob": UNTRAINED, "setting": "", "run": "", **results["untrained"]}, *results["settings"]]
    return [
        {key: one[key] for key in ("knob", "setting", "run")}
        | flat_all(one, ("phi", "surprisal", "loss_gap"))
        | flat_all({f"over_{task}": ratio for task, ratio in one["ratios"].items()}, _OVER)
        | flat_all(one["correlations"], CORRELATIONS)
        for one in every
    ]
