"""The row about another implementation of the layer, from its user. Shapes: B rows, T tokens, D width."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Bench, Comparison, Series, Unavailable
from benchmarks.layer import hidden_states, layer_work
from philens.lens.config import PHiConfig
from philens.lens.layer import PHiLayer
from philens.support.errors import ConfigError, InputError

SEE = "python -m benchmarks --help says what it must offer"


def load(path: Path) -> ModuleType:
    """A Python file, or a folder with an `__init__.py`, that offers `PHiLayer(hidden_size)`, a torch module.

    It is called with hidden states (B, T, D) and returns two tensors: decoded hidden states (B, T, D) and
    the loss that is trained, a number or one per token. Its file may also hold OPTIONS, a dict of options of
    philens.PHiConfig under which philens does the same work: {"prior": "mlp"} for a prior without attention,
    {"contrastive_weight": 0.0} without a contrastive loss.

    Raises:
        InputError: it cannot be imported, or does not offer that.
    """
    path = path.resolve()
    folder = [str(path)] if path.is_dir() else None
    file = path / "__init__.py" if folder else path
    name = f"reference_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folder)
    if not file.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file and no folder with an __init__.py; {SEE}.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))  # for its own imports
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's code raises
        raise InputError(f"{path} cannot be imported ({_first(error)}); install what it needs.") from error
    if not callable(getattr(module, "PHiLayer", None)):
        raise InputError(f"{path} does not offer PHiLayer(hidden_size); {SEE}.")
    return module


def reference(bench: Bench) -> list[Comparison]:
    """Another implementation of the layer, `--reference PATH`: forward and backward, neither compiled."""
    path = bench.reference
    if path is None:
        raise Unavailable("give --reference PATH to compare with another implementation")
    module = load(path)
    hidden = hidden_states(bench)
    rows, length, width = hidden.shape
    try:
        options = {"prior_heads": bench.pick(2, None, None), **getattr(module, "OPTIONS", {})}
        ours = PHiLayer(width, PHiConfig(**options)).to(bench.device)
    except (ConfigError, TypeError) as error:
        raise InputError(f"OPTIONS of {path} are no options of PHiConfig ({_first(error)}).") from error
    works = {"the layer alone": layer_work(bench, ours, hidden), "reference": _work(bench, module, hidden)}
    mine, other = bench.alternate(works).values()
    note = f"{path.name}; {rows} rows of {length:,} tokens, D {width}; forward and backward, not compiled"
    return [Comparison(mine, Series(f"reference {path.stem}", other.values), None, note)]


def _work(bench: Bench, module: Any, hidden: Tensor) -> Callable[[], None]:
    path = bench.reference
    try:
        layer = module.PHiLayer(hidden.shape[-1]).to(bench.device).train()
        with bench.autocast():
            decoded, loss = layer(hidden)
        fits = decoded.shape == hidden.shape and decoded.requires_grad and loss.requires_grad
    except Exception as error:  # whatever somebody else's code raises
        raise InputError(
            f"PHiLayer of {path} cannot be called as wanted ({_first(error)}); {SEE}."
        ) from error
    if not fits:
        raise InputError(
            f"PHiLayer of {path} must return hidden states of shape {tuple(hidden.shape)} and a loss, both "
            f"with a gradient; {SEE}."
        )
    upstream = torch.randn_like(decoded)

    def work() -> None:
        with bench.autocast():
            decoded, loss = layer(hidden)
        torch.autograd.backward([loss.float().mean(), decoded], [None, upstream])
        hidden.grad = None
        layer.zero_grad()

    return work


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]
