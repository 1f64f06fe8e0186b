"""What commands print."""

import sys
from typing import Any


def console() -> Any:
    """The terminal."""
    from rich.console import Console

    return Console()


def say(text: str) -> None:
    """Print a line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
