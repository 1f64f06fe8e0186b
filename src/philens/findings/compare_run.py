"""`philens compare`: adapters on one base to scores, what each costs, results, figures and a page."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from philens.bases.facts import evaluating
from philens.findings import Results, write_finding
from philens.findings.compare import INSTRUMENTS, measure_comparison, of_adapter, token_frame
from philens.findings.compare_tables import compare_tables, result_rows
from philens.findings.reproduce import MEASURING_SEED, lenses
from philens.findings.reproduce_texts import TOKENS, check_reading
from philens.findings.texts import cut_texts, score_texts
from philens.lens.metrics import METRICS, read_batch
from philens.lens.model import PHiModel
from philens.scoring.score import check_metrics
from philens.scoring.scores import TokenScores
from philens.support.columns import column_name
from philens.support.errors import ConfigError
from philens.support.progress import shown
from philens.support.versions import versions
from philens.tasks.automata import TASKS, generate
from philens.tasks.levels import LevelText, load_levels, without_users
from philens.training.folder import RunFolder, adapters_in, place_of
from philens.training.opening import load_lens
from philens.training.recipe import Recipe

# Without any named, those of these that an adapter can have.
METRICS_COMPARED = (*INSTRUMENTS[:3], "surprisal", "surprisal_with_layer", "entropy")
# What is read to know what reading costs, and how often.
COST_TOKENS, REPEATS = 256, 5


def compare(
    model: str,
    adapters: Sequence[str] = (),
    levels: Path | None = None,
    metrics: Sequence[str] | None = None,
    output: Path = Path("compare"),
    documents: int | None = None,
    tokens: int = TOKENS,
    plain: bool = False,
    dtype: str = "auto",
    seed: int = 0,
) -> Results:
    """Read the same texts with several instruments in one base, and write how they differ to `output`.

    A run on formal languages reads documents of its recipe's tasks that no training read; any other model
    levels of text, as `philens reproduce texts` does. What is given are the options of `philens compare`;
    metrics are by default what adapters have of `METRICS_COMPARED`.

    Raises:
        PhilensError: texts, model or adapters are missing, damaged or do not fit.
    """
    check_reading(documents, tokens)
    found = [path for one in adapters for path in (adapters_in(one) or [str(one)])]
    found = list(dict.fromkeys(found or adapters_in(model)))
    first, tokenizer = load_lens(model, found[0] if found else None, dtype=dtype)
    run = RunFolder(model)
    recipe = run.recipe() if run.exists else None
    lengths = None
    if levels is None and recipe is not None and not recipe.data.parts:
        texts, lengths = formal_texts(recipe, documents or 100)
    else:
        texts = load_levels(levels, documents, seed)
        texts = without_users(texts) if plain else texts
    texts = cut_texts(tokenizer, texts, tokens) if tokens else texts
    scores: dict[str, list[TokenScores]] = {}
    costs: list[dict[str, Any]] = []
    for label, (_, lens) in zip(labels(found), lenses(first, found), strict=True):
        wanted = wanted_metrics(lens, metrics, beside=bool(scores))
        scores[label] = list(shown(score_texts(lens, tokenizer, texts, metrics=wanted), label, len(texts)))
        costs += measure_costs(lens, label, scores[label], wanted)
    for name in metrics or ():
        if not any(one["metric"] == name for one in costs):
            raise ConfigError(f"No adapter has {name}; give one that has, or leave it out of --metrics.")
    frame = token_frame(texts, scores, lengths)
    results = measure_comparison(frame, seed=seed) | {"cost": costs}
    about = {
        "finding": "compare",
        "model": str(model),
        "adapters": dict(zip(scores, found or [str(model)], strict=True)),
        "levels_from": None if levels is None else str(levels),
        "tokens_read": tokens or None,
        "seed": seed,
        "versions": versions(),
        "provenance": {label: found[0].provenance for label, found in scores.items()},
    }
    from philens.findings.compare_figures import compare_figures, write_compare_page

    write_finding(output, results, result_rows(results), compare_figures(results), about)
    write_compare_page(output / "page.html", results, texts, next(iter(scores.values())), frame)
    return Results(about | results, compare_tables)


def formal_texts(recipe: Recipe, documents: int) -> tuple[list[LevelText], list[float]]:
    """Documents of each task, made as the recipe makes them, and their description lengths in nats."""
    texts, lengths = [], []
    for task in TASKS:
        docs = generate(recipe.data.tasks, MEASURING_SEED, task, np.arange(documents)).cut(recipe.data.length)
        for number in range(len(docs)):
            characters = docs.tokens[slice(*docs.offsets[number : number + 2])].astype(np.uint8)
            texts.append(LevelText(task, f"{task} {number}", characters.tobytes().decode("ascii")))
        lengths += docs.description_length.tolist()
    return texts, lengths


def labels(adapters: Sequence[str]) -> list[str]:
    """A short name for each adapter that no other has."""
    names = [place_of(adapter).name for adapter in adapters] or ["layer"]
    return names if len(set(names)) == len(names) else [str(adapter) for adapter in adapters]


def wanted_metrics(lens: PHiModel, metrics: Sequence[str] | None, beside: bool) -> list[str]:
    """What is asked of a lens: what it can have, and of the base alone only once.

    Raises:
        InputError: a metric that does not exist, or that the base cannot have, or none that is left.
    """
    chosen = [name for name in METRICS_COMPARED if not lens.supports()[name]] if metrics is None else metrics
    known = [name for name in chosen if name in METRICS]
    impossible = {name for name in known if of_adapter(name) and lens.supports()[name]}
    others = {name for name in known if beside and not of_adapter(name)}
    return check_metrics(lens, [name for name in chosen if name not in impossible | others])


def measure_costs(
    lens: PHiModel, label: str, scores: Sequence[TokenScores], wanted: Sequence[str]
) -> list[dict[str, Any]]:
    """How long each metric takes alone, as a ratio to a plain forward pass of the same base over the same
    batch, one after the other `REPEATS` times: the `median`, and the `lowest` and `highest`."""
    rows = []
    for one in scores:
        rows.append(torch.from_numpy(one.token_ids))
        if sum(map(len, rows)) >= COST_TOKENS:
            break
    device = next(lens.base.parameters()).device
    input_ids = pad_sequence(rows, batch_first=True).to(device)
    real = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    places = real.flatten().nonzero()[:, 0].to(device)

    def forward() -> None:
        with lens.disabled():
            lens(input_ids)

    found = []
    with evaluating(lens):
        forward()
        for metric in wanted:
            ratios = []
            for _ in range(REPEATS):
                plain = _seconds(forward)
                ratios.append(
                    _seconds(lambda name=metric: read_batch(lens, input_ids, places, [name])) / plain
                )
            where = {"metric": metric, "column": column_name(metric, label if of_adapter(metric) else None)}
            spread = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            found.append(where | spread | {"repeats": REPEATS, "tokens": len(places)})
    return found


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start
