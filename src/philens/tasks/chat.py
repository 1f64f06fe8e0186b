"""Texts and chats as tokens, with a mark on those that count in the loss; how a chat becomes a text.

Everything that goes through a chat template does so here, in `render`: the same chat is the same text on any
day, and its contents may be texts, lists of text parts, or null beside tool calls.
"""

import contextlib
import copy
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from philens.bases.hub import reason
from philens.support.errors import InputError
from philens.support.typed import is_missing
from philens.tasks.rendering import rendering_of

Encoded = tuple[NDArray[np.int64], NDArray[np.bool_]]
Messages = list[dict[str, Any]]

MOMENT = datetime(2024, 7, 26, 12)
"""When every chat is rendered. It is the date that Llama 3's template names where there is no other."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Characters that no text has, to find out what a template does with contents.
_FIRST, _SECOND, _PERCENT = "\ue000", "\ue001", "\ue002"
_SYSTEM = ("system", "developer")
# By template: whether it takes contents as texts, and what it writes between two parts of one.
_forms: dict[str, tuple[bool, str]] = {}


# Chats


def check_chat(messages: Any, where: str) -> None:
    """Raise an InputError unless this is a chat; `where` is what the error calls it."""
    if isinstance(messages, Mapping):
        raise InputError(
            f"{where} is one message; a chat is a list of messages: put it in a list of its own."
        )
    if is_missing(messages):
        raise InputError(f"{where} has no value ({messages}); leave it out.")
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InputError(
            f"{where} is of type {type(messages).__name__}; give a string, or a chat as a list of messages "
            "with role and content."
        )
    if not messages:
        raise InputError(f"{where} is a chat without messages; leave it out.")
    for number, message in enumerate(messages, 1):
        if not is_message(message):
            raise InputError(
                f"{where} holds {message!r:.80}; a chat is a list of messages, each with role and content."
            )
        if content_text(message) is None:
            raise InputError(
                f"{where} has a content that is no text in message {number} "
                f"({message.get('content')!r:.60}); give text, a list of text parts, or null with tool_calls."
            )


def is_message(value: Any) -> bool:
    """Whether this looks like a message; `check_chat` says whether its content can be read."""
    has_content = isinstance(value, Mapping) and ("content" in value or bool(value.get("tool_calls")))
    return has_content and isinstance(value.get("role"), str)


def content_text(message: Mapping[str, Any], separator: str = "") -> str | None:
    """A message's content as one text; empty for null beside tool calls, None where it is no text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        return "" if message.get("tool_calls") else None
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        return None
    parts: list[Any] = [
        part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        for part in content
    ]
    return separator.join(parts) if all(isinstance(part, str) for part in parts) else None


def plain_chat(tokenizer: Any, messages: Any, where: str) -> Messages:
    """A chat with every content as one text, its parts joined as the tokenizer's template joins them.

    Keys without a value, which tables fill in, are left out. What the system is to say by the tokenizer's
    `Rendering` comes first where the chat has no such message.

    Raises:
        InputError: as `check_chat`.
    """
    check_chat(messages, where)
    chat = [_without_nulls(message) for message in messages]
    listed = any(not isinstance(message.get("content", ""), str) for message in chat)
    separator = _form(tokenizer)[1] if listed and tokenizer.chat_template else ""
    for message in chat:
        message["content"] = content_text(message, separator)
    system = rendering_of(tokenizer).system
    if system is not None and chat[0]["role"] not in _SYSTEM:
        chat.insert(0, {"role": "system", "content": system})
    return chat


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_without_nulls(item) for item in value]
    return value


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    calls = [call.get("function", call) if isinstance(call, Mapping) else call for call in calls]
    return [call for call in calls if isinstance(call, dict)]


def _with_read_arguments(messages: Messages) -> Messages:
    """A chat with arguments of tool calls that are JSON as what they say."""
    chat = copy.deepcopy(messages)
    for call in (call for message in chat for call in _calls(message)):
        if isinstance(call.get("arguments"), str):
            with contextlib.suppress(ValueError):
                call["arguments"] = json.loads(call["arguments"])
    return chat


# Templates


def render(tokenizer: Any, messages: Messages, where: str, tokenize: bool = False, **options: Any) -> Any:
    """What the tokenizer's template makes of a chat that `plain_chat` gave, whatever the day.

    Args:
        options: options of `apply_chat_template`.

    Raises:
        InputError: the template refuses the chat, or leaves out its tool calls or what the system is to say.
    """
    calls = any(message.get("tool_calls") for message in messages)
    if not _form(tokenizer)[0]:
        messages = [message | {"content": _parts(message["content"])} for message in messages]
    options |= {"tokenize": tokenize}
    try:
        try:  # most templates write the arguments of calls as JSON
            made = _apply(tokenizer, _with_read_arguments(messages) if calls else messages, **options)
        except Exception:
            if not calls:
                raise
            made = _apply(tokenizer, messages, **options)
    except Exception as error:  # a template raises what it likes
        raise InputError(f"The chat template refuses {where} ({reason(error)}); change the chat.") from error
    system = rendering_of(tokenizer).system
    text = made
    if not isinstance(made, str):
        text = tokenizer.decode(made["input_ids"]) if calls or system is not None else ""
    if calls and any(str(call.get("name")) not in text for message in messages for call in _calls(message)):
        raise InputError(
            f"The chat template leaves out the tool calls of {where}; use a tokenizer whose template has "
            "them, or leave such chats out."
        )
    if system is not None and (content_text(messages[0]) or "").strip() not in text:
        raise InputError(
            f"The chat template leaves out what the system says in {where}; leave out system, or say it in a "
            "message of the user."
        )
    return made


