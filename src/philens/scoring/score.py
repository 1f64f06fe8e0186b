"""Texts in, `TokenScores` out: batches of like length, windows, and only the forward passes needed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from philens.bases.facts import evaluating, merged_from, text_config
from philens.bases.fingerprint import fingerprint
from philens.lens.metrics import METRICS, Columns, columns_of, obstacle, read_batch
from philens.lens.model import PHiModel
from philens.lens.overflow import Overflow, check_overflow, overflow_error
from philens.scoring.alternatives import MOST, Alternatives, TokenTexts
from philens.scoring.parts import Steps, check_steps, parts_of
from philens.scoring.scores import ScoredTexts, TokenScores
from philens.scoring.texts import Text, TokenizedText, as_texts, check_tokenizer, tokenize_all
from philens.scoring.windows import Window, context_length, find_windows
from philens.support.errors import InputError
from philens.support.typed import nearest
from philens.support.versions import versions
from philens.tasks.rendering import Rendering, rendering_of, with_rendering

# Texts are sorted by length among so many batches' tokens, and so many texts are tokenized at once.
_LOOK_AHEAD, _TOKENIZED_AT_ONCE = 32, 64


def score(
    lens: PHiModel,
    tokenizer: Any,
    texts: str | Iterable[Text],
    *,
    metrics: Sequence[str] | None = None,
    batch_tokens: int = 4096,
    window: int | None = None,
    names: Sequence[str] | None = None,
    overflow: Overflow = "error",
    alternatives: bool = False,
    chat_options: Mapping[str, Any] | None = None,
    system: str | None = None,
    bos: bool = False,
    steps: Steps | None = None,
) -> ScoredTexts:
    """Score texts token by token.

    Args:
        lens: a model with a PHi layer.
        tokenizer: its tokenizer, a fast one of transformers; used with its own settings.
        texts: a string or several, also as an array or a column of a table; a chat is a list of messages with
            `role` and `content`, and goes through the tokenizer's own chat template.
        metrics: those that `lens.supports()` names; docs/scoring.md says what each is. None means phi,
            surprisal and, with the layer in the path, surprisal_with_layer. Only what these need is computed:
            phi alone stops the forward pass at the layer.
        batch_tokens: tokens read at once, padding included. Scores do not depend on it.
        window: longer texts are read in overlapping windows of as many tokens; None means the model's own
            context (`max_position_embeddings`), and whole texts where it has none.
        names: one for each text, kept in its scores and used in errors.
        overflow: what becomes of a token that should have a value and gets NaN or an infinity from the model:
            an `error` that says where it began, or `nan`, with how many there are in the text's provenance
            as `overflowed`. First tokens and those that begin a text stay as they are.
        alternatives: also keep the likeliest tokens in each token's place and the rank of the one that stands
            there, as `TokenScores.alternatives`: of the base's distribution, or of that with the layer in the
            path where `surprisal_with_layer` is asked for and `surprisal` is not.
        chat_options: values for variables of the chat template, such as `{"enable_thinking": False}`.
        system: what the system says at the beginning of chats in which it says nothing.
        bos: put the tokenizer's BOS before texts and chats that would begin without it. By default they begin
            as the tokenizer and its template have it.
        steps: also make each of these a span: `lines`, `sentences` or `equations` of thoughts and answers, of
            what the assistant says in chats, or of the text. Thoughts and answers are spans where a text has
            them.

    Returns:
        One `TokenScores` for each text, in order: a list, which a notebook shows.

    Raises:
        InputError: no text, or one that is empty or no text; an unknown metric, or one that this lens does
            not have; a tokenizer without offsets or of another model; a window longer than the context; a
            model that overflows; system or chat options for what is no chat.
        ConfigError: chat options that the template does not have, or no BOS; no such steps.
    """
    texts = list(as_texts(texts))
    if not texts:
        raise InputError("There is nothing to score; give at least one text.")
    if names is not None and len(names) != len(texts):
        raise InputError(f"There are {len(texts)} texts and {len(names)} names; give one name for each text.")
    return ScoredTexts(
        iter_scores(
            lens,
            tokenizer,
            texts,
            metrics=metrics,
            batch_tokens=batch_tokens,
            window=window,
            names=names,
            overflow=overflow,
            alternatives=alternatives,
            chat_options=chat_options,
            system=system,
            bos=bos,
            steps=steps,
        )
    )


def iter_scores(
    lens: PHiModel,
    tokenizer: Any,
    texts: str | Iterable[Text],
    *,
    metrics: Sequence[str] | None = None,
    batch_tokens: int = 4096,
    window: int | None = None,
    names: Iterable[str] | None = None,
    overflow: Overflow = "error",
    alternatives: bool = False,
    chat_options: Mapping[str, Any] | None = None,
    system: str | None = None,
    bos: bool = False,
    steps: Steps | None = None,
    cut: Callable[[TokenizedText], TokenizedText] | None = None,
) -> Iterator[TokenScores]:
    """As `score`, for any number of texts: they are read a few batches ahead and their scores come in order.

    Args:
        cut: what is read of each text, called in order.

    Raises:
        InputError, ConfigError: as `score`; about a text when it is reached, about anything else at once.
    """
    if not isinstance(lens, PHiModel):
        raise InputError(
            "score needs a model with a PHi layer, from philens.attach or philens.load, "
            f"not {type(lens).__name__}."
        )
    check_tokenizer(tokenizer)
    tokenizer = with_rendering(tokenizer, Rendering(chat_options or {}, system, bos))
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, not {batch_tokens}.")
    check_overflow(overflow)
    check_steps(steps)
    wanted, following = check_metrics(lens, metrics), as_texts(texts)
    context = context_length(lens.base, window)
    origin = provenance(lens, tokenizer, context) | options_of(lens, wanted)
    others = alternatives_of(wanted) if alternatives else None
    token_texts: Any = TokenTexts(tokenizer) if alternatives else {}

    def scores() -> Iterator[TokenScores]:
        prepared = _tokenized(lens, tokenizer, following, names)
        if cut is not None:
            prepared = ((name, where, cut(text)) for name, where, text in prepared)
        while ahead := _take(prepared, _LOOK_AHEAD * batch_tokens):
            readings = _read_texts(lens, [text for *_, text in ahead], wanted, others, batch_tokens, context)
            for (name, where, text), read in zip(ahead, readings, strict=True):
                own = origin
                if read.lost.any():  # what fills a batch may overflow, too, and spoil what comes before it
                    (read,) = _read_texts(lens, [text], wanted, others, 1, context)
                if read.lost.any():
                    if overflow == "error":
                        raise overflow_error(lens, _read_with(text, int(read.lost.argmax()), context), where)
                    own = own | {"overflowed": int(read.lost.sum())}
                kept = None
                if others is not None and read.likeliest is not None:
                    kept = Alternatives.of_likeliest(others, *read.likeliest, token_texts)
                    token_texts.learn(kept.token_ids)
                yield TokenScores(
                    text.text,
                    text.token_ids,
                    text.offsets,
                    read.columns,
                    [*text.spans, *parts_of(text.text, text.spans, steps)],  # pyright: ignore[reportArgumentType]
                    own,
                    read.sinks,
                    kept,
                    name,
                )

    return scores()


def check_metrics(lens: PHiModel, metrics: Sequence[str] | None) -> list[str]:
    """The metrics asked for, in the order of columns; None means those that every lens has.

    Raises:
        InputError: one that does not exist, or that this lens does not have.
    """
    if metrics is None:
        kinds = [config.kind for config in lens.configs]
        metrics = [*kinds, "surprisal", *(["surprisal_with_layer"] if lens.config.mode != "observe" else [])]
    chosen = {metrics} if isinstance(metrics, str) else set(metrics)
    if not chosen:
        raise InputError(f"No metric was asked for; choose among {', '.join(METRICS)}.")
    check_names(chosen)
    wanted = [name for name in METRICS if name in chosen]
    for error in (obstacle(lens, name) for name in wanted):
        if error is not None:
            raise error
    return wanted


def check_names(metrics: Iterable[str]) -> None:
    """Raise an InputError if one of these is no metric."""
    for name in sorted(set(metrics) - set(METRICS)):
        close = nearest(name, list(METRICS))
        raise InputError(
            f"There is no metric {name!r}; did you mean {close!r} (there are {', '.join(METRICS)})?"
        )


def alternatives_of(metrics: Sequence[str]) -> str:
    """The surprisal whose distribution alternatives beside these metrics are of."""
    layers = "surprisal_with_layer"
    return layers if layers in metrics and "surprisal" not in metrics else "surprisal"


def provenance(lens: PHiModel, tokenizer: Any, context: int | None = None) -> dict[str, Any]:
    """What scores are made with: base, adapter, where the layer is, precision, rules and versions.

    Args:
        context: tokens read at once at most; None means whole texts.
    """
    config, kinds = getattr(lens.base, "config", None), [one.kind for one in lens.configs]
    rule = "texts are read whole"
    if context is not None:
        rule = (
            f"texts of more than {context} tokens are read in overlapping windows of {context}, each token "
            f"scored once, after at least {(context + 1) // 2} others except in the first window"
        )
    begin = "texts begin as the tokenizer has it, chats as its template has it; so do later windows"
    if rendering_of(tokenizer).bos:
        begin = "texts, chats and later windows begin with BOS"
    return {
        "base": getattr(config, "_name_or_path", None) or type(lens.base).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": fingerprint(lens.base),
        **({} if (merged := merged_from(lens.base)) is None else {"merged_from": merged}),
        "tokenizer": getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__,
        "adapter": lens.source,
        "adapter_fingerprint": fingerprint(lens.attached),
        **({} if kinds == ["phi"] else {"instruments": kinds}),
        "module_paths": list(lens.module_paths),
        "mode": lens.config.mode,
        **(
            {name: getattr(lens.config, name) for name in ("kl", "inference", "samples")}
            if lens.layers
            else {}
        ),
        "dtype": str(next(p.dtype for p in lens.base.parameters() if p.is_floating_point()))[len("torch.") :],
        "window": context,
        "window_rule": rule,
        "bos_rule": begin,
        **rendering_of(tokenizer).record(),
        "versions": versions("torch", "transformers", "tokenizers"),
    }


def options_of(lens: PHiModel, metrics: Sequence[str]) -> dict[str, Any]:
    """The options by which these metrics are measured, for the provenance."""
    names = {name for metric in metrics for name in METRICS[metric].options}
    chosen = {name: value for name, value in asdict(lens.metric_options).items() if name in names}
    return {"metric_options": chosen} if chosen else {}


def _tokenized(
    lens: PHiModel, tokenizer: Any, texts: Iterator[Text], names: Iterable[str] | None
) -> Iterator[tuple[str | None, str, TokenizedText]]:
    """Each text with its name and what errors call it, in tokens that the model knows."""
    vocabulary = getattr(text_config(lens.base), "vocab_size", None)
    remaining = None if names is None else iter(names)
    first = 0
    while some := list(islice(texts, _TOKENIZED_AT_ONCE)):
        own: list[str | None] = [None] * len(some)
        if remaining is not None:
            own[:] = islice(remaining, len(some))
            if len(own) < len(some):
                raise InputError(f"There are only {first + len(own)} names; give one for each text.")
        where = [name or f"texts[{number}]" for number, name in enumerate(own, first)]
        first += len(some)
        for name, place, tokens in zip(own, where, tokenize_all(tokenizer, some, where), strict=True):
            if vocabulary is not None and tokens.token_ids.max() >= vocabulary:
                raise InputError(
                    f"{place} has token id {tokens.token_ids.max()} and the model knows {vocabulary} tokens; "
                    "load the model's own tokenizer."
                )
            yield name, place, tokens


def _take(
    texts: Iterator[tuple[str | None, str, TokenizedText]], tokens: int
) -> list[tuple[str | None, str, TokenizedText]]:
    """The next texts, until they have as many tokens; none at the end."""
    taken = []
    while tokens > 0:
        following = list(islice(texts, 1))
        if not following:
            break
        taken += following
        tokens -= len(following[0][2].token_ids)
    return taken


class _Reading(NamedTuple):
    """What was found in a text of T tokens.

    Attributes:
        columns: columns in order.
        sinks: (T,) which are attention sinks.
        lost: (T,) which lack a value because the model overflowed.
        likeliest: ranks (T,), and ids and probabilities (T, k) of the likeliest tokens, if asked for.
    """

    columns: Columns
    sinks: NDArray[np.bool_]
    lost: NDArray[np.bool_]
    likeliest: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]] | None


def _read_texts(
    lens: PHiModel,
    texts: Sequence[TokenizedText],
    wanted: Sequence[str],
    alternatives: str | None,
    batch_tokens: int,
    context: int | None,
) -> list[_Reading]:
    windows = [
        (number, window)
        for number, text in enumerate(texts)
        for window in find_windows(len(text.token_ids), context, text.leading)
    ]
    device = next(lens.base.parameters()).device
    done: list[tuple[int, Window]] = []
    names, read, likeliest = [], [], []
    with evaluating(lens):
        for batch in _batches(windows, batch_tokens):
            input_ids, places = (
                torch.from_numpy(values).to(device, non_blocking=True) for values in _assemble(texts, batch)
            )
            found, best = read_batch(lens, input_ids, places, wanted, alternatives, MOST)
            likeliest += [best] if best is not None else []
            names = list(found)
            read.append(torch.stack([values.float() for values in found.values()]))
            done += batch
    # One copy, for which a device is waited; nothing of philens does so before.
    of_tokens = [torch.cat(read, 1).cpu().numpy().T]
    of_tokens += [torch.cat(parts).cpu().numpy() for parts in zip(*likeliest, strict=True)]
    readings = []
    for text, (table, *best) in zip(texts, _by_text(of_tokens, done, texts), strict=True):
        lost = _lost(table, text)
        if best:
            lost |= (best[0] == 0) & _has_one_before(text)
        columns, sinks = columns_of(dict(zip(names, table.T.copy(), strict=True)), wanted)
        likely: Any = tuple(best) or None
        readings.append(_Reading(columns, sinks, lost, likely))
    return readings


def _by_text(
    arrays: Sequence[NDArray[Any]], windows: Sequence[tuple[int, Window]], texts: Sequence[TokenizedText]
) -> Iterator[list[NDArray[Any]]]:
    """The rows (N, ...) of arrays, which come window by window, put together for each text, (T, ...)."""
    whole = [[np.empty((len(text.token_ids), *one.shape[1:]), one.dtype) for one in arrays] for text in texts]
    stop = 0
    for number, window in windows:
        start, stop = stop, stop + window.stop - window.scored
        for own, values in zip(whole[number], arrays, strict=True):
            own[window.scored : window.stop] = values[start:stop]
    return iter(whole)


def _lost(table: NDArray[np.float32], text: TokenizedText) -> NDArray[np.bool_]:
    """(T,) the tokens that have one before them and a value that is none, which becomes NaN in (T, n)."""
    broken = ~np.isfinite(table) & _has_one_before(text)[:, None]
    table[broken] = np.nan
    return np.logical_or.reduce(broken, axis=1)


def _has_one_before(text: TokenizedText) -> NDArray[np.bool_]:
    """(T,) the tokens that others of the text come before."""
    return np.arange(len(text.token_ids)) >= max(1, text.leading)


def _read_with(text: TokenizedText, token: int, context: int | None) -> Tensor:
    """(T,) what is read at once with a token of a text."""
    windows = find_windows(len(text.token_ids), context, text.leading)
    window = next(one for one in windows if token < one.stop)
    return torch.from_numpy(_assemble([text], [(0, window)])[0][0])


def _batches(windows: Sequence[tuple[int, Window]], batch_tokens: int) -> Iterator[list[tuple[int, Window]]]:
    """Windows of like length together, the longest first, so that what fits at first fits to the end."""
    ordered = sorted(windows, key=lambda item: -len(item[1]))
    while ordered:
        rows = max(1, batch_tokens // len(ordered[0][1]))
        yield ordered[:rows]
        ordered = ordered[rows:]


def _assemble(
    texts: Sequence[TokenizedText], batch: Sequence[tuple[int, Window]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(B, T) tokens, zeros on the right, and which of the B * T are scored, (N,).

    There is no mask: a causal model's tokens do not see what comes after them, and attention that has only to
    be causal is cheaper.
    """
    input_ids = np.zeros((len(batch), max(len(window) for _, window in batch)), np.int64)
    places = np.arange(input_ids.size).reshape(input_ids.shape)
    scored = []
    for row, (number, window) in enumerate(batch):
        tokens = texts[number].token_ids
        repeated, length = window.repeated, len(window)
        input_ids[row, :repeated] = tokens[:repeated]
        input_ids[row, repeated:length] = tokens[window.start : window.stop]
        scored.append(places[row, repeated + window.scored - window.start : length])
    return input_ids, np.concatenate(scored)
