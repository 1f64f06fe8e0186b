"""What a case of faults is, and the table of how many were survived."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Outcome:
    """How one case went.

    Args:
        tried: faults injected.
        survived: those after which philens gave the right result or one sentence.
        notes: one line for each fault that was not survived (what was done, what came of it), and for
            what could not be tried here.
    """

    tried: int = 0
    survived: int = 0
    notes: list[str] = field(default_factory=list)

    def record(self, problem: str | None) -> None:
        """Count one fault: survived when `problem` is None, else noted with what went wrong."""
        self.tried += 1
        if problem is None:
            self.survived += 1
        else:
            self.notes.append(problem)


@dataclass(frozen=True)
class Case:
    """One kind of fault.

    Args:
        group: what it is injected into, e.g. "training" (`python -m faults training` runs the group).
        name: the fault in a few words.
        run: injects it, as often as it likes, in an empty folder of its own. What it draws comes from
            Python's global `random`, seeded for each case by the run's seed and the case's name, so that
            `--seed` repeats it whichever groups run.
    """

    group: str
    name: str
    run: Callable[[Path], Outcome]


def run_cases(cases: Iterable[Case], folder: Path, seed: int, console: Console) -> bool:
    """Run every case in a folder of its own, print each as it ends and the table; whether all survived.

    A case that raises counts as one fault that was not survived.
    """
    table = Table("faults in", "fault", title="Faults: tried and survived")
    for name in ("tried", "survived", "seconds"):
        table.add_column(name, justify="right")
    total, began = Outcome(), time.monotonic()
    for number, case in enumerate(cases):
        start = time.monotonic()
        random.seed(f"{seed} {case.group} {case.name}")
        place = folder / f"case-{number}"
        place.mkdir()
        try:
            outcome = case.run(place)
        except Exception as error:
            console.print_exception()
            outcome = Outcome(tried=1, notes=[f"the case itself failed: {error}"])
        seconds = time.monotonic() - start
        style = "red" if outcome.survived < outcome.tried else ""
        counts = (f"{outcome.tried:,}", f"{outcome.survived:,}", f"{seconds:.0f}")
        table.add_row(case.group, case.name, *counts, style=style)
        tally = f"{counts[1]} of {counts[0]} survived, {counts[2]} s"
        console.print(f"{case.group}: {case.name}: {tally}", style=style, markup=False)
        for note in outcome.notes:
            console.print(f"  {note}", markup=False)
        console.file.flush()
        total.tried += outcome.tried
        total.survived += outcome.survived
    table.add_section()
    table.add_row("all", "", f"{total.tried:,}", f"{total.survived:,}", f"{time.monotonic() - began:.0f}")
    console.print(table)
    return total.survived == total.tried
