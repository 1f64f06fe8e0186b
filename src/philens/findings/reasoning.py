"""From problems to the findings on reasoning: train what is missing, solve, measure, write.

Either a small model is trained from nothing on arithmetic word problems, one for each seed, and PHi layers in
it; or a model is given, with its PHi layer or one to be trained. Layers at several insertion points read the
same solutions in one pass.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from philens.findings import Results, combine_seeds, use_formula, write_finding
from philens.findings.correctness import measure_correctness, sweep_correctness
from philens.findings.difficulty import measure_difficulty, sweep_difficulty
from philens.findings.sweep import RUN_FOLDER, sweep
from philens.lens.config import MetricOptions
from philens.lens.metrics import CONTROLS
from philens.reasoning.problems import find_prompt, load_problems
from philens.reasoning.rules import check_prefix
from philens.reasoning.sampling import read_rendering, read_solutions, solve
from philens.reasoning.solutions import METRICS, by_insertion_point, measure, reference_solutions
from philens.scoring.score import check_metrics, check_names, options_of, provenance
from philens.support.errors import ConfigError
from philens.support.files import write_atomically
from philens.tasks.rendering import AS_IS
from philens.training.folder import RunFolder
from philens.training.opening import has_layer, open_lens
from philens.training.recipe import load_recipe
from philens.training.source import ModelSource

if TYPE_CHECKING:
    import pandas as pd


logger = logging.getLogger(__name__)

Finding = Literal["difficulty", "correctness"]


@dataclass(frozen=True)
class Scale:
    """What is trained and solved at a scale.

    Attributes:
        recipe: recipe of the PHi layers.
        layers: insertion points.
        problems: how many.
        samples: solutions of each.
        max_new_tokens: most tokens of a solution.
        base: recipe of the base model; a scale without one takes `model`.
        model: the base model to take.
        source: source of the problems.
    """

    recipe: str
    layers: tuple[int, ...]
    problems: int
    samples: int
    max_new_tokens: int
    base: str | None = None
    model: str | None = None
    source: str = "arithmetic"


SCALES = {
    "smoke": Scale("arithmetic_phi_smoke", (0, 1), 40, 8, 48, base="arithmetic_smoke"),
    "small": Scale("arithmetic_phi", (1, 3, 4), 600, 8, 256, base="arithmetic_base"),
    "paper": Scale(
        "llama_3_2_3b", (18,), 1000, 8, 1024, model="meta-llama/Llama-3.2-3B-Instruct", source="math"
    ),
}


@dataclass(frozen=True)
class Choices:
    """What a user may choose: the options of `philens reproduce correctness`; None takes the scale's.

    `layers` and `levels` are numbers, `overrides` keys of the layers' recipe, `metric_options` as
    `MetricOptions.of` takes it. `seed` is that of training, the draw of problems, sampling and the bootstrap;
    the first of several.
    """

    model: str | None = None
    adapter: str | None = None
    layers: Sequence[int] | None = None
    recipe: str | None = None
    overrides: Mapping[str, Any] | None = None
    problems: str | None = None
    split: str = "test"
    limit: int | None = None
    levels: Sequence[int] | None = None
    solutions: Path | None = None
    prompt: str | None = None
    shots: int = 0
    samples: int | None = None
    temperature: float = 1.0
    max_new_tokens: int | None = None
    by: Literal["level", "steps"] | None = None
    kl: Literal["exact", "official"] | None = None
    dtype: str = "auto"
    metrics: Sequence[str] = ()
    metric_options: Mapping[str, Any] | None = None
    prefix: int = 50
    seed: int = 0


def reproduce_reasoning(
    finding: Finding,
    output: Path,
    scale: str | None = None,
    choices: Choices | None = None,
    seeds: int = 1,
) -> Results:
    """Reproduce a finding on reasoning.

    `output/seed-K` holds what was trained, sampled and measured, shared by both findings and used again by
    the next call. `output/FINDING` holds the results: `seeds`, each with `points`, the results at each
    insertion point, and where there are several `sweep`, which compares them; and `spread`, over several
    seeds.

    Args:
        finding: `difficulty` or `correctness`.
        output: folder of all this.
        scale: name of `SCALES`; None means `small`, and `paper` where a model is chosen.
        choices: what differs from the scale.
        seeds: how many models to train and measure.

    Raises:
        ConfigError: an unknown scale, or choices that exclude each other.
        PhilensError: what training, solving and measuring raise.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    chosen = choices or Choices()
    scale = scale or ("small" if chosen.model is None else "paper")
    if scale not in SCALES:
        raise ConfigError(f"There is no scale {scale!r}; scales are {', '.join(SCALES)}.")
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, not {seeds}.")
    if seeds > 1 and (chosen.model is not None or SCALES[scale].base is None):
        raise ConfigError(
            "Several seeds are several models trained from nothing; leave out seeds, or model and adapter."
        )
    found = []
    for number in range(seeds):
        one = replace(chosen, seed=chosen.seed + number)
        table = _measured(finding, output / f"seed-{one.seed}", SCALES[scale], one)
        found.append({"seed": one.seed, **table.attrs, **_find(finding, table, one)})
    return write_reasoning(finding, output / finding, found, {"finding": finding, "scale": scale})


