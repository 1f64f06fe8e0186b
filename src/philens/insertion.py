"""Find an insertion point in any model and pass what comes out of it through a function."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from philens.errors import InsertionError


def text_config(base: nn.Module) -> Any:
    """The config of a model, or of its language part where it has several; None where it has none."""
    config: Any = getattr(base, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


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
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return function(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (function(output[0]), *output[1:])
        raise InsertionError(
            f"{type(module).__name__} returns {type(output).__name__}, not hidden states; "
            "choose another module."
        )

    return module.register_forward_hook(hook)
