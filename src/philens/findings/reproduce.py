"""From a scale to a finding: train what is not trained yet, measure, write."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from philens.findings import Results, combine_seeds, use_formula, write_finding
from philens.findings.complexity import correlation_rows, curve_rows, measure_complexity
from philens.findings.controls import control_rows
from philens.findings.figures import figure_complexity, figure_gain, figure_tasks
from philens.findings.gain import gain_cell_rows, gain_rows, measure_gain
from philens.findings.language_tables import complexity_table, formal_tables, gain_table, tasks_table
from philens.findings.places import score_places, written
from philens.findings.results import contrast_rows, effect_rows, form_rows, kind_rows, measure_results
from philens.findings.results_tables import tables as results_tables
from philens.findings.tasks import INTERESTING, measure_tasks, task_rows
from philens.lens.model import PHiModel, load
from philens.reasoning.problems import find_prompt, load_problems
from philens.scoring.documents import TokenTable, score_documents
from philens.scoring.score import score
from philens.support.errors import ConfigError, InputError
from philens.support.versions import versions
from philens.tasks.automata import TASKS, concatenate, generate
from philens.tasks.results import (
    SENTENCE_KINDS,
    WORKED_EXAMPLE,
    make_questions,
    make_sentences,
    mark_solutions,
)
from philens.training.build import attach_fresh, set_attention
from philens.training.opening import finished_model, load_lens, load_run
from philens.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


logger = logging.getLogger(__name__)

# Documents of each task that are measured, and the recipe, at each scale and architecture.
DOCUMENTS = {"smoke": 16, "small": 200, "paper": 1000}
RECIPES = {
    ("smoke", "transformer"): "smoke",
    ("smoke", "lstm"): "smoke_lstm",
    ("small", "transformer"): "small",
    ("small", "lstm"): "small_lstm",
    ("paper", "transformer"): "transformer_pfa",
    ("paper", "lstm"): "lstm_pfa",
}
# Models that were never trained, which phi is compared with.
UNTRAINED = 3
# One for each template that sentences of results are made by.
FEWEST_SENTENCES = 6
# Findings are measured on documents that neither training nor its evaluations read.
MEASURING_SEED = 2**41


def measure(
    lens: PHiModel, recipe: Recipe, tasks: tuple[str, ...] = TASKS, documents: int = 500
) -> TokenTable:
    """Score fresh documents of some tasks, made as the recipe makes them and cut to its rows."""
    docs = concatenate(
        [generate(recipe.data.tasks, MEASURING_SEED, task, np.arange(documents)) for task in tasks]
    ).cut(recipe.data.length)
    return score_documents(lens, docs)


class FormalFinding(NamedTuple):
    """A finding on formal languages.

    Attributes:
        measure: its results, of scored documents that the recipe's model read, and other phis of their tokens
            by name.
        rows: functions from results to the rows of its CSV files, by their names.
        draw: its figure.
        table: what is printed of it.
        tasks: the languages that it is about.
        share: how many times as many documents as of others are measured of each.
        controlled: whether it compares phi with that of others, which learned nothing.
    """

    measure: Callable[[TokenTable, Recipe, Mapping[str, NDArray[np.float32]]], dict[str, Any]]
    rows: Mapping[str, Callable[[Mapping[str, Any]], list[dict[str, Any]]]]
    draw: Callable[[Mapping[str, Any]], "Figure"]
    table: Callable[[Mapping[str, Any]], "Table"]
    tasks: tuple[str, ...] = TASKS
    share: int = 1
    controlled: bool = False


# Description lengths and gains need more automata than means of tasks do.
FINDINGS = {
    "tasks": FormalFinding(
        lambda table, recipe, _: measure_tasks(table, seed=recipe.seed),
        {"tasks": task_rows},
        *(figure_tasks, tasks_table),
    ),
    "complexity": FormalFinding(
        lambda table, recipe, others: measure_complexity(table, controls=others, seed=recipe.seed),
        {
            "complexity_curves": curve_rows,
            "complexity_correlations": correlation_rows,
            "complexity_controls": control_rows,
        },
        *(figure_complexity, complexity_table, (INTERESTING,), 4, True),
    ),
    "gain": FormalFinding(
        lambda table, recipe, others: measure_gain(
            table, recipe.data.tasks, controls=others, seed=recipe.seed
        ),
        {"gain_cells": gain_cell_rows, "gain_correlations": gain_rows, "gain_controls": control_rows},
        *(figure_gain, gain_table, (INTERESTING,), 4, True),
    ),
}


def find(
    finding: str, lens: PHiModel, recipe: Recipe, documents: int, controls: Sequence[str] = ()
) -> dict[str, Any]:
    """The results of one finding on one model; `controls` are runs whose phi is compared with its."""
    one = FINDINGS[finding]
    table = measure(lens, recipe, one.tasks, one.share * documents)
    others = _others(lens, recipe, controls) if one.controlled else ()
    return one.measure(
        table, recipe, {name: score_documents(other, table.docs).phi for name, other in others}
    )


def _others(lens: PHiModel, recipe: Recipe, runs: Sequence[str]) -> Iterator[tuple[str, PHiModel]]:
    """What phi is compared with, one at a time: an untrained layer in this base, and in untrained ones, all
    calibrated; and other runs."""
    for seed in range(UNTRAINED):
        if not seed:
            yield "untrained_layer", untrained(lens, recipe, seed, base_too=False)
        yield f"untrained_model-{seed}", untrained(lens, recipe, seed, base_too=True)
    for run in runs:
        other, _ = load_run(run)
        prepare(other, lens.config.kl)
        yield run, other


def untrained(lens: PHiModel, recipe: Recipe, seed: int, base_too: bool) -> PHiModel:
    """This model as it was before its first step, drawn from `seed`: its layer, calibrated, and with
    `base_too` its base, which else is the trained one."""
    from philens.training.trainer import calibrate, training_rows

    torch.manual_seed(seed)
    base = type(lens.base)(lens.base.config)
    if not base_too:
        base.load_state_dict(lens.base.state_dict())
    set_attention(base, recipe)
    fresh = attach_fresh(base, recipe)
    calibrate(fresh, training_rows(recipe))
    prepare(fresh, lens.config.kl)
    return fresh


def write(finding: str, folder: Path, results: dict[str, Any], run: dict[str, Any]) -> None:
    """Write one model's results with tables and figures."""
    one = FINDINGS[finding]
    tables = {name: rows(results) for name, rows in one.rows.items()}
    write_finding(folder, results, tables, {finding: one.draw(results)}, run)


