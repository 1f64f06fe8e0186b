"""Inject the faults and print the table; exits 1 unless all are survived.

python -m faults [GROUP ...] [--seed N]
"""

import argparse
import importlib
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from faults.table import Case, run_cases

# The modules that define cases() here; one that is missing fails the run.
MODULES = ("training", "scoring", "files", "texts", "recipes")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(MODULES))
    parser.add_argument("--seed", type=int, default=None, help="repeat the run that printed this seed")
    arguments = parser.parse_args()
    for group in arguments.groups:
        if group not in MODULES:
            parser.error(f"no group {group!r}; groups are {', '.join(MODULES)}")
    # What a shell starts in the background ignores Ctrl-C, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    console = Console(width=110)
    console.print(f"seed {seed} (repeat with --seed {seed})", highlight=False)
    cases: list[Case] = []
    for name in arguments.groups or MODULES:
        cases += importlib.import_module(f"faults.{name}").cases()
    with tempfile.TemporaryDirectory(prefix="philens-faults-") as folder:
        Path(folder).chmod(0o755)  # some cases run as another user
        survived = run_cases(cases, Path(folder), seed, console)
    return 0 if survived else 1


if __name__ == "__main__":
    sys.exit(main())
