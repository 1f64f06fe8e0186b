"""What is true of any model of `transformers`: its config, how its forward takes a cache, its modes."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

# How models and their outputs call a cache: `cache` since transformers 5.24, until then `past_key_values` or,
# like Mamba, `cache_params`.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, "cache", "past_key_values", "cache_params")))

_MERGED = "philens_merged_from"  # an attribute of models


def unwrapped(base: nn.Module) -> Any:
    """The model of `transformers` in a `PeftModel`, whose adapters are in its modules; another as it is."""
    inner: Any = getattr(base, "get_base_model", None)
    return base if inner is None else inner()


def text_config(base: nn.Module) -> Any:
    """The config of a model, or of its language part where it has several; None where it has none."""
    config: Any = getattr(base, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def accepted_arguments(base: nn.Module) -> tuple[set[str], bool]:
    """Names of the arguments of a model's forward, and whether it takes others besides."""
    parameters = inspect.signature(unwrapped(base).forward).parameters.values()
    return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def token_embedding(base: Any) -> nn.Module | None:
    """The module that embeds tokens."""
    try:
        return base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return next((m for m in base.modules() if isinstance(m, nn.Embedding)), None)


def cache_argument(base: nn.Module) -> str | None:
    """The name by which a model's forward takes its cache, if it takes one."""
    names, _ = accepted_arguments(base)
    return next((name for name in CACHE_NAMES if name in names), None)


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments, by any of its names."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def own_head_keys(config: Any) -> str:
    """A pattern of the names that the weights of a multi-token head have in a checkpoint: they come as blocks
    after the last one, as DeepSeek-V3's. It matches nothing where a config does not speak of such a head."""
    text = config.get_text_config(decoder=True)
    if not (heads := getattr(text, "num_mtp_layers", None)):
        return "(?!)"
    numbers = range(text.num_hidden_layers, text.num_hidden_layers + heads)
    return rf"(^|\.)layers\.({'|'.join(map(str, numbers))})\."


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def quantization_of(base: Any) -> str | None:
    """How a model's weights are quantized: `int8`, `int4`, another method's name, or None."""
    found = getattr(getattr(base, "config", None), "quantization_config", None)
    if found is None:
        return None
    options = found if isinstance(found, dict) else found.to_dict()
    bits = [bits for bits in ("int8", "int4") if options.get(f"load_in_{bits[3]}bit")]
    return bits[0] if bits else str(options.get("quant_method"))


def merged_from(base: Any) -> dict[str, Any] | None:
    """What a model was merged from by philens: `base`, its `revision` and `fingerprint`, and the
    `lora_sha256` of the weights that were merged into it; None for any other model."""
    return getattr(base, _MERGED, None)


def set_merged_from(base: nn.Module, origin: dict[str, Any]) -> None:
    """Let a model remember what `merged_from` says."""
    setattr(base, _MERGED, origin)
