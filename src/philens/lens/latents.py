"""Kinds of latents: how the numbers that encoder and prior give become a latent, and a divergence in nats.

A kind is all that a PHi layer asks of it, `Latent`; what it is made of is nobody else's business.
Shapes: B rows, T tokens, L latent size.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from philens.lens.config import PHiConfig
from philens.lens.divergence import contrastive_loss, gaussian_kl, official_kl


class Gaussian(NamedTuple):
    """A diagonal Gaussian at each token: mean and logvar (B, T, L), float32."""

    mean: Tensor
    logvar: Tensor

    def detach(self) -> "Gaussian":
        """The same without gradient."""
        return Gaussian(self.mean.detach(), self.logvar.detach())


class Latent(Protocol):
    """A kind of latents.

    Attributes:
        numbers: how many numbers the encoder and the prior give for each latent dimension.
        is_random: whether a latent is drawn; else it is what the encoder says.
    """

    numbers: int
    is_random: bool

    def read(self, numbers: Tensor) -> Gaussian:
        """(B, T, numbers * L), of the encoder or the prior, -> the distribution that they mean."""
        ...

    def divergence(self, posterior: Gaussian, prior: Gaussian) -> Tensor:
        """(B, T) phi in nats."""
        ...

    def contrastive(self, latent: Tensor, posterior: Gaussian, negatives: Tensor | None) -> Tensor | None:
        """(B, T) contrastive loss of latents (B, T, L) in nats, or None where there is none; negatives (B, T)
        are the tokens that may serve as such."""
        ...

    def start_wide(self, bias: Tensor, scale: float) -> None:
        """Let a fresh prior, whose last bias (numbers * L,) this is, expect latents as wide as `scale`."""
        ...


class GaussianLatent:
    """The paper's: a diagonal Gaussian; phi is its divergence from the prior's."""

    numbers = 2
    is_random = True

    def __init__(self, config: PHiConfig) -> None:
        self.range = config.logvar_min, config.logvar_max
        self.kl = gaussian_kl if config.kl == "exact" else official_kl

    def read(self, numbers: Tensor) -> Gaussian:
        """See `Latent`."""
        mean, logvar = numbers.float().chunk(2, -1)
        return Gaussian(mean, logvar.clamp(*self.range))

    def divergence(self, posterior: Gaussian, prior: Gaussian) -> Tensor:
        """See `Latent`."""
        return self.kl(*posterior, *prior)

    def contrastive(self, latent: Tensor, posterior: Gaussian, negatives: Tensor | None) -> Tensor | None:
        """See `Latent`."""
        with torch.autocast(latent.device.type, enabled=False):
            return contrastive_loss(latent, *posterior, negatives)

    def start_wide(self, bias: Tensor, scale: float) -> None:
        """See `Latent`."""
        bias[len(bias) // 2 :] = 2 * math.log(scale)


class PointLatent:
    """A point (ablation; the paper's appendix): phi is half the squared error of the prior's prediction."""

    numbers = 1
    is_random = False

    def read(self, numbers: Tensor) -> Gaussian:
        """See `Latent`."""
        return Gaussian(numbers.float(), torch.zeros_like(numbers, dtype=torch.float32))

    def divergence(self, posterior: Gaussian, prior: Gaussian) -> Tensor:
        """See `Latent`."""
        return 0.5 * (posterior.mean - prior.mean).square().sum(-1)

    def contrastive(self, latent: Tensor, posterior: Gaussian, negatives: Tensor | None) -> Tensor | None:
        """See `Latent`."""
        return None

    def start_wide(self, bias: Tensor, scale: float) -> None:
        """See `Latent`: a point has no width."""


def latent_kind(config: PHiConfig) -> Latent:
    """The kind of latents that a configuration asks for."""
    return GaussianLatent(config) if config.bottleneck else PointLatent()
