"""What a forward pass returns, and the losses made of it. Shapes: B rows, T tokens, V vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from philens.lens.instrument import Instrument
from philens.lens.layer import PHiOutput
from philens.lens.passing import Reading
from philens.support.columns import column_name
from philens.support.errors import InputError

# Logits in float32 that training holds at once where they are made in parts: 128 MiB.
LOGITS_AT_ONCE = 2**25
# Of two distributions compared, at once: few enough to stay in a processor's cache.
COMPARED_AT_ONCE = 2**23
# Where they are only read, those of as many positions are made at once: few enough for memory and a
# processor's cache, enough for a product at full speed; of more, where the vocabulary is small.
POSITIONS_AT_ONCE, LOGITS_READ_AT_ONCE = 256, 2**21


@dataclass
class PHiModelOutput:
    """What a `PHiModel` returns.

    Attributes:
        loss: scalar, what is trained: for each layer the loss that keeps information in its latent
            (next-token cross-entropy with the layer in the path, the divergence from the base's distribution,
            or reconstruction) + phi_weight * phi / L +
            contrastive_weight * contrastive loss (phi itself with `reduction="sum"`), each averaged over the
            tokens that carry a label. None without labels.
        logits: (B, T, V): with the layer in the path (`mode="bottleneck"`), or the base's own. None unless
            asked for by `returns="logits"`.
        phi: (B, T) PHi loss in nats, float32, 0 on padding; (B, T, N) with N `layers`. None while disabled.
        parts: what `losses` has, not detached.
        layer_outputs: everything each layer computed; empty while disabled.
        cache: where one was asked for; `past_key_values` is another name of it.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    phi: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    layer_outputs: list[PHiOutput] = field(default_factory=list)
    cache: Any = None
    head: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    head_states: Tensor | None = field(default=None, repr=False)
    shallow: Callable[[], "PHiModelOutput"] | None = field(default=None, repr=False)
    attention_mask: Tensor | None = field(default=None, repr=False)

    @property
    def losses(self) -> dict[str, Tensor]:
        """Means over labelled tokens, detached: `surprisal` (with the layer in the path), `surprisal_base`
        (observing, or with the pressure distill), `divergence` of the distribution with the layer in the path
        from the base's, `phi`, all in nats per token; `contrastive`, `reconstruction`; of a shallow head its
        divergence `mtd` and its next-token loss `surprisal_shallow`.

        With several layers, each name but `surprisal_base` is followed by `@` and the insertion point.
        """
        # Detached here, as a compiled pass that returns one tensor as the loss and, detached, as a part of it
        # leaves the loss without a gradient (torch 2.13).
        return {name: value.detach() for name, value in self.parts.items()}

    @property
    def past_key_values(self) -> Any:
        """The cache, as transformers called it before 5.24."""
        return self.cache

    @property
    @torch.no_grad()
    def mtd(self) -> Tensor | None:
        """(B, T) multiple-token divergence in nats, float32, 0 on padding, made in parts when asked for; None
        without a shallow head, whose own predictions are those of `shallow()`."""
        if self.shallow is None:
            return None
        states = self.head_states if self.logits is None else self.logits
        assert states is not None
        rows, length = states.shape[:2]
        places = torch.arange(rows * length, device=states.device)
        found = divergence(self, self.shallow(), places).view(rows, length)
        mask = self.attention_mask
        return found if mask is None else found.masked_fill(mask[:, -length:] == 0, 0.0)

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

    Logits that were not made yet are made in parts.
    """
    count = predicted.sum().clamp(min=1)
    # The last position predicts nothing; so no states need to be copied.
    targets = F.pad(labels[:, 1:].masked_fill(~predicted, -100), (0, 1), value=-100).flatten()
    if result.logits is not None:
        return F.cross_entropy(result.logits.flatten(0, 1).float(), targets, reduction="sum") / count
    head, states = result.head, result.head_states
    if head is None or states is None:
        raise InputError('There are no logits after returns="phi"; leave out labels.')
    return head_cross_entropy(states.flatten(0, 1), head, targets) / count


def head_cross_entropy(states: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed, of what an output head makes of (N, D) states and (N,) targets, -100 on
    those that do not count. Logits are made in parts, in the forward pass only where the head is linear."""
    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]  # pyright: ignore[reportFunctionMemberAccess]
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    gradients = torch.is_grad_enabled()
    if type(head) is nn.Linear:
        return _LinearCrossEntropy.apply(states, head.weight, head.bias, targets, size, gradients)  # pyright: ignore[reportReturnType]

    def part(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    total = states.new_zeros((), dtype=torch.float32)
    for some in zip(states.split(size), targets.split(size), strict=True):
        recomputed = gradients and states.requires_grad
        total = total + (checkpoint(part, *some, use_reentrant=False) if recomputed else part(*some))  # pyright: ignore[reportOperatorIssue]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are known as soon as a part's logits are: nothing of their size is kept or made again."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        size: int,
        gradients: bool,
    ) -> Tensor:
        needed = ctx.needs_input_grad if gradients else (False, False, False)
        of_states = torch.empty_like(states) if needed[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), size):
            some = slice(start, start + size)
            made = F.linear(states[some], weight, bias)
            logits, target = made.float(), targets[some]
            counted = target != -100
            place = torch.where(counted, target, 0)[:, None]
            sums = logits.logsumexp(-1, keepdim=True)
            total += ((sums - logits.gather(1, place))[:, 0] * counted).sum()
            if not any(needed):
                continue
            # Softmax minus one at the target: the gradient of the logits.
            change = torch.sub(logits, sums).exp_()
            change.scatter_add_(1, place, torch.full_like(sums, -1.0)).mul_(counted[:, None])
            change = change.to(made.dtype)
            if of_states is not None:
                of_states[some] = (change @ weight.to(made.dtype)).to(of_states.dtype)
            if of_weight is not None:
                of_weight += change.mT @ states[some].to(made.dtype)
            if of_bias is not None:
                of_bias += change.sum(0)
        ctx.save_for_backward(of_states, of_weight, of_bias)
        ctx.kinds = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kinds = (None, *ctx.kinds)
        scaled = (
            None if x is None else (x * grads[0]).to(kind or x.dtype)
            for x, kind in zip(ctx.saved_tensors, kinds, strict=True)
        )
        return *scaled, None, None, None


