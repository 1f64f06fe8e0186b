"""The two losses of a PHi layer: phi, a KL divergence, and the contrastive loss against collapse.

Both work on a stretch of tokens at a time, so that what lies between input and result stays in a processor's
cache, and keep nothing but their inputs for the backward pass. Shapes: B rows, T tokens, L latent size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Numbers of the latents that are worked on at once: 1 MiB of float32 on a CPU, 64 MiB elsewhere.
AT_ONCE_CPU, AT_ONCE = 2**18, 2**24


def _stretches(count: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` places with so many numbers each; a compiled program plans its own memory."""
    at_once = AT_ONCE_CPU if device.type == "cpu" else AT_ONCE
    step = count if torch.compiler.is_compiling() else max(1, at_once // numbers)
    return (slice(start, start + step) for start in range(0, count, step))


def gaussian_kl(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, summed over the last dimension: (..., L) -> (...)."""
    inputs = torch.broadcast_tensors(mean_q, logvar_q, mean_p, logvar_p)
    return _GaussianKL.apply(*(x.reshape(-1, x.shape[-1]) for x in inputs)).view(inputs[0].shape[:-1])  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


class _GaussianKL(torch.autograd.Function):
    """`gaussian_kl` of (N, L)."""

    @staticmethod
    def forward(ctx: Any, mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
        ctx.save_for_backward(mean_q, logvar_q, mean_p, logvar_p)
        kl = mean_q.new_empty(len(mean_q))
        for some in _stretches(len(mean_q), mean_q.shape[1], mean_q.device):
            difference = logvar_q[some] - logvar_p[some]
            squared = (mean_q[some] - mean_p[some]).square() * torch.exp(-logvar_p[some])
            # expm1 keeps small divergences: exp(x) - 1 - x loses every digit near 0.
            kl[some] = 0.5 * (torch.expm1(difference) - difference + squared).sum(-1)
        return kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        mean_q, logvar_q, mean_p, logvar_p = ctx.saved_tensors
        results = tuple(torch.empty_like(x) for x in ctx.saved_tensors)
        for some in _stretches(len(mean_q), mean_q.shape[1], mean_q.device):
            grad = grads[0][some, None]
            distance = mean_q[some] - mean_p[some]
            pull = distance * torch.exp(-logvar_p[some])
            spread = torch.expm1(logvar_q[some] - logvar_p[some])
            results[0][some] = grad * pull
            results[1][some] = 0.5 * grad * spread
            results[2][some] = -grad * pull
            results[3][some] = -0.5 * grad * (spread + distance * pull)
        return results


def official_kl(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    """The released code's formula, summed over the last dimension: (..., L) -> (...). Not a KL.

    It reads log-variances as log standard deviations and divides the squared error by the posterior's
    variance; the released code averages it over dimensions, so divide by L to compare.
    """
    difference = logvar_p - logvar_q
    squared = (mean_p - mean_q).square() * torch.exp(-logvar_q)
    return (difference + 0.5 * (torch.exp(-2 * difference) + squared - 1)).sum(-1)


def contrastive_loss(z: Tensor, mean: Tensor, logvar: Tensor, negatives: Tensor | None = None) -> Tensor:
    """InfoNCE on latents: does a row's posterior find its own latent among those of all rows?

    Source: the "self-critic" loss of the paper's code. The log-density of row b's latent under row c's
    posterior is a quadratic form, so two batched matrix products give all pairs, a stretch of T at a time.

    Args:
        z: (B, T, L) latents, float32.
        mean: (B, T, L) of the posterior, float32.
        logvar: (B, T, L) of the posterior, float32.
        negatives: (B, T) bool, latents that may serve as negatives; None means all.

    Returns:
        (B, T) in nats.
    """
    return _Contrastive.apply(z, mean, logvar, negatives)  # pyright: ignore[reportReturnType]


class _Contrastive(torch.autograd.Function):
    """`contrastive_loss`; keeps its inputs only, and makes the scores once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, logvar: Tensor, negatives: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, mean, logvar, negatives)
        loss = z.new_empty(z.shape[:2])
        for places in _stretches(z.shape[1], z[:, 0].numel(), z.device):
            *_, scores = _pair_scores(places, z, mean, logvar, negatives)
            loss[:, places] = (scores.logsumexp(1) - scores.diagonal(dim1=1, dim2=2)).T
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, logvar, negatives = ctx.saved_tensors
        of_z, of_mean, of_logvar = torch.empty_like(z), torch.empty_like(mean), torch.empty_like(logvar)
        for places in _stretches(z.shape[1], z[:, 0].numel(), z.device):
            latents, means, precision, scores = _pair_scores(places, z, mean, logvar, negatives)
            of_scores = scores.softmax(1)
            of_scores.diagonal(dim1=1, dim2=2).sub_(1)
            of_scores *= grads[0][:, places].T[:, None, :]
            of_means = of_scores.mT @ latents
            of_precision = means * of_means - 0.5 * of_scores.mT @ latents.square()
            of_z[:, places] = (of_scores @ (means * precision) - latents * (of_scores @ precision)).transpose(
                0, 1
            )
            of_mean[:, places] = (precision * of_means).transpose(0, 1)
            of_logvar[:, places] = (-precision * of_precision).transpose(0, 1)
        return of_z, of_mean, of_logvar, None


def _pair_scores(
    places: slice, z: Tensor, mean: Tensor, logvar: Tensor, negatives: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, means and precisions (t, B, L) of a stretch, centred, and the log-density (t, b, c) of row b's
    latent under row c's posterior, but for what depends on c alone, which cancels in the softmax over b."""
    z, mean, logvar = (x[:, places].transpose(0, 1) for x in (z, mean, logvar))
    center = mean.mean(1, keepdim=True)  # any shift is exact; this one spares float32 its digits
    z, mean, precision = z - center, mean - center, torch.exp(-logvar)
    scores = z @ (mean * precision).mT - 0.5 * z.square() @ precision.mT
    if negatives is not None:
        own = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
        scores = scores.masked_fill(~(negatives[:, places].T[:, :, None] | own), -torch.inf)
    return z, mean, precision, scores
