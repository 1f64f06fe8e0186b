"""A page of texts by level: some of them whole, and the tokens of the highest and lowest phi."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from philens.findings.text_tokens import AFTER, BEFORE
from philens.show.page import PageDocument, write_page
from philens.tasks.levels import role

if TYPE_CHECKING:
    from philens.scoring.scores import TokenScores
    from philens.tasks.levels import LevelText

# Texts of each level that are shown whole.
WHOLE = 2
# What the paper's claim says of each level.
ABOUT = {
    "trivial": "It goes on and on: there is nothing to work out.",
    "memorised": "Often read in training: what is known by heart is recited.",
    "shuffled": "Words in random order: much surprise and nothing to work out.",
    "code": "A program: what it does has to be worked out.",
    "prose": "Prose: what happens has to be worked out.",
}
_COLUMNS = ("phi", "surprisal")


def write_text_page(
    path: Path,
    results: Mapping[str, Any],
    scored: "Sequence[tuple[LevelText, TokenScores]]",
    provenance: Mapping[str, Any],
) -> Path:
    """Write the page of results of `philens.findings.texts.measure_texts`; raises OutputError."""
    documents = []
    means = {(one["level"], one["document"]): one for one in results["texts"]}
    for level in results["levels"]:
        texts = [(text, scores) for text, scores in scored if text.level == level]
        documents += [_whole(text, scores, means[level, text.name]) for text, scores in texts[:WHOLE]]
    for level, ends in results["tokens"].items():
        of_level = {text.name: scores for text, scores in scored if text.level == level}
        documents += [_excerpts(level, end, tokens, of_level) for end, tokens in ends.items() if tokens]
    return write_page(path, "Levels of text", documents, _COLUMNS, provenance)


def _excerpts(
    level: str, end: str, tokens: Sequence[Mapping[str, Any]], of_level: "Mapping[str, TokenScores]"
) -> PageDocument:
    """Where the tokens with the highest or lowest phi of a level stand, one excerpt below the other."""
    pieces: list[str] = []
    spans: list[str] = []
    columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    for rank, token in enumerate(tokens, start=1):
        scores = of_level[token["document"]]
        part = slice(max(token["place"] - BEFORE, 0), token["place"] + AFTER + 1)
        words = scores.pieces()[part]
        pieces += words
        word = token["token"].strip() or "space"
        spans += [f"{rank}. “{word}”, {token['phi']:.0f} nats, in {token['document']}"] * len(words)
        for name, values in columns.items():
            values += scores.columns[name][part].tolist()
    means = {name: _mean([token[name] for token in tokens]) for name in _COLUMNS}
    told = f"Means are those of these {len(tokens)} tokens, which are named above what stands around them."
    return PageDocument(f"{level}: {end} phi", told, pieces, columns, spans, means)


def _whole(text: "LevelText", scores: "TokenScores", found: Mapping[str, Any]) -> PageDocument:
    """A text with what its chat template put around it, which has no part in the means."""
    columns = {name: scores.columns[name] for name in _COLUMNS}
    means = {name: _mean([found[name]]) for name in _COLUMNS}
    about = ABOUT.get(role(text.level) or "", "")
    return PageDocument(f"{text.level}: {text.name}", about, scores.pieces(), columns, (), means)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
