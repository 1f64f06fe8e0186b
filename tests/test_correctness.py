"""Right and wrong solutions told by phi: against joins, pingouin, and tables with a known truth."""

import io
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from philens.findings import combine_seeds, write_finding
from philens.findings import reasoning_tables as reasoning
from philens.findings.correctness import (
    HEADLINE,
    RULES,
    choice_rows,
    early_rows,
    measure_correctness,
    partial_rows,
    selection_rows,
    sweep_correctness,
)
from philens.findings.reasoning_figures import figure_correctness, figure_points, figures
from philens.support.errors import ConfigError, InputError
from solved import solved

QUICK = {"resamples": 200}


@cache
def measured(**options: Any) -> dict[str, Any]:
    return measure_correctness(solved(**options), **QUICK)


def joined(table: pd.DataFrame, column: str, sign: int, which: str = "all") -> dict[str, Any]:
    """Choice accuracy by a join of right and wrong solutions."""
    pairs = table[table.correct].merge(table[~table.correct], on="problem_id", suffixes=("_right", "_wrong"))
    against = np.sign(pairs.surprisal_mean_right - pairs.surprisal_mean_wrong)
    pairs = pairs[against == {"counterintuitive": 1, "intuitive": -1}[which]] if which != "all" else pairs
    higher = sign * (pairs[f"{column}_right"] - pairs[f"{column}_wrong"])
    outcome = (higher > 0) + 0.5 * (higher == 0)
    by_problem = outcome.groupby(pairs.problem_id).mean()
    return {"accuracy": by_problem.mean(), "pairs": len(pairs), "problems": len(by_problem)}


def test_choices_are_those_of_a_join() -> None:
    table = solved(60, 6)
    table["surprisal_mean"] = table["surprisal_mean"].round(1)  # ties, also of the subsets
    table["phi_mean"] = table["phi_mean"].round(0)
    found = measure_correctness(table.sample(frac=1, random_state=0), **QUICK)["choice"]
    for rule, column, sign in (
        ("highest_phi", "phi_mean", 1),
        ("lowest_phi", "phi_mean", -1),
        ("lowest_surprisal", "surprisal_mean", -1),
        ("lowest_entropy", "entropy_mean", -1),
        ("shortest", "tokens", -1),
        ("highest_phi_sum", "phi_sum", 1),
        ("highest_phi_max", "phi_max", 1),
        ("highest_phi_last_fifth", "phi_last_fifth", 1),
    ):
        for which in ("all", "counterintuitive", "intuitive"):
            theirs = joined(table, column, sign, which)
            assert found[which]["rules"][rule]["accuracy"] == pytest.approx(theirs["accuracy"]), (rule, which)
            assert (found[which]["pairs"], found[which]["problems"]) == (theirs["pairs"], theirs["problems"])
        balanced = np.mean(
            [found[which]["rules"][rule]["accuracy"] for which in ("counterintuitive", "intuitive")]
        )
        assert found["balanced"]["rules"][rule]["accuracy"] == pytest.approx(balanced)
    tied = found["all"]["pairs"] - found["counterintuitive"]["pairs"] - found["intuitive"]["pairs"]
    assert tied > 0
    assert found["balanced"]["pairs"] == found["all"]["pairs"] - tied
    assert found["counterintuitive"]["rules"]["lowest_surprisal"]["accuracy"] == 0
    assert found["balanced"]["rules"]["lowest_surprisal"]["ci95"] == [0.5, 0.5]


def test_levels_are_the_finding_of_their_problems_alone() -> None:
    table = solved(60, 6)
    everything = measure_correctness(table, **QUICK)
    assert list(everything["levels"]) == ["1", "2", "3", "4", "5"]
    alone = measure_correctness(table[table.level == 4], **QUICK)
    found = everything["levels"]["4"]
    for rule in RULES:
        for which in ("all", "counterintuitive", "balanced"):
            ours, theirs = (one["choice"][which]["rules"][rule] for one in (found, alone))
            assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
            assert ours["ci95"] == pytest.approx(theirs["ci95"])
    for kind in ("pooled", "within_problems"):
        for given, item in found["partial"][kind]["phi_mean"].items():
            assert item["value"] == pytest.approx(alone["partial"][kind]["phi_mean"][given]["value"])
    assert found["accuracy"]["value"] == table[table.level == 4].correct.mean()
    by_steps = measure_correctness(table, by="steps", **QUICK)
    assert list(by_steps["levels"]) == ["2", "3", "4", "5", "6"]
    assert measure_correctness(table.drop(columns="level"), **QUICK)["levels"] == {}
    unknown = table.assign(level=table.level.astype(object).where(table.level > 1, None))
    assert list(measure_correctness(unknown, **QUICK)["levels"]) == ["2", "3", "4", "5"]


