"""The promises of philens as trials on a model: values found and expected. Shapes: B rows, T tokens."""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from philens.bases.facts import text_config, token_embedding
from philens.lens.adapter import load_as, save_adapter
from philens.lens.core import LensCore
from philens.lens.generation import generate
from philens.lens.insertion import find_blocks
from philens.lens.losses import PHiModelOutput, token_surprisal
from philens.support.errors import InputError, InsertionError

Result = Literal["yes", "no", "not supported by the base", "not applicable"]
# Found and expected values that should be equal: phi and log-probabilities in nats, losses, gradients.
Pairs = Iterator[tuple[Tensor, Tensor]]

LENGTH = 12  # tokens of a text that is tried; a model's windows and contexts may be longer


class Broken(Exception):
    """A promise does not hold, otherwise than by a difference of values."""


class NotApplicable(Exception):
    """A promise that this model does not call for."""


@dataclass
class Trial:
    """A lens and texts to try it on."""

    lens: LensCore
    ids: Tensor  # (3, T) token ids
    backend: str = ""

    def values(self, output: PHiModelOutput, ids: Tensor) -> list[Tensor]:
        """Phi and mtd, where there are layers and a head, enabled, and log-probabilities (B, T, V)."""
        logprobs = output.logits_at(slice(0, ids.shape[1])).log_softmax(-1)
        return [value for value in (output.phi, self.mtd(output), logprobs) if value is not None]

    def mtd(self, output: Any) -> Tensor | None:
        """Its mtd; -1 on first tokens where they have none. Others that are no numbers show elsewhere."""
        return output.mtd.nan_to_num(-1.0) if self.lens.has_own_head and self.lens.enabled else output.mtd

    def read(self, ids: Tensor, **options: Any) -> list[Tensor]:
        """The same of texts (B, T)."""
        return self.values(self.lens(ids, **options), ids)

    def labels(self) -> Tensor:
        """(B, T) those of `ids`, for a loss.

        Raises:
            NotApplicable: nothing is trained.
        """
        if self.lens.has_own_head:
            raise NotApplicable("the multi-token head is the base's own")
        return self.ids

    def documents(self) -> list[Tensor]:
        """The texts, cut to different lengths (1, t)."""
        length = self.ids.shape[1]
        return [row[None, :cut] for row, cut in zip(self.ids, (length, length // 2, 1), strict=True)]

    def learn(self, model: Callable[..., Any] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Loss, values and logits with labels and fixed noise; gradients of what is attached, and of embedded
        tokens where no other model (the compiled one) is given."""
        lens, embedded = self.lens, []
        torch.manual_seed(0)

        def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_(True))
            return embedded[-1]

        embedding = token_embedding(lens.base) if model is None else None
        handle = None if embedding is None else embedding.register_forward_hook(note)
        try:
            output = (lens if model is None else model)(self.ids, labels=self.labels())
        finally:
            if handle is not None:
                handle.remove()
        sources = [*lens.attached.parameters(), *embedded[:1]]
        found = torch.autograd.grad(output.loss, sources, allow_unused=True)
        gradients = [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]
        values = (output.loss, output.phi, output.mtd, output.logits.detach())
        return [value for value in values if value is not None], gradients

    def learn_base(self, model: Callable[..., Any]) -> list[Tensor]:
        """Loss of the base, and its gradient by the base's first weight, which may be frozen."""
        weight = next(weight for weight in self.lens.base.parameters() if weight.is_floating_point())
        learns = weight.requires_grad
        weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                loss = model(self.ids, labels=self.ids).loss
                return [loss.detach(), *torch.autograd.grad(loss, weight)]
        finally:
            weight.requires_grad_(learns)


Attempt = Callable[[Trial], Pairs]


class Promise(NamedTuple):
    """A promise, the attempt to break it, whether it means bit-identical, and whether the base without its
    layer can be put to the same test."""

    name: str
    meaning: str
    attempt: Attempt
    exact: bool
    of_base: bool


PROMISES: list[Promise] = []


def _promise(
    name: str, meaning: str, exact: bool = False, of_base: bool = True
) -> Callable[[Attempt], Attempt]:

    def register(attempt: Attempt) -> Attempt:
        PROMISES.append(Promise(name, meaning, attempt, exact, of_base))
        return attempt

    return register


@_promise("disabled", "disabled, the model is the base, bit for bit", exact=True, of_base=False)
def _disabled(trial: Trial) -> Pairs:
    lens, ids = trial.lens, trial.ids
    lens(ids)
    with lens.disabled():
        yield lens(ids).logits, lens._call_base(ids, {})


@_promise("gradient", "a frozen base gets no gradient, the layer does", of_base=False)
def _gradient(trial: Trial) -> Pairs:
    layer = list(trial.lens.attached.parameters())
    with torch.enable_grad():
        loss = trial.lens(trial.ids, labels=trial.labels()).loss
        reached = _leaves(loss)
        gradients = torch.autograd.grad(loss, layer, allow_unused=True)
    if any(id(parameter) in reached for parameter in trial.lens.base.parameters()):
        raise Broken("the loss reaches parameters of the frozen base")
    if missing := sum(gradient is None for gradient in gradients):
        raise Broken(f"the loss does not reach {missing} of the layer's {len(layer)} parameters")
    total = sum(float(gradient.float().norm()) for gradient in gradients)
    if not 0 < total < math.inf:
        raise Broken(f"the norm of the layer's gradient is {total}")
    yield from ()  # nothing to compare


@_promise("causal", "values do not depend on later tokens")
def _causal(trial: Trial) -> Pairs:
    ids, cut = trial.ids, trial.ids.shape[1] // 2
    other = torch.cat((ids[:, :cut], ids[:, cut:].roll(1, 0)), 1)
    for found, expected in zip(trial.read(other), trial.read(ids), strict=True):
        yield found[:, :cut], expected[:, :cut]


@_promise("batch", "alone or in a batch")
def _batch(trial: Trial) -> Pairs:
    alone = [trial.read(row[None]) for row in trial.ids]
    for found, expected in zip(trial.read(trial.ids), zip(*alone, strict=True), strict=True):
        yield found, torch.cat(expected)


def _padded(trial: Trial, left: bool) -> Pairs:
    documents, width = trial.documents(), trial.ids.shape[1] + 1
    ids, mask = trial.ids.new_zeros(len(documents), width), trial.ids.new_zeros(len(documents), width)
    for row, document in enumerate(documents):
        length = document.shape[1]
        place = slice(width - length, width) if left else slice(length)
        ids[row, place], mask[row, place] = document[0], 1
    # Bases with absolute positions must be told them on the left.
    positions = (mask.cumsum(1) - 1).clamp(min=0) if left else None
    found = trial.read(ids, attention_mask=mask, position_ids=positions)
    for row, document in enumerate(documents):
        for one, expected in zip(found, trial.read(document), strict=True):
            yield one[row : row + 1][mask[row : row + 1] != 0], expected[0]


_promise("right padding", "with padding on the right")(partial(_padded, left=False))
_promise("left padding", "with padding on the left")(partial(_padded, left=True))


@_promise("packing", "packed after one another, with position_ids")
def _packing(trial: Trial) -> Pairs:
    documents = trial.documents()
    positions = torch.cat([torch.arange(d.shape[1], device=d.device)[None] for d in documents], 1)
    alone = [trial.read(document) for document in documents]
    found = trial.read(torch.cat(documents, 1), position_ids=positions)
    for one, expected in zip(found, zip(*alone, strict=True), strict=True):
        yield one, torch.cat(expected, 1)


@_promise("cache", "token by token, with the cache")
def _cache(trial: Trial) -> Pairs:
    cache, steps = None, []
    for t in range(trial.ids.shape[1]):
        one = trial.ids[:, t : t + 1]
        output = trial.lens(one, cache=cache, use_cache=True)
        cache = output.cache
        steps.append(trial.values(output, one))
    for found, expected in zip(zip(*steps, strict=True), trial.read(trial.ids), strict=True):
        yield torch.cat(found, 1), expected


@_promise("early exit", 'stopped at the layer (returns="phi")', of_base=False)
def _early_exit(trial: Trial) -> Pairs:
    if not trial.lens.layers:
        raise NotApplicable("there is no PHi layer")
    yield trial.lens(trial.ids, returns="phi").phi, trial.lens(trial.ids).phi


@_promise("states", 'with logits made in parts (returns="states")')
def _states(trial: Trial) -> Pairs:
    yield from zip(trial.read(trial.ids, returns="states"), trial.read(trial.ids), strict=True)
    if not trial.lens.has_own_head:
        whole, parts = (trial.lens(trial.ids, labels=trial.ids, returns=r) for r in ("logits", "states"))
        yield parts.loss, whole.loss


@_promise("observing", "observing leaves logits bit-identical", exact=True, of_base=False)
def _observing(trial: Trial) -> Pairs:
    with trial.lens.disabled():
        plain = trial.lens(trial.ids).logits
    for lens in _alone(trial.lens, "observe"):
        yield lens(trial.ids).logits, plain
    if trial.lens.parts_of("mtd"):
        yield trial.lens(trial.ids).logits, plain


@_promise("same phi", "observing and in the path, phi is the same", of_base=False)
def _same_phi(trial: Trial) -> Pairs:
    if not trial.lens.layers:
        raise NotApplicable("there is no PHi layer")
    found = trial.lens(trial.ids).phi
    other = "bottleneck" if trial.lens.config.mode == "observe" else "observe"
    for number, lens in enumerate(_alone(trial.lens, other)):
        yield (found[..., number] if found.ndim == 3 else found), lens(trial.ids).phi


def _generated(
    trial: Trial, rows: int = 2, length: int = LENGTH // 2, times: int = 1, **options: Any
) -> Pairs:
    lens, prompt = trial.lens, trial.ids[:rows, :length].repeat(1, times)
    if not hasattr(lens.base, "generate"):
        raise NotApplicable("the base has no generate")
    # The model's own settings may forbid or force tokens; they are put back.
    from transformers import GenerationConfig

    base: Any = lens.base
    own, base.generation_config = base.generation_config, GenerationConfig(pad_token_id=0)
    try:
        generated = generate(lens, prompt, max_new_tokens=LENGTH - prompt.shape[1], **options)
    finally:
        base.generation_config = own
    for row, ids in enumerate(generated.sequences):
        output = lens(ids[None])
        yield generated.surprisal[row, 1:], token_surprisal(output, ids[None])[0, 1:]
        for one, expected in ((generated.phi, output.phi), (trial.mtd(generated), trial.mtd(output))):
            if one is not None and expected is not None:
                yield one[row], expected[0]
        if not options.get("do_sample") and options.get("num_beams", 1) == 1:
            # What was chosen is the likeliest by the finished text, with the layer in the path or not.
            start = generated.prompt_length
            logprobs = output.logits[0, start - 1 : -1].float().log_softmax(-1)
            yield logprobs.gather(1, ids[start:, None])[:, 0], logprobs.amax(1)


_promise("greedy", "generated greedily, scores are those of the finished text")(
    partial(_generated, do_sample=False)
)
_promise("sampling", "... by sampling")(partial(_generated, do_sample=True))
_promise("beams", "... by beams")(partial(_generated, do_sample=False, num_beams=3, num_return_sequences=2))
_promise("assisted", "... assisted, by prompt lookup")(
    partial(_generated, rows=1, length=LENGTH // 4, times=2, do_sample=False, prompt_lookup_num_tokens=2)
)


@_promise(
    "checkpointing", "activations recomputed: same loss and gradients, the layer runs once", of_base=False
)
def _checkpointing(trial: Trial) -> Pairs:
    lens, calls = trial.lens, []
    try:
        find_blocks(lens.base)
    except InsertionError as error:
        raise NotApplicable(str(error).split(";")[0].split("(")[0].strip()) from error
    recomputed = bool(lens._undo_recompute)
    # Before the forward pass: a recomputation ends within it, as soon as it has all that it needs.
    parts: list[Any] = lens.instruments
    handles = [part.register_forward_pre_hook(lambda *_: calls.append(1)) for part in parts]
    try:
        with torch.enable_grad():
            lens.attached.train()
            lens.keep_activations()
            expected, gradients = trial.learn()
            lens.checkpoint_activations()
            calls.clear()
            found, gradients_again = trial.learn()
    finally:
        lens.attached.eval()
        lens.keep_activations()
        if recomputed:
            lens.checkpoint_activations()
        for handle in handles:
            handle.remove()
    if len(calls) != len(parts):
        raise Broken(f"{len(parts)} layers ran {len(calls)} times")
    yield from zip(found, expected, strict=True)
    yield from _relative(gradients_again, gradients)


@_promise("compiled", "compiled by torch.compile: same values, loss and gradients")
def _compiled(trial: Trial) -> Pairs:
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    compiled = torch.compile(trial.lens, backend=trial.backend)
    if trial.lens.enabled:
        with torch.enable_grad():
            found, gradients = trial.learn(compiled)
            expected, expected_gradients = trial.learn(trial.lens)
        yield from zip(found, expected, strict=True)
        yield from _relative(gradients, expected_gradients)
    else:
        yield from zip(trial.values(compiled(trial.ids), trial.ids), trial.read(trial.ids), strict=True)
        yield from _relative(trial.learn_base(compiled), trial.learn_base(trial.lens))
    if counters["stats"]["unique_graphs"] == graphs:
        raise Broken("nothing was compiled")


@_promise("saved", "saved and loaded", of_base=False)
def _saved(trial: Trial) -> Pairs:
    trial.labels()
    lens, expected = trial.lens, trial.read(trial.ids)
    with tempfile.TemporaryDirectory() as folder, lens.disabled():
        save_adapter(lens, folder)
        loaded = load_as(type(lens), lens.base, folder)
        try:
            make_deterministic(loaded)
            found = Trial(loaded, trial.ids).read(trial.ids)
        finally:
            loaded.detach()
    yield from zip(found, expected, strict=True)


def _relative(found: list[Tensor], expected: list[Tensor]) -> Pairs:
    """Gradients as shares of the largest of their tensor."""
    for one, other in zip(found, expected, strict=True):
        largest = other.abs().max().clamp(min=torch.finfo(other.dtype).tiny)
        yield one / largest, other / largest


def _alone(lens: LensCore, mode: Literal["bottleneck", "observe"]) -> Iterator[LensCore]:
    """Each layer in turn in a model of its own, in another mode."""
    for path, layer in zip(lens.module_paths, lens.layers, strict=False):
        config = replace(lens.config, layer=None, layers=None, module=path, mode=mode, pressure="next_token")
        with lens.disabled():
            other = type(lens)(lens.base, config)
            other.phi = layer
            try:
                yield other.eval()
            finally:
                other.detach()


def _leaves(loss: Tensor) -> set[int]:
    """Ids of the tensors that a backward pass from here would give a gradient."""
    seen, waiting, leaves = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(id(variable))
        waiting.extend(following for following, _ in node.next_functions)
    return leaves


def token_ids(base: nn.Module, rows: int, length: int) -> Tensor:
    """(rows, length) random ids of the base's vocabulary, without those of special meaning.

    Raises:
        InputError: its vocabulary is not known.
    """
    embedding, config = token_embedding(base), text_config(base)
    size = getattr(config, "vocab_size", None) or getattr(embedding, "num_embeddings", None)
    if not isinstance(size, int):
        raise InputError(
            f"The vocabulary of {type(base).__name__} is not known; give the model a config with vocab_size."
        )
    special = {
        value
        for owner in (config, getattr(base, "config", None))
        for name, value in vars(owner or object).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    known = torch.tensor([i for i in range(min(size, 50_000)) if i not in special] or [0])
    longest = getattr(config, "max_position_embeddings", None) or length
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(known), (rows, min(length, longest)), generator=generator)
    return known[chosen].to(next(base.parameters(), known).device)


def make_deterministic(lens: LensCore) -> None:
    for layer in lens.layers:
        layer.config = replace(layer.config, inference="mean", samples=1)


def outcome(
    trial: Trial, promise: Promise, tolerance: float
) -> tuple[Result, float | None, float | None, str]:
    """Whether a promise holds, the largest difference, how large it may be, and a note where it does not."""
    tolerance = 0.0 if promise.exact else tolerance
    difference, allowed, note, holds = _try(trial, promise.attempt, tolerance)
    if holds is None:
        return "not applicable", None, None, note
    if holds:
        return "yes", difference, allowed, note
    if promise.of_base:
        with trial.lens.disabled():
            tried = _try(trial, promise.attempt, tolerance)
        if not tried[-1]:
            return "not supported by the base", *tried[:3]
    return "no", difference, allowed, note


def _try(
    trial: Trial, attempt: Attempt, tolerance: float
) -> tuple[float | None, float | None, str, bool | None]:
    """Largest difference, what is allowed, a note, and whether it holds; None if it does not apply."""
    worst, difference, allowed = -1.0, None, None
    try:
        for found, expected in attempt(trial):
            if found.shape != expected.shape:
                raise Broken(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
            found, expected = found.double(), expected.double()
            differences = (found - expected).abs().masked_fill(found == expected, 0.0)  # or both infinite
            one = float(differences.nan_to_num(torch.inf).max())
            may = tolerance * (1 + float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))
            share = one / may if may else one
            if share > worst:
                worst, difference, allowed = share, one, may
    except NotApplicable as reason:
        return None, None, str(reason), None
    except Broken as reason:
        return None, None, str(reason), False
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        return None, None, f"{type(error).__name__}: {first}" if first else type(error).__name__, False
    return difference, allowed, "", worst <= 1 if tolerance else worst <= 0