def reproduce(
    finding: str,
    scale: str,
    output: Path,
    architecture: str = "transformer",
    model: Path | None = None,
    seeds: int = 1,
    documents: int | None = None,
    kl: Literal["exact", "official"] | None = None,
    overrides: dict[str, Any] | None = None,
    controls: Sequence[str] = (),
) -> Results:
    """Reproduce a finding of the paper.

    `output/seed-K` are training runs, made or resumed as needed and shared by the findings. `output/FINDING`
    holds the results: the first seed's, and with several seeds `seeds`, each one's, and `spread`, over them.

    Args:
        finding: `tasks`, `complexity` or `gain`; the others are in modules of their own. What else is given
            are the options of its command.
        output: folder of runs and results.
        overrides: recipe keys to replace.

    Raises:
        AdapterError: a control is not a finished run.
        ConfigError: an unknown finding or scale, or options that exclude each other.
        KeyboardInterrupt: the user stopped the training; the same call goes on.
    """
    if finding not in FINDINGS:
        raise ConfigError(f"There is no finding {finding!r}; there are {', '.join(FINDINGS)}.")
    if (scale, architecture) not in RECIPES:
        raise ConfigError(
            f"There is no scale {scale!r} for {architecture!r}; scales are {', '.join(DOCUMENTS)}."
        )
    if seeds < 1 or (documents is not None and documents < 2):
        raise ConfigError("seeds must be at least 1 and documents at least 2.")
    if model is not None and (seeds > 1 or overrides):
        raise ConfigError(
            "A finished run has one seed and its own recipe; leave out seeds and recipe keys with model."
        )
    documents = documents or DOCUMENTS[scale]
    every: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for number in range(seeds):
        if model is not None:
            lens, recipe = load_run(model)
        else:
            recipe = load_recipe(RECIPES[scale, architecture], overrides)
            recipe = replace(recipe, seed=recipe.seed + number)
            lens = trained(recipe, output / f"seed-{recipe.seed}")
        prepare(lens, kl)
        every.append(find(finding, lens, recipe, documents, controls))
        runs.append(
            {
                "finding": finding,
                "scale": scale if model is None else recipe.name,
                "seed": recipe.seed,
                "kl": lens.config.kl,
                "versions": versions(),
                "recipe": asdict(recipe),
            }
        )
        if seeds > 1:
            write(finding, output / finding / f"seed-{recipe.seed}", every[-1], runs[-1])
    results = every[0]
    if seeds > 1:
        by_seed = [{"seed": run["seed"], **one} for run, one in zip(runs, every, strict=True)]
        results = {**results, "seeds": by_seed, "spread": combine_seeds(every)}
    write(finding, output / finding, results, runs[0])
    return Results(runs[0] | results, partial(formal_tables, FINDINGS[finding].table))


