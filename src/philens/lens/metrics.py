"""Metrics: what each token has a value of, by the PHi layers, hidden states and next-token distributions.

`METRICS` is the one table of them. Whoever adds one adds an entry there.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from philens.lens.core import LensCore
from philens.lens.insertion import find_blocks, recorded_forms, skipped, transform_output
from philens.lens.instrument import KINDS, titles
from philens.lens.layer import PHiLayer
from philens.lens.losses import PHiModelOutput, divergence, logits_in_parts
from philens.support.columns import column_name
from philens.support.errors import InputError, InsertionError

Columns = dict[str, NDArray[np.float32]]
# What a metric takes from a lens: next-token predictions of the base, or those with the layer in the path;
# the layers; a shallow head; the base's blocks, read through its output head.
Need = Literal["predictions", "path", "layers", "head", "blocks"]


# The kind of instrument that is needed.
_KIND_OF: dict[Need, str] = {"layers": "phi", "path": "phi", "head": "mtd"}


class Value(NamedTuple):
    """What values of tokens are called: those of a metric, which may have others beside its own, at a point
    where there are several."""

    metric: str
    name: str
    point: str | None = None


@dataclass(frozen=True)
class Batch:
    """A batch that was read.

    Attributes:
        lens: the model.
        input_ids: (B, T).
        places: (N,), those of the B * T tokens whose values are wanted.
        output: output of the pass.
        logit_lens: what watched it, for metrics that need blocks.
    """

    lens: LensCore
    input_ids: Tensor
    places: Tensor
    output: PHiModelOutput
    logit_lens: "LogitLens | None"

    def wanted(self, values: Tensor) -> Tensor:
        """(B, T) -> (N,)."""
        return values.flatten()[self.places]

    @cached_property
    def depth_by_divergence(self) -> Tensor:
        """(N,) of `depth_by_divergence`, which two metrics read."""
        assert self.logit_lens is not None
        most = self.lens.metric_options.settled_at
        return depth_by_divergence(self.logit_lens, self.output, self.input_ids, self.places, most)


@dataclass(frozen=True)
class Metric:
    """A column of scores.

    Attributes:
        function: what makes it; each kind says of what.
        meaning: in a line.
        unit: empty for a plain number.
        needs: what a lens must have for it.
        options: those of `MetricOptions` that it depends on; where `group` is one, the lowest and the last
            group of tokens of a text or span are told beside its mean.
    """

    name: str
    function: Callable[..., Any]
    meaning: str
    unit: str = "nats"
    needs: tuple[Need, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class OfPrediction(Metric):
    """What the distribution before a token says of it, by a function from logits (n, V) float32 and the
    tokens that came (n,) to (n,); nothing of a first token."""

    needs: tuple[Need, ...] = ("predictions",)


@dataclass(frozen=True)
class OfLayer(Metric):
    """What a layer, or the hidden states at its insertion point, say of a token, by a function from a batch
    and the number of a layer to (N,) under the metric's own name, and others: a column for each layer.

    Attributes:
        finish: what becomes of these, (T,) each, when a text is whole: its columns.
    """

    needs: tuple[Need, ...] = ("layers",)
    finish: Callable[[Columns], Columns] = lambda values: values


@dataclass(frozen=True)
class OfBlocks(Metric):
    """What the hidden states after every block say of a token, by a function from a batch to (N,)."""

    needs: tuple[Need, ...] = ("blocks", "predictions")


@dataclass(frozen=True)
class OfHead(Metric):
    """What a shallow head says of a token, by a function from a batch to (N,)."""

    needs: tuple[Need, ...] = ("head", "predictions")


class Likeliest(NamedTuple):
    """How far down n distributions the tokens that came are, and the k likeliest ones, the likeliest first.

    Attributes:
        ranks: (n,) 1 if none is likelier than the one that came, and so on; 0 where there is no distribution.
        token_ids: (n, k).
        probabilities: (n, k) float32.
    """

    ranks: Tensor
    token_ids: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, most: int) -> "Likeliest":
        """From logits (n, V) float32 and the tokens that came (n,); k is at most `most`."""
        best, token_ids = logits.topk(min(most, logits.shape[-1]), dim=-1)
        probabilities = (best - logits.logsumexp(-1, keepdim=True)).exp()
        ranks = 1 + (logits > logits.gather(-1, targets[:, None])).sum(-1)
        return cls(ranks.masked_fill(probabilities[:, 0].isnan(), 0), token_ids, probabilities)


def surprisal(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) -ln p of the tokens that came, by logits (n, V)."""
    return F.cross_entropy(logits, targets, reduction="none")


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) entropy of the distributions of logits (n, V) in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) ln p of the likeliest token minus ln p of the second, by logits (n, V)."""
    best = logits.topk(min(2, logits.shape[-1]), dim=-1).values
    return best[..., 0] - best[..., -1]


def varentropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) variance of -ln p under the distributions of logits (n, V), in nats²."""
    probability, log = logits.softmax(-1), logits.log_softmax(-1)
    spread = (log + torch.special.entr(probability).sum(-1, keepdim=True)).square() * probability
    return spread.masked_fill(probability == 0, 0).sum(-1)