def _apply(tokenizer: Any, messages: Messages, **options: Any) -> Any:
    template = tokenizer.get_chat_template()
    options = {"date_string": MOMENT.strftime("%d %b %Y"), **rendering_of(tokenizer).chat_options, **options}
    if "strftime_now" in template:
        # A line of its own: blanks before the template's first block are treated as before.
        options["chat_template"] = f"{_STOPPED_CLOCK}\n{template}"
    return tokenizer.apply_chat_template(messages, **options)


def _stopped_clock() -> str:
    """A macro that takes the place of the clock that templates are given, `strftime_now`.

    transformers hands nothing to templates but data, so it is written in their own language.
    """
    replaced = [("%%", _PERCENT)]
    for mark in ("%", "%-"):
        for letter in "aAbBcCdDeFfgGhHIjklmMnpPrRSTuUVwWxXyYzZ":
            with contextlib.suppress(ValueError):  # not every system knows all of them
                replaced.append((mark + letter, MOMENT.strftime(mark + letter)))
    replaced.append((_PERCENT, "%"))
    filters = "".join(f"|replace({old!r}, {new!r})" for old, new in replaced if old != new)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}"


_STOPPED_CLOCK = _stopped_clock()


def _form(tokenizer: Any) -> tuple[bool, str]:
    """Whether the template takes contents as texts, and what it writes between two parts of one.

    Tried with a message of each kind; a template that refuses those is taken to be like most.
    """
    template = tokenizer.get_chat_template()
    if template not in _forms:

        def shown(content: Any) -> str:
            try:
                return _apply(tokenizer, [{"role": "user", "content": content}], tokenize=False)
            except Exception:  # a template raises what it likes
                return ""

        of_parts = shown([*_parts(_FIRST), *_parts(_SECOND)])
        between, found, _ = of_parts.partition(_FIRST)[2].partition(_SECOND)
        takes_parts = bool(found) and "text" not in between  # else it prints the list
        _forms[template] = (not takes_parts or _FIRST in shown(_FIRST), between if takes_parts else "")
    return _forms[template]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def message_region(tokenizer: Any, messages: Messages, number: int, text: str, where: str) -> tuple[int, int]:
    """The characters of a rendered chat that depend on what a message says, tool calls included."""
    marked = {key: value for key, value in messages[number].items() if key != "tool_calls"}
    marked["content"] = _FIRST
    other = render(tokenizer, [*messages[:number], marked, *messages[number + 1 :]], where)
    start = _alike(text, other)
    return start, len(text) - _alike(text[start:][::-1], other[start:][::-1])


def _alike(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(text), len(other)))


