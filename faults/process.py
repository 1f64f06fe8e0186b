"""Commands of philens in processes of their own, what befalls them from outside, and what they leave.

A process is forked from a server that has imported everything, which saves most of a short run, and is really
killed. Commands as a user types them, imports and all, are started by `launch`.
"""

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from faults.table import Outcome

# For all processes: one thread each, so that sums have one order, and no network.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["faults.warm"])
# Seconds after which a process hangs.
LIMIT = 400
NOBODY = 65534

Setup = Callable[[], object]
# How a process ended can be read once, and multiprocessing reads it for all of them when it starts one.
_STATUS = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, what it wrote, and how long it ran."""

    code: int
    text: str
    seconds: float

    def __str__(self) -> str:
        last = [line for line in self.text.splitlines() if line.strip()][-1:] or ["nothing"]
        return f"exit code {self.code}, it said: {last[0][:200]}"


class Command:
    """A command of philens in a forked process.

    Args:
        words: the command line.
        log: a file for what it writes.
        setup: done in the process before the command: what is wrong with its machine.
        environment: variables besides.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        setup: Sequence[Setup] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        log.write_text("")
        ready, started = _SERVER.Pipe(duplex=False)
        self._process = _SERVER.Process(
            target=_run, args=(list(words), str(log), list(setup), dict(environment or {}), started)
        )
        with _STATUS:
            self._process.start()
        started.close()
        with contextlib.suppress(EOFError):
            ready.recv()
        ready.close()
        self._begin = time.monotonic()

    def signal(self, number: int) -> None:
        """Send a signal, if the process still runs."""
        if self._process.pid is not None and self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def limit_files(self, size: int) -> None:
        """From now on no file of the process may grow beyond so many bytes."""
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self._process.pid or 0, resource.RLIMIT_FSIZE, (size, size))

    def children(self) -> list[int]:
        """Processes that it has forked."""
        return children_of(self._process.pid or 0)

    def running(self) -> bool:
        with _STATUS:
            return self._process.is_alive()

    def wait(self) -> Ended:
        """Its end; one that hangs is killed and says so."""
        text = ""
        if not connection.wait([self._process.sentinel], LIMIT):
            self._process.kill()
            connection.wait([self._process.sentinel])
            text = f"\nit hung for {LIMIT} seconds"
        seconds = time.monotonic() - self._begin
        with _STATUS:
            code = self._process.exitcode
        return Ended(code or 0, self.log.read_text(errors="replace") + text, seconds)


