"""What a forward pass returns, and the losses made of it. Shapes: B rows, T tokens, V vocabulary."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from philens.errors import InputError
from philens.layer import PHiOutput

# Logits in float32 that are held at once where they are made in parts: 128 MiB.
LOGITS_AT_ONCE = 2**25


@dataclass
class PHiModelOutput:
    """What a `PHiModel` returns.

    Attributes:
        loss: scalar, what is trained: for each layer the loss that keeps information in its latent
            (next-token cross-entropy with the layer in the path, or reconstruction) + phi_weight * phi / L +
            contrastive_weight * contrastive loss (phi itself with `reduction="sum"`), each averaged over the
            tokens that carry a label. None without labels.
        logits: (B, T, V): with the layer in the path (`mode="bottleneck"`), or the base's own. None unless
            asked for by `returns="logits"`.
        phi: (B, T) PHi loss in nats, float32, 0 on padding; (B, T, N) with N `layers`. None while disabled.
        losses: means over labelled tokens, detached: `surprisal` (with the layer in the path),
            `surprisal_base` (observing only), `phi`, all in nats per token; `contrastive`, `reconstruction`.
            With several layers, each name but `surprisal_base` is followed by `@` and the insertion point.
        layer_outputs: everything each layer computed; empty while disabled.
        past_key_values: the cache, where one was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    phi: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    layer_outputs: list[PHiOutput] = field(default_factory=list)
    past_key_values: Any = None
    head: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    head_states: Tensor | None = field(default=None, repr=False)

    def logits_at(self, positions: slice) -> Tensor:
        """(B, t, V) float32 logits of some positions of T, made when asked for.

        Raises:
            InputError: the forward pass stopped below the output head.
        """
        if self.logits is not None:
            return self.logits[:, positions].float()
        if self.head is None or self.head_states is None:
            raise InputError('There are no logits after returns="phi"; ask for returns="states".')
        return self.head(self.head_states[:, positions]).float()


def counted_tokens(
    labels: Tensor, attention_mask: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which tokens (B, T) carry a label, and which of those but the first (B, T - 1) are predicted from the
    token before: not across documents, and not from padding."""
    counted = labels != -100
    if attention_mask is not None:
        counted = counted & (attention_mask != 0)
    predicted = counted[:, 1:]
    if documents is not None:
        predicted = predicted & (documents[:, 1:] == documents[:, :-1])
    elif attention_mask is not None:
        predicted = predicted & (attention_mask[:, :-1] != 0)
    return counted, predicted


def mean_surprisal(result: PHiModelOutput, labels: Tensor, predicted: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over the predicted tokens (B, T - 1); 0 where there are none.

    Logits that were not made yet are made in parts, and once more in the backward pass.
    """
    count = predicted.sum().clamp(min=1)
    if result.logits is not None:
        targets = labels[:, 1:].masked_fill(~predicted, -100)
        logits = result.logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="sum") / count
    head, states = result.head, result.head_states
    if head is None or states is None:
        raise InputError('There are no logits after returns="phi"; leave out labels.')
    states, targets = states[:, :-1][predicted], labels[:, 1:][predicted]

    def part(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    total = states.new_zeros((), dtype=torch.float32)
    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]  # pyright: ignore[reportFunctionMemberAccess]
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, len(targets), size):
        one = states[start : start + size], targets[start : start + size]
        recomputed = torch.is_grad_enabled() and states.requires_grad
        total = total + (checkpoint(part, *one, use_reentrant=False) if recomputed else part(*one))  # pyright: ignore[reportOperatorIssue]
    return total / count


def token_surprisal(result: PHiModelOutput, input_ids: Tensor) -> Tensor:
    """(B, T) surprisal of each token in nats, float32, NaN on the first; logits are made in parts."""
    parts = [torch.full_like(input_ids[:, :1], torch.nan, dtype=torch.float32)]
    for places, logits in logits_in_parts(result, input_ids.shape[1] - 1):
        following = input_ids[:, places.start + 1 : places.stop + 1]
        parts.append(F.cross_entropy(logits.transpose(1, 2), following, reduction="none"))
    return torch.cat(parts, 1)


def logits_in_parts(result: PHiModelOutput, length: int) -> Iterator[tuple[slice, Tensor]]:
    """The float32 logits (B, t, V) of the first `length` positions, as many at once as memory should hold."""
    place = 0
    size = 1  # the vocabulary's size is known once one position's logits are
    while place < length:
        places = slice(place, min(place + size, length))
        logits = result.logits_at(places)
        yield places, logits
        place = places.stop
        size = max(1, LOGITS_AT_ONCE // (logits.shape[0] * logits.shape[2]))


def lost_variance(output: PHiOutput, counted: Tensor) -> Tensor:
    """Share of the hidden states' variance that the decoded latents miss, averaged over dimensions.

    Every dimension counts alike, however large a model lets a few of them grow.
    """
    target = output.observed[counted].float()
    missed = (output.hidden_states[counted].float() - target).square().mean(0)
    return (missed / target.var(0, correction=0).clamp(min=1e-8)).mean()
