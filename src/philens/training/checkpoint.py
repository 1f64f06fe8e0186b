"""What Trainer keeps in a checkpoint beside weights, read with a sentence for what was not written by it."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from philens.bases.hub import reason
from philens.support.errors import AdapterError, TrainingError
from philens.support.files import check_file, read_json
from philens.support.typed import convert
from philens.training.folder import step_of

CHECKPOINT_LOGS = "logs.json"
OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
_STATE_BYTES = 256 << 20  # it has a line for every record of a run


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Raise a TrainingError about whatever goes wrong with a checkpoint's file in the block: its path.

    What is in it may be anything, and so may what comes out.
    """
    try:
        yield path
    except (AdapterError, TrainingError):
        raise
    except Exception as error:
        raise TrainingError(
            f"{path} does not hold what a checkpoint of this run does ({reason(error)}); remove its folder "
            "and --resume from the one before, or start again with another --output."
        ) from error


def load_tensors(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, if it is tensors, numbers and text: objects of any other kind are never made.

    Raises:
        AdapterError: there is no such file.
        Exception: of any kind, where it holds something else.
    """
    check_file(path)
    with zipfile.ZipFile(path) as archive:  # what is compressed may be far larger than its file
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_state(checkpoint: Path) -> None:
    """Raise a TrainingError unless Trainer can take up the state that it left in a checkpoint."""
    with reading(checkpoint / STATE_FILE) as path:
        state, expected = read_json(path, _STATE_BYTES), step_of(checkpoint)
        kinds = {"global_step": int, "max_steps": int, "epoch": float, "log_history": list[dict[str, float]]}
        for name, kind in kinds.items():
            convert(state[name], kind, name)
        if TrainerState(**state).global_step != expected:
            raise ValueError(f"it is of step {state['global_step']}")
