"""Checks before a release; each prints what it saw and exits with 1 if something failed.

python -m releasing dist                               wheel, sdist and extras
python -m releasing compat [NAME ...] [--python X.Y]   oldest and newest dependencies
python -m releasing same CHECKOUT                      compare what is computed, bit by bit
python -m releasing layer RUN                          make the layer that is shipped, of a run folder
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from releasing import compat, dist
from releasing.steps import Failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a check; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m releasing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    checks = parser.add_subparsers(dest="check", required=True)
    checks.add_parser("dist", help="wheel and sdist in empty environments, extras resolve")
    old_new = checks.add_parser("compat", help="the tests with the oldest and the newest dependencies")
    names = list(compat.RESOLUTIONS)
    old_new.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; by default all")
    old_new.add_argument("--python", help="of the environments, as uv takes it; by default this one")
    same = checks.add_parser("same", help="compare what is computed with another checkout, bit by bit")
    same.add_argument("checkout", metavar="CHECKOUT", type=Path, help="folder of another checkout")
    layer = checks.add_parser("layer", help="make the layer that is shipped, of a run folder or checkpoint")
    layer.add_argument("run", metavar="RUN", type=Path, help="where philens train put it")
    layer.add_argument("--base", default="smollm2", help="name of the base model; smollm2 by default")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    try:
        if options.check == "dist":
            dist.check(console)
        elif options.check == "same":
            from releasing.same import check

            check(console, options.checkout)
        elif options.check == "layer":
            from releasing.layer import ship

            ship(console, options.run, options.base)
        else:
            if unknown := set(options.names) - set(names):
                parser.error(f"there is no {unknown.pop()!r}; choose from {', '.join(names)}")
            compat.check(console, options.names or names, options.python or sys.executable)
    except Failed as failure:
        console.print(f"FAILED: {failure}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
