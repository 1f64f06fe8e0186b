"""Rows about whole processes: how long they take to start, how much memory they need."""

import json
import subprocess
import sys
import tempfile

from benchmarks.harness import Bench, Comparison, Series, Target, Unavailable
from philens.support.errors import InputError

HELP = "import sys; from philens.cli import main; code = main(['--help'])"
HELP_SECONDS = 0.5
# The paper's requirement, and what is wanted.
PAPER_BYTES, WANTED_BYTES = 24e9, 12e9


def _run(*arguments: str, timeout: float = 3600) -> str:
    """What a Python process with these arguments writes to standard output."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"python {' '.join(arguments[:2])} failed: {reason}")
    return done.stdout


def startup(bench: Bench) -> list[Comparison]:
    """New processes, one after the other: what `import philens` and `philens --help` take."""
    if _run("-c", f"{HELP}; print('torch' in sys.modules)").splitlines()[-1] != "False":
        raise InputError("philens --help imports torch; import it where it is used.")
    codes = {
        "philens --help": f"{HELP}; sys.exit(code)",
        "import philens": "import philens",
        "python alone": "pass",
        "import torch": "import torch",
    }
    seconds = bench.alternate({name: lambda code=code: _run("-c", code) for name, code in codes.items()})
    shown, imported, python, torch = seconds.values()
    limit = Series("limit", [HELP_SECONDS])
    return [
        Comparison(shown, limit, Target(1.0, text=f"≤ {HELP_SECONDS} s"), "torch is not imported"),
        Comparison(shown, torch, None, ""),
        Comparison(imported, python, None, ""),
    ]


def memory(bench: Bench) -> list[Comparison]:
    """Peak memory of two steps by the recipe llama_3_2_3b, on a model of that very shape."""
    if bench.device.type != "cuda":
        raise Unavailable("needs a GPU; python -m benchmarks.memory measures smaller models on a CPU")
    if bench.scale == "smoke":
        raise Unavailable("has no small scale; python -m benchmarks.memory --width 384 is one")
    with tempfile.TemporaryDirectory() as scratch:
        found = json.loads(_run("-m", "benchmarks.memory", "--steps", "2", "--folder", scratch))
    ours = Series("peak memory, llama_3_2_3b", [found["peak_gb"] * 1e9], "B")
    paper = Series("the paper's requirement", [PAPER_BYTES], "B")
    target = Target(WANTED_BYTES / PAPER_BYTES, text=f"≤ {WANTED_BYTES / 1e9:.0f} GB")
    return [
        Comparison(
            ours, paper, target, f"{found['parameters'] / 1e9:.1f}B parameters, 2 rows of 2,048 tokens"
        )
    ]
