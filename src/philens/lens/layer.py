"""The PHi layer: a variational bottleneck in the main path and a learned autoregressive prior beside it.

Source: Herrmann, Csordas, Schmidhuber, "Measuring In-Context Computation Complexity via Hidden State
Prediction", ICML 2025, arXiv 2503.13431, section 2. Shapes: B rows, T tokens, D hidden size, L latent size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from philens.lens.attention import Documents
from philens.lens.divergence import contrastive_loss, gaussian_kl, official_kl
from philens.lens.prior import Attend, Memory, Prior
from philens.support.errors import ConfigError, InputError
from philens.support.typed import convert

# A token is an attention sink if its hidden state is so many times as long as the median. In Llama-shaped
# models sinks' are 100 times as long, and the longest others 1.5 times.
SINK = 4.0


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
            the path; `distill`, the divergence of the next-token distribution with the layer in the path from
            the base's own, which teaches the base nothing new; or, when observing, `reconstruction` of the
            hidden states, for which the blocks above need not run.
        pressure_share: of the rows of a training pass, the share whose next-token distributions press: the
            blocks above run for these alone, drawn anew for each pass, at least one.
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
    pressure: Literal["next_token", "distill", "reconstruction"] = "next_token"
    pressure_share: float = 1.0
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
        if not 0 < self.pressure_share <= 1:
            raise ConfigError(f"pressure_share must be above 0 and at most 1, not {self.pressure_share!r}.")
        if not -100 <= self.logvar_min < self.logvar_max <= 100:  # a variance in float32 has 88 at most
            raise ConfigError(
                "logvar_min must be below logvar_max, and both between -100 and 100, not "
                f"{self.logvar_min:g} and {self.logvar_max:g}."
            )
        if self.samples > 1 and self.inference != "sample":
            raise ConfigError('samples above 1 need inference="sample".')
        if sum(point is not None for point in (self.layer, self.module, self.layers)) > 1:
            raise ConfigError("Give one of layer, module and layers as the insertion point, not several.")
        if self.layers is not None and not 0 < len(set(self.layers)) == len(self.layers):
            raise ConfigError(f"layers must name at least one block, each once, not {self.layers}.")
        if self.mode == "bottleneck":
            if self.layers is not None:
                raise ConfigError('Several layers would disturb each other in the path; set mode="observe".')
            if self.pressure == "reconstruction":
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
        contrastive: (B, T) contrastive loss in nats, 0 on padding; None where it was not asked for, its
            weight is 0, or there is no bottleneck.
        latent: (B, T, L) the latents z.
        posterior_mean: (B, T, L) of q(z_t | h_t).
        posterior_logvar: (B, T, L), likewise.
        prior_mean: (B, T, L) of p(z_t | z_<t).
        prior_logvar: (B, T, L), likewise.
        sinks: (B, T) bool, attention sinks: tokens whose hidden state is longer than `PHiLayer.sink_norm`.
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
    sinks: Tensor
    phi_standard_error: Tensor | None = None


class PHiLayer(nn.Module):
    """Prediction of Hidden states: encoder, autoregressive prior, decoder.

    Args:
        hidden_size: D of the base model.
        config: options; the insertion point and the loss weights are used by `philens.attach`, not here.

    Attributes:
        shift: (D,), fixed: the encoder reads (h - shift) / scale, and the decoder's output is taken back by
            both. 0 unless `calibrate` set it.
        scale: (D,), likewise. 1 unless `calibrate` set it.
        sink_norm: (), fixed: a hidden state longer than this is an attention sink's. Its direction is encoded
            and its length is not, and it passes the layer as it is: the blocks above need it whole. 0 (unless
            `calibrate` set it) knows of no sinks.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    shift: Tensor
    scale: Tensor
    sink_norm: Tensor

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
        self.register_buffer("sink_norm", torch.zeros(()))
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

    def find_sinks(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T) bool, whether a token is an attention sink; see `sink_norm`."""
        states = hidden_states.detach()
        precise = torch.promote_types(states.dtype, torch.float32)
        norms = torch.linalg.vector_norm(states, dim=-1, dtype=precise)
        return (norms > self.sink_norm) & (self.sink_norm > 0)

    def standardise(self, hidden_states: Tensor, sinks: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (h - shift) / scale, which the encoder reads, a sink's of the length that the others
        have; sinks (B, T) as `find_sinks`, which None calls."""
        sinks = self.find_sinks(hidden_states) if sinks is None else sinks
        inverse = 1 / self.scale
        states = torch.addcmul(-self.shift * inverse, hidden_states.to(self.encoder.weight.dtype), inverse)
        length = torch.linalg.vector_norm(states.detach(), dim=-1, keepdim=True)
        return states * torch.where(sinks[..., None], self.hidden_size**0.5 / length, 1.0)

    def encode(self, hidden_states: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> mean and log-variance (B, T, L) of q(z_t | h_t), float32; sinks as `find_sinks`."""
        return self._statistics(self.encoder(self.standardise(hidden_states, sinks)))

    def decode(self, latent: Tensor) -> Tensor:
        """(B, T, L) -> (B, T, D) a(z_t)."""
        decoded = self.decoder(latent.to(self.decoder.weight.dtype))
        return torch.addcmul(self.shift, decoded.to(self.shift.dtype), self.scale)

    def pass_through(self, hidden_states: Tensor, latent: Tensor, sinks: Tensor) -> Tensor:
        """(B, T, D) what the blocks above get: decoded latents (B, T, L), and sinks (B, T) as they are."""
        decoded = self.decode(latent).to(hidden_states.dtype)
        return torch.where(sinks[..., None], hidden_states, decoded)

    @torch.no_grad()
    def calibrate(self, mean: Tensor, deviation: Tensor, sink_norm: float = 0.0) -> None:
        """Let the encoder see every dimension with mean 0 and standard deviation 1, and the decoder undo it.

        Models differ by orders of magnitude in the size of their hidden states, and in how much larger a few
        dimensions are than the rest; without this, so would the steps that the layer's training takes.

        Args:
            mean: (D,) of the base's hidden states.
            deviation: (D,) standard deviation of them.
            sink_norm: norm above which a hidden state is a sink's; mean and deviation are those of the rest.
        """
        self.shift.copy_(mean)
        # A dimension that never changes tells nothing, and must not be blown up.
        self.scale.copy_(deviation.clamp(min=1e-3 * float(deviation.median())).clamp(min=1e-6))
        self.sink_norm.fill_(sink_norm)

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
        attend: Attend,
        memories: Sequence[Memory] = (),
    ) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            return torch.zeros_like(z), torch.zeros_like(z)
        z = z.to(self.decoder.weight.dtype)
        return self._statistics(self.prior(z, starts, positions, attend, memories))

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
        contrastive: bool = True,
    ) -> PHiOutput:
        """Encode, predict, decode.

        Args:
            hidden_states: (B, T, D), any floating dtype; the decoded ones come back in the same.
            attention_mask: (B, T), 0 on padding, which may be on either side; with memories (B, earlier + T).
            document_ids: (B, T) integers of at least 0 that change where a new document starts in a pack.
            memories: `memory_count` of them, empty or those that an earlier call filled: the tokens then go
                on from the earlier ones. Each row is one document.
            contrastive: compute the contrastive loss, which only training reads.

        Raises:
            InputError: shapes that do not fit.
        """
        earlier = memories[0].get_seq_length() if memories else 0
        self._check(hidden_states, attention_mask, document_ids, memories, earlier)
        structure = document_structure(hidden_states, attention_mask, document_ids, earlier)
        starts, positions, attend, padding = structure
        sinks = self.find_sinks(hidden_states)
        observed = hidden_states.detach() if self.config.detach_input else hidden_states
        mean_q, logvar_q = self.encode(observed, sinks)
        sampled = self.config.bottleneck and (self.training or self.config.inference == "sample")
        draws = self.config.samples if sampled and not self.training else 1

        def draw() -> Tensor:
            if not sampled:
                return mean_q
            return torch.addcmul(mean_q, torch.exp(0.5 * logvar_q), torch.randn_like(mean_q))

        z = draw()
        mean_p, logvar_p = self._predict(z, starts, positions, attend, memories)
        phi, error = self._divergence(mean_q, logvar_q, mean_p, logvar_p), None
        if draws > 1:
            others = [
                self._divergence(mean_q, logvar_q, *self._predict(draw(), starts, positions, attend))
                for _ in range(draws - 1)
            ]
            every = torch.stack([phi, *others])
            phi, error = every.mean(0), every.std(0) / math.sqrt(draws)
        lost = None
        if contrastive and self.config.contrastive_weight > 0 and self.config.bottleneck:
            # The released code lets padding serve as negatives; a row's padding should not matter.
            negatives = None if padding is None or self.config.kl == "official" else ~padding
            with torch.autocast(hidden_states.device.type, enabled=False):
                lost = contrastive_loss(z, mean_q, logvar_q, negatives)
        if padding is not None:
            phi = phi.masked_fill(padding, 0.0)
            error = None if error is None else error.masked_fill(padding, 0.0)
            lost = None if lost is None else lost.masked_fill(padding, 0.0)
        return PHiOutput(
            hidden_states=self.pass_through(observed, z, sinks),
            observed=hidden_states,
            phi=phi,
            contrastive=lost,
            latent=z,
            posterior_mean=mean_q,
            posterior_logvar=logvar_q,
            prior_mean=mean_p,
            prior_logvar=logvar_p,
            sinks=sinks if padding is None else sinks & ~padding,
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
) -> tuple[Tensor, Tensor, Attend, Tensor | None]:
    """Where documents start, each token's position in its own, who may attend to whom, and what is padding.

    Args:
        hidden_states: (B, T, D).
        attention_mask: (B, earlier + T), 0 on padding.
        document_ids: (B, T); None where each row is one document.
        earlier: tokens read before, of the same documents.

    Returns:
        starts (B, T) bool, positions (B, T), who attends to whom, padding (B, T) bool or None.
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
    hidden = None if padding is None else padding[:, earlier:]
    if not earlier:
        return starts, positions, Documents(positions), hidden
    # Documents are contiguous, so a token may look back exactly as far as its own document's start.
    starts, positions = starts[:, earlier:], positions[:, earlier:]
    distance = index[0][earlier:, None] - index[0][None, :]
    mask = (distance >= 0) & (distance <= positions[..., None])
    return starts, positions, mask[:, None], hidden
