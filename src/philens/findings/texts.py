"""Finding 3: phi tells interesting text from boring text.

Code and prose that a model has not seen make it compute; trivial text (counting, repetition), text that it
knows by heart (licences) and shuffled words do not, although shuffled words are the most surprising of all.

Tokens that count are those of the text itself: of a chat the assistant's, else all that stand for
characters, so not a BOS token. A text's first token has a phi; unless something stands before it, no
surprisal. Intervals resample texts, never tokens or pieces of a text, which are not independent.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.errors import ConfigError, InputError
from philens.findings import statistics
from philens.tasks.levels import BORING, INTERESTING, LevelText, in_order, role

if TYPE_CHECKING:
    from philens.model import PHiModel
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
QUANTITIES = ("phi", "surprisal", "surprisal_with_layer", "gap", "phi_later")

Floats = NDArray[np.float64]


def score_texts(
    lens: "PHiModel", tokenizer: Any, texts: Sequence[LevelText], window: int | None = None
) -> "Iterator[TokenScores]":
    """Scores of the texts, in order; those with a user's message as chats where the tokenizer has a template.

    Raises:
        ConfigError: a lens with several layers.
        InputError: texts of which some have a user's message and some have none, in a chat model; or what
            `philens.score` raises.
    """
    from philens.scoring.score import iter_scores

    if lens.config.layers is not None:
        raise ConfigError(
            f"texts measures one layer and this model has {len(lens.layers)}; train one with phi.layer."
        )
    as_chats = [bool(getattr(tokenizer, "chat_template", None)) and text.user is not None for text in texts]
    if any(as_chats) and not all(as_chats):
        name = texts[as_chats.index(False)].name
        raise InputError(
            f"{name} has no user's message and other texts have one; give each one, or score texts alone "
            "with --plain."
        )
    contents = [_chat(text) if as_chat else text.text for text, as_chat in zip(texts, as_chats, strict=True)]
    return iter_scores(lens, tokenizer, contents, window=window, names=[text.name for text in texts])


def _chat(text: LevelText) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": text.user or ""},
        {"role": "assistant", "content": text.text},
    ]


def measure_texts(
    texts: Sequence[LevelText],
    scores: "Iterable[TokenScores]",
    *,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Means of each level with 95 % intervals over texts, nats per token, and what they say of the claim.

    `levels`, in the paper's order, have phi, surprisal of the untouched base, surprisal with the layer, their
    gap (None for a lens that observes) and `phi_later` (without each text's first 16 tokens). `texts` has the
    same means of every text. `pairs`, any two levels: difference and ratio of the first one's phi to the
    second one's, whether their intervals are `separated`, and whether the paper's `claim` is about them.
    `phi_order` and `surprisal_order` name levels from high to low. `holds` says that code and prose (and
    one's `own` texts) lie above trivial, memorised and shuffled ones, as far as they are here, separated, and
    that surprisal puts these in another order.

    Args:
        texts: of two levels or more.
        scores: one for each text, with phi and surprisal.

    Raises:
        InputError: a chat whose template left out the assistant's words.
    """
    columns: list[dict[str, Floats]] = [
        _counted(text, found) for text, found in zip(texts, scores, strict=True)
    ]
    levels = in_order(text.level for text in texts)
    estimates: dict[str, dict[str, statistics.Estimate]] = {}
    for number, level in enumerate(levels):
        chosen = [found for text, found in zip(texts, columns, strict=True) if text.level == level]
        document = np.repeat(np.arange(len(chosen)), [len(found["phi"]) for found in chosen])
        # A seed for each level: equal ones would resample two levels in step.
        estimates[level] = {
            name: statistics.mean(
                np.concatenate([found[name] for found in chosen]),
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
    pairs = [_compare(estimates, *pair) for pair in _pairs(levels)]
    claimed = [pair for pair in pairs if pair["claim"]]
    compared = {pair[side] for pair in claimed for side in ("first", "second")}
    by_phi, by_surprisal = (
        [level for level in order if level in compared] for order in (phi_order, surprisal_order)
    )
    return {
        "levels": {
            level: {
                "role": role(level),
                "built": all(text.built for text in texts if text.level == level),
                "texts": found["phi"].documents,
                "tokens": found["phi"].rows,
                "tokens_without_surprisal": found["surprisal"].dropped,
                **{name: _as_dict(found[name]) for name in QUANTITIES},
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
        "texts": [
            {"level": text.level, "document": text.name, "built": text.built, "tokens": len(found["phi"])}
            | {name: _mean(found[name]) for name in QUANTITIES}
            for text, found in sorted(
                zip(texts, columns, strict=True), key=lambda item: levels.index(item[0].level)
            )
        ],
    }


def text_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The levels of `measure_texts` as rows for a CSV file."""
    rows = []
    for name, level in results["levels"].items():
        row = {"level": name, **{key: level[key] for key in ("role", "built", "texts", "tokens")}}
        for key in QUANTITIES:
            found = level[key] or {"mean": None, "ci95": [None, None]}
            row |= {key: found["mean"], f"{key}_low": found["ci95"][0], f"{key}_high": found["ci95"][1]}
        rows.append(row)
    return rows


def _counted(text: LevelText, scores: "TokenScores") -> dict[str, Floats]:
    """The columns of the tokens that count, (T,) each."""
    starts, ends = scores.offsets.T
    counts = ends > starts
    if scores.spans:
        reply = next(span for span in scores.spans if span.name == "assistant")
        counts &= (ends > reply.start) & (starts < reply.end)
    counts &= scores.counts("phi")
    if not counts.any():
        raise InputError(f"The chat template leaves out {text.name}; score texts alone (--plain).")
    phi, surprisal = (column[counts].astype(np.float64) for column in (scores.phi, scores.surprisal))
    missing = np.full(len(phi), np.nan)
    with_layer = scores.columns.get("surprisal_with_layer")
    with_layer = missing if with_layer is None else with_layer[counts].astype(np.float64)
    return {
        "phi": phi,
        "surprisal": surprisal,
        "surprisal_with_layer": with_layer,
        "gap": with_layer - surprisal,
        "phi_later": np.where(np.arange(len(phi)) < EARLY, np.nan, phi),
    }


def _pairs(levels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """All pairs, the one first that comes later in the paper's order."""
    for number, level in enumerate(levels):
        for other in levels[:number]:
            yield level, other


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
        "separated": ours.ci95[0] > theirs.ci95[1] or ours.ci95[1] < theirs.ci95[0],
    }


def _as_dict(estimate: statistics.Estimate) -> dict[str, Any] | None:
    return estimate.as_dict("mean") if estimate.rows else None


def _mean(values: Floats) -> float | None:
    present = values[np.isfinite(values)]
    return float(present.mean()) if len(present) else None
