"""What a prior keeps between the calls of a generation, in the base's own cache."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from philens.bases.facts import cache_argument, text_config, unwrapped
from philens.support.errors import InputError


class PriorMemory(DynamicLayer):
    """A cache layer of the prior's own, after those of the base: it reorders with the beams and is cropped
    with them. The latents are kept as keys, as the next token is predicted from the last of them."""


def new_cache(base: nn.Module) -> Cache:
    """An empty cache for a base model.

    Raises:
        InputError: the model keeps another kind of cache, or none.
    """
    if not isinstance(unwrapped(base), GenerationMixin) or cache_argument(base) is None:
        raise InputError(
            f"{type(base).__name__} has no cache of the usual kind; read the whole text at once."
        )
    return DynamicCache(config=text_config(base))


def prior_memories(cache: Any, counts: Sequence[int]) -> list[list[PriorMemory]]:
    """What the priors keep in a cache: for each PHi layer as many memories as it needs, made when missing.

    Raises:
        InputError: the cache cannot carry them.
    """
    if not isinstance(cache, Cache) or cache.layer_class_to_replicate is not None:
        raise InputError(
            "The prior can only go on from a cache made from the model's config: give "
            "DynamicCache(config=base.config), or use_cache=True."
        )
    found = [layer for layer in cache.layers if isinstance(layer, PriorMemory)]
    if not found and sum(counts):
        if any(_is_filled(layer) for layer in cache.layers):
            raise InputError(
                "This cache was filled without the PHi layer; read the text again with the layer."
            )
        found = [PriorMemory() for _ in range(sum(counts))]
        cache.layers.extend(found)
    memories = iter(found)
    return [[next(memories) for _ in range(count)] for count in counts]


def _is_filled(layer: Any) -> bool:
    """Whether a cache layer, of attention or of a recurrent kind or both, has read anything.

    Placeholders for blocks that keep nothing, as theirs are another block's keys and values or none at all,
    have no length.
    """
    length = getattr(layer, "get_seq_length", None)
    return bool(length and length()) or any(getattr(layer, "has_previous_state", {}).values())
