"""The findings on solutions of problems as rows for files and tables for a terminal.

`seeds` are the results of each seed, as `philens.findings.reasoning` makes them: `points`, those at each
insertion point, and `sweep`, which compares several of these.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from philens.findings.correctness import (
    LOGISTIC,
    SUBSETS,
    WITHOUT_PHI,
    choice_rows,
    early_rows,
    partial_rows,
    selection_rows,
)
from philens.findings.difficulty import difficulty_correlation_rows, difficulty_rows
from philens.findings.language_tables import seeds_table
from philens.findings.solutions import BASELINES, GIVEN, PHI, point_rows
from philens.show.estimates import number_text, numbers
from philens.show.terminal import cell, count_of, counts_text, new_table

# Intervals over fewer problems say little.
FEW_PROBLEMS = 20
LABELS = {
    "choice": "highest phi picks right",
    "counterintuitive": "counter-intuitive pairs",
    "partial_given_surprisal": "correlation given surprisal",
    "balanced": "balanced pairs",
    "within_given_surprisal_and_length": "same problem, given surprisal & length",
    "spearman": "correlation (Spearman)",
    "partial_given_length": "correlation given length",
    "partial_given_surprisal_and_length": "correlation given surprisal & length",
    LOGISTIC: "combination",
    WITHOUT_PHI: "combination without phi",
    "phi_untrained_mean": "phi, untrained layer",
    "state_norm_mean": "size of the state",
    "highest_phi_untrained_mean": "highest phi, untrained",
    "highest_state_norm_mean": "largest state",
    "surprisal_and_length": "both",
    "within_levels": "same level",
    "within_problems": "same problem",
    "pooled": "all solutions",
    "any": "any is right",
    "random": "a random one",
    "majority": "majority vote",
}
_SUBSET_LABELS = dict(
    zip(SUBSETS, ("all pairs", "counter-\nintuitive", "intuitive", "balanced"), strict=True)
)
_ROWS: dict[str, dict[str, Callable[[Mapping[str, Any]], list[dict[str, Any]]]]] = {
    "correctness": {
        "choices": choice_rows,
        "correlations": partial_rows,
        "selections": selection_rows,
        "early": early_rows,
    },
    "difficulty": {"levels": difficulty_rows, "correlations": difficulty_correlation_rows},
}


def label(name: str) -> str:
    """A rule, metric or statistic in words."""
    return LABELS.get(name, name.removesuffix("_mean").replace("_", " "))


def tables(finding: str, seeds: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a finding's CSV files by their names, those of all seeds and insertion points together."""
    found = {
        name: [
            {"seed": one.get("seed"), "insertion_point": point, **row}
            for one in seeds
            for point, results in one["points"].items()
            for row in rows(results)
        ]
        for name, rows in _ROWS[finding].items()
    }
    if any("sweep" in one for one in seeds):
        found["sweep"] = [
            {"seed": one.get("seed"), **row}
            for one in seeds
            if "sweep" in one
            for row in point_rows(one["sweep"])
        ]
    return found


def terminal_tables(finding: str, results: Mapping[str, Any]) -> Iterator[Table]:
    """What to print of a finding: the first seed's results at each insertion point, and over seeds."""
    first, several = results["seeds"][0], len(results["seeds"]) > 1
    for point, found in first["points"].items():
        if finding == "difficulty":
            makers = [difficulty_table, difficulty_correlations_table]
        else:
            makers = [correctness_table, correctness_correlations_table, selection_table]
            makers[1:1] = [correctness_levels_table] if found["levels"] else []
            makers += [early_table] if found["early"] else []
        for make in makers:
            yield _named(make(found), f", after {point}" + f", seed {first.get('seed')}" * several)
    if "sweep" in first:
        yield _named(points_table(first["sweep"]), f", seed {first.get('seed')}" * several)
    for point, spread in results.get("spread", {}).items():
        yield _named(headline_spread_table(spread), f", after {point}")


def _named(table: Table, of: str) -> Table:
    table.title = Text(f"{table.title}{of}", style="bold")
    return table


def correctness_table(results: Mapping[str, Any]) -> Table:
    """Choice accuracy of each rule, in percent, over all pairs and in the subsets."""
    counts = results["counts"]
    table = new_table(
        "Choosing the right one of a right and a wrong solution",
        f"Percent, with 95 % intervals over problems; chance is 50. {count_of(counts['pairs'], 'pair')} of "
        f"{count_of(counts['mixed'], 'problem')}, each problem counting once.\n"
        "Counter-intuitive: the wrong solution has the lower surprisal; intuitive: the right one. What goes "
        "along with surprisal is good there and bad here by this selection alone; balanced is the mean of "
        "both.\n" + _exclusions(results) + _verdict(results, "right solutions have the higher phi"),
        *("rule", *_SUBSET_LABELS.values()),
    )
    for rule in results["choice"]["all"]["rules"]:
        cells = [results["choice"][subset]["rules"][rule] for subset in SUBSETS]
        table.add_row(label(rule), *(_percent(cell) for cell in cells))
    return table