def test_correlations_agree_with_pingouin() -> None:
    pingouin = pytest.importorskip("pingouin")
    table = solved(80).assign(right=lambda table: table.correct.astype(float))
    table["log_tokens"] = np.log(table.tokens)
    found = measure_correctness(table, **QUICK)["partial"]
    levels = pd.get_dummies(table.level, prefix="level", drop_first=True, dtype=float)
    share = table.groupby("problem_id").right.transform("mean")
    mixed = table[(share > 0) & (share < 1)]
    problems = pd.get_dummies(mixed.problem_id, drop_first=True, dtype=float)
    held = {
        "surprisal": ["surprisal_mean"],
        "length": ["tokens", "log_tokens"],
        "surprisal_and_length": ["surprisal_mean", "tokens", "log_tokens"],
    }
    for kind, rows, dummies in (
        ("pooled", table, None),
        ("within_levels", table, levels),
        ("within_problems", mixed, problems),
    ):
        data = rows if dummies is None else rows.join(dummies)
        assert found[kind]["samples"] == len(rows)
        for column in ("phi_mean", "phi_last_fifth"):
            for given, names in held.items():
                covariates = names + ([] if dummies is None else list(dummies))
                theirs = pingouin.partial_corr(data, column, "right", covariates)["r"].iloc[0]
                assert found[kind][column][given]["value"] == pytest.approx(theirs, abs=1e-8), (kind, given)


def test_controls_choose_and_are_held_fixed() -> None:
    """phi that is the size of the hidden state picks as that does, and given it says nothing."""
    pingouin = pytest.importorskip("pingouin")
    table = solved(120, 6)
    random = np.random.default_rng(0)
    table["state_norm_mean"] = random.normal(size=len(table)) + 0.8 * table.correct
    table["phi_untrained_mean"] = table["state_norm_mean"] + random.normal(size=len(table))
    table["phi_mean"] = table["state_norm_mean"] + 0.1 * random.normal(size=len(table))
    results = measure_correctness(table, **QUICK)
    for rule, column in (
        ("highest_state_norm_mean", "state_norm_mean"),
        ("highest_phi_untrained_mean", "phi_untrained_mean"),
    ):
        found = results["choice"]["all"]["rules"][rule]["accuracy"]
        assert found == pytest.approx(joined(table, column, 1)["accuracy"])
        assert results["partial"]["pooled"][column]["nothing"]["value"] > 0.2
    assert results["choice"]["all"]["rules"]["highest_phi"]["accuracy"] > 0.6
    table["log_tokens"], table["right"] = np.log(table.tokens), table.correct.astype(float)
    held = ["surprisal_mean", "tokens", "log_tokens", "entropy_mean", "phi_untrained_mean", "state_norm_mean"]
    theirs = pingouin.partial_corr(table, "phi_mean", "right", held)["r"].iloc[0]
    all_else = results["partial"]["pooled"]["phi_mean"]["all_else"]
    assert all_else["value"] == pytest.approx(theirs, abs=1e-8)
    assert all_else["ci95"][0] < 0 < all_else["ci95"][1]
    assert results["partial"]["within_problems"]["phi_mean"]["surprisal_and_length"]["ci95"][0] > 0.2
    rows = pd.DataFrame(partial_rows(results))
    assert {"phi_untrained_mean", "state_norm_mean"} <= set(rows.metric)
    assert set(rows[rows.metric == "phi_mean"].given) >= {"all_else"}
    # Tables without controls are measured as ever.
    bare = measure_correctness(table.drop(columns=["state_norm_mean", "phi_untrained_mean"]), **QUICK)
    assert "all_else" not in bare["partial"]["pooled"]["phi_mean"]
    assert set(bare["choice"]["all"]["rules"]) == set(RULES) | {"logistic", "logistic_without_phi"}


