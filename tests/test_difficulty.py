"""phi of solutions against difficulty: by hand, against scipy and pingouin, and a known truth."""

import io
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from philens.findings import combine_seeds, statistics
from philens.findings import reasoning_tables as reasoning
from philens.findings.difficulty import (
    HEADLINE,
    QUANTITIES,
    difficulty_correlation_rows,
    difficulty_rows,
    measure_difficulty,
    sweep_difficulty,
)
from philens.findings.reasoning_figures import figure_difficulty, figures
from philens.support.errors import InputError
from solved import solved

QUICK = {"resamples": 200}


def test_levels_are_means_over_their_solutions() -> None:
    table = solved(60, 3)
    results = measure_difficulty(table, **QUICK)
    assert list(results["levels"]) == ["1", "2", "3", "4", "5"]
    for level, rows in table.groupby("level"):
        found = results["levels"][str(level)]
        assert (found["problems"], found["samples"]) == (12, 36)
        for name in QUANTITIES:
            problems = pd.factorize(rows.problem_id)[0]
            expected = statistics.mean(rows[name], problems, **QUICK).as_dict("mean")
            assert found[name] == expected
    assert results["counts"] == {
        "problems": 60,
        "samples": 180,
        "tokens": int(table.tokens.sum()),
        "unscored": 0,
        "unparsed": int((~table.parsed).sum()),
        "unfinished": 0,
        "without_difficulty": 0,
    }


def test_correlations_agree_with_scipy_and_pingouin() -> None:
    pingouin = pytest.importorskip("pingouin")
    table = solved(80, 3)
    table["mtd_mean"] = table["phi_sum"] - table["tokens"]  # a metric that was asked for
    results = measure_difficulty(table, **QUICK)
    for name in (*QUANTITIES, "mtd_mean"):
        theirs = stats.spearmanr(table[name], table.level).statistic
        assert results["spearman"][name]["value"] == pytest.approx(theirs, abs=1e-9)
    # The logarithm of the length has the ranks of the length.
    held = {
        "surprisal": ["surprisal_mean"],
        "length": ["tokens"],
        "surprisal_and_length": ["surprisal_mean", "tokens"],
    }
    for name in ("phi_mean", "phi_sum", "phi_max", "phi_last_fifth", "mtd_mean"):
        for given, covariates in held.items():
            theirs = pingouin.partial_corr(table, name, "level", covariates, method="spearman")["r"].iloc[0]
            assert results["partial"][name][given]["value"] == pytest.approx(theirs, abs=1e-8)
    headline = {name: item["value"] for name, item in results["headline"].items()}
    assert headline["spearman"] == results["spearman"]["phi_mean"]["value"]
    for given, item in results["partial"]["phi_mean"].items():
        assert headline[f"partial_given_{given}"] == item["value"]


def test_what_grows_with_length_alone_is_told_from_what_grows_with_difficulty() -> None:
    """phi that is a function of the length: given the length nothing is left."""
    table = solved(300, 4)
    random = np.random.default_rng(0)
    table["phi_mean"] = np.log(table["tokens"]) + 0.05 * random.normal(size=len(table))
    results = measure_difficulty(table, **QUICK)
    assert results["holds"]
    assert results["headline"]["spearman"]["value"] > 0.9
    assert results["headline"]["partial_given_surprisal"]["side"] == "above"
    assert results["headline"]["partial_given_length"]["side"] == "neither"
    assert results["headline"]["partial_given_surprisal_and_length"]["side"] == "neither"
    falling = measure_difficulty(table.assign(phi_mean=-table["phi_mean"]), **QUICK)
    assert not falling["holds"]
    assert falling["headline"]["spearman"]["side"] == "below"


