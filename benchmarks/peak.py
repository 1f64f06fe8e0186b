"""Peak memory: of the device's allocator on a GPU, of all that tensors hold on a CPU."""

import resource
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Follows how many bytes tensors hold; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held or self.held[key][0].expired():
            self.total += storage.nbytes() - (self.held[key][1] if key in self.held else 0)
            self.held[key] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Arguments too: weights may be read from a file, not made by an operation.
        for tensor in tree_iter((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        if self.total > self.peak:
            self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.held.values())
            self.peak = max(self.peak, self.total)
        return result


def peak_bytes(device: torch.device, work: Callable[[], object], before: Iterable[Tensor]) -> int:
    """The most bytes that `work` holds at once beyond the tensors that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    live = LiveTensors()
    for tensor in before:
        live.note(tensor)
    held = live.total
    with live:
        work()
    return max(0, live.peak - held)


def resident() -> float:
    """GB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


class Peak(threading.Thread):
    """Follows the resident set of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gigabytes = 0.0

    def run(self) -> None:
        while True:
            self.gigabytes = max(self.gigabytes, resident())
            time.sleep(0.02)
