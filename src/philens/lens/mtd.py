"""A shallow head beside a base: multiple-token divergence (MTD).

What the base predicts after a token, and a head that is one Transformer block deep does not, took more than
that block's computation: MTD(t) = KL(base(. | x_<=t) || head(. | x_<t[, x_t])) in nats.

A head that is trained in a frozen base changes nothing of it. Trained together with a base, the loss is the
base's next-token loss + MTD, and no gradient is held back: MTD reaches the states that the head reads and the
distribution that it is to predict. So the base pays, in nats, for what the head cannot follow, as it pays phi
where a PHi layer is trained with it, and computes more only where its own predictions gain by it. Were the
base's distribution held back, it would be pressed to serve the head as well as it can, and never to do
without more; were all held back, the base would be one trained alone, which the frozen way gives as well.

Source: arXiv 2512.22944. Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from philens.lens.config import MTDConfig
from philens.lens.layer import document_structure
from philens.lens.passing import Pass, Term
from philens.lens.prior import Memory, PriorBlock, one_before
from philens.support.errors import ConfigError, InputError


@dataclass
class MTDOutput:
    """What a shallow head returns.

    Attributes:
        hidden_states: (B, T, D) from which the base's final norm and output head predict the next token.
        observed: (B, T, D) what leaves the base's last block.
    """

    hidden_states: Tensor
    observed: Tensor


class MTDHead(nn.Module):
    """A shallow head: from what the last block had for earlier tokens and, with `embedding`, the newest token
    to a hidden state that the base's own final norm and output head read. An `Instrument`.

    Args:
        hidden_size: D of the base model.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    compared, final = True, False
    surprisal, divergence = "surprisal_shallow", "mtd"

    def __init__(self, hidden_size: int, config: MTDConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MTDConfig()
        self.hidden_size = hidden_size
        heads = config.heads or max(1, hidden_size // 64)
        if hidden_size % (2 * heads):
            raise ConfigError(
                f"The hidden size {hidden_size} must be a multiple of twice the shallow head's {heads} "
                "attention heads; set heads."
            )
        width = config.mlp_size or 8 * round(hidden_size / 3)
        self.start = nn.Parameter(torch.empty(1, 1, hidden_size))
        nn.init.normal_(self.start, std=0.02)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        if config.embedding:
            self.embedding_norm = nn.RMSNorm(hidden_size, eps=1e-5)
            self.merge = nn.Linear(2 * hidden_size, hidden_size)
        self.blocks = nn.ModuleList(PriorBlock(hidden_size, heads, width) for _ in range(config.depth))

    @property
    def memory_count(self) -> int:
        """How many `Memory` objects going on from earlier tokens takes: states, and one per attention."""
        return 1 + self.config.depth

    def read(self, hidden_states: Tensor, current: Pass, memories: Sequence[Memory] = ()) -> MTDOutput:
        embedded = None
        if self.config.embedding:
            if current.embed is None or current.input_ids is None:
                raise InputError(
                    "The shallow head reads the newest token's embedding, and the base has none that could "
                    "be found; set embedding to false."
                )
            embedded = current.embed(current.input_ids)
        return self(hidden_states, embedded, current.attention_mask, current.documents, memories)

    def losses(self, output: MTDOutput, counted: Tensor, weight_scale: Tensor) -> list[Term]:
        """See `Instrument`: there are none but the divergence that its config asks for."""
        return []

    def forward(
        self,
        hidden_states: Tensor,
        embedded: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        memories: Sequence[Memory] = (),
    ) -> MTDOutput:
        """What the head would have leave the last block.

        Args:
            hidden_states: (B, T, D) what leaves it, any floating dtype.
            embedded: (B, T, D) tokens as the base embeds them; needed with `embedding`.
            attention_mask: (B, T), 0 on padding; with memories (B, earlier + T).
            document_ids: (B, T) integers that change where a new document starts in a pack.
            memories: `memory_count` of them, empty or those that an earlier call filled.

        Raises:
            ConfigError: embeddings are not as wide as hidden states.
        """
        precise = self.start.dtype
        states, *attentions = memories or (None,)
        earlier = 0 if states is None else states.get_seq_length()
        starts, positions, attend, _ = document_structure(
            hidden_states, attention_mask, document_ids, earlier
        )
        x = self.norm(one_before(hidden_states.to(precise), starts, self.start, states))
        if self.config.embedding:
            assert embedded is not None
            if embedded.shape[-1] != self.hidden_size:
                raise ConfigError(
                    f"Embeddings have width {embedded.shape[-1]} and hidden states {self.hidden_size}; set "
                    "embedding to false."
                )
            newest = self.embedding_norm(embedded.to(precise))
            x = self.merge(torch.cat((x, newest), -1)).to(precise)  # autocast would leave it coarse
        for block, memory in zip(self.blocks, attentions or [None] * len(self.blocks), strict=True):
            x = block(x, positions, attend, memory)
        return MTDOutput(x.to(hidden_states.dtype), hidden_states)
