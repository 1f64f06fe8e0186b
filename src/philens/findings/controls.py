"""What phi is compared with, so that a finding is one of the trained layer and not of the base alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from philens.lens.model import PHiModel


@contextmanager
def untrained(lens: "PHiModel", seed: int = 0) -> "Iterator[PHiModel]":
    """Within this context the lens has layers as they are before their first step: fresh weights, fitted to
    the base as the trained ones were (`PHiLayer.calibrate`).

    Args:
        seed: of the weights; nothing else that is random is touched.
    """
    from philens.lens.layer import PHiLayer

    trained = lens.phi
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = [PHiLayer(layer.hidden_size, layer.config) for layer in lens.layers]
    for layer, own in zip(lens.layers, fresh, strict=True):
        own.shift.copy_(layer.shift)
        own.scale.copy_(layer.scale)
        own.sink_norm.copy_(layer.sink_norm)
        own.to(layer.shift.device).eval()
    lens.phi = fresh[0] if isinstance(trained, PHiLayer) else nn.ModuleList(fresh)
    try:
        yield lens
    finally:
        lens.phi = trained
