"""Try on a model itself what philens promises of every model. Shapes: B rows, T tokens."""

import contextlib
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from philens.errors import InputError, InsertionError
from philens.insertion import find_blocks, text_config
from philens.losses import token_surprisal

if TYPE_CHECKING:
    from philens.model import PHiModel, PHiModelOutput

Result = Literal["yes", "no", "not supported by the base", "not applicable"]
# Found and expected values that should be equal: phi and log-probabilities in nats, losses, gradients.
Pairs = Iterator[tuple[Tensor, Tensor]]

LENGTH = 12  # tokens of a text that is tried; a model's windows and contexts may be longer
TOLERANCE = 1e-4  # in float32; in coarser formats so many times their unit of rounding:
_ROUNDINGS = 4


@dataclass(frozen=True)
class Proof:
    """What came of one promise.

    Attributes:
        name: short name.
        promise: what should hold.
        result: `not supported by the base` if the base with the layer disabled fails the same trial.
        difference: the largest difference from what it should be, in nats (of gradients, as a share of the
            largest); None where nothing is measured.
        allowed: how large it may be; 0 for bit-identical.
        note: why it is not `yes`.
    """

    name: str
    promise: str
    result: Result
    difference: float | None = None
    allowed: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Point:
    """One insertion point.

    Attributes:
        path: its module path.
        width: D of the hidden states there.
        latent_size: L.
        below, above: blocks up to and including it, and after it; None where blocks cannot be told.
    """

    path: str
    width: int
    latent_size: int
    below: int | None
    above: int | None


@dataclass(frozen=True)
class CheckReport:
    """The plan of a `PHiModel` and what was proven on it; `str()` or `table()` show it.

    Attributes:
        base: class of the base model.
        mode: `bottleneck` or `observe`.
        points: the insertion points.
        base_dtype, layer_dtype: of their weights.
        base_parameters, base_trainable, layer_parameters, layer_trainable: numbers of parameters.
        tolerance: a value may differ by this much + this share of the largest of its kind.
        proofs: one for each promise.
    """

    base: str
    mode: str
    points: list[Point]
    base_dtype: str
    layer_dtype: str
    base_parameters: int
    base_trainable: int
    layer_parameters: int
    layer_trainable: int
    tolerance: float
    proofs: list[Proof] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no promise is broken."""
        return not any(proof.result == "no" for proof in self.proofs)

    @property
    def results(self) -> dict[str, Result]:
        """Result by name."""
        return {proof.name: proof.result for proof in self.proofs}

    def plan(self) -> list[str]:
        """Lines that say what is where."""
        lines = []
        for point in self.points:
            blocks = "" if point.below is None else f"; {point.below} blocks below, {point.above} above"
            lines.append(f"after {point.path}: width {point.width}, latent size {point.latent_size}{blocks}")
        for name, dtype, count, trainable in (
            ("base", self.base_dtype, self.base_parameters, self.base_trainable),
            ("layer", self.layer_dtype, self.layer_parameters, self.layer_trainable),
        ):
            lines.append(f"{name}: {dtype}, {trainable:,} parameters trainable, {count - trainable:,} frozen")
        return lines

    def table(self) -> Any:
        """The plan and the proofs as a rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        styles = {"yes": "green", "no": "bold red"}
        table = Table(
            title=Text("\n".join([f"{self.base}, mode {self.mode}", *self.plan()])),
            caption=Text(
                f"Differences in nats. Allowed: {self.tolerance:g} + {self.tolerance:g} of the largest value"
                f"{'' if self.tolerance == TOLERANCE else f', as suits {self.base_dtype}'}; 0 is bit-identical."
            ),
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("promise")
        table.add_column("holds")
        for heading in ("difference", "allowed"):
            table.add_column(heading, justify="right", no_wrap=True)
        for proof in self.proofs:
            numbers = ("" if n is None else f"{n:.1e}" if n else "0" for n in (proof.difference, proof.allowed))
            result = Text(proof.result, style=styles.get(proof.result, "yellow"))
            if proof.note:
                result.append(f" ({proof.note})", style="dim")
            table.add_row(Text(proof.promise), result, *numbers)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=110)
        console.print(self.table())
        return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


class _NotApplicable(Exception):
    """A promise that this model does not call for."""


