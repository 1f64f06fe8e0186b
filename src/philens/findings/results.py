"""A finding of philens' own: phi marks where a result is worked out.

In "23 + 45 = 68" the result has to be there before its first digit is read: at the token before it, the *place*,
which is a space or a sign that says nothing by itself. This compares phi at such places with phi at places before
numbers that are copied, assigned, said to be themselves, counted on to, recalled, arbitrary, or the result of an
operation that does not exist.

Beside phi stand what the prediction at the place is like (surprisal of its own token and of the result's first,
entropy, margin), the other baselines of `philens.scoring`, and two controls: phi of a layer that was never
trained, and the length of the hidden state as the layer reads it. Intervals resample texts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.errors import InputError
from philens.findings import statistics
from philens.findings.classify import fit_classifier
from philens.findings.controls import untrained
from philens.scoring.solutions import after_prompt, joining
from philens.tasks.results import KINDS, MarkedText, Question, mark_answer

if TYPE_CHECKING:
    import pandas as pd

    from philens.model import PHiModel
    from philens.scoring.scores import TokenScores

# About the prediction of a token: taken of the place's own and, as NAME_next, of the next, the result's first.
_OF_PREDICTION = ("surprisal", "surprisal_with_layer", "entropy", "margin")
_OF_BASE = ("surprisal", "entropy", "margin", "settling_depth")
QUANTITIES = (
    *("phi", "phi_untrained", "state_norm", "surprisal", "surprisal_next", "entropy_next", "position"),
)
_SURPRISAL = ("surprisal", "surprisal_next")
_ENTROPY = ("entropy", "entropy_next")
# All that is known of a place but phi.
_BASELINES = (
    *(*_SURPRISAL, *_ENTROPY, "margin", "margin_next", "logit_lens_divergence", "settling_depth"),
    *("step_length", "state_norm", "phi_untrained", "position"),
)
# What is held fixed when phi is compared.
GIVEN = {
    "nothing": (),
    "surprisal": _SURPRISAL,
    "surprisal_and_entropy": (*_SURPRISAL, *_ENTROPY),
    "state_norm": ("state_norm",),
    "phi_untrained": ("phi_untrained",),
    "everything": _BASELINES,
}
PREDICTORS = {
    "phi": ("phi",),
    "surprisal": _SURPRISAL,
    "phi_and_surprisal": ("phi", *_SURPRISAL),
    "entropy": _ENTROPY,
    "state_norm": ("state_norm",),
    "phi_untrained": ("phi_untrained",),
    "baselines": _BASELINES,
    "baselines_and_phi": (*_BASELINES, "phi"),
}
# What phi adds to others: the first of a pair against the second.
GAINS = (("phi_and_surprisal", "surprisal"), ("baselines_and_phi", "baselines"), ("phi", "phi_untrained"))
# Beside each kind of other number against what is worked out.
PAIRS = (
    *(("sum_after_sum", "same_sum_again"), ("sum", "plus_zero"), ("sum", "wrong_result")),
    *(("problem_result", "problem_operand"), ("problem_result", "problem_result_again")),
    ("written_right", "written_wrong"),
)
# Tokens that a model may write after a question; a number of three digits in bytes has four.
_REPLY_TOKENS, _ROWS = 5, 64

Mask = NDArray[np.bool_]


def place_before(offsets: NDArray[np.int64], character: int) -> int | None:
    """The token before the one that has this character; None if that is the first or there is none.

    Args:
        offsets: (T, 2) each token's characters, end not included.
    """
    starts, ends = offsets.T
    found = np.flatnonzero((starts <= character) & (character < ends))
    return int(found[0]) - 1 if len(found) and found[0] > 0 else None


def written(lens: "PHiModel", tokenizer: Any, questions: Sequence[Question]) -> list[MarkedText]:
    """The questions with what the base writes after them, always the likeliest token, up to a number's end.

    Left out are replies that do not begin with a number, and texts that the tokenizer would make other tokens
    of than the model wrote.
    """
    import torch

    from philens.scoring.texts import tokenize_all

    prompts = tokenize_all(tokenizer, [question.text for question in questions], ["a question"] * len(questions))
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.token_ids), []).append(number)
    batches = [rows[k : k + _ROWS] for rows in by_length.values() for k in range(0, len(rows), _ROWS)]
    device = next(lens.base.parameters()).device
    replies: dict[int, tuple[list[int], MarkedText]] = {}
    was_training = lens.base.training
    lens.base.eval()
    with torch.no_grad(), lens.disabled():
        for rows in batches:
            ids = torch.from_numpy(np.stack([prompts[row].token_ids for row in rows])).to(device)
            for _ in range(_REPLY_TOKENS):
                logits = lens(ids, returns="states").logits_at(slice(ids.shape[1] - 1, None))
                ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
            for row, written_ids in zip(rows, ids.tolist(), strict=True):
                reply = tokenizer.decode(
                    written_ids[len(prompts[row].token_ids) :], clean_up_tokenization_spaces=False
                )
                if (marked := mark_answer(questions[row], reply)) is not None:
                    replies[row] = written_ids, marked
    lens.base.train(was_training)
    chosen = [replies[row] for row in sorted(replies)]
    texts = [marked.text for _, marked in chosen]
    again = tokenize_all(tokenizer, texts, ["a reply"] * len(texts)) if texts else []
    return [
        marked
        for (ids, marked), tokens in zip(chosen, again, strict=True)
        if ids[: len(tokens.token_ids)] == tokens.token_ids.tolist()
    ]


def score_places(
    lens: "PHiModel",
    tokenizer: Any,
    texts: Sequence[MarkedText],
    base_of: "pd.DataFrame | None" = None,
    seed: int = 0,
) -> "dict[str, pd.DataFrame]":
    """The places of texts with all that is known of them: a table for each insertion point of the lens.

    A row is a place: text, kind, role, detail, template, held_out, number, token (its text), position (in
    tokens) and the measures, NAME_next being of the prediction of the number's first token.

    Args:
        lens: a model with PHi layers.
        tokenizer: its tokenizer.
        texts: with places.
        base_of: such a table of the same texts in the same base, whose columns of the base are taken over.
        seed: of the untrained layer.

    Raises:
        InputError: what `philens.score` raises.
    """
    import pandas as pd

    from philens.progress import shown
    from philens.scoring.score import iter_scores

    contents, starts = [], []
    for text in texts:
        reply = text.text if not text.chat or tokenizer.chat_template else f" {text.text}"
        content, start = after_prompt(tokenizer, text.chat or "", reply) if text.chat else (reply, 0)
        contents.append(content)
        starts.append(start + len(reply) - len(text.text))
    metrics = _metrics(lens, base_of is None)
    names = [text.name for text in texts]
    reader = joining(tokenizer)
    scored = iter_scores(lens, reader, contents, metrics=metrics, names=names)
    rows: list[dict[str, Any]] = []
    for text, start, scores in shown(zip(texts, starts, scored, strict=True), "scoring", len(texts)):
        rows += _rows(text, start, scores)
    fresh: list[dict[str, Any]] = []
    with untrained(lens, seed):
        again = iter_scores(lens, reader, contents, metrics=["phi"], names=names)
        for text, start, scores in shown(zip(texts, starts, again, strict=True), "controls", len(texts)):
            fresh += _rows(text, start, scores)
    table = pd.DataFrame(rows)
    for name in [name for name in fresh[0] if name.partition("@")[0] == "phi"]:
        table[name.replace("phi", "phi_untrained", 1)] = [row[name] for row in fresh]
    if base_of is not None:
        for name in base_of:
            if name.removesuffix("_next") in _OF_BASE:
                table[name] = base_of[name].to_numpy()
    if lens.config.layers is None:
        return {lens.module_paths[0]: table}
    shared = [name for name in table if "@" not in str(name)]
    return {
        path: table[[*shared, *(name for name in table if str(name).endswith(f"@{path}"))]].rename(
            columns=lambda name: name.partition("@")[0]
        )
        for path in lens.module_paths
    }


def _metrics(lens: "PHiModel", with_base: bool) -> list[str]:
    """All that this lens has."""
    from philens.scoring.baselines import LogitLens
    from philens.scoring.score import METRICS

    left_out = set() if with_base else set(_OF_BASE)
    if lens.config.mode == "observe":
        left_out.add("surprisal_with_layer")
    try:
        LogitLens(lens, every_block=True)
    except InputError:
        left_out |= {"logit_lens_divergence", "settling_depth"}
    return [name for name in METRICS if name not in left_out]


def _rows(text: MarkedText, start: int, scores: "TokenScores") -> Iterator[dict[str, Any]]:
    pieces = scores.pieces()
    for place in text.places:
        at = place_before(scores.offsets, start + place.start)
        if at is None:
            continue
        row: dict[str, Any] = {
            "text": text.name,
            "kind": place.kind,
            "role": KINDS[place.kind],
            "detail": place.detail,
            "template": text.template,
            "held_out": text.held_out,
            "number": text.text[place.start : place.end],
            "token": pieces[at],
            "position": at,
        }
        for name, values in scores.columns.items():
            row[name] = float(values[at])
            if name in _OF_PREDICTION:
                row[f"{name}_next"] = float(values[at + 1])
        yield row


def measure_results(
    table: "pd.DataFrame", *, resamples: int = statistics.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What phi says of places where a result is worked out, of a table of `score_places`.

    `kinds`: means of each kind, with 95 % intervals over texts, in nats where they are of phi, surprisal and
    entropy; `details` has those of carries and the like. `contrasts`: phi of what is worked out against that
    of every other kind, and other pairs (`PAIRS`): difference, and Cohen's d of phi, of both controls and of
    the surprisal of the number's first token. `effects`: how many nats more phi is where a result is worked out
    than elsewhere, and the partial correlation, with others held fixed (`GIVEN`). `classifiers`: AUROC of a
    logistic regression by some columns (`PREDICTORS`), fitted on some templates, on sentences of others, and
    on the solutions of problems; `gains`: differences between two of them. `written`: right results that the
    model wrote against wrong ones.

    `holds`: `above_every_other`, phi is higher than before every other kind of number; `beyond_controls`, also
    with all else held fixed; `beyond_baselines`, phi adds to a classifier that has all else. Each with its
    interval.

    Raises:
        InputError: there is no place where a result is worked out, or nothing to compare it with.
    """
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    role, kind = (table[name].to_numpy() for name in ("role", "kind"))
    worked, other = role == "worked", role == "other"
    if not worked.any() or not other.any():
        raise InputError(
            "There are no places to compare; give texts with results that are worked out and other numbers."
        )
    kinds = [name for name in KINDS if (kind == name).any()]
    found: dict[str, Any] = {
        "kinds": {
            name: _describe(table[kind == name], QUANTITIES, resamples, (seed, number))
            for number, name in enumerate(kinds)
        }
    }
    pairs = [("worked", name) for name in kinds if KINDS[name] == "other"]
    pairs += [pair for pair in PAIRS if set(pair) <= set(kinds)]
    found["contrasts"] = [
        _contrast(table, worked if first == "worked" else kind == first, kind == second, **options)
        | {"first": first, "second": second}
        for first, second in pairs
    ]
    compared = table[worked | other]
    found["effects"] = {name: _effect(compared, given, **options) for name, given in GIVEN.items()}
    found |= _classify(table, **options)
    if "written_right" in kinds and "written_wrong" in kinds:
        found["written"] = _written(table[role == "written"], **options)
    others = found["contrasts"][: len(pairs) - sum(set(pair) <= set(kinds) for pair in PAIRS)]
    above = all(_positive(item["phi"]["difference"]) for item in others)
    beyond = _positive(found["effects"]["everything"]["nats"])
    gain = next(item for item in found["gains"] if item["first"] == "baselines_and_phi")
    found["above_every_other"], found["beyond_controls"] = above, beyond
    found["beyond_baselines"] = _positive(gain["sentences"])
    found["holds"] = above and beyond and found["beyond_baselines"]
    return found