def with_controls(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Hidden states that are larger where a problem is harder, and an untrained layer that tells no more."""
    random = np.random.default_rng(seed)
    size = 20 + table["level"] + random.normal(size=len(table))
    return table.assign(state_norm_mean=size, phi_untrained_mean=size**2 + 5 * random.normal(size=len(table)))


def test_what_is_the_size_of_states_alone_is_told_from_what_a_layer_learned() -> None:
    pingouin = pytest.importorskip("pingouin")
    table = with_controls(solved(300, 4))
    random = np.random.default_rng(2)
    grown = table.assign(phi_mean=table["state_norm_mean"] + 0.3 * random.normal(size=len(table)))
    results = measure_difficulty(grown, **QUICK)
    assert results["holds"]
    low, high = results["partial"]["phi_mean"]["all_else"]["ci95"]
    assert low < 0 < high
    # What a layer adds is found: this phi goes with difficulty itself, whatever the states' size.
    results = measure_difficulty(table, **QUICK)
    held = ["surprisal_mean", "tokens", "entropy_mean", "phi_untrained_mean", "state_norm_mean"]
    theirs = pingouin.partial_corr(table, "phi_mean", "level", held, method="spearman")["r"].iloc[0]
    found = results["partial"]["phi_mean"]["all_else"]
    assert found["value"] == pytest.approx(theirs, abs=1e-8)
    for name in ("state_norm_mean", "phi_untrained_mean"):
        expected = stats.spearmanr(table[name], table.level).statistic
        assert results["spearman"][name]["value"] == pytest.approx(expected, abs=1e-9)
        assert results["levels"]["3"][name]["mean"] == pytest.approx(table[name][table.level == 3].mean())
    rows = pd.DataFrame(difficulty_rows(results))
    assert rows["state_norm_mean"].tolist() == [
        one["state_norm_mean"]["mean"] for one in results["levels"].values()
    ]
    seeds = {"seeds": [{"seed": 0, "points": {"model.layers.1": results}}]}
    levels, correlations = (shown(one) for one in reasoning.terminal_tables("difficulty", seeds))
    assert not any("…" in text for text in (levels, correlations))
    assert "phi, given all else" in " ".join(correlations.split())
    assert "All else: surprisal, entropy, length" in " ".join(correlations.split())
    *_, right = figure_difficulty([results]).axes
    labels = [text.get_text() for text in right.get_yticklabels()]
    assert {"phi given all else", "phi, untrained layer", "size of the state"} <= set(labels)


def test_noise_has_no_correlation() -> None:
    table = solved(300, 4)
    table["phi_mean"] = np.random.default_rng(1).normal(size=len(table))
    results = measure_difficulty(table, **QUICK)
    assert not results["holds"]
    assert {item["side"] for item in results["headline"].values()} == {"neither"}


def test_steps_and_problems_without_difficulty() -> None:
    table = solved(40, 2)
    table["steps"] = table["steps"].astype(object).where(table["problem_id"] != "p7", None)
    table.loc[3, ["tokens", "phi_mean"]] = [0, np.nan]
    results = measure_difficulty(table, "steps", **QUICK)
    assert list(results["levels"]) == ["2", "3", "4", "5", "6"]
    assert results["by"] == "steps"
    assert (results["counts"]["problems"], results["counts"]["samples"]) == (39, 77)
    assert (results["counts"]["unscored"], results["counts"]["without_difficulty"]) == (1, 2)
    assert results["listed"]["without_difficulty"] == ["p7"]
    assert results["listed"]["unscored"] == ["p1#1"]
    # Solutions from elsewhere need not be marked.
    bare = table.drop(columns=["correct", "parsed", "finished", "sample"])
    assert measure_difficulty(bare, "steps", **QUICK)["levels"] == results["levels"]
    nullable = table.assign(steps=table["steps"].astype("Int64"))
    assert measure_difficulty(nullable, "steps", **QUICK)["levels"] == results["levels"]


def test_bad_tables_are_an_input_error() -> None:
    table = solved(10)
    with pytest.raises(InputError, match="two values of 'level' and these have 1"):
        measure_difficulty(table[table.level == 2])
    with pytest.raises(InputError, match="two values of 'level' and these have 0"):
        measure_difficulty(table.assign(level=None))
    with pytest.raises(InputError, match="has no steps; make it"):
        measure_difficulty(table.drop(columns="steps"), "steps")
    with pytest.raises(InputError, match="has no problem_id"):
        measure_difficulty(table.drop(columns="problem_id"))


def test_a_sweep_names_its_comparisons() -> None:
    sweep = sweep_difficulty({"a": solved(40, 2), "b": solved(40, 2, seed=1)}, "steps", **QUICK)
    assert sweep["comparisons"] == 2 * len(HEADLINE) == 8
    assert "2 insertion points with 4 statistics each are 8 comparisons" in sweep["note"]
    assert sweep["level"] == pytest.approx(1 - 0.05 / 8)
    assert set(sweep["points"]["a"]) == {"problems", "samples", *HEADLINE}


# --- rows, tables, figures


@cache
def seeds(count: int) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        tables = {f"model.layers.{block}": solved(40, 2, effect=block / 4, seed=seed) for block in (1, 3)}
        points = {point: measure_difficulty(table, seed=seed, **QUICK) for point, table in tables.items()}
        found.append({"seed": seed, "points": points, "sweep": sweep_difficulty(tables, seed=seed, **QUICK)})
    return found


def shown(table: Any) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore


def test_rows_hold_every_number() -> None:
    results = seeds(1)[0]["points"]["model.layers.1"]
    rows = pd.DataFrame(difficulty_rows(results))
    assert rows["level"].tolist() == ["1", "2", "3", "4", "5"]
    assert rows["phi_sum"].tolist() == [found["phi_sum"]["mean"] for found in results["levels"].values()]
    rows = difficulty_correlation_rows(results)
    assert len(rows) == len(QUANTITIES) + 4 * 3
    last = results["partial"]["phi_last_fifth"]["surprisal_and_length"]
    assert rows[-1]["spearman"] == last["value"]
    assert [rows[-1]["spearman_low"], rows[-1]["spearman_high"]] == last["ci95"]


def test_terminal_tables_fit_and_say_what_was_found() -> None:
    results = {"seeds": seeds(2), "spread": combine_seeds([found["points"] for found in seeds(2)])}
    texts = [shown(table) for table in reasoning.terminal_tables("difficulty", results)]
    assert len(texts) == 2 * 2 + 1 + 2
    assert not any("…" in text for text in texts)
    words = " ".join(texts[0].split())
    assert "The claim that phi grows with difficulty holds here" in words
    assert "Fewer than 20 problems" in words
    assert "solutions have no readable answer" in words
    assert "The finding holds for 2 of 2 seeds." in texts[-1]


def test_figures_draw_the_results() -> None:
    results = seeds(1)[0]["points"]["model.layers.3"]
    figure = figure_difficulty([results], "after model.layers.3")
    phi, surprisal, right = figure.axes
    for axes, name in ((phi, "phi_mean"), (surprisal, "surprisal_mean")):
        expected = [found[name]["mean"] for found in results["levels"].values()]
        assert axes.containers[0].lines[0].get_ydata() == pytest.approx(expected)
    labels = [text.get_text() for text in right.get_yticklabels()]
    place = right.containers[labels.index("phi given both")].lines[0]
    value = results["partial"]["phi_mean"]["surprisal_and_length"]["value"]
    assert place.get_xdata() == pytest.approx([value])
    found = figures("difficulty", seeds(2))
    assert list(found) == ["difficulty-model.layers.1", "difficulty-model.layers.3", "sweep"]
    only = [{**one, "points": {"x": one["points"]["model.layers.1"]}} for one in seeds(2)]
    assert list(figures("difficulty", only)) == ["difficulty", "sweep"]
    for figure in found.values():
        figure.draw_without_rendering()
    assert set(reasoning.tables("difficulty", seeds(2))) == {"levels", "correlations", "sweep"}
