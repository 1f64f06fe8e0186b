"""`python -m releasing same CHECKOUT`: what philens computes here and there, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from releasing.steps import ROOT, Failed


def check(console: Console, checkout: Path) -> None:
    """Run `releasing/probe.py` on the code of both, one thread each, and compare.

    Args:
        console: what was seen goes there.
        checkout: another checkout of philens, such as a `git worktree` of an earlier commit.

    Raises:
        Failed: something differs, or the probe did not run.
    """
    there, here = digests(checkout), digests(ROOT)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            console.print(f"differs  {name}")
    same = sum(there[name] == value for name, value in here.items() if name in there)
    console.print(f"{same} of {len(there.keys() | here.keys())} are equal bit by bit.")
    if same < len(there.keys() | here.keys()):
        raise Failed(f"{checkout} computes something else")


def digests(checkout: Path) -> dict[str, str]:
    """What the probe says of the code in a checkout, by name.

    Raises:
        Failed: it did not run to its end.
    """
    source = checkout / "src"
    if not (source / "philens").is_dir():
        raise Failed(f"{checkout} has no src/philens")
    environment = os.environ | {"PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"}
    probe = [sys.executable, str(ROOT / "releasing" / "probe.py")]
    done = subprocess.run(probe, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise Failed(f"the probe failed in {checkout}\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)
