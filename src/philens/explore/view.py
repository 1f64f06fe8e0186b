"""The markup of what was read: coloured texts, means, the highest tokens, and phi along the text.

Texts come into it only through `show.page.clean` and `shown_piece`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from philens.lens.metrics import METRICS
from philens.scoring.parts import steps_of
from philens.scoring.scores import TokenScores, group_names, of_groups, token_places, unit
from philens.show.colours import DARK, LIGHT, Scale, plain_label
from philens.show.page import (
    MAX_PARTS,
    PageDocument,
    clean,
    colour_class,
    colour_rules,
    colour_variables,
    label,
    legend,
    mean_of,
    means_table,
    shown_piece,
)
from philens.support.errors import InputError
from philens.support.output import visible_spaces

RANGES = {"shared by texts": "shared", "each text's own": "own", "from … to …": "fixed"}
PALETTES = {"colour": (LIGHT, DARK), "grey": (("#ffffff", "#111111"), ("#1c1c21", "#ffffff"))}
HIGHEST = 10
# Of text before and after one of the highest tokens, in characters.
_AROUND = 8
# Of a long step, from its beginning and its end.
_STEP = 20


@dataclass(frozen=True)
class Look:
    """How scores are shown."""

    metrics: tuple[str, str] = ("phi", "surprisal")  # the two columns, side by side
    range: str = "shared"  # name of `RANGES`
    low: float = 0.0  # and the other end of the scale of both columns, where `range` is `fixed`
    high: float = 10.0
    palette: str = "colour"  # name of `PALETTES`

    def scale(self, metric: str, scores: TokenScores, texts: Sequence[TokenScores]) -> Scale:
        """The colour scale of a column in one of several texts.

        Raises:
            InputError: a fixed range that ends before it begins.
        """
        if self.range == "fixed":
            if not self.low < self.high:
                raise InputError(f"A colour scale cannot go from {self.low:g} to {self.high:g}; swap them.")
            return Scale(self.low, self.high)
        return Scale.of([one.columns[metric] for one in (texts if self.range == "shared" else [scores])])


def style() -> str:
    """The page's CSS, with the colours of every palette in light and dark."""
    colours = "".join(
        f".ph.{name}{{{colour_variables(light)}}}.dark .ph.{name}{{{colour_variables(dark)}}}"
        for name, (light, dark) in PALETTES.items()
    )
    return asset("page.css") + colours + colour_rules(".ph ")


def asset(name: str) -> str:
    """A file that comes with this package."""
    return files("philens.explore").joinpath(name).read_text("utf-8")


def result(texts: Sequence[TokenScores], look: Look, exports: str | None, link: str = "") -> str:
    """All of what was read.

    Args:
        texts: one or two, with names. Two stand side by side, and where they part after a
            common beginning is marked.
        look: how.
        exports: address below which `session.EXPORTS` are; None where nothing can be fetched.
        link: the fragment of an address that brings all of this back.

    Raises:
        InputError: a fixed range that ends before it begins.
    """
    sections = [_section(number, scores, texts, look) for number, scores in enumerate(texts)]
    means = means_table([replace(PageDocument.of(one, 0), name=_name(one)) for one in texts])
    kept = "" if exports is None else _exports(texts, exports, link)
    return (
        f'<div class="ph {look.palette}"><div class="panel">{means}</div>'
        f'<div class="readings">{"".join(sections)}</div>{kept}</div>'
    )


def parting(texts: Sequence[TokenScores]) -> list[int | None]:
    """Of each text the first token in which two texts differ after a common beginning; else none."""
    pairs = zip(*(one.text for one in texts), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: len({*pair}) == 1, pairs)) if len(texts) > 1 else 0
    after = [np.flatnonzero(one.offsets[:, 1] > common) for one in texts]
    return [int(one[0]) if common and len(one) else None for one in after]


def lacking(reasons: Mapping[str, str]) -> str:
    """The metrics that are not available, each with its reason; nothing where there is none."""
    if not reasons:
        return ""
    rows = "".join(
        f"<li><b>{clean(plain_label(metric))}</b>: {clean(reason)}</li>" for metric, reason in reasons.items()
    )
    names = ", ".join(map(plain_label, reasons))
    return (
        f'<details class="ph-lacking"><summary>Not available here: {clean(names)}</summary>'
        f"<ul>{rows}</ul></details>"
    )


def tokens(count: int) -> str:
    """So many tokens, in words."""
    return f"{count:,} token{'' if count == 1 else 's'}"


def _name(scores: TokenScores) -> str:
    return scores.name or "Text"


def _label(column: str) -> str:
    return label(column, unit(column))