def early_table(problems=120, samples=5, **options) -> pd.DataFrame:
    """Solutions with answers and first tokens; phi of these tells right from wrong, surprisal's is noise."""
    table = solved(problems, samples, **options)
    random = np.random.default_rng(1)
    table["answer"] = np.where(table.correct, "1", random.choice(["2", "3"], len(table)))
    table["tokens_prefix"] = np.minimum(table.tokens, 30)
    table["phi_prefix"] = table["phi_mean"] + 2 * table.correct
    table["surprisal_prefix"] = random.normal(size=len(table)).round(1)
    return table


def test_choosing_early_against_one_problem_after_the_other() -> None:
    table = early_table().sample(frac=1, random_state=0)
    found = measure_correctness(table, **QUICK)["early"]
    assert (found["prefix"], found["problems"]) == (30, 120)
    for rule, column, sign in (
        ("highest_phi", "phi", 1),
        ("lowest_phi", "phi", -1),
        ("highest_surprisal", "surprisal", 1),
        ("lowest_surprisal", "surprisal", -1),
    ):
        unwritten, right = 0, {"random": [], "majority": [], "best": []}
        for _, rows in table.groupby("problem_id"):
            order = np.argsort(-sign * rows[f"{column}_prefix"].to_numpy(), kind="stable")
            kept, dropped = rows.iloc[order[:3]], rows.iloc[order[3:]]
            unwritten += (dropped.tokens - dropped.tokens_prefix).sum()
            right["random"].append(kept.correct.mean())
            votes = kept.answer.value_counts()
            right["majority"].append(kept.correct[kept.answer.isin(votes.index[votes == votes.max()])].mean())
            right["best"].append(kept.correct[(sign * kept[f"{column}_mean"]).idxmax()])
        ours = found["rules"][rule]
        assert ours["saved"]["value"] == pytest.approx(unwritten / table.tokens.sum())
        low, high = ours["saved"]["ci95"]
        assert low < ours["saved"]["value"] < high
        for ending, values in right.items():
            assert ours[ending]["accuracy"] == pytest.approx(np.mean(values)), (rule, ending)
    assert set(found["rules"]) == {f"{d}_{m}" for d in ("highest", "lowest") for m in ("phi", "surprisal")}


def test_what_choosing_early_gains_is_over_the_same_among_all() -> None:
    table = early_table()
    results = measure_correctness(table, **QUICK)
    selection, early = results["selection"]["rules"], results["early"]["rules"]
    for ending, whole in (("random", "random"), ("majority", "majority"), ("best", "highest_phi")):
        one = early["highest_phi"][ending]
        gained = one["accuracy"] - selection[whole]["accuracy"]
        assert one["gain"]["value"] == pytest.approx(gained)
    assert (
        early["highest_phi"]["random"]["gain"]["ci95"][0]
        > 0.1
        > early["lowest_phi"]["random"]["gain"]["ci95"][1]
    )
    low, high = early["highest_surprisal"]["random"]["gain"]["ci95"]
    assert low < 0 < high
    rows = pd.DataFrame(early_rows(results))
    assert len(rows) == 4 * 3
    assert set(rows.ending) == {"random", "majority", "best"}
    text = shown(reasoning.early_table(results))
    assert "the better half by the first 30 tokens" in text
    assert "lowest surprisal" in text
    # Where every solution is kept to its end, nothing is saved and everything else is as it was.
    short = measure_correctness(table.assign(tokens_prefix=table.tokens), **QUICK)["early"]["rules"]
    assert all(one["saved"]["value"] == 0 for one in short.values())
    assert measure_correctness(solved(60, 6), **QUICK)["early"] == {}
    without = early_table().drop(columns="answer")
    assert "majority" not in measure_correctness(without, **QUICK)["early"]["rules"]["highest_phi"]


