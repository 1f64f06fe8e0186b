"""The paper's recipes at full size for a few steps, and the GPU hours to be expected of the whole run.

    python -m benchmarks.paper [transformer_pfa lstm_pfa] [--rows 1] [--steps 2] [--peak 165]

A run of `--rows` packed rows a step is trained for one step more than `--steps`, and then again from its
checkpoint at `--steps`, as after a kill: the last loss must come out the same. Floating-point operations are
those of all matrix products of one step, counted as they run (attention's own are left out: a few per cent
with documents of the paper's length). Hours are the whole run's operations over what the GPU reaches: peak
times `--utilisation`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peak import Peak
from philens.training.build import start_model
from philens.training.recipe import Recipe, load_recipe
from philens.training.trainer import train, training_rows

RECIPES = ("transformer_pfa", "lstm_pfa")


def count_operations(recipe: Recipe) -> tuple[int, int]:
    """Floating-point operations of a step's forward and backward pass, and its tokens, padding included."""
    lens, tokenizer = start_model(recipe)
    lens.train()
    rows = training_rows(recipe, tokenizer)
    batch = default_collate([rows[number] for number in range(recipe.train.batch_size)])
    # oneDNN's LSTM is one operation, whose products are not seen.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        lens(**batch, returns="states", packed=recipe.data.packing).loss.backward()
    return counter.get_total_flops(), batch["input_ids"].numel()


def measure(name: str, rows: int, steps: int, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a little by a recipe, go on from its checkpoint, and count what a token costs."""
    whole = load_recipe(name, values)
    small = values | {
        "train.batch_size": rows,
        "data.workers": 0,
        "train.log_every": 1,
        "train.eval_every": 0,
    }
    small |= {"optimizer.warmup_steps": 1, "train.save_every": steps, "train.evaluation_documents": 2}
    recipe = load_recipe(name, small | {"train.steps": steps + 1})
    peak = Peak()
    peak.start()
    losses = []
    for _ in range(2):
        lens = train(recipe, folder, resume=True)
        assert lens is not None
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = [record for record in records if "tokens_per_second" in record]
        losses.append(logged[-1]["loss"])
        # As if the run had been killed after its first checkpoint.
        for part in ("model", "adapter", f"checkpoint-{steps + 1}"):
            shutil.rmtree(folder / part)
    operations, tokens = count_operations(replace(recipe, train=replace(recipe.train, compile=False)))
    return {
        "recipe": name,
        "parameters": sum(parameter.numel() for parameter in lens.parameters()),
        "steps": [record["step"] for record in logged],
        "loss": [record["loss"] for record in logged],
        "last_loss_resumed": losses[1] == losses[0],
        "tokens_per_second": [record["tokens_per_second"] for record in logged],
        "peak_gb": peak.gigabytes,
        "operations_per_token": operations / tokens,
        "tokens": whole.train.steps * whole.train.batch_size * whole.data.length,
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--rows", type=int, default=1, help="rows a step; the recipes have 16")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--peak", type=float, default=165, help="TFLOP/s of the GPU in bfloat16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="recipe keys to replace")
    options = parser.parse_args()
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(name, options.rows, options.steps, options.set, Path(scratch) / "run")
        total = found["operations_per_token"] * found["tokens"]
        found |= {
            "operations": total,
            "gpu_hours": total / (options.peak * 1e12 * options.utilisation) / 3600,
        }
        sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