def trained(recipe: Recipe, folder: Path) -> PHiModel:
    """The model a recipe trains: loaded if its run is finished, else trained or resumed."""
    lens = finished_model(folder, recipe)
    if lens is not None:
        logger.info("Using the finished run in %s.", folder)
        return lens
    from philens.training.trainer import train

    lens = train(recipe, folder, resume=True)
    if lens is None:
        raise KeyboardInterrupt
    return lens


def reproduce_results(
    model: str | Path,
    output: Path,
    adapters: Sequence[str] = (),
    sentences: int = 40,
    problems: str | None = None,
    split: str = "test",
    limit: int = 40,
    kl: Literal["exact", "official"] | None = None,
    seed: int = 0,
    quick: bool = False,
) -> Results:
    """Measure phi where a result is worked out and where a number only comes, and write `output/results`.

    What is given are the options of `philens reproduce results`; each of the adapters is measured on the same
    texts.

    Raises:
        PhilensError: problems, model or layers are missing, damaged or do not fit.
    """
    if sentences < FEWEST_SENTENCES:
        raise ConfigError(
            f"sentences must be at least {FEWEST_SENTENCES}, one for each template, not {sentences}."
        )
    texts = make_sentences(sentences, seed)
    if problems is not None:
        known = problems if problems == "gsm8k" else None
        marked = mark_solutions(load_problems(problems, split, limit, seed), find_prompt(known or "gsm8k"))
        if not marked:
            raise InputError(
                f"No solution of {problems} says where a result was calculated (<<48/2=24>>); give GSM8K's."
            )
        texts += marked
    first, tokenizer = load_lens(str(model), adapters[0] if adapters else None)
    texts += written(first, tokenizer, make_questions(sentences, seed))
    layers, tables, examples, formula = [], [], [], kl
    for adapter, lens in lenses(first, adapters):
        prepare(lens, kl)
        formula = lens.config.kl
        # What the base alone says of the texts is the same for all.
        base_of = tables[0] if tables else None
        for point, table in score_places(lens, tokenizer, texts, base_of, quick).items():
            named = {"adapter": adapter or "", "insertion_point": point}
            layers.append(named | measure_results(table, seed=seed))
            tables.append(table.assign(**named))
        examples = examples or score(
            lens,
            tokenizer,
            [WORKED_EXAMPLE, *(text.text for text in texts[: len(SENTENCE_KINDS) * sentences : sentences])],
            metrics=["phi", "surprisal"],
            names=["a sum worked out", *SENTENCE_KINDS],
        )
    run = {
        "finding": "results",
        "model": str(model),
        "sentences": sentences,
        "problems": problems,
        "quick": quick,
        "seed": seed,
        "kl": formula,
        "versions": versions(),
        "provenance": examples[0].provenance,
    }
    import pandas as pd

    from philens.findings.results_figures import figure_results, figure_tokens
    from philens.show.page import write_scores_page

    figures = {"worked_sum": figure_tokens(examples[0])}
    for number, (layer, table) in enumerate(zip(layers, tables, strict=True), 1):
        places = {str(kind): rows["phi"].to_numpy() for kind, rows in table.groupby("kind")}
        figures["results" if number == 1 else f"results-{number}"] = figure_results(layer, places)  # pyright: ignore[reportArgumentType]
    rows = {"kinds": kind_rows(layers), "forms": form_rows(layers), "contrasts": contrast_rows(layers)}
    rows |= {"effects": effect_rows(layers), "places": pd.concat(tables)}
    write_finding(output / "results", {"layers": layers}, rows, figures, run)
    write_scores_page(output / "results/examples.html", examples, title="Where a result is worked out")
    return Results({**run, "layers": layers}, results_tables)


def lenses(first: PHiModel, adapters: Sequence[str]) -> Iterator[tuple[str | None, PHiModel]]:
    """Each adapter with its lens, in the same base; `first` has the first one."""
    yield adapters[0] if adapters else None, first
    base = first.detach() if len(adapters) > 1 else first.base
    for adapter in adapters[1:]:
        lens = load(base, adapter)
        yield adapter, lens
        lens.detach()


def prepare(lens: PHiModel, kl: Literal["exact", "official"] | None) -> None:
    """Measure with this formula, where computing is fastest."""
    use_formula(lens, kl)
    if torch.accelerator.is_available():
        lens.to(torch.accelerator.current_accelerator())