# Tokens


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """By id, all special tokens: those with a part to play, and others that were added as such."""
    added = {key: str(token) for key, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def mark_places(
    special: Mapping[int, str], text: str, token_ids: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(T,) which tokens are `special_tokens`, put there by the tokenizer or written as such in the text.

    By what stands there and not by the ids alone: the id of a character that the tokenizer does not know may
    be that of the token that ends a text.
    """
    found, texts = np.isin(token_ids, list(special)), set(special.values())
    for place in np.flatnonzero(found):
        start, end = offsets[place]
        found[place] = start == end or bool({text[start:end], text[start:end].strip()} & texts)
    return found


def end_marks(tokenizer: Any) -> re.Pattern[str]:
    """Matches special tokens that are written at the end of a reply, and blanks after them."""
    marks = sorted(set(special_tokens(tokenizer).values()), key=len, reverse=True)
    return re.compile(rf"(?:(?:{'|'.join(map(re.escape, marks)) or '(?!)'})\s*)+\Z")


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """A text as tokens in three parts: what comes first (`begin_of_text`), the text's own, and the token that
    ends a text (EOS, or nothing)."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return begin_of_text(tokenizer, tokens), tokens, _end(tokenizer)


def missing_bos(tokenizer: Any, token_ids: Sequence[int] | NDArray[np.int64]) -> list[int]:
    """BOS, where a text of these tokens is to begin with it by the tokenizer's `Rendering`, and does not."""
    bos = tokenizer.bos_token_id
    has_it = len(token_ids) and token_ids[0] == bos
    return [bos] if rendering_of(tokenizer).bos and not has_it else []


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """A text as the tokens after which a model goes on writing."""
    tokens = tokenizer(text, verbose=False).input_ids
    return missing_bos(tokenizer, tokens) + tokens


def refuse_plain_text(tokenizer: Any, where: str) -> None:
    """Raise an InputError if the tokenizer's `Rendering` says something that only chats have a place for."""
    chosen = rendering_of(tokenizer)
    if chosen.system is not None or chosen.chat_options:
        raise InputError(
            f"{where} is plain text, and system and chat options are for chats; leave them out, or give a "
            "list of messages."
        )


def encode_chat(tokenizer: Any, messages: Any, where: str = "") -> Encoded:
    """A chat as tokens by the tokenizer's own template; those of the assistant's messages count.

    Templates that mark what the assistant generates are taken at their word. By others, a message is what
    rendering it adds to the chat before it, the prompt for a reply left out. Without a template, messages are
    joined by blank lines, roles left out, between BOS and EOS where the tokenizer has them.

    Args:
        tokenizer: a fast tokenizer of transformers.
        messages: each with `role` and `content`: text, text parts, or null with `tool_calls`.
        where: what errors call the chat; by default its roles.

    Raises:
        InputError: this is no chat, the template refuses it, leaves out its tool calls or does not show which
            part is whose.
    """
    if not where:
        roles = [str(message.get("role")) for message in messages if isinstance(message, Mapping)]
        where = f"a chat of {', '.join(roles)}"
    chat = plain_chat(tokenizer, messages, where)
    if not tokenizer.chat_template:
        return _encode_plain(tokenizer, chat, where)
    if _GENERATION.search(tokenizer.get_chat_template()):
        encoded = render(
            tokenizer, chat, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens = np.array(encoded["input_ids"], np.int64)
        return _with_bos(tokenizer, tokens, np.array(encoded["assistant_masks"], bool))
    text = render(tokenizer, chat, where)
    spans = [
        _span(tokenizer, chat, number, text, where)
        for number, message in enumerate(chat)
        if message["role"] == "assistant"
    ]
    return _with_bos(tokenizer, *_tokenize(tokenizer, text, spans))


def _with_bos(tokenizer: Any, tokens: NDArray[np.int64], counted: NDArray[np.bool_]) -> Encoded:
    bos = np.array(missing_bos(tokenizer, tokens), np.int64)
    return np.concatenate((bos, tokens)), np.concatenate((np.zeros(len(bos), bool), counted))


def chat_prompt(tokenizer: Any, messages: Any, where: str = "a chat") -> str:
    """A chat as text, with what the template puts before a reply."""
    return render(tokenizer, plain_chat(tokenizer, messages, where), where, add_generation_prompt=True)


def _span(tokenizer: Any, messages: Messages, number: int, text: str, where: str) -> tuple[int, int]:
    """Where a message of the assistant stands in the rendered text, its end mark included."""
    if number:
        before = render(tokenizer, messages[:number], where, add_generation_prompt=True)
    else:  # an empty chat cannot be rendered
        start, _ = message_region(tokenizer, messages, 0, text, where)
        before = text[:start]
    after = render(tokenizer, messages[: number + 1], where)
    if text.startswith(before) and text.startswith(after):
        return len(before), len(after)
    # A template that renders a message otherwise once others follow.
    start, end = message_region(tokenizer, messages, number, text, where)
    content = messages[number]["content"].strip()
    found = text.find(content, start, end)
    if found < 0:
        raise InputError(
            "The tokenizer's chat template changes the assistant's words; use another tokenizer."
        )
    return (start, end) if messages[number].get("tool_calls") else (found, found + len(content))


def _tokenize(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Encoded:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = np.array(encoded.input_ids, np.int64)
    starts, ends = np.array(encoded.offset_mapping, np.int64).reshape(-1, 2).T
    counted = np.zeros(len(tokens), bool)
    for start, end in spans:
        counted |= (ends > start) & (starts < end)
    return tokens, counted


def _encode_plain(tokenizer: Any, messages: Messages, where: str) -> Encoded:
    refuse_tool_calls(messages, where)
    text, spans = "", []
    for message in messages:
        text += "\n\n" if text else ""
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    tokens, counted = _tokenize(tokenizer, text, spans)
    begin, end = begin_of_text(tokenizer, tokens), _end(tokenizer)
    replied = messages[-1]["role"] == "assistant"
    return (
        np.concatenate((begin, tokens, end)).astype(np.int64),
        np.concatenate((np.zeros(len(begin), bool), counted, np.full(len(end), replied))),
    )


def refuse_tool_calls(messages: Messages, where: str) -> None:
    """Raise an InputError if a chat that goes through no template calls tools."""
    if any(message.get("tool_calls") for message in messages):
        raise InputError(
            f"{where} calls tools and the tokenizer has no chat template to write that; leave it out."
        )


def begin_of_text(tokenizer: Any, token_ids: Sequence[int] | NDArray[np.int64] = ()) -> list[int]:
    """What comes before the tokens of a text: BOS, where the tokenizer or its `Rendering` puts that in front
    of texts, or nothing. What the tokenizer puts after one may be the same."""
    whole = tokenizer("a").input_ids
    own = tokenizer("a", add_special_tokens=False).input_ids
    begins = whole[:1] == [tokenizer.bos_token_id] and whole[: len(own)] != own
    return whole[:1] if begins else missing_bos(tokenizer, token_ids)


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
