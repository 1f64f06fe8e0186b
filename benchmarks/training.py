"""Rows about training steps: forward, backward, clipping, optimiser. Shapes: B rows, T tokens, D width."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.harness import Bench, Comparison, Target, total
from benchmarks.models import frozen_llama, packed_batch, real_base, scratch_recipe
from philens.lens.model import PHiModel
from philens.training.build import start_model
from philens.training.optimizer import make_optimizer
from philens.training.recipe import Recipe, load_recipe

Step = Callable[[], object]


def training_step(bench: Bench, module: nn.Module, recipe: Recipe, loss: Callable[[], Tensor]) -> Step:
    """A whole step on the parameters of `module` that train."""
    module.train()
    optimizer = make_optimizer(module, recipe.optimizer)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> None:
        with bench.autocast():
            value = loss()
        value.backward()
        clip_grad_norm_(parameters, recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def lens_step(bench: Bench, lens: PHiModel, recipe: Recipe, batch: dict[str, Tensor]) -> Step:
    """A step as training by a recipe takes it, compiled where the recipe says so."""
    if recipe.train.compile:
        lens.compile(dynamic=False)
    inputs = {**batch, "returns": "states", "packed": recipe.data.packing}
    return training_step(bench, lens, recipe, lambda: lens(**inputs).loss)


def training(bench: Bench) -> list[Comparison]:
    """A step from scratch in the paper's shape, with the layer and without, on the same packed rows."""
    recipe, plain_recipe = scratch_recipe(bench), scratch_recipe(bench, phi=None)
    batch = packed_batch(bench, recipe)
    lens, plain, bare = (start_model(one)[0].to(bench.device) for one in (recipe, plain_recipe, plain_recipe))
    base: Any = bare.detach()
    if recipe.train.compile:
        base.compile(dynamic=False)
    # A pack's documents are known by their positions; a mask of padding would hide that from transformers.
    own = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    seconds = bench.alternate(
        {
            "training step with the layer": lens_step(bench, lens, recipe, batch),
            "plain model's step": lens_step(bench, plain, plain_recipe, batch),
            "plain model's step by transformers": training_step(
                bench, base, plain_recipe, lambda: base(**own, use_cache=False).loss
            ),
        }
    )
    ours, theirs, transformers = seconds.values()
    note = f"{shape_text(batch)} packed, {model_text(lens)}, {precision_text(bench, recipe)}"
    return [
        Comparison(ours, theirs, Target(1.15), note),
        Comparison(ours, transformers, None, "the same, with the loss of transformers"),
    ]


class _Reached(Exception):
    """The forward pass has come to the place that was wanted."""


class Parts:
    """A step with a layer in a frozen Llama, cut into its parts, each on what the whole one computed.

    Args:
        lens: a Llama whose layer stands after block `number`.
    """

    def __init__(self, bench: Bench, lens: PHiModel, recipe: Recipe, batch: dict[str, Tensor]) -> None:
        self.bench, self.recipe, self.lens = bench, recipe, lens
        base: Any = lens.base
        self.base, self.number = base, int(lens.config.layer or 0)
        self.labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        first = base.model.layers[self.number + 1]
        calls: dict[str, tuple[Any, Any]] = {}

        def keep(name: str, module: nn.Module) -> Any:
            note = lambda _, args, kwargs: calls.setdefault(name, (args, kwargs))  # noqa: E731
            # A pre-hook's result would replace the arguments.
            return module.register_forward_pre_hook(lambda *call: (note(*call), None)[1], with_kwargs=True)

        handles = [keep("layer", lens.phi), keep("base", base), keep("above", first)]
        with torch.no_grad(), bench.autocast():
            lens.eval()
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            lens(**inputs, returns="states", packed="position_ids" in batch)
        for handle in handles:
            handle.remove()
        (self.hidden, *self.structure), self.options = calls["layer"]
        self.base_call, (_, self.above_options) = calls["base"], calls["above"]
        self.above_input = calls["above"][0][0]
        self.layer = copy.deepcopy(lens.phi)
        with torch.no_grad(), bench.autocast():
            self.states = base.model.norm(self._above(self.above_input))

    def _above(self, hidden: Tensor) -> Tensor:
        for block in self.base.model.layers[self.number + 1 :]:
            hidden = block(hidden, **self.above_options)
        return hidden

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        def stop(*_: Any) -> None:
            raise _Reached

        handle = self.base.model.layers[self.number + 1].register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(_Reached), self.lens.disabled():
                yield
        finally:
            handle.remove()

    def below(self) -> None:
        """The blocks up to the layer, without gradient."""
        args, kwargs = self.base_call
        with torch.no_grad(), self.bench.autocast(), self._stopping():
            self.base(*args, **kwargs)

    def plain(self) -> None:
        """The whole base with logits, without gradient."""
        args, kwargs = self.base_call
        with torch.no_grad(), self.bench.autocast(), self.lens.disabled():
            self.base(*args, **kwargs)

    def layer_step(self) -> Step:
        """The layer alone: forward, backward from phi and from above, clipping, optimiser."""
        upstream = torch.randn_like(self.hidden)
        config = self.lens.config

        def loss() -> Tensor:
            output = self.layer(self.hidden, *self.structure, **self.options)
            phi = config.phi_weight / output.latent.shape[-1] * output.phi.mean()
            return phi + (output.hidden_states * upstream).sum()

        return training_step(self.bench, self.layer, self.recipe, loss)

    def above(self) -> None:
        """The blocks above the layer and the norm: forward, and backward to their input."""
        hidden = self.above_input.detach().requires_grad_()
        with self.bench.autocast():
            states = self.base.model.norm(self._above(hidden))
        states.backward(torch.ones_like(states))

    def above_forward(self) -> None:
        """The blocks above the layer and the norm, without gradient."""
        with torch.no_grad(), self.bench.autocast():
            self.base.model.norm(self._above(self.above_input))

    def head(self) -> None:
        """Logits and cross-entropy: forward, and backward to the states that the head reads."""
        states = self.states.detach().requires_grad_()
        with self.bench.autocast():
            logits = self.base.lm_head(states).float().flatten(0, 1)
            F.cross_entropy(logits, self.labels.flatten()).backward()

    def head_forward(self) -> None:
        """Logits alone, without gradient."""
        with torch.no_grad(), self.bench.autocast():
            self.base.lm_head(self.states)

    def layer_forward(self) -> None:
        """The layer alone in evaluation mode, without gradient."""
        self.layer.eval()
        with torch.no_grad(), self.bench.autocast():
            self.layer(self.hidden, *self.structure, **self.options)