def _positive(estimate: Mapping[str, Any]) -> bool:
    low = estimate["ci95"][0]
    return low is not None and low > 0


def _describe(
    rows: "pd.DataFrame", quantities: Iterable[str], resamples: int, seed: tuple[int, ...]
) -> dict[str, Any]:
    details = [name for name in dict.fromkeys(rows["detail"]) if name]
    found: dict[str, Any] = {
        "role": rows["role"].iloc[0],
        "places": len(rows),
        "texts": rows["text"].nunique(),
    }
    for name in quantities:
        found[name] = statistics.mean(rows[name], rows["text"], resamples=resamples, seed=seed).as_dict("mean")
    if len(details) > 1:
        short = ("phi", "phi_untrained", "surprisal_next")
        found["details"] = {
            name: _describe(rows[rows["detail"] == name], short, resamples, (*seed, number))
            for number, name in enumerate(details)
        }
    return found


def _contrast(table: "pd.DataFrame", first: Mask, second: Mask, **options: Any) -> dict[str, Any]:
    rows = table[first | second]
    found = {}
    for name in ("phi", "phi_untrained", "state_norm", "surprisal_next"):
        contrast = statistics.contrast(rows[name], first[first | second], rows["text"], **options)
        found[name] = {"difference": contrast.difference.as_dict(), "d": contrast.d.as_dict()}
    return found


