"""Instruments: what is attached to a base, reads hidden states in a pass, and says values of each token.

`KINDS` is the one table of them. Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from philens.lens.config import InstrumentConfig, MTDConfig, PHiConfig
from philens.lens.layer import PHiLayer
from philens.lens.mtd import MTDHead
from philens.lens.own_head import OwnHead
from philens.lens.passing import Pass, Reading, Term
from philens.lens.prior import Memory


class Instrument(Protocol):
    """One part of an instrument, in one place of a base: a torch.nn.Module made from `hidden_size` and
    `config`. Its values per token are those entries of `METRICS` that need its kind.

    Attributes:
        config: its options.
        hidden_size: D.
        memory_count: how many `Memory` objects going on from earlier tokens takes.
        compared: what the base predicts from the states that it makes is a shallow prediction, from which the
            base's own diverges (`PHiModelOutput.shallow`).
        surprisal: what the next-token loss of the states that it makes is called.
        divergence: what the divergence of those predictions from the base's own is called.
        final: its states are what the base's output head reads: nothing comes between.
    """

    config: Any
    hidden_size: int
    compared: bool
    final: bool
    surprisal: str
    divergence: str

    @property
    def memory_count(self) -> int: ...

    def read(self, hidden_states: Tensor, current: Pass, memories: Sequence[Memory] = ()) -> Reading:
        """What it finds in states (B, T, D); with memories, of tokens that go on from earlier ones."""
        ...

    def losses(self, output: Any, counted: Tensor, weight_scale: Tensor) -> list[Term]:
        """What is trained beside what its config's `pressure` asks of next-token distributions.

        Args:
            output: what `read` returned.
            counted: (B, T) bool, the tokens that count.
            weight_scale: scalar by which schedules raise weights.
        """
        ...


class Kind(NamedTuple):
    """A kind of instrument.

    Attributes:
        config: class of its options.
        module: class of its parts.
        file: file of its weights in an adapter.
        title: what people call it.
    """

    config: type[Any]
    module: type[Any]
    file: str
    title: str


KINDS = {
    "phi": Kind(PHiConfig, PHiLayer, "phi_layer.safetensors", "PHi layer"),
    "mtd": Kind(MTDConfig, MTDHead, "mtd_head.safetensors", "shallow head"),
}


def make_parts(config: Any, widths: Sequence[int], base: nn.Module | None = None) -> nn.Module:
    """What an instrument has in each of its places, fresh: an `nn.ModuleList` where there may be several.

    Args:
        config: its options.
        widths: D in each place.
        base: the model that it goes into, where that is at hand.
    """
    if getattr(config, "own", False):
        return OwnHead(base, config)
    parts = [KINDS[config.kind].module(width, config) for width in widths]
    return parts[0] if getattr(config, "layers", None) is None else nn.ModuleList(parts)


def titles(configs: Iterable[InstrumentConfig]) -> str:
    """What people call instruments of these options."""
    return " and ".join(KINDS[config.kind].title for config in configs)
