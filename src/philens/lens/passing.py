"""One forward pass of a base with instruments in it: what lives while it runs, and what losses need of it.

Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from philens.lens.config import InstrumentConfig
from philens.lens.insertion import fields_of, with_fields
from philens.lens.prior import Memory


class Reading(Protocol):
    """What an instrument found in a pass.

    Attributes:
        hidden_states: (B, T, D) that it makes, from which the base can go on.
        observed: (B, T, D) the base's hidden states in the same place.
    """

    hidden_states: Tensor
    observed: Tensor


class Term(NamedTuple):
    """A part of an instrument's loss: its mean over the tokens that count, and its weight."""

    name: str
    value: Tensor
    weight: Tensor | float


@dataclass
class Pass:
    """What the instruments know of the pass that they are in, and what they found.

    Attributes:
        input_ids: (B, T).
        embed: makes of these (B, T, D), as the base does.
        attention_mask: (B, T), 0 on padding; with a cache (B, earlier + T).
        documents: (B, T) which document of a pack each token is of; None where each row is one.
        memories: for each instrument, what it kept of earlier tokens; empty without a cache.
        stop: end the pass when the first so many instruments have run; 0 runs it to its end.
        contrastive: compute the contrastive loss.
        joint: the base is trained by what it lets a shallow head read, too.
        replaced: an instrument's number and the states (B, T, D) that go on from its place: none runs.
        outputs: what the instruments that ran found, by number.
    """

    input_ids: Tensor | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    attention_mask: Tensor | None = None
    documents: Tensor | None = None
    memories: Sequence[Sequence[Memory]] = ()
    stop: int = 0
    contrastive: bool = False
    joint: bool = False
    replaced: tuple[int, Tensor] | None = None
    outputs: dict[int, Any] = field(default_factory=dict)


class Rows:
    """Some rows of a batch, or all of them.

    Args:
        chosen: their numbers; None means all.
        shape: shape of the batch's token ids, (B, T).
    """

    def __init__(self, chosen: Tensor | None, shape: Sequence[int]) -> None:
        self.chosen, self.shape = chosen, tuple(shape)

    def take(self, value: Tensor) -> Tensor:
        """(B, ...) -> (b, ...)."""
        return value if self.chosen is None else value[self.chosen]

    def of(self, value: Any) -> Any:
        """These rows of every tensor in `value` that has them, (B, ..., T, ...); others, such as positions
        (T,) that rows share, stay whole."""
        if isinstance(value, Tensor):
            rows, length = self.shape
            return self.take(value) if value.shape[:1] == (rows,) and length in value.shape[1:] else value
        parts = fields_of(value)
        return with_fields(value, {name: self.of(part) for name, part in parts.items()}) if parts else value


class Pressing(NamedTuple):
    """What presses on what instruments make in a pass; by default nothing does.

    Attributes:
        rows: which press.
        apart: the base goes on from its own states; an instrument is in the path only in a pass of its own.
        again: such passes are made: from the instruments on, or from the start where those are at no blocks.
        part: only some rows press, or none does: the pass of all rows ends at the deepest instrument.
    """

    rows: Rows
    apart: bool = False
    again: bool = False
    part: bool = False


def plan_pressing(
    configs: Sequence[InstrumentConfig], observing: bool, training: bool, returns: str, input_ids: Tensor
) -> Pressing:
    """How a pass over (B, T) tokens with labels presses on what instruments make.

    Args:
        observing: the instruments leave hidden states as they are.
        training: the model is in training mode: fewer rows may press than are read. Which is drawn anew.
        returns: as of `PHiModel.forward`; only with `states` may logits of some rows be missing.
    """
    apart, chosen = observing or any(config.pressure == "distill" for config in configs), None
    shares = [0.0 if one.pressure == "reconstruction" else one.pressure_share for one in configs]
    if training and returns == "states" and max(shares) < 1:
        if not max(shares):
            chosen = input_ids.new_empty(0)
        else:
            count = max(1, round(max(shares) * len(input_ids)))
            chosen = torch.randperm(len(input_ids))[:count].to(input_ids.device)
    some, part = chosen is None or len(chosen) > 0, chosen is not None
    return Pressing(Rows(chosen, input_ids.shape), apart, some and (apart or part), part)