def _columns(table: "pd.DataFrame", names: Iterable[str]) -> list[NDArray[np.float64]]:
    """Those of the columns that there are: some models lack some."""
    return [table[name].to_numpy(np.float64) for name in names if name in table]


def _effect(rows: "pd.DataFrame", given: Iterable[str], **options: Any) -> dict[str, Any]:
    worked, held = (rows["role"] == "worked").to_numpy(np.float64), _columns(rows, given)
    nats = statistics.slope(worked, rows["phi"], rows["text"], held, **options)
    partial = statistics.correlation(worked, rows["phi"], rows["text"], held, **options)
    return {"nats": nats.as_dict(), "partial_correlation": partial.as_dict()}


def _classify(table: "pd.DataFrame", **options: Any) -> dict[str, Any]:
    sentences = table[table["role"].isin(("worked", "other"))]
    train, test = sentences[~sentences["held_out"]], sentences[sentences["held_out"]]
    problems = table[table["role"] == "problem"]
    estimates: dict[str, dict[str, statistics.Estimate]] = {}
    for name, columns in PREDICTORS.items():
        classifier = fit_classifier(_columns(train, columns), train["role"] == "worked")
        estimates[name] = {
            where: statistics.auroc(
                classifier(_columns(rows, columns)),
                rows["role"].eq("worked") | rows["kind"].eq("problem_result"),
                rows["text"],
                **options,
            )
            for where, rows in (("sentences", test), ("problems", problems))
            if len(rows)
        }
    return {
        "classifiers": {
            name: {where: estimate.as_dict() for where, estimate in found.items()}
            for name, found in estimates.items()
        },
        "gains": [
            {"first": first, "second": second}
            | {
                where: statistics.difference(estimates[first][where], estimates[second][where]).as_dict()
                for where in estimates[first]
            }
            for first, second in GAINS
        ],
    }


