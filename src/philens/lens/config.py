"""What instruments are, where they go and how they are trained: PHi layers, a shallow head; and what metrics
leave open."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

from philens.support.errors import ConfigError
from philens.support.typed import convert, nearest, shown

# A token is an attention sink if its hidden state is so many times as long as the median. In Llama-shaped
# models sinks' are 100 times as long, and the longest others 1.5 times.
SINK = 4.0

Pressure = Literal["next_token", "distill", "reconstruction"]


@dataclass(frozen=True)
class MetricOptions:
    """What metrics leave to whoever measures; what suits one model need not suit another.

    Attributes:
        settled_at: bits, the Jensen-Shannon divergence from the last block's distribution at which a block's
            has settled; g of arXiv 2602.13517.
        deep_from: share of the blocks after which settling is late; rho there.
        group: tokens in a group of confidence, of which the lowest and the last are told; 2,048 in arXiv
            2508.15260, for replies of tens of thousands.

    Raises:
        ConfigError: one that is out of range.
    """

    settled_at: float = 0.5
    deep_from: float = 0.85
    group: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.settled_at < 1:
            raise ConfigError(f"settled_at must be 0 or more and below 1 bit, not {self.settled_at}.")
        if not 0 < self.deep_from <= 1:
            raise ConfigError(f"deep_from must be above 0 and at most 1, not {self.deep_from}.")
        if self.group < 1:
            raise ConfigError(f"group must be at least 1, not {self.group}.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "MetricOptions":
        """Those named, the others as they are by default.

        Raises:
            ConfigError: there is no such option, or it is of another type.
        """
        kinds = {"settled_at": float, "deep_from": float, "group": int}
        for name in options:
            if name not in kinds:
                raise ConfigError(
                    f"There is no metric option {name!r}; did you mean {nearest(name, list(kinds))!r} "
                    f"(there are {', '.join(kinds)})?"
                )
        return cls(**{name: convert(value, kinds[name], name) for name, value in options.items()})


Place = tuple[int | None, str | None]


class InstrumentConfig(Protocol):
    """What is asked of the configuration of any instrument.

    Attributes:
        kind: its name in recipes and files.
        mode: `bottleneck` if it replaces hidden states, `observe` if it leaves them as they are.
        pressure: what is asked of the next-token distributions that come of the states it makes.
        pressure_share: share of a training pass's rows for which that is asked.
        inference: `sample` if its values in evaluation are drawn.
    """

    kind: ClassVar[str]

    @property
    def mode(self) -> Literal["bottleneck", "observe"]: ...
    @property
    def pressure(self) -> Pressure: ...
    @property
    def pressure_share(self) -> float: ...
    @property
    def inference(self) -> Literal["mean", "sample"]: ...

    def places(self) -> list[Place]:
        """The number of a block or the path of a module after which each of its parts stands."""
        ...


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
        pressure_share: share of a training pass's rows whose next-token distributions press: the
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
        codebooks: Q, the number of codebooks that the latent is quantised by, each what those before it leave
            (Q = 1 is plain vector quantisation); phi is then the length of the codes, -ln p of each summed.
            0 leaves latents continuous.
        codes: K, how many codes a codebook has.
        commitment_weight: weight of the squared distance of the encoder's vectors, of length 1, from what the
            codes say, in the training loss.
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

    kind: ClassVar[str] = "phi"

    layer: int | None = None
    module: str | None = None
    layers: list[int] | None = None
    mode: Literal["bottleneck", "observe"] = "bottleneck"
    pressure: Pressure = "next_token"
    pressure_share: float = 1.0
    reconstruction_weight: float = 1.0
    latent_size: int | None = None
    prior: Literal["attention", "mlp", "unit"] = "attention"
    prior_heads: int | None = None
    prior_depth: int = 1
    prior_mlp_size: int | None = None
    bottleneck: bool = True
    codebooks: int = 0
    codes: int = 1024
    commitment_weight: float = 0.25
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
        for name in ("phi_weight", "contrastive_weight", "reconstruction_weight", "commitment_weight"):
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
        if self.codebooks < 0 or self.codes < 2:
            raise ConfigError(
                "codebooks must be at least 0, and codes at least 2, not "
                f"{shown(self.codebooks)} and {shown(self.codes)}."
            )
        if self.codebooks and (self.kl != "exact" or not self.bottleneck):
            raise ConfigError(
                "codebooks are one kind of latents, and kl and bottleneck of others; leave out codebooks, or "
                "those two."
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

    def places(self) -> list[Place]:
        return [(number, self.module) for number in self.layers or [self.layer]]

    def latent_width(self, hidden_size: int) -> int:
        """L for a base model of this hidden size D."""
        return self.latent_size or hidden_size


class _Observer:
    """What every instrument has to say, of one that has no choice."""

    mode: Literal["bottleneck", "observe"] = "observe"
    pressure: Pressure = "distill"
    pressure_share: float = 1.0
    inference: Literal["mean", "sample"] = "mean"


@dataclass
class MTDConfig(_Observer):
    """A shallow head beside the base: what it predicts of the next token, and the base does not, is
    multiple-token divergence (MTD).

    It observes what leaves the last block, and is trained to predict what the base predicts.

    Attributes:
        own: the multi-token head that the base brings along, if it does, is measured as it is. Its options
            are not ours to choose, and nothing is trained.
        embedding: the head reads the newest token, too; without it, it knows the tokens before that alone.
        depth: Transformer blocks of the head.
        heads: attention heads of a block; None means one for every 64 dimensions.
        mlp_size: width of a block's SwiGLU MLP; None means 8/3 of the hidden size.
    """

    kind: ClassVar[str] = "mtd"

    own: bool = False
    embedding: bool = True
    depth: int = 1
    heads: int | None = None
    mlp_size: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            setattr(self, field.name, convert(getattr(self, field.name), field.type, field.name))
        for name in ("depth", "heads", "mlp_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value!r}.")
        if self.own and (not self.embedding or self.depth > 1 or self.heads or self.mlp_size):
            raise ConfigError(
                "own takes the multi-token head of the base as it is; leave out embedding, depth, heads and "
                "mlp_size."
            )

    def places(self) -> list[Place]:
        return [(-1, None)]
