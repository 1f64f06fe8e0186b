"""The PHi layer: a variational bottleneck in the main path and a learned autoregressive prior beside it.

Source: Herrmann, Csordas, Schmidhuber, "Measuring In-Context Computation Complexity via Hidden State
Prediction", ICML 2025, arXiv 2503.13431, section 2. Shapes: B rows, T tokens, D hidden size, L latent size.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philens.errors import ConfigError, InputError


@dataclass
class PHiConfig:
    """What a PHi layer is, where it goes and how it is trained.

    Attributes:
        layer: insert after this block, counted from 0; negative counts from the end. Either this or `module`.
        module: insert after the module with this path, e.g. `model.layers.19`.
        latent_size: L, the number of latent dimensions; None means the hidden size D.
        prior: `attention` (causal self-attention over earlier latents, then an MLP), `mlp` (only the latent
            just before), or `unit` (a fixed unit Gaussian; ablation).
        prior_heads: attention heads of the prior; None means one for every 64 latent dimensions.
        prior_depth: attention layers of the prior; those before the last are whole Transformer blocks.
        prior_mlp_size: width of the prior's SwiGLU MLP; None means 8/3 of the latent size.
        bottleneck: False makes the latent deterministic and phi half the squared error of the prior's
            prediction (ablation; the paper's appendix).
        kl: `exact` is KL(q || p) of diagonal Gaussians; `official` is the formula of the released code.
        reduction: in the training loss, phi enters as its `mean` or its `sum` over latent dimensions.
        phi_weight: weight of phi in the training loss.
        contrastive_weight: weight of the contrastive loss in the training loss; 0 leaves it out.
        detach_input: no gradient from the layer to the blocks below it.
        detach_targets: no gradient from phi to the posterior it predicts.
        inference: outside training, the latent is the posterior's `mean` or a `sample` of it.
        samples: with `inference="sample"`, phi is the mean over this many samples.
        init: `near_identity` leaves the model's loss almost unchanged at first (needs L >= D); `random`.
        init_scale: with `near_identity`, how many posterior standard deviations one unit of hidden state is.
        logvar_min: lower clamp of log-variances.
        logvar_max: upper clamp of log-variances.
    """

    layer: int | None = None
    module: str | None = None
    latent_size: int | None = None
    prior: Literal["attention", "mlp", "unit"] = "attention"
    prior_heads: int | None = None
    prior_depth: int = 1
    prior_mlp_size: int | None = None
    bottleneck: bool = True
    kl: Literal["exact", "official"] = "exact"
    reduction: Literal["mean", "sum"] = "mean"
    phi_weight: float = 1.0
    contrastive_weight: float = 0.1
    detach_input: bool = False
    detach_targets: bool = False
    inference: Literal["mean", "sample"] = "mean"
    samples: int = 1
    init: Literal["near_identity", "random"] = "near_identity"
    init_scale: float = 8.0
    logvar_min: float = -5.0
    logvar_max: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    choices = ", ".join(map(repr, get_args(kind)))
                    raise ConfigError(f"{field.name} must be one of {choices}, not {value!r}.")
            elif not isinstance(value, int | float if kind is float else kind):  # pyright: ignore[reportArgumentType]
                expected = kind.__name__ if isinstance(kind, type) else kind
                raise ConfigError(f"{field.name} must be of type {expected}, not {value!r}.")
        for name in ("latent_size", "prior_heads", "prior_depth", "prior_mlp_size", "samples", "init_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value!r}.")
        for name in ("phi_weight", "contrastive_weight"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a finite number of at least 0, not {value!r}.")
        if not self.logvar_min < self.logvar_max:
            raise ConfigError("logvar_min must be below logvar_max.")
        if self.samples > 1 and self.inference != "sample":
            raise ConfigError('samples above 1 need inference="sample".')
        if self.layer is not None and self.module is not None:
            raise ConfigError("Give either layer or module as the insertion point, not both.")

    def latent_width(self, hidden_size: int) -> int:
        """L for a base model of this hidden size D."""
        return self.latent_size or hidden_size


@dataclass
class PHiOutput:
    """What a PHi layer returns.

    Attributes:
        hidden_states: (B, T, D) decoded latents, which replace the base's hidden states.
        phi: (B, T) PHi loss in nats, float32, 0 on padding.
        contrastive: (B, T) contrastive loss in nats, 0 on padding; None where its weight is 0 or there
            is no bottleneck.
        latent: (B, T, L) the latents z.
        posterior_mean, posterior_logvar: (B, T, L) of q(z_t | h_t).
        prior_mean, prior_logvar: (B, T, L) of p(z_t | z_<t).
        phi_standard_error: (B, T) of phi over samples; None unless there are several.
    """

    hidden_states: Tensor
    phi: Tensor
    contrastive: Tensor | None
    latent: Tensor
    posterior_mean: Tensor
    posterior_logvar: Tensor
    prior_mean: Tensor
    prior_logvar: Tensor
    phi_standard_error: Tensor | None = None


def gaussian_kl(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, summed over the last dimension: (..., L) -> (...)."""
    difference = logvar_q - logvar_p
    squared = (mean_q - mean_p).square() * torch.exp(-logvar_p)
    # expm1 keeps small divergences: exp(x) - 1 - x loses every digit near 0.
    return 0.5 * (torch.expm1(difference) - difference + squared).sum(-1)


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
    posterior is a quadratic form, so two batched matrix products give all pairs in O(T B^2) memory.

    Args:
        z, mean, logvar: (B, T, L), float32.
        negatives: (B, T) bool, latents that may serve as negatives; None means all.

    Returns:
        (B, T) in nats.
    """
    rows = z.shape[0]
    center = mean.mean(0, keepdim=True).detach()  # any shift is exact; this one spares float32 its digits
    z, mean = (z - center).transpose(0, 1), (mean - center).transpose(0, 1)  # (T, B, L)
    precision = torch.exp(-logvar).transpose(0, 1)
    # Terms that depend only on c cancel in the softmax over b.
    scores = z @ (mean * precision).mT - 0.5 * z.square() @ precision.mT  # (T, b, c)
    if negatives is not None:
        own = torch.eye(rows, dtype=torch.bool, device=z.device)
        scores = scores.masked_fill(~(negatives.T[:, :, None] | own), -torch.inf)
    return (scores.logsumexp(1) - scores.diagonal(dim1=1, dim2=2)).T


def rotary(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of (B, H, T, C) at positions (B or 1, T)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class PriorAttention(nn.Module):
    """Causal self-attention within documents, (B, T, L) -> (B, T, L)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        projections = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, size = x.shape
        q, k, v = (
            project(x).view(rows, length, self.heads, size // self.heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotary(q, positions), rotary(k, positions)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, size))


class SwiGLU(nn.Module):
    """Gated MLP with biases, (..., size) -> (..., out)."""

    def __init__(self, size: int, width: int, out: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, width), nn.Linear(size, width)
        self.down_proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PriorBlock(nn.Module):
    """One more Transformer block of a deeper prior."""

    def __init__(self, size: int, heads: int, width: int) -> None:
        super().__init__()
        self.attention = PriorAttention(size, heads)
        self.norm = nn.RMSNorm(size, eps=1e-5)
        self.mlp = SwiGLU(size, width, size)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:], eps=1e-5), positions, mask)
        return x + self.mlp(self.norm(x))


