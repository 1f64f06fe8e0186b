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
    with working(what, count) as done:
        for number, item in enumerate(items, 1):
            yield item
            done(number)


@contextmanager
def working(what: str, total: int | None = None, bar: bool = True) -> Iterator[Callable[..., None]]:
    """A bar while something is done, if standard error is a terminal.

    Args:
        what: what is being done.
        total: what will be done at the end; None if nobody knows.
        bar: False shows none.

    Yields:
        What to call with how much is done, and with other words for it if need be.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (bar and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, what=what: progress.update(task, completed=done, description=what)
