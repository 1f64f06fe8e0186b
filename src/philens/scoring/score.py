"""Texts in, `TokenScores` out: batches of like length, windows, and only the forward passes needed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

import philens
from philens.adapter import fingerprint
from philens.errors import InputError
from philens.insertion import text_config
from philens.model import PHiModel
from philens.scoring.baselines import (
    LOGITS_AT_ONCE,
    LogitLens,
    divergence,
    predictions,
    settling_depth,
    steps,
)
from philens.scoring.scores import TokenScores
from philens.scoring.texts import Text, TokenizedText, check_tokenizer, tokenize
from philens.scoring.windows import Window, context_length, find_windows
from philens.typed import nearest

# In the order in which the columns come.
METRICS = (
    "phi",
    "surprisal",
    "surprisal_with_layer",
    "entropy",
    "margin",
    "logit_lens_divergence",
    "settling_depth",
    "step_length",
)
_OF_PREDICTIONS = frozenset({"surprisal", "entropy", "margin"})
_OF_BLOCKS = frozenset({"logit_lens_divergence", "settling_depth"})
_OF_LAYER = frozenset({"phi", "surprisal_with_layer", "logit_lens_divergence", "step_length"})
_NORM = "norm"  # beside step_length, not a column
# Texts are sorted by length among so many batches' tokens.
_LOOK_AHEAD = 16

Columns = dict[str, NDArray[np.float32]]


def score(
    lens: PHiModel,
    tokenizer: Any,
    texts: str | Sequence[Text],
    *,
    metrics: Sequence[str] | None = None,
    batch_tokens: int = 4096,
    window: int | None = None,
    names: Sequence[str] | None = None,
) -> list[TokenScores]:
    """Score texts token by token.

    Args:
        lens: a model with a PHi layer.
        tokenizer: its tokenizer, a fast one of transformers; used with its own settings.
        texts: a string or several; a chat is a list of messages with `role` and `content`, and goes through
            the tokenizer's own chat template.
        metrics: names of `METRICS`; docs/scoring.md says what each is. None means phi, surprisal and, with
            the layer in the path, surprisal_with_layer. Only what these need is computed: phi alone stops
            the forward pass at the layer.
        batch_tokens: tokens read at once, padding included. Scores do not depend on it.
        window: longer texts are read in overlapping windows of as many tokens; None means the model's own
            context (`max_position_embeddings`), and whole texts where it has none.
        names: one for each text, kept in its provenance and used in errors.

    Returns:
        One `TokenScores` for each text, in order.

    Raises:
        InputError: no text, or one that is empty or no text; an unknown metric, or one that this lens does
            not have; a tokenizer without offsets or of another model; a window longer than the context.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise InputError(f"texts must be a string or a list of them, not {type(texts).__name__}.")
    if not texts:
        raise InputError("There is nothing to score; give at least one text.")
    if names is not None and len(names) != len(texts):
        raise InputError(f"There are {len(texts)} texts and {len(names)} names; give one name for each text.")
    return list(
        iter_scores(
            lens, tokenizer, texts, metrics=metrics, batch_tokens=batch_tokens, window=window, names=names
        )
    )


def iter_scores(
    lens: PHiModel,
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    metrics: Sequence[str] | None = None,
    batch_tokens: int = 4096,
    window: int | None = None,
    names: Iterable[str] | None = None,
) -> Iterator[TokenScores]:
    """As `score`, for any number of texts: they are read a few batches ahead and their scores come in order.

    Raises:
        InputError: as `score`; about a text when it is reached, about anything else at once.
    """
    if not isinstance(lens, PHiModel):
        raise InputError(
            "score needs a model with a PHi layer, from philens.attach or philens.load, "
            f"not {type(lens).__name__}."
        )
    check_tokenizer(tokenizer)
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, not {batch_tokens}.")
    wanted = check_metrics(lens, metrics)
    context = context_length(lens.base, window)
    origin = provenance(lens, tokenizer, context)

    def scores() -> Iterator[TokenScores]:
        prepared = _tokenized(lens, tokenizer, texts, names)
        while ahead := _take(prepared, _LOOK_AHEAD * batch_tokens):
            columns = _read_texts(lens, [text for _, text in ahead], wanted, batch_tokens, context)
            for (name, text), found in zip(ahead, columns, strict=True):
                own = origin if name is None else {"name": name, **origin}
                yield TokenScores(text.text, text.token_ids, text.offsets, found, text.spans, own)  # pyright: ignore[reportArgumentType]

    return scores()


