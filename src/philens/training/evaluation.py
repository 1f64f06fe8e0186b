"""What a model in training is measured on: documents that training never reads."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from philens.bases.facts import evaluating
from philens.lens.losses import counted_tokens
from philens.lens.model import PHiModel
from philens.scoring.documents import score_documents
from philens.support.columns import Column, column_name
from philens.tasks.automata import TASKS, generate
from philens.tasks.packing import TokenDocuments, pad
from philens.training.evaluated import Evaluated
from philens.training.recipe import Recipe

# Evaluation reads formal documents that no training stream of any run has.
EVALUATION_SEED = 2**40


def evaluate(
    lens: PHiModel, recipe: Recipe, held_out: dict[str, TokenDocuments], step: int
) -> list[Evaluated]:
    """Means over held-out documents in nats per token: of each part of a text, or of each formal language.

    Args:
        held_out: documents of each part of the text; none where formal languages are read.
    """
    torch.manual_seed(recipe.seed)  # sampled latents are the same in every process
    with torch.compiler.set_stance("force_eager"):
        if recipe.data.parts:
            return evaluate_text(lens, held_out, recipe.train.batch_size, step)
        return evaluate_tasks(lens, recipe, recipe.train.evaluation_documents, step)


def evaluate_tasks(lens: PHiModel, recipe: Recipe, documents: int, step: int = 0) -> list[Evaluated]:
    """Mean phi, mtd and surprisal of each formal language, documents cut to the length of a training row."""
    rows = []
    for task in TASKS:
        docs = generate(recipe.data.tasks, EVALUATION_SEED, task, np.arange(documents))
        table = score_documents(lens, docs.cut(recipe.data.length))
        rows.append(Evaluated(step, task, "surprisal", None, float(np.nanmean(table.surprisal))))
        if table.mtd is not None:
            rows.append(Evaluated(step, task, "mtd", None, float(table.mtd.mean())))
        if lens.enabled and lens.layers:
            for point, phi in zip(lens.column_points, np.atleast_1d(table.phi.mean(0)), strict=True):
                rows.append(Evaluated(step, task, "phi", point, float(phi)))
    return rows


def evaluate_text(
    lens: PHiModel, held_out: dict[str, TokenDocuments], batch_size: int, step: int = 0
) -> list[Evaluated]:
    """Means over the counted tokens of each part, and over those of all parts alike.

    `surprisal_base` of the untouched base; with each layer in the path `surprisal`, `loss_gap` =
    surprisal - surprisal_base, with the pressure distill `divergence` from the base's distribution, `phi`,
    and `phi_static`: what the latents would tell if nothing were predicted, KL(q || N(0, 1)) or Q ln K.
    `sinks` is the share of attention sinks, which are left out of the two phis.
    """
    rows, means = [], defaultdict(list)
    with evaluating(lens):
        for part, documents in held_out.items():
            for column, value in _means_of(lens, documents, batch_size).items():
                rows.append(Evaluated(step, part, column.metric, column.point, value))
                means[column].append(value)
    for column, values in means.items():
        rows.append(Evaluated(step, None, column.metric, column.point, float(np.mean(values))))
    return rows


def _means_of(lens: PHiModel, documents: TokenDocuments, batch_size: int) -> dict[Column, float]:
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    device = next(lens.parameters()).device
    order = np.argsort(documents.lengths, kind="stable")
    for first in range(0, len(order), batch_size):
        rows = pad(documents.select(order[first : first + batch_size]))
        rows = {name: value.to(device) for name, value in rows.items()}
        for name, (value, count) in _batch_sums(lens, rows).items():
            sums[name] += float(value)
            counts[name] += float(count)
    means = {Column(name): value / max(counts[name], 1.0) for name, value in sums.items()}
    for name in [name for name in means if name.metric == "surprisal" and lens.enabled and lens.layers]:
        means[Column(name.of("loss_gap"))] = means[name] - means[Column("surprisal_base")]
    return means


def _batch_sums(lens: PHiModel, rows: dict[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """The sum of each measure, and the number of tokens that it is a sum over."""
    counted, predicted = counted_tokens(rows["labels"], rows["attention_mask"], None)
    output = lens(**rows, returns="states")
    losses = dict(output.losses)
    if lens.enabled and "surprisal_base" not in losses:
        with lens.disabled():
            losses["surprisal_base"] = lens(**rows, returns="states").losses["surprisal"]
    tokens = {True: predicted.sum(), False: counted.sum()}
    sums: dict[str, tuple[Any, Any]] = {}
    for name, value in losses.items():
        count = tokens[name.startswith(("surprisal", "divergence", "mtd"))]
        sums[name] = value * count, count
    for point, layer, found in zip(lens.column_points, lens.layers, output.layer_outputs, strict=False):
        # A sink is one token of a text and not like any other.
        kept = counted & ~found.sinks
        sums[column_name("phi", point)] = found.phi[kept].sum(), kept.sum()
        untold = layer.latents.untold(found.posterior)
        sums[column_name("phi_static", point)] = untold[kept].sum(), kept.sum()
        sums[column_name("sinks", point)] = counted.sum() - kept.sum(), counted.sum()
    return sums
