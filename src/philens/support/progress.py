"""A bar on standard error while something long goes on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def shown(items: Iterable[Item], what: str, count: int) -> Iterator[Item]:
    """The same items, with a bar if standard error is a terminal.

    Args:
        what: what is being done, such as `scoring`.
        count: how many items there are.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, count, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def working(what: str, total: int | None = None) -> Iterator[Callable[[int], object]]:
    """A bar while something is done, if standard error is a terminal; gives what is told how far it is.

    Args:
        what: what is being done.
        total: what it will be at the end; None if nobody knows.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
