"""The scores of one text: numbers per token, and the same by word, span, table, page and figure."""

import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from philens.lens.config import MetricOptions
from philens.scoring.alternatives import Alternatives
from philens.show.colours import plain_label
from philens.show.notebook import texts_markup
from philens.show.page import PageDocument, write_scores_page
from philens.support.columns import Column, column_name
from philens.support.errors import InputError
from philens.support.files import write_atomically
from philens.support.output import visible_spaces
from philens.support.typed import nearest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from philens.lens.metrics import Metric

FORMAT = 1
# Columns whose means and sums leave out attention sinks, whose hidden states are like no other token's.
_WITHOUT_SINKS = {"phi", "phi_standard_error"}
# What is told of a text or span beside its mean, where the metric is also one of groups of tokens.
OF_GROUPS = ("lowest_group", "tail")
# A longer text's figure has token numbers, not tokens, below it.
_TOKENS_NAMED = 80


class Span(NamedTuple):
    """A named part of a text: characters `start` to `end` (not included)."""

    name: str
    start: int
    end: int


class SpanMeans(NamedTuple):
    """What `TokenScores.means` says, over a span's tokens."""

    name: str
    tokens: int
    means: dict[str, float]


class Spans(list[Span]):
    """The spans of a text. Called, it gives the scores by span as a table."""

    def __init__(self, spans: Iterable[Span], table: "Callable[[Sequence[Span]], pd.DataFrame]") -> None:
        super().__init__(spans)
        self._table = table

    def __call__(self, spans: Iterable[Any] | None = None) -> "pd.DataFrame":
        """One row per span, with name, start, end, tokens, and sum and mean of every column; of confidence
        also of its lowest and its last group of tokens, as `TokenScores.means` has them.

        Args:
            spans: `Span`s, (name, start, end) or matches of a regular expression (their name is the group
                that matched last, or else what they matched); they may overlap. None means the text's own.

        Raises:
            InputError: something else.
        """
        return self._table(self if spans is None else [_as_span(span) for span in spans])


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores:
    """What a lens found in one text of T tokens; made by `philens.score`.

    Attributes:
        text: the text scored; of a chat, what the tokenizer's template made of it.
        token_ids: (T,) int64.
        offsets: (T, 2) int64, each token's characters in `text`, end not included; start equals end for
            tokens without text, such as a BOS token.
        columns: values by name, (T,) float32, NaN where there is no value; docs/scoring.md says what each is.
        spans: parts of the text, which may lie in one another: of a chat one for each message, with its role
            as the name; `think` and `answer` where there are thoughts; and steps, where they were asked for.
            `spans(...)` gives a table of these or of other spans.
        provenance: what the numbers were made with.
        sinks: (T,) bool, attention sinks: tokens with a hidden state many times as long as others', as many
            models' first token. They have a phi as others do, and means and sums of phi leave them out. Of
            several layers, what is one for any of them.
        alternatives: what else could have stood in each token's place, where it was asked for.
        name: name of the text, as the caller calls it.

    Raises:
        InputError: shapes that do not fit together.
    """

    text: str
    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    columns: dict[str, NDArray[np.float32]]
    spans: Spans = field(default=())  # pyright: ignore[reportAssignmentType]
    provenance: dict[str, Any] = field(default_factory=dict)
    sinks: NDArray[np.bool_] = field(default=())  # pyright: ignore[reportAssignmentType]
    alternatives: Alternatives | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        if not len(self.sinks):
            object.__setattr__(self, "sinks", np.zeros(count, bool))
        if self.offsets.shape != (count, 2):
            raise InputError(
                f"offsets must have shape ({count}, 2) like the tokens, not {self.offsets.shape}."
            )
        for name, values in (self.columns | {"sinks": self.sinks}).items():
            if values.shape != (count,):
                raise InputError(f"{name} must have shape ({count},) like the tokens, not {values.shape}.")
        if self.alternatives is not None and len(self.alternatives) != count:
            raise InputError(f"There must be alternatives for {count} tokens, not {len(self.alternatives)}.")
        table = partial(_span_table, self.text, self.offsets, self.without_sinks(), self.group)
        object.__setattr__(self, "spans", Spans(map(_as_span, self.spans), table))

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        start = self.text if len(self.text) <= 32 else self.text[:31] + "…"
        means = ", ".join(f"{name} {value:.3g}" for name, value in self.means().items())
        return f"TokenScores({start!r}, {len(self)} tokens; means: {means})"

    @property
    def units(self) -> dict[str, str]:
        """The unit of each column, and of what else `means` has; empty where it is a plain number."""
        return {name: unit(name) for column in self.columns for name in (column, *group_names(column))}

    @property
    def group(self) -> int:
        """Tokens in a group of confidence."""
        return MetricOptions(**self.provenance.get("metric_options", {})).group

    @property
    def phi(self) -> NDArray[np.float32]:
        """(T,) nats; raises InputError where several layers have a phi each, or none was asked for."""
        return self._column("phi")

    @property
    def surprisal(self) -> NDArray[np.float32]:
        """(T,) nats, of the base model without the layer; NaN on the first token."""
        return self._column("surprisal")

    def _column(self, name: str) -> NDArray[np.float32]:
        if name in self.columns:
            return self.columns[name]
        if not self.columns:
            raise InputError(f"There is no column {name!r}, nor any other; score the text with metrics.")
        close = nearest(name, list(self.columns))
        raise InputError(
            f"There is no column {name!r}; did you mean {close!r} (there are {', '.join(self.columns)})?"
        )

    def pieces(self) -> list[str]:
        """The text of each token; `"".join(pieces)` is the text.

        What lies between two tokens' characters goes to the second, what follows the last to the last token
        with text. Of several tokens in one character (byte-level vocabularies) the first has it and the
        others have an empty piece.
        """
        pieces, done = [], 0
        ends = np.maximum.accumulate(self.offsets[:, 1]) if len(self) else self.offsets[:, 1]
        with_text = np.flatnonzero(self.offsets[:, 1] > self.offsets[:, 0])
        last = with_text[-1] if len(with_text) else len(self) - 1
        for number, end in enumerate(ends.tolist()):
            end = len(self.text) if number >= last else end
            pieces.append(self.text[done:end])
            done = end
        return pieces

    def words(self) -> "pd.DataFrame":
        """One row per word: word, start, end, tokens, and sum and mean of every column (`phi_sum`, ...).

        A word is a longest run of characters that are not space, cut where a span begins or ends; scripts
        that put no space between words need spans from a segmenter. A token counts in the word of its first
        character that is not space, and nowhere if it has none. Sum and mean are over tokens that have a
        value, those of phi without attention sinks, and NaN where none has. Texts with spans have a column
        `span`: the one the word is in.
        """
        edges = sorted({edge for span in self.spans for edge in span[1:]})
        words = []
        for match in re.finditer(r"\S+", self.text):
            start, end = match.span()
            inner = edges[bisect_right(edges, start) : bisect_left(edges, end)]
            for first, last in zip([start, *inner], [*inner, end], strict=True):
                words.append(Span(self.text[first:last], first, last))
        table = self.spans(words).rename(columns={"name": "word"})
        table = table.drop(columns=[one for name in self.columns for one in group_names(name)])
        if self.spans:
            names = np.full(len(table), None, object)
            for span in reversed(self.spans):
                names[((table["start"] >= span.start) & (table["start"] < span.end)).to_numpy()] = span.name
            table.insert(1, "span", names)
        return table

    def counts(self, column: str) -> NDArray[np.bool_]:
        """(T,) whether a token counts in means and sums of a column: in those of phi, sinks don't."""
        return ~self.sinks if Column(column).metric in _WITHOUT_SINKS else np.ones(len(self), bool)

    def without_sinks(self) -> dict[str, NDArray[np.float32]]:
        """The columns as means and sums are made of them, NaN where a token does not count."""
        return {
            name: np.where(self.counts(name), values, np.float32(np.nan))
            for name, values in self.columns.items()
        }

    def means(self) -> dict[str, float]:
        """The mean of each column over the tokens that have a value, of phi without attention sinks; NaN if
        none has. Of confidence also the mean of its lowest group of tokens, `confidence_lowest_group`, and of
        its last, `confidence_tail` (`of_groups`)."""
        found = {}
        for name, values in self.without_sinks().items():
            present = values[~np.isnan(values)]
            found[name] = float(np.mean(present, dtype=np.float64)) if len(present) else np.nan
            if names := group_names(name):
                found |= zip(names, of_groups(values, self.group), strict=True)
        return found

    def span_means(self) -> list[SpanMeans]:
        """The means of each of the text's spans, in order."""
        if not self.spans:
            return []
        found = _span_totals(self.text, self.offsets, self.without_sinks(), self.group, self.spans)
        means = {}
        for name, (total, count) in found.sums.items():
            means[name] = (total / np.maximum(count, 1)).tolist()
            means |= {one: found.groups[one].tolist() for one in group_names(name)}
        return [
            SpanMeans(
                span.name, int(found.tokens[number]), {name: values[number] for name, values in means.items()}
            )
            for number, span in enumerate(self.spans)
        ]

    def at_point(self, point: str | None) -> "TokenScores":
        """The scores with the columns of one of several insertion points, under their plain names; None
        means all as they are."""
        if point is None:
            return self
        names = [column for column in map(Column, self.columns) if column.point in (None, point)]
        return replace(self, columns={column.metric: self.columns[column] for column in names})

    def to_pandas(self) -> "pd.DataFrame":
        """One row per token: token (its piece of the text), token_id, start, end, and every column; with
        alternatives also `rank`, missing where it has none, and the lists `alternatives` and `probabilities`.
        """
        import pandas as pd

        tokens = {
            "token": self.pieces(),
            "token_id": self.token_ids,
            "start": self.offsets[:, 0],
            "end": self.offsets[:, 1],
        }
        table = pd.DataFrame(tokens | self.columns)
        if self.alternatives is not None:
            lists = self.alternatives.to_lists()
            table["rank"] = pd.array(lists["ranks"], "Int64")
            table["alternatives"], table["probabilities"] = lists["texts"], lists["probabilities"]
        return table

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The scores as JSON, written to `path` if given; NaN is null, floats come back bit by bit.

        Raises:
            OutputError: the file cannot be written.
        """
        value = {
            "format": FORMAT,
            "text": self.text,
            "token_ids": self.token_ids.tolist(),
            "offsets": self.offsets.tolist(),
            "columns": {name: _json_numbers(values) for name, values in self.columns.items()},
            "spans": [list(span) for span in self.spans],
            "sinks": np.flatnonzero(self.sinks).tolist(),
            "provenance": ({} if self.name is None else {"name": self.name}) | self.provenance,
        }
        if self.alternatives is not None:
            value["alternatives"] = {"of": self.alternatives.of, **self.alternatives.to_lists()}
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if path is not None:
            write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "TokenScores":
        """Scores from what `to_json` gave: the JSON itself, or the path of the file.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        text, where = str(source), "The JSON"
        try:
            if not text.lstrip().startswith("{"):
                where, text = text, Path(source).read_text(encoding="utf-8")
            value = json.loads(text)
        except OSError as error:
            raise InputError(f"Cannot read {where}: {error.strerror}; check the path.") from error
        except ValueError as error:
            raise InputError(
                f"{where} is not readable as JSON ({error}); give what to_json wrote."
            ) from error
        try:
            if value["format"] != FORMAT:
                raise InputError(
                    f"{where} has format {value['format']!r} and this program reads format {FORMAT}; "
                    "install the version that wrote it."
                )
            columns = {
                name: np.array(
                    [np.nan if number is None else float(number) for number in numbers], np.float32
                )
                for name, numbers in value["columns"].items()
            }
            offsets = np.array(value["offsets"], np.int64).reshape(-1, 2)
            ids = np.array(value["token_ids"], np.int64)
            sinks = np.zeros(len(ids), bool)
            sinks[value.get("sinks", [])] = True  # scores of philens 0.1 know of none
            provenance = dict(value["provenance"])
            name = provenance.pop("name", None)
            others = value.get("alternatives")
            alternatives = None if others is None else Alternatives.from_lists(others["of"], others)
            return cls(
                value["text"],
                ids,
                offsets,
                columns,
                value["spans"],
                provenance,
                sinks,
                alternatives,
                name,
            )
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where} does not hold scores of philens; give what to_json wrote.") from error

    def _repr_html_(self) -> str:
        """What a notebook shows: the text, coloured by phi and surprisal, and the means."""
        return texts_markup([PageDocument.of(self, 1)])

    def to_html(self, path: str | os.PathLike[str], metrics: Sequence[str] | None = None) -> Path:
        """Write a page of the text, coloured by each metric; None means phi and surprisal.

        Raises:
            InputError: an unknown metric.
            OutputError: the file cannot be written.
        """
        return write_scores_page(path, [self], self._chosen(metrics))

    def plot(self, metrics: Sequence[str] | None = None) -> "Figure":
        """Each metric along the tokens, one panel below the other; None means phi and surprisal.

        The figure can be shown in a notebook or saved with `savefig`; nothing global is touched.

        Raises:
            InputError: an unknown metric.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from philens.show.fonts import drawable

        chosen = self._chosen(metrics)
        few = len(self) <= _TOKENS_NAMED
        width = min(24.0, max(6.0, 0.18 * len(self))) if few else 10.0
        figure = Figure(figsize=(width, 0.8 + 1.7 * len(chosen)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
        places = np.arange(len(self))
        for number, (axes, name) in enumerate(zip(panels, chosen, strict=True)):
            values, column = self.columns[name], Column(name)
            error = self.columns.get(column.of("phi_standard_error")) if column.metric == "phi" else None
            # Okabe and Ito's blue, vermillion, green and purple.
            colour = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")[number % 4]
            axes.stairs(values, np.arange(len(self) + 1) - 0.5, fill=True, color=colour)
            if error is not None:
                axes.errorbar(places, values, yerr=error, fmt="none", ecolor="#333333", elinewidth=0.8)
            label = plain_label(name) + (f"\n({unit(name)})" if unit(name) else "")
            axes.set_ylabel(label, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            axes.margins(x=0.01)
        if few:
            pieces, families = drawable([visible_spaces(piece) for piece in self.pieces()])
            panels[-1].set_xticks(places, pieces, rotation=90)
            panels[-1].tick_params(axis="x", labelfontfamily=families)
            for label in panels[-1].get_xticklabels():
                label.set_parse_math(False)  # a text's dollar signs are dollar signs
        panels[-1].set_xlabel("token", fontsize=9)
        return figure

    def _chosen(self, metrics: Sequence[str] | None) -> list[str]:
        if metrics is None:
            phis = [name for name in self.columns if Column(name).metric == "phi"]
            metrics = [*phis, *(["surprisal"] if "surprisal" in self.columns else [])] or list(self.columns)
        chosen = [metrics] if isinstance(metrics, str) else list(metrics)
        for name in chosen or [""]:
            self._column(name)
        return chosen


def unit(column: str) -> str:
    """The unit of a column, or of a statistic of it; empty where it is a plain number."""
    metric = _metric(Column(column, OF_GROUPS).metric)
    return "nats" if metric is None else metric.unit


def _metric(column: str) -> "Metric | None":
    from philens.lens.metrics import METRICS  # which takes torch, and reading scores does not

    return METRICS.get(Column(column).metric)


class ScoredTexts(list[TokenScores]):
    """The scores of several texts: a list, which a notebook shows."""

    def _repr_html_(self) -> str:
        return texts_markup([PageDocument.of(one, number) for number, one in enumerate(self, start=1)])


def _as_span(span: Any) -> Span:
    if isinstance(span, re.Match):
        return Span(span.lastgroup or span.group(), *span.span())
    if isinstance(span, Sequence) and len(span) == 3:
        name, start, end = span
        if isinstance(name, str) and all(isinstance(edge, int | np.integer) for edge in (start, end)):
            return Span(name, int(start), int(end))
    raise InputError(f"A span is (name, start, end) in characters, or a match of a pattern, not {span!r}.")


def token_places(text: str, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T,) the character by which a token belongs to words and spans: its first that is not space.

    Its first one if all are, -1 if it has none.
    """
    return np.array(
        [
            next((place for place in range(start, end) if not text[place].isspace()), start)
            if start < end
            else -1
            for start, end in offsets.tolist()
        ],
        np.int64,
    )


