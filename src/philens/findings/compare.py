"""Several instruments on the same tokens of the same texts: what each says, and on which tokens they differ.

A *column* is a metric, at an adapter where it is of one: `phi@run-0`, `mtd@head`, `surprisal`. Tokens are
those for which every column has a value, without what is an attention sink to any layer: one set for all
questions. Ranks are a token's among all of these, from 0 to 1, so that nats and numbers of blocks compare.
Intervals resample texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.findings import statistics
from philens.findings.tasks import BORING as BORING_TASKS
from philens.findings.tasks import INTERESTING as IN_CONTEXT
from philens.findings.texts import counted
from philens.lens.metrics import METRICS
from philens.support.columns import Column, column_name
from philens.support.errors import InputError
from philens.tasks.levels import BORING, INTERESTING, LevelText, role

if TYPE_CHECKING:
    import pandas as pd

    from philens.scoring.scores import TokenScores

# Metrics that say where a model computes, and can disagree; the others are what they are held against.
INSTRUMENTS = ("phi", "mtd", "settling_depth", "settling_depth_jsd")
# A kind of token is told only with so many occurrences, in so many texts; and how many of them.
OCCURRENCES, TEXTS, KINDS = 10, 3, 10

Floats = NDArray[np.float64]


def of_adapter(metric: str) -> bool:
    """Whether a metric is of an adapter; else it is of the base alone."""
    return bool({"layers", "path", "head"} & set(METRICS[metric].needs))


def token_frame(
    texts: Sequence[LevelText],
    scores: "Mapping[str, Sequence[TokenScores]]",
    lengths: Sequence[float] | None = None,
) -> "pd.DataFrame":
    """One row for each token that counts: its `level`, the numbers of its `text` and its `place` there, the
    `token`, the `description_length` of its text where there is one, and every column.

    Args:
        scores: of each adapter, by its label, one for each text.
        lengths: one for each text, NaN where it has none.

    Raises:
        InputError: there is no token with a value in every column.
    """
    import pandas as pd

    parts = []
    for number, (text, *found) in enumerate(zip(texts, *scores.values(), strict=True)):
        rows = counted(text, found[0]) & ~np.logical_or.reduce([one.sinks for one in found])
        columns = {
            name: values[rows]
            for label, one in zip(scores, found, strict=True)
            for name, values in _columns(label, one)
        }
        tokens = np.array(found[0].pieces(), object)[rows]
        part = {"level": text.level, "text": number, "place": np.flatnonzero(rows), "token": tokens}
        part |= {} if lengths is None else {"description_length": lengths[number]}
        parts.append(pd.DataFrame(part | columns))
    frame = pd.concat(parts, ignore_index=True)
    columns = columns_of(frame)
    whole = np.isfinite(frame[columns].to_numpy(np.float64)).all(axis=1)
    if not whole.any():
        raise InputError(f"No token has a value in each of {', '.join(columns)}; ask for fewer metrics.")
    frame.attrs["left_out"] = int((~whole).sum())
    return frame.loc[whole].reset_index(drop=True)


def _columns(label: str, scores: "TokenScores") -> Iterator[tuple[str, NDArray[np.float32]]]:
    for column, values in zip(map(Column, scores.columns), scores.columns.values(), strict=True):
        at = f"{label} {column.point}" if column.point else label
        yield column_name(column.metric, at if of_adapter(column.metric) else None), values


def columns_of(frame: "pd.DataFrame") -> list[str]:
    """The columns that are compared, those of one metric together."""
    order = list(METRICS)
    found = [Column(name) for name in frame.columns if Column(name).metric in METRICS]
    return [*sorted(found, key=lambda column: order.index(Column(column).metric))]


def measure_comparison(
    frame: "pd.DataFrame", *, resamples: int = statistics.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What the columns of a `token_frame` say, and how they differ.

    `levels`: means of each column at each level. `ratios`: of an interesting level's mean to a boring one's
    (of formal tasks also to `copy`, a known false positive). `complexity`: in in-context language, each
    column's linear correlation with description length given the base's own surprisal, the same for all, so
    that no column has another one's model held fixed; of surprisal its plain correlation. `agreement`: rank
    correlation of any two columns over tokens, and `within_texts`, where what differs between texts plays no
    part.
    `disagreement`, of any two instruments: the kinds of token (the same string) with the largest mean
    differences of ranks, the first one's less the second one's; intervals are each kind's own.
    """
    columns = columns_of(frame)
    text = frame["text"].to_numpy()
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    means: dict[str, dict[str, statistics.Estimate]] = {}
    for number, (level, rows) in enumerate(frame.groupby("level", sort=False)):
        # A seed for each level: equal ones would resample two levels in step.
        own: dict[str, Any] = {"resamples": resamples, "seed": (seed, number)}
        means[str(level)] = {name: statistics.mean(rows[name], rows["text"], **own) for name in columns}
    return {
        "columns": columns,
        "tokens": len(frame),
        "texts": len(np.unique(text)),
        "tokens_left_out": frame.attrs.get("left_out", 0),
        "levels": {
            level: {
                "texts": next(iter(found.values())).documents,
                "tokens": next(iter(found.values())).rows,
                "columns": {name: one.as_dict("mean") for name, one in found.items()},
            }
            for level, found in means.items()
        },
        "ratios": [
            {"column": name, "interesting": high, "boring": low}
            | statistics.ratio(means[high][name], means[low][name]).as_dict()
            for high, low in _claims(list(means))
            for name in columns
        ],
        "complexity": _complexity(frame, columns, options),
        "agreement": [
            {"first": first, "second": second}
            | statistics.spearman(frame[first], frame[second], text, **options).as_dict()
            | {
                "within_texts": statistics.correlation(
                    frame[first], frame[second], text, rank=True, within=True, **options
                ).as_dict()
            }
            for first, second in combinations(columns, 2)
        ],
        "disagreement": [
            {"first": first, "second": second, "kinds": disagreeing_kinds(frame, first, second, **options)}
            for first, second in combinations([c for c in columns if Column(c).metric in INSTRUMENTS], 2)
        ],
    }


