"""A command that fills a folder, ended at a moment or a change on disk and gone on with: many times."""

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from faults import process
from faults.process import Command, Setup
from faults.table import Outcome

Attempt = Callable[[str, Path, float], str | None]


@dataclass(frozen=True)
class Undisturbed:
    """What nothing befell: its folder, how long it took, and how many changes it made there."""

    folder: Path
    seconds: float
    changes: int


class Start(Protocol):
    def __call__(self, root: Path, kind: str, folder: Path, setup: Sequence[Setup] = ()) -> Command: ...


@dataclass(frozen=True)
class Trials:
    """Commands of some kinds.

    Attributes:
        kinds: their names.
        undisturbed: what a kind does if nothing befalls it; done once.
        start: starts a command that fills a folder, or goes on with it.
        completed: what is wrong with a folder once such a command has ended it.
    """

    kinds: Sequence[str]
    undisturbed: Callable[[Path, str], Undisturbed]
    start: Start
    completed: Callable[[Path, str, Path], str | None]

    def each(self, count: int, place: Path, attempt: Attempt, kinds: Sequence[str] = ()) -> Outcome:
        """So many attempts by the kinds in turn: a folder each, and a random number in [0, 1)."""
        kinds, attempts = kinds or self.kinds, []
        for number in range(count):
            own = place / str(number)
            own.mkdir()
            attempts.append(partial(attempt, kinds[number % len(kinds)], own, random.random()))
        for kind in kinds:
            self.undisturbed(place.parent, kind)
        return process.two_at_a_time(attempts)

    def kill_at_random(self, place: Path) -> Outcome:
        """kill -9 at a moment drawn uniformly over the whole time, then completed."""

        def attempt(kind: str, own: Path, fraction: float) -> str | None:
            begin, seconds = (
                partial(self.start, place.parent, kind),
                self.undisturbed(place.parent, kind).seconds,
            )
            folder, ended = process.stopped_at(begin, own, signal.SIGKILL, fraction, seconds)
            if ended.code != -signal.SIGKILL:
                return f"it was not killed; {ended}"
            problem = self.completed(place.parent, kind, folder)
            return None if problem is None else f"{kind} killed at {fraction:.1%} of its time: {problem}"

        return self.each(20, place, attempt)

    def kill_at_changes(self, place: Path) -> Outcome:
        """kill -9 at a change in the folder drawn among all, also while going on, then completed."""

        def attempt(kind: str, own: Path, fraction: float) -> str | None:
            folder, changes = own / "output", self.undisturbed(place.parent, kind).changes
            numbers = (1 + int(fraction * changes), 1 + int(fraction * 7919) % 12)
            for number in numbers:
                die = partial(process.die_at_change, str(folder), number)
                ended = self.start(place.parent, kind, folder, [die]).wait()
                # What was nearly finished may make fewer changes than that when it goes on.
                if ended.code != -signal.SIGKILL and (number == numbers[0] or ended.code):
                    return f"{kind} at change {number} of {changes}: it was not killed; {ended}"
            problem = self.completed(place.parent, kind, folder)
            return None if problem is None else f"{kind} killed at changes {numbers} of {changes}: {problem}"

        return self.each(20, place, attempt)

    def stop_at_random(self, place: Path) -> Outcome:
        """Ctrl-C or SIGTERM at a random moment, then completed."""

        def attempt(kind: str, own: Path, fraction: float) -> str | None:
            number = signal.SIGTERM if own.name in "0257" else signal.SIGINT
            begin, seconds = (
                partial(self.start, place.parent, kind),
                self.undisturbed(place.parent, kind).seconds,
            )
            folder, ended = process.stopped_at(begin, own, number, fraction, seconds)
            # Before the work begins, a polite kill ends any program.
            if "Traceback" in ended.text or ended.code not in (0, 130, -signal.SIGTERM):
                return f"{kind}, {number.name} at {fraction:.1%} of its time: {ended}"
            problem = self.completed(place.parent, kind, folder)
            return None if problem is None else f"{kind} after {number.name} at {fraction:.1%}: {problem}"

        return self.each(8, place, attempt)
