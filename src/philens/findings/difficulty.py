"""Finding 5: phi of a solution grows with the difficulty of its problem.

Difficulty is MATH's level, or the number of steps of a GSM8K solution. Correlations are Spearman's, also the
partial ones (of ranks): levels are ordered, no more. Intervals resample problems. Longer solutions, and more
surprising ones, belong to harder problems, so what phi says beyond these stands beside, as do the baselines
by themselves.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from philens.findings import statistics
from philens.findings.solutions import (
    BASELINES,
    GIVEN,
    PHI,
    Solutions,
    claims,
    compare_points,
    correlate,
    usable,
)
from philens.findings.statistics import Estimate
from philens.show.estimates import flat, flat_all
from philens.support.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = (*PHI, *BASELINES)  # and the controls, and metrics that were asked for
# The numbers that the claim and sweeps rest on; the first is the paper's claim.
HEADLINE = dict.fromkeys(["spearman", *(f"partial_given_{name}" for name in GIVEN[1:4])], 0.0)


def measure_difficulty(
    table: "pd.DataFrame",
    by: str = "level",
    *,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """How phi of solutions goes with the difficulty of their problems.

    `counts` and `listed`: of `usable`, and solutions without a difficulty, which are left out. `levels`:
    means of phi (nats per token; `phi_sum` and `phi_max` in nats), surprisal, entropy, tokens and controls
    over the solutions of each level. `spearman`: of each with difficulty. `partial`: of phi, and of metrics
    that were asked for, given others (`GIVEN`). `headline`: the numbers of `HEADLINE`, phi being the mean per
    token, each with the `side` of 0 that its interval lies on. `holds`: phi grows with difficulty
    (`spearman`), with its interval.

    Args:
        table: one row per solution, of `philens.reasoning.solutions`.
        by: column of the difficulty, `level` or `steps`.
        resamples: resamples of the bootstrap over problems.
        seed: seed of the bootstrap.

    Raises:
        InputError: there are fewer than two levels, or the table lacks something.
    """
    solutions = _with_difficulty(table, by)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    difficulty = solutions[by]
    quantities = (*QUANTITIES, *solutions.controls, *solutions.others)
    headline = claims(_headline(solutions, by, **options), HEADLINE)
    levels = {}
    for level in np.unique(difficulty):
        here = solutions.where(difficulty == level)
        levels[f"{level:g}"] = here.size() | {
            name: statistics.mean(here[name], here.problems, **options).as_dict("mean") for name in quantities
        }
    return {
        "by": by,
        "counts": solutions.counts,
        "listed": solutions.listed,
        "resampling": {"over": "problems", **options},
        "headline": headline,
        "holds": headline["spearman"]["side"] == "above",
        "levels": levels,
        "spearman": {
            name: statistics.spearman(solutions[name], difficulty, solutions.problems, **options).as_dict()
            for name in quantities
        },
        "partial": {
            name: correlate(solutions, name, difficulty, GIVEN[1:], rank=True, **options)
            for name in (*PHI, *solutions.others)
        },
    }


def sweep_difficulty(
    tables: "Mapping[str, pd.DataFrame]", by: str = "level", **draws: Unpack[statistics.Draws]
) -> dict[str, Any]:
    """The headline numbers at several insertion points, of one table each; see `compare_points`."""
    points = {point: _with_difficulty(table, by) for point, table in tables.items()}
    return compare_points(points, partial(_headline, by=by), HEADLINE, **draws)


def _with_difficulty(table: "pd.DataFrame", by: str) -> Solutions:
    everything = usable(table, [by])
    known = np.isfinite(everything[by])
    found = everything.where(known)
    levels = len(np.unique(found[by]))
    if levels < 2:
        raise InputError(
            f"Difficulty needs problems with at least two values of {by!r} and these have {levels}; give "
            "more of them, or choose another measure of difficulty."
        )
    unknown = sorted({str(name) for name in everything.where(~known).table["problem_id"]})
    counts = {**everything.counts, **found.size(), "tokens": int(found["tokens"].sum())}
    counts["without_difficulty"] = int(np.sum(~known))
    return replace(found, counts=counts, listed={**everything.listed, "without_difficulty": unknown})


def _headline(solutions: Solutions, by: str, **options: Any) -> dict[str, Estimate]:
    phi, difficulty, held = solutions["phi_mean"], solutions[by], solutions.given()
    return {
        name: statistics.correlation(phi, difficulty, solutions.problems, held[given], rank=True, **options)
        for name, given in zip(HEADLINE, GIVEN, strict=False)
    }


def difficulty_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The levels of `measure_difficulty` as rows for a CSV file."""
    return [
        {results["by"]: level, "problems": found["problems"], "samples": found["samples"]} | flat_all(found)
        for level, found in results["levels"].items()
    ]


def difficulty_correlation_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The correlations of `measure_difficulty` as rows for a CSV file."""
    alone = {name: {GIVEN[0]: item} for name, item in results["spearman"].items()}
    return [
        {"metric": name, "given": given} | flat("spearman", item)
        for found in (alone, results["partial"])
        for name, held in found.items()
        for given, item in held.items()
    ]
