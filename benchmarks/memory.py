"""Peak memory of training by the Llama 3.2 3B recipe, on a model of that very shape with random weights.

    python -m benchmarks.memory [--steps 2] [--width 3072] [--folder FOLDER]

Weights take 6.4 GB on disk and in memory; on a CPU a step takes many minutes. On a GPU the figure is what
torch allocated there. On a CPU it is the largest resident set of the process, with Python, its libraries and
what they pack for themselves; with `--tensors`, the most bytes that tensors held at once, which is what a GPU
would hold but for its workspaces (slow: for smaller widths, from which activations go up in proportion).
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.models import write_llama
from benchmarks.peak import LiveTensors, Peak, resident


def measure(model: Path, folder: Path, steps: int, layer: int, tensors: bool) -> dict[str, float]:
    """Train for some steps by the recipe, on text that is installed; returns gigabytes."""
    from philens.training.recipe import load_recipe
    from philens.training.trainer import train

    recipe = load_recipe(
        "llama_3_2_3b",
        {
            "model.base": str(model),
            "phi.layer": layer,
            "data.parts": {"text": {"source": "installed"}},
            "data.workers": 0,
            "train.steps": steps,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.save_every": 0,
            "train.evaluation_documents": 2,
        },
    )
    on_gpu = torch.cuda.is_available()
    before = resident()
    peak = Peak()
    peak.start()
    begin = time.monotonic()
    live = LiveTensors()
    with live if tensors else contextlib.nullcontext():
        train(recipe, folder)
    found = {"seconds": time.monotonic() - begin}
    if tensors:
        return found | {"peak_gb": live.peak / 1e9}
    if on_gpu:
        return found | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return found | {"peak_gb": peak.gigabytes, "of_it_python_and_libraries_gb": before}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--width", type=int, default=3072, help="a multiple of 384")
    parser.add_argument("--tensors", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model = Path(scratch) / "model"
        parameters = write_llama(model, options.blocks, options.width)
        layer = 19 * options.blocks // 28
        found = measure(model, Path(scratch) / "run", options.steps, layer, options.tensors)
        records = (Path(scratch) / "run" / "metrics.jsonl").read_text()
    described = {"parameters": parameters, "width": options.width, "blocks": options.blocks}
    described |= {"layer": layer, "steps": options.steps}
    sys.stderr.write(records)
    sys.stdout.write(json.dumps(described | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