def self_certainty(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) KL(uniform || p) in nats by logits (n, V), over tokens that are possible (arXiv 2502.18581)."""
    possible = logits != -torch.inf
    count = possible.sum(-1)
    return logits.logsumexp(-1) - logits.masked_fill(~possible, 0).sum(-1) / count - count.log()


# Of the tokens that confidence is of, as in arXiv 2508.15260.
_LIKELIEST = 20


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) mean of -ln p over the 20 likeliest tokens that are possible, in nats, by logits (n, V)."""
    best = logits.topk(min(_LIKELIEST, logits.shape[-1]), dim=-1).values
    possible = best != -torch.inf
    return logits.logsumexp(-1) - best.masked_fill(~possible, 0).sum(-1) / possible.sum(-1)


SINKS = "sinks"  # beside phi, no column
_LENGTH = "length"  # beside step_length, likewise
# What phi is compared with, so that a finding is one of the trained layer and not of the base alone.
CONTROLS = ("phi_untrained", "state_norm")


def _phi(batch: Batch, number: int) -> dict[str, Tensor]:
    layer = batch.output.layer_outputs[number]
    error = layer.phi_standard_error
    found = {"phi": layer.phi, SINKS: layer.sinks} | ({} if error is None else {"phi_standard_error": error})
    return {name: batch.wanted(values) for name, values in found.items()}


# As made, for as long as the layers live that they are controls of.
_UNTRAINED: WeakKeyDictionary[PHiLayer, PHiLayer] = WeakKeyDictionary()


def untrained(layer: PHiLayer) -> PHiLayer:
    """A layer as one is before its first step: fresh weights, fitted to the base as this one (`calibrate`).

    What it says of texts comes from the base alone. The weights are always the same, and torch's random
    numbers go on as if none had been drawn.
    """
    if layer not in _UNTRAINED:
        # Made on the CPU: the generators of other devices need not be touched, nor be kept.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            _UNTRAINED[layer] = PHiLayer(layer.hidden_size, layer.config).eval().requires_grad_(False)
    fresh = _UNTRAINED[layer].to(layer.shift.device)
    fresh.config = layer.config  # phi may be measured by another formula
    for name, statistic in layer.named_buffers():
        fresh.get_buffer(name).copy_(statistic)
    return fresh


def _phi_untrained(batch: Batch, number: int) -> dict[str, Tensor]:
    fresh, states = untrained(batch.lens.layers[number]), batch.output.layer_outputs[number].observed
    return {"phi_untrained": batch.wanted(fresh(states, contrastive=False).phi)}


