"""Statistics against pingouin and scipy, and against the coverage that an interval promises."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from philens.errors import InputError
from philens.findings import statistics


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


@pytest.mark.parametrize("covariates", [["c1"], ["c1", "c2"]])
@pytest.mark.parametrize(("rank", "method"), [(False, "pearson"), (True, "spearman")])
def test_partial_correlations_agree_with_pingouin(
    data: pd.DataFrame, covariates: list[str], rank: bool, method: str
) -> None:
    pingouin = pytest.importorskip("pingouin")
    theirs = pingouin.partial_corr(data, "x", "y", covariates, method=method)["r"].iloc[0]
    assert correlate(data, covariates, rank) == pytest.approx(theirs, abs=1e-9)


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
    assert time.perf_counter() - start < 2.0  # 0.05 s on an idle core


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
