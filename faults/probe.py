"""Try many things in child processes: one that hangs, dies or takes the memory harms nobody else."""

import json
import os
import resource
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.table import Outcome

PROCESSES = 2
_LONGEST_SENTENCE = 1200


def sentence(error: BaseException) -> str | None:
    """What is wrong with an exception as an answer to bad input; None if it is one sentence of philens."""
    from philens.support.errors import PhilensError

    text = str(error)
    if not isinstance(error, PhilensError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return f"{type(error).__name__} at {where}: {' '.join(text.split())[:200]}"
    if not text.rstrip().endswith((".", "?")) or len(text) > _LONGEST_SENTENCE:
        return f"not one sentence: {text[:300]!r}"
    return None


def attempt(work: Callable[[], str | None]) -> str | None:
    """What goes wrong: an exception that is no sentence of philens, or what `work` says."""
    try:
        return work()
    except Exception as error:
        return sentence(error)


def probe(
    items: Sequence[Any],
    work: Callable[[Any, Path], str | None],
    folder: Path,
    seconds: float = 30.0,
    gigabytes: float | None = 2.0,
    processes: int = PROCESSES,
    confined: bool = False,
) -> Outcome:
    """Call `work` on every item, with a folder of its process, in children that take turns.

    An item is survived where `work` returns None or raises one sentence of philens, within `seconds`, without
    the process dying, and without it growing by more than `gigabytes`. Where it is `confined`, it is refused
    memory beyond that, as a container would; else it is stopped.
    """
    outcome = Outcome()
    children = [
        _Child(
            items,
            range(k, len(items), processes),
            work,
            folder / f"child-{k}",
            gigabytes if confined else None,
        )
        for k in range(processes)
    ]
    with selectors.DefaultSelector() as ready:
        for child in children:
            child.start(ready)
        while ready.get_map():
            for key, _ in ready.select(timeout=0.2):
                child = key.data
                for number, problem, grown in child.read(ready):
                    if problem is None and gigabytes is not None and grown > gigabytes:
                        problem = f"took {grown:.1f} GB"
                    elif problem is not None:
                        problem = f"{problem} ({grown:.1f} GB)" if grown > 0.5 else problem
                    outcome.record(None if problem is None else f"{describe(items[number])}: {problem}")
            for child in children:
                if child.pid and time.monotonic() - child.since > seconds:
                    os.kill(child.pid, signal.SIGKILL)
                    child.reason = f"still at work after {seconds:.0f} s"
                elif child.pid and gigabytes is not None and _resident(child.pid) > gigabytes + 2:
                    os.kill(child.pid, signal.SIGKILL)
                    child.reason = f"took more than {gigabytes + 2:.0f} GB"
    return outcome


def _resident(process: int) -> float:
    """Gigabytes that a process has in memory."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 1e9
    except (OSError, IndexError):
        return 0.0


def describe(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 160 else f"{text[:160]}..."


class _Child:
    """A process that works off some of the items, and is replaced when it dies."""

    def __init__(
        self,
        items: Sequence[Any],
        numbers: Sequence[int],
        work: Callable[[Any, Path], str | None],
        folder: Path,
        gigabytes: float | None,
    ) -> None:
        self.gigabytes = gigabytes
        self.items, self.left, self.work, self.folder = items, list(numbers), work, folder
        self.pid, self.pipe, self.since, self.waiting, self.reason = 0, -1, 0.0, b"", ""

    def start(self, ready: selectors.BaseSelector) -> None:
        if not self.left:
            return
        self.folder.mkdir(exist_ok=True)
        self.pipe, end = os.pipe()
        self.since, self.waiting, self.reason = time.monotonic(), b"", "the process died"
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            try:
                self._run(end)
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(end)
        ready.register(self.pipe, selectors.EVENT_READ, self)

    def _run(self, end: int) -> None:
        # What a library prints is not the table's.
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.gigabytes is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + int(self.gigabytes * 1e9),) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in list(self.left):
            problem = attempt(lambda n=number: self.work(self.items[n], self.folder))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
            os.write(end, json.dumps([number, problem, grown]).encode() + b"\n")
            if grown > 1.0:
                return  # the peak does not go down again: a fresh process has its own

    def read(self, ready: selectors.BaseSelector) -> list[tuple[int, str | None, float]]:
        """What has become known; a process that has ended is replaced."""
        data = os.read(self.pipe, 1 << 16)
        *lines, self.waiting = (self.waiting + data).split(b"\n")
        found = [tuple(json.loads(line)) for line in lines]
        for number, _, _ in found:
            self.left.remove(number)
            self.since = time.monotonic()
        if not data:
            ready.unregister(self.pipe)
            os.close(self.pipe)
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            if self.left and status:
                found.append((self.left.pop(0), self.reason, 0.0))
            self.start(ready)
        return found
