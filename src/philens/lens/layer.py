"""The PHi layer: a variational bottleneck in the main path and a learned autoregressive prior beside it.

Source: Herrmann, Csordas, Schmidhuber, "Measuring In-Context Computation Complexity via Hidden State
Prediction", ICML 2025, arXiv 2503.13431, section 2. Shapes: B rows, T tokens, D hidden size, L latent size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from philens.lens.attention import Documents
from philens.lens.config import PHiConfig
from philens.lens.latents import CodeLatent, Latent, latent_kind
from philens.lens.passing import Pass, Term
from philens.lens.prior import Attend, Memory, Prior
from philens.support.errors import ConfigError, InputError


@dataclass
class PHiOutput:
    """What a PHi layer returns.

    Attributes:
        hidden_states: (B, T, D) decoded latents, which replace the base's hidden states.
        observed: (B, T, D) the base's hidden states.
        phi: (B, T) PHi loss in nats, float32, 0 on padding.
        latent: (B, T, L) the latents z.
        posterior: q(z_t | h_t), of the kind of the latents; a Gaussian's `posterior_mean` and
            `posterior_logvar` are (B, T, L).
        prior: p(z_t | z_<t), likewise; `prior_mean` and `prior_logvar`.
        sinks: (B, T) bool, attention sinks: tokens whose hidden state is longer than `PHiLayer.sink_norm`.
        phi_standard_error: (B, T) of phi over samples; None unless there are several.
        parts: (B, T) by name, 0 on padding, other losses that its kind of latents has; empty where they were
            not asked for. `contrastive` is one, in nats, or None.
    """

    hidden_states: Tensor
    observed: Tensor
    phi: Tensor
    latent: Tensor
    posterior: Any
    prior: Any
    sinks: Tensor
    phi_standard_error: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    contrastive = property(lambda self: self.parts.get("contrastive"))
    posterior_mean = property(lambda self: self.posterior.mean)
    posterior_logvar = property(lambda self: self.posterior.logvar)
    prior_mean = property(lambda self: self.prior.mean)
    prior_logvar = property(lambda self: self.prior.logvar)


class PHiLayer(nn.Module):
    """Prediction of Hidden states: encoder, autoregressive prior, decoder. An `Instrument`.

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
    compared = final = False
    surprisal, divergence = "surprisal", "divergence"

    def __init__(self, hidden_size: int, config: PHiConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PHiConfig()
        self.hidden_size = hidden_size
        self.latent_size = size = config.latent_width(hidden_size)
        self.codes = CodeLatent(size, config) if config.codebooks else None
        numbers = self.latents.numbers * size
        self.encoder = nn.Linear(hidden_size, numbers, bias=False)
        self.decoder = nn.Linear(size, hidden_size, bias=False)
        self.prior = None if config.prior == "unit" else Prior(size, numbers, config)
        self.register_buffer("shift", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
        self.register_buffer("sink_norm", torch.zeros(()))
        if config.init == "near_identity":
            self._init_near_identity()

    @torch.no_grad()
    def _init_near_identity(self) -> None:
        size, scale = self.latent_size, self.latents.width
        if size < self.hidden_size:
            raise ConfigError(
                f'init="near_identity" needs a latent_size of at least the hidden size {self.hidden_size}, '
                f'not {size}; use init="random".'
            )
        nn.init.zeros_(self.encoder.weight)
        nn.init.eye_(self.encoder.weight[:size]).mul_(scale)
        nn.init.eye_(self.decoder.weight).div_(scale)
        if self.prior is not None:
            # A prior as wide as the latents: phi starts at hundreds of nats, not tens of thousands.
            self.latents.start_wide(self.prior.mlp.down_proj.bias)

    @property
    def latents(self) -> Latent:
        """The kind of latents, as `config` says now: another formula may measure than was trained by."""
        return latent_kind(self.config) if self.codes is None else self.codes

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

    def encode(self, hidden_states: Tensor, sinks: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, L) the likeliest z_t by q(z_t | h_t); sinks as `find_sinks`."""
        return self.latents.read(self.encoder(self.standardise(hidden_states, sinks)), drawn=False)[1]

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
            contrastive: compute the contrastive loss, or what else latents of this kind learn by beside phi,
                which only training reads.

        Raises:
            InputError: shapes that do not fit.
        """
        earlier = memories[0].get_seq_length() if memories else 0
        self._check(hidden_states, attention_mask, document_ids, memories, earlier)
        structure = document_structure(hidden_states, attention_mask, document_ids, earlier)
        starts, positions, attend, padding = structure
        sinks = self.find_sinks(hidden_states)
        observed = hidden_states.detach() if self.config.detach_input else hidden_states
        sampled = self.latents.is_random and (self.training or self.config.inference == "sample")
        draws = self.config.samples if sampled and not self.training else 1
        kind, encoded = self.latents, self.encoder(self.standardise(observed, sinks))

        def tell(memories: Sequence[Memory] = ()) -> tuple[Any, Tensor, Any, Tensor]:
            posterior, z = kind.read(encoded, sampled)
            numbers = None
            if self.prior is not None:
                numbers = self.prior(z.to(self.decoder.weight.dtype), starts, positions, attend, memories)
            prior = kind.expect(numbers, posterior)
            target = posterior.detach() if self.config.detach_targets else posterior
            return posterior, z, prior, kind.divergence(target, prior)

        posterior, z, prior, phi = tell(memories)
        error = None
        if draws > 1:
            every = torch.stack([phi, *(tell()[-1] for _ in range(draws - 1))])
            phi, error = every.mean(0), every.std(0) / math.sqrt(draws)
        parts = kind.losses(z, posterior, padding) if contrastive else {}
        if padding is not None:
            phi = phi.masked_fill(padding, 0.0)
            error = None if error is None else error.masked_fill(padding, 0.0)
            parts = {name: value.masked_fill(padding, 0.0) for name, value in parts.items()}
        return PHiOutput(
            hidden_states=self.pass_through(observed, z, sinks),
            observed=hidden_states,
            phi=phi,
            latent=z,
            posterior=posterior,
            prior=prior,
            sinks=sinks if padding is None else sinks & ~padding,
            phi_standard_error=error,
            parts=parts,
        )

    def read(self, hidden_states: Tensor, current: Pass, memories: Sequence[Memory] = ()) -> PHiOutput:
        return self(hidden_states, current.attention_mask, current.documents, memories, current.contrastive)

    def losses(self, output: PHiOutput, counted: Tensor, weight_scale: Tensor) -> list[Term]:
        config, weights, count = self.config, counted.float(), counted.sum().clamp(min=1)
        scale = 1.0 if config.reduction == "sum" else 1.0 / output.latent.shape[-1]
        phi = (output.phi * weights).sum() / count
        found = [Term("phi", phi, weight_scale * config.phi_weight * scale)]
        for name, part in output.parts.items():
            value = (part * weights).sum() / count
            found.append(Term(name, value, weight_scale * self.latents.weights[name]))
        if config.pressure == "reconstruction":
            lost = lost_variance(output, counted)
            found.append(Term("reconstruction", lost, config.reconstruction_weight))
        return found

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


def lost_variance(output: PHiOutput, counted: Tensor) -> Tensor:
    """Share of the hidden states' variance that the decoded latents miss, averaged over dimensions.

    Every dimension counts alike, however large a model lets a few of them grow; attention sinks, in which
    almost all of the variance of some dimensions lies, don't count.
    """
    counted = counted & ~output.sinks
    weights = counted[..., None] / counted.sum().clamp(min=1)
    target = output.observed.float()
    missed = ((output.hidden_states.float() - target).square() * weights).sum((0, 1))
    mean = (target * weights).sum((0, 1))
    variance = ((target - mean).square() * weights).sum((0, 1))
    return (missed / variance.clamp(min=1e-8)).mean()


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