def _divergence(batch: Batch, number: int) -> dict[str, Tensor]:
    assert batch.logit_lens is not None
    early = batch.logit_lens.read(batch.output.layer_outputs[number].observed, batch.input_ids)
    return {"logit_lens_divergence": divergence(batch.output, early, batch.places)}


def _settling_depth(batch: Batch) -> Tensor:
    assert batch.logit_lens is not None
    return settling_depth(batch.logit_lens, batch.input_ids, batch.places)


def _deep_thinking(batch: Batch) -> Tensor:
    """Blocks count from 1 here, as in the paper: of 30 those from the 26th on are late at a share of 0.85."""
    assert batch.logit_lens is not None
    depth = batch.depth_by_divergence
    first = batch.lens.metric_options.deep_from * len(batch.logit_lens.blocks)
    return (depth + 1 >= first).float().masked_fill(depth.isnan(), torch.nan)


def _mtd(batch: Batch) -> Tensor:
    assert batch.output.shallow is not None
    return divergence(batch.output, batch.output.shallow(), batch.places)


def _step(batch: Batch, number: int) -> dict[str, Tensor]:
    """The distance of each hidden state from the one before, NaN on the first, and its length."""
    h = batch.output.layer_outputs[number].observed.float()
    distance = F.pad(h.diff(dim=1).norm(dim=-1), (1, 0), value=torch.nan)
    return {"step_length": batch.wanted(distance), _LENGTH: batch.wanted(h.norm(dim=-1))}


def _relative_step(values: Columns) -> Columns:
    """Distances divided by the mean length of the text's hidden states.

    The first token's length is left out of that mean: in many models it is hundreds of times longer. So are
    lengths that are not finite.
    """
    lengths = values[_LENGTH][1:]
    lengths = lengths[np.isfinite(lengths)]
    mean = np.float32(lengths.mean(dtype=np.float64)) if len(lengths) else np.float32(1)
    return {"step_length": values["step_length"] / mean}


def _state_norm(batch: Batch, number: int) -> dict[str, Tensor]:
    layer = batch.output.layer_outputs[number]
    standard = batch.lens.layers[number].standardise(layer.observed, layer.sinks)
    return {"state_norm": batch.wanted(standard.float().norm(dim=-1))}


_OF_ALL = (
    OfLayer("phi", _phi, "what the hidden state adds that earlier ones did not foretell"),
    OfHead("mtd", _mtd, "KL of the prediction of the next token from that of a shallow head"),
    OfPrediction("surprisal", surprisal, "-ln p of the token, by the base"),
    OfPrediction("surprisal_with_layer", surprisal, "the same with the layer in the path", needs=("path",)),
    OfPrediction("entropy", entropy, "entropy of the distribution before the token"),
    OfPrediction("margin", margin, "ln p of the likeliest token there minus that of the second"),
    OfPrediction("varentropy", varentropy, "variance of -ln p in that distribution", "nats²"),
    OfPrediction("self_certainty", self_certainty, "KL of that distribution from the uniform one"),
    OfPrediction(
        *("confidence", confidence),
        "mean of -ln p over the 20 likeliest tokens there: high where one is far likelier than others",
        options=("group",),
    ),
    OfLayer(
        *("logit_lens_divergence", _divergence),
        "KL of the prediction of the next token from that of the logit lens at the insertion point",
        needs=("layers", "blocks", "predictions"),
    ),
    OfBlocks(
        *("settling_depth", _settling_depth),
        "the first block from which on the logit lens' likeliest next token stays the last block's",
        "blocks",
    ),
    OfBlocks(
        *("settling_depth_jsd", lambda batch: batch.depth_by_divergence),
        "the first block whose logit lens is near the last block's, by Jensen-Shannon divergence",
        "blocks",
        options=("settled_at",),
    ),
    OfBlocks(
        *("deep_thinking", _deep_thinking),
        "1 where that block is among the last, else 0: its mean is the deep-thinking ratio",
        "",
        options=("settled_at", "deep_from"),
    ),
    OfLayer(
        *("step_length", _step),
        "distance of the hidden state from the one before, by the mean length of the text's",
        "",
        finish=_relative_step,
    ),
    OfLayer("state_norm", _state_norm, "length of the hidden state as the layer reads it", ""),
    OfLayer("phi_untrained", _phi_untrained, "phi of a layer that was never trained: a control"),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _OF_ALL}