def correctness_levels_table(results: Mapping[str, Any]) -> Table:
    """Per level: how many solutions are right, and how phi and surprisal choose."""
    table = new_table(
        f"By {results['by']}",
        "Percent, and correlation of phi with being right given surprisal; 95 % intervals over problems."
        + _few(results["levels"], lambda found: found["choice"]["all"]["problems"]),
        *(f"{results['by']}\npairs", "solved", "highest\nphi", "lowest\nsurprisal"),
        *("phi, counter-\nintuitive", "correlation\nof phi"),
        whole=(True, True),
    )
    for level, found in results["levels"].items():
        choice = found["choice"]
        table.add_row(
            Text(f"{level}\n{choice['all']['pairs']:,}"),
            _percent(found["accuracy"]),
            _percent(choice["all"]["rules"].get("highest_phi")),
            _percent(choice["all"]["rules"].get("lowest_surprisal")),
            _percent(choice["counterintuitive"]["rules"].get("highest_phi")),
            cell(found["partial"]["pooled"]["phi_mean"]["surprisal"]),
        )
    return table


def correctness_correlations_table(results: Mapping[str, Any]) -> Table:
    """Correlations of metrics with being right: over all solutions, of one level, of one problem."""
    table = new_table(
        "Correlation with being right",
        "Given others as the columns say, with 95 % intervals over problems. Solutions of different problems "
        "differ in difficulty too; those of the same level or problem do not, or less."
        + _ALL_ELSE
        * ("all_else" in results["partial"]["pooled"]["phi_mean"]),
        *_GIVEN_COLUMNS,
    )
    for kind, found in results["partial"].items():
        table.add_row(Text(label(kind), style="bold"))
        rows = [name for name, held in found.items() if isinstance(held, Mapping)]
        for name in rows:
            _add_correlations(table, name, found[name], end_section=name == rows[-1])
    return table


def selection_table(results: Mapping[str, Any]) -> Table:
    """How often one solution of each problem, taken by a rule, is right."""
    selection = results["selection"]
    samples = selection["samples_per_problem"]
    table = new_table(
        "Taking one of all solutions of a problem",
        f"Percent right, with 95 % intervals over {count_of(selection['problems'], 'problem')} of "
        f"{counts_text([samples['fewest'], samples['most']], 'solutions')}; gain: over a random one.",
        *("rule", "right", "gain"),
        whole=(True, True),
    )
    for rule, found in selection["rules"].items():
        table.add_row(
            label(rule),
            _percent(found, " "),
            _percent(found["gain"], " "),
        )
    return table


def early_table(results: Mapping[str, Any]) -> Table:
    """How often what is chosen is right where first tokens keep half of a problem's solutions."""
    early, selection = results["early"], results["selection"]
    table = new_table(
        f"Choosing early: the better half by the first {early['prefix']} tokens",
        "Percent right, with 95 % intervals over problems, of a random one of those kept, of their majority, "
        "and of the one that is best by the same metric over all its tokens. Saved: tokens of the others "
        "that need not have been written, in percent of all.",
        *("kept", "tokens saved", *map(label, ("random", "majority")), "the best one"),
        whole=(True, True),
    )
    everything = [selection["rules"].get(name) for name in ("random", "majority")]
    table.add_row("all", "", *(_percent(found) for found in everything), end_section=True)
    for rule, found in early["rules"].items():
        endings = [found.get(name) for name in ("random", "majority", "best")]
        table.add_row(
            label(rule),
            _percent(found["saved"]),
            *(_percent(one) for one in endings),
        )
    return table


def difficulty_table(results: Mapping[str, Any]) -> Table:
    """Per level: phi, surprisal, entropy and length of solutions."""
    names = ("phi_mean", "phi_sum", *BASELINES)
    table = new_table(
        f"Solutions by {results['by']}",
        "Means over solutions with 95 % intervals over problems; nats per token, phi sum in nats.\n"
        + _exclusions(results)
        + _verdict(results, "phi grows with difficulty")
        + _few(results["levels"], lambda found: found["problems"]),
        *(f"{results['by']}\nproblems", *map(label, names)),
        whole=(True, True),
    )
    for level, found in results["levels"].items():
        table.add_row(Text(f"{level}\n{found['problems']:,}"), *(_cell(found[name]) for name in names))
    return table


