"""An endless stream of documents out of real text, any of which can be made by itself."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from philens.support.errors import ConfigError, InputError
from philens.tasks.automata import TaskConfig
from philens.tasks.chat import content_text, encode_chat, encode_text, refuse_plain_text
from philens.tasks.packing import TokenDocuments
from philens.tasks.random_streams import below, derive, uniform
from philens.tasks.sources import Document, Source, TextPart, open_source

# One document in so many is held out, in parts that have as many.
HELD_OUT = 20
# A document drawn may be empty or held out; another is drawn in its place, at most so often.
_TRIES = 100
# Tokens have fewer characters than this on average; more need not be tokenised to fill a row.
_CHARACTERS = 8
# Of longer parts the held-out documents are looked for at random, not in the whole.
_LISTED = 2**22
# Independent streams below a seed; automata have 0 to 2.
_PART, _DOCUMENT, _STRETCH, _ORDER = range(10, 14)


def is_held_out(document: Document) -> bool:
    """Whether a document is kept for evaluation: by a hash of what it says, so that a copy of it is, too."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % HELD_OUT == 0


def open_parts(
    parts: Mapping[str, TextPart], tasks: TaskConfig, seed: int, known: Mapping[str, Source] | None = None
) -> dict[str, Source]:
    """The documents of every part that has a weight.

    Args:
        tasks: sizes of the formal languages of `automata`.
        seed: seed of these, and of arithmetic problems.
        known: parts that are open already.

    Raises:
        ConfigError: no part has a weight above 0, or options that do not fit a source.
        InputError: a source cannot be read.
    """
    sources, known = {}, known or {}
    for name, part in parts.items():
        try:
            if part.weight:
                sources[name] = known[name] if name in known else open_source(part, tasks, seed)
        except (ConfigError, InputError) as error:
            raise type(error)(f"data.parts.{name}: {error}") from error
    if not sources:
        raise ConfigError("At least one part needs a weight above 0.")
    return sources


