"""Which philens this is, and versions of what decides numbers."""

import platform
from importlib import import_module

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """The version of philens and of each of these packages, or `python`; by default of those that decide
    what a run gives."""
    found = {"philens": __version__}
    for name in packages or ("torch", "transformers", "numpy", "python"):
        found[name] = platform.python_version() if name == "python" else import_module(name).__version__
    return found
