"""A page to read: every piece of a text coloured by phi and, beside it, by surprisal.

One HTML file that loads nothing: no script, no font, no image from elsewhere. It follows the reader's light
or dark theme; both colour scales change lightness steadily, so they can be told without seeing hue, and every
colour carries text of at least 4.5:1 contrast. Values are shown on hover.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import BinaryIO
from unicodedata import category

import numpy as np
from numpy.typing import ArrayLike, NDArray

from philens.errors import InputError
from philens.findings import write_atomically

LEVELS = 24
# Lightness from that of the page to its opposite. Dark is viridis without its darkest purple.
_LIGHT = ("#fffbea", "#d6eec4", "#8fd3b6", "#41b0c3", "#2580b8", "#254f9d", "#0d1c5c")
_DARK = ("#2b1a4a", "#3e4a89", "#2c728e", "#21918c", "#3fbc73", "#a2da37", "#fde725")
_QUANTITIES = (("phi", "phi (PHi loss)"), ("surprisal", "surprisal"))

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PageDocument:
    """A text in pieces (characters, tokens or words), each with its phi and surprisal."""

    name: str
    description: str
    pieces: Sequence[str]  # (T,)
    phi: ArrayLike  # (T,) nats, NaN where there is none
    surprisal: ArrayLike  # (T,) nats, NaN where there is none


def write_page(
    path: str | os.PathLike[str], title: str, documents: Sequence[PageDocument], summary_html: str = ""
) -> Path:
    """Write the page of `documents` to `path` (UTF-8), whole or not at all.

    Each quantity has one colour scale over all documents, from 0 (or the lowest value, if negative) to the
    99th percentile; values above have the last colour. A piece without a value is drawn grey.
    `summary_html` is put above the documents as it is: it must be HTML that the caller made, with anything
    foreign in it escaped. Raises InputError where a document's pieces and values differ in number,
    OutputError where the file cannot be written.
    """
    values = [_values(document) for document in documents]
    scales = {name: _Scale.of([item[name] for item in values]) for name, _ in _QUANTITIES}

    def write(file: BinaryIO) -> None:
        for part in _page(title, documents, values, scales, summary_html):
            file.write(part.encode())

    return write_atomically(path, write)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float

    @classmethod
    def of(cls, arrays: Sequence[Floats]) -> "_Scale":
        present = np.concatenate([array[np.isfinite(array)] for array in arrays] or [np.zeros(0)])
        if not len(present):
            return cls(0.0, 1.0)
        low = min(0.0, float(present.min()))
        high = float(np.quantile(present, 0.99))
        return cls(low, high if high > low else low + 1.0)

    def levels(self, values: Floats) -> list[int | None]:
        """Each value's colour, 0 to LEVELS - 1; None where there is no value."""
        share = np.nan_to_num((values - self.low) / (self.high - self.low), posinf=1.0, neginf=0.0)
        numbers = np.clip((share * LEVELS).astype(np.int64), 0, LEVELS - 1)
        missing = np.isnan(values)
        return [None if none else int(number) for number, none in zip(numbers, missing, strict=True)]


def _values(document: PageDocument) -> dict[str, Floats]:
    values = {name: np.asarray(getattr(document, name), dtype=np.float64) for name, _ in _QUANTITIES}
    for name, array in values.items():
        if array.shape != (len(document.pieces),):
            raise InputError(
                f"Document {document.name!r} has {len(document.pieces)} pieces but {name} of shape "
                f"{array.shape}; give one value for each piece, NaN where there is none."
            )
    return values


