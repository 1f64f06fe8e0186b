"""Numbers that a model's precision could not hold: told, with the place where they began.

A value that is not there (the surprisal of a first token) is NaN by definition. One that the model should
have given and that is NaN or infinite is another matter: what is averaged over it would be wrong, or move.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from philens.lens.core import LensCore
from philens.lens.insertion import fields_of, find_blocks
from philens.support.errors import InputError, InsertionError

Overflow = Literal["error", "nan"]
"""What becomes of such values: an error, or NaN where they are."""


class Overflowed(Exception):
    """Raised within a forward pass, where no other pass can be made.

    Attributes:
        token_ids: (T,) of the row.
    """

    def __init__(self, token_ids: Tensor) -> None:
        super().__init__()
        self.token_ids = token_ids


def first_row(input_ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """(T,) tokens of the first of the chosen rows (B,) of (B, T), without padding on the left.

    Args:
        mask: mask of the prompts, 0 on padding; each may have become several rows.
    """
    row = int(chosen.nonzero()[0, 0])
    padded = mask[row * len(mask) // len(input_ids)] == 0
    return input_ids[row, int(padded.sum()) :]


def check_overflow(overflow: str) -> None:
    """Raise an InputError unless this is a way to treat values that overflowed."""
    if overflow not in ("error", "nan"):
        raise InputError(f"overflow must be error or nan, not {overflow!r}.")


def overflow_error(model: nn.Module, token_ids: Tensor, where: str) -> InputError:
    """What to raise about a text; finding the place takes one or two more passes over it.

    Args:
        model: a lens, or a base model alone.
        token_ids: (T,) or (1, T) tokens of which some have no finite value; no padding.
        where: what the error calls the text.
    """
    base = model.base if isinstance(model, LensCore) else model
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    origin = _origin(model, token_ids.reshape(1, -1).to(next(base.parameters()).device))
    return InputError(
        f"{where} makes the model's numbers overflow in {str(dtype).removeprefix('torch.')}, from {origin} "
        "on; load the model in a wider dtype, or keep such tokens as NaN with overflow nan."
    )


@torch.no_grad()
def _origin(model: nn.Module, input_ids: Tensor) -> str:
    """The first block, or what lies outside of blocks, after which (1, T) tokens' numbers are not finite."""
    lens = model if isinstance(model, LensCore) else None
    base: Any = model if lens is None else lens.base
    try:
        path, blocks = find_blocks(base)
        watched = {f"{path}.{number}": block for number, block in enumerate(blocks)}
    except InsertionError:
        watched = {name: module for name, module in base.named_modules() if not list(module.children())}
    begun: list[str] = []

    def entered(name: str, args: Any, kwargs: Any) -> None:
        if not _is_finite((*args[:1], kwargs.get("hidden_states"))):
            begun.append(f"what comes before {name}")

    def left(name: str, output: Any) -> None:
        if not _is_finite(output):
            begun.append(name)

    with ExitStack() as stack:
        for number, (name, module) in enumerate(watched.items()):
            if not number:
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: entered(name, args, kwargs), with_kwargs=True
                )
                stack.callback(hook.remove)
            after = module.register_forward_hook(lambda module, args, output, name=name: left(name, output))
            stack.callback(after.remove)
        if lens is None:
            logits = base(input_ids=input_ids).logits
        else:
            with lens.observing():
                output = lens(input_ids)
            logits = output.logits
            if not begun and (output.phi is not None and not _is_finite(output.phi)):
                begun.append(f"the PHi layer after {lens.module_paths[0]}")
        if not begun and not _is_finite(logits):
            begun.append("the output head")
        if not begun and lens is not None:  # only with the layer in the path
            lens(input_ids)
    return begun[0] if begun else "the PHi layer" if lens is not None else "the output head"


def _is_finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    for part in fields_of(value).values():
        yield from _tensors(part)