def test_metrics_that_were_asked_for_stand_beside_the_others() -> None:
    table = solved(120, 6)
    table["deep_thinking_mean"] = table.correct + np.random.default_rng(0).normal(size=len(table))
    for column in ("confidence_mean", "confidence_lowest_group", "confidence_tail", "confidence_max"):
        table[column] = np.random.default_rng(1).normal(size=len(table))
    results = measure_correctness(table, **QUICK)
    rules = results["choice"]["all"]["rules"]
    asked = ["deep_thinking_mean", "confidence_mean", "confidence_lowest_group", "confidence_tail"]
    assert [f"highest_{name}" for name in asked] == list(rules)[len(RULES) : len(RULES) + 4]
    accuracy = rules["highest_deep_thinking_mean"]["accuracy"]
    assert accuracy == pytest.approx(joined(table, "deep_thinking_mean", 1)["accuracy"])
    assert results["partial"]["within_problems"]["deep_thinking_mean"]["nothing"]["ci95"][0] > 0.2
    assert set(asked) < set(pd.DataFrame(partial_rows(results)).metric)
    assert "highest deep thinking" in shown(reasoning.correctness_table(results))


def test_a_known_effect_is_found_with_its_size() -> None:
    results = measured(problems=400)
    # Two solutions' phi differ by 0.6 on average, with a standard deviation of sqrt(2).
    headline = results["headline"]
    assert headline["choice"]["ci95"][0] < 0.664 < headline["choice"]["ci95"][1]  # the normal's cdf at 0.424
    # The residuals' standard deviation is 1, that of right and wrong 0.45 at one level, mostly.
    assert headline["within_given_surprisal_and_length"]["value"] == pytest.approx(0.26, abs=0.05)
    assert results["holds"]
    assert all(item["side"] == "above" for item in headline.values())
    # Of problems of all levels, phi goes up with difficulty and right answers down.
    assert results["partial"]["pooled"]["phi_mean"]["surprisal"]["ci95"][1] < 0
    combination = results["choice"]["all"]
    assert combination["added_by_phi"]["ci95"][0] > 0
    rules = combination["rules"]
    added = rules["logistic"]["accuracy"] - rules["logistic_without_phi"]["accuracy"]
    assert combination["added_by_phi"]["value"] == pytest.approx(added)
    weights = results["logistic"]["logistic"]["weights"]
    assert weights["phi_mean"] > 0 > weights["surprisal_mean"]
    assert abs(weights["entropy_mean"]) < 0.15
    assert set(results["logistic"]["logistic_without_phi"]["weights"]) == set(weights) - {"phi_mean"}


def test_an_effect_the_other_way_is_reported_as_such() -> None:
    results = measured(effect=-0.6)
    assert not results["holds"]
    assert {name: item["side"] for name, item in results["headline"].items()} == dict.fromkeys(
        HEADLINE, "below"
    )
    assert results["choice"]["all"]["rules"]["lowest_phi"]["ci95"][0] > 0.5
    assert "below chance" in shown(reasoning.correctness_table(results))


def test_phi_that_only_follows_surprisal_is_good_by_selection_alone() -> None:
    """In counter-intuitive pairs it looks as in the paper; balanced and partial say that it knows nothing."""
    results = measured(effect=0.0, selection=3.0, problems=500)
    choice = {which: cell["rules"]["highest_phi"]["ci95"] for which, cell in results["choice"].items()}
    # Of two solutions, surprisal differs by N(-0.4, 2) and phi by 3 times that and N(0, 2).
    surprisal = np.linspace(-12, 12, 100_001)
    likely = stats.norm.pdf(surprisal, -0.4, np.sqrt(2))
    higher = stats.norm.cdf(3 * surprisal / np.sqrt(2))
    truths = []
    for which, rows in (("counterintuitive", surprisal > 0), ("intuitive", surprisal < 0)):
        truths.append(np.sum(likely[rows] * higher[rows]) / np.sum(likely[rows]))
        assert abs(truths[-1] - 0.5) > 0.3
        assert choice[which][0] < truths[-1] < choice[which][1]
    # Differences are a little larger where surprisal is on the side of right: not quite a half.
    assert choice["balanced"][0] < np.mean(truths) < choice["balanced"][1]
    assert np.mean(truths) == pytest.approx(0.5, abs=0.03)
    assert results["headline"]["partial_given_surprisal"]["side"] == "neither"
    assert not results["holds"]