def _written(rows: "pd.DataFrame", **options: Any) -> dict[str, Any]:
    right = (rows["kind"] == "written_right").to_numpy(np.float64)
    strata = [(rows["detail"] == name).to_numpy(np.float64) for name in dict.fromkeys(rows["detail"])]
    partial = {
        given: statistics.correlation(
            right, rows["phi"], rows["text"], [*strata, *_columns(rows, names)], **options
        ).as_dict()
        for given, names in (
            ("kind_of_calculation", ()),
            ("and_surprisal_and_entropy", ("surprisal_next", "entropy_next")),
        )
    }
    return {
        "shares": {
            name: {"texts": len(some), "right": float((some["kind"] == "written_right").mean())}
            for name, some in rows.groupby("detail", sort=False)
        },
        "partial_correlation": partial,
        "auroc_of_right": {
            name: statistics.auroc(rows[name], right, rows["text"], **options).as_dict()
            for name in ("phi", "phi_untrained", "state_norm", "surprisal_next", "entropy_next")
        },
    }


def kind_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The kinds of `measure_results` of each layer, with their details, as rows for a CSV file."""
    rows = []
    for layer in layers:
        for name, found in layer["kinds"].items():
            for detail, item in {"": found, **found.get("details", {})}.items():
                row = {**_named(layer), "kind": name, "detail": detail, "role": item["role"]}
                row |= {"places": item["places"], "texts": item["texts"]}
                for key in QUANTITIES:
                    row |= _flat(key, item.get(key), "mean")
                rows.append(row)
    return rows


def contrast_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The contrasts of `measure_results` of each layer as rows for a CSV file."""
    return [
        {**_named(layer), "first": item["first"], "second": item["second"]}
        | _flat("difference", item["phi"]["difference"])
        | _flat("d", item["phi"]["d"])
        | _flat("d_untrained", item["phi_untrained"]["d"])
        | _flat("d_state_norm", item["state_norm"]["d"])
        | _flat("d_surprisal_next", item["surprisal_next"]["d"])
        for layer in layers
        for item in layer["contrasts"]
    ]


def effect_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Effects and classifiers of `measure_results` of each layer as rows for a CSV file."""
    rows = []
    for layer in layers:
        for name, item in layer["effects"].items():
            for key in ("nats", "partial_correlation"):
                rows.append(_named(layer) | {"measure": key, "by": name} | _flat("value", item[key]))
        for name, item in layer["classifiers"].items():
            for where, found in item.items():
                rows.append(_named(layer) | {"measure": f"auroc_{where}", "by": name} | _flat("value", found))
    return rows


def _named(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: layer[key] for key in ("adapter", "insertion_point")}


def _flat(name: str, estimate: Mapping[str, Any] | None, key: str = "value") -> dict[str, Any]:
    found = estimate or {key: None, "ci95": [None, None]}
    return {name: found[key], f"{name}_low": found["ci95"][0], f"{name}_high": found["ci95"][1]}
