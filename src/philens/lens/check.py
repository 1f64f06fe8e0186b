"""Verify the guarantees of philens on a given model."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch

from philens.bases.facts import evaluating
from philens.lens.config import SINK
from philens.lens.insertion import find_blocks
from philens.lens.metrics import supports
from philens.lens.proofs import LENGTH, PROMISES, Result, Trial, make_deterministic, outcome, token_ids
from philens.support.errors import InsertionError

if TYPE_CHECKING:
    from philens.lens.core import LensCore

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
        latent_size: L; None of a shallow head.
        below: blocks up to and including it; None where blocks cannot be told.
        above: blocks after it; None where blocks cannot be told.
        sinks: attention sinks among the tokens tried: by place in the text, how many times as long as the
            median its hidden state is.
        knows_sinks: whether the layer has been calibrated, and so tells sinks from other tokens.
    """

    path: str
    width: int
    latent_size: int | None
    below: int | None
    above: int | None
    sinks: dict[int, float] = field(default_factory=dict)
    knows_sinks: bool = True


@dataclass(frozen=True)
class CheckReport:
    """The plan of a `PHiModel` and what was proven on it; `str()` or `table()` show it.

    Attributes:
        base: class of the base model.
        mode: `bottleneck` or `observe`.
        points: the insertion points.
        base_dtype: precision of the base's weights.
        layer_dtype: precision of the layers' weights.
        base_parameters: how many the base has.
        base_trainable: how many of them are trained.
        layer_parameters: how many the layers have.
        layer_trainable: how many of them are trained.
        tolerance: a value may differ by this much + this share of the largest of its kind.
        proofs: one for each promise.
        metrics: for each metric of `philens.score` why the model cannot have it, None where it can.
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
    metrics: dict[str, str | None] = field(default_factory=dict)

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
            what = "shallow head" if point.latent_size is None else f"latent size {point.latent_size}"
            lines.append(f"after {point.path}: width {point.width}, {what}{blocks}")
            for place, times in point.sinks.items():
                advice = "" if point.knows_sinks else "; calibrate the layer, which does not know of them"
                lines.append(
                    f"  token {place} is an attention sink, {times:,.0f} times the median norm{advice}"
                )
        for name, dtype, count, trainable in (
            ("base", self.base_dtype, self.base_parameters, self.base_trainable),
            ("layer", self.layer_dtype, self.layer_parameters, self.layer_trainable),
        ):
            lines.append(f"{name}: {dtype}, {trainable:,} parameters trainable, {count - trainable:,} frozen")
        lines += [f"no {name}: {reason}" for name, reason in self.metrics.items() if reason is not None]
        return lines

    def table(self) -> Any:
        """The plan and the proofs as a rich table."""
        from rich.text import Text

        from philens.show.terminal import new_table

        styles = {"yes": "green", "no": "bold red"}
        suited = "" if self.tolerance == TOLERANCE else f", as suits {self.base_dtype}"
        table = new_table(
            "\n".join([f"{self.base}, mode {self.mode}", *self.plan()]),
            f"Differences in nats. Allowed: {self.tolerance:g} + {self.tolerance:g} of the largest value"
            f"{suited}; 0 is bit-identical.",
            *("promise", "holds", "difference", "allowed"),
        )
        table.columns[1].justify, table.columns[1].no_wrap = "left", False
        for proof in self.proofs:
            pair = (proof.difference, proof.allowed)
            numbers = ("" if number is None else f"{number:.1e}" if number else "0" for number in pair)
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


@contextlib.contextmanager
def _untouched(lens: "LensCore") -> Iterator[None]:
    """Evaluation mode, base frozen, layers in and deterministic, no warnings; afterwards all is as it was."""
    from transformers.utils import logging

    wanted = [(parameter, parameter.requires_grad) for parameter in lens.parameters()]
    configs, enabled = [layer.config for layer in lens.layers], lens.enabled
    verbosity = logging.get_verbosity()
    once = len(lens._not_recomputed)
    devices = {p.device for p in lens.parameters() if p.device.type == "cuda"}
    try:
        logging.set_verbosity_error()
        make_deterministic(lens)
        lens.base.requires_grad_(False)
        lens.attached.requires_grad_(True)
        lens.enable()
        with torch.random.fork_rng(devices), warnings.catch_warnings(), evaluating(lens):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        for layer, config in zip(lens.layers, configs, strict=True):
            layer.config = config
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        for module in lens._not_recomputed[once:]:
            module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        del lens._not_recomputed[once:]
        if not enabled:
            lens.disable()


def check(lens: "LensCore", compile: bool | str = False) -> CheckReport:
    """Try every promise on this very model, with random tokens of its vocabulary.

    The model is as before afterwards: weights, gradients, modes, hooks and random state. Layers that sample
    in evaluation are tried with the mean latent.

    Args:
        compile: try `torch.compile` too, which takes a while; a string names the backend.

    Raises:
        InputError: the base's vocabulary is not known.
    """
    trial = Trial(lens, token_ids(lens.base, 3, LENGTH), "inductor" if compile is True else compile or "")
    report = _plan(lens)
    with _untouched(lens):
        outputs = lens(trial.ids, returns="phi").layer_outputs if lens.layers else []
        for number, (layer, output) in enumerate(zip(lens.layers, outputs, strict=True)):
            found, knows = sinks(output.observed), bool(layer.sink_norm > 0)
            report.points[number] = replace(report.points[number], sinks=found, knows_sinks=knows)
        report.metrics.update(supports(lens))
        for promise in PROMISES:
            if promise.name != "compiled" or compile:
                found = outcome(trial, promise, report.tolerance)
                report.proofs.append(Proof(promise.name, promise.meaning, *found))
    return report


def sinks(states: torch.Tensor) -> dict[int, float]:
    """Attention sinks among hidden states (B, T, D): by place, how many times as long as the median."""
    norms = torch.linalg.vector_norm(states.float(), dim=-1)
    longest = (norms / norms.median().clamp(min=1e-30)).amax(0)
    return {place: times for place, times in enumerate(longest.tolist()) if times > SINK}


def _plan(lens: "LensCore") -> CheckReport:
    try:
        path, blocks = find_blocks(lens.base)
    except InsertionError:
        path, blocks = "", ()
    points = []
    for module_path, part in zip(lens.module_paths, lens.instruments, strict=True):
        inside = [i for i in range(len(blocks)) if f"{module_path}.".startswith(f"{path}.{i}.")]
        below, above = (inside[0] + 1, len(blocks) - inside[0] - 1) if inside else (None, None)
        size = getattr(part, "latent_size", None)
        points.append(Point(module_path, part.hidden_size, size, below, above))
    base, phi = list(lens.base.parameters()), list(lens.attached.parameters())
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
