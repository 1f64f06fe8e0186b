"""The PHi layer: a variational bottleneck in the main path and a learned autoregressive prior beside it.

Source: Herrmann, Csordas, Schmidhuber, "Measuring In-Context Computation Complexity via Hidden State
Prediction", ICML 2025, arXiv 2503.13431, section 2. Shapes: B rows, T tokens, D hidden size, L latent size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philens.errors import ConfigError, InputError
from philens.typed import convert


@dataclass
class PHiConfig:
    """What a PHi layer is, where it goes and how it is trained.

    Attributes:
        layer: insert after this block, counted from 0; negative counts from the end. Either this, `module` or
            `layers`.
        module: insert after the module with this path, e.g. `model.layers.19`.
        layers: insert a PHi layer after each of these blocks; needs `mode="observe"`.
        mode: `bottleneck` (the paper's) replaces hidden states by the decoded latents; `observe` leaves them
            as they are, so that the model's outputs stay exactly the base's. Phi is the same in both.
        pressure: what keeps information in the latent in training: the `next_token` loss with the layer in
            the path, or, when observing, `reconstruction` of the hidden states, for which the blocks above
            need not run.
        reconstruction_weight: weight of the reconstruction loss, the share of the hidden states' variance
            that is lost, averaged over dimensions.
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
        init_scale: with `near_identity`, how many posterior standard deviations one unit of hidden state is;
            of a calibrated layer, one standard deviation of its dimension.
        logvar_min: lower clamp of log-variances.
        logvar_max: upper clamp of log-variances.
    """

    layer: int | None = None
    module: str | None = None
    layers: list[int] | None = None
    mode: Literal["bottleneck", "observe"] = "bottleneck"
    pressure: Literal["next_token", "reconstruction"] = "next_token"
    reconstruction_weight: float = 1.0
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
            value = convert(getattr(self, field.name), field.type, field.name)
            setattr(self, field.name, value)
        for name in ("latent_size", "prior_heads", "prior_depth", "prior_mlp_size", "samples", "init_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value!r}.")
        for name in ("phi_weight", "contrastive_weight", "reconstruction_weight"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a finite number of at least 0, not {value!r}.")
        if not self.logvar_min < self.logvar_max:
            raise ConfigError("logvar_min must be below logvar_max.")
        if self.samples > 1 and self.inference != "sample":
            raise ConfigError('samples above 1 need inference="sample".')
        if sum(point is not None for point in (self.layer, self.module, self.layers)) > 1:
            raise ConfigError("Give one of layer, module and layers as the insertion point, not several.")
        if self.layers is not None and not 0 < len(set(self.layers)) == len(self.layers):
            raise ConfigError(f"layers must name at least one block, each once, not {self.layers}.")
        if self.mode == "bottleneck":
            if self.layers is not None:
                raise ConfigError('Several layers would disturb each other in the path; set mode="observe".')
            if self.pressure != "next_token":
                raise ConfigError('pressure="reconstruction" needs mode="observe".')

    def latent_width(self, hidden_size: int) -> int:
        """L for a base model of this hidden size D."""
        return self.latent_size or hidden_size


@dataclass
class PHiOutput:
    """What a PHi layer returns.

    Attributes:
        hidden_states: (B, T, D) decoded latents, which replace the base's hidden states.
        observed: (B, T, D) the base's hidden states.
        phi: (B, T) PHi loss in nats, float32, 0 on padding.
        contrastive: (B, T) contrastive loss in nats, 0 on padding; None where its weight is 0 or there
            is no bottleneck.
        latent: (B, T, L) the latents z.
        posterior_mean, posterior_logvar: (B, T, L) of q(z_t | h_t).
        prior_mean, prior_logvar: (B, T, L) of p(z_t | z_<t).
        phi_standard_error: (B, T) of phi over samples; None unless there are several.
    """

    hidden_states: Tensor
    observed: Tensor
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


class Memory(Protocol):
    """What is kept of the tokens before: the cache layers of `transformers` are this."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, C) keys and values; returns all of them so far."""
        ...

    def get_seq_length(self) -> int:
        """Tokens kept."""
        ...


class PriorAttention(nn.Module):
    """Causal self-attention within documents, (B, T, L) -> (B, T, L)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        projections = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, memory: Memory | None = None
    ) -> Tensor:
        rows, length, size = x.shape
        q, k, v = (
            project(x).view(rows, length, self.heads, size // self.heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotary(q, positions), rotary(k, positions)
        if memory is not None:
            k, v = memory.update(k, v)
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

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, memory: Memory | None = None
    ) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:], eps=1e-5), positions, mask, memory)
        return x + self.mlp(self.norm(x))


class Prior(nn.Module):
    """The autoregressive prior p(z_t | z_<t) of the latents of one document."""

    def __init__(self, size: int, out: int, config: PHiConfig) -> None:
        super().__init__()
        width = config.prior_mlp_size or 8 * round(size / 3)
        self.start = nn.Parameter(torch.zeros(1, 1, size))
        self.attention, self.depth = None, 0
        if config.prior == "attention":
            self.depth = config.prior_depth
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

    def forward(
        self,
        z: Tensor,
        starts: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        memories: Sequence[Memory] = (),
    ) -> Tensor:
        """(B, T, L) latents, (B, T) document starts -> (B, T, out) what earlier latents predict of each.

        With `memories`, one for the latents and one for each attention layer, goes on from the tokens before.
        """
        before = torch.roll(z, 1, dims=1)
        latents, *attentions = memories or (None,)
        if latents is not None:
            kept, _ = latents.update(z[:, None], z[:, None, :, :0])
            if kept.shape[2] > z.shape[1]:
                before = kept[:, 0, -z.shape[1] - 1 : -1]
        x = torch.where(starts[..., None], self.start.to(z.dtype), before)
        if self.attention is not None:
            x = F.rms_norm(x, x.shape[-1:], eps=1e-5)
            *inner, last = attentions or [None] * self.depth
            for block, memory in zip(getattr(self, "blocks", ()), inner, strict=True):
                x = block(x, positions, mask, memory)
                x = F.rms_norm(x, x.shape[-1:], eps=1e-5)
            x = x + self.attention(x, positions, mask, last)
        return self.mlp(self.norm(x))


class PHiLayer(nn.Module):
    """Prediction of Hidden states: encoder, autoregressive prior, decoder.

    Args:
        hidden_size: D of the base model.
        config: options; the insertion point and the loss weights are used by `philens.attach`, not here.

    Attributes:
        shift, scale: (D,), fixed: the encoder reads (h - shift) / scale, and the decoder's output is taken
            back by them. 0 and 1 unless `calibrate` set them.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, config: PHiConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PHiConfig()
        self.hidden_size = hidden_size
        self.latent_size = size = config.latent_width(hidden_size)
        statistics = 2 if config.bottleneck else 1
        self.encoder = nn.Linear(hidden_size, statistics * size, bias=False)
        self.decoder = nn.Linear(size, hidden_size, bias=False)
        self.prior = None if config.prior == "unit" else Prior(size, statistics * size, config)
        self.register_buffer("shift", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
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

    @property
    def memory_count(self) -> int:
        """How many `Memory` objects going on from earlier tokens takes: latents, and one per attention."""
        return 0 if self.prior is None else 1 + self.prior.depth

    def encode(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> mean and log-variance (B, T, L) of q(z_t | h_t), float32."""
        weight = self.encoder.weight
        return self._statistics(self.encoder((hidden_states.to(weight.dtype) - self.shift) / self.scale))

    def decode(self, latent: Tensor) -> Tensor:
        """(B, T, L) -> (B, T, D) a(z_t)."""
        return self.decoder(latent.to(self.decoder.weight.dtype)) * self.scale + self.shift

    @torch.no_grad()
    def calibrate(self, mean: Tensor, deviation: Tensor) -> None:
        """Let the encoder see every dimension with mean 0 and standard deviation 1, and the decoder undo it.

        Models differ by orders of magnitude in the size of their hidden states, and in how much larger a few
        dimensions are than the rest; without this, so would the steps that the layer's training takes.

        Args:
            mean, deviation: (D,) of the base's hidden states.
        """
        self.shift.copy_(mean)
        # A dimension that never changes tells nothing, and must not be blown up.
        self.scale.copy_(deviation.clamp(min=1e-3 * float(deviation.median())).clamp(min=1e-6))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.bottleneck:
            return x.float(), torch.zeros_like(x, dtype=torch.float32)
        mean, logvar = x.float().chunk(2, -1)
        return mean, logvar.clamp(self.config.logvar_min, self.config.logvar_max)

    def _predict(
        self,
        z: Tensor,
        starts: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        memories: Sequence[Memory] = (),
    ) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            return torch.zeros_like(z), torch.zeros_like(z)
        z = z.to(self.decoder.weight.dtype)
        return self._statistics(self.prior(z, starts, positions, mask, memories))

    def _divergence(self, mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
        if self.config.detach_targets:
            mean_q, logvar_q = mean_q.detach(), logvar_q.detach()
        if not self.config.bottleneck:
            return 0.5 * (mean_q - mean_p).square().sum(-1)
        kl = gaussian_kl if self.config.kl == "exact" else official_kl
        return kl(mean_q, logvar_q, mean_p, logvar_p)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        memories: Sequence[Memory] = (),
    ) -> PHiOutput:
        """Encode, predict, decode.

        Args:
            hidden_states: (B, T, D), any floating dtype; the decoded ones come back in the same.
            attention_mask: (B, T), 0 on padding, which may be on either side; with memories (B, earlier + T).
            document_ids: (B, T) integers of at least 0 that change where a new document starts in a pack.
            memories: `memory_count` of them, empty or those that an earlier call filled: the tokens then go
                on from the earlier ones. Each row is one document.

        Raises:
            InputError: shapes that do not fit.
        """
        earlier = memories[0].get_seq_length() if memories else 0
        self._check(hidden_states, attention_mask, document_ids, memories, earlier)
        structure = document_structure(hidden_states, attention_mask, document_ids, earlier)
        starts, positions, mask, padding = structure
        mean_q, logvar_q = self.encode(hidden_states.detach() if self.config.detach_input else hidden_states)
        sampled = self.config.bottleneck and (self.training or self.config.inference == "sample")
        draws = self.config.samples if sampled and not self.training else 1

        def draw() -> Tensor:
            return mean_q + torch.exp(0.5 * logvar_q) * torch.randn_like(mean_q) if sampled else mean_q

        z = draw()
        mean_p, logvar_p = self._predict(z, starts, positions, mask, memories)
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
            hidden_states=self.decode(z).to(hidden_states.dtype),
            observed=hidden_states,
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
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        memories: Sequence[Memory],
        earlier: int,
    ) -> None:
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise InputError(
                f"Hidden states must have shape (B, T, {self.hidden_size}), not {tuple(hidden_states.shape)}."
            )
        rows, length = hidden_states.shape[:2]
        if rows == 0 or length == 0:
            raise InputError("There is no token to read: give at least one document of at least one token.")
        for name, value, width in (
            ("attention_mask", attention_mask, earlier + length),
            ("document_ids", document_ids, length),
        ):
            if value is not None and value.shape != (rows, width):
                raise InputError(
                    f"{name} must have shape {(rows, width)} like the tokens, not {tuple(value.shape)}."
                )
        if memories and len(memories) != self.memory_count:
            raise InputError(f"The prior needs {self.memory_count} memories, not {len(memories)}.")
        if memories and (document_ids is not None or self.config.samples > 1):
            raise InputError("Going on from earlier tokens takes one document in a row and one sample.")


def document_structure(
    hidden_states: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, earlier: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Where documents start, each token's position in its own, who may attend to whom, and what is padding.

    Args:
        hidden_states: (B, T, D).
        attention_mask: (B, earlier + T), 0 on padding.
        document_ids: (B, T); None where each row is one document.
        earlier: tokens read before, of the same documents.

    Returns:
        starts (B, T) bool, positions (B, T), attention mask (B, 1, T, earlier + T) bool or None if plainly
        causal, padding (B, T) bool or None.
    """
    rows, length = hidden_states.shape[:2]
    index = torch.arange(earlier + length, device=hidden_states.device)[None]
    if attention_mask is None and document_ids is None and not earlier:
        return (index == 0).expand(rows, length), index, None, None
    padding = None if attention_mask is None else attention_mask == 0
    documents = torch.zeros_like(index).expand(rows, -1) if document_ids is None else document_ids
    if padding is not None:
        documents = documents.masked_fill(padding, -1)
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    starts = torch.cat((first, documents[:, 1:] != documents[:, :-1]), 1)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    starts, positions = starts[:, earlier:], positions[:, earlier:]
    # Documents are contiguous, so a token may look back exactly as far as its own document's start.
    distance = index[0][earlier:, None] - index[0][None, :]
    mask = (distance >= 0) & (distance <= positions[..., None])
    return starts, positions, mask[:, None], None if padding is None else padding[:, earlier:]
