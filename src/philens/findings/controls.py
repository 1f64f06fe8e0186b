"""Would the finding be there anyway? The same statistic of what learned nothing, beside that of phi.

A control is either another phi of the same tokens (an untrained layer's, an untrained model's), or the same
phi with its target permuted among tokens of like surprisal and place. Both are correlated as phi is, over the
same documents in the same resamples, so that differences are paired.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics
from philens.show.estimates import flat
from philens.tasks.automata import Documents

Floats = NDArray[np.float64]

PERMUTED = "permuted"
# Quantiles of surprisal, and of position, among whose tokens the target is permuted.
BINS = (20, 20)


def measure_controls(
    phi: Floats,
    target: Floats,
    document: NDArray[np.int64],
    controls: Mapping[str, Floats],
    fixed: Sequence[Floats],
    more: Sequence[Floats],
    *,
    surprisal: Floats,
    position: Floats,
    letters: Floats,
    rank: bool = False,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Partial correlations with `target` (N,) of phi (N,) and of what it is compared with.

    Args:
        controls: another phi (N,) of the same tokens, by name.
        fixed: covariates, (N,) each, of the finding.
        more: those of a harder one.
        surprisal: (N,) and `position` (N,): the target is permuted in bins of both.
        letters: (N,) `different_letters`, which a text shows on its surface.
        rank: correlate ranks.

    Returns:
        `phi` and, by name, `controls`, each with `given_fixed`, `given_letters` (and the fixed) and
        `given_more`; of controls `difference`, phi minus the control given the fixed, and `phi_given_it`, phi
        with the control held fixed as well. `strongest` names the control nearest to phi or above it, and
        `left` is its difference. `given_all` is phi's given more, letters and every other phi. `holds` says
        that `left`, `given_all` and phi's `given_letters` lie above zero with their intervals.
    """

    def partial(x: Floats, y: Floats, covariates: Sequence[Floats]) -> statistics.Estimate:
        return statistics.correlation(x, y, document, covariates, rank=rank, resamples=resamples, seed=seed)

    whole = partial(phi, target, fixed)
    shuffled = _permuted(target, surprisal, position, seed)
    compared = {name: (values, target) for name, values in controls.items()} | {PERMUTED: (phi, shuffled)}
    found: dict[str, Any] = {}
    differences = {}
    for name, (x, y) in compared.items():
        given = partial(x, y, fixed)
        differences[name] = statistics.difference(whole, given)
        beside = {"given_fixed": given, "given_letters": partial(x, y, [*fixed, letters])}
        beside |= {"given_more": partial(x, y, more), "difference": differences[name]}
        if name != PERMUTED:
            beside["phi_given_it"] = partial(phi, target, [*fixed, x])
        found[name] = {key: one.as_dict() for key, one in beside.items()}
    strongest = min(differences, key=lambda name: np.nan_to_num(differences[name].value, nan=np.inf))
    given_letters = partial(phi, target, [*fixed, letters])
    given_all = partial(phi, target, [*more, letters, *controls.values()])
    return {
        "phi": {
            "given_fixed": whole.as_dict(),
            "given_letters": given_letters.as_dict(),
            "given_more": partial(phi, target, more).as_dict(),
        },
        "controls": found,
        "strongest": strongest,
        "left": differences[strongest].as_dict(),
        "given_all": given_all.as_dict(),
        "holds": all(one.ci95[0] > 0 for one in (differences[strongest], given_letters, given_all)),
    }


def measure_pairs(
    values: Mapping[str, Floats],
    surprisal: Floats,
    length: Floats,
    **draws: Unpack[statistics.Draws],
) -> dict[str, Any]:
    """Pairs of documents of like surprisal: how often the longer description has the higher value.

    All arguments are means of documents (n,). Neighbours in the order of surprisal are paired, each document
    once. Chance is 0.5, which `surprisal` itself should be near to; pairs of equal length are left out.
    """
    order = np.argsort(surprisal, kind="stable")
    first, second = order[: len(order) // 2 * 2].reshape(-1, 2).T
    side = np.sign(length[first] - length[second])
    first, second, side = (one[side != 0] for one in (first, second, side))
    found = {
        name: statistics.mean(
            (np.sign((column[first] - column[second]) * side) + 1) / 2, np.arange(len(side)), **draws
        ).as_dict("share")
        for name, column in ({"surprisal": surprisal} | dict(values)).items()
    }
    return {"pairs": len(side), "shares": found}


def different_letters(docs: Documents) -> Floats:
    """(N,) how many different tokens the document of each token has, those redrawn by noise left out.

    With noise nearly every document has every letter; those of its automaton are the others.
    """
    found = []
    for first, last in itertools.pairwise(docs.offsets):
        kept = ~docs.perturbed[first:last]
        found.append(len(np.unique(docs.tokens[first:last][kept])))
    return np.repeat(np.array(found, np.float64), docs.lengths)


def control_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `controls` of a finding, as of `measure_controls`, as rows for a CSV file."""
    found = results["controls"]
    every = {"phi": found["phi"] | {"given_all": found["given_all"]}} | found["controls"]
    return [
        {"of": name, "correlation": key} | flat("value", one, "")
        for name, measured in every.items()
        for key, one in measured.items()
    ]


def _permuted(target: Floats, surprisal: Floats, position: Floats, seed: int) -> Floats:
    """`target` permuted among the tokens of each bin of surprisal and position; NaN outside them.

    One in so many tokens as a bin has keeps its own, so that few documents make a control too strong.
    """
    random = np.random.default_rng(seed)
    usable = np.isfinite(target) & np.isfinite(surprisal)
    inner, outer = (
        statistics.quantile_bins(np.where(usable, values, np.nan), bins)[1]
        for values, bins in zip((surprisal, position), BINS, strict=True)
    )
    moved = np.full(len(target), np.nan)
    cell = inner * BINS[1] + outer
    for number in np.unique(cell[usable]):
        rows = np.flatnonzero(usable & (cell == number))
        moved[rows] = random.permutation(target[rows])
    return moved