def ranks(values: Any) -> Floats:
    """(N,) from 0, the lowest, to 1; equal values share their mean rank."""
    from scipy.stats import rankdata

    return (rankdata(values) - 1) / max(len(values) - 1, 1)


def disagreeing_kinds(frame: "pd.DataFrame", first: str, second: str, **options: Any) -> list[dict[str, Any]]:
    """The `KINDS` kinds of token with the largest differences, the largest first; of each also both mean
    ranks, and its occurrence with the largest difference that way (`text` and `place`)."""
    found = frame[["text", "place", "token"]].assign(a=ranks(frame[first]), b=ranks(frame[second]))
    found["difference"] = found["a"] - found["b"]
    groups = found.groupby("token", sort=False).agg(
        count=("text", "size"), texts=("text", "nunique"), a=("a", "mean"), b=("b", "mean")
    )
    groups = groups[(groups["count"] >= OCCURRENCES) & (groups["texts"] >= TEXTS)]
    apart = np.abs(np.asarray(groups["a"]) - np.asarray(groups["b"]))
    kinds = []
    for place in np.argsort(-apart, kind="stable")[:KINDS].tolist():
        token, group = groups.index[place], groups.iloc[place]
        rows = found[found["token"] == token]
        estimate = statistics.mean(rows["difference"], rows["text"], **options)
        clearest = rows.iloc[int(np.argmax(np.asarray(rows["difference"]) * np.sign(estimate.value)))]
        kinds.append(
            {"token": token, "occurrences": int(group["count"]), "texts": int(group["texts"])}
            | {"rank_of_first": float(group["a"]), "rank_of_second": float(group["b"])}
            | {"difference": estimate.as_dict()}
            | {"text": int(clearest["text"]), "place": int(clearest["place"])}
        )
    return kinds


def _claims(levels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The pairs of an interesting and a boring level."""
    for high in levels:
        for low in levels:
            tasks = high == IN_CONTEXT and low in (*BORING_TASKS, "copy")
            if tasks or (role(high) in INTERESTING and role(low) in BORING):
                yield high, low


def _complexity(
    frame: "pd.DataFrame", columns: Sequence[str], options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    if "description_length" not in frame:
        return {}
    rows = frame[frame["level"] == IN_CONTEXT]
    found = {}
    for name in map(Column, columns):
        held = "surprisal" in columns and not name.metric.startswith("surprisal")
        fixed = [rows["surprisal"]] if held else []
        found[name] = {"given": "surprisal" if held else None} | statistics.correlation(
            rows[name], rows["description_length"], rows["text"], fixed, **options
        ).as_dict()
    return found