def test_selection_is_that_by_hand() -> None:
    table = solved(50, 5)
    table["phi_mean"] = table["phi_mean"].round(0)  # ties
    random = np.random.default_rng(0)
    wrong = random.choice([" 1", "1", "2", None], size=len(table))
    table["answer"] = np.where(table.correct, "7", wrong)
    results = measure_correctness(table, **QUICK)
    found = results["selection"]["rules"]
    expected: dict[str, list[float]] = {
        "highest_phi": [],
        "shortest": [],
        "majority": [],
        "random": [],
        "any": [],
    }
    for _, rows in table.groupby("problem_id"):
        expected["highest_phi"].append(rows.correct[rows.phi_mean == rows.phi_mean.max()].mean())
        expected["shortest"].append(rows.correct[rows.tokens == rows.tokens.min()].mean())
        answers = [None if pd.isna(answer) else answer.strip() for answer in rows.answer]
        votes = Counter(answer for answer in answers if answer is not None)
        chosen = [votes.get(answer, 0) == max(votes.values(), default=0) for answer in answers]
        expected["majority"].append(rows.correct[chosen].mean())
        expected["random"].append(rows.correct.mean())
        expected["any"].append(rows.correct.max())
    for rule, values in expected.items():
        assert found[rule]["accuracy"] == pytest.approx(np.mean(values)), rule
        assert found[rule]["gain"]["value"] == pytest.approx(np.mean(values) - table.correct.mean())
    assert results["selection"]["problems"] == 50
    assert results["selection"]["samples_per_problem"] == {"fewest": 5, "most": 5, "mean": 5.0}
    assert "majority" not in measured(problems=40)["selection"]["rules"]


def test_counts_say_what_was_left_out_and_why() -> None:
    table = solved(30, 4)
    table.loc[table.problem_id == "p0", "correct"] = True
    table.loc[table.problem_id.isin(["p1", "p2"]), "correct"] = False
    table["parsed"] = True
    table.loc[[5, 9], "parsed"] = False
    table.loc[[5, 9], "correct"] = False
    table["finished"] = table["finished"].astype(object)
    table.loc[7, "finished"], table.loc[8, "finished"] = False, None
    metrics = [name for name in table if name.startswith(("phi", "surprisal", "entropy"))]
    table.loc[20, "tokens"] = 0  # an empty reply
    table.loc[20, metrics] = np.nan
    results = measure_correctness(table, **QUICK)
    counts, listed = results["counts"], results["listed"]
    kept = table.drop(index=20)
    shares = kept.groupby("problem_id").correct.mean()
    assert counts == {
        "problems": 30,
        "samples": 119,
        "tokens": int(kept.tokens.sum()),
        "unscored": 1,
        "unparsed": 2,
        "unfinished": 1,
        "all_right": int((shares == 1).sum()),
        "all_wrong": int((shares == 0).sum()),
        "mixed": int(((shares > 0) & (shares < 1)).sum()),
        "pairs": results["choice"]["all"]["pairs"],
    }
    assert counts["all_wrong"] >= 2
    assert listed == {"unscored": ["p5#0"], "unparsed": ["p1#1", "p2#1"]}
    assert results["resampling"] == {"over": "problems", "resamples": 200, "seed": 0}


def test_one_or_two_problems_with_both() -> None:
    table = solved(30, 6)
    shares = table.groupby("problem_id").correct.mean()
    mixed = shares.index[(shares > 0) & (shares < 1)]
    one = measure_correctness(table[table.problem_id == mixed[0]], **QUICK)
    assert one["logistic"] == {}
    assert "logistic" not in one["choice"]["all"]["rules"]
    assert one["choice"]["all"]["rules"]["highest_phi"]["ci95"] == [None, None]
    assert not one["holds"]
    two = measure_correctness(table[table.problem_id.isin(mixed[:2])], **QUICK)
    assert two["logistic"]["logistic"]["folds"] == 2
    for results in (one, two):
        json.dumps(results["headline"])
        for table in reasoning.terminal_tables(
            "correctness", {"seeds": [{"seed": 0, "points": {"x": results}}]}
        ):
            assert "…" not in shown(table)
        figure_correctness([results]).draw_without_rendering()