class Divergence(NamedTuple):
    """How next-token distributions differ from the untouched base's, means in nats.

    Attributes:
        divergence: (n,) KL(base || with the layer) of each of n layers.
        surprisal: (n,) with each layer in the path.
        surprisal_base: () of the base.
    """

    divergence: Tensor
    surprisal: Tensor
    surprisal_base: Tensor


def divergence_from(
    untouched: PHiModelOutput,
    passes: Sequence[PHiModelOutput],
    labels: Tensor,
    predicted: Tensor,
    joint: bool = False,
) -> Divergence:
    """Means over the predicted tokens (B, T - 1); logits that were not made yet are made in parts.

    No gradient reaches the base's own distribution, which is what instruments are to keep, unless `joint`.
    """
    mask, targets = F.pad(predicted, (0, 1)).flatten(), F.pad(labels[:, 1:], (0, 1)).flatten()
    whole = untouched.logits is not None or any(one.logits is not None for one in passes)
    states = [_before_comparison(one, whole).flatten(0, 1) for one in (untouched, *passes)]
    if mask.device.type == "cpu":  # elsewhere one would have to wait to see which
        places = mask.nonzero()[:, 0]
        mask, targets, states = mask[places], targets[places], [one[places] for one in states]
    head: Any = nn.Identity() if whole else untouched.head
    frozen = type(head) is nn.Linear and not any(weight.requires_grad for weight in head.parameters())
    if frozen and not joint:
        sums = _LinearComparison.apply(
            head.weight, head.bias, targets, mask, torch.is_grad_enabled(), *states
        )
    else:
        sums = states[0].new_zeros(2 * len(passes) + 1, dtype=torch.float32)
        size = max(1, COMPARED_AT_ONCE // (states[0].shape[-1] if whole else len(head.weight)))
        for some in _stretches_of(len(mask), size):
            inputs = [head, targets[some], mask[some], joint, *(one[some] for one in states)]
            sums = sums + checkpoint(_compare, *inputs, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
    found = sums / predicted.sum().clamp(min=1)  # pyright: ignore[reportOperatorIssue]
    return Divergence(found[: len(passes)], found[len(passes) : -1], found[-1])


def _stretches_of(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _before_comparison(one: PHiModelOutput, whole: bool) -> Tensor:
    """What the output head reads, or its logits where one of the passes has those alone."""
    if one.logits is not None:
        return one.logits
    if one.head is None or one.head_states is None:
        raise InputError('There are no logits after returns="phi"; leave out labels.')
    return one.head(one.head_states) if whole else one.head_states


def _compare(head: Any, targets: Tensor, mask: Tensor, joint: bool, base: Tensor, *states: Tensor) -> Tensor:
    """Sums over (N,) positions: of n passes' divergences, of their surprisals, of the base's: (2 n + 1,)."""
    with torch.set_grad_enabled(joint and torch.is_grad_enabled()):
        own = F.log_softmax(head(base).float(), -1)
    others = [F.log_softmax(head(one).float(), -1) for one in states]
    losses = [(own.exp() * (own - one)).sum(-1) for one in others]
    losses += [F.nll_loss(one, targets, reduction="none") for one in (*others, own)]
    return (torch.stack(losses) * mask).sum(-1)


class _LinearComparison(torch.autograd.Function):
    """`_compare` in parts, for a head that is linear and frozen; as in `_LinearCrossEntropy`, gradients are
    known as soon as a part's logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mask: Tensor,
        gradients: bool,
        base: Tensor,
        *states: Tensor,
    ) -> Tensor:
        needed = [gradients and needs for needs in ctx.needs_input_grad[6:]]
        grads = [torch.empty_like(one) if needs else None for one, needs in zip(states, needed, strict=True)]
        sums = base.new_zeros(2 * len(states) + 1, dtype=torch.float32)
        for some in _stretches_of(len(targets), max(1, COMPARED_AT_ONCE // len(weight))):
            place, counted = targets[some, None].clamp(min=0), mask[some]
            own = F.log_softmax(F.linear(base[some], weight, bias).float(), -1)
            sums[-1] -= (own.gather(1, place)[:, 0] * counted).sum()
            likely = own.exp()
            for number, one in enumerate(states):
                other = F.log_softmax(F.linear(one[some], weight, bias).float(), -1)
                sums[len(states) + number] -= (other.gather(1, place)[:, 0] * counted).sum()
                sums[number] += ((own - other).mul_(likely).sum(-1) * counted).sum()
                if (grad := grads[number]) is not None:
                    # The divergence's gradient of the logits: this distribution minus the base's.
                    change = other.exp_().sub_(likely).mul_(counted[:, None]).to(weight.dtype)
                    grad[some] = (change @ weight).to(grad.dtype)
        ctx.save_for_backward(*grads)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Of the sums only the divergences are trained by.
        of_states = (
            None if grad is None else (grad * grads[0][number]).to(grad.dtype)
            for number, grad in enumerate(ctx.saved_tensors)
        )
        return None, None, None, None, None, None, *of_states


def token_surprisal(result: PHiModelOutput, input_ids: Tensor) -> Tensor:
    """(B, T) surprisal of each token in nats, float32, NaN on the first; logits are made in parts."""
    rows, length = input_ids.shape
    before = torch.arange(rows * length, device=input_ids.device).view(rows, length)[:, :-1].flatten()
    targets = input_ids[:, 1:].flatten()
    parts = [
        F.cross_entropy(logits, targets[part], reduction="none")
        for part, logits in logits_in_parts(result, before)
    ]
    surprisal = torch.cat(parts).view(rows, length - 1) if parts else input_ids.new_empty(rows, 0).float()
    return F.pad(surprisal, (1, 0), value=torch.nan)


def logits_in_parts(output: PHiModelOutput, places: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The float32 logits (n, V) of some of the B * T positions, `places` (N,), a part of N at a time.

    Raises:
        InputError: the forward pass stopped below the output head.
    """
    whole = output.head_states if output.logits is None else output.logits
    if whole is None or (output.logits is None and output.head is None):
        raise InputError('There are no logits after returns="phi"; ask for returns="states".')
    start, size = 0, POSITIONS_AT_ONCE
    while start < len(places):
        part = slice(start, start + size)
        rows = whole.flatten(0, 1)[places[part]]
        logits = (rows if output.logits is not None or output.head is None else output.head(rows)).float()
        yield part, logits
        start, size = start + size, max(size, LOGITS_READ_AT_ONCE // logits.shape[1])


def divergence(final: PHiModelOutput, early: PHiModelOutput, places: Tensor) -> Tensor:
    """(N,) KL(final || early) in nats of the distributions made at some of the B * T positions."""
    parts = []
    for (_, some), (_, others) in zip(
        logits_in_parts(final, places), logits_in_parts(early, places), strict=True
    ):
        p, q = some.log_softmax(-1), others.log_softmax(-1)
        probability = p.exp()
        # A token that is impossible in both adds nothing.
        parts.append((probability * (p - q)).masked_fill(probability == 0, 0).sum(-1).clamp(min=0))
    return torch.cat(parts)


def add_losses(
    result: PHiModelOutput,
    labels: Tensor,
    counted: Tensor,
    predicted: Tensor,
    outputs: Sequence[Reading],
    passes: Sequence[PHiModelOutput | None],
    untouched: PHiModelOutput | None,
    instruments: Sequence[Instrument],
    weight_scale: Tensor,
    points: Sequence[str | None],
    joint: bool = False,
) -> None:
    """Set `loss` and `parts`.

    Args:
        labels, predicted: (b, T) and (b, T - 1), as of `counted_tokens`; of the rows of `passes`.
        counted: (B, T), likewise, of all rows.
        outputs: outputs of the instruments; none while they are disabled.
        passes: for each instrument the pass with it in the path, None where there is none; without any, the
            base's.
        untouched: the base's own pass, if there was one beside these.
        weight_scale: scalar that multiplies the weights of phi and the contrastive loss.
        points: what the parts of each instrument are named after.
        joint: the base is trained, too, with its shallow head: by its next-token loss and by the divergence.
    """
    parts: dict[str, Tensor] = {}
    total = torch.zeros((), device=labels.device)
    for instrument, output, point in zip(instruments, outputs, points, strict=False):
        terms = instrument.losses(output, counted, weight_scale)
        parts |= {column_name(term.name, point): term.value for term in terms}
        if terms:
            total = total + reduce(add, (term.weight * term.value for term in terms))
    through = [one for one in zip(instruments, points, passes, strict=False) if one[2] is not None]
    compared = [one for one in through if outputs and one[0].config.pressure == "distill"]
    if compared:
        assert untouched is not None
        found = divergence_from(untouched, [one for *_, one in compared], labels, predicted, joint)  # pyright: ignore[reportArgumentType]
        parts["surprisal_base"] = found.surprisal_base
        if joint:
            total = total + found.surprisal_base
        for number, (instrument, point, _) in enumerate(compared):
            parts[column_name(instrument.surprisal, point)] = found.surprisal[number].detach()
            parts[column_name(instrument.divergence, point)] = found.divergence[number]
            total = total + found.divergence[number]
    elif untouched is not None:
        with torch.no_grad():
            parts["surprisal_base"] = mean_surprisal(untouched, labels, predicted)
    for instrument, point, one in through:
        if outputs and instrument.config.pressure == "distill":
            continue
        name = column_name("surprisal", point if outputs else None)
        surprisal = parts[name] = mean_surprisal(one, labels, predicted)  # pyright: ignore[reportArgumentType]
        if instrument.config.pressure == "next_token":
            total = total + surprisal
    result.loss = total
    result.parts = parts
