"""A base's calls while it generates, each a pass of its own in which instruments go on in the base's cache.

Shapes: B rows, T tokens of a call, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from philens.bases.facts import find_cache, token_embedding, unwrapped
from philens.lens.cache import prior_memories
from philens.lens.core import LensCore
from philens.lens.insertion import recorded_forms
from philens.lens.losses import PHiModelOutput, divergence
from philens.lens.passing import Pass


@dataclass
class Call:
    """A call of the base.

    Attributes:
        input_ids: (B, T) the tokens read.
        earlier: tokens of each row that calls before it read.
        cached: the base keeps a cache.
        logits: (B, T, V), or of the last tokens alone.
        current: the pass that it was.
        forms: what `recorded_forms` noted.
    """

    lens: LensCore
    input_ids: Tensor
    earlier: int
    cached: bool
    logits: Tensor
    current: Pass
    forms: dict[int, Any]

    @cached_property
    def shallow(self) -> PHiModelOutput | None:
        """What a shallow head predicts after each token; None without one."""
        make = self.lens.shallow_pass(self.input_ids, self.current, self.forms)
        return None if make is None else make()

    def value(self) -> float:
        """Phi of the last token of one row, or its mtd where there is no PHi layer."""
        if self.lens.layers:
            return float(self.current.outputs[0].phi[0, -1])
        assert self.shallow is not None
        last = slice(self.input_ids.shape[1] - 1, None)
        own, early = self.logits[:, -1:], self.shallow.logits_at(last)
        place = torch.zeros(1, dtype=torch.long, device=own.device)
        return float(divergence(PHiModelOutput(logits=own), PHiModelOutput(logits=early), place))


@contextlib.contextmanager
def followed(lens: LensCore, hear: Sequence[Callable[[Call], None]]) -> Iterator[None]:
    """Within this context every call of the base is a pass of its own, which each of `hear` is told of."""
    stack = contextlib.ExitStack()  # of the call that runs
    running: list[tuple[Pass, dict[int, Any], int]] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if lens._pass is not None:  # a pass of our own, which somebody who hears of a call makes
            return
        ids, cache = kwargs["input_ids"], find_cache(kwargs)
        counts = [one.memory_count for one in lens.instruments]
        memories = () if cache is None else prior_memories(cache, counts)
        earlier = memories[0][0].get_seq_length() if memories else 0
        current = Pass(ids, token_embedding(lens.base), kwargs.get("attention_mask"), memories=memories)
        running[:] = [(current, {}, earlier)]
        stack.enter_context(recorded_forms(lens.blocks_below, running[0][1]))
        stack.enter_context(lens.passing(current))

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not running or lens._pass is not running[0][0]:
            return
        stack.close()
        current, forms, earlier = running.pop()
        cached = find_cache(kwargs) is not None
        call = Call(lens, kwargs["input_ids"], earlier, cached, output.logits, current, forms)
        for one in hear:
            one(call)

    base = unwrapped(lens.base)
    handles = (
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        stack.close()
        for handle in handles:
            handle.remove()