def test_same_seed_same_numbers() -> None:
    table = solved(40)
    first = measure_correctness(table, seed=1, **QUICK)
    assert first == measure_correctness(table, seed=1, **QUICK)
    other = measure_correctness(table, seed=2, **QUICK)
    assert first["headline"]["choice"]["value"] == other["headline"]["choice"]["value"]
    assert first["headline"]["choice"]["ci95"] != other["headline"]["choice"]["ci95"]


def test_bad_tables_are_an_input_error() -> None:
    table = solved(10)
    with pytest.raises(InputError, match=r"\(10 have only right ones, 0 only wrong ones\); sample more"):
        measure_correctness(table.assign(correct=True))
    with pytest.raises(InputError, match="no phi_max, correct; make it with"):
        measure_correctness(table.drop(columns=["phi_max", "correct"]))
    with pytest.raises(InputError, match="not marked right or wrong"):
        measure_correctness(table.assign(correct=table.correct.astype(object).where(table.index > 0, None)))
    with pytest.raises(InputError, match="None of 80 solutions has scores"):
        measure_correctness(table.assign(phi_mean=np.nan))
    with pytest.raises(InputError, match="None of 0 solutions"):
        measure_correctness(table[:0])
    with pytest.raises(ConfigError, match="best_phi"):
        measure_correctness(table, rules=["best_phi"])
    with pytest.raises(InputError, match="phi_median"):
        measure_correctness(table, rules=["highest_phi_median"])
    with pytest.raises(InputError, match="no insertion points"):
        sweep_correctness({})


def test_a_sweep_widens_its_intervals() -> None:
    tables = {"model.layers.1": solved(100, effect=0.1), "model.layers.3": solved(100, effect=0.8)}
    sweep = sweep_correctness(tables, resamples=300)
    assert (sweep["comparisons"], sweep["level"]) == (10, 0.995)
    assert "10 comparisons" in sweep["note"]
    alone = measure_correctness(tables["model.layers.3"], resamples=3000)["headline"]
    for name, item in alone.items():
        found = sweep["points"]["model.layers.3"][name]
        assert found["value"] == item["value"]
        assert found["interval"][0] < item["ci95"][0] < item["ci95"][1] < found["interval"][1]
    assert sweep["points"]["model.layers.3"]["choice"]["side"] == "above"
    one = sweep_correctness({"model.layers.3": tables["model.layers.3"]}, resamples=300)
    assert one["level"] == 0.99


# --- rows, tables, figures


