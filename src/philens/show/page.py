"""A page to read: every piece of a text coloured by phi and, beside it, by surprisal or any other column.

One HTML file that loads nothing: no script, no font, no image from elsewhere. It follows the reader's light
or dark theme. All values are shown on hover.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from philens.show.colours import DARK, LEVELS, LIGHT, Floats, Scale, palette, plain_label
from philens.show.scored import PartMeans, ScoredText
from philens.support.columns import Column
from philens.support.errors import InputError
from philens.support.files import write_atomically
from philens.support.output import visible

MAX_TOKENS, MAX_DOCUMENTS = 50_000, 1_000
# Of a text, in a table of means.
MAX_PARTS = 50
NO_SPAN = ""


@dataclass(frozen=True)
class PageDocument:
    """A text in T pieces (characters, tokens or words), each with its values."""

    name: str
    description: str
    pieces: Sequence[str]  # (T,)
    columns: Mapping[str, ArrayLike]  # (T,) each, NaN where there is no value
    spans: Sequence[str] = ()  # (T,) name of the span each piece is in, "" for none; or nothing
    # Of the columns, perhaps with other statistics of them; None takes the means of all pieces with a value.
    means: Mapping[str, float] | None = None
    units: Mapping[str, str] = field(default_factory=dict)  # of columns, nats where nothing is said
    notes: Sequence[str] = ()  # (T,) what else is read on hover, "" for nothing; or nothing
    parts: Sequence[PartMeans] = ()  # spans with means of their own

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", dict.fromkeys(self.columns, "nats") | dict(self.units))

    @classmethod
    def of(cls, scores: ScoredText, number: int) -> "PageDocument":
        """A scored text under its name, or its number."""
        return cls(
            scores.name or f"Text {number}",
            "",
            scores.pieces(),
            scores.columns,
            _span_of_each(scores),
            scores.means(),
            scores.units,
            scores.alternatives.notes() if scores.alternatives is not None else (),
            scores.span_means(),
        )

    def beginning(self, pieces: int) -> "PageDocument":
        """The first pieces of it, with the means of all."""
        if len(self.pieces) <= pieces:
            return self
        return replace(
            self,
            pieces=self.pieces[:pieces],
            columns={name: np.asarray(array)[:pieces] for name, array in self.columns.items()},
            spans=self.spans[:pieces],
            notes=self.notes[:pieces],
        )


def write_scores_page(
    path: str | os.PathLike[str],
    scores: Sequence[ScoredText],
    metrics: Sequence[str] | None = None,
    title: str = "Token scores",
) -> Path:
    """Write scored texts as one self-contained page, whole or not at all; each under its name or number.

    Args:
        path: the HTML file.
        scores: the texts.
        metrics: the columns drawn, side by side; by default the first of phi and the surprisal.
        title: heading of the page.

    Raises:
        InputError: a metric that the scores do not have.
        OutputError: the file cannot be written.
    """
    documents = [PageDocument.of(one, number) for number, one in enumerate(scores, start=1)]
    return write_page(
        path, title, documents, metrics, provenance=_shared([item.provenance for item in scores])
    )


def _span_of_each(scores: ScoredText) -> list[str]:
    """The name of the span that the middle of each token lies in."""
    names = np.full(len(scores), NO_SPAN, dtype=object)
    middles = scores.offsets.mean(axis=1)
    for name, start, end in scores.spans:
        names[(start < middles) & (middles < end)] = name
    return names.tolist()


def _shared(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all records, and a word where it differs."""
    first = records[0] if records else {}
    return {
        key: value if all(record.get(key) == value for record in records) else "differs between texts"
        for key, value in first.items()
    }


