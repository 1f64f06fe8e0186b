"""Find an insertion point in any model, pass what comes out of it through a function, and run only what must
run: stop early, skip the blocks below, recompute those above, leave the vocabulary for later."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
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


def transform_output(module: nn.Module, function: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Pass the hidden states that leave `module`, (B, T, D), through `function` until the handle is removed.

    Outputs are tensors in some architectures and tuples that begin with one in others; both are kept.
    A recurrent module of torch that puts time first is turned.

    Raises:
        InsertionError: the module is bidirectional, so that its states know later tokens.
    """
    time_first = isinstance(module, nn.RNNBase) and not module.batch_first
    if isinstance(module, nn.RNNBase) and module.bidirectional:
        raise InsertionError(
            f"A bidirectional {type(module).__name__} has read the later tokens; choose a causal module."
        )

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first, rest = (output, None) if not isinstance(output, tuple) else (output[0], output[1:])
        if not isinstance(first, Tensor):
            raise InsertionError(
                f"{type(module).__name__} returns {type(first).__name__}, not hidden states; "
                "choose another module."
            )
        result = function(first.transpose(0, 1)).transpose(0, 1) if time_first else function(first)
        return result if rest is None else (result, *rest)

    return module.register_forward_hook(hook)


class StopForward(Exception):
    """Ends a forward pass at the point where all that was wanted is known."""


@contextlib.contextmanager
def recorded_forms(blocks: Sequence[nn.Module], forms: dict[int, tuple[Any, ...] | None]) -> Iterator[None]:
    """Note in `forms` what each block returns beside hidden states: None for a bare tensor."""

    def note(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            forms[number] = output[1:] if isinstance(output, tuple) else None

        return hook

    # First of all hooks: one of them may end the pass.
    handles = [block.register_forward_hook(note(k), prepend=True) for k, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward; its hooks stay."""
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


@contextlib.contextmanager
def skipped(
    blocks: Sequence[nn.Module], forms: dict[int, tuple[Any, ...] | None], states: Tensor
) -> Iterator[None]:
    """Let blocks return `states` (B, T, D) without running, in the form that `recorded_forms` noted."""
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(blocks):
            form = forms[number]
            output = states if form is None else (states, *form)
            stack.enter_context(replaced_forward(block, lambda *args, output=output, **kwargs: output))
        yield


def recompute(block: nn.Module) -> Callable[[], None]:
    """Keep a block's inputs only and run it again in the backward pass; returns what undoes that.

    Hooks on the block lie outside of what is run again, and so does a PHi layer after it.
    """
    before, forward = block.__dict__.get("forward"), block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    def undo() -> None:
        if before is None:
            del block.forward
        else:
            block.forward = before

    block.forward = run
    return undo
