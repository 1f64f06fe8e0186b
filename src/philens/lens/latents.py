"""Kinds of latents: how the numbers that encoder and prior give become a latent, and a divergence in nats.

A kind is all that a PHi layer asks of it, `Latent`; what it is made of is nobody else's business.
Shapes: B rows, T tokens, L latent size, Q codebooks of K codes.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philens.lens.config import PHiConfig
from philens.lens.divergence import contrastive_loss, gaussian_kl, official_kl

# A code is drawn by exp(-SHARPNESS |state - code|^2 / mean |code|^2): of two codes at a right angle, a state
# on one of them takes the other with e^-16.
SHARPNESS = 8.0


class Latent(Protocol):
    """A kind of latents.

    Attributes:
        numbers: how many numbers the encoder and the prior give for each latent dimension.
        is_random: whether a latent can be drawn; else it is what the encoder says.
        width: how wide latents are at first, with `init="near_identity"`.
        weights: weights of the losses that it has beside phi, by name.
    """

    numbers: int
    is_random: bool
    width: float
    weights: dict[str, float]

    def read(self, numbers: Tensor, drawn: bool) -> tuple[Any, Tensor]:
        """What the encoder tells by (B, T, numbers * L): the posterior, and the latent (B, T, L), which is
        drawn from it, or else its likeliest."""
        ...

    def expect(self, numbers: Tensor | None, posterior: Any) -> Any:
        """The prior that (B, T, numbers * L) mean, of which `posterior` came; None is the fixed one."""
        ...

    def divergence(self, posterior: Any, prior: Any) -> Tensor:
        """(B, T) phi in nats."""
        ...

    def losses(self, latent: Tensor, posterior: Any, padding: Tensor | None) -> dict[str, Tensor]:
        """What it learns by beside phi, (B, T) each by the names of `weights`; padding (B, T) is not read."""
        ...

    def untold(self, posterior: Any) -> Tensor:
        """(B, T) phi in nats by the fixed prior: what there would be to tell if nothing were predicted."""
        ...

    def carried(self, posterior: Any, counted: Tensor) -> Tensor:
        """How much latents can tell of hidden states, over the counted tokens (B, T): nats per token."""
        ...

    def start_wide(self, bias: Tensor) -> None:
        """Let a fresh prior, whose last bias (numbers * L,) this is, expect latents of `width`."""
        ...


class Gaussian(NamedTuple):
    """A diagonal Gaussian at each token: mean and logvar (B, T, L), float32."""

    mean: Tensor
    logvar: Tensor

    def detach(self) -> "Gaussian":
        return Gaussian(self.mean.detach(), self.logvar.detach())


class GaussianLatent:
    """The paper's: a diagonal Gaussian; phi is its divergence from the prior's."""

    numbers = 2
    is_random = True

    def __init__(self, config: PHiConfig) -> None:
        self.config, self.width = config, config.init_scale
        self.weights = {"contrastive": config.contrastive_weight}

    def _gaussian(self, numbers: Tensor) -> Gaussian:
        mean, logvar = numbers.float().chunk(2, -1)
        return Gaussian(mean, logvar.clamp(self.config.logvar_min, self.config.logvar_max))

    def read(self, numbers: Tensor, drawn: bool) -> tuple[Gaussian, Tensor]:
        told = mean, logvar = self._gaussian(numbers)
        return told, torch.addcmul(mean, torch.exp(0.5 * logvar), torch.randn_like(mean)) if drawn else mean

    def expect(self, numbers: Tensor | None, posterior: Gaussian) -> Gaussian:
        if numbers is not None:
            return self._gaussian(numbers)
        zero = torch.zeros_like(posterior.mean)
        return Gaussian(zero, zero)

    def divergence(self, posterior: Gaussian, prior: Gaussian) -> Tensor:
        return (gaussian_kl if self.config.kl == "exact" else official_kl)(*posterior, *prior)

    def losses(self, latent: Tensor, posterior: Gaussian, padding: Tensor | None) -> dict[str, Tensor]:
        if not self.weights["contrastive"]:
            return {}
        # The released code lets padding serve as negatives; a row's padding should not matter.
        negatives = None if padding is None or self.config.kl == "official" else ~padding
        with torch.autocast(latent.device.type, enabled=False):
            return {"contrastive": contrastive_loss(latent, *posterior, negatives)}

    def untold(self, posterior: Gaussian) -> Tensor:
        """See `Latent`: the divergence from N(0, 1)."""
        return gaussian_kl(*posterior, *self.expect(None, posterior))

    @torch.no_grad()
    def carried(self, posterior: Gaussian, counted: Tensor) -> Tensor:
        """See `Latent`: the capacity of Gaussian channels with the variance of means as signal and the mean
        variance of posteriors as noise."""
        # To pick the tokens would wait for the device.
        weights, count = counted[..., None].float(), counted.sum()
        center = (posterior.mean * weights).sum((0, 1)) / count
        signal, noise = (posterior.mean - center).square(), posterior.logvar.exp()
        return 0.5 * torch.log1p((signal * weights).sum((0, 1)) / (noise * weights).sum((0, 1))).sum()

    def start_wide(self, bias: Tensor) -> None:
        bias[len(bias) // 2 :] = 2 * math.log(self.width)


class PointLatent(GaussianLatent):
    """A point (ablation; the paper's appendix), in the form of a Gaussian of variance 1: phi is half the
    squared error of the prior's prediction."""

    numbers = 1
    is_random = False

    def __init__(self, config: PHiConfig) -> None:
        super().__init__(config)
        self.weights = {"contrastive": 0.0}

    def _gaussian(self, numbers: Tensor) -> Gaussian:
        return Gaussian(numbers.float(), torch.zeros_like(numbers, dtype=torch.float32))

    def divergence(self, posterior: Gaussian, prior: Gaussian) -> Tensor:
        return 0.5 * (posterior.mean - prior.mean).square().sum(-1)

    def start_wide(self, bias: Tensor) -> None:
        """See `Latent`: a point has no width."""


class Codes(NamedTuple):
    """Codes of each token, the coarsest first.

    Attributes:
        index: (B, T, Q) the codes.
        weights: (B, T, Q, K) how likely each was, given those before it: where none is drawn, 1 for the code.
        rest: (B, T, Q, L) what was left for each to tell.
        chosen: (B, T, Q, L) what each tells of it.
    """

    index: Tensor
    weights: Tensor
    rest: Tensor
    chosen: Tensor

    def detach(self) -> "Codes":
        return Codes(*(value.detach() for value in self))


class Expected(NamedTuple):
    """(B, T, Q, K) log-probabilities of each code, given the earlier tokens' and those before it."""

    logprobs: Tensor

    def detach(self) -> "Expected":
        return Expected(self.logprobs.detach())


class CodeLatent(nn.Module):
    """Codes by residual quantisation: each codebook tells what those before it have left of the encoder's
    vector, whose length over features is 1. The latent is the sum of the codes' vectors, and phi the length
    in nats of the codes in a code that the prior makes: the sum over codebooks of -ln p(code | codes of
    earlier tokens, those before it).

    Where codes are drawn (in training), phi is an unbiased estimate of its mean over them: exact in each
    code, given those that were drawn before it. Otherwise they are the nearest, which are the likeliest.

    The latent's gradient goes straight through to the encoder. A codebook learns from what its codes were to
    tell; codes that no token of a pass has are drawn to the nearest that was there to tell, so that none
    stays dead. That is a loss like the others: it is resumed, and shared among processes, as they are.

    Args:
        size: L.
    """

    numbers = 1
    is_random = True
    width = 1.0

    def __init__(self, size: int, config: PHiConfig) -> None:
        super().__init__()
        self.weights = {"commitment": config.commitment_weight, "codebook": 1.0}
        shape = books, codes, _ = config.codebooks, config.codes, size
        # A fresh codebook tells about half of the length that is there.
        halves = 0.5 ** torch.arange(1, books + 1)[:, None, None]
        self.vectors = nn.Parameter(halves * torch.randn(shape) / math.sqrt(size))
        self.predicts = config.prior != "unit"
        if self.predicts:
            self.outputs = nn.Parameter(0.02 * torch.randn(shape))
            self.bias = nn.Parameter(torch.zeros(books, codes))
            if books > 1:
                self.before = nn.Parameter(0.02 * torch.randn(books - 1, codes, size))

    def read(self, numbers: Tensor, drawn: bool) -> tuple[Codes, Tensor]:
        index, weights, rests, chosen = [], [], [], []
        with torch.autocast(numbers.device.type, enabled=False):
            point = rest = F.normalize(numbers.float(), dim=-1)
            for vectors in self.vectors.float():
                squares = vectors.square().sum(-1)
                scale = SHARPNESS / squares.detach().mean().clamp(min=1e-12)
                logits = scale * (2 * rest @ vectors.T - squares)
                if drawn:
                    # Gumbel's trick: the largest after such noise is a draw.
                    code = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
                    weights.append(logits.softmax(-1))
                else:
                    code = logits.argmax(-1)
                    weights.append(F.one_hot(code, len(vectors)) + 0 * logits)  # what is no number stays so
                index.append(code)
                rests.append(rest)
                chosen.append(F.embedding(code, vectors))
                rest = rest - chosen[-1].detach()
            total = torch.stack(chosen).detach().sum(0)
            latent = math.sqrt(point.shape[-1]) * (total + (point - point.detach()))
        return Codes(*(torch.stack(x, 2) for x in (index, weights, rests, chosen))), latent

    def latent(self, index: Tensor) -> Tensor:
        """(..., Q) codes -> (..., L) the latent that they are."""
        chosen = [F.embedding(code, book) for code, book in zip(index.unbind(-1), self.vectors, strict=True)]
        return math.sqrt(self.vectors.shape[-1]) * torch.stack(chosen).float().sum(0)

    def expect(self, numbers: Tensor | None, posterior: Codes) -> Expected:
        return Expected(self.logprobs(numbers, posterior.index))

    def logprobs(self, numbers: Tensor | None, index: Tensor) -> Tensor:
        """(..., Q, K) log-probabilities of codes, given the prior's numbers (..., L) for each token and its
        codes (..., Q), of which each is foretold from those before it alone."""
        if not self.predicts or numbers is None:
            books, codes, _ = self.vectors.shape
            shape = (*index.shape[:-1], books, codes)
            return index.new_full(shape, -math.log(codes), dtype=torch.float32)  # pyright: ignore[reportCallIssue]
        found = []
        with torch.autocast(numbers.device.type, enabled=False):
            state = numbers.float()
            for book, (outputs, bias) in enumerate(zip(self.outputs, self.bias, strict=True)):
                if book:
                    state = state + F.embedding(index[..., book - 1], self.before[book - 1]).float()
                read = F.silu(F.rms_norm(state, state.shape[-1:], eps=1e-5))
                found.append(F.linear(read, outputs.float(), bias.float()).log_softmax(-1))
        return torch.stack(found, -2)

    def divergence(self, posterior: Codes, prior: Expected) -> Tensor:
        return -(posterior.weights * prior.logprobs).sum((-1, -2))

    def losses(self, latent: Tensor, posterior: Codes, padding: Tensor | None) -> dict[str, Tensor]:
        """See `Latent`: the squared length of what codes miss, as the encoder's fault and as theirs."""
        rest, chosen = posterior.rest, posterior.chosen
        commitment = (rest - chosen.detach()).square().sum(-1)
        codebook = (rest.detach() - chosen).square().sum((-1, -2))
        idle = self._idle(commitment.detach(), posterior.index, padding)
        return {"commitment": commitment.sum(-1), "codebook": codebook + idle}

    def _idle(self, missed: Tensor, index: Tensor, padding: Tensor | None) -> Tensor:
        """Mean squared distance of codes that no token has from those that miss most of theirs, each from
        another: they come to share its tokens. `missed` (B, T, Q) of codes (B, T, Q)."""
        vectors, index = self.vectors.float(), index.flatten(0, 1).T
        with torch.no_grad():
            read = (
                torch.ones_like(missed) if padding is None else ~padding[..., None] * torch.ones_like(missed)
            )
            none = torch.zeros_like(vectors[..., 0])
            idle = none.scatter_add(1, index, read.flatten(0, 1).T) == 0
            most = none.scatter_add(1, index, (missed * read).flatten(0, 1).T).argsort(1, descending=True)
            rank = (idle.cumsum(1) - 1).clamp(min=0) % (~idle).sum(1, keepdim=True).clamp(min=1)
            to = vectors.gather(1, most.gather(1, rank)[..., None].expand_as(vectors))
        return ((vectors - to).square().sum(-1) * idle).mean()

    def untold(self, posterior: Codes) -> Tensor:
        """See `Latent`: all codes are as likely."""
        return self.divergence(posterior, self.expect(None, posterior))

    @torch.no_grad()
    def carried(self, posterior: Codes, counted: Tensor) -> Tensor:
        """See `Latent`: for each codebook, what codes tell of the tokens that were read: entropy of the codes
        in use, less that of each token's. Its exponential is how many codes are in use."""
        weights = posterior.weights * (counted[..., None, None] / counted.sum())
        noise = torch.special.entr(posterior.weights) * (counted[..., None, None] / counted.sum())
        return torch.special.entr(weights.sum((0, 1))).sum() - noise.sum()

    def start_wide(self, bias: Tensor) -> None:
        """See `Latent`: codes have no width."""


def latent_kind(config: PHiConfig) -> Latent:
    """The kind of latents that a configuration without codebooks asks for."""
    return GaussianLatent(config) if config.bottleneck else PointLatent(config)