class _SpanTotals(NamedTuple):
    """What is known of S spans, (S,) each.

    Attributes:
        starts, ends, tokens: characters, and how many tokens.
        sums: sum of each column over the tokens that have a value, NaN where none has, and their number.
        groups: what `of_groups` says of the columns that have it.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    tokens: NDArray[np.int64]
    sums: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]
    groups: dict[str, NDArray[np.float64]]


def _span_totals(
    text: str,
    offsets: NDArray[np.int64],
    columns: Mapping[str, NDArray[np.float32]],
    group: int,
    spans: Sequence[Span],
) -> _SpanTotals:
    places = token_places(text, offsets)
    order = np.argsort(places, kind="stable")
    places = places[order]
    starts = np.array([max(span.start, 0) for span in spans], np.int64)
    ends = np.array([span.end for span in spans], np.int64)
    first = np.searchsorted(places, starts)
    last = np.maximum(np.searchsorted(places, ends), first)

    def totals(values: NDArray[Any]) -> NDArray[Any]:
        """The sum of `values`, in the order of places, over each span's tokens."""
        # Pairs of edges: every other sum is a span's. The added 0 makes the end of the text an edge.
        sums = np.add.reduceat(np.append(values, values.dtype.type(0)), np.stack([first, last], 1).ravel())
        return np.where(last > first, sums[::2], 0)

    found, groups = {}, {}
    for name, values in columns.items():
        values = values[order].astype(np.float64)
        present = ~np.isnan(values)
        count = totals(present.astype(np.int64)) if len(spans) else np.zeros(0, np.int64)
        total = totals(np.where(present, values, 0.0)) if len(spans) else np.zeros(0)
        found[name] = np.where(count > 0, total, np.nan), count
        if names := group_names(name):
            of_spans = [of_groups(values[start:stop], group) for start, stop in zip(first, last, strict=True)]
            groups |= zip(names, np.reshape(of_spans, (-1, len(names))).T, strict=True)
    return _SpanTotals(starts, ends, last - first, found, groups)