def write_page(
    path: str | os.PathLike[str],
    title: str,
    documents: Sequence[PageDocument],
    metrics: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page of `documents` to `path` (UTF-8), whole or not at all.

    Each metric has one colour scale over all documents, from 0 (or the lowest value, if negative) to the
    99th percentile; values above have the last colour. A piece without a value is drawn grey. A page ends
    after MAX_TOKENS pieces or MAX_DOCUMENTS documents and then says so; means are over whole documents.

    Args:
        path: the HTML file.
        title: heading of the page.
        documents: what is shown.
        metrics: the columns drawn, side by side; by default the first two.
        provenance: shown at the end of the page.

    Raises:
        InputError: pieces and values differ in number, or a document lacks a metric.
        OutputError: the file cannot be written.
    """
    metrics = chosen_metrics(documents, metrics)
    shown = beginnings(documents, MAX_DOCUMENTS, MAX_TOKENS)
    total, told = (sum(len(document.pieces) for document in some) for some in (documents, shown))
    note = (
        f"This page ends after {told:,} tokens in {len(shown):,} documents, so that a browser can show it; "
        "there is more. Write JSON Lines or Parquet to keep everything."
    )
    values = [{name: np.asarray(array, np.float64) for name, array in item.columns.items()} for item in shown]
    scales = {name: Scale.of([columns[name] for columns in values]) for name in metrics}
    units = dict.fromkeys(metrics, "nats") | _units(documents)

    def write(file: BinaryIO) -> None:
        file.write(f"{head(title, _style(), 'img-src data:')}<h1>{clean(title)}</h1>\n".encode())
        if told < total:
            file.write(f'<p class="note">{note}</p>\n'.encode())
        file.write(means_table(documents[: len(shown)]).encode())
        file.write(_legends(scales, units).encode())
        for number, (document, columns) in enumerate(zip(shown, values, strict=True), start=1):
            for part in _section(number, document, columns, scales):
                file.write(part.encode())
        file.write(_foot(provenance or {}).encode())

    return write_atomically(path, write)


def chosen_metrics(documents: Sequence[PageDocument], metrics: Sequence[str] | None) -> list[str]:
    """The columns to draw: those asked for, else the first of phi and the surprisal.

    Raises:
        InputError: pieces and values differ in number, or a document lacks a metric.
    """
    if metrics is None:
        names = list(documents[0].columns) if documents else []
        first = next((name for name in names if Column(name).metric == "phi"), "phi")
        metrics = sorted(names, key=lambda name: (name != first, name != "surprisal"))[:2]
    for document in documents:
        for name, array in document.columns.items():
            if np.shape(array) != (len(document.pieces),):
                raise InputError(
                    f"Document {document.name!r} has {len(document.pieces)} pieces but {name} of shape "
                    f"{np.shape(array)}; give one value for each piece, NaN where there is none."
                )
        for name in metrics:
            if name not in document.columns:
                have = ", ".join(document.columns) or "none"
                raise InputError(f"Document {document.name!r} has no metric {name}; it has {have}.")
    return list(metrics)


def beginnings(documents: Sequence[PageDocument], most: int, left: int) -> list[PageDocument]:
    """So many documents at most, and so many pieces of them all."""
    shown = []
    for document in documents[:most]:
        if left <= 0:
            break
        shown.append(document.beginning(left))
        left -= len(document.pieces)
    return shown


def head(title: str, style: str, allowed: str) -> str:
    """The beginning of a page that fetches nothing and, whatever a text holds, runs but what is `allowed`."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'unsafe-inline'; {allowed}\">\n"
        f"<title>{clean(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )


def means_table(documents: Sequence[PageDocument]) -> str:
    """Means of every column, one row a document, and below it one for each of its spans."""
    if not documents:
        return "<p>There is nothing to show.</p>\n"
    _, *heads = mean_heads(documents)
    lines = [f"<tr><th></th>{''.join(f'<th>{clean(text)}</th>' for text in heads)}</tr>"]
    for number, (name, *means) in _numbered_means(documents):
        shown = f'<a href="#d{number}">{clean(name)}</a>' if number else clean(name)
        kind = "" if number else ' class="part"'
        lines.append(f"<tr{kind}><th>{shown}</th>{''.join(f'<td>{mean}</td>' for mean in means)}</tr>")
    table = "\n".join(lines)
    return f'<div class="means"><table><caption>Means over tokens</caption>\n{table}\n</table></div>\n'


def mean_heads(documents: Sequence[PageDocument]) -> list[str]:
    """What stands above `mean_rows`."""
    units = _units(documents)
    return ["", "tokens", *(plain_heading(name, units[name]) for name in _mean_names(documents))]


def mean_rows(documents: Sequence[PageDocument]) -> list[list[str]]:
    """For each document, and then for each of its spans: name, number of tokens, and mean of every column."""
    return [row for _, row in _numbered_means(documents)]


def _numbered_means(documents: Sequence[PageDocument]) -> Iterable[tuple[int, list[str]]]:
    """The rows of `mean_rows`, each with the number of its document, from 1; 0 for a span."""
    names = _mean_names(documents)
    for number, document in enumerate(documents, 1):
        means = document.means
        if means is None:
            means = {name: mean_of(array) for name, array in document.columns.items()}
        yield number, _mean_row(document.name, len(document.pieces), means, names)
        for part in document.parts[:MAX_PARTS]:
            yield 0, _mean_row(f"· {part.name}", part.tokens, part.means, names)
        if (more := len(document.parts) - MAX_PARTS) > 0:
            yield 0, [f"· and {more:,} more", "", *("" for _ in names)]


def _mean_row(name: str, tokens: int, means: Mapping[str, float], columns: Iterable[str]) -> list[str]:
    found = (means.get(column, np.nan) for column in columns)
    return [name, f"{tokens:,}", *("none" if np.isnan(mean) else f"{mean:.3f}" for mean in found)]


def _mean_names(documents: Sequence[PageDocument]) -> list[str]:
    return list(dict.fromkeys(name for one in documents for name in (*(one.means or ()), *one.columns)))


def _legends(scales: Mapping[str, Scale], units: Mapping[str, str]) -> str:
    parts = [legend(name, scale, units[name]) for name, scale in scales.items()]
    hint = 'Hover over a piece to read its values. <span class="none">Grey, dotted</span>: no value.'
    return f'<div class="legends">{"".join(parts)}<p class="hint">{hint}</p></div>\n'


def legend(column: str, scale: Scale, unit: str) -> str:
    """The colours of a column and what they mean."""
    cells = "".join(f'<i class="c{level}"></i>' for level in range(LEVELS))
    middle = (scale.low + scale.high) / 2
    ticks = "".join(
        f"<span>{tick}</span>" for tick in (f"{scale.low:.3g}", f"{middle:.3g}", f"{scale.high:.3g} and more")
    )
    return (
        f'<div class="legend"><b>{label(column, unit)}</b><div class="bar">{cells}</div>'
        f'<div class="ticks">{ticks}</div></div>'
    )


def _section(
    number: int, document: PageDocument, columns: Mapping[str, Floats], scales: Mapping[str, Scale]
) -> Iterable[str]:
    yield f'<section id="d{number}">\n<h2>{clean(document.name)}</h2>\n'
    if document.description:
        yield f"<p>{clean(document.description)}</p>\n"
    titles = hovers(document, columns)
    shown = [shown_piece(piece) for piece in document.pieces]
    spans = document.spans or [NO_SPAN] * len(shown)
    yield '<div class="panes">\n'
    for name, scale in scales.items():
        yield f"<figure><figcaption>{label(name, document.units[name])}</figcaption>"
        yield '<div class="text">'
        inside = NO_SPAN
        for piece, level, hover, span in zip(shown, scale.levels(columns[name]), titles, spans, strict=True):
            if span != inside:
                yield "</span>" if inside else ""
                yield f'<span class="span"><b>{clean(span)}</b>' if span else ""
                inside = span
            yield f'<span class="{colour_class(level)}" title="{hover}">{piece}</span>'
        yield "</span>" if inside else ""
        yield "</div></figure>\n"
    yield "</div>\n</section>\n"


def hovers(document: PageDocument, columns: Mapping[str, Floats]) -> list[str]:
    """(T,) what is read of each piece on hover, as markup."""
    pieces = [visible(piece) for piece in document.pieces]
    units = [document.units[name] for name in columns]
    notes = document.notes or [""] * len(pieces)
    return [
        escape(f"{piece or 'empty'}: {', '.join(map(_reading, columns, units, row))}\n{note}".rstrip())
        for piece, row, note in zip(pieces, zip(*columns.values(), strict=True), notes, strict=True)
    ]


def _foot(provenance: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{clean(key)}</dt><dd>{clean(_words(item))}</dd>" for key, item in provenance.items())
    where = f"<footer><h2>Where this comes from</h2><dl>{rows}</dl></footer>\n" if rows else ""
    return f"{where}</body>\n</html>\n"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return "none" if value is None else str(value)


def clean(text: str) -> str:
    """Any text as markup."""
    return escape(visible(text))


def shown_piece(piece: str) -> str:
    """A piece as markup. A line that breaks in the text also breaks on the page, after the sign for it."""
    return clean(piece).replace("⏎", "⏎\n") or "∅"


def colour_class(level: int | None) -> str:
    """The class of a colour of `colour_rules`, or of no value."""
    return "none" if level is None else f"c{level}"


def colour_rules(scope: str = "") -> str:
    """CSS that gives each colour's class, within `scope`, what `colour_variables` set."""
    return "".join(
        f"{scope}.c{level}{{background:var(--b{level});color:var(--t{level})}}" for level in range(LEVELS)
    )


def label(column: str, unit: str) -> str:
    """A column's name and unit as markup."""
    return clean(plain_heading(column, unit))


def plain_heading(column: str, unit: str) -> str:
    """A column's name and unit."""
    words = "phi (PHi loss)" if column == "phi" else plain_label(column)
    return f"{words}, {unit}" if unit else words


def _units(documents: Sequence[PageDocument]) -> dict[str, str]:
    return {name: unit for document in documents for name, unit in document.units.items()}


def _reading(column: str, unit: str, value: float) -> str:
    number = "none" if np.isnan(value) else f"{value:.3f} {unit}".rstrip()
    return f"{plain_label(column)} {number}"


def mean_of(values: ArrayLike) -> float:
    """The mean of those that are numbers; NaN where none is."""
    present = np.asarray(values, np.float64)
    present = present[~np.isnan(present)]
    return float(present.mean()) if len(present) else np.nan


def _style() -> str:
    light, dark = colour_variables(LIGHT), colour_variables(DARK)
    themes = f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
    return _STYLE + themes + colour_rules()


def colour_variables(anchors: Sequence[str]) -> str:
    """Background and text colour of each level as CSS variables."""
    colours = enumerate(palette(anchors))
    return "".join(f"--b{level}:{ground};--t{level}:{text};" for level, (ground, text) in colours)


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1b1b;--faint:#5b5b5b;--line:#d4d4d4}
@media (prefers-color-scheme: dark){:root{--page:#15151a;--ink:#e9e9e9;--faint:#a8a8a8;--line:#3a3a42}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:90rem;background:var(--page);color:var(--ink);
font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 1rem} h2{font-size:1.15rem;margin:2rem 0 .2rem} p{margin:0 0 .6rem}
section>p,figcaption,.hint,.ticks,caption,footer{color:var(--faint);font-size:.875rem}
a{color:inherit}
.note{padding:.4rem .8rem;border:1px solid var(--line);border-left:.4rem solid var(--faint)}
.means{overflow:auto;max-height:20rem;margin-bottom:1rem} caption{text-align:left}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem 1.2rem .2rem 0;text-align:right;vertical-align:bottom} th{font-weight:600}
th:first-child{text-align:left} .part th{font-weight:400} tr+tr{border-top:1px solid var(--line)}
.legends{display:flex;flex-wrap:wrap;gap:.3rem 2rem;padding:.6rem 0;
background:var(--page);border-bottom:1px solid var(--line);font-size:.875rem}
@media (min-width:50rem){.legends{position:sticky;top:0} section{scroll-margin-top:7rem}}
.legend{flex:1 1 16rem} .hint{flex:1 1 100%;margin:0}
.bar{display:flex;height:.9rem;border:1px solid var(--line)} .bar i{flex:1}
.ticks{display:flex;justify-content:space-between}
.panes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem}
figure{margin:0;min-width:0} figcaption{margin-bottom:.2rem}
.text{padding:.6rem;border:1px solid var(--line);border-radius:4px;white-space:pre-wrap;
overflow-wrap:anywhere;font:15px/1.6 ui-monospace,Menlo,Consolas,monospace}
.none{color:var(--faint);text-decoration:underline dotted}
.text span[title]:hover{outline:2px solid var(--ink)}
.span{display:block;padding-left:.6rem;border-left:.3rem solid var(--faint)}
.span b{display:block;font:600 .8rem system-ui,sans-serif;color:var(--faint);user-select:none}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.3rem 0;overflow-wrap:anywhere}
dt{font-weight:600} dd{margin:0}
"""
