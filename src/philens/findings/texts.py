"""Finding 3: phi tells interesting text from boring text.

Code and prose that a model has not seen make it compute; trivial text (counting, repetition), text that it
knows by heart (licences) and shuffled words do not, although shuffled words are the most surprising of all.

Tokens that count are those of the text itself: of a chat the assistant's, else all that stand for
characters, so not a BOS token. A text's first token has a phi; unless something stands before it, no
surprisal. Attention sinks have no part in phi, and their number is told. Intervals resample texts, never
tokens or pieces of a text, which are not independent.

A *point* is a layer whose phi is measured: an adapter and an insertion point. Of several, such as the
checkpoints of a run, results are those of the last with all of them beside it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics
from philens.findings.text_tokens import (
    CountedTokens,
    extremes,
    measure_recitation,
    phi_by_surprisal,
)
from philens.lens.metrics import CONTROLS
from philens.show.estimates import flat, flat_all
from philens.support.errors import InputError
from philens.tasks.levels import BORING, INTERESTING, LevelText, in_order, role
from philens.tasks.sources import chat_of

if TYPE_CHECKING:
    from philens.lens.model import PHiModel
    from philens.scoring.scores import TokenScores

# Of Llama 3.2 3B Instruct in the paper: phi by its formula, and surprisal; for reference only.
PAPER = {
    "trivial": (400, 0.25),
    "memorised": (328, 2.56),
    "shuffled": (448, 6.51),
    "code": (556, 1.88),
    "prose": (626, 3.44),
}
# At a text's first tokens there is little context to compute with: phi is also given without so many.
EARLY = 16
QUANTITIES = ("phi", "surprisal", "surprisal_with_layer", "gap", "phi_later", *CONTROLS)

Floats = NDArray[np.float64]


def cut_texts(tokenizer: Any, texts: Sequence[LevelText], tokens: int) -> list[LevelText]:
    """The texts without what follows their first `tokens` tokens, so that no level is one of longer texts.

    Raises:
        InputError: what `philens.score` raises of a tokenizer and of texts.
    """
    from philens.scoring.texts import check_tokenizer, tokenize_all

    check_tokenizer(tokenizer)
    found = tokenize_all(tokenizer, [text.text for text in texts], [text.name for text in texts])
    ends = [one.offsets[one.leading :][:tokens, 1].max() for one in found]
    return [replace(text, text=text.text[:end]) for text, end in zip(texts, ends, strict=True)]


def score_texts(
    lens: "PHiModel",
    tokenizer: Any,
    texts: Sequence[LevelText],
    window: int | None = None,
    metrics: Sequence[str] | None = None,
) -> "Iterator[TokenScores]":
    """Scores of the texts, in order; those with a user's message as chats where the tokenizer has a template.

    Raises:
        InputError: texts of which some have a user's message and some have none, in a chat model; or what
            `philens.score` raises.
    """
    from philens.scoring.score import iter_scores

    as_chats = [bool(getattr(tokenizer, "chat_template", None)) and text.user is not None for text in texts]
    if any(as_chats) and not all(as_chats):
        name = texts[as_chats.index(False)].name
        raise InputError(
            f"{name} has no user's message and other texts have one; give each one, or score texts alone "
            "with --plain."
        )
    contents = [
        chat_of(text.user or "", text.text) if as_chat else text.text
        for text, as_chat in zip(texts, as_chats, strict=True)
    ]
    names = [text.name for text in texts]
    return iter_scores(lens, tokenizer, contents, window=window, names=names, metrics=metrics)


def measure_texts(
    texts: Sequence[LevelText],
    scores: "Iterable[TokenScores]",
    *,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Means of each level with 95 % intervals over texts, nats per token, and what they say of the claim.

    `levels`, in the paper's order, have phi, surprisal of the untouched base, surprisal with the layer, their
    gap (None for a lens that observes), `phi_later` (without each text's first 16 tokens), the `CONTROLS`
    where scores have them, how many `sinks` were left out of phi and these, and phi `by_surprisal`. `texts`
    has the same means of every text. `pairs`, any two levels: difference and ratio of the first one's phi to
    the second one's, the same ratio of each of the `controls`, whether the intervals of phi are `separated`,
    and whether the paper's `claim` is about them. `phi_order` and `surprisal_order` name levels from high to
    low. `holds` says that code and prose (and one's `own` texts) lie above trivial, memorised and shuffled
    ones, as far as they are here, separated, and that surprisal puts these in another order. `verbatim` is
    about memorised text where it is recited, None if there is none, and `tokens` names the extremes of each
    level (`philens.findings.text_tokens`).

    Args:
        texts: texts of two levels or more.
        scores: one for each text, with phi and surprisal.

    Raises:
        InputError: a chat whose template left out the assistant's words.
    """
    counted = [_counted(text, found) for text, found in zip(texts, scores, strict=True)]
    levels = in_order(text.level for text in texts)
    of_level = {level: [found for found in counted if found.text.level == level] for level in levels}
    estimates: dict[str, dict[str, statistics.Estimate]] = {}
    for number, (level, chosen) in enumerate(of_level.items()):
        document = np.repeat(np.arange(len(chosen)), [len(found) for found in chosen])
        # A seed for each level: equal ones would resample two levels in step.
        estimates[level] = {
            name: statistics.mean(
                np.concatenate([found.columns[name] for found in chosen]),
                document,
                resamples=resamples,
                seed=(seed, number),
            )
            for name in QUANTITIES
        }

    phi_order, surprisal_order = (
        sorted(levels, key=lambda level, name=name: -estimates[level][name].value)
        for name in ("phi", "surprisal")
    )
    # The one first that comes later in the paper's order.
    pairs = [_compare(estimates, one, other) for k, one in enumerate(levels) for other in levels[:k]]
    claimed = [pair for pair in pairs if pair["claim"]]
    compared = {pair[side] for pair in claimed for side in ("first", "second")}
    by_phi, by_surprisal = (
        [level for level in order if level in compared] for order in (phi_order, surprisal_order)
    )
    memorised = [one for one in counted if role(one.text.level) == "memorised"]
    return {
        "levels": {
            level: {
                "role": role(level),
                "built": all(one.text.built for one in of_level[level]),
                "texts": len(of_level[level]),
                "tokens": sum(map(len, of_level[level])),
                "sinks": sum(int(one.sinks.sum()) for one in of_level[level]),
                "tokens_without_surprisal": found["surprisal"].dropped,
                **{name: found[name].as_dict("mean") if found[name].rows else None for name in QUANTITIES},
                "by_surprisal": phi_by_surprisal(of_level[level], resamples=resamples, seed=seed),
            }
            for level, found in estimates.items()
        },
        "pairs": pairs,
        "phi_order": phi_order,
        "surprisal_order": surprisal_order,
        "orders_differ": by_phi != by_surprisal,
        "holds": bool(claimed)
        and by_phi != by_surprisal
        and all(pair["separated"] and pair["difference"]["value"] > 0 for pair in claimed),
        "verbatim": measure_recitation(memorised, resamples=resamples, seed=seed) if memorised else None,
        "tokens": {level: extremes(found) for level, found in of_level.items()},
        "texts": [
            {"level": level, "document": one.text.name, "built": one.text.built, "tokens": len(one)}
            | {"sinks": int(one.sinks.sum())}
            | {name: _mean(one.columns[name]) for name in QUANTITIES}
            for level, found in of_level.items()
            for one in found
        ],
    }


