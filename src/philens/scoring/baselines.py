"""Cheap measures beside phi: what the next-token distributions and the hidden states say by themselves."""

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philens.errors import InputError, InsertionError
from philens.insertion import find_blocks, recorded_forms, skipped, transform_output
from philens.model import PHiModel, PHiModelOutput

# Logits in float32 that are held at once: 64 MiB.
LOGITS_AT_ONCE = 2**24


def reduce_logits(logits: Tensor, targets: Tensor, wanted: Set[str]) -> dict[str, Tensor]:
    """What a distribution says of the token that came: any of surprisal, entropy and margin.

    Args:
        logits: (B, t, V) float32.
        targets: (B, t) the tokens that came.
        wanted: names.

    Returns:
        (B, t) each, in nats; margin is ln p of the likeliest token minus ln p of the second.
    """
    found = {}
    if "surprisal" in wanted:
        found["surprisal"] = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    if "entropy" in wanted:
        found["entropy"] = torch.special.entr(logits.softmax(-1)).sum(-1)
    if "margin" in wanted:
        best = logits.topk(min(2, logits.shape[-1]), dim=-1).values
        found["margin"] = best[..., 0] - best[..., -1]
    return found


def position_chunks(output: PHiModelOutput, rows: int, length: int) -> Iterator[slice]:
    """Slices of T positions whose logits are few enough to hold."""
    size = max(1, LOGITS_AT_ONCE // (rows * output.logits_at(slice(0, 1)).shape[-1]))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def predictions(output: PHiModelOutput, input_ids: Tensor, wanted: Set[str]) -> dict[str, Tensor]:
    """`reduce_logits` for each token (B, T), by the distribution before it; NaN on the first."""
    rows, length = input_ids.shape
    empty = torch.full((rows, length), torch.nan, device=input_ids.device)
    columns = {name: empty.clone() for name in sorted(wanted)}
    for chunk in position_chunks(output, rows, length - 1):
        after = slice(chunk.start + 1, chunk.stop + 1)
        for name, values in reduce_logits(output.logits_at(chunk), input_ids[:, after], wanted).items():
            columns[name][:, after] = values
    return columns


class LogitLens:
    """What a model would predict if its blocks ended early: hidden states go straight to its norm and head.

    The base itself runs with all blocks skipped, so whatever it does after its last block is done here too.

    Args:
        lens: the model; its base must be made of blocks.
        every_block: keep the hidden states after every block of the pass watched, in `states`.

    Raises:
        InputError: the blocks cannot be found.
    """

    def __init__(self, lens: PHiModel, every_block: bool) -> None:
        self.lens, self.every_block = lens, every_block
        try:
            self.blocks = list(find_blocks(lens.base)[1])
        except InsertionError as error:
            raise InputError(
                f"logit_lens_divergence and settling_depth need the model's blocks, and those of "
                f"{type(lens.base).__name__} could not be told apart; leave these metrics out."
            ) from error
        if any(isinstance(block, nn.RNNBase) for block in self.blocks):
            raise InputError(
                "logit_lens_divergence and settling_depth need blocks that return hidden states; those of "
                f"{type(lens.base).__name__} are bare recurrent modules; leave these metrics out."
            )
        self.states: dict[int, Tensor] = {}
        self._forms: dict[int, tuple[Any, ...] | None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward pass made within this context."""
        self.states = {}
        with ExitStack() as stack:
            stack.enter_context(recorded_forms(self.blocks, self._forms))
            if self.every_block:
                for number, block in enumerate(self.blocks):
                    stack.callback(transform_output(block, partial(self._keep, number)).remove)
            yield

    def _keep(self, number: int, hidden_states: Tensor) -> Tensor:
        self.states[number] = hidden_states
        return hidden_states

    def read(self, hidden_states: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> PHiModelOutput:
        """The output of the base for these (B, T, D) after its last block."""
        with self.lens.disabled(), skipped(self.blocks, self._forms, hidden_states):
            return self.lens(input_ids, attention_mask, returns="states")


def divergence(final: PHiModelOutput, early: PHiModelOutput, input_ids: Tensor) -> Tensor:
    """(B, T) KL(final || early) in nats of the distributions made at each token, of the next one."""
    rows, length = input_ids.shape
    parts = []
    for chunk in position_chunks(final, rows, length):
        p, q = final.logits_at(chunk).log_softmax(-1), early.logits_at(chunk).log_softmax(-1)
        probability = p.exp()
        # A token that is impossible in both adds nothing.
        parts.append((probability * (p - q)).masked_fill(probability == 0, 0).sum(-1).clamp(min=0))
    return torch.cat(parts, 1)


def settling_depth(logit_lens: LogitLens, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T) the first block, from 0, from which on the likeliest next token stays what it is in the end."""
    rows, length = input_ids.shape
    depth: Tensor = torch.full((rows, length), float(len(logit_lens.states) - 1), device=input_ids.device)
    settled = torch.ones((rows, length), dtype=torch.bool, device=input_ids.device)
    last = None
    for block in reversed(range(len(logit_lens.states))):
        early = logit_lens.read(logit_lens.states[block], input_ids, attention_mask)
        chunks = position_chunks(early, rows, length)
        likeliest = torch.cat([early.logits_at(chunk).argmax(-1) for chunk in chunks], 1)
        last = likeliest if last is None else last
        settled = settled & (likeliest == last)
        depth = torch.where(settled, block, depth)
    return depth


def steps(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) -> the distance (B, T) of each hidden state from the one before, NaN on the first, and its
    length (B, T)."""
    h = hidden_states.float()
    return F.pad(h.diff(dim=1).norm(dim=-1), (1, 0), value=torch.nan), h.norm(dim=-1)
