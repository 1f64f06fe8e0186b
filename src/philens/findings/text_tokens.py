"""What single tokens say in texts of several levels: the extremes of phi, and text that is recited verbatim.

A model recites where it is sure of one token after the other: a run of `RUN` tokens or more, each with a
surprisal below `SURE` nats. Sure tokens outside such runs (the rest of a long word, a bracket that has to
close) are the control: they cost as little, and nothing is recited.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics

if TYPE_CHECKING:
    from philens.scoring.scores import TokenScores
    from philens.tasks.levels import LevelText

SURE, RUN = 0.1, 10
# Nats of surprisal at which one bin ends and the next begins.
EDGES = (0.0, 0.01, 0.1, 1.0, 4.0, np.inf)
EXTREMES = 10
# Tokens shown before and after one of those.
BEFORE, AFTER = 24, 6

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CountedTokens:
    """The tokens of a text that count, T of them.

    Attributes:
        places: (T,) which tokens of the scores they are.
        columns: (T,) each, by name; phi is NaN at attention sinks.
        sinks: (T,) which are attention sinks.
    """

    text: "LevelText"
    scores: "TokenScores"
    places: NDArray[np.int64]
    columns: Mapping[str, Floats]
    sinks: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.places)


def recited(surprisal: Floats) -> NDArray[np.bool_]:
    """(T,) which tokens lie in a run of `RUN` tokens or more with a surprisal below `SURE` each."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], surprisal < SURE, [False]]).astype(np.int8)))
    found = np.zeros(len(surprisal), bool)
    for start, stop in edges.reshape(-1, 2):
        found[start:stop] = stop - start >= RUN
    return found


def measure_recitation(texts: Sequence[CountedTokens], **draws: Unpack[statistics.Draws]) -> dict[str, Any]:
    """Phi where texts are recited, against the rest of the same texts and against sure tokens in that rest.

    `recited`, `rest` and `sure_rest` are means over tokens; the two differences are means over texts that
    have both, of a text's mean in one less that in the other. Intervals are over texts.
    """
    rows: dict[str, list[tuple[int, Floats]]] = {"recited": [], "rest": [], "sure_rest": []}
    differences: dict[str, list[float]] = {"rest": [], "sure_rest": []}
    for number, text in enumerate(texts):
        phi, surprisal = text.columns["phi"], text.columns["surprisal"]
        inside, known = recited(surprisal), np.isfinite(phi) & np.isfinite(surprisal)
        parts = {"recited": inside, "rest": ~inside, "sure_rest": ~inside & (surprisal < SURE)}
        values = {name: phi[known & mask] for name, mask in parts.items()}
        for name, found in values.items():
            rows[name].append((number, found))
        for name, into in differences.items():
            if len(values["recited"]) and len(values[name]):
                into.append(float(values["recited"].mean() - values[name].mean()))
    counts = {name: sum(len(values) for _, values in found) for name, found in rows.items()}
    return {
        "surprisal_below": SURE,
        "run": RUN,
        "texts": sum(len(values) > 0 for _, values in rows["recited"]),
        "tokens": counts["recited"],
        "share": counts["recited"] / max(counts["recited"] + counts["rest"], 1),
        **{name: _mean_of(found, **draws) for name, found in rows.items()},
        "recited_less_rest": _mean_of(enumerate(differences["rest"]), **draws),
        "recited_less_sure_rest": _mean_of(enumerate(differences["sure_rest"]), **draws),
    }


def _mean_of(rows: Any, **draws: Unpack[statistics.Draws]) -> dict[str, Any] | None:
    pairs = [(number, np.atleast_1d(values)) for number, values in rows]
    if not sum(len(values) for _, values in pairs):
        return None
    documents = np.repeat([number for number, _ in pairs], [len(values) for _, values in pairs])
    estimate = statistics.mean(np.concatenate([values for _, values in pairs]), documents, **draws)
    return {"texts": estimate.documents, "tokens": estimate.rows, **estimate.as_dict("mean")}


def phi_by_surprisal(
    texts: Sequence[CountedTokens], **draws: Unpack[statistics.Draws]
) -> list[dict[str, Any]]:
    """Mean phi of a level's tokens in each bin of surprisal, with intervals over texts."""
    bins = []
    for low, high in pairwise(EDGES):
        rows = []
        for number, text in enumerate(texts):
            phi, surprisal = text.columns["phi"], text.columns["surprisal"]
            rows.append((number, phi[(surprisal >= low) & (surprisal < high) & np.isfinite(phi)]))
        found = _mean_of(rows, **draws) or {"texts": 0, "tokens": 0, "mean": None, "ci95": [None, None]}
        bins.append({"from": low, "below": high if np.isfinite(high) else None, **found})
    return bins


def extremes(texts: Sequence[CountedTokens], most: int = EXTREMES) -> dict[str, list[dict[str, Any]]]:
    """The tokens with the `highest` and `lowest` phi among some texts, each with what stands around it.

    Of each: `document`, `position` among the tokens that count, `place` among all that were read (a chat's
    template has some), `before`, `token`, `after`, phi and surprisal.
    """
    phi = np.concatenate([text.columns["phi"] for text in texts])
    number = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    position = np.concatenate([np.arange(len(text)) for text in texts])
    order = np.argsort(phi, kind="stable")
    order = order[np.isfinite(phi[order])]
    pieces = {n: texts[n].scores.pieces() for n in {*number[order[:most]], *number[order[-most:]]}}

    def told(row: int) -> dict[str, Any]:
        text, at = texts[number[row]], int(position[row])
        place, words = int(text.places[at]), pieces[number[row]]
        first, last = int(text.places[0]), int(text.places[-1])
        surprisal = float(text.columns["surprisal"][at])
        return {
            "document": text.text.name,
            "position": at,
            "place": place,
            "before": "".join(words[max(place - BEFORE, first) : place]),
            "token": words[place],
            "after": "".join(words[place + 1 : min(place + AFTER, last) + 1]),
            "phi": float(phi[row]),
            "surprisal": surprisal if np.isfinite(surprisal) else None,
        }

    return {
        "highest": [told(row) for row in order[::-1][:most]],
        "lowest": [told(row) for row in order[:most]],
    }
