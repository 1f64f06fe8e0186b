"""Texts and chats as tokens, with a mark on those that count in the loss."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from philens.errors import InputError

Encoded = tuple[NDArray[np.int64], NDArray[np.bool_]]
Messages = list[dict[str, str]]

# Llama 3 tells the model the date. With this one, which its template names too, rows are the same every day.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """A text as tokens in three parts: what the tokenizer puts first (BOS, or nothing), the text's own, and
    the token that ends a text (EOS, or nothing)."""
    return (
        begin_of_text(tokenizer),
        tokenizer(text, add_special_tokens=False, verbose=False).input_ids,
        _end(tokenizer),
    )


def encode_chat(tokenizer: Any, messages: Messages) -> Encoded:
    """A chat as tokens by the tokenizer's own template; those of the assistant's messages count.

    Templates that mark what the assistant generates are taken at their word. By others, a message is what
    rendering it adds to the chat before it, the prompt for a reply left out. Without a template, messages are
    joined by blank lines, roles left out, between BOS and EOS where the tokenizer has them.

    Args:
        tokenizer: of transformers, a fast one.
        messages: each with `role` and `content`.

    Raises:
        InputError: the template refuses the chat, or does not show which part is whose.
    """
    if not tokenizer.chat_template:
        return _encode_plain(tokenizer, messages)
    if _GENERATION.search(tokenizer.get_chat_template()):
        encoded = _render(
            tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(encoded["input_ids"], np.int64), np.array(encoded["assistant_masks"], bool)
    text = _render(tokenizer, messages)
    spans = [
        _span(tokenizer, messages, number, text)
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return _tokenize(tokenizer, text, spans)


def chat_prompt(tokenizer: Any, messages: Messages) -> str:
    """A chat as text, with what the template puts before a reply."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def _render(tokenizer: Any, messages: Messages, tokenize: bool = False, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **TEMPLATE_OPTIONS, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"The tokenizer's chat template refuses a chat of {roles} ({' '.join(str(error).split())}); "
            "change the chats' roles."
        ) from error


def _span(tokenizer: Any, messages: Messages, number: int, text: str) -> tuple[int, int]:
    """Where a message of the assistant stands in the rendered text, its end mark included."""
    if number:
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
    else:  # an empty chat cannot be rendered
        marked = [messages[0] | {"content": "\0"}, *messages[1:]]
        before = _render(tokenizer, marked).partition("\0")[0]
    start = len(before) if text.startswith(before) else 0
    after = _render(tokenizer, messages[: number + 1])
    if text.startswith(before) and text.startswith(after):
        return start, len(after)
    # A template that renders a message otherwise once others follow.
    content = messages[number]["content"].strip()
    found = text.find(content, start)
    if found < 0:
        raise InputError(
            "The tokenizer's chat template changes the assistant's words; use another tokenizer."
        )
    return found, found + len(content)


def _tokenize(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Encoded:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = np.array(encoded.input_ids, np.int64)
    starts, ends = np.array(encoded.offset_mapping, np.int64).reshape(-1, 2).T
    counted = np.zeros(len(tokens), bool)
    for start, end in spans:
        counted |= (ends > start) & (starts < end)
    return tokens, counted


def _encode_plain(tokenizer: Any, messages: Messages) -> Encoded:
    text, spans = "", []
    for message in messages:
        text += "\n\n" if text else ""
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    begin, end = begin_of_text(tokenizer), _end(tokenizer)
    tokens, counted = _tokenize(tokenizer, text, spans)
    replied = messages[-1]["role"] == "assistant"
    return (
        np.concatenate((begin, tokens, end)).astype(np.int64),
        np.concatenate((np.zeros(len(begin), bool), counted, np.full(len(end), replied))),
    )


def begin_of_text(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: BOS, or nothing."""
    first = tokenizer("").input_ids[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
