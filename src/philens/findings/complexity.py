"""Finding 2: with surprisal held fixed, phi grows with what there is to infer.

Measured on in-context language alone, where the description length of the automaton behind a document says
how much a model can learn from it.

Which tokens: those with both a phi and a surprisal, so each document's first token is left out everywhere
here. Halves are of documents: the first half holds the tokens at positions below half the document's length.
Early in a document a model cannot know its automaton yet, so where in the document one looks matters.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics
from philens.findings.controls import different_letters, measure_controls, measure_pairs
from philens.findings.tasks import INTERESTING
from philens.show.estimates import flat
from philens.support.errors import InputError
from philens.tasks.automata import TASKS

if TYPE_CHECKING:
    from philens.scoring.documents import TokenTable

CORRELATIONS = (
    "spearman",
    "spearman_of_surprisal",
    "partial_given_surprisal",
    "partial_given_surprisal_and_square",
)
PARTS = ("whole", "first_half", "second_half")

Floats = NDArray[np.float64]


def measure_complexity(
    table: "TokenTable",
    *,
    description_length_bins: int = 4,
    surprisal_bins: int = 8,
    controls: Mapping[str, NDArray[np.floating]] | None = None,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """How phi goes with the automaton's description length (nats) in the in-context language of `table`.

    `curves`: mean phi against surprisal, token-wise, one curve for each bin of description length (quantiles
    over documents), its points the bins of surprisal (quantiles over tokens). `token_wise` and
    `document_means`: for the whole documents and for either half, Spearman correlation of phi with
    description length, that of surprisal (the baseline), and partial correlations of phi given surprisal, and
    given surprisal and its square (linear). Intervals resample documents. `holds` says that the token-wise
    partial correlation given surprisal lies above zero with its interval.

    `controls` (`measure_controls`) has the same correlation given surprisal of `controls`, other phis (N,) of
    the same tokens by name; the harder one holds surprisal's square, position, and the entropies before and
    after the token fixed, too. `pairs` (`measure_pairs`) has pairs of documents of like surprisal.

    Raises InputError where fewer than two documents of in-context language can be used.
    """
    docs = table.docs
    rows = docs.task[table.document] == TASKS.index(INTERESTING)
    usable = rows & np.isfinite(table.phi) & np.isfinite(table.surprisal)
    document = table.document[usable]
    measured = np.unique(document)
    lengths = docs.description_length
    if np.isfinite(lengths[measured]).sum() < 2:
        raise InputError(
            f"Complexity needs at least two scored documents of {INTERESTING}; generate more of them."
        )
    phi, surprisal = table.phi[usable].astype(np.float64), table.surprisal[usable].astype(np.float64)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}

    position = np.flatnonzero(usable) - docs.offsets[document]
    early = 2 * position < docs.lengths[document]
    masks = {"whole": np.ones_like(early), "first_half": early, "second_half": ~early}
    token_wise, document_means = {}, {}
    for part, mask in masks.items():
        values, here = (phi[mask], surprisal[mask]), document[mask]
        present = np.unique(here)
        counts = {"tokens": int(mask.sum()), "documents": len(present)}
        means = _means(phi[mask], here), _means(surprisal[mask], here)
        token_wise[part] = _correlate(*values, lengths[here], here, options) | counts
        document_means[part] = _correlate(*means, lengths[present], present, options) | counts

    every = {name: values[usable].astype(np.float64) for name, values in (controls or {}).items()}
    means = {name: _means(column, document) for name, column in {"phi": phi, **every}.items()}
    more = [surprisal, surprisal**2, position.astype(np.float64)]
    if table.entropy is not None:
        after = np.append(table.entropy[1:], np.nan)  # a document's first token has none
        more += [entropy[usable].astype(np.float64) for entropy in (table.entropy, after)]

    low = token_wise["whole"]["partial_given_surprisal"]["ci95"][0]
    return {
        "task": INTERESTING,
        "tokens": int(usable.sum()),
        "documents": len(measured),
        "tokens_without_surprisal": int(rows.sum() - usable.sum()),
        "curves": _curves(
            phi, surprisal, document, lengths, (description_length_bins, surprisal_bins), options
        ),
        "token_wise": token_wise,
        "document_means": document_means,
        "controls": measure_controls(
            phi,
            lengths[document],
            document,
            every,
            [surprisal],
            more,
            surprisal=surprisal,
            position=position.astype(np.float64),
            letters=different_letters(docs)[usable],
            **options,
        ),
        "pairs": measure_pairs(means, _means(surprisal, document), lengths[measured], **options),
        "holds": low is not None and low > 0,
    }


def curve_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The curves of `measure_complexity` as rows for a CSV file, one for each point."""
    return [
        _bin("description_length", curve["description_length"])
        | _bin("surprisal", point["surprisal"])
        | flat("phi", point["phi"])
        | {"tokens": point["tokens"], "documents": point["documents"]}
        for curve in results["curves"]
        for point in curve["points"]
    ]