"""By name, in the order in which columns come."""


def readable_blocks(base: nn.Module) -> list[nn.Module]:
    """The blocks of a base, whose hidden states its output head can read.

    Raises:
        InputError: the blocks cannot be told apart, or return something else.
    """
    metrics = " and ".join(name for name, metric in METRICS.items() if "blocks" in metric.needs)
    try:
        blocks = list(find_blocks(base)[1])
    except InsertionError as error:
        raise InputError(
            f"{metrics} need the model's blocks, and those of {type(base).__name__} could not be told apart; "
            "leave these metrics out."
        ) from error
    if any(isinstance(block, nn.RNNBase) for block in blocks):
        raise InputError(
            f"{metrics} need blocks that return hidden states; those of {type(base).__name__} are bare "
            "recurrent modules; leave these metrics out."
        )
    return blocks


def obstacle(lens: LensCore, name: str) -> InputError | None:
    """Why a lens cannot have a metric; None where it can. Nothing is read to know it."""
    for need in METRICS[name].needs:
        if need in _KIND_OF and not lens.parts_of(_KIND_OF[need]):
            title = KINDS[_KIND_OF[need]].title
            return InputError(
                f"{name} needs a {title}, and this model has a {titles(lens.configs)} alone; ask for other "
                "metrics."
            )
        if need == "head" and not lens.enabled:
            return InputError(
                f"The shallow head is disabled and {name} needs it; enable() it or ask for other metrics."
            )
        if need in ("layers", "path") and not lens.enabled:
            return InputError(
                f"The PHi layer is disabled and {name} needs it; enable() it or ask for other metrics."
            )
        if need == "path" and lens.config.mode == "observe":
            return InputError(
                f'There is no {name} with mode="observe", where the layer is not in the path; leave it out.'
            )
        if need in ("predictions", "path") and _has_no_head(lens.base):
            return InputError(
                f"{name} needs next-token predictions, and {type(lens.base).__name__} has no output head; "
                "load the model with its head (AutoModelForCausalLM), or leave it out."
            )
        if need == "blocks":
            try:
                readable_blocks(lens.base)
            except InputError as error:
                return error
    return None


def _has_no_head(base: nn.Module) -> bool:
    """Whether this is surely a model of transformers without an output head."""
    head, generates = (getattr(base, name, None) for name in ("get_output_embeddings", "can_generate"))
    return head is not None and generates is not None and head() is None and not generates()


def supports(lens: LensCore) -> dict[str, str | None]:
    """For each metric why a lens cannot have it, None where it can, before any forward pass."""
    found = {name: obstacle(lens, name) for name in METRICS}
    return {name: None if error is None else str(error) for name, error in found.items()}


