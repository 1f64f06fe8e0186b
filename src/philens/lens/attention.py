"""Causal attention within the documents of a pack, without a (T, T) mask wherever there is a kernel for that.

Shapes: B rows, H heads, T tokens, C dimensions of a head.
"""

from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from philens.bases.facts import accepted_arguments, text_config

# Name of this attention among those of `transformers` (`attn_implementation`).
DOCUMENTS = "philens_documents"


class Documents:
    """Who may attend to whom: each token to those before it in its own document, and to itself.

    Attributes:
        positions: (B, T) each token's place; where it does not go up by one, another document begins.
    """

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """(B, H, T, C) queries, keys and values -> (B, H, T, C)."""
        if q.device.type == "cpu":
            q, k, v = map(as_autocast, (q, k, v))
            return document_attention(q, k, v, self.positions, scale)[0]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(), scale=scale)

    def mask(self) -> Tensor:
        """(B, 1, T, T) bool, for devices that have no other way."""
        documents = document_ids(self.positions)
        place = torch.arange(documents.shape[1], device=documents.device)
        return ((documents[:, :, None] == documents[:, None, :]) & (place[:, None] >= place))[:, None]


def as_autocast(x: Tensor) -> Tensor:
    """What autocast, if it is on, makes of an operand: for operators that it does not know, and once for
    several that read the same."""
    kind = x.device.type
    # A meta device has no autocast.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def document_ids(positions: Tensor) -> Tensor:
    """(B, T) positions -> (B, T) documents from 0 on; one starts where positions do not go up by one."""
    jumps = torch.diff(positions, dim=1) != 1
    return F.pad(jumps.long().cumsum(1), (1, 0))


def _spans(positions: Tensor) -> list[tuple[slice, slice, slice]]:
    """Rows, heads and tokens of every document; neighbouring rows that are cut alike go together."""
    ids = document_ids(positions)
    last = torch.diff(ids, append=ids[:, -1:] + 1) != 0
    found, row = [], 0
    for ends, alike in groupby(one.nonzero()[:, 0].add(1).tolist() for one in last):
        rows = slice(row, row := row + len([*alike]))
        found += [(rows, slice(None), slice(start, end)) for start, end in pairwise([0, *ends])]
    return found


# An operator of its own, so that a compiled program can hold it: its steps are as many as the documents.
@torch.library.custom_op("philens::document_attention", mutates_args=(), device_types="cpu")
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents on a CPU, one after another: work goes with the sum of their squares.

    Args:
        q, k, v: (B, H, T, C). positions: (B, T), as of `Documents`.
        scale: factor of the scores; None means 1 / sqrt(C).

    Returns:
        (B, H, T, C), and the logarithm of each query's sum of exponentials (B, H, T), for the backward pass.
    """
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for one in _spans(positions):
        y[one], sums[one] = attend(q[one], k[one], v[one], 0.0, True, scale=scale)
    return y, sums


@document_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),
    )


@torch.library.custom_op("philens::document_attention_backward", mutates_args=(), device_types="cpu")
def _document_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    sums: Tensor,
    positions: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for one in _spans(positions):
        parts = (x[one] for x in (grad, q, k, v, y, sums))
        for whole, part in zip(grads, backward(*parts, 0.0, True, scale=scale), strict=True):
            whole[one] = part
    return grads  # pyright: ignore[reportReturnType]


@_document_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # pyright: ignore[reportReturnType]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, positions, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, positions)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, y, sums, positions = ctx.saved_tensors
    return *_document_attention_backward(grad, q, k, v, y, sums, positions, ctx.scale), None, None


document_attention.register_autograd(_backward, setup_context=_setup)


def knows_packs(base: Any) -> bool:
    """Whether a model of transformers tells the documents of a pack apart by their positions, in every layer,
    and lets its attention be chosen: then `register_documents` is for it."""
    config = getattr(base, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        getattr(base, "_supports_attention_backend", False)
        and text_config(base) is config
        and kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and "position_ids" in accepted_arguments(base)[0]
    )


def register_documents() -> str:
    """Make `document_attention` known to transformers; returns its name, an `attn_implementation`.

    For models of which `knows_packs` is true, on a CPU. Whatever is not a pack goes through `sdpa`.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2] > 1:
            documents = Documents(position_ids.expand(len(query), -1))
            if not dropout and query.shape[-1] == value.shape[-1]:
                groups = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
                return documents.attend(query, key, value, scaling).transpose(1, 2), None
            attention_mask = documents.mask()
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    def mask(
        q_length: int,
        kv_length: int,
        mask_function: Any,
        attention_mask: Tensor | None = None,
        use_vmap: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        # Unless the model has ideas of its own, what is not plainly causal is a pack, and known by positions.
        own = use_vmap or mask_function is causal_mask_function
        if attention_mask is None and q_length == kv_length and not own:
            return None
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **kwargs,
        )

    AttentionInterface.register(DOCUMENTS, attend)
    AttentionMaskInterface.register(DOCUMENTS, mask)
    return DOCUMENTS
