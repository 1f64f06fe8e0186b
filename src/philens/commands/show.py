"""What commands print."""

import contextlib
import sys
from typing import Any

from philens.support.output import printable


def console() -> Any:
    """The terminal."""
    from rich.console import Console

    return Console()


def say(text: str) -> None:
    """Print a line, at once."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def tell(text: str) -> None:
    """Print a line that is for people only, on standard error."""
    with contextlib.suppress(OSError):  # nobody reads it, or the disk it goes to is full
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()
