"""AdamW, or Muon for weight matrices with AdamW for the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from philens.training.distributed import shard_state
from philens.training.recipe import OptimizerRecipe


class ChainedOptimizer(Optimizer):
    """Several optimisers over disjoint parameters, as one for schedulers and checkpoints."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        # Not Optimizer.__init__: groups and state belong to the parts, and are read from them.
        self.optimizers = optimizers
        self.defaults = {}
        self._optimizer_step_pre_hooks = {}
        self._optimizer_step_post_hooks = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            load_state(optimizer, state)


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> Optimizer:
    """The recipe's optimiser over a model's trainable parameters; only matrices decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    optimizers: list[Optimizer] = []
    if recipe.name == "muon":
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        hidden = [p for p in matrices if p.ndim == 2 and id(p) not in tables]
        # Updates as large as AdamW's (Liu et al. 2025, arXiv 2502.16982): one learning rate fits both.
        options: dict[str, Any] = {"weight_decay": recipe.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(Muon(hidden, lr=recipe.learning_rate, **options))
        taken = {id(p) for p in hidden}
        matrices = [p for p in matrices if id(p) not in taken]
    decays = ((matrices, recipe.weight_decay), (vectors, 0.0))
    groups = [{"params": params, "weight_decay": decay} for params, decay in decays if params]
    if groups:
        betas = (recipe.beta1, recipe.beta2)
        fused = torch.accelerator.is_available() or None  # on a CPU, what torch takes by default
        optimizers.append(AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=fused))
    return ChainedOptimizer(optimizers) if len(optimizers) > 1 else optimizers[0]


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the whole state of an optimiser, as a checkpoint has it; its parameters may be sharded.

    Raises:
        ValueError: a number in it is not finite.
    """
    if isinstance(optimizer, ChainedOptimizer):
        return optimizer.load_state_dict(state)
    values = (value for kept in state["state"].values() for value in kept.values())
    if not all(torch.as_tensor(value).isfinite().all() for value in values):
        raise ValueError("a number in it is not finite")
    optimizer.load_state_dict(shard_state(optimizer, state))
