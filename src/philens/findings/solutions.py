"""What findings on solutions of problems share: the solutions, covariates, claims, insertion points.

They read the table of `philens.reasoning.solutions.measure`, one row per solution. A metric of a solution is
taken over the tokens of the reply alone: its mean, sum, maximum, and mean over the last fifth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics
from philens.findings.statistics import Estimate
from philens.lens.metrics import CONTROLS as _CONTROLS
from philens.lens.metrics import METRICS
from philens.reasoning.rules import AGGREGATES
from philens.scoring.scores import group_names
from philens.show.estimates import flat_all
from philens.support.columns import Column, column_name
from philens.support.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

PHI = ("phi_mean", "phi_sum", "phi_max", "phi_last_fifth")
BASELINES = ("surprisal_mean", "entropy_mean", "tokens")
CONTROLS = tuple(f"{name}_mean" for name in _CONTROLS)  # a table may lack them
# What is held fixed in a partial correlation. Length is the number of tokens and its logarithm, both at once;
# all else is surprisal, entropy, length and the controls, for tables that have these.
GIVEN = ("nothing", "surprisal", "length", "surprisal_and_length", "all_else")
# Ends of an interval at a high level are far out: there are as many more resamples, up to so many times.
_MORE_RESAMPLES = 10

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Solutions:
    """The solutions of a table that have scores."""

    table: "pd.DataFrame"  # one row each
    problems: NDArray[np.int64]  # (N,) numbered from 0
    counts: dict[str, int]
    listed: dict[str, list[str]]  # solutions that were left out or are worth a look, by id

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, column: str) -> Floats:
        """(N,) a column as numbers."""
        return np.asarray(self.table[column], dtype=np.float64)

    def where(self, rows: Mask) -> "Solutions":
        """Those of the rows where `rows` (N,) is true; counts and lists stay those of all."""
        table: Any = self.table.loc[rows]
        return replace(self, table=table, problems=self.problems[rows])

    def size(self) -> dict[str, int]:
        """How many problems and samples there are."""
        return {"problems": len(np.unique(self.problems)), "samples": len(self)}

    @property
    def controls(self) -> list[str]:
        """Those of `CONTROLS` that the table has."""
        return [name for name in CONTROLS if name in self.table]

    @property
    def others(self) -> list[str]:
        """Columns of metrics beside those of every finding: their means, and what is of groups."""
        known, found = {*PHI, *BASELINES, *CONTROLS}, []
        for name in (Column(str(name), AGGREGATES[:1]) for name in self.table):
            if name.statistic is not None and name.metric in METRICS and name not in known:
                found += [str(name), *group_names(column_name(name.metric, name.point))]
        return found

    def given(self) -> dict[str, list[Floats]]:
        """The variables held fixed, (N,) each, by the names of `GIVEN`."""
        surprisal, length = [self["surprisal_mean"]], [self["tokens"], np.log(self["tokens"])]
        held = dict(zip(GIVEN, ([], surprisal, length, surprisal + length), strict=False))
        if self.controls:
            others = [self[name] for name in ("entropy_mean", *self.controls)]
            held[GIVEN[-1]] = surprisal + length + others
        return held  # pyright: ignore[reportReturnType]


def usable(table: "pd.DataFrame", columns: Sequence[str] = ()) -> Solutions:
    """The solutions that can be compared, counted.

    Solutions without a number in a metric (an empty reply has none) are left out and listed as `unscored`;
    those in which no answer was found stay, as wrong ones, and are listed as `unparsed`.

    Raises:
        InputError: a column is missing, solutions are not graded, or there is no solution left.
    """
    import pandas as pd

    metrics = [*PHI, *BASELINES]
    missing = [name for name in ("problem_id", *metrics, *columns) if name not in table]
    if missing:
        raise InputError(
            f"The table of solutions has no {', '.join(missing)}; make it with philens.reasoning.solutions."
        )
    if "correct" in columns and np.any(pd.isna(table["correct"])):
        raise InputError("Some solutions are not marked right or wrong; grade them first.")
    values = np.asarray(table[metrics], dtype=np.float64)
    scored = np.isfinite(values).all(axis=1) & (values[:, metrics.index("tokens")] > 0)
    if not scored.any():
        raise InputError(f"None of {len(table):,} solutions has scores; give some that are not empty.")
    names = _ids(table)
    listed = {"unscored": list(names[~scored])}
    everything = Solutions(table, pd.factorize(table["problem_id"])[0], {}, listed)
    kept = everything.where(scored)
    counts = {**kept.size(), "tokens": int(kept["tokens"].sum()), "unscored": len(listed["unscored"])}
    if "parsed" in table:
        listed["unparsed"] = list(names[scored & ~np.asarray(table["parsed"], dtype=bool)])
        counts["unparsed"] = len(listed["unparsed"])
    if "finished" in table:  # it is None where solutions come from elsewhere
        counts["unfinished"] = int(np.sum(np.asarray(kept.table["finished"]) == np.False_))
    return replace(kept, counts=counts)


def _ids(table: "pd.DataFrame") -> NDArray[np.object_]:
    names = np.asarray(table["problem_id"], dtype=object)
    samples = table["sample"] if "sample" in table else [None] * len(names)
    pairs = zip(names, samples, strict=True)
    return np.array([f"{name}" if sample is None else f"{name}#{sample}" for name, sample in pairs], object)


def correlate(
    solutions: Solutions,
    column: str,
    target: Floats,
    given: Sequence[str] = GIVEN,
    fixed: Sequence[Floats] = (),
    **options: Any,
) -> dict[str, Any]:
    """Correlations of a column with `target` (N,) given each of `given` and all of `fixed`, over problems."""
    held = solutions.given()
    return {
        name: statistics.correlation(
            solutions[column], target, solutions.problems, [*held[name], *fixed], **options
        ).as_dict()
        for name in given
        if name in held
    }


def claims(
    estimates: Mapping[str, Estimate], chance: Mapping[str, float], level: float | None = None
) -> dict[str, Any]:
    """Each estimate beside what chance gives, and on which `side` of it its interval of `level` lies."""
    found = {}
    for name, estimate in estimates.items():
        low, high = estimate.interval(level or 0.95)
        side = "above" if low > chance[name] else "below" if high < chance[name] else "neither"
        found[name] = estimate.as_dict(level=level) | {"chance": chance[name], "side": side}
    return found


def compare_points(
    points: Mapping[str, Solutions],
    headline: "Callable[..., dict[str, Estimate]]",
    chance: Mapping[str, float],
    **draws: Unpack[statistics.Draws],
) -> dict[str, Any]:
    """The headline numbers of solutions at each insertion point, with intervals that hold all at once.

    Returns `points`: for each its `problems`, `samples` and statistics (`value`, `interval`, `chance`,
    `side`); `comparisons`, their number; `level` of the intervals (Bonferroni: 95 % for all together);
    and `note`, this in a sentence.
    """
    if not points:
        raise InputError("There are no insertion points to compare; give the table of at least one.")
    comparisons = len(points) * len(chance)
    level = statistics.familywise(comparisons)
    resamples = draws.get("resamples", statistics.RESAMPLES) * min(comparisons, _MORE_RESAMPLES)
    options = draws | {"resamples": resamples}
    found = {
        point: solutions.size() | claims(headline(solutions, **options), chance, level)
        for point, solutions in points.items()
    }
    note = (
        f"{len(points)} insertion points with {len(chance)} statistics each are {comparisons} comparisons: "
        f"every interval is at {100 * level:.2f} %, so that all hold together with 95 % (Bonferroni)."
    )
    return {"points": found, "comparisons": comparisons, "level": level, "note": note}


def point_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `compare_points` found as rows for a CSV file, one for each insertion point."""
    return [
        {"insertion_point": point, "problems": found["problems"], "samples": found["samples"]}
        | flat_all(found)
        | {"level": results["level"]}
        for point, found in results["points"].items()
    ]