def _page(
    title: str,
    documents: Sequence[PageDocument],
    values: Sequence[dict[str, Floats]],
    scales: dict[str, _Scale],
    summary_html: str,
) -> Iterable[str]:
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Whatever a text holds, the browser runs no script and fetches nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{_clean(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
        f"<h1>{_clean(title)}</h1>\n"
    )
    if summary_html:
        yield f'<div class="summary">{summary_html}</div>\n'
    yield '<div class="legends">' + "".join(_legend(label, scales[name]) for name, label in _QUANTITIES)
    yield '<p class="hint"><span class="none">Grey, dotted</span>: no value. '
    yield "Hover over a piece to read its values.</p></div>\n"
    for document, numbers in zip(documents, values, strict=True):
        yield f"<section>\n<h2>{_clean(document.name)}</h2>\n<p>{_clean(document.description)}</p>\n"
        titles = [
            f"{piece or 'empty'}: phi {_nats(phi)}, surprisal {_nats(surprisal)}"
            for piece, phi, surprisal in zip(
                map(_visible, document.pieces), numbers["phi"], numbers["surprisal"], strict=True
            )
        ]
        yield '<div class="pair">\n'
        for name, label in _QUANTITIES:
            yield f"<figure><figcaption>{label}, mean {_mean(numbers[name])}</figcaption>"
            yield '<div class="text">'
            levels = scales[name].levels(numbers[name])
            for piece, level, hover in zip(document.pieces, levels, titles, strict=True):
                kind = "none" if level is None else f"c{level}"
                # A line that breaks in the text also breaks on the page, after the sign for it.
                shown = escape(_visible(piece).replace("⏎", "⏎\n")) or "∅"
                yield f'<span class="{kind}" title="{escape(hover)}">{shown}</span>'
            yield "</div></figure>\n"
        yield "</div>\n</section>\n"
    yield "</body>\n</html>\n"


def _legend(label: str, scale: _Scale) -> str:
    cells = "".join(f'<i class="c{level}"></i>' for level in range(LEVELS))
    middle = (scale.low + scale.high) / 2
    ticks = f"<span>{scale.low:.3g}</span><span>{middle:.3g}</span><span>{scale.high:.3g} and more</span>"
    return (
        f'<div class="legend"><b>{label}, nats</b><div class="bar">{cells}</div>'
        f'<div class="ticks">{ticks}</div></div>'
    )


def _visible(text: str) -> str:
    """`text` with what a browser would hide, swallow or obey made visible: controls, joiners, directions."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "⇥"
    # Controls, formats (zero width, directions), lone surrogates, line and paragraph separators.
    if category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _clean(text: str) -> str:
    return escape(_visible(text))


def _nats(value: float) -> str:
    return "none" if np.isnan(value) else f"{value:.3f} nats"


def _mean(values: Floats) -> str:
    present = values[~np.isnan(values)]
    return f"{present.mean():.2f} nats" if len(present) else "none"


def _style() -> str:
    light, dark = _colours(_LIGHT), _colours(_DARK)
    themes = f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
    classes = (f".c{level}{{background:var(--b{level});color:var(--t{level})}}" for level in range(LEVELS))
    return _STYLE + themes + "".join(classes)


def _colours(anchors: Sequence[str]) -> str:
    """Background and text colour of each level as CSS variables, background interpolated between anchors."""
    corners = np.array([list(bytes.fromhex(anchor[1:])) for anchor in anchors], dtype=float)
    places = np.linspace(0, len(anchors) - 1, LEVELS)
    mixed = np.stack([np.interp(places, np.arange(len(anchors)), channel) for channel in corners.T], axis=1)
    parts = []
    for level, colour in enumerate(mixed.round().astype(int)):
        text = "#000" if _luminance(colour) > 0.179 else "#fff"  # where black and white contrast alike
        parts.append(f"--b{level}:#{bytes(colour.tolist()).hex()};--t{level}:{text};")
    return "".join(parts)


def _luminance(colour: NDArray[np.int64]) -> float:
    """Relative luminance of an sRGB colour (3,), as WCAG defines it."""
    share = colour / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1b1b;--faint:#5b5b5b;--line:#d4d4d4}
@media (prefers-color-scheme: dark){:root{--page:#15151a;--ink:#e9e9e9;--faint:#a8a8a8;--line:#3a3a42}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:90rem;background:var(--page);color:var(--ink);
font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 1rem} h2{font-size:1.15rem;margin:2rem 0 .2rem} p{margin:0 0 .6rem}
section>p,figcaption,.hint,.ticks{color:var(--faint);font-size:.875rem}
.summary{overflow-x:auto;margin-bottom:1rem}
@media (min-width:50rem){.legends{position:sticky;top:0}}
.legends{display:flex;flex-wrap:wrap;gap:.3rem 2rem;padding:.6rem 0;
background:var(--page);border-bottom:1px solid var(--line);font-size:.875rem}
.legend{flex:1 1 16rem} .hint{flex:1 1 100%;margin:0}
.bar{display:flex;height:.9rem;border:1px solid var(--line)} .bar i{flex:1}
.ticks{display:flex;justify-content:space-between}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem}
figure{margin:0;min-width:0} figcaption{margin-bottom:.2rem}
.text{padding:.6rem;border:1px solid var(--line);border-radius:4px;white-space:pre-wrap;
overflow-wrap:anywhere;font:15px/1.6 ui-monospace,Menlo,Consolas,monospace}
.none{color:var(--faint);text-decoration:underline dotted}
.text span:hover{outline:2px solid var(--ink)}
table{border-collapse:collapse} td,th{padding:.2rem .8rem .2rem 0;text-align:left}
"""