def difficulty_correlations_table(results: Mapping[str, Any]) -> Table:
    """Spearman's correlations of metrics with difficulty, alone and given others."""
    table = new_table(
        f"Spearman's correlation with {results['by']}",
        "Given others as the columns say (of ranks), with 95 % intervals over problems."
        + _ALL_ELSE * ("all_else" in results["partial"]["phi_mean"]),
        *_GIVEN_COLUMNS,
    )
    for name, alone in results["spearman"].items():
        _add_correlations(table, name, {GIVEN[0]: alone, **results["partial"].get(name, {})})
    return table


_GIVEN_COLUMNS = ("", *(f"given\n{label(given)}" for given in GIVEN[:-1]))
_ALL_ELSE = (
    "\nAll else: surprisal, entropy, length, phi of a layer that was never trained, and the size of the "
    "hidden state."
)


def _add_correlations(table: Table, name: str, found: Mapping[str, Any], end_section: bool = False) -> None:
    """A row, and one more below phi with all else held fixed."""
    below = name == PHI[0] and GIVEN[-1] in found
    cells = [cell(found.get(given)) for given in GIVEN[:-1]]
    table.add_row(label(name), *cells, end_section=end_section and not below)
    if below:
        table.add_row(f"{label(name)}, given all else", cell(found[GIVEN[-1]]), end_section=end_section)


def points_table(sweep: Mapping[str, Any]) -> Table:
    """The headline numbers at each insertion point, with the intervals that hold all at once."""
    headings = ("", "value", f"{100 * sweep['level']:.2f} % interval", "chance")
    table = new_table("Insertion points", sweep["note"], *headings, whole=(True, True))
    points = sweep["points"]
    for name in headline_names(sweep):
        table.add_row(Text(label(name), style="bold"))
        for number, (point, found) in enumerate(points.items(), start=1):
            item = found[name]
            low, high = item["interval"]
            table.add_row(
                Text(point),
                number_text(item["value"], 3),
                Text("" if low is None else f"[{low:z.3f}, {high:z.3f}]"),
                "" if item["side"] == "neither" else item["side"],
                end_section=number == len(points),
            )
    return table


def headline_spread_table(spread: Mapping[str, Any]) -> Table:
    """What `philens.findings.combine_seeds` made of either finding's headline numbers."""
    found = {label(name): item["value"] for name, item in spread["headline"].items() if item.get("value")}
    return seeds_table("Over seeds", spread, {"": found})


def _cell(estimate: Mapping[str, Any] | None) -> Text:
    """A number with its interval, two digits after the point of small ones and fewer of large ones."""
    value = numbers(estimate)[0]
    return cell(estimate, int(np.clip(2 - np.floor(np.log10(abs(value or 1))), 0, 2)))


def _percent(estimate: Mapping[str, Any] | None, between: str = "\n") -> Text:
    return cell(estimate, 1, 100, between)


def _exclusions(results: Mapping[str, Any]) -> str:
    """What was left out and why, in a sentence or none."""
    counts = results["counts"]
    texts = {
        "all_right": "problems have only right solutions and no pair",
        "all_wrong": "problems have only wrong solutions and no pair",
        "unscored": "empty solutions left out",
        "without_difficulty": "solutions without a difficulty left out",
        "unparsed": "solutions without a readable answer count as wrong",
        "unfinished": "solutions were cut at the length given",
    }
    if "pairs" not in counts:
        texts["unparsed"] = "solutions have no readable answer"
    found = [f"{counts[name]:,} {text}" for name, text in texts.items() if counts.get(name)]
    return "; ".join(found).capitalize() + ".\n" if found else ""


def _verdict(results: Mapping[str, Any], claim: str) -> str:
    headline = results["headline"]
    words = {"above": "above chance", "below": "below chance", "neither": "not distinguishable from chance"}
    sides = [
        f"{label(name)} {number_text(item['value'], 3)} ({words[item['side']]})"
        for name, item in headline.items()
    ]
    verdict = f"The claim that {claim} {'holds' if results['holds'] else 'does not hold'} here"
    return f"{verdict}: {'; '.join(sides)}."


def _few(levels: Mapping[str, Any], problems: Any) -> str:
    few = [level for level, found in levels.items() if problems(found) < FEW_PROBLEMS]
    return f"\nFewer than {FEW_PROBLEMS} problems, so that an interval says little: {', '.join(few)}." * bool(
        few
    )


def headline_names(sweep: Mapping[str, Any]) -> list[str]:
    """The statistics of a sweep."""
    first = next(iter(sweep["points"].values()))
    return [name for name, item in first.items() if isinstance(item, Mapping)]
