"""Cheap measures beside phi: what the next-token distributions and the hidden states say by themselves."""

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philens.lens.insertion import find_blocks, recorded_forms, skipped, transform_output
from philens.lens.losses import PHiModelOutput, logits_in_parts
from philens.lens.model import PHiModel
from philens.scoring.alternatives import MOST
from philens.support.errors import InputError, InsertionError


class Likeliest(NamedTuple):
    """Of n distributions, how far down the token that came is, and the k likeliest ones, the likeliest first.

    Attributes:
        ranks: (n,) 1 if none is likelier than the one that came, and so on; 0 where there is no distribution.
        token_ids: (n, k).
        probabilities: (n, k) float32.
    """

    ranks: Tensor
    token_ids: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> "Likeliest":
        """From logits (n, V) float32 and the tokens that came (n,)."""
        best, token_ids = logits.topk(min(MOST, logits.shape[-1]), dim=-1)
        probabilities = (best - logits.logsumexp(-1, keepdim=True)).exp()
        ranks = 1 + (logits > logits.gather(-1, targets[:, None])).sum(-1)
        return cls(ranks.masked_fill(probabilities[:, 0].isnan(), 0), token_ids, probabilities)


def reduce_logits(logits: Tensor, targets: Tensor, wanted: Set[str]) -> dict[str, Tensor]:
    """What a distribution says of the token that came: any of surprisal, entropy and margin.

    Args:
        logits: (n, V) float32.
        targets: (n,) the tokens that came.
        wanted: names.

    Returns:
        (n,) each, in nats; margin is ln p of the likeliest token minus ln p of the second.
    """
    found = {}
    if "surprisal" in wanted:
        found["surprisal"] = F.cross_entropy(logits, targets, reduction="none")
    if "entropy" in wanted:
        found["entropy"] = torch.special.entr(logits.softmax(-1)).sum(-1)
    if "margin" in wanted:
        best = logits.topk(min(2, logits.shape[-1]), dim=-1).values
        found["margin"] = best[..., 0] - best[..., -1]
    return found


def predictions(
    output: PHiModelOutput, input_ids: Tensor, places: Tensor, wanted: Set[str], alternatives: bool = False
) -> tuple[dict[str, Tensor], Likeliest | None]:
    """`reduce_logits` for the tokens (N,) at some of the B * T positions, by the distribution before each,
    and if asked for the likeliest ones in their place; NaN, and a rank of 0, for the first of a row."""
    if not (wanted or alternatives):
        return {}, None
    targets, before = input_ids.flatten()[places], (places - 1).clamp(min=0)
    parts, likeliest = [], []
    for part, logits in logits_in_parts(output, before):
        parts.append(reduce_logits(logits, targets[part], wanted))
        if alternatives:
            likeliest.append(Likeliest.of(logits, targets[part]))
    first = places % input_ids.shape[1] == 0
    found = {
        name: torch.cat([part[name] for part in parts]).masked_fill(first, torch.nan) for name in parts[0]
    }
    if not alternatives:
        return found, None
    ranks, token_ids, probabilities = map(torch.cat, zip(*likeliest, strict=True))
    return found, Likeliest(ranks.masked_fill(first, 0), token_ids, probabilities)


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

    def read(self, hidden_states: Tensor, input_ids: Tensor) -> PHiModelOutput:
        """The output of the base for these (B, T, D) after its last block."""
        with self.lens.disabled(), skipped(self.blocks, self._forms, hidden_states):
            return self.lens(input_ids, returns="states")


def divergence(final: PHiModelOutput, early: PHiModelOutput, places: Tensor) -> Tensor:
    """(N,) KL(final || early) in nats of the distributions made at some of the B * T positions."""
    parts = []
    for (_, some), (_, others) in zip(
        logits_in_parts(final, places), logits_in_parts(early, places), strict=True
    ):
        p, q = some.log_softmax(-1), others.log_softmax(-1)
        probability = p.exp()
        # A token that is impossible in both adds nothing.
        parts.append((probability * (p - q)).masked_fill(probability == 0, 0).sum(-1).clamp(min=0))
    return torch.cat(parts)


def settling_depth(logit_lens: LogitLens, input_ids: Tensor, places: Tensor) -> Tensor:
    """(N,) the first block, from 0, from which on the likeliest next token stays what it is in the end; NaN
    where a block's predictions are no numbers."""
    depth = torch.full_like(places, len(logit_lens.states) - 1)
    settled = torch.ones_like(places, dtype=torch.bool)
    broken = torch.zeros_like(places, dtype=torch.bool)
    last = None
    for block in reversed(range(len(logit_lens.states))):
        early = logit_lens.read(logit_lens.states[block], input_ids)
        best = [logits.max(-1) for _, logits in logits_in_parts(early, places)]
        likeliest = torch.cat([one.indices for one in best])
        broken |= ~torch.cat([one.values for one in best]).isfinite()
        last = likeliest if last is None else last
        settled = settled & (likeliest == last)
        depth = torch.where(settled, block, depth)
    return depth.float().masked_fill(broken, torch.nan)


def steps(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) -> the distance (B, T) of each hidden state from the one before, NaN on the first, and its
    length (B, T)."""
    h = hidden_states.float()
    return F.pad(h.diff(dim=1).norm(dim=-1), (1, 0), value=torch.nan), h.norm(dim=-1)
