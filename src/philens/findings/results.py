"""A finding of philens' own: phi marks where a result is worked out.

In "23 + 45 = 68" the result has to be there before its first digit is read: at the token before it, the
*place*, which is a space or a sign that says nothing by itself. This compares phi at such places with phi at
places before numbers that are copied, assigned, said to be themselves, counted on to, recalled, arbitrary,
or the result of an operation that does not exist.

Beside phi stand what the prediction at the place is like (surprisal of its own token and of the result's
first, entropy, margin), the other baselines of `philens.scoring`, and two controls: phi of a layer that was
never trained, and the length of the hidden state as the layer reads it. Intervals resample texts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics
from philens.show.estimates import flat, flat_all
from philens.support.errors import InputError
from philens.tasks.results import HELD_OUT, KINDS

if TYPE_CHECKING:
    import pandas as pd

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
    "baselines": _BASELINES,
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
_CONTRASTED = ("phi", "phi_untrained", "state_norm", "surprisal_next")
Mask = NDArray[np.bool_]


def measure_results(
    table: "pd.DataFrame", *, resamples: int = statistics.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What phi says of places where a result is worked out, of a table of `philens.findings.places`.

    `kinds`: means of each kind, with 95 % intervals over texts, in nats where they are of phi, surprisal and
    entropy; `details` has those of carries and the like. `forms`: those of numbers that are `worked` out and
    of all `other` ones, for each form of sentence: a model may calculate in one and not in another.
    `contrasts`: phi of what is worked out against that of every other kind, and other pairs (`PAIRS`):
    difference, and Cohen's d of phi, of both controls and of the surprisal of the number's first token.
    `effects`: how many nats more phi is where a result is worked out than elsewhere, and the partial
    correlation, with others held fixed (`GIVEN`). `classifiers`: AUROC of a logistic regression by some
    columns (`PREDICTORS`), fitted on some templates, on sentences of others, and on the solutions of
    problems; `gains`: differences between two of them. `written`: right results that the model wrote
    against wrong ones.

    `holds`: `above_every_other`, phi is higher than before every other kind of number; `beyond_controls`,
    also with all else held fixed; `beyond_baselines`, phi adds to a classifier that has all else. Each with
    its interval.

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
            name: _describe(table[kind == name], QUANTITIES, resamples, (seed, number))  # pyright: ignore[reportArgumentType]
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
    form = table["template"].str.removeprefix(HELD_OUT)
    found["forms"] = {
        name: {
            side: _describe(table[(form == name) & (role == side)], QUANTITIES, resamples, (seed, number))  # pyright: ignore[reportArgumentType]
            for side in ("worked", "other")
            if ((form == name) & (role == side)).any()
        }
        for number, name in enumerate(dict.fromkeys(form[worked | other]))
    }
    found["worked"] = statistics.mean(table["phi"][worked], table["text"][worked], **options).as_dict()
    found["effects"] = {name: _effect(compared, given, **options) for name, given in GIVEN.items()}  # pyright: ignore[reportArgumentType]
    found |= _classify(table, **options)
    if "written_right" in kinds and "written_wrong" in kinds:
        found["written"] = _written(table[role == "written"], **options)  # pyright: ignore[reportArgumentType]
    against = [item for item in found["contrasts"] if item["first"] == "worked"]
    above = all(_positive(item["phi"]["difference"]) for item in against)
    beyond = _positive(found["effects"]["baselines"]["nats"])
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
        found[name] = statistics.mean(rows[name], rows["text"], resamples=resamples, seed=seed).as_dict(
            "mean"
        )
    if len(details) > 1:
        short = ("phi", "phi_untrained", "surprisal_next")
        found["details"] = {
            name: _describe(rows[rows["detail"] == name], short, resamples, (*seed, number))  # pyright: ignore[reportArgumentType]
            for number, name in enumerate(details)
        }
    return found


def _contrast(table: "pd.DataFrame", first: Mask, second: Mask, **options: Any) -> dict[str, Any]:
    rows = table[first | second]
    found = {}
    for name in _CONTRASTED:
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
        classifier = statistics.fit_classifier(_columns(train, columns), train["role"] == "worked")  # pyright: ignore[reportArgumentType]
        estimates[name] = {
            where: statistics.auroc(
                classifier(_columns(rows, columns)),  # pyright: ignore[reportArgumentType]
                rows["role"].eq("worked") | rows["kind"].eq("problem_result"),  # pyright: ignore[reportAttributeAccessIssue]
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
            name: {"texts": len(some), "right": float((some["kind"] == "written_right").mean())}  # pyright: ignore[reportArgumentType]
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
    return [
        {**_named(layer), "kind": name, "detail": detail}
        | {key: item[key] for key in ("role", "places", "texts")}
        | flat_all(item, QUANTITIES)
        for layer in layers
        for name, found in layer["kinds"].items()
        for detail, item in {"": found, **found.get("details", {})}.items()
    ]


def form_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The forms of `measure_results` of each layer as rows for a CSV file."""
    return [
        {**_named(layer), "form": form, "role": side, "places": item["places"]} | flat_all(item, QUANTITIES)
        for layer in layers
        for form, sides in layer["forms"].items()
        for side, item in sides.items()
    ]


def contrast_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The contrasts of `measure_results` of each layer as rows for a CSV file."""
    return [
        {**_named(layer), "first": item["first"], "second": item["second"]}
        | flat_all(item["phi"])
        | flat_all({f"d_{name.removeprefix('phi_')}": item[name]["d"] for name in _CONTRASTED[1:]})
        for layer in layers
        for item in layer["contrasts"]
    ]


def effect_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Effects and classifiers of `measure_results` of each layer as rows for a CSV file."""
    return [
        {**_named(layer), "measure": f"{kind}{measure}", "by": name} | flat("value", one)
        for layer in layers
        for kind, every in (("", layer["effects"]), ("auroc_", layer["classifiers"]))
        for name, found in every.items()
        for measure, one in found.items()
    ]


def _named(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: layer[key] for key in ("adapter", "insertion_point")}
