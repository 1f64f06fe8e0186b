"""Which of several processes this is: accelerate launch, torchrun and mpirun say it in the environment."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from philens.support.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rank:
    """One process among `of`, counted from 0. Processes that score need not talk to each other."""

    number: int = 0
    of: int = 1

    def takes(self, unit: int) -> bool:
        """Whether a unit of work with this number is for this process."""
        return unit % self.of == self.number


ALONE = Rank()
_NAMES = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def rank() -> Rank:
    """From RANK and WORLD_SIZE or what MPI calls them; the only process where they are not set.

    Raises:
        ConfigError: they are no such numbers.
    """
    for names in _NAMES:
        number, of = map(os.environ.get, names)
        if number is None or of is None:
            continue
        if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            raise ConfigError(
                f"{names[0]}={number} and {names[1]}={of} in the environment do not name one of several "
                "processes; unset them or start with accelerate launch or torchrun."
            )
        return Rank(int(number), int(of))
    return ALONE


def device() -> "torch.device | None":
    """The accelerator of this process, by LOCAL_RANK where a machine has several; None without one, or under
    `accelerate launch --cpu`. It becomes torch's current one."""
    import torch

    if not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return None
    torch.accelerator.set_device_index(
        int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    )
    return torch.accelerator.current_accelerator()