def _run(words: list[str], log: str, setup: list[Setup], environment: dict[str, str], started: Any) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= environment
    multiprocessing.set_start_method(
        "fork", force=True
    )  # for processes of its own, as in a fresh interpreter
    for prepare in setup:
        prepare()
    from philens.cli import main

    started.send(True)
    started.close()
    code = main(words)
    # What a launcher sends when another process has ended may come now.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def children_of(parent: int) -> list[int]:
    """Processes that a process has started, and that are not its multiprocessing's own."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            line = status.with_name("cmdline").read_bytes()
            if int(fields[1]) == parent and fields[0] != "Z" and b"resource_tracker" not in line:
                found.append(int(status.parent.name))
    return found


def end_as_launcher(command: Command) -> Ended:
    """What a launcher does about the others when one of its processes is gone: it asks, then kills."""
    for patience, number in ((10, signal.SIGTERM), (30, signal.SIGKILL)):
        limit = time.monotonic() + patience
        while command.running() and time.monotonic() < limit:
            time.sleep(0.05)
        command.signal(number)
    return command.wait()


def run(words: Sequence[str], log: Path, setup: Sequence[Setup] = (), **environment: str) -> Ended:
    """A command of philens to its end."""
    return Command(words, log, setup, environment).wait()


def launch(
    command: Sequence[str],
    log: Path,
    at: Callable[["subprocess.Popen[bytes]"], object] = lambda process: None,
) -> Ended:
    """A command as a user starts it, from a fresh interpreter; `at` is called while it runs."""
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            at(process)
            code, text = process.wait(LIMIT), ""
        except subprocess.TimeoutExpired:
            code, text = -signal.SIGKILL, f"\nit hung for {LIMIT} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(code, log.read_text(errors="replace") + text, time.monotonic() - begin)


PHILENS = [sys.executable, "-m", "philens"]


def stopped_at(
    start: Callable[[Path], Command], place: Path, number: int, fraction: float, seconds: float
) -> tuple[Path, Ended]:
    """A command that gets a signal at a random moment.

    Args:
        start: starts it with an empty folder to fill, of a name of its own in `place`.
        number: of the signal.
        fraction, seconds: the moment is this part of how long it takes; where it is done by then, it is
            started anew, and given as much less time as it needed.

    Returns:
        The folder that it was filling, and how it ended.
    """
    for attempt in range(9):
        folder = place / f"output-{attempt}"
        command = start(folder)
        time.sleep(fraction * seconds)
        was_running = command.running()
        command.signal(number)
        ended = command.wait()
        if was_running and ended.code:
            return folder, ended
        seconds = min(ended.seconds, 0.9 * seconds)
    raise RuntimeError(f"it always ended before it was stopped; {ended}")


# Verdicts: None, or what is wrong.


def one_sentence(ended: Ended, code: int = 2) -> str | None:
    """Whether a command ended with one sentence, which says what to do."""
    lines = [line for line in ended.text.splitlines() if line.startswith("philens: ")]
    if "Traceback" in ended.text:
        return f"a traceback; {ended}"
    if ended.code != code:
        return f"not exit code {code}; {ended}"
    if len(lines) != 1:
        return f"{len(lines)} sentences; {ended}"
    return None if lines[0].endswith(".") else f"not a whole sentence: {lines[0]}"


def finished(ended: Ended) -> str | None:
    """Whether a command ended as it should, without a complaint."""
    if "Traceback" in ended.text:
        return f"a traceback; {ended}"
    return None if ended.code == 0 else f"not exit code 0; {ended}"


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """What differs between two results by name; no difference is too small."""
    if found.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        return f"missing {missing[:4]}, too much {extra[:4]}"
    changed = [name for name in expected if found[name] != expected[name]]
    return f"{changed[0]} differs ({len(changed)} in all)" if changed else None


def files_below(folder: Path, leave_out: Iterable[str] = ()) -> dict[str, bytes]:
    """The content of every file below a folder, hidden ones too, but for names in `leave_out`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }


def two_at_a_time(attempts: Iterable[Callable[[], str | None]]) -> Outcome:
    """Attempts, each of which says what went wrong, on two cores."""
    outcome = Outcome()
    with ThreadPoolExecutor(2) as pool:
        for problem in pool.map(_said, enumerate(attempts)):
            outcome.record(problem)
    return outcome


def _said(numbered: tuple[int, Callable[[], str | None]]) -> str | None:
    number, attempt = numbered
    try:
        problem = attempt()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return None if problem is None else f"{number}: {problem}"


# What is wrong with a process's machine. Done in the process itself, before the command begins.


