"""Finding 4: among a model's own solutions of a problem, the right ones have the higher phi.

Which of a right and a wrong solution to the same problem does a rule pick? All such pairs count, those of one
problem together as much as any other problem's; equal scores are half a right choice. Intervals resample
problems. Paper (arXiv 2503.13431): on MATH, sampled from Llama 3.2 3B Instruct, the higher phi is right in 54
to 57 % of pairs by level, and in 50 to 62 % of the counter-intuitive ones; a later study by the same group
found a sister metric pointing the other way. So sign and size are reported as measured.

Counter-intuitive pairs are those whose lower-surprisal solution is wrong. Any metric that goes up with
surprisal picks right there more often than not, and wrong in all others (`intuitive`), by this selection
alone. `balanced` is the mean of both: there surprisal itself is at 50 % by construction, and what merely
follows it is near that (somewhat below where surprisal tells right from wrong, as its differences are then
larger in intuitive pairs). What phi says beyond surprisal is in the partial correlations, and in what it adds
to the combination of the other metrics.

Pooled correlations also take in that some problems are harder: there phi may be higher and solutions more
often wrong. Those within levels hold the level fixed, as the paper does; those within problems the problem.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

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
from philens.reasoning.rules import PREFIX, STATISTICS, Rule, best_half
from philens.show.estimates import flat, flat_all
from philens.support.columns import Column
from philens.support.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

RULES = (
    "highest_phi",
    "lowest_phi",
    "lowest_surprisal",
    "lowest_entropy",
    "shortest",
    "highest_phi_sum",
    "highest_phi_max",
    "highest_phi_last_fifth",
)  # and the highest of each control
COMBINED = ("phi_mean", "surprisal_mean", "entropy_mean", "log_tokens")
LOGISTIC, WITHOUT_PHI = "logistic", "logistic_without_phi"
SUBSETS = ("all", "counterintuitive", "intuitive", "balanced")
# The numbers that the claim and sweeps rest on, and what each would be if phi had nothing to do with right
# and wrong; the partial correlation is within levels.
HEADLINE = {
    "choice": 0.5,
    "counterintuitive": 0.5,
    "partial_given_surprisal": 0.0,
    "balanced": 0.5,
    "within_given_surprisal_and_length": 0.0,
}
CLAIM = ("choice", "counterintuitive", "partial_given_surprisal")

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


def measure_correctness(
    table: "pd.DataFrame",
    *,
    rules: Sequence[str] | None = None,
    by: str = "level",
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """How phi goes with right and wrong among solutions of the same problems.

    `counts` and `listed`: of `usable`, and problems whose solutions are all right or all wrong, which have
    no pair. `headline`: the numbers of `HEADLINE`, phi being the mean per token, each with the `side` of
    chance that its interval lies on. `holds`: the highest phi is right more often than not, also in
    counter-intuitive pairs, and phi goes up with being right given surprisal, each with its interval.
    `choice`: accuracy of each rule and of two logistic combinations, with phi and without, for all pairs,
    the counter-intuitive, the intuitive, and balanced over these two; pairs of equal surprisal are in `all`
    alone. `added_by_phi`: the one combination minus the other, pair by pair. `logistic`: their weights per
    standard deviation. `partial`: correlations of metrics with being right, given others (`GIVEN`), over all
    solutions (`pooled`), `within_levels`, and `within_problems` that have both. `selection`: accuracy of
    taking one of all solutions of a problem (`random`: whichever; `majority`: of the most frequent answer;
    `any`: whether one is right) and the `gain` over a random one. `early`, of tables with a prefix: the same
    where a metric of the first tokens keeps the better half of a problem's solutions, highest or lowest:
    share of all tokens that need not have been written (`saved`), and what is right of `random` ones of
    those kept, of their `majority`, and of that with the best mean of the metric (`best`), each with the
    `gain` over the same among all. `levels`: `choice` and `partial` at each
    difficulty. `accuracy`: share of right solutions.

    Args:
        table: one row per solution, of `philens.reasoning.solutions`.
        rules: `highest_COLUMN` or `lowest_COLUMN`; None means `RULES`, and the highest of each control and
            of each other metric of the table.
        by: column of the difficulty, `level` or `steps`.
        resamples: resamples of the bootstrap over problems.
        seed: seed of the bootstrap and of the folds.

    Raises:
        ConfigError: a text that is no rule.
        InputError: no problem has both right and wrong solutions, or the table lacks something.
    """
    solutions = usable(table, ["correct"])
    options = {"resamples": resamples, "seed": seed}
    correct, problems = solutions["correct"], solutions.problems
    share = _share(solutions)
    mixed = (share > 0) & (share < 1)
    counts = solutions.counts
    for name, rows in (("all_right", share == 1), ("all_wrong", share == 0), ("mixed", mixed)):
        counts[name] = len(np.unique(problems[rows]))
    pairs = _pairs(solutions)
    counts["pairs"] = len(pairs[0])
    if rules is None:
        rules = (*RULES, *(f"highest_{name}" for name in (*solutions.controls, *solutions.others)))
    scores = {text: Rule.parse(text).scores(solutions.table) for text in rules}
    logistic = _logistic(solutions, seed) if counts["mixed"] > 1 else {}
    scores |= {name: found.scores for name, found in logistic.items()}
    outcomes = {name: statistics.choices(values, *pairs) for name, values in scores.items()}
    subset = _subset(solutions, pairs)
    headline = claims(_headline(solutions, by, **options), HEADLINE)
    metrics = (*PHI, *BASELINES, *solutions.controls, *solutions.others)
    return {
        "counts": counts,
        "listed": solutions.listed,
        "resampling": {"over": "problems", **options},
        "accuracy": statistics.mean(correct, problems, **options).as_dict(),
        "headline": headline,
        "holds": all(headline[name]["side"] == "above" for name in CLAIM),
        "choice": _choice(outcomes, problems[pairs[0]], subset, **options),
        "logistic": {
            name: {"folds": found.folds, "weights": dict(zip(columns, found.weights.tolist(), strict=True))}
            for (name, found), columns in zip(logistic.items(), (COMBINED, COMBINED[1:]), strict=False)
        },
        "partial": _partial(solutions, mixed, by, metrics, **options),
        "selection": _selection(solutions, scores, **options),
        "early": _early(solutions, **options),
        "by": by,
        "levels": _levels(solutions, mixed, by, pairs, outcomes, subset, **options),
    }


def sweep_correctness(
    tables: "Mapping[str, pd.DataFrame]", by: str = "level", **draws: Unpack[statistics.Draws]
) -> dict[str, Any]:
    """The headline numbers at several insertion points, of one table each; see `compare_points`."""
    points = {point: usable(table, ["correct"]) for point, table in tables.items()}
    return compare_points(points, partial(_headline, by=by), HEADLINE, **draws)


def _share(solutions: Solutions) -> Floats:
    """(N,) the share of right ones among the solutions of the same problem."""
    problems, correct = solutions.problems, solutions["correct"]
    return (np.bincount(problems, correct) / np.maximum(np.bincount(problems), 1))[problems]


def _pairs(solutions: Solutions) -> tuple[Rows, Rows]:
    pairs = statistics.pair_up(solutions["correct"], solutions.problems)
    if not len(pairs[0]):
        right, wrong = (len(np.unique(solutions.problems[_share(solutions) == share])) for share in (1, 0))
        raise InputError(
            f"No problem has both right and wrong solutions ({right:,} have only right ones, {wrong:,} only "
            "wrong ones); sample more of each, at a higher temperature, or take problems of another "
            "difficulty."
        )
    return pairs


def _subset(solutions: Solutions, pairs: tuple[Rows, Rows]) -> Floats:
    """(pairs,) 1 where the lower surprisal is wrong (counter-intuitive), 0 where right, NaN where equal."""
    wrong = statistics.choices(solutions["surprisal_mean"], *pairs)
    return np.where(wrong == 0.5, np.nan, wrong)


def _headline(solutions: Solutions, by: str, **options: Any) -> dict[str, Estimate]:
    phi, correct, problems = solutions["phi_mean"], solutions["correct"], solutions.problems
    held, pairs = solutions.given(), _pairs(solutions)
    outcome, of_pair, subset = statistics.choices(phi, *pairs), problems[pairs[0]], _subset(solutions, pairs)
    against = subset == 1
    mixed = np.isin(problems, of_pair)
    strictest = [column[mixed] for column in held["surprisal_and_length"]]
    return {
        "choice": statistics.mean_of_means(outcome, of_pair, **options),
        "counterintuitive": statistics.mean_of_means(outcome[against], of_pair[against], **options),
        "partial_given_surprisal": statistics.correlation(
            phi, correct, problems, [*held["surprisal"], *_at_level(solutions, by)], **options
        ),
        "balanced": statistics.mean_of_means(outcome, of_pair, subset, **options),
        "within_given_surprisal_and_length": statistics.correlation(
            phi[mixed], correct[mixed], problems[mixed], strictest, within=True, **options
        ),
    }


def _choice(
    outcomes: Mapping[str, Floats], problems: NDArray, subset: Floats, **options: Any
) -> dict[str, Any]:
    """Accuracy of each rule in each subset of the pairs, and what phi adds to the combination there."""
    cells = {
        "all": (np.ones(len(subset), dtype=bool), None),
        "counterintuitive": (subset == 1, None),
        "intuitive": (subset == 0, None),
        "balanced": (np.isfinite(subset), subset),
    }
    found = {}
    for name, (rows, parts) in cells.items():
        of_pair, part = problems[rows], None if parts is None else parts[rows]
        estimates = {
            rule: statistics.mean_of_means(values[rows], of_pair, part, **options)
            for rule, values in outcomes.items()
        }
        found[name] = {"pairs": int(rows.sum()), "problems": len(np.unique(of_pair))}
        found[name]["rules"] = {rule: one.as_dict("accuracy") for rule, one in estimates.items()}
        if LOGISTIC in outcomes:
            added = (outcomes[LOGISTIC] - outcomes[WITHOUT_PHI])[rows]
            found[name]["added_by_phi"] = statistics.mean_of_means(added, of_pair, part, **options).as_dict()
    return found


def _logistic(solutions: Solutions, seed: int) -> dict[str, statistics.Combination]:
    columns = [*(solutions[name] for name in COMBINED[:-1]), np.log(solutions["tokens"])]
    return {
        name: statistics.combine_columns(chosen, solutions["correct"], solutions.problems, seed=seed)
        for name, chosen in ((LOGISTIC, columns), (WITHOUT_PHI, columns[1:]))
    }


def _at_level(solutions: Solutions, by: str) -> list[Floats]:
    """For each level (N,) 1 for its solutions and 0 for others; as covariates they hold the level fixed."""
    if by not in solutions.table:
        return []
    levels = np.nan_to_num(solutions[by], nan=-1)
    return [(levels == level).astype(np.float64) for level in np.unique(levels)]


def _partial(
    solutions: Solutions, mixed: Mask, by: str | None, columns: Sequence[str], **options: Any
) -> dict[str, Any]:
    """Correlations with being right: of phi given each of `GIVEN`, of other columns given nothing."""
    kinds: dict[str, tuple[Solutions, dict[str, Any]]] = {"pooled": (solutions, {})}
    if by is not None:
        kinds["within_levels"] = solutions, {"fixed": _at_level(solutions, by)}
    kinds["within_problems"] = solutions.where(mixed), {"within": True}
    found: dict[str, dict[str, Any]] = {}
    for kind, (here, how) in kinds.items():
        found[kind] = dict(here.size())
        for column in columns:
            given = GIVEN if column in PHI else GIVEN[:1]
            found[kind][column] = correlate(here, column, here["correct"], given, **how, **options)
    return found


def _selection(solutions: Solutions, scores: Mapping[str, Floats], **options: Any) -> dict[str, Any]:
    """Accuracy of one solution per problem, taken by the highest score; of equal ones, any."""
    problems = np.unique(solutions.problems, return_inverse=True)[1]
    correct, sizes = solutions["correct"], np.bincount(problems)
    scores = {"random": np.zeros(len(problems)), "any": correct, **scores}
    if "answer" in solutions.table:
        scores["majority"] = _votes(solutions.table["answer"], problems)
    picked = {name: _picked(column, problems, correct) for name, column in scores.items()}
    every = np.arange(len(sizes))
    return {
        "problems": len(sizes),
        "samples_per_problem": {"fewest": int(sizes.min()), "most": int(sizes.max()), "mean": sizes.mean()},
        "rules": {
            name: {
                **statistics.mean(found, every, **options).as_dict("accuracy"),
                "gain": statistics.mean(found - picked["random"], every, **options).as_dict(),
            }
            for name, found in picked.items()
        },
    }


def _picked(scores: Floats, problems: Rows, correct: Floats) -> Floats:
    """(problems,) the share of right ones among those of a problem with the highest score."""
    values = np.nan_to_num(scores, nan=-np.inf)
    best = np.full(problems.max() + 1, -np.inf)
    np.maximum.at(best, problems, values)
    chosen = values == best[problems]
    return np.bincount(problems[chosen], correct[chosen]) / np.bincount(problems[chosen])


def _early(solutions: Solutions, **options: Any) -> dict[str, Any]:
    """Accuracy of choosing among the half of a problem's solutions that the first tokens speak for."""
    columns = [Column(str(name), STATISTICS) for name in solutions.table]
    metrics = [name.metric for name in columns if name.statistic == PREFIX and name.metric != "tokens"]
    if not metrics:
        return {}
    problems = np.unique(solutions.problems, return_inverse=True)[1]
    correct, tokens, first = (solutions[name] for name in ("correct", "tokens", f"tokens_{PREFIX}"))
    every = np.arange(problems.max() + 1)
    rules = [Rule.parse(f"{direction}_{metric}") for metric in metrics for direction in ("highest", "lowest")]
    found = {}
    for rule in rules:
        kept = best_half(rule.of_prefix.scores(solutions.table), problems)
        unwritten = statistics.mean(np.where(kept, 0, tokens - first), problems, **options)
        saved = statistics.ratio(unwritten, statistics.mean(tokens, problems, **options))
        found[rule.name] = {"saved": saved.as_dict()}
        for ending, scores in _endings(solutions, rule, problems).items():
            before = _picked(scores(np.ones_like(kept)), problems, correct)
            after = _picked(np.where(kept, scores(kept), -np.inf), problems, correct)
            found[rule.name][ending] = {
                **statistics.mean(after, every, **options).as_dict("accuracy"),
                "gain": statistics.mean(after - before, every, **options).as_dict(),
            }
    return {"prefix": int(first.max()), "problems": len(every), "rules": found}


