"""Statistics against pingouin and scipy, and against the coverage that an interval promises."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from philens.findings import statistics
from philens.support.errors import InputError


@pytest.fixture
def data() -> pd.DataFrame:
    random = np.random.default_rng(3)
    documents = random.integers(25, size=1000)
    effect = random.normal(size=25)[documents]
    c1, c2 = random.normal(size=(2, 1000)) + effect
    x = c1 + 0.5 * c2 + random.normal(size=1000)
    y = np.exp(0.3 * x + c1) + random.normal(size=1000)
    return pd.DataFrame({"x": x, "y": y, "c1": c1, "c2": c2, "document": documents})


def correlate(data: pd.DataFrame, covariates: list[str], rank: bool = False) -> float:
    columns = [data[name] for name in covariates]
    return statistics.correlation(
        data["x"], data["y"], data["document"], columns, rank=rank, resamples=10
    ).value


def test_correlations_agree_with_scipy(data: pd.DataFrame) -> None:
    assert correlate(data, []) == pytest.approx(stats.pearsonr(data["x"], data["y"]).statistic, abs=1e-12)
    rounded = data.round(1)  # ties
    ours = statistics.spearman(rounded["x"], rounded["y"], rounded["document"]).value
    assert ours == pytest.approx(stats.spearmanr(rounded["x"], rounded["y"]).statistic, abs=1e-12)


@pytest.mark.parametrize("covariates", [["c1"], ["c1", "c2"], ["c1", "c2", "c3", "c4"]])
@pytest.mark.parametrize(("rank", "method"), [(False, "pearson"), (True, "spearman")])
def test_partial_correlations_agree_with_pingouin(
    data: pd.DataFrame, covariates: list[str], rank: bool, method: str
) -> None:
    pingouin = pytest.importorskip("pingouin")
    data["c3"], data["c4"] = data["c1"] ** 2, data["x"] * data["c2"]
    theirs = pingouin.partial_corr(data, "x", "y", covariates, method=method)["r"].iloc[0]
    assert correlate(data, covariates, rank) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("covariates", [[], ["c1", "c2"]])
def test_within_documents_is_given_a_constant_of_each(data: pd.DataFrame, covariates: list[str]) -> None:
    """Fixed effects are a dummy variable for each document (Frisch and Waugh's theorem)."""
    pingouin = pytest.importorskip("pingouin")
    dummies = pd.get_dummies(data["document"], prefix="is", drop_first=True, dtype=float)
    everything = data.join(dummies)
    theirs = pingouin.partial_corr(everything, "x", "y", [*covariates, *dummies])["r"].iloc[0]
    held = [data[name] for name in covariates]
    ours = statistics.correlation(data["x"], data["y"], data["document"], held, within=True)
    assert ours.value == pytest.approx(theirs, abs=1e-9)
    assert ours.value != pytest.approx(correlate(data, covariates), abs=1e-6)
    # What belongs to the document has no correlation within it.
    of_document = 0.1 * data["document"]
    assert np.isnan(
        statistics.correlation(of_document, data["y"], data["document"], within=True, resamples=5).value
    )
    assert np.isnan(statistics.correlation([], [], [], within=True).value)


def test_partial_correlation_does_not_mind_scale_or_a_useless_covariate(data: pd.DataFrame) -> None:
    expected = correlate(data, ["c1"])
    data["x"] = 1e6 + 1e-3 * data["x"]
    data["copy"], data["constant"] = -2 * data["c1"], 0.1
    assert correlate(data, ["c1", "copy", "constant"]) == pytest.approx(expected, abs=1e-6)


def test_what_does_not_vary_has_no_correlation(data: pd.DataFrame) -> None:
    constant = np.full(1000, 0.1)
    estimate = statistics.correlation(constant, data["y"], data["document"])
    assert np.isnan(estimate.value)
    assert estimate.as_dict() == {"value": None, "ci95": [None, None]}
    assert np.isnan(statistics.correlation(data["x"], data["y"], data["document"], [2 * data["x"]]).value)


def test_bootstrap_is_the_one_by_hand(data: pd.DataFrame) -> None:
    """The weighted sums give what recomputing the statistic on the resampled tokens gives."""
    estimate = statistics.correlation(
        data["x"], data["y"], data["document"], [data["c1"]], resamples=20, seed=1
    )
    mean = statistics.mean(data["y"], data["document"], resamples=20, seed=1)
    pingouin = pytest.importorskip("pingouin")
    draws = np.random.default_rng(1).integers(25, size=(20, 25))
    groups = dict(list(data.groupby("document")))
    for number, draw in enumerate(draws):
        resampled = pd.concat([groups[document] for document in draw], ignore_index=True)
        theirs = pingouin.partial_corr(resampled, "x", "y", "c1")["r"].iloc[0]
        assert estimate.samples[number] == pytest.approx(theirs, abs=1e-9)
        assert mean.samples[number] == pytest.approx(resampled["y"].mean(), rel=1e-12)


def test_mean_weights_tokens_and_names_of_documents_do_not_matter() -> None:
    estimate = statistics.mean([1.0, 2.0, 3.0, 10.0], ["a", "b", "a", "a"])
    assert estimate.value == 4.0
    assert (estimate.rows, estimate.documents, estimate.dropped) == (4, 2, 0)
    assert statistics.mean([1.0, 2.0, 3.0, 10.0], [9, -5, 9, 9]).ci95 == estimate.ci95


def test_missing_values_are_left_out_and_counted() -> None:
    nan, inf = np.nan, np.inf
    estimate = statistics.mean([1.0, nan, 3.0, inf, nan], [0, 0, 1, 1, 2])
    assert (estimate.value, estimate.rows, estimate.documents, estimate.dropped) == (2.0, 2, 2, 3)
    x, y, c = [1.0, 2, 3, nan, 5, 1], [2.0, 1, nan, 4, 5, 1], [0.0, 1, 1, 1, 0, inf]
    estimate = statistics.correlation(x, y, [0, 0, 1, 1, 2, 2], [c])
    assert (estimate.rows, estimate.documents, estimate.dropped) == (3, 2, 3)


def test_without_two_documents_there_is_no_interval() -> None:
    one = statistics.mean([1.0, 2.0], [7, 7])
    assert one.as_dict("mean") == {"mean": 1.5, "ci95": [None, None]}
    none = statistics.mean([], [])
    assert none.as_dict("mean") == {"mean": None, "ci95": [None, None]}
    assert none.documents == 0
    assert statistics.spearman([], [], []).as_dict() == {"value": None, "ci95": [None, None]}


def test_same_seed_same_interval() -> None:
    values, documents = np.random.default_rng(0).normal(size=(2, 300))
    documents = documents.round(1)
    first = statistics.mean(values, documents, seed=4)
    assert first.ci95 == statistics.mean(values, documents, seed=4).ci95
    assert first.ci95 != statistics.mean(values, documents, seed=5).ci95


def test_wrong_shapes_are_an_input_error() -> None:
    with pytest.raises(InputError, match="one value per token"):
        statistics.mean([1.0, 2.0], [0])
    with pytest.raises(InputError, match="the same number of resamples"):
        statistics.ratio(statistics.mean([1.0], [0], resamples=5), statistics.mean([1.0], [0], resamples=6))


# --- choices


def test_pairs_are_all_of_right_and_wrong_of_one_problem() -> None:
    correct = [True, False, False, True, True, False, True, False]
    problems = ["b", "b", "a", "b", "c", "d", "a", "b"]
    right, wrong = statistics.pair_up(correct, problems)
    found = sorted(zip(right.tolist(), wrong.tolist(), strict=True))
    assert found == [(0, 1), (0, 7), (3, 1), (3, 7), (6, 2)]
    assert [len(rows) for rows in statistics.pair_up([True, True, False], [0, 0, 1])] == [0, 0]


def test_choice_accuracy_with_ties_by_hand() -> None:
    """Problem a has four pairs, of which 1, 0, a tie and a tie; b has one, right; c has one without value."""
    scores = [3.0, 1.0, 2.0, 1.0, 0.0, 5.0, 4.0, np.nan, 0.0]
    correct = [True, True, False, False, False, True, False, True, False]
    problems = ["a", "a", "a", "a", "never paired", "b", "b", "c", "c"]
    right, wrong = statistics.pair_up(correct, problems)
    outcomes = statistics.choices(scores, right, wrong)
    # a: 3>2, 3>1, 1<2, 1=1.
    of_pair = np.array(problems)[right]
    assert sorted(outcomes[of_pair == "a"]) == [0, 0.5, 1, 1]
    estimate = statistics.mean_of_means(outcomes, of_pair)
    assert estimate.value == (2.5 / 4 + 1) / 2
    assert (estimate.rows, estimate.documents, estimate.dropped) == (5, 2, 1)
    # Choosing the lowest is choosing the highest the other way round, with ties too.
    lowest = statistics.mean_of_means(statistics.choices(-np.array(scores), right, wrong), of_pair)
    assert lowest.value == pytest.approx(1 - estimate.value)
    assert not np.isfinite(statistics.mean_of_means([], []).value)


def test_mean_of_means_over_parts_is_the_one_by_hand() -> None:
    random = np.random.default_rng(5)
    problems, part = random.integers(12, size=200), random.integers(2, size=200).astype(float)
    part[problems < 3] = 0  # problems with rows in one part alone
    values = random.random(200) + 0.5 * part
    frame = pd.DataFrame({"value": values, "part": part})
    groups = dict(list(frame.groupby(problems)))

    def by_hand(drawn: list[int]) -> float:
        means = [
            np.mean([group.value[group.part == one].mean() for group in chosen])
            for one in (0, 1)
            if (chosen := [groups[problem] for problem in drawn if (groups[problem].part == one).any()])
        ]
        return float(np.mean(means))

    estimate = statistics.mean_of_means(values, problems, part, resamples=20, seed=3)
    assert estimate.value == pytest.approx(by_hand(list(range(12))))
    draws = np.random.default_rng(3).integers(12, size=(20, 12))
    assert estimate.samples == pytest.approx([by_hand(draw.tolist()) for draw in draws])
    missing = statistics.mean_of_means(
        np.append(values, 9.0), np.append(problems, 99), np.append(part, np.nan)
    )
    assert (missing.value, missing.dropped) == (estimate.value, 1)


def solutions(
    features: int, problems: int, samples: int, direction: np.ndarray, seed: int
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Columns, correct and problem of solutions right with a probability that the direction gives."""
    random = np.random.default_rng(seed)
    columns = random.normal(size=(features, problems * samples))
    hardness = np.repeat(random.normal(size=problems), samples)
    correct = random.random(columns.shape[1]) < 1 / (1 + np.exp(-(direction @ columns - hardness)))
    scales = 10.0 ** np.arange(features)[:, None]
    return list(columns * scales + 7), correct, np.repeat(np.arange(problems), samples)


def test_a_combination_recovers_its_direction() -> None:
    """A pair's log odds are the difference of its solutions' log odds: the same direction (Bradley-Terry)."""
    direction = np.array([1.0, -0.5, 0.0])
    columns, correct, problems = solutions(3, 1500, 8, direction, seed=0)
    found = statistics.combine_columns(columns, correct, problems, penalty=0)
    # Weights are per standard deviation of differences, sqrt(2) of the columns'; conditioning on one of the
    # two being right leaves the coefficients as they are, and changes the spread of the columns a little.
    right, wrong = statistics.pair_up(correct, problems)
    counts = np.bincount(problems[right], minlength=1500)
    weight = 1 / counts[problems[right]] / np.sum(counts > 0)
    spread = [np.sqrt(weight @ (column[right] - column[wrong]) ** 2) for column in columns]
    slopes = found.weights / spread * 10.0 ** np.arange(3)
    assert slopes == pytest.approx(direction, abs=0.08)
    accuracy = statistics.mean_of_means(statistics.choices(found.scores, right, wrong), problems[right])
    best = statistics.choices(direction @ (np.array(columns) / 10.0 ** np.arange(3)[:, None]), right, wrong)
    assert accuracy.value == pytest.approx(statistics.mean_of_means(best, problems[right]).value, abs=0.01)
    again = statistics.combine_columns(columns, correct, problems, penalty=0)
    assert np.array_equal(again.scores, found.scores)
    shrunk = statistics.combine_columns(columns, correct, problems, penalty=1.0)
    assert np.abs(shrunk.weights).sum() < 0.5 * np.abs(found.weights).sum()


def test_a_combination_agrees_with_a_plain_logistic_regression() -> None:
    """One pair a problem: no weights; the fit is the maximum of the likelihood that scipy finds otherwise."""
    columns, correct, problems = solutions(2, 400, 2, np.array([1.0, 0.5]), seed=2)
    right, wrong = statistics.pair_up(correct, problems)
    found = statistics.combine_columns(columns, correct, problems, penalty=0)
    data = np.stack(columns, axis=1)
    differences = data[right] - data[wrong]
    scaled = differences / np.sqrt((differences**2).mean(axis=0))
    # At a maximum of the likelihood the expected columns are the observed ones.
    expected = (1 / (1 + np.exp(scaled @ found.weights))) @ scaled
    assert np.abs(expected).max() < 1e-3 * len(scaled)


def test_a_combination_of_noise_chooses_by_chance() -> None:
    """Twelve columns of noise fit thirty problems well, and say nothing about others: no leakage."""
    accuracies, fitted = [], []
    for seed in range(120):
        random = np.random.default_rng(seed)
        columns, problems = random.normal(size=(12, 240)), np.repeat(np.arange(30), 8)
        correct = random.random(240) < 0.5
        found = statistics.combine_columns(list(columns), correct, problems, seed=seed)
        right, wrong = statistics.pair_up(correct, problems)
        for scores, into in ((found.scores, accuracies), (found.weights @ columns, fitted)):
            outcomes = statistics.choices(scores, right, wrong)
            into.append(statistics.mean_of_means(outcomes, problems[right], resamples=1).value)
    error = np.std(accuracies) / np.sqrt(len(accuracies))
    assert error < 0.01
    assert abs(np.mean(accuracies) - 0.5) < 3 * error
    assert np.mean(fitted) > 0.6


def test_folds_do_not_share_problems_and_few_problems_do() -> None:
    columns, correct, problems = solutions(2, 3, 6, np.zeros(2), seed=1)
    correct[:6], correct[6:12], correct[12:] = True, [True, False] * 3, [False, True] * 3
    found = statistics.combine_columns(columns, correct, problems)
    assert found.folds == 2
    # The second problem is scored by the fit on the third, and the other way round.
    changed = [column.copy() for column in columns]
    for column in changed:
        column[6:12] = np.random.default_rng(0).normal(size=6)
    other = statistics.combine_columns(changed, correct, problems)
    assert not np.allclose(other.scores[12:], found.scores[12:])
    same = statistics.combine_columns([column[6:] for column in columns], correct[6:], problems[6:])
    assert np.isfinite(same.scores).all()
    correct[12:] = False
    with pytest.raises(InputError, match="two or more with both right and wrong"):
        statistics.combine_columns(columns, correct, problems)


def test_intervals_at_other_levels() -> None:
    values, documents = np.random.default_rng(0).normal(size=(2, 300))
    estimate = statistics.mean(values, documents.round(1), resamples=20_000)
    widths = [np.diff(estimate.interval(level))[0] for level in (0.5, 0.95, 0.99, statistics.familywise(100))]
    assert estimate.interval(0.95) == estimate.ci95
    assert widths == sorted(widths)
    # Near a normal distribution.
    assert widths[2] / widths[1] == pytest.approx(stats.norm.ppf(0.995) / stats.norm.ppf(0.975), rel=0.06)
    assert statistics.familywise(1) == 0.95
    assert statistics.familywise(10) == pytest.approx(0.995)
    assert estimate.as_dict(level=0.99)["interval"] == list(estimate.interval(0.99))


# --- coverage; more of it in test_coverage.py


def coverage(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("documents", "skewed"), [(15, False), (80, True)])
def test_95_percent_intervals_of_means_and_ratios_cover(documents: int, skewed: bool) -> None:
    """Tokens with mean 1, alike within their document, documents of different lengths."""
    random = np.random.default_rng(0)
    means, ratios = [], []
    for number in range(1000):
        pair = []
        for part in range(2):
            document = np.repeat(np.arange(documents), random.integers(2, 20, size=documents))
            if skewed:
                values = random.gamma(4, 0.25, size=documents)[document] * random.exponential(
                    size=len(document)
                )
            else:
                values = random.normal(1, 0.3, size=documents)[document] + random.normal(size=len(document))
            pair.append(statistics.mean(values, document, resamples=1000, seed=(number, part)))
            means.append(pair[-1].ci95[0] <= 1 <= pair[-1].ci95[1])
        low, high = statistics.ratio(*pair).ci95
        ratios.append(low <= 1 <= high)
    assert 0.93 <= coverage(means) <= 0.97
    assert 0.93 <= coverage(ratios) <= 0.97


def test_95_percent_intervals_of_partial_correlations_cover() -> None:
    """As in the complexity finding: one variable belongs to the document, the others to its tokens."""
    random = np.random.default_rng(2)
    slope, shared, own = 0.3, 0.5, 1.0
    truth = slope / np.sqrt(slope**2 + shared**2 + own**2)
    hits, ranked = [], []
    for number in range(1000):
        document = np.repeat(np.arange(80), 12)
        length = random.normal(size=80)[document]
        covariate = random.normal(size=len(document))
        residual = shared * random.normal(size=80)[document] + own * random.normal(size=len(document))
        phi = slope * length + covariate + covariate**2 + residual
        options = {"resamples": 400, "seed": number}
        found = statistics.correlation(phi, length, document, [covariate, covariate**2], **options)
        hits.append(found.ci95[0] <= truth <= found.ci95[1])
        found = statistics.spearman(slope * length + residual, length, document, **options)
        # Spearman's correlation of two Gaussians whose Pearson correlation is `truth`.
        ranked.append(found.ci95[0] <= 6 / np.pi * np.arcsin(truth / 2) <= found.ci95[1])
    assert 0.93 <= coverage(hits) <= 0.97
    assert 0.93 <= coverage(ranked) <= 0.97


def test_resampling_tokens_would_be_too_sure() -> None:
    """The reason for clusters: within documents tokens agree."""
    random = np.random.default_rng(0)
    document = np.repeat(np.arange(30), 100)
    values = random.normal(size=30)[document] + 0.1 * random.normal(size=3000)
    clusters = statistics.mean(values, document).ci95
    tokens = statistics.mean(values, np.arange(3000)).ci95
    assert clusters[1] - clusters[0] > 5 * (tokens[1] - tokens[0])


def test_two_thousand_resamples_of_many_tokens_are_fast() -> None:
    random = np.random.default_rng(0)
    x, y, c = random.normal(size=(3, 100_000))
    start = time.perf_counter()
    statistics.correlation(x, y, random.integers(500, size=100_000), [c, c**2])
    assert time.perf_counter() - start < 10  # 0.05 s on an idle core


def test_quantile_bins() -> None:
    edges, index = statistics.quantile_bins([0, 1, 2, 3, np.nan, 4, 5, 6, 7], 4)
    assert edges.tolist() == [0, 1.75, 3.5, 5.25, 7]
    assert index.tolist() == [0, 0, 1, 1, -1, 2, 2, 3, 3]
    # Half of the values are one number: bins merge, and each value is in exactly one.
    edges, index = statistics.quantile_bins([0] * 6 + [1, 2, 3, 4], 4)
    assert len(edges) < 5
    assert set(index) == set(range(len(edges) - 1))
    edges, index = statistics.quantile_bins([2, 2, 2], 3)
    assert edges.tolist() == [2, 2]
    assert index.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="Binning"):
        statistics.quantile_bins([np.nan], 3)
