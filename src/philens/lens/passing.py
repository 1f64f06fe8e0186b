"""One forward pass of a base with layers in it: what lives while it runs, and what it must run for losses.

Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from philens.lens.config import PHiConfig
from philens.lens.insertion import parts_of, with_parts
from philens.lens.layer import PHiOutput
from philens.lens.prior import Memory


@dataclass
class Pass:
    """What the layers know of the pass that they are in, and what they found.

    Attributes:
        attention_mask: (B, T), 0 on padding; with a cache (B, earlier + T).
        documents: (B, T) which document of a pack each token is of; None where each row is one.
        memories: for each layer, what its prior kept of earlier tokens; empty without a cache.
        stop: end the pass at the deepest layer.
        contrastive: compute the contrastive loss.
        replaced: a layer's number and the states (B, T, D) that go on from its place: no layer runs.
        outputs: of the layers that ran, by number.
    """

    attention_mask: Tensor | None = None
    documents: Tensor | None = None
    memories: Sequence[Sequence[Memory]] = ()
    stop: bool = False
    contrastive: bool = False
    replaced: tuple[int, Tensor] | None = None
    outputs: dict[int, PHiOutput] = field(default_factory=dict)


class Rows:
    """Some rows of a batch, or all of them.

    Args:
        chosen: their numbers; None means all.
        shape: of the batch's token ids, (B, T).
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
        parts = parts_of(value)
        return with_parts(value, {name: self.of(part) for name, part in parts.items()}) if parts else value


class Pressing(NamedTuple):
    """What presses on the latents in a pass; by default nothing does.

    Attributes:
        rows: which press.
        apart: the base goes on from its own states; a layer is in the path only in a pass of its own.
        again: such passes are made: from the layers on, or from the start where those are no blocks.
        part: only some rows press, or none does: the pass of all rows ends at the deepest layer.
    """

    rows: Rows
    apart: bool = False
    again: bool = False
    part: bool = False


def plan_pressing(
    config: PHiConfig, observing: bool, training: bool, returns: str, input_ids: Tensor
) -> Pressing:
    """How a pass over (B, T) tokens with labels keeps information in the latents.

    Args:
        observing: the layers leave hidden states as they are.
        training: the model is in training mode: fewer rows may press than are read. Which is drawn anew.
        returns: as of `PHiModel.forward`; only with `states` may logits of some rows be missing.
    """
    apart, chosen = observing or config.pressure == "distill", None
    if training and returns == "states":
        if config.pressure == "reconstruction":
            chosen = input_ids.new_empty(0)
        elif config.pressure_share < 1:
            count = max(1, round(config.pressure_share * len(input_ids)))
            chosen = torch.randperm(len(input_ids))[:count].to(input_ids.device)
    some, part = chosen is None or len(chosen) > 0, chosen is not None
    return Pressing(Rows(chosen, input_ids.shape), apart, some and (apart or part), part)