class Prior(nn.Module):
    """The autoregressive prior p(z_t | z_<t) of the latents of one document."""

    def __init__(self, size: int, out: int, config: PHiConfig) -> None:
        super().__init__()
        width = config.prior_mlp_size or 8 * round(size / 3)
        self.start = nn.Parameter(torch.zeros(1, 1, size))
        self.attention = None
        if config.prior == "attention":
            heads = config.prior_heads or max(1, size // 64)
            if size % (2 * heads):
                raise ConfigError(
                    f"latent_size {size} must be a multiple of twice the prior's {heads} heads; "
                    "set prior_heads."
                )
            if config.prior_depth > 1:
                blocks = (PriorBlock(size, heads, width) for _ in range(config.prior_depth - 1))
                self.blocks = nn.ModuleList(blocks)
            self.attention = PriorAttention(size, heads)
        self.norm = nn.RMSNorm(size, eps=1e-5)
        self.mlp = SwiGLU(size, width, out)
        nn.init.normal_(self.start, std=0.02)

    def forward(self, z: Tensor, starts: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, L) latents, (B, T) document starts -> (B, T, out) what earlier latents predict of each."""
        x = torch.where(starts[..., None], self.start.to(z.dtype), torch.roll(z, 1, dims=1))
        if self.attention is not None:
            x = F.rms_norm(x, x.shape[-1:], eps=1e-5)
            for block in getattr(self, "blocks", ()):
                x = block(x, positions, mask)
                x = F.rms_norm(x, x.shape[-1:], eps=1e-5)
            x = x + self.attention(x, positions, mask)
        return self.mlp(self.norm(x))


class PHiLayer(nn.Module):
    """Prediction of Hidden states: encoder, autoregressive prior, decoder.

    Args:
        hidden_size: D of the base model.
        config: options; the insertion point and the loss weights are used by `philens.attach`, not here.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(self, hidden_size: int, config: PHiConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PHiConfig()
        self.hidden_size = hidden_size
        self.latent_size = size = config.latent_width(hidden_size)
        statistics = 2 if config.bottleneck else 1
        self.encoder = nn.Linear(hidden_size, statistics * size, bias=False)
        self.decoder = nn.Linear(size, hidden_size, bias=False)
        self.prior = None if config.prior == "unit" else Prior(size, statistics * size, config)
        if config.init == "near_identity":
            self._init_near_identity()

    @torch.no_grad()
    def _init_near_identity(self) -> None:
        size, scale = self.latent_size, self.config.init_scale
        if size < self.hidden_size:
            raise ConfigError(
                f'init="near_identity" needs a latent_size of at least the hidden size {self.hidden_size}, '
                f'not {size}; use init="random".'
            )
        nn.init.zeros_(self.encoder.weight)
        nn.init.eye_(self.encoder.weight[:size]).mul_(scale)
        nn.init.eye_(self.decoder.weight).div_(scale)
        if self.prior is not None and self.config.bottleneck:
            # A prior as wide as the latents: phi starts at hundreds of nats, not tens of thousands.
            self.prior.mlp.down_proj.bias[size:] = 2 * math.log(scale)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.bottleneck:
            return x.float(), torch.zeros_like(x, dtype=torch.float32)
        mean, logvar = x.float().chunk(2, -1)
        return mean, logvar.clamp(self.config.logvar_min, self.config.logvar_max)

    def _predict(
        self, z: Tensor, starts: Tensor, positions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            return torch.zeros_like(z), torch.zeros_like(z)
        return self._statistics(self.prior(z.to(self.decoder.weight.dtype), starts, positions, mask))

    def _divergence(self, mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
        if self.config.detach_targets:
            mean_q, logvar_q = mean_q.detach(), logvar_q.detach()
        if not self.config.bottleneck:
            return 0.5 * (mean_q - mean_p).square().sum(-1)
        kl = gaussian_kl if self.config.kl == "exact" else official_kl
        return kl(mean_q, logvar_q, mean_p, logvar_p)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> PHiOutput:
        """Encode, predict, decode.

        Args:
            hidden_states: (B, T, D), any floating dtype; the decoded ones come back in the same.
            attention_mask: (B, T), 0 on padding, which may be on either side.
            document_ids: (B, T) integers of at least 0 that change where a new document starts in a pack.

        Raises:
            InputError: shapes that do not fit.
        """
        self._check(hidden_states, attention_mask, document_ids)
        starts, positions, mask, padding = document_structure(hidden_states, attention_mask, document_ids)
        h = hidden_states.detach() if self.config.detach_input else hidden_states
        mean_q, logvar_q = self._statistics(self.encoder(h.to(self.encoder.weight.dtype)))
        sampled = self.config.bottleneck and (self.training or self.config.inference == "sample")
        draws = self.config.samples if sampled and not self.training else 1

        def draw() -> Tensor:
            return mean_q + torch.exp(0.5 * logvar_q) * torch.randn_like(mean_q) if sampled else mean_q

        z = draw()
        mean_p, logvar_p = self._predict(z, starts, positions, mask)
        phi, error = self._divergence(mean_q, logvar_q, mean_p, logvar_p), None
        if draws > 1:
            others = [
                self._divergence(mean_q, logvar_q, *self._predict(draw(), starts, positions, mask))
                for _ in range(draws - 1)
            ]
            every = torch.stack([phi, *others])
            phi, error = every.mean(0), every.std(0) / math.sqrt(draws)
        contrastive = None
        if self.config.contrastive_weight > 0 and self.config.bottleneck:
            # The released code lets padding serve as negatives; a row's padding should not matter.
            negatives = None if padding is None or self.config.kl == "official" else ~padding
            with torch.autocast(hidden_states.device.type, enabled=False):
                contrastive = contrastive_loss(z, mean_q, logvar_q, negatives)
        if padding is not None:
            phi = phi.masked_fill(padding, 0.0)
            error = None if error is None else error.masked_fill(padding, 0.0)
            contrastive = None if contrastive is None else contrastive.masked_fill(padding, 0.0)
        return PHiOutput(
            hidden_states=self.decoder(z.to(self.decoder.weight.dtype)).to(hidden_states.dtype),
            phi=phi,
            contrastive=contrastive,
            latent=z,
            posterior_mean=mean_q,
            posterior_logvar=logvar_q,
            prior_mean=mean_p,
            prior_logvar=logvar_p,
            phi_standard_error=error,
        )

    def _check(
        self, hidden_states: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
    ) -> None:
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise InputError(
                f"Hidden states must have shape (B, T, {self.hidden_size}), not {tuple(hidden_states.shape)}."
            )
        if hidden_states.shape[0] == 0 or hidden_states.shape[1] == 0:
            raise InputError("There is no token to read: give at least one document of at least one token.")
        for name, value in (("attention_mask", attention_mask), ("document_ids", document_ids)):
            if value is not None and value.shape != hidden_states.shape[:2]:
                raise InputError(
                    f"{name} must have shape {tuple(hidden_states.shape[:2])} like the tokens, "
                    f"not {tuple(value.shape)}."
                )


def document_structure(
    hidden_states: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Where documents start, each token's position in its own, who may attend to whom, and what is padding.

    Returns:
        starts (B, T) bool, positions (B, T), attention mask (B, 1, T, T) bool or None if plainly causal,
        padding (B, T) bool or None.
    """
    rows, length = hidden_states.shape[:2]
    index = torch.arange(length, device=hidden_states.device)[None]
    if attention_mask is None and document_ids is None:
        return (index == 0).expand(rows, length), index, None, None
    padding = None if attention_mask is None else attention_mask == 0
    documents = torch.zeros_like(index).expand(rows, length) if document_ids is None else document_ids
    if padding is not None:
        documents = documents.masked_fill(padding, -1)
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    starts = torch.cat((first, documents[:, 1:] != documents[:, :-1]), 1)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    # Documents are contiguous, so a token may look back exactly as far as its own document's start.
    distance = index[0][:, None] - index[0][None, :]
    mask = (distance >= 0) & (distance <= positions[..., None])
    return starts, positions, mask[:, None], padding