def check_metrics(lens: PHiModel, metrics: Sequence[str] | None) -> list[str]:
    """The metrics asked for, in the order of columns; None means those that every lens has.

    Raises:
        InputError: one that does not exist, or that this lens does not have.
    """
    observes = lens.config.mode == "observe"
    if metrics is None:
        metrics = ["phi", "surprisal"] if observes else ["phi", "surprisal", "surprisal_with_layer"]
    chosen = {metrics} if isinstance(metrics, str) else set(metrics)
    if not chosen:
        raise InputError(f"No metric was asked for; choose among {', '.join(METRICS)}.")
    for name in sorted(chosen - set(METRICS)):
        close = nearest(name, list(METRICS))
        raise InputError(
            f"There is no metric {name!r}; did you mean {close!r} (there are {', '.join(METRICS)})?"
        )
    if observes and "surprisal_with_layer" in chosen:
        raise InputError(
            'There is no surprisal_with_layer with mode="observe", where the layer is not in the path; '
            "leave it out."
        )
    needing = [name for name in METRICS if name in chosen & _OF_LAYER]
    if needing and not lens.enabled:
        raise InputError(
            f"The PHi layer is disabled and {needing[0]} needs it; enable() it or ask for other metrics."
        )
    return [name for name in METRICS if name in chosen]


