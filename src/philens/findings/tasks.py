"""Finding 1: phi tells interesting tasks from boring ones.

A model does new computation where it must infer a new automaton from the text itself (in-context language),
and not where it recites (memorized sequences), applies what its weights hold (memorized programs), or where
there is nothing to learn (random). Surprisal orders these tasks otherwise: noise is the most surprising.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from philens.findings import statistics
from philens.show.estimates import flat, flat_all
from philens.support.errors import InputError
from philens.tasks.automata import TASKS

if TYPE_CHECKING:
    from philens.scoring.documents import TokenTable

INTERESTING = "in_context_language"
BORING = ("memorized_sequences", "memorized_programs", "random")


def measure_tasks(
    table: "TokenTable", *, resamples: int = statistics.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Mean phi and surprisal (nats per token) of each task in `table`, with 95 % intervals over documents.

    phi is averaged over every token; surprisal over those that have one, all but each document's first
    (`tokens_without_surprisal`). `ratios` hold in-context language's mean phi over each boring task's;
    `separated` says that the two means' intervals do not overlap. `phi_order` and `surprisal_order` name the
    tasks from high to low. `holds` says that in-context language lies above every boring task measured,
    separated, and that surprisal puts these tasks in another order. Raises InputError where there is no phi.
    """
    if not np.isfinite(table.phi).any():
        raise InputError("There is no token with a phi; score documents with the PHi layer enabled.")
    task_of_token = table.docs.task[table.document]
    phi: dict[str, statistics.Estimate] = {}
    surprisal: dict[str, statistics.Estimate] = {}
    for number, name in enumerate(TASKS):
        rows = task_of_token == number
        if not rows.any():
            continue
        documents = table.document[rows]
        # A seed for each task: equal ones would resample two tasks in step and spoil their ratio's interval.
        options = {"resamples": resamples, "seed": (seed, number)}
        phi[name] = statistics.mean(table.phi[rows], documents, **options)
        surprisal[name] = statistics.mean(table.surprisal[rows], documents, **options)

    ratios = {name: _compare(phi, name) for name in BORING if INTERESTING in phi and name in phi}
    compared = [name for name in (INTERESTING, *BORING) if name in phi]
    orders_differ = _order(phi, compared) != _order(surprisal, compared)
    return {
        "tasks": {
            name: {
                "phi": phi[name].as_dict("mean"),
                "surprisal": surprisal[name].as_dict("mean"),
                "tokens": phi[name].rows,
                "documents": phi[name].documents,
                "tokens_without_surprisal": surprisal[name].dropped,
            }
            for name in phi
        },
        "ratios": ratios,
        "phi_order": _order(phi, list(phi)),
        "surprisal_order": _order(surprisal, list(surprisal)),
        "orders_differ": orders_differ,
        "holds": bool(ratios)
        and orders_differ
        and all(item["separated"] and item["ratio"] > 1 for item in ratios.values()),
        "known_false_positives": _false_positives(phi),
    }


def task_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of `measure_tasks` as rows for a CSV file, one for each task."""
    return [
        {"task": name}
        | flat_all(task, ("phi", "surprisal"))
        | flat("in_context_language_phi_ratio", results["ratios"].get(name), "ratio_")
        | {"tokens": task["tokens"], "documents": task["documents"]}
        for name, task in results["tasks"].items()
    ]


def _compare(phi: Mapping[str, statistics.Estimate], boring: str) -> dict[str, Any]:
    ours, theirs = phi[INTERESTING], phi[boring]
    separated = ours.ci95[0] > theirs.ci95[1] or ours.ci95[1] < theirs.ci95[0]
    return {**statistics.ratio(ours, theirs).as_dict("ratio"), "separated": separated}


def _order(estimates: Mapping[str, statistics.Estimate], names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: estimates[name].value, reverse=True)


def _false_positives(phi: Mapping[str, statistics.Estimate]) -> dict[str, Any]:
    """Copying raises phi above random text's although it computes nothing new: report it, don't hide it."""
    if "copy" not in phi or "random" not in phi:
        return {}
    against = statistics.ratio(phi["copy"], phi["random"]).as_dict("ratio")
    return {"copy": {**against, "over": "random", "note": "copying is known to raise phi"}}
