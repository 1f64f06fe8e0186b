"""The autoregressive prior of a PHi layer. Shapes: B rows, H heads, T tokens, L latent size, C = L / H."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philens.lens.attention import Documents, as_autocast
from philens.lens.config import PHiConfig
from philens.support.errors import ConfigError


def rotary_angles(positions: Tensor, size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, 1, T, C / 2), float32, of rotary embedding at positions (B or 1, T)."""
    half = size // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, T, C)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Memory(Protocol):
    """What is kept of the tokens before: the cache layers of `transformers` are this."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, C) keys and values; returns all of them so far."""
        ...

    def get_seq_length(self) -> int:
        """Tokens kept."""
        ...


# Who may attend to whom: a mask (B, 1, T, earlier + T), the documents of a pack, or None: to all before.
Attend: TypeAlias = Tensor | Documents | None


def one_before(z: Tensor, starts: Tensor, start: Tensor, memory: Memory | None = None) -> Tensor:
    """(B, T, L) what the token before each has of z, and `start` (1, 1, L) where a document starts, (B, T);
    a memory keeps z of the tokens before."""
    before = torch.roll(z, 1, dims=1)
    if memory is not None:
        kept, _ = memory.update(z[:, None], z[:, None, :, :0])
        if kept.shape[2] > z.shape[1]:
            before = kept[:, 0, -z.shape[1] - 1 : -1]
    return torch.where(starts[..., None], start.to(z.dtype), before)


class PriorAttention(nn.Module):
    """Causal self-attention within documents, (B, T, L) -> (B, T, L)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        projections = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, memory: Memory | None = None) -> Tensor:
        rows, length, size = x.shape
        x = as_autocast(x)
        q, k, v = (
            project(x).view(rows, length, self.heads, size // self.heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = rotary_angles(positions, size // self.heads)
        q, k = rotary(q, *angles), rotary(k, *angles)
        if memory is not None:
            k, v = memory.update(k, v)
        if isinstance(attend, Documents):
            y = attend.attend(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, size))


class SwiGLU(nn.Module):
    """Gated MLP with biases, (..., size) -> (..., out)."""

    def __init__(self, size: int, width: int, out: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, width), nn.Linear(size, width)
        self.down_proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PriorBlock(nn.Module):
    """One more Transformer block of a deeper prior."""

    def __init__(self, size: int, heads: int, width: int) -> None:
        super().__init__()
        self.attention = PriorAttention(size, heads)
        self.norm = nn.RMSNorm(size, eps=1e-5)
        self.mlp = SwiGLU(size, width, size)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, memory: Memory | None = None) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:], eps=1e-5), positions, attend, memory)
        return x + self.mlp(self.norm(x))


class Prior(nn.Module):
    """The autoregressive prior p(z_t | z_<t) of the latents of one document."""

    def __init__(self, size: int, out: int, config: PHiConfig) -> None:
        super().__init__()
        width = config.prior_mlp_size or 8 * round(size / 3)
        self.start = nn.Parameter(torch.zeros(1, 1, size))
        self.attention, self.depth = None, 0
        if config.prior == "attention":
            self.depth = config.prior_depth
            heads = config.prior_heads or max(1, size // 64)
            if size % (2 * heads):
                raise ConfigError(
                    f"latent_size {size} must be a multiple of twice the prior's {heads} heads; "
                    "set prior_heads."
                )
            if config.prior_depth > 1:
                blocks = (PriorBlock(size, heads, width) for _ in range(config.prior_depth - 1))
                self.blocks = nn.ModuleList(blocks)
            self.attention = PriorAttention(size, heads)
        self.norm = nn.RMSNorm(size, eps=1e-5)
        self.mlp = SwiGLU(size, width, out)
        nn.init.normal_(self.start, std=0.02)

    def forward(
        self,
        z: Tensor,
        starts: Tensor,
        positions: Tensor,
        attend: Attend,
        memories: Sequence[Memory] = (),
    ) -> Tensor:
        """(B, T, L) latents, (B, T) document starts -> (B, T, out) what earlier latents predict of each.

        With `memories`, one for the latents and one for each attention layer, goes on from the tokens before.
        """
        latents, *attentions = memories or (None,)
        x = one_before(z, starts, self.start, latents)
        if self.attention is not None:
            x = F.rms_norm(x, x.shape[-1:], eps=1e-5)
            *inner, last = attentions or [None] * self.depth
            for block, memory in zip(getattr(self, "blocks", ()), inner, strict=True):
                x = block(x, positions, attend, memory)
                x = F.rms_norm(x, x.shape[-1:], eps=1e-5)
            x = x + self.attention(x, positions, attend, last)
        return self.mlp(self.norm(x))
