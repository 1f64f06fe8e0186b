"""Find an insertion point in any model, pass what comes out of it through a function, and run only what must
run: stop early, skip the blocks below, recompute those above, leave the vocabulary for later."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from philens.bases.facts import text_config
from philens.support.errors import InsertionError


def find_blocks(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of a model's blocks, found by structure and not by a table of architectures.

    The blocks are the one `ModuleList` as long as the config's `num_hidden_layers` whose members the model
    itself records as `hidden_states`, where it says so.

    Raises:
        InsertionError: there is none, or more than one.
    """
    depth = getattr(text_config(base), "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and depth in (None, len(module))
    ]
    recorded = tuple(
        kind
        for module in base.modules()
        for entry in [(getattr(module, "_can_record_outputs", None) or {}).get("hidden_states")]
        for kind in [getattr(entry, "target_class", entry)]
        if isinstance(kind, type)
    )
    if recorded:
        found = [(path, blocks) for path, blocks in found if isinstance(blocks[0], recorded)] or found
    get_decoder: Any = getattr(base, "get_decoder", None)
    if len(found) > 1 and get_decoder is not None:
        # A model that sees or hears as well: the blocks that write.
        inside = {id(module) for module in get_decoder().modules()}
        found = [(path, blocks) for path, blocks in found if id(blocks) in inside] or found
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise InsertionError(
            f"The blocks of {type(base).__name__} could not be told apart (candidates: {names}); "
            "give the insertion point by its path, such as module='model.layers.5'."
        )
    return found[0]


def find_insertion_point(base: nn.Module, layer: int | None, module: str | None) -> tuple[str, nn.Module]:
    """Path and module after which a PHi layer goes.

    Args:
        layer: a block, counted from 0; negative counts from the end.
        module: a module path, instead.

    Raises:
        InsertionError: there is no such block or module, or neither was named.
    """
    if module is not None:
        modules = dict(base.named_modules())
        if module not in modules or not module:
            near = [path for path in modules if path.endswith("." + module.rsplit(".", 1)[-1])][:3]
            hint = f"did you mean {', '.join(near)}" if near else "see base.named_modules()"
            raise InsertionError(f"There is no module {module!r} in {type(base).__name__}; {hint}.")
        return module, modules[module]
    if layer is None:
        raise InsertionError("No insertion point was given; set layer (a block's number) or module (a path).")
    path, blocks = find_blocks(base)
    if not -len(blocks) <= layer < len(blocks):
        raise InsertionError(
            f"Layer {layer} is out of range: {type(base).__name__} has {len(blocks)} blocks, "
            f"0 to {len(blocks) - 1} (or -{len(blocks)} to -1 from the end)."
        )
    layer %= len(blocks)
    return f"{path}.{layer}", blocks[layer]


# How outputs whose parts have names call the hidden states; where none has such a name, they come first.
_NAMES = ("hidden_states", "last_hidden_state")


def fields_of(output: Any) -> dict[Any, Any]:
    """What a module's output holds, by name or number: a tuple, list, dict, dataclass or `ModelOutput`; of
    anything else nothing."""
    if isinstance(output, Mapping):  # ModelOutput is one
        return dict(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return output._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    return dict(enumerate(output)) if isinstance(output, tuple | list) else {}


def with_fields(output: Any, changed: Mapping[Any, Any]) -> Any:
    """An output of the same form, with other things in some of its places."""
    if isinstance(output, Mapping):
        other: Any = copy.copy(output)
        for name, value in changed.items():
            other[name] = value
        return other
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **changed)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return output._replace(**changed)  # pyright: ignore[reportAttributeAccessIssue]
    values: Any = output
    kind: Any = type(output)
    return kind(changed.get(number, value) for number, value in enumerate(values))


def _place(output: Any) -> Any:
    parts = fields_of(output)
    named = [name for name in _NAMES if isinstance(parts.get(name), Tensor)]
    return next(iter([*named, *parts]), None)