def _endings(solutions: Solutions, rule: Rule, problems: Rows) -> dict[str, Callable[[Mask], Floats]]:
    """What chooses in the end: scores of all solutions, (N,), of which some, (N,), are still there."""
    endings: dict[str, Callable[[Mask], Floats]] = {"random": lambda kept: np.zeros(len(kept))}
    if "answer" in solutions.table:
        answers = solutions.table["answer"]
        endings["majority"] = lambda kept: _votes(answers.where(kept), problems)
    return endings | {"best": lambda _: rule.scores(solutions.table)}


def _votes(answers: Any, problems: Rows) -> Floats:
    """(N,) how many solutions of the same problem have the same answer; one not found has no vote."""
    import pandas as pd

    codes, names = pd.factorize(answers.astype("string").str.strip())
    cells = problems * (len(names) + 1) + codes + 1
    return np.where(codes < 0, 0.0, np.bincount(cells)[cells])


def _levels(
    solutions: Solutions,
    mixed: Mask,
    by: str,
    pairs: tuple[Rows, Rows],
    outcomes: Mapping[str, Floats],
    subset: Floats,
    **options: Any,
) -> dict[str, Any]:
    """Accuracy, choices and correlations of the problems of each level; those without one are in none."""
    if by not in solutions.table:
        return {}
    levels, of_pair = solutions[by], solutions.problems[pairs[0]]
    found = {}
    for level in np.unique(levels[np.isfinite(levels)]):
        rows, chosen = levels == level, levels[pairs[0]] == level
        here = solutions.where(rows)
        of_level = {name: values[chosen] for name, values in outcomes.items()}
        found[f"{level:g}"] = {
            **here.size(),
            "accuracy": statistics.mean(here["correct"], here.problems, **options).as_dict(),
            "choice": _choice(of_level, of_pair[chosen], subset[chosen], **options),
            "partial": _partial(here, mixed[rows], None, ["phi_mean"], **options),
        }
    return found


