"""Texts longer than a model's context: overlapping windows in which each token is scored once."""

from dataclasses import dataclass

from torch import nn

from philens.bases.facts import text_config
from philens.support.errors import InputError


@dataclass(frozen=True)
class Window:
    """What is read at once: a text's first `repeated` tokens again, then tokens `start` to `stop`.

    Those from `scored` on are scored here; the ones before are their context.
    """

    start: int
    stop: int
    scored: int
    repeated: int

    def __len__(self) -> int:
        return self.repeated + self.stop - self.start


def context_length(base: nn.Module, window: int | None = None) -> int | None:
    """How many tokens are read at once: `window`, or else the model's own limit; None if it has none.

    Raises:
        InputError: a window above the model's limit, or below 2.
    """
    limit = getattr(text_config(base), "max_position_embeddings", None)
    if window is None:
        return limit
    if limit is not None and window > limit:
        raise InputError(
            f"A window of {window} tokens is longer than the model's context of {limit}; "
            "choose a shorter one or leave it out."
        )
    if window < 2:
        raise InputError(f"A window of {window} leaves a token no context; choose at least 2 tokens.")
    return window


def find_windows(length: int, context: int | None, leading: int) -> list[Window]:
    """Windows of at most `context` tokens over a text of `length`.

    Of the first window every token is scored. Each later one begins with the text's first `leading` tokens
    again (BOS and the like), and a token scored in it has at least half of `context` before it.

    Raises:
        InputError: the context is too short for that.
    """
    if context is None or length <= context:
        return [Window(0, length, 0, 0)]
    half = (context + 1) // 2
    if half <= leading:
        raise InputError(
            f"A window of {context} tokens is too short beside the {leading} special tokens at the text's "
            f"start; choose at least {2 * leading + 1}."
        )
    windows, done = [Window(0, context, 0, 0)], context
    while done < length:
        start = done - half + leading
        stop = min(length, start + context - leading)
        windows.append(Window(start, stop, done, leading))
        done = stop
    return windows