def read_batch(
    lens: LensCore,
    input_ids: Tensor,
    places: Tensor,
    wanted: Sequence[str],
    alternatives: str | None = None,
    most: int = 0,
) -> tuple[dict[Value, Tensor], Likeliest | None]:
    """The values of tokens, in one pass through the base.

    Only a metric with the layer in the path beside one of the base runs the blocks above the layer once more.

    Args:
        lens: in evaluation mode.
        input_ids: (B, T).
        places: (N,), those of the B * T tokens whose values are wanted.
        wanted: names of metrics.
        alternatives: the surprisal by whose distribution the `most` likeliest tokens are asked for, too.

    Returns:
        (N,) each; and the likeliest tokens.
    """
    metrics = [METRICS[name] for name in wanted]
    asked = metrics if alternatives is None else [*metrics, METRICS[alternatives]]
    needs = {need for metric in asked for need in metric.needs}
    of_base, in_path = "predictions" in needs, "path" in needs
    logit_lens, forms = None, {}
    with ExitStack() as stack:
        if of_base:
            stack.enter_context(lens.observing() if needs & _KIND_OF.keys() else lens.disabled())
        if of_base and in_path:
            stack.enter_context(recorded_forms(lens.blocks_below, forms))
        if "blocks" in needs:
            logit_lens = LogitLens(lens, any(isinstance(metric, OfBlocks) for metric in metrics))
            stack.enter_context(logit_lens.watching())
        output = lens(input_ids, returns="states" if of_base or in_path else "phi")
    found: dict[Value, Tensor] = {}
    likeliest: Likeliest | None = None
    of_predictions = [metric for metric in metrics if isinstance(metric, OfPrediction)]
    for path in (True, False):
        own = {one.name: one.function for one in of_predictions if ("path" in one.needs) == path}
        some = most if alternatives is not None and ("path" in METRICS[alternatives].needs) == path else 0
        if own or some:
            source = output
            if path and of_base:
                states = output.layer_outputs[0].hidden_states
                source = lens.read_again(input_ids, {"use_cache": False}, 0, states, forms)
            values, best = predictions(source, input_ids, places, own, some)
            found |= {Value(name, name): value for name, value in values.items()}
            likeliest = likeliest or best
            del source
    batch = Batch(lens, input_ids, places, output, logit_lens)
    for metric in metrics:
        if isinstance(metric, OfLayer):
            for number, point in enumerate(lens.column_points):
                values = metric.function(batch, number)
                found |= {Value(metric.name, name, point): value for name, value in values.items()}
        elif isinstance(metric, OfBlocks | OfHead):
            found[Value(metric.name, metric.name)] = metric.function(batch)
    return found, likeliest


def predictions(
    output: PHiModelOutput,
    input_ids: Tensor,
    places: Tensor,
    functions: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    most: int = 0,
) -> tuple[dict[str, Tensor], Likeliest | None]:
    """What functions of `OfPrediction` say of the tokens (N,) at some of the B * T positions, by the
    distribution before each, and the `most` likeliest ones in their place; NaN, and a rank of 0, for the
    first of a row."""
    targets, before = input_ids.flatten()[places], (places - 1).clamp(min=0)
    parts, likeliest = [], []
    for part, logits in logits_in_parts(output, before):
        parts.append([function(logits, targets[part]) for function in functions.values()])
        if most:
            likeliest.append(Likeliest.of(logits, targets[part], most))
    first = places % input_ids.shape[1] == 0
    found = {
        name: torch.cat(values).masked_fill(first, torch.nan)
        for name, *values in zip(functions, *parts, strict=True)
    }
    if not most:
        return found, None
    ranks, token_ids, probabilities = map(torch.cat, zip(*likeliest, strict=True))
    return found, Likeliest(ranks.masked_fill(first, 0), token_ids, probabilities)


def columns_of(
    found: Mapping[Value, NDArray[np.float32]], wanted: Sequence[str]
) -> tuple[Columns, NDArray[np.bool_]]:
    """The columns of a text in order, from the values of its T tokens; and which are attention sinks."""
    columns: Columns = {}
    sinks = [values != 0 for value, values in found.items() if value.name == SINKS]
    for metric in map(METRICS.__getitem__, wanted):
        of_points: dict[str | None, Columns] = {}
        for value, values in found.items():
            if value.metric == metric.name and value.name != SINKS:
                of_points.setdefault(value.point, {})[value.name] = values
        if isinstance(metric, OfLayer):
            of_points = {point: metric.finish(values) for point, values in of_points.items()}
        for name in dict.fromkeys(name for values in of_points.values() for name in values):
            columns |= {column_name(name, point): values[name] for point, values in of_points.items()}
    return columns, np.logical_or.reduce(sinks) if sinks else np.zeros(0, bool)