def states_of(output: Any, module: nn.Module) -> Tensor:
    """The hidden states in what a module returned: all of it, or the part called so, or the first part.

    Raises:
        InsertionError: that is no tensor.
    """
    states = output if isinstance(output, Tensor) else fields_of(output).get(_place(output), output)
    if not isinstance(states, Tensor):
        raise InsertionError(
            f"{type(module).__name__} returns {type(states).__name__}, not hidden states; "
            "choose another module."
        )
    return states


def with_states(output: Any, states: Tensor) -> Any:
    """What a module returned with other hidden states, in the same form."""
    return states if isinstance(output, Tensor) else with_fields(output, {_place(output): states})


def transform_output(
    module: nn.Module, function: Callable[[Tensor], Tensor], path: str = ""
) -> RemovableHandle:
    """Pass the hidden states that leave `module`, (B, T, D), through `function` until the handle is removed.

    The form of the output is kept (`states_of`, `with_states`). A recurrent module of torch that puts time
    first is turned.

    Args:
        path: what errors call the module.

    Raises:
        InsertionError: the module is bidirectional, so that its states know later tokens.
    """
    time_first = isinstance(module, nn.RNNBase) and not module.batch_first
    if isinstance(module, nn.RNNBase) and module.bidirectional:
        raise InsertionError(
            f"A bidirectional {type(module).__name__} has read the later tokens; choose a causal module."
        )

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = states_of(output, module)
        if states.ndim != 3:
            inside = _modules_that_fit(module, args, kwargs, states.shape[-1])
            advice = "choose another module"
            if inside:
                advice = (
                    f"choose one in it that does ({', '.join(inside)}) by its path, such as "
                    f"module='{path and path + '.'}{inside[0]}'"
                )
            raise InsertionError(
                f"{path or type(module).__name__} does not fit, nor do others of its kind: a "
                f"{type(module).__name__} returns states of shape {tuple(states.shape)}, not (B, T, D); "
                f"{advice}."
            )
        changed = function(states.transpose(0, 1)).transpose(0, 1) if time_first else function(states)
        return with_states(output, changed)

    return module.register_forward_hook(hook, with_kwargs=True)


@torch.no_grad()
def _modules_that_fit(module: nn.Module, args: Any, kwargs: Any, width: int) -> list[str]:
    """Names of the modules right in this one that return states (B, T, width), in the order in which they
    run; it runs once more for that."""
    found: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else fields_of(output).get(_place(output))
            if isinstance(states, Tensor) and states.ndim == 3 and states.shape[-1] == width:
                found.append(name)

        return hook

    handles = [child.register_forward_hook(note(name)) for name, child in module.named_children()]
    try:
        module.forward(*args, **kwargs)  # without this module's own hooks
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))


class StopForward(Exception):
    """Ends a forward pass at the point where all that was wanted is known."""


@contextlib.contextmanager
def recorded_forms(blocks: Sequence[nn.Module], forms: dict[int, Any]) -> Iterator[None]:
    """Note in `forms` what each block returns, with no elements (0,) in the place of its hidden states."""

    def note(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            forms[number] = with_states(output, states_of(output, module).new_empty(0))

        return hook

    # First of all hooks: one of them may end the pass.
    handles = [block.register_forward_hook(note(k), prepend=True) for k, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replace_forward(block: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module run another forward; its hooks stay. Returns what undoes that."""
    own = block.__dict__.get("forward")

    def undo() -> None:
        if own is None:
            del block.forward
        else:
            block.forward = own

    block.forward = forward
    return undo


@contextlib.contextmanager
def skipped(blocks: Sequence[nn.Module], forms: dict[int, Any], states: Tensor) -> Iterator[None]:
    """Let blocks return `states` (B, T, D) without running, in the form that `recorded_forms` noted."""
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(blocks):
            output = with_states(forms[number], states)
            stack.callback(replace_forward(block, lambda *args, output=output, **kwargs: output))
        yield


def recompute(block: nn.Module) -> Callable[[], None]:
    """Keep a block's inputs only and run it again in the backward pass; returns what undoes that.

    Hooks on the block lie outside of what is run again, and so does a PHi layer after it.
    """
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return replace_forward(block, run)
