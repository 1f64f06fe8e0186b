"""Does phi follow, token by token, what there is to learn?

An ideal learner (`philens.tasks.learner`) reads the same in-context language and says of each letter how much
it tells about the language: its information gain. That needs no model and no description length, and differs
from letter to letter, where description length is one number for a whole document.

Correlations are of ranks, as gains are skewed: most letters tell nothing, a few tell nats. Beside them
stand those of the values themselves.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics
from philens.findings.complexity import mean_of_cell
from philens.findings.controls import different_letters, measure_controls
from philens.findings.tasks import INTERESTING
from philens.show.estimates import flat
from philens.support.errors import InputError
from philens.tasks.automata import TASKS, TaskConfig
from philens.tasks.learner import read_ideally

if TYPE_CHECKING:
    from philens.scoring.documents import TokenTable

Floats = NDArray[np.float64]


def measure_gain(
    table: "TokenTable",
    config: TaskConfig,
    *,
    depth: int = 3,
    bins: int = 4,
    controls: Mapping[str, NDArray[np.floating]] | None = None,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """How phi goes with an ideal learner's information gain (nats) in the in-context language of `table`.

    `correlations`, of ranks unless they say `linear`: of phi with gain (`spearman`), of surprisal with gain
    (the baseline), and of phi with gain where surprisal is held fixed; position, too; the learner's own
    surprisal, too, of which a model's is an uncertain measure; and the gains of the letters before and after,
    too, without which a letter may only lie where much is to be learned. `description_length_given_gain` asks
    what description length still says when surprisal, position and gain are held fixed. `cells` is mean phi
    by quarters of surprisal and, in each, of gain. Intervals resample documents. `holds` says that the
    partial correlation given all that lies above zero with its interval.

    `controls` (`measure_controls`) has the rank correlation with gain given surprisal and position of
    `controls`, other phis (N,) of the same tokens by name; the harder one is that of `holds`.

    Raises:
        InputError: fewer than two documents of in-context language.
        ConfigError: documents with noise.
    """
    documents = np.flatnonzero(table.docs.task == TASKS.index(INTERESTING))
    if len(documents) < 2:
        raise InputError(f"Gain needs at least two scored documents of {INTERESTING}; generate more of them.")
    docs = table.docs.select(documents)
    rows = np.isin(table.document, documents)
    phi, surprisal = (values[rows].astype(np.float64) for values in (table.phi, table.surprisal))
    document = np.repeat(np.arange(len(docs)), docs.lengths)
    learners, gain = read_ideally(docs, config, depth)
    position = np.arange(len(gain)) - docs.offsets[document].astype(np.float64)
    length = docs.description_length[document]
    before, after = (_neighbour(gain, document, step) for step in (-1, 1))
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}

    def partial(x: Floats, y: Floats, *fixed: Floats, rank: bool = True) -> dict[str, Any]:
        return statistics.correlation(x, y, document, fixed, rank=rank, **options).as_dict()

    placed = surprisal, position
    found = {
        "spearman": partial(phi, gain),
        "spearman_of_surprisal": partial(surprisal, gain),
        "given_surprisal": partial(phi, gain, surprisal),
        "given_surprisal_and_position": partial(phi, gain, *placed),
        "given_learners_surprisal": partial(phi, gain, *placed, learners),
        "given_neighbours": partial(phi, gain, *placed, learners, before, after),
        "linear_given_surprisal": partial(phi, gain, surprisal, surprisal**2, rank=False),
        "description_length_given_surprisal": partial(phi, length, *placed),
        "description_length_given_gain": partial(phi, length, *placed, gain),
    }
    usable = np.isfinite(phi) & np.isfinite(surprisal) & np.isfinite(gain)
    low = found["given_neighbours"]["ci95"][0]
    return {
        "task": INTERESTING,
        "tokens": int(usable.sum()),
        "documents": len(np.unique(document[usable])),
        "depth": depth,
        "surprisal": {
            "model": float(surprisal[usable].mean()),
            "learner": float(learners[usable].mean()),
        },
        "gain": float(gain[usable].mean()),
        "correlations": found,
        "controls": measure_controls(
            phi,
            gain,
            document,
            {name: values[rows].astype(np.float64) for name, values in (controls or {}).items()},
            placed,
            [*placed, learners, before, after],
            surprisal=surprisal,
            position=position,
            letters=different_letters(docs),
            rank=True,
            **options,
        ),
        "cells": _cells(phi[usable], surprisal[usable], gain[usable], document[usable], bins, options),
        "holds": low is not None and low > 0,
    }


def gain_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The correlations of `measure_gain` as rows for a CSV file."""
    return [{"correlation": name} | flat("value", one, "") for name, one in results["correlations"].items()]


def gain_cell_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean phi by surprisal and gain as rows for a CSV file."""
    return [cell | flat("phi", cell["phi"]) for cell in results["cells"]]


def _neighbour(values: Floats, document: NDArray[np.int64], step: int) -> Floats:
    """The value `step` tokens on in the same document; 0, nothing learned, where there is none or a space."""
    moved = np.roll(values, -step)
    inside = np.roll(document, -step) == document
    return np.where(inside & np.isfinite(moved), moved, 0.0)


def _cells(
    phi: Floats,
    surprisal: Floats,
    gain: Floats,
    document: NDArray[np.int64],
    bins: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Mean phi in bins of surprisal and, within each, of gain (quantiles over tokens)."""
    cells = []
    edges, outer = statistics.quantile_bins(surprisal, bins)
    for number in range(len(edges) - 1):
        inside = outer == number
        inner_edges, inner = statistics.quantile_bins(np.where(inside, gain, np.nan), bins)
        for step in range(len(inner_edges) - 1):
            chosen = inner == step
            if chosen.any():
                cell = {"surprisal_low": float(edges[number]), "surprisal_high": float(edges[number + 1])}
                cell |= {"surprisal": float(surprisal[chosen].mean()), "gain": float(gain[chosen].mean())}
                cells.append(cell | mean_of_cell(phi[chosen], document[chosen], options))
    return cells