class TextMixture:
    """Documents of several parts, tokenised when they are asked for.

    Document i of the stream is drawn, with replacement, by a hash of (seed, i): first the part, by weight,
    then a document of it, then, where it is longer than a row, a stretch of it that fills one (after BOS
    where the tokenizer puts one first). Chats are cut at their end instead. So a document depends on nothing
    but the parts, the tokenizer, the seed and i. Documents that are held out are never drawn.

    Args:
        parts: parts by name; those of weight 0 are not opened.
        tokenizer: a fast tokenizer of transformers, which knows where in a text its tokens are.
        length: tokens in a row.
        seed: seed of the stream.
        tasks: sizes of the formal languages of `automata`.
        known: parts that are open already.

    Raises:
        ConfigError: no part has a weight above 0, or options that do not fit a source.
        InputError: a source cannot be read, or holds nothing that the tokenizer's `Rendering` is for.
    """

    def __init__(
        self,
        parts: Mapping[str, TextPart],
        tokenizer: Any,
        length: int,
        seed: int,
        tasks: TaskConfig,
        known: Mapping[str, Source] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens are; use a fast one."
            )
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.sources = open_parts(parts, tasks, seed, known)
        if all(isinstance(source[0], str) for source in self.sources.values()):
            refuse_plain_text(tokenizer, "The text of data.parts")
        self._edges = np.cumsum([parts[name].weight for name in self.sources])
        self._recent: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}

    def documents(self, indices: NDArray[np.int64]) -> TokenDocuments:
        """Documents `indices` of the stream."""
        # Packing asks for more of the same when it was given too few.
        kept = self._recent
        self._recent = {int(i): kept[i] if i in kept else self._make(int(i)) for i in indices.tolist()}
        return TokenDocuments.join(list(self._recent.values()))

    def drawn(self, index: int) -> Iterator[tuple[str, Document, int]]:
        """Part, document and its place there that number `index` of the stream is made from, if something in
        it counts; then those that take its place.

        Raises:
            InputError: too many were not enough.
        """
        draw = uniform(derive(derive(_PART, self.seed), index)) * self._edges[-1]
        name = list(self.sources)[int(np.searchsorted(self._edges, draw, side="right")[0])]
        source, keys = (
            self.sources[name],
            derive(derive(derive(_DOCUMENT, self.seed), index), np.arange(_TRIES)),
        )
        for place in below(keys, len(source)).tolist():
            document = source[place]
            if _says_something(document) and (len(source) < HELD_OUT or not is_held_out(document)):
                yield name, document, place
        raise InputError(
            f"data.parts.{name} has no documents in which something counts (text, or an assistant's reply "
            f"that begins in the first {self.length} tokens); give another source."
        )

    def sample(self, characters: int) -> Iterator[str]:
        """So many characters of the parts, by weight, to train a tokenizer on; no document comes twice."""
        shares = np.diff(self._edges, prepend=0) / self._edges[-1]
        for source, share in zip(self.sources.values(), shares, strict=True):
            left = share * characters
            for _, document in _shuffled(source):
                if left <= 0:
                    break
                if len(source) < HELD_OUT or not is_held_out(document):
                    text = _said(document)
                    left -= len(text)
                    yield text

    def held_out(self, name: str, most: int) -> TokenDocuments:
        """At most so many documents of a part that training never draws, each a row's length at most.

        Parts with fewer than `HELD_OUT` documents have none.
        """
        source = self.sources[name]
        found = (
            self.encode(document, number, _where(name, place))
            for number, (place, document) in enumerate(islice(_shuffled(source), 4 * HELD_OUT * most))
            if _says_something(document) and is_held_out(document)
        )
        return TokenDocuments.join(list(islice(found, most)) if len(source) >= HELD_OUT else [])

    def encode(
        self, document: Document, key: int, where: str = ""
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A document's tokens, at most a row of them, and which count.

        Args:
            key: decides the stretch that is taken of a longer text.
            where: what errors call the document.
        """
        if not isinstance(document, str):
            tokens, counted = encode_chat(self.tokenizer, document, where)
            return tokens[: self.length], counted[: self.length]
        near = _CHARACTERS * self.length
        # Beginnings and ends, which few stretches have, are drawn as often as what is between.
        start = int(below(derive(key, 0), len(document) + 1)[0]) - near // 2
        start = max(0, min(start, len(document) - near))
        begin, inner, end = encode_text(self.tokenizer, document[start : start + near])
        if start + near >= len(document):
            inner += end
        room = max(1, self.length - len(begin))
        if len(inner) > room:
            start = int(below(derive(key, 1), len(inner) - room + 1)[0])
            inner = inner[start : start + room]
        tokens = np.array(begin + inner, np.int64)
        return tokens, np.ones(len(tokens), bool)

    def _make(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        key = int(derive(derive(_STRETCH, self.seed), index)[0])
        drawn = self.drawn(index)
        encoded = (self.encode(document, key, _where(name, place)) for name, document, place in drawn)
        return next((tokens, counted) for tokens, counted in encoded if counted.any())


def _where(name: str, place: int) -> str:
    return f"document {place} of data.parts.{name}"


def _shuffled(source: Source) -> Iterator[tuple[int, Document]]:
    """Every document once with its place, in random order; of a very long source, documents drawn at random
    without end."""
    if len(source) <= _LISTED:
        places = iter(np.argsort(derive(_ORDER, np.arange(len(source)))).tolist())
    else:
        places = (int(below(derive(_ORDER, number), len(source))[0]) for number in count())
    return ((place, source[place]) for place in places)


def _said(document: Document) -> str:
    if isinstance(document, str):
        return document
    return "".join(content_text(message) or "" for message in document)


def _says_something(document: Document) -> bool:
    return bool(document.strip() if isinstance(document, str) else document)
