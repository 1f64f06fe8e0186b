"""Texts and chats made into tokens that know their characters."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from philens.scoring.parts import without_thoughts
from philens.scoring.scores import Span
from philens.support.errors import InputError
from philens.support.typed import plain
from philens.tasks.chat import (
    mark_places,
    message_region,
    missing_bos,
    plain_chat,
    refuse_plain_text,
    render,
    special_tokens,
)

Text = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TokenizedText:
    """A text in T tokens.

    Attributes:
        text: of a chat, what the template made of it.
        token_ids: (T,) int64.
        offsets: (T, 2) int64, characters.
        spans: of a chat its messages.
        leading: how many tokens at the start only begin a text: BOS and others that the tokenizer added.
    """

    text: str
    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    spans: list[Span]
    leading: int

    def first(self, count: int) -> "TokenizedText":
        """Its first `count` tokens, with the characters and spans that end in them."""
        ids, offsets = self.token_ids[:count], self.offsets[:count]
        end = int(offsets[:, 1].max(initial=0))
        spans = [span for span in self.spans if span.end <= end]
        return replace(self, text=self.text[:end], token_ids=ids, offsets=offsets, spans=spans)


def as_texts(texts: Any, what: str = "texts") -> Iterator[Any]:
    """The texts, chats or lists of them in a list, an array or a column of a table, one by one; of a string
    itself.

    Columns are those of pandas, polars, Arrow and `datasets`, a stream's included. Their index plays no part.

    Args:
        what: what errors call them.

    Raises:
        InputError: a table, or something that holds no texts; at once.
    """
    if isinstance(texts, str):
        texts = [texts]
    if hasattr(texts, "column_names") or hasattr(texts, "columns"):
        raise InputError(f"{what} is a whole table ({type(texts).__name__}); give one of its columns.")
    try:
        if isinstance(texts, bytes | Mapping):
            raise TypeError
        found = iter(texts)
    except TypeError:
        raise InputError(
            f"{what} must be a string or a list of them, or a column of a table, not {type(texts).__name__}."
        ) from None
    return map(plain, found)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise an InputError unless this is a tokenizer of transformers that knows its tokens' characters."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; "
            "load the fast tokenizer of transformers for this model (AutoTokenizer.from_pretrained)."
        )


def tokenize(tokenizer: Any, text: Text, where: str) -> TokenizedText:
    """`tokenize_all` of one text."""
    return tokenize_all(tokenizer, [text], [where])[0]


def tokenize_all(tokenizer: Any, texts: Sequence[Text], where: Sequence[str]) -> list[TokenizedText]:
    """Texts in tokens by the tokenizer's own settings, chats by its own template; on all cores at once.

    Args:
        tokenizer: a fast tokenizer, perhaps with a `Rendering`; it is left as it was.
        texts: strings, or chats: messages with `role` and `content` (text, text parts, or null with
            `tool_calls`).
        where: what errors call each text.

    Raises:
        InputError: one is neither, or there is nothing to score in it.
    """
    rendered = [
        (text, []) if isinstance(text, str) else render_chat(tokenizer, text, place)
        for text, place in zip(texts, where, strict=True)
    ]
    for (text, _), given, place in zip(rendered, texts, where, strict=True):
        if isinstance(given, str):
            refuse_plain_text(tokenizer, place)
        if not text:
            raise InputError(f"{place} is empty; leave it out.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place} holds half a character (a lone surrogate, at character {error.start}); "
                "read it with the right encoding."
            ) from error
    found: dict[int, TokenizedText] = {}
    special = special_tokens(tokenizer)
    for is_plain in (True, False):  # a template has put special tokens in already
        chosen = [number for number, text in enumerate(texts) if isinstance(text, str) == is_plain]
        if not chosen:
            continue
        with settings_kept(tokenizer.backend_tokenizer):
            encoded = tokenizer(
                [rendered[number][0] for number in chosen],
                add_special_tokens=is_plain,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                return_attention_mask=False,
                verbose=False,
            )
        columns = (encoded[key] for key in ("input_ids", "offset_mapping", "special_tokens_mask"))
        for number, *columns_of_text in zip(chosen, *columns, strict=True):
            ids, pairs, mask = (np.array(column, np.int64) for column in columns_of_text)
            offsets = pairs.reshape(-1, 2)
            marks = mark_places(special, rendered[number][0], ids, offsets)
            if marks.all():
                what = "only special tokens" if len(ids) else "no token"
                raise InputError(
                    f"{where[number]} gives {what}; there is nothing to score in it, leave it out."
                )
            added = (mask != 0) & (offsets[:, 0] == offsets[:, 1])
            leading = int(np.argmin(added | (marks & (ids == tokenizer.bos_token_id))))
            if bos := missing_bos(tokenizer, ids):
                ids, leading = np.concatenate((bos, ids)), leading + 1
                offsets = np.concatenate((np.zeros((1, 2), np.int64), offsets))
            found[number] = TokenizedText(rendered[number][0], ids, offsets, rendered[number][1], leading)
    return [found[number] for number in range(len(texts))]


@contextlib.contextmanager
def settings_kept(backend: Any) -> Iterator[None]:
    """Calling a tokenizer of transformers switches off truncation and padding saved with it, for good."""
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def render_chat(tokenizer: Any, messages: Any, where: str) -> tuple[str, list[Span]]:
    """A chat as the text that the tokenizer's template makes of it, and where what each message says is.

    Contents are found by rendering the chat once more with marks in their place. A template that looks at
    contents may give another text around the marks: they are then searched for one after the other. A
    content that the template left out has an empty span. Tool calls are in the span of their message.

    Raises:
        InputError: not a chat, no template, or the template refuses the chat or leaves out its tool calls.
    """
    chat = plain_chat(tokenizer, messages, where)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where} is a chat and the tokenizer has no chat template; "
            "set tokenizer.chat_template or give a text."
        )
    contents = [message["content"] for message in chat]
    marks = [f"\ue000{number}\ue001" for number in range(len(chat))]
    text = render(tokenizer, chat, where)
    try:
        with_marks = [message | {"content": mark} for message, mark in zip(chat, marks, strict=True)]
        marked = render(tokenizer, with_marks, where)
    except InputError:
        marked = ""
    places = _between_marks(text, marked, marks, contents) or _one_after_other(text, contents)
    for number, message in enumerate(chat):
        if message.get("tool_calls"):
            places[number] = message_region(tokenizer, chat, number, text, where)
    return text, [
        Span(message["role"], start, end) for message, (start, end) in zip(chat, places, strict=True)
    ]


def _between_marks(
    text: str, marked: str, marks: Sequence[str], contents: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Where contents are if the template puts the same text around them as around marks."""
    around, rest = [], marked
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return None
        around.append(before)
    around.append(rest)
    if not text.startswith(around[0]):
        return None
    places, start = [], len(around[0])
    for content, after in zip(contents, around[1:], strict=True):
        # Templates trim.
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(form + after, start):
                break
        else:
            return None
        places.append((start, start + len(form)))
        start += len(form) + len(after)
    return places if start == len(text) else None


def _one_after_other(text: str, contents: Sequence[str]) -> list[tuple[int, int]]:
    places, done = [], 0
    for content in map(str.strip, contents):
        start = text.find(content, done)
        if start < 0:  # some templates leave out thoughts that were answered since
            content = without_thoughts(content).strip()
            start = text.find(content, done) if content else -1
        end = done if start < 0 else start + len(content)
        places.append((done if start < 0 else start, end))
        done = end
    return places
