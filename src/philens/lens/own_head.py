"""The multi-token head that a base brings along, measured as multiple-token divergence.

It predicts the token after next from what the base's output head reads at a token and the embedding of the
next one; so it is a shallow head with embedding. Source: arXiv 2412.19437 (DeepSeek-V3).
Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from philens.bases.facts import CACHE_NAME, unwrapped
from philens.bases.own_head import load_own_head
from philens.lens.config import MTDConfig
from philens.lens.layer import document_structure
from philens.lens.mtd import MTDOutput
from philens.lens.passing import Pass, Term
from philens.lens.prior import Memory, one_before


class OwnHead(nn.Module):
    """A base's own multi-token head; of several the first. An `Instrument` that is not trained.

    A document's first token has no value: there is no token before it whose state could be read.

    Raises:
        ConfigError: it brings none, or one that cannot be measured.
    """

    compared = final = True
    surprisal, divergence = "surprisal_shallow", "mtd"
    memory_count = 2  # states, and the attention of its block

    def __init__(self, base: Any, config: MTDConfig) -> None:
        super().__init__()
        self.config = config
        head = load_own_head(base)
        self.layer, self.hidden_size = head.layers[0], head.config.hidden_size
        # In a tuple, so that what is the base's counts as the base's.
        self._of_base = unwrapped(base).get_decoder().norm, head.embed_tokens, head.rotary_emb

    def read(self, hidden_states: Tensor, current: Pass, memories: Sequence[Memory] = ()) -> MTDOutput:
        norm, embed, rotate = self._of_base
        kept, attention = memories or (None, None)
        earlier = 0 if kept is None else kept.get_seq_length()
        starts, positions, _, _ = document_structure(
            hidden_states, current.attention_mask, current.documents, earlier
        )
        states = norm(hidden_states)
        before = one_before(states, starts, states.new_zeros(1, 1, 1), kept)
        place = torch.arange(earlier + states.shape[1], device=states.device)
        distance = place[earlier:, None] - place
        # Tokens of its own document, but not the first, of which the head has read nothing.
        seen = (distance == 0) | ((distance > 0) & (distance < positions[..., None]))
        mask = torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, torch.finfo(states.dtype).min)
        embedded = embed(current.input_ids)
        made = self.layer(
            embedded,
            before,
            position_embeddings=rotate(embedded, position_ids=positions),
            attention_mask=mask[:, None],
            position_ids=positions,
            **{CACHE_NAME: None if attention is None else _Cache(attention)},
        )
        return MTDOutput(made.masked_fill(starts[..., None], torch.nan), hidden_states)

    def losses(self, output: MTDOutput, counted: Tensor, weight_scale: Tensor) -> list[Term]:
        """See `Instrument`: there are none."""
        return []


class _Cache:
    """A memory as the cache of a block."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.memory.update(keys, values)