class LogitLens:
    """What a model would predict if its blocks ended early: hidden states go straight to its norm and head.

    The base itself runs with all blocks skipped, so whatever it does after its last block is done here too.

    Args:
        lens: the model; its base must be made of blocks.
        every_block: keep the hidden states after every block of the pass watched, in `states`.

    Raises:
        InputError: the blocks cannot be found.
    """

    def __init__(self, lens: LensCore, every_block: bool) -> None:
        self.lens, self.every_block = lens, every_block
        self.blocks = readable_blocks(lens.base)
        self.states: dict[int, Tensor] = {}
        self._forms: dict[int, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward pass made within this context."""
        self.states = {}
        with ExitStack() as stack:
            stack.enter_context(recorded_forms(self.blocks, self._forms))
            if self.every_block:
                for number, block in enumerate(self.blocks):
                    stack.callback(transform_output(block, partial(self._keep, number)).remove)
            yield

    def _keep(self, number: int, hidden_states: Tensor) -> Tensor:
        self.states[number] = hidden_states
        return hidden_states

    def read(self, hidden_states: Tensor, input_ids: Tensor) -> PHiModelOutput:
        """The output of the base for these (B, T, D) after its last block."""
        with self.lens.disabled(), skipped(self.blocks, self._forms, hidden_states):
            return self.lens(input_ids, returns="states")


def settling_depth(logit_lens: LogitLens, input_ids: Tensor, places: Tensor) -> Tensor:
    """(N,) the first block, from 0, from which on the likeliest next token stays what it is in the end; NaN
    where a block's predictions are no numbers."""
    depth = torch.full_like(places, len(logit_lens.states) - 1)
    settled = torch.ones_like(places, dtype=torch.bool)
    broken = torch.zeros_like(places, dtype=torch.bool)
    last = None
    for block in reversed(range(len(logit_lens.states))):
        early = logit_lens.read(logit_lens.states[block], input_ids)
        best = [logits.max(-1) for _, logits in logits_in_parts(early, places)]
        likeliest = torch.cat([one.indices for one in best])
        broken |= ~torch.cat([one.values for one in best]).isfinite()
        last = likeliest if last is None else last
        settled = settled & (likeliest == last)
        depth = torch.where(settled, block, depth)
    return depth.float().masked_fill(broken, torch.nan)


def depth_by_divergence(
    logit_lens: LogitLens, final: PHiModelOutput, input_ids: Tensor, places: Tensor, most: float
) -> Tensor:
    """(N,) the first block, from 0, whose prediction of the next token has a Jensen-Shannon divergence of at
    most `most` bits from the last one's (arXiv 2602.13517); NaN where a block's predictions are no numbers.

    Args:
        final: the base's own predictions.
    """
    last = len(logit_lens.states) - 1
    depth = torch.full_like(places, last)
    broken = torch.zeros_like(places, dtype=torch.bool)
    # Heads are run in parts, so all blocks can be read side by side; logits that come whole are read in turn.
    for blocks in [range(last)] if final.logits is None else [[block] for block in range(last)]:
        early = [logit_lens.read(logit_lens.states[block], input_ids) for block in blocks]
        parts = [logits_in_parts(one, places) for one in early]
        for part, logits in logits_in_parts(final, places):
            own = logits.softmax(-1)
            entropy_of_own = torch.special.entr(own).sum(-1)
            broken[part] |= entropy_of_own.isnan()
            for block, others in zip(blocks, parts, strict=True):
                other = next(others)[1].softmax(-1)
                both = torch.special.entr((own + other) / 2).sum(-1)
                apart = (both - (entropy_of_own + torch.special.entr(other).sum(-1)) / 2) / math.log(2)
                broken[part] |= apart.isnan()
                found = depth[part]
                depth[part] = torch.where(apart <= most, found.clamp(max=block), found)
    return depth.float().masked_fill(broken, torch.nan)