def _span_table(
    text: str,
    offsets: NDArray[np.int64],
    columns: Mapping[str, NDArray[np.float32]],
    group: int,
    spans: Sequence[Span],
) -> "pd.DataFrame":
    import pandas as pd

    found = _span_totals(text, offsets, columns, group, spans)
    names = [span.name for span in spans]
    facts = {"name": names, "start": found.starts, "end": found.ends, "tokens": found.tokens}
    table = pd.DataFrame(facts)
    for name, (total, count) in found.sums.items():
        table[column_name(name, statistic="sum")] = total
        table[column_name(name, statistic="mean")] = total / np.maximum(count, 1)
        for one in group_names(name):
            table[one] = found.groups[one]
    return table


def group_names(column: str) -> list[str]:
    """What `of_groups` of a column is called; nothing where it is not told."""
    metric = _metric(column)
    grouped = metric is not None and "group" in metric.options
    return [column_name(column, statistic=one) for one in OF_GROUPS] if grouped else []


def of_groups(values: NDArray[np.floating], size: int) -> tuple[float, float]:
    """The lowest mean over `size` tokens in a row that have a value, and the mean of the last so many; of
    fewer, of all there are, and NaN of none (arXiv 2508.15260: lowest group and tail confidence)."""
    present = values[~np.isnan(values)].astype(np.float64)
    if not len(present):
        return np.nan, np.nan
    size = min(size, len(present))
    totals = np.append(0.0, present.cumsum())
    groups = (totals[size:] - totals[:-size]) / size
    return float(groups.min()), float(groups[-1])


def _json_numbers(values: NDArray[np.float32]) -> list[Any]:
    """Float32 as the shortest decimals that give the same float32; NaN as None, infinities as text."""
    shortest = values.astype(str).astype(np.float64).tolist()
    return [None if x != x else x if abs(x) != np.inf else str(x) for x in shortest]