@dataclass
class _Trial:
    """A lens and texts to try it on."""

    lens: "PHiModel"
    ids: Tensor  # (3, T) token ids
    backend: str = ""

    def values(self, output: "PHiModelOutput", ids: Tensor) -> list[Tensor]:
        """Phi, where enabled, and log-probabilities (B, T, V)."""
        logprobs = output.logits_at(slice(0, ids.shape[1])).log_softmax(-1)
        return [logprobs] if output.phi is None else [output.phi, logprobs]

    def read(self, ids: Tensor, **options: Any) -> list[Tensor]:
        """Phi, where enabled, and log-probabilities of texts (B, T)."""
        return self.values(self.lens(ids, **options), ids)

    def documents(self) -> list[Tensor]:
        """The texts, cut to different lengths (1, t)."""
        length = self.ids.shape[1]
        return [row[None, :cut] for row, cut in zip(self.ids, (length, length // 2, 1), strict=True)]

    def learn(self, model: Callable[..., Any] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Loss, phi and logits with labels and fixed noise; gradients of the layer, and of the embedded tokens
        where no other model (the compiled one) is given."""
        lens, embedded = self.lens, []
        torch.manual_seed(0)

        def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_(True))
            return embedded[-1]

        embedding = _embedding(lens.base) if model is None else None
        handle = None if embedding is None else embedding.register_forward_hook(note)
        try:
            output = (lens if model is None else model)(self.ids, labels=self.ids)
        finally:
            if handle is not None:
                handle.remove()
        sources = [*lens.phi.parameters(), *embedded[:1]]
        found = torch.autograd.grad(output.loss, sources, allow_unused=True)
        gradients = [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]
        return [output.loss, output.phi, output.logits.detach()], gradients


Function = Callable[[_Trial], Pairs]
_PROOFS: list[tuple[str, str, Function, bool, bool]] = []


def _proof(name: str, promise: str, exact: bool = False, of_base: bool = True) -> Callable[[Function], Function]:
    """Register a trial; one `of_base` can be tried with the layer disabled too."""

    def register(function: Function) -> Function:
        _PROOFS.append((name, promise, function, exact, of_base))
        return function

    return register


@_proof("disabled", "disabled, the model is the base, bit for bit", exact=True, of_base=False)
def _disabled(trial: _Trial) -> Pairs:
    lens, ids = trial.lens, trial.ids
    lens(ids)
    with lens.disabled():
        yield lens(ids).logits, lens._call_base(ids, {})


@_proof("gradient", "a frozen base gets no gradient, the layer does", of_base=False)
def _gradient(trial: _Trial) -> Pairs:
    layer = list(trial.lens.phi.parameters())
    with torch.enable_grad():
        loss = trial.lens(trial.ids, labels=trial.ids).loss
        reached = _leaves(loss)
        gradients = torch.autograd.grad(loss, layer, allow_unused=True)
    if any(id(parameter) in reached for parameter in trial.lens.base.parameters()):
        raise InputError("the loss reaches parameters of the frozen base")
    if missing := sum(gradient is None for gradient in gradients):
        raise InputError(f"the loss does not reach {missing} of the layer's {len(layer)} parameters")
    total = sum(float(gradient.float().norm()) for gradient in gradients)
    if not 0 < total < math.inf:
        raise InputError(f"the norm of the layer's gradient is {total}")
    yield from ()  # nothing to compare


@_proof("causal", "phi does not depend on later tokens")
def _causal(trial: _Trial) -> Pairs:
    ids, cut = trial.ids, trial.ids.shape[1] // 2
    other = torch.cat((ids[:, :cut], ids[:, cut:].roll(1, 0)), 1)
    for found, expected in zip(trial.read(other), trial.read(ids), strict=True):
        yield found[:, :cut], expected[:, :cut]


@_proof("batch", "alone or in a batch")
def _batch(trial: _Trial) -> Pairs:
    alone = [trial.read(row[None]) for row in trial.ids]
    for found, expected in zip(trial.read(trial.ids), zip(*alone, strict=True), strict=True):
        yield found, torch.cat(expected)


def _padded(trial: _Trial, left: bool) -> Pairs:
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


@_proof("right padding", "with padding on the right")
def _right_padding(trial: _Trial) -> Pairs:
    return _padded(trial, left=False)


@_proof("left padding", "with padding on the left")
def _left_padding(trial: _Trial) -> Pairs:
    return _padded(trial, left=True)


@_proof("packing", "packed after one another, with position_ids")
def _packing(trial: _Trial) -> Pairs:
    documents = trial.documents()
    positions = torch.cat([torch.arange(d.shape[1], device=d.device)[None] for d in documents], 1)
    alone = [trial.read(document) for document in documents]
    found = trial.read(torch.cat(documents, 1), position_ids=positions)
    for one, expected in zip(found, zip(*alone, strict=True), strict=True):
        yield one, torch.cat(expected, 1)


@_proof("cache", "token by token, with the cache")
def _cache(trial: _Trial) -> Pairs:
    cache, steps = None, []
    for t in range(trial.ids.shape[1]):
        one = trial.ids[:, t : t + 1]
        output = trial.lens(one, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(trial.values(output, one))
    for found, expected in zip(zip(*steps, strict=True), trial.read(trial.ids), strict=True):
        yield torch.cat(found, 1), expected


@_proof("early exit", 'stopped at the layer (returns="phi")', of_base=False)
def _early_exit(trial: _Trial) -> Pairs:
    yield trial.lens(trial.ids, returns="phi").phi, trial.lens(trial.ids).phi


@_proof("states", 'with logits made in parts (returns="states")')
def _states(trial: _Trial) -> Pairs:
    yield from zip(trial.read(trial.ids, returns="states"), trial.read(trial.ids), strict=True)
    whole, parts = (trial.lens(trial.ids, labels=trial.ids, returns=r) for r in ("logits", "states"))
    yield parts.loss, whole.loss


@_proof("observing", "observing leaves logits bit-identical", exact=True, of_base=False)
def _observing(trial: _Trial) -> Pairs:
    with trial.lens.disabled():
        plain = trial.lens(trial.ids).logits
    for lens in _alone(trial.lens, "observe"):
        yield lens(trial.ids).logits, plain


@_proof("same phi", "observing and in the path, phi is the same", of_base=False)
def _same_phi(trial: _Trial) -> Pairs:
    found = trial.lens(trial.ids).phi
    other = "bottleneck" if trial.lens.config.mode == "observe" else "observe"
    for number, lens in enumerate(_alone(trial.lens, other)):
        yield (found[..., number] if found.ndim == 3 else found), lens(trial.ids).phi


def _generated(trial: _Trial, prompt: Tensor, **options: Any) -> Pairs:
    lens = trial.lens
    if not hasattr(lens.base, "generate"):
        raise _NotApplicable("the base has no generate")
    # The model's own settings may forbid or force tokens; they are put back.
    from transformers import GenerationConfig

    base: Any = lens.base
    own, base.generation_config = base.generation_config, GenerationConfig(pad_token_id=0)
    try:
        generated = lens.generate(prompt, max_new_tokens=LENGTH - prompt.shape[1], **options)
    finally:
        base.generation_config = own
    for row, ids in enumerate(generated.sequences):
        output = lens(ids[None])
        yield generated.surprisal[row, 1:], token_surprisal(output, ids[None])[0, 1:]
        if output.phi is not None:
            yield generated.phi[row], output.phi[0]
        if not options.get("do_sample") and options.get("num_beams", 1) == 1:
            # What was chosen is the likeliest by the finished text, with the layer in the path or not.
            start = generated.prompt_length
            logprobs = output.logits[0, start - 1 : -1].float().log_softmax(-1)
            yield logprobs.gather(1, ids[start:, None])[:, 0], logprobs.amax(1)


@_proof("greedy", "generated greedily, scores are those of the finished text")
def _greedy(trial: _Trial) -> Pairs:
    return _generated(trial, trial.ids[:2, : LENGTH // 2], do_sample=False)


@_proof("sampling", "... by sampling")
def _sampling(trial: _Trial) -> Pairs:
    return _generated(trial, trial.ids[:2, : LENGTH // 2], do_sample=True)


@_proof("beams", "... by beams")
def _beams(trial: _Trial) -> Pairs:
    prompt = trial.ids[:2, : LENGTH // 2]
    return _generated(trial, prompt, do_sample=False, num_beams=3, num_return_sequences=2)


@_proof("assisted", "... assisted, by prompt lookup")
def _assisted(trial: _Trial) -> Pairs:
    prompt = trial.ids[:1, : LENGTH // 4].repeat(1, 2)
    return _generated(trial, prompt, do_sample=False, prompt_lookup_num_tokens=2)


@_proof("checkpointing", "activations recomputed: same loss and gradients, the layer runs once", of_base=False)
def _checkpointing(trial: _Trial) -> Pairs:
    lens, calls = trial.lens, []
    try:
        find_blocks(lens.base)
    except InsertionError as error:
        raise _NotApplicable(str(error).split(";")[0].split("(")[0].strip()) from error
    recomputed = bool(lens._undo_recompute)
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in lens.layers]
    try:
        with torch.enable_grad():
            lens.phi.train()
            lens.keep_activations()
            expected, gradients = trial.learn()
            lens.checkpoint_activations()
            calls.clear()
            found, gradients_again = trial.learn()
    finally:
        lens.phi.eval()
        lens.keep_activations()
        if recomputed:
            lens.checkpoint_activations()
        for handle in handles:
            handle.remove()
    if len(calls) != len(lens.layers):
        raise InputError(f"{len(lens.layers)} layers ran {len(calls)} times")
    yield from zip(found, expected, strict=True)
    yield from _relative(gradients_again, gradients)


@_proof("compiled", "compiled by torch.compile: same values, loss and gradients")
def _compiled(trial: _Trial) -> Pairs:
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
    if counters["stats"]["unique_graphs"] == graphs:
        raise InputError("nothing was compiled")


@_proof("saved", "saved and loaded", of_base=False)
def _saved(trial: _Trial) -> Pairs:
    from philens.adapter import load

    lens, expected = trial.lens, trial.read(trial.ids)
    with tempfile.TemporaryDirectory() as folder, lens.disabled():
        lens.save_pretrained(folder)
        loaded = load(lens.base, folder)
        try:
            _deterministic(loaded)
            found = _Trial(loaded, trial.ids).read(trial.ids)
        finally:
            loaded.detach()
    yield from zip(found, expected, strict=True)


def _relative(found: list[Tensor], expected: list[Tensor]) -> Pairs:
    """Gradients as shares of the largest of their tensor."""
    for one, other in zip(found, expected, strict=True):
        largest = other.abs().max().clamp(min=torch.finfo(other.dtype).tiny)
        yield one / largest, other / largest


def _alone(lens: "PHiModel", mode: Literal["bottleneck", "observe"]) -> Iterator["PHiModel"]:
    """Each layer in turn in a model of its own, in another mode."""
    from philens.model import attach

    for path, layer in zip(lens.module_paths, lens.layers, strict=True):
        config = replace(
            lens.config, layer=None, layers=None, module=path, mode=mode, pressure="next_token"
        )
        with lens.disabled():
            other = attach(lens.base, config)
            other.phi = layer
            try:
                yield other.eval()
            finally:
                other.disable()


def _leaves(loss: Tensor) -> set[int]:
    """Ids of the tensors that a backward pass from here would give a gradient."""
    seen, waiting, leaves = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return leaves


def _embedding(base: Any) -> nn.Module | None:
    """The module that embeds tokens."""
    try:
        return base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return next((m for m in base.modules() if isinstance(m, nn.Embedding)), None)


def _token_ids(base: nn.Module, rows: int, length: int) -> Tensor:
    """(rows, length) random ids of the base's vocabulary, without those of special meaning.

    Raises:
        InputError: its vocabulary is not known.
    """
    embedding, config = _embedding(base), text_config(base)
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


def _deterministic(lens: "PHiModel") -> None:
    for layer in lens.layers:
        layer.config = replace(layer.config, inference="mean", samples=1)


@contextlib.contextmanager
def _untouched(lens: "PHiModel") -> Iterator[None]:
    """Evaluation mode, base frozen, layers in and deterministic, no warnings; afterwards all is as it was."""
    from transformers.utils import logging

    modes = [(module, module.training) for module in lens.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in lens.parameters()]
    configs, enabled, verbosity = [layer.config for layer in lens.layers], lens.enabled, logging.get_verbosity()
    once = len(lens._not_recomputed)
    devices = {p.device for p in lens.parameters() if p.device.type == "cuda"}
    try:
        logging.set_verbosity_error()
        _deterministic(lens)
        lens.eval()
        lens.base.requires_grad_(False)
        lens.phi.requires_grad_(True)
        lens.enable()
        with torch.random.fork_rng(devices), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        for layer, config in zip(lens.layers, configs, strict=True):
            layer.config = config
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        for module in lens._not_recomputed[once:]:
            module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        del lens._not_recomputed[once:]
        if not enabled:
            lens.disable()


def check(lens: "PHiModel", compile: bool | str = False) -> CheckReport:
    """Try every promise on this very model, with random tokens of its vocabulary.

    The model is as before afterwards: weights, gradients, modes, hooks and random state. Layers that sample
    in evaluation are tried with the mean latent.

    Args:
        compile: try `torch.compile` too, which takes a while; a string names the backend.

    Raises:
        InputError: the base's vocabulary is not known.
    """
    trial = _Trial(lens, _token_ids(lens.base, 3, LENGTH), "inductor" if compile is True else compile or "")
    report = _plan(lens)
    with _untouched(lens):
        for name, promise, function, exact, of_base in _PROOFS:
            if name != "compiled" or compile:
                outcome = _outcome(trial, function, 0.0 if exact else report.tolerance, of_base)
                report.proofs.append(Proof(name, promise, *outcome))
    return report


def _plan(lens: "PHiModel") -> CheckReport:
    try:
        path, blocks = find_blocks(lens.base)
    except InsertionError:
        path, blocks = "", ()
    points = []
    for module_path, layer in zip(lens.module_paths, lens.layers, strict=True):
        inside = [i for i in range(len(blocks)) if f"{module_path}.".startswith(f"{path}.{i}.")]
        below, above = (inside[0] + 1, len(blocks) - inside[0] - 1) if inside else (None, None)
        points.append(Point(module_path, layer.hidden_size, layer.latent_size, below, above))
    base, phi = list(lens.base.parameters()), list(lens.phi.parameters())
    dtypes = {p.dtype for p in base if p.is_floating_point()}
    coarsest = max((torch.finfo(dtype).eps for dtype in {*dtypes, *(p.dtype for p in phi)}), default=0.0)
    return CheckReport(
        base=type(lens.base).__name__,
        mode=lens.config.mode,
        points=points,
        base_dtype=" and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        layer_dtype=str(phi[0].dtype).removeprefix("torch."),
        base_parameters=sum(p.numel() for p in base),
        base_trainable=sum(p.numel() for p in base if p.requires_grad),
        layer_parameters=sum(p.numel() for p in phi),
        layer_trainable=sum(p.numel() for p in phi if p.requires_grad),
        tolerance=max(TOLERANCE, _ROUNDINGS * coarsest),
    )


def _outcome(
    trial: _Trial, function: Function, tolerance: float, of_base: bool
) -> tuple[Result, float | None, float | None, str]:
    difference, allowed, note, holds = _try(trial, function, tolerance)
    if holds is None:
        return "not applicable", None, None, note
    if holds:
        return "yes", difference, allowed, note
    if of_base:
        with trial.lens.disabled():
            *tried, holds = _try(trial, function, tolerance)
        if not holds:
            return "not supported by the base", *tried
    return "no", difference, allowed, note


def _try(
    trial: _Trial, function: Function, tolerance: float
) -> tuple[float | None, float | None, str, bool | None]:
    """Largest difference, what is allowed, a note, and whether it holds; None if it does not apply."""
    worst, difference, allowed = -1.0, None, None
    try:
        for found, expected in function(trial):
            if found.shape != expected.shape:
                raise InputError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
            found, expected = found.double(), expected.double()
            one = float((found - expected).abs().nan_to_num(torch.inf).max())
            may = tolerance * (1 + float(expected.abs().max()))
            share = one / may if may else one
            if share > worst:
                worst, difference, allowed = share, one, may
    except _NotApplicable as reason:
        return None, None, str(reason), None
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        return None, None, f"{type(error).__name__}: {first}" if first else type(error).__name__, False
    return difference, allowed, "", worst <= 1 if tolerance else worst <= 0