def provenance(lens: PHiModel, tokenizer: Any, context: int | None = None) -> dict[str, Any]:
    """What scores are made with: base, adapter, where the layer is, precision, rules and versions.

    Args:
        lens: a model with a PHi layer.
        tokenizer: its tokenizer.
        context: tokens read at once at most; None means whole texts.
    """
    config = getattr(lens.base, "config", None)
    rule = "texts are read whole"
    if context is not None:
        rule = (
            f"texts of more than {context} tokens are read in overlapping windows of {context}, each token "
            f"scored once, after at least {(context + 1) // 2} others except in the first window"
        )
    return {
        "base": getattr(config, "_name_or_path", None) or type(lens.base).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": fingerprint(lens.base),
        "tokenizer": getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__,
        "adapter": lens.source,
        "adapter_fingerprint": fingerprint(lens.phi),
        "module_paths": list(lens.module_paths),
        "mode": lens.config.mode,
        "kl": lens.config.kl,
        "inference": lens.config.inference,
        "samples": lens.config.samples,
        "dtype": str(next(p.dtype for p in lens.base.parameters() if p.is_floating_point()))[len("torch.") :],
        "window": context,
        "window_rule": rule,
        "bos_rule": "texts begin as the tokenizer has it, chats as its template has it; so do later windows",
        "versions": {
            "philens": philens.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def _tokenized(
    lens: PHiModel, tokenizer: Any, texts: Iterable[Text], names: Iterable[str] | None
) -> Iterator[tuple[str | None, TokenizedText]]:
    """Each text with its name, in tokens that the model knows."""
    vocabulary = getattr(text_config(lens.base), "vocab_size", None)
    remaining = None if names is None else iter(names)
    for number, text in enumerate(texts):
        name = None if remaining is None else next(remaining, None)
        if remaining is not None and name is None:
            raise InputError(f"There are only {number} names; give one for each text.")
        where = name or f"texts[{number}]"
        tokens = tokenize(tokenizer, text, where)
        if vocabulary is not None and tokens.token_ids.max() >= vocabulary:
            raise InputError(
                f"{where} has token id {tokens.token_ids.max()} and the model knows {vocabulary} tokens; "
                "load the model's own tokenizer."
            )
        yield name, tokens


def _take(
    texts: Iterator[tuple[str | None, TokenizedText]], tokens: int
) -> list[tuple[str | None, TokenizedText]]:
    """The next texts, until they have as many tokens; none at the end."""
    taken = []
    while tokens > 0:
        following = list(islice(texts, 1))
        if not following:
            break
        taken += following
        tokens -= len(following[0][1].token_ids)
    return taken


def _read_texts(
    lens: PHiModel,
    texts: Sequence[TokenizedText],
    wanted: Sequence[str],
    batch_tokens: int,
    context: int | None,
) -> list[Columns]:
    """The columns of each text."""
    windows = [
        (number, window)
        for number, text in enumerate(texts)
        for window in find_windows(len(text.token_ids), context, text.leading)
    ]
    vocabulary = getattr(text_config(lens.base), "vocab_size", None) or 1
    columns: list[Columns] = [{} for _ in texts]
    with _evaluating(lens):
        for batch in _batches(windows, batch_tokens, max(1, LOGITS_AT_ONCE // vocabulary)):
            rows = [_row(texts[number], window) for number, window in batch]
            input_ids, attention_mask = _pad(rows, next(lens.base.parameters()).device)
            found = _read_batch(lens, input_ids, attention_mask, frozenset(wanted))
            for name, values in found.items():
                values = values.float().cpu().numpy()
                for row, (number, window) in zip(values, batch, strict=True):
                    if name not in columns[number]:
                        columns[number][name] = np.full(len(texts[number].token_ids), np.nan, np.float32)
                    first = window.repeated + window.scored - window.start
                    columns[number][name][window.scored : window.stop] = row[first : len(window)]
    return [_finished(found, wanted) for found in columns]


def _batches(
    windows: Sequence[tuple[int, Window]], batch_tokens: int, most_rows: int
) -> Iterator[list[tuple[int, Window]]]:
    """Windows of like length together, the longest first, so that what fits at first fits to the end."""
    ordered = sorted(windows, key=lambda item: -len(item[1]))
    while ordered:
        rows = min(max(1, batch_tokens // len(ordered[0][1])), most_rows)
        yield ordered[:rows]
        ordered = ordered[rows:]


def _row(text: TokenizedText, window: Window) -> NDArray[np.int64]:
    return np.concatenate([text.token_ids[: window.repeated], text.token_ids[window.start : window.stop]])


def _pad(rows: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(B, T) tokens, zeros on the right, and their mask: None without padding, when attention is cheaper."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.zeros(mask.shape, np.int64)
    input_ids[mask] = np.concatenate(rows)
    attention_mask = None if mask.all() else torch.from_numpy(mask.astype(np.int64)).to(device)
    return torch.from_numpy(input_ids).to(device), attention_mask


@contextmanager
def _evaluating(lens: PHiModel) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets back the mode it had."""
    modes = [(module, module.training) for module in lens.modules()]
    lens.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _read_batch(
    lens: PHiModel, input_ids: Tensor, attention_mask: Tensor | None, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Everything asked for, (B, T) each: a pass with the layer, and one of the base alone where needed."""
    found: dict[str, Tensor] = {}
    of_base = wanted & (_OF_PREDICTIONS | _OF_BLOCKS)
    # Observing, the pass with the layer is one of the untouched base.
    together = bool(of_base) and lens.config.mode == "observe" and bool(wanted & _OF_LAYER)
    logit_lens = LogitLens(lens, "settling_depth" in wanted) if wanted & _OF_BLOCKS else None
    watching = nullcontext if logit_lens is None else logit_lens.watching
    suffixes = [""] if lens.config.layers is None else [f"@{path}" for path in lens.module_paths]
    base = None
    observed: list[Tensor] = []
    if wanted & _OF_LAYER:
        with watching() if together else nullcontext():
            output = lens(
                input_ids,
                attention_mask,
                returns="states" if together or "surprisal_with_layer" in wanted else "phi",
            )
        for suffix, layer in zip(suffixes, output.layer_outputs, strict=True):
            if "phi" in wanted:
                found[f"phi{suffix}"] = layer.phi
                if layer.phi_standard_error is not None:
                    found[f"phi_standard_error{suffix}"] = layer.phi_standard_error
            if "step_length" in wanted:
                found[f"step_length{suffix}"], found[f"{_NORM}{suffix}"] = steps(layer.observed)
            if "logit_lens_divergence" in wanted:
                observed.append(layer.observed)
        if "surprisal_with_layer" in wanted:
            of_layer = predictions(output, input_ids, {"surprisal"})
            found["surprisal_with_layer"] = of_layer["surprisal"]
        base = output if together else None
        del output
    if of_base and base is None:
        with lens.disabled(), watching():
            base = lens(input_ids, attention_mask, returns="states")
    if base is not None:
        found |= predictions(base, input_ids, wanted & _OF_PREDICTIONS)
        if logit_lens is not None:
            for suffix, states in zip(suffixes, observed, strict=False):
                early = logit_lens.read(states, input_ids, attention_mask)
                found[f"logit_lens_divergence{suffix}"] = divergence(base, early, input_ids)
            if "settling_depth" in wanted:
                found["settling_depth"] = settling_depth(logit_lens, input_ids, attention_mask)
    return found


def _finished(found: Columns, wanted: Sequence[str]) -> Columns:
    """The columns in order, steps divided by the mean length of the text's hidden states.

    The first token's is left out of that mean: in many models it is hundreds of times longer.
    """
    columns = {}
    for metric in wanted:
        for name in (metric, f"{metric}_standard_error"):
            columns |= {key: values for key, values in found.items() if key.partition("@")[0] == name}
    for key, norms in found.items():
        name, at, path = key.partition("@")
        if name == _NORM and len(norms) > 1:
            step = f"step_length{at}{path}"
            columns[step] = columns[step] / np.float32(norms[1:].mean(dtype=np.float64))
    return columns