def as_nobody() -> None:
    """Root may write everywhere; the user nobody may not."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def die_at_change(folder: str, number: int, count: str = "") -> None:
    """Kill this process by -9 when it is about to make a change in a folder, that of this number; or, every
    other time that it is about to write a file, when the file has just been opened and is still empty.

    Args:
        count: file in which changes are counted instead, an "x" for each.
    """
    seen, place = 0, os.path.abspath(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != "open" and event not in _PLACES:
            return
        path = _changed_path(event, arguments)
        if path is None or not f"{path}/".startswith(f"{place}/"):
            return
        seen += 1
        if count:
            with open(count, "a") as file:
                file.write("x")
        elif seen == number:
            if event == "open" and number % 2 and arguments[2] & os.O_TRUNC:
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


# Events of Python's audit that change what is at their first argument, and which of them is the descriptor of
# the folder that it is relative to.
_PLACES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _changed_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike) or (event == "open" and not arguments[2] & _WRITES):
        return None
    descriptor = arguments[_PLACES[event]] if event in _PLACES else -1
    base = os.getcwd() if descriptor == -1 else os.readlink(f"/proc/self/fd/{descriptor}")
    return os.path.abspath(os.path.join(base, os.fsdecode(path)))


def set_clock(by: float, every: float = 0.0) -> None:
    """Let the clock be wrong by so many seconds, and set back by as many again after each `every` seconds."""
    begin, real, real_ns = time.monotonic(), time.time, time.time_ns

    def off() -> float:
        jumps = 1 + ((time.monotonic() - begin) // every if every else 0)
        return max(by * jumps, 86_400 - real())  # not before 1970

    time.time = lambda: real() + off()
    time.time_ns = lambda: real_ns() + int(off() * 1e9)


# What is wrong with a folder. Each gives a place that cannot be written, or raises OSError where this machine
# does not permit to make it.


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system in memory on `folder`.

    Raises:
        OSError: mounting is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _system("mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder))
    try:
        yield folder
    finally:
        _system("umount", "--lazy", str(folder))


def remount(folder: Path, options: str) -> None:
    """Other options for what `mounted` gave; it becomes read-only when no file is open for writing."""
    for _ in range(2000):
        with contextlib.suppress(OSError):
            return _system("mount", "-o", f"remount,{options}", str(folder))
        time.sleep(0.001)
    raise OSError(errno.EBUSY, f"it could not be remounted {options}")


def fill(file: Path) -> None:
    """Write into a file until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


@contextlib.contextmanager
def unchangeable(folder: Path) -> Iterator[Path]:
    """A folder that even root cannot write into (chattr +i).

    Raises:
        OSError: the file system does not have that, or it is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _system("chattr", "+i", str(folder))
    try:
        yield folder
    finally:
        _system("chattr", "-i", str(folder))


def _system(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, f"{command[0]} takes too long") from error
    if done.returncode:
        raise OSError(errno.EPERM, f"{command[0]}: {done.stderr.strip()[:120]}")


def unwritable(
    place: Path, stack: contextlib.ExitStack
) -> tuple[dict[str, tuple[Path, list[Setup]]], list[str]]:
    """Places in which nothing can be written, by name, with what a process needs to find them so; and notes
    of what could not be made here."""
    file = place / "file"
    file.write_text("text")
    loop, nowhere = place / "loop", place / "nowhere"
    loop.symlink_to(loop)
    nowhere.symlink_to(place / "missing" / "folder")
    found: dict[str, tuple[Path, list[Setup]]] = {
        "a file": (file, []),
        "a path under a file": (file / "output", []),
        "a path under /proc": (Path("/proc/philens"), []),
        "a link in a loop": (loop, []),
        "a link in a loop on the way": (loop / "output", []),
        "a name of 300 letters": (place / ("x" * 300), []),
    }
    notes: list[str] = []
    if os.getuid() == 0:
        owned = place / "owned"
        owned.mkdir(mode=0o755)
        found["another user's folder"] = (owned, [as_nobody])
        found["a new folder in another user's"] = (owned / "output", [as_nobody])
    else:
        owned = place / "owned"
        owned.mkdir(mode=0o555)
        found["a folder without permission"] = (owned, [])
    makers = {
        "an unchangeable folder (chattr +i)": lambda: unchangeable(place / "fixed"),
        "a read-only mount": lambda: mounted(place / "mount", "size=1m", "ro"),
    }
    for name, make in makers.items():
        try:
            found[name] = (stack.enter_context(make()), [])
        except OSError as error:
            notes.append(f"not tried, {name}: {error.strerror}")
    return found, notes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(count: int) -> list[dict[str, str]]:
    """The environment that a launcher gives to each of several processes."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return [
        {**shared, "MASTER_PORT": port, "RANK": str(number), "LOCAL_RANK": str(number)}
        for number in range(count)
    ]