def frozen(bench: Bench) -> list[Comparison]:
    """A step with a frozen base of Llama 3.2 3B's proportions, against the sum of its parts."""
    blocks, width = bench.pick((2, 384), (12, 768), (28, 3072))
    changes = {"data__length": bench.pick(64, 1024, 2048)}
    with frozen_llama(bench, blocks, width, **changes) as (lens, tokenizer, recipe):
        batch = packed_batch(bench, recipe, tokenizer)
        parts = Parts(bench, lens, recipe, batch)
        seconds = bench.alternate(
            {
                "training step, frozen base": lens_step(bench, lens, recipe, batch),
                "plain forward pass with logits": parts.plain,
                "below": parts.below,
                "layer": parts.layer_step(),
                "above": parts.above,
                "head": parts.head,
            }
        )
        ours, plain, *pieces = seconds.values()
        share = f"layer after {parts.number + 1} of {blocks} blocks"
        note = f"{shape_text(batch)} packed, {model_text(lens)}, {share}, {precision_text(bench, recipe)}"
    ideal = total("sum of its parts", pieces)
    details = {"parts_seconds": {piece.name: piece.median for piece in pieces}}
    return [
        Comparison(ours, ideal, Target(1.15), note, details),
        Comparison(ours, plain, None, "no gradient"),
    ]


def real(bench: Bench) -> list[Comparison]:
    """Tokens per second by the recipe smollm2, beside a step of philens 0.1 and the sum of its parts."""
    changes: dict[str, Any] = {"data.parts": {"automata": {"source": "automata"}}}
    if bench.scale == "smoke":
        changes |= {"phi.layer": 1, "data.length": 64, "train.batch_size": 2}
    else:
        changes |= {"data.length": 512}
    # In the path, all rows press by the next token, weights in float32 that each step casts.
    before: dict[str, Any] = {
        "model.dtype": "float32",
        "phi.mode": "bottleneck",
        "phi.pressure": "next_token",
    }
    before |= {"phi.pressure_share": 1.0, "train.batch_size": bench.pick(2, 4, 4)}
    with real_base(bench) as base:
        recipe = load_recipe("smollm2", {"model.base": base, **changes})
        earlier = load_recipe("smollm2", {"model.base": base, **changes, **before})
        lens, tokenizer = start_model(recipe)
        batch = packed_batch(bench, recipe, tokenizer)
        pressing = max(1, round(recipe.train.batch_size * recipe.phi.pressure_share))  # pyright: ignore[reportOptionalMemberAccess]
        parts = Parts(bench, lens, recipe, batch)
        few = Parts(bench, lens, recipe, {name: value[:pressing] for name, value in batch.items()})
        old, old_batch = start_model(earlier)[0], packed_batch(bench, earlier, tokenizer)
        seconds = bench.alternate(
            {
                "step by the recipe smollm2": lens_step(bench, lens, recipe, batch),
                "step as philens 0.1 took it": lens_step(bench, old, earlier, old_batch),
                "below": parts.below,
                "layer": parts.layer_step(),
                "above": few.above,
                "above, the base's own": few.above_forward,
                "head": few.head,
                "head, the base's own": few.head_forward,
            }
        )
    ours, theirs, *pieces = seconds.values()
    rates = [
        one.per_second(rows["input_ids"].numel(), "tokens")
        for one, rows in ((ours, batch), (theirs, old_batch))
    ]
    note = f"{shape_text(batch)}, {pressing} pressing; {model_text(lens)}, {precision_text(bench, recipe)}"
    details = {"parts_seconds": {piece.name: piece.median for piece in pieces}}
    return [
        Comparison(*rates, Target(1.6, at_most=False), note),
        Comparison(ours, total("sum of its parts", pieces), Target(1.15), note, details),
    ]


def shape_text(batch: dict[str, Tensor]) -> str:
    rows, length = batch["input_ids"].shape
    return f"{rows} rows of {length:,} tokens"


def model_text(lens: PHiModel) -> str:
    config: Any = lens.base.config
    return f"{config.num_hidden_layers} blocks of {config.hidden_size}, vocabulary {config.vocab_size:,}"


def precision_text(bench: Bench, recipe: Recipe) -> str:
    compiled = ", compiled" if recipe.train.compile else ""
    return f"{str(bench.dtype).removeprefix('torch.')}{compiled}"