def _section(number: int, scores: TokenScores, texts: Sequence[TokenScores], look: Look) -> str:
    name, pieces = clean(_name(scores)), [shown_piece(piece) for piece in scores.pieces()]
    parts = parting(texts)[number]
    metrics = list(dict.fromkeys(look.metrics))
    scales = {metric: look.scale(metric, scores, texts) for metric in metrics}
    panes = "".join(_pane(name, metric, scores, pieces, scales[metric], parts) for metric in metrics)
    plots = "".join(
        _plot(place, name, metric, scores.columns[metric], scales[metric])
        for place, metric in enumerate(metrics)
    )
    values = {
        plain_label(column) + (f" ({unit(column)})" if unit(column) else ""): _numbers(column_values)
        for column, column_values in scores.columns.items()
    }
    told = [tokens(len(scores)), clean(scores.provenance.get("insertion_point") or "")]
    told += [] if parts is None else [f"another text from token {parts} on"]
    return (
        f'<section class="reading" id="d{number + 1}" aria-label="{name}" data-text="{number}" '
        f'data-values="{escape(json.dumps(values))}" data-others="{escape(json.dumps(_others(scores)))}">'
        f"<h3>{name} <small>{', '.join(told)}</small></h3>"
        f'<div class="panes">{panes}</div>'
        f'<div class="below"><div class="panel plots"><h4>Along the text</h4>{plots}</div>'
        f"{_highest(scores, metrics)}</div>{_steps(scores, metrics)}</section>"
    )


def _others(scores: TokenScores) -> dict[str, Any]:
    """Each token's rank and alternatives, and whose they are; nothing where they are not known."""
    if (others := scores.alternatives) is None:
        return {}
    shown = [[[visible_spaces(one.text), round(one.probability, 5)] for one in some] for some in others]
    return {"of": plain_label(others.of), "ranks": others.ranks.tolist(), "tokens": shown}


def _pane(
    name: str, metric: str, scores: TokenScores, pieces: Sequence[str], scale: Scale, parts: int | None
) -> str:
    classes = [colour_class(level) for level in scale.levels(scores.columns[metric])]
    if parts is not None:
        classes[parts] += " parts"
    spans = "".join(
        f'<span class="{names}">{piece}</span>' for piece, names in zip(pieces, classes, strict=True)
    )
    meaning = clean(METRICS[metric].meaning) if metric in METRICS else ""
    return (
        f'<figure class="pane" data-metric="{clean(metric)}"><figcaption title="{meaning}">'
        f"{legend(metric, scale, unit(metric))}</figcaption>"
        f'<div class="text" role="listbox" aria-multiselectable="true" '
        f'aria-label="{name}, coloured by {_label(metric)}">{spans}</div></figure>'
    )


def _plot(place: int, name: str, metric: str, values: ArrayLike, scale: Scale) -> str:
    """Steps along the tokens, as high as the colour scale."""
    floats = np.asarray(values, np.float64)
    shares = np.clip(np.nan_to_num((floats - scale.low) / (scale.high - scale.low)), 0, 1)
    steps = "".join(f"V{100 - 100 * share:.4g}H{end}" for end, share in enumerate(shares.tolist(), 1))
    return (
        f'<div class="plot"><span class="high">{scale.high:.3g}</span><svg class="p{place}" role="img" '
        f'aria-label="{_label(metric)} along {name}" viewBox="0 0 {len(floats)} 100" '
        f'preserveAspectRatio="none"><rect class="marked" y="0" height="100" width="0"/>'
        f'<path d="M0 100{steps}V100Z"/><rect class="here" y="0" height="100" width="0"/></svg>'
        f'<span class="low">{scale.low:.3g}</span><span class="what">{_label(metric)}</span></div>'
    )


def _highest(scores: TokenScores, metrics: Sequence[str]) -> str:
    """The highest tokens by the first metric, the text's first one, predicted from nothing, left out."""
    values = np.asarray(scores.columns[metrics[0]], np.float64)[1:]
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:HIGHEST] + 1
    pieces = scores.pieces()
    rows = []
    for token in order.tolist():
        if np.isnan(values[token - 1]):
            break
        before = "".join(pieces[max(0, token - _AROUND) : token])[-_AROUND:]
        after = "".join(pieces[token + 1 : token + 1 + _AROUND])[:_AROUND]
        cells = "".join(f"<td>{_number(float(scores.columns[metric][token]))}</td>" for metric in metrics)
        rows.append(
            f'<tr><td><button type="button" data-go="{token}" aria-label="Go to token {token}">{token}'
            f'</button></td><td class="around">{clean(before)}<mark>{clean(pieces[token]) or "∅"}</mark>'
            f"{clean(after)}</td>{cells}</tr>"
        )
    heads = "".join(f"<th>{clean(plain_label(metric))}</th>" for metric in metrics)
    return (
        f'<div class="panel highest"><h4>Highest {_label(metrics[0])}</h4><table><tr><th>token</th>'
        f'<th class="around">in the text</th>{heads}</tr>{"".join(rows)}</table></div>'
    )