def write_reasoning(
    finding: Finding, folder: Path, seeds: Sequence[dict[str, Any]], run: Mapping[str, Any]
) -> Results:
    """Write the results of each seed with tables and figures; returns them as one."""
    from philens.findings.reasoning_figures import figures
    from philens.findings.reasoning_tables import tables, terminal_tables

    results: dict[str, Any] = {"seeds": list(seeds)}
    if len(seeds) > 1:
        results["spread"] = combine_seeds([one["points"] for one in seeds])
    write_finding(folder, results, tables(finding, seeds), figures(finding, seeds), run)
    return Results({**run, **results}, partial(terminal_tables, finding))


def _find(finding: Finding, table: "pd.DataFrame", choices: Choices) -> dict[str, Any]:
    """The results at each insertion point of a table."""
    by = choices.by or ("level" if np.isfinite(table["level"]).any() else "steps")
    # Columns of a layer alone do not say where it is.
    tables = by_insertion_point(table) or {table.attrs["provenance"]["module_paths"][0]: table}
    one, several = (
        (measure_correctness, sweep_correctness)
        if finding == "correctness"
        else (measure_difficulty, sweep_difficulty)
    )
    points = {point: one(part, by=by, seed=choices.seed) for point, part in tables.items()}
    sweep = several(tables, by, seed=choices.seed) if len(tables) > 1 else None
    return {"points": points, **({"sweep": sweep} if sweep else {})}


def _measured(finding: Finding, folder: Path, scale: Scale, choices: Choices) -> "pd.DataFrame":
    """Measure the solutions that a finding is about; train and sample first what is not there yet."""
    import pandas as pd

    check_names(choices.metrics)
    options = MetricOptions.of(choices.metric_options or {})
    prefix = check_prefix(choices.prefix) if finding == "correctness" else None
    source = choices.problems or scale.source
    limit = choices.limit or (scale.problems if choices.problems is None else None)
    problems = load_problems(source, choices.split, limit, choices.seed, choices.levels)
    prompt = find_prompt(source, choices.prompt, choices.shots, choices.seed, choices.levels)
    model = choices.model or scale.model or _train_base(scale, folder / "base", choices.seed)
    adapter = _adapter(model, folder / "sweep", scale, choices)
    if choices.solutions is not None:
        solutions = read_solutions(choices.solutions, problems)
    elif finding == "difficulty":
        solutions = reference_solutions(problems)
    else:
        solved = solve(
            ModelSource(model, dtype=choices.dtype),
            problems,
            folder / "solutions",
            prompt=prompt,
            samples=choices.samples or scale.samples,
            temperature=choices.temperature,
            max_new_tokens=choices.max_new_tokens or scale.max_new_tokens,
            seed=choices.seed,
        )
        logger.info("%s.", solved)
        solutions = read_solutions(solved.path, problems)
    rendering = AS_IS if choices.solutions is None else read_rendering(choices.solutions)
    source_of_lens = ModelSource(model, adapter, dtype=choices.dtype)
    lens, tokenizer = open_lens(source_of_lens, rendering, options)
    metrics = check_metrics(lens, [*METRICS, *CONTROLS, *choices.metrics])
    use_formula(lens, choices.kl)
    made_with = {
        "model": model,
        "adapter": adapter,
        "problems": source,
        "split": choices.split,
        "prompt": asdict(prompt),
        "solutions": hashlib.sha256(json.dumps([asdict(one) for one in solutions]).encode()).hexdigest(),
        "metrics": metrics,
        "prefix": prefix,
        "provenance": provenance(lens, tokenizer) | options_of(lens, metrics),
    }
    made_with = json.loads(json.dumps(made_with))  # as it comes back from the file
    path = folder / f"{finding}.parquet"
    table = pd.read_parquet(path) if path.is_file() else None
    if table is None or table.attrs != made_with:
        table = measure(lens, tokenizer, solutions, problems, prompt, metrics=metrics, prefix=prefix)
        table.attrs = made_with
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, table.to_parquet)
    return table


def _train_base(scale: Scale, folder: Path, seed: int) -> str:
    """The base model that a scale trains: made if it is not there yet."""
    from philens.findings.reproduce import trained

    trained(load_recipe(scale.base, {"seed": seed}), folder)
    return str(RunFolder(folder).model)


def _adapter(model: str, folder: Path, scale: Scale, choices: Choices) -> str | None:
    """Where the PHi layers are; None: in the run that is the model, or with philens. Trains missing ones."""
    given = choices.adapter
    if given is not None:
        swept = RunFolder(Path(given) / RUN_FOLDER).adapter
        return str(swept) if swept.is_dir() else given
    if has_layer(model):
        return None
    layers, overrides = choices.layers or scale.layers, {**(choices.overrides or {}), "seed": choices.seed}
    if sweep(model, layers, folder, choices.recipe or scale.recipe, overrides) is None:
        raise KeyboardInterrupt
    return str(RunFolder(folder / RUN_FOLDER).adapter)
