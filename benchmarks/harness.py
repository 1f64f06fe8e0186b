"""What every row shares: works timed in turn, the machine they ran on, and what a row reports."""

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

Choice = TypeVar("Choice")
Scale = Literal["smoke", "full"]
# A sample shorter than this is made of several runs.
SHORTEST_SAMPLE = 0.1


class Unavailable(Exception):
    """Why a row cannot run on this machine, in one sentence. No failure."""


@dataclass(frozen=True)
class Series:
    """What was measured of one work, a value for each repetition.

    Attributes:
        name: what was measured.
        values: in the order of the repetitions; one where the value is quoted or a limit.
        unit: `s`, `B`, or what is done per second.
    """

    name: str
    values: list[float]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def per_second(self, amount: float, unit: str) -> "Series":
        """Seconds as a rate: each run dealt with so many of `unit`."""
        return Series(self.name, [amount / value for value in self.values], f"{unit}/s")


def total(name: str, parts: list[Series]) -> Series:
    """The sum of series, repetition by repetition."""
    values = [math.fsum(values) for values in zip(*(part.values for part in parts), strict=True)]
    return Series(name, values, parts[0].unit)


@dataclass(frozen=True)
class Target:
    """What a ratio should be: at most, or at least, the limit; `text` says it where the ratio does not."""

    limit: float
    at_most: bool = True
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"{'≤' if self.at_most else '≥'} {self.limit:g}"

    def is_met(self, ratio: float) -> bool:
        return ratio <= self.limit if self.at_most else ratio >= self.limit


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        ours: what philens takes.
        theirs: what it is compared with.
        target: of the ratio of their medians; None where the figure is only for information.
        note: shapes and anything that must be known to read the figures.
        details: more figures, for the JSON.
    """

    ours: Series
    theirs: Series
    target: Target | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.ours.median / self.theirs.median

    @property
    def ratios(self) -> list[float]:
        """Of each repetition; of one value with another, all that there are."""
        ours, theirs = self.ours.values, self.theirs.values
        if len(ours) == len(theirs):
            return [a / b for a, b in zip(ours, theirs, strict=True)]
        return [a / b for a in ours for b in theirs]

    @property
    def is_met(self) -> bool | None:
        return None if self.target is None else self.target.is_met(self.ratio)


@dataclass
class Bench:
    """How rows are to measure.

    Attributes:
        device: where models run.
        scale: `smoke` shapes only show that a row runs.
        repetitions: of every work, after a warm-up.
        reference: another PHi implementation, see `benchmarks.layer.load_reference`.
        say: told what is going on.
    """

    device: torch.device
    scale: Scale = "full"
    repetitions: int = 5
    reference: Path | None = None
    say: Callable[[str], object] = lambda text: None

    def pick(self, smoke: Choice, cpu: Choice, gpu: Choice) -> Choice:
        """What fits the scale and the device."""
        if self.scale == "smoke":
            return smoke
        return gpu if self.device.type == "cuda" else cpu

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: bfloat16 where the device is fast at it, which is what recipes choose."""
        if self.device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32

    def autocast(self) -> torch.autocast:
        """As training by a recipe computes here."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def alternate(
        self, works: Mapping[str, Callable[[], object]], repetitions: int | None = None
    ) -> dict[str, Series]:
        """Seconds of each work, run in turn: A B, B A, A B, ... after one warm-up of each.

        Works that take little time are run several times, all of them as often, for one sample.
        """
        repetitions = repetitions or self.repetitions
        longest = 0.0
        gc.collect()
        gc.freeze()  # what was there before need not be looked through for each sample
        for name, work in works.items():
            self.say(f"{name}: warm-up")
            seconds = self._seconds(work, 1)
            if self.scale == "full" and seconds < 10 * SHORTEST_SAMPLE:
                seconds = self._seconds(work, 1)  # without what only the first time costs
            longest = max(longest, seconds)
        runs = max(1, math.ceil(SHORTEST_SAMPLE / longest)) if self.scale == "full" else 1
        values: dict[str, list[float]] = {name: [] for name in works}
        for repetition in range(repetitions):
            for name in list(works)[:: 1 if repetition % 2 == 0 else -1]:
                self.say(f"{name}: {repetition + 1} of {repetitions}")
                values[name].append(self._seconds(works[name], runs))
        gc.unfreeze()
        return {name: Series(name, found) for name, found in values.items()}

    def _seconds(self, work: Callable[[], object], runs: int) -> float:
        gc.collect()
        gc.disable()
        try:
            self.wait()
            begin = time.perf_counter()
            for _ in range(runs):
                work()
            self.wait()
            return (time.perf_counter() - begin) / runs
        finally:
            gc.enable()

    def tidy(self) -> None:
        """Let nothing of a row slow down the next."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine, and how much else was going on when the measurement began."""
    import psutil
    import transformers

    import philens

    about = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "philens": philens.__version__,
    }
    return about


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