def text_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The levels of `measure_texts` as rows for a CSV file, at each point if there are several."""
    where = ("label", "adapter", "insertion_point", "step")
    return [
        {key: point[key] for key in where if "label" in point}
        | {"level": name, **{key: level[key] for key in ("role", "built", "texts", "tokens", "sinks")}}
        | flat_all(level, QUANTITIES)
        for point in results.get("points", [results])
        for name, level in point["levels"].items()
    ]


def token_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The extreme tokens of `measure_texts` as rows for a CSV file."""
    return [
        {"level": level, "end": end, "rank": rank, **token}
        for level, ends in results["tokens"].items()
        for end, tokens in ends.items()
        for rank, token in enumerate(tokens, start=1)
    ]


def surprisal_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Phi by level and bin of surprisal as rows for a CSV file."""
    return [
        {"level": name, **{key: one[key] for key in ("from", "below", "texts", "tokens")}} | flat("phi", one)
        for name, level in results["levels"].items()
        for one in level["by_surprisal"]
    ]


def counted(text: LevelText, scores: "TokenScores") -> NDArray[np.bool_]:
    """(T,) the tokens that count: those of the text itself, in a chat the assistant's.

    Raises:
        InputError: a chat whose template left out the assistant's words.
    """
    starts, ends = scores.offsets.T
    counts = ends > starts
    reply = next((span for span in scores.spans if span.name == "assistant"), None)
    if reply is not None:
        counts &= (ends > reply.start) & (starts < reply.end)
    if not counts.any():
        raise InputError(f"The chat template leaves out {text.name}; score texts alone (--plain).")
    return counts


def _counted(text: LevelText, scores: "TokenScores") -> CountedTokens:
    """The tokens that count, and their columns."""
    counts = counted(text, scores)
    found = {name: column[counts].astype(np.float64) for name, column in scores.without_sinks().items()}
    phi, surprisal, sinks = found["phi"], found["surprisal"], scores.sinks[counts]
    missing = np.full(len(phi), np.nan)
    with_layer = found.get("surprisal_with_layer", missing)
    columns = {name: np.where(sinks, np.nan, found.get(name, missing)) for name in CONTROLS} | {
        "phi": phi,
        "surprisal": surprisal,
        "surprisal_with_layer": with_layer,
        "gap": with_layer - surprisal,
        "phi_later": np.where(np.arange(len(phi)) < EARLY, np.nan, phi),
    }
    return CountedTokens(text, scores, np.flatnonzero(counts), columns, sinks)


def compare_points(points: Sequence[Mapping[str, Any]], along: bool) -> dict[str, Any]:
    """For each pair that the claim is about, since which of several points it is as the paper says.

    Args:
        points: each with its `label` and results of `measure_texts`, in order.
        along: whether they are steps of one training.

    Returns:
        `along`, and `pairs` with `first`, `second`, `above_since` and `separated_since`: the label of the
        first point from which on, to the last, the first level's phi is higher, or higher with separate
        intervals; None where it is not so at the last point.
    """

    def since(number: int, apart: bool) -> str | None:
        """The label of the point from which on it holds to the end."""
        label = None
        for point in reversed(points):
            found = point["pairs"][number]
            if not (found["difference"]["value"] or 0) > 0 or (apart and not found["separated"]):
                break
            label = point["label"]
        return label

    pairs = [
        {"first": pair["first"], "second": pair["second"]}
        | {"above_since": since(number, False), "separated_since": since(number, True)}
        for number, pair in enumerate(points[-1]["pairs"])
        if pair["claim"]
    ]
    return {"along": along, "pairs": pairs}


def _compare(
    estimates: Mapping[str, Mapping[str, statistics.Estimate]], first: str, second: str
) -> dict[str, Any]:
    ours, theirs = estimates[first]["phi"], estimates[second]["phi"]
    return {
        "first": first,
        "second": second,
        "claim": role(first) in INTERESTING and role(second) in BORING,
        "difference": statistics.difference(ours, theirs).as_dict(),
        "ratio": statistics.ratio(ours, theirs).as_dict(),
        "controls": {
            name: statistics.ratio(estimates[first][name], estimates[second][name]).as_dict()
            for name in CONTROLS
        },
        "separated": ours.ci95[0] > theirs.ci95[1] or ours.ci95[1] < theirs.ci95[0],
    }


def _mean(values: Floats) -> float | None:
    present = values[np.isfinite(values)]
    return float(present.mean()) if len(present) else None
