"""Hashes of a model's weights, by which it is known again."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from philens.bases.facts import quantization_of
from philens.support.errors import AdapterError

# Precisions that bases are loaded in; weights read in either are the same for a base loaded in float32.
_READINGS = (torch.bfloat16, torch.float16)


@torch.no_grad()
def _digest(weights: Iterable[tuple[str, Tensor]], reading: torch.dtype, samples: int = 64) -> str:
    """A hash of names, shapes, and values at evenly spread places of each tensor."""
    digest = hashlib.sha256()
    for name, value in sorted(weights, key=lambda item: item[0]):
        if value.is_meta:
            raise AdapterError(
                f"{name} of the base model is not in memory; load the base without offloading."
            )
        digest.update(f"{name}{tuple(value.shape)}".encode())
        flat = value.detach().reshape(-1)
        if flat.is_floating_point() and flat.numel():
            count = min(samples, flat.numel())
            # In integers: float32 cannot name every place of a large matrix.
            places = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
            read = flat[places.to(flat.device)].to(reading).cpu()
            digest.update(read.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprints(model: nn.Module) -> dict[str, list[str]]:
    """Hashes of a model's weights that tell whether another is the same base.

    Rounding to bfloat16 or float16 must not make another base of it, nor must quantization. So each hash is
    made of the weights read in either precision, and two bases are the same if one of the hashes agrees: only
    a base in bfloat16 and one in float16, both rounded from float32, cannot be compared.

    Returns:
        `weights`: of all weights; empty for a quantized model, whose matrices hold other numbers.
        `unquantized_weights`: of what quantization leaves alone: embeddings, norms and biases.
    """
    whole, kept = _weights(model)
    return {
        "weights": [] if whole is None else [_digest(whole, one) for one in _READINGS],
        "unquantized_weights": [_digest(kept, one) for one in _READINGS],
    }


def fingerprint(model: nn.Module) -> str:
    """One hash that stands for a model's weights in records: the first that `fingerprints` gives.

    It is made once, and anew when a weight was replaced, moved or written to in place, as torch's own
    counters tell; what is written past them, through `weight.data`, goes unseen.
    """
    tensors, marks = _marks(model)
    known = _FINGERPRINTS.get(model)
    # A tensor that is gone may have left its number and its memory to another.
    if known and known.marks == marks and all(one() is not None for one in known.tensors):
        return known.value
    whole, kept = _weights(model)
    value = _digest(kept if whole is None else whole, _READINGS[0])
    if marks:
        _FINGERPRINTS[model] = _Fingerprint(marks, tensors, value)
    return value


class _Fingerprint(NamedTuple):
    marks: list[tuple[int, int, int]]
    tensors: list[ref[Tensor]]
    value: str


_FINGERPRINTS: WeakKeyDictionary[nn.Module, _Fingerprint] = WeakKeyDictionary()


def _marks(model: nn.Module) -> tuple[list[ref[Tensor]], list[tuple[int, int, int]]]:
    """A model's tensors, and for each which it is, where it lies and how often it was written to in place;
    none where torch does not tell."""
    tensors = [one for one in model.state_dict(keep_vars=True).values() if isinstance(one, Tensor)]
    try:
        return list(map(ref, tensors)), [(id(one), one.data_ptr(), one._version) for one in tensors]
    except RuntimeError:  # made in inference mode, or without memory of its own
        return [], []


def _weights(model: nn.Module) -> tuple[Iterable[tuple[str, Tensor]] | None, list[tuple[str, Tensor]]]:
    """All weights by name, None of a quantized model; and those that quantization leaves alone."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kept: list[tuple[str, Tensor]] = [
        (name, p) for name, p in model.named_parameters() if p.ndim == 1 or id(p) in embeddings
    ]
    return None if quantization_of(model) is not None else model.state_dict().items(), kept