def _steps(scores: TokenScores, metrics: Sequence[str]) -> str:
    """The steps that a text has, each kind a table of means; nothing where it has none."""
    places, columns = token_places(scores.text, scores.offsets), scores.without_sinks()
    heads = "".join(f"<th>{clean(plain_label(metric))}</th>" for metric in metrics)
    tables = []
    for kind, steps in steps_of(scores.text).items():
        rows = []
        for number, (name, start, end) in enumerate(steps[:MAX_PARTS], 1):
            inside = np.flatnonzero((start <= places) & (places < end))
            if not len(inside):  # a token may hold more than one
                continue
            first, last = int(inside[0]), int(inside[-1])
            means = [mean_of(columns[metric][first : last + 1]) for metric in metrics]
            text = scores.text[start:end]
            shown = text if len(text) <= 2 * _STEP else f"{text[:_STEP]}…{text[-_STEP:]}"
            rows.append(
                f'<tr><td><button type="button" data-go="{first}" data-to="{last}" aria-label="Mark {name}, '
                f'tokens {first} to {last}">{number}</button></td><td class="around">{clean(shown)}</td>'
                f"<td>{last - first + 1:,}</td>{''.join(f'<td>{_number(mean)}</td>' for mean in means)}</tr>"
            )
        more = len(steps) - MAX_PARTS
        left = f"<p>and {more:,} more; philens score --steps {kind} has all</p>" if more > 0 else ""
        tables.append(
            f"<details{'' if tables else ' open'}><summary>{len(steps):,} {kind}</summary><table><tr>"
            f'<th>{kind[:-1]}</th><th class="around"></th><th>tokens</th>{heads}</tr>{"".join(rows)}</table>'
            f"{left}</details>"
        )
    return f'<div class="panel steps"><h4>Means by step</h4>{"".join(tables)}</div>' if tables else ""


def _exports(texts: Sequence[TokenScores], address: str, link: str) -> str:
    links = [("page.html", "Stand-alone page"), ("scores.csv", "CSV")]
    links += [
        (
            f"figure-{number}.png",
            "Figure (PNG)" if len(texts) == 1 else f"Figure of {clean(_name(one))} (PNG)",
        )
        for number, one in enumerate(texts)
    ]
    shown = "".join(f'<a class="export" href="{address}/{file}" download>{text}</a>' for file, text in links)
    shown += f'<a class="export" href="#{link}" data-link>Copy link</a>' if link else ""
    return f'<div class="panel exports"><h4>Keep</h4>{shown}</div>'


def marked(scores: TokenScores, number: int, first: int, last: int) -> str:
    """A span of tokens and the mean of each column over it, beside that of the whole text.

    Args:
        number: number of the text, which scripts need.
        first, last: tokens, counted from 0, both included; in either order.

    Raises:
        InputError: there are no such tokens.
    """
    first, last = sorted((first, last))
    if first < 0 or last >= len(scores):
        raise InputError(
            f"{_name(scores)} has tokens 0 to {len(scores) - 1}; there is no span from {first} to {last}."
        )
    span = slice(first, last + 1)
    whole = scores.means()
    marked: dict[str, float] = {}
    for column, values in scores.without_sinks().items():
        marked |= {column: mean_of(values[span])}
        marked |= zip(group_names(column), of_groups(values[span], scores.group), strict=False)
    means = "".join(
        f"<div><dt>{_label(column)}</dt><dd><b>{_number(mean)}</b> "
        f"<small>(whole text {_number(whole[column])})</small></dd></div>"
        for column, mean in marked.items()
    )
    count = last - first + 1
    piece = "".join(scores.pieces()[span])
    shown = piece if len(piece) <= 120 else f"{piece[:60]} … {piece[-60:]}"
    which = f"token {first}" if count == 1 else f"tokens {first} to {last} ({count:,})"
    return (
        f'<div class="ph marking" data-text="{number}" data-first="{first}" data-last="{last}" role="status">'
        f"<p><b>{clean(_name(scores))}, {which}:</b> <q>{clean(shown)}</q></p>"
        f"<dl aria-label='means over the marked tokens, and over the whole text'>{means}</dl></div>"
    )


def status(text: str, share: float | None = None, kind: str = "note") -> str:
    """A line that says what is going on.

    Args:
        text: plain.
        share: share of work that is done, 0 to 1; None where that is not known.
        kind: `note`, `working` or `error`.
    """
    bar = ""
    if kind == "working":
        value = "" if share is None else f' value="{share:.3f}"'
        bar = f'<progress max="1"{value} aria-label="progress"></progress>'
    role = "alert" if kind == "error" else "status"
    return f'<p class="ph-status {kind}" role="{role}">{bar}<span>{clean(text)}</span></p>'


def _numbers(values: ArrayLike) -> list[float | None]:
    floats = np.asarray(values, np.float64)
    return [round(value, 3) if np.isfinite(value) else None for value in floats.tolist()]


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "none"