def choice_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of `measure_correctness` as rows for a CSV file, over all levels and of each."""
    return [
        {"level": level, "pairs_of": subset, "rule": rule}
        | flat("accuracy", accuracy)
        | {"pairs": cell["pairs"], "problems": cell["problems"]}
        for level, found in {"all": results, **results["levels"]}.items()
        for subset, cell in found["choice"].items()
        for rule, accuracy in cell["rules"].items()
    ]


def partial_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The correlations of `measure_correctness` as rows for a CSV file, over all levels and of each."""
    return [
        {"level": level, "kind": kind, "metric": column, "given": given}
        | flat("correlation", value)
        | {"samples": cell["samples"], "problems": cell["problems"]}
        for level, found in {"all": results, **results["levels"]}.items()
        for kind, cell in found["partial"].items()
        for column, held in cell.items()
        if isinstance(held, Mapping)
        for given, value in held.items()
    ]


def selection_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The selections of `measure_correctness` as rows for a CSV file."""
    selection = results["selection"]
    return [
        {"rule": rule} | flat("accuracy", one) | flat_all(one) | {"problems": selection["problems"]}
        for rule, one in selection["rules"].items()
    ]


def early_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Choosing early in `measure_correctness` as rows for a CSV file."""
    early = results["early"]
    return [
        {"rule": rule, "prefix": early["prefix"], **flat("saved", found["saved"]), "ending": ending}
        | flat("accuracy", right)
        | flat_all(right)
        | {"problems": early["problems"]}
        for rule, found in early.get("rules", {}).items()
        for ending, right in found.items()
        if ending != "saved"
    ]