def shown(table: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore


@cache
def seeds(count: int) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        tables = {f"model.layers.{block}": solved(60, effect=block / 4, seed=seed) for block in (1, 3)}
        points = {point: measure_correctness(table, seed=seed, **QUICK) for point, table in tables.items()}
        found.append({"seed": seed, "points": points, "sweep": sweep_correctness(tables, seed=seed, **QUICK)})
    return found


def test_rows_hold_every_number() -> None:
    results = measured(problems=40)
    choices = choice_rows(results)
    assert len(choices) == 6 * 4 * len(results["choice"]["all"]["rules"])
    row = next(
        row
        for row in choices
        if (row["level"], row["pairs_of"], row["rule"]) == ("3", "counterintuitive", "shortest")
    )
    found = results["levels"]["3"]["choice"]["counterintuitive"]
    assert row["accuracy"] == found["rules"]["shortest"]["accuracy"]
    assert [row["accuracy_low"], row["accuracy_high"]] == found["rules"]["shortest"]["ci95"]
    assert (row["pairs"], row["problems"]) == (found["pairs"], found["problems"])
    correlations = partial_rows(results)
    assert len(correlations) == 3 * (4 * 4 + 3) + 5 * 2 * 4
    assert {row["kind"] for row in correlations} == {"pooled", "within_levels", "within_problems"}
    assert [row["rule"] for row in selection_rows(results)] == list(results["selection"]["rules"])


def test_terminal_tables_fit_and_say_what_was_found() -> None:
    one = {"seeds": seeds(1)}
    texts = [shown(table) for table in reasoning.terminal_tables("correctness", one)]
    assert len(texts) == 2 * 4 + 1
    assert not any("…" in text for text in texts)
    counts = seeds(1)[0]["points"]["model.layers.1"]["counts"]
    assert f"{counts['pairs']:,} pairs of" in texts[0]
    assert "solutions without a readable answer count as wrong" in " ".join(texts[0].split())
    accuracy = seeds(1)[0]["points"]["model.layers.1"]["headline"]["choice"]["value"]
    assert f"{100 * accuracy:.1f}" in texts[0]
    assert "15 comparisons" not in texts[-1]
    assert "10 comparisons" in texts[-1]
    three = {"seeds": seeds(3), "spread": combine_seeds([found["points"] for found in seeds(3)])}
    texts = [shown(table) for table in reasoning.terminal_tables("correctness", three)]
    assert len(texts) == 2 * 4 + 1 + 2
    assert "of 3 seeds" in texts[-1]


def test_few_problems_are_said_to_be_few() -> None:
    text = " ".join(shown(reasoning.correctness_levels_table(measured(problems=40))).split())
    assert "Fewer than 20 problems, so that an interval says little: 1, 2, 3, 4, 5." in text
    assert "Fewer" not in shown(reasoning.correctness_levels_table(measured(problems=400)))


def test_figures_draw_the_results() -> None:
    results = measured(problems=400)
    figure = figure_correctness([results], "after model.layers.1")
    by_level, by_rule, second = figure.axes
    lines = {line.get_label(): line for line in by_level.containers}
    for name, subset, rule in (
        ("highest phi", "all", "highest_phi"),
        ("lowest surprisal", "all", "lowest_surprisal"),
        ("highest phi, counter-intuitive pairs", "counterintuitive", "highest_phi"),
    ):
        expected = [
            100 * level["choice"][subset]["rules"][rule]["accuracy"] for level in results["levels"].values()
        ]
        assert lines[name].lines[0].get_ydata() == pytest.approx(expected)
        segments = lines[name].lines[2][0].get_segments()
        bounds = [
            [100 * end for end in level["choice"][subset]["rules"][rule]["ci95"]]
            for level in results["levels"].values()
        ]
        assert np.array(segments)[:, :, 1] == pytest.approx(np.array(bounds))
    expected = [
        level["partial"]["pooled"]["phi_mean"]["surprisal"]["value"] for level in results["levels"].values()
    ]
    assert second.containers[0].lines[0].get_ydata() == pytest.approx(expected)
    # Chance is one height on both axes.
    assert by_level.transData.transform((0, 50))[1] == pytest.approx(second.transData.transform((0, 0))[1])
    assert "combination without phi" in [text.get_text() for text in by_rule.get_yticklabels()]


def test_figures_of_several_seeds_show_each(tmp_path: Path) -> None:
    found = figures("correctness", seeds(3))
    assert list(found) == ["correctness-model.layers.1", "correctness-model.layers.3", "sweep"]
    axes = found["sweep"].axes[0]
    values = [one["sweep"]["points"]["model.layers.3"]["choice"]["value"] for one in seeds(3)]
    ends = [line.get_ydata()[1] for line in axes.lines[:4]]
    assert ends == pytest.approx([np.mean(values), *values])
    legend = [text.get_text() for text in found["correctness-model.layers.1"].legends[0].get_texts()]
    assert "means over 3 seeds; small dots: each seed" in legend
    intervals = figure_points([seeds(1)[0]["sweep"]]).legends[0].get_texts()[-1].get_text()
    assert intervals == "99.50 % intervals: all 10 hold together with 95 %"
    rows = reasoning.tables("correctness", seeds(3))
    assert {row["seed"] for row in rows["choices"]} == {0, 1, 2}
    paths = write_finding(tmp_path, {"seeds": seeds(3)}, rows, found)
    assert {"choices.csv", "correlations.csv", "selections.csv", "early.csv", "sweep.csv", "sweep.png"} < set(
        paths
    )
    assert json.loads(paths["results.json"].read_text())["seeds"][1]["seed"] == 1


def test_a_figure_without_levels() -> None:
    figure = figure_correctness([measure_correctness(solved(30).drop(columns="level"), **QUICK)])
    assert figure.axes[0].get_title(loc="left") == "without a level"
    figure.draw_without_rendering()