def _bin(name: str, found: Mapping[str, float]) -> dict[str, float]:
    return {name: found["mean"], f"{name}_bin_low": found["low"], f"{name}_bin_high": found["high"]}


def correlation_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The correlations of `measure_complexity` as rows for a CSV file."""
    return [
        {"level": level, "part": part, "correlation": name}
        | flat("value", found[name], "")
        | {"tokens": found["tokens"], "documents": found["documents"]}
        for level in ("token_wise", "document_means")
        for part, found in results[level].items()
        for name in CORRELATIONS
    ]


def _correlate(
    phi: Floats, surprisal: Floats, length: Floats, document: NDArray[np.int64], options: dict[str, Any]
) -> dict[str, Any]:
    estimates = {
        "spearman": statistics.spearman(phi, length, document, **options),
        "spearman_of_surprisal": statistics.spearman(surprisal, length, document, **options),
        "partial_given_surprisal": statistics.correlation(phi, length, document, [surprisal], **options),
        "partial_given_surprisal_and_square": statistics.correlation(
            phi, length, document, [surprisal, surprisal**2], **options
        ),
    }
    return {name: estimates[name].as_dict() for name in CORRELATIONS}


def _means(values: Floats, document: NDArray[np.int64]) -> Floats:
    """Each document's mean of `values` (N,)."""
    index, count = np.unique(document, return_inverse=True, return_counts=True)[1:]
    return np.bincount(index, weights=values) / count


def _curves(
    phi: Floats,
    surprisal: Floats,
    document: NDArray[np.int64],
    lengths: Floats,
    bins: tuple[int, int],
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Mean phi in cells of description length (bins over documents) and surprisal (bins over tokens)."""
    measured, index = np.unique(document, return_inverse=True)
    edges, bin_of_measured = statistics.quantile_bins(lengths[measured], bins[0])
    bin_of_token = bin_of_measured[index]
    surprisal_edges, surprisal_bin = statistics.quantile_bins(surprisal, bins[1])
    curves = []
    for number in range(len(edges) - 1):
        inside = lengths[measured[bin_of_measured == number]]
        points = []
        for step in range(len(surprisal_edges) - 1):
            cell = (bin_of_token == number) & (surprisal_bin == step)
            if cell.any():
                of_cell = {"mean": float(surprisal[cell].mean()), **_range(surprisal_edges, step)}
                points.append({"surprisal": of_cell} | mean_of_cell(phi[cell], document[cell], options))
        if points:
            curves.append(
                {
                    "description_length": {"mean": float(inside.mean()), **_range(edges, number)},
                    "tokens": int((bin_of_token == number).sum()),
                    "documents": len(inside),
                    "points": points,
                }
            )
    return curves


def mean_of_cell(phi: Floats, document: NDArray[np.int64], options: dict[str, Any]) -> dict[str, Any]:
    """Mean phi of some tokens, and how many these are."""
    estimate = statistics.mean(phi, document, **options)
    return {"phi": estimate.as_dict("mean"), "tokens": estimate.rows, "documents": estimate.documents}


def _range(edges: Floats, number: int) -> dict[str, float]:
    return {"low": float(edges[number]), "high": float(edges[number + 1])}
