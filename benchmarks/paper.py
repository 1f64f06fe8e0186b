"""The paper's recipes at full size for a few steps, and the GPU hours to be expected of the whole run.

    python -m benchmarks.paper [transformer_pfa lstm_pfa] [--rows 1] [--length 512] [--peak 165]

A run of `--rows` packed rows of `--length` tokens a step, at full width and depth, is trained for three
steps, and again from its checkpoint at the second, as after a kill: the last loss must come out the same.
Operations are floating-point ones of all matrix products, counted as they run (attention's own are left out:
a few per cent with documents of the paper's length). Hours are those of the recipe's own steps, rows and
tokens, over what the GPU reaches: its peak times `--utilisation`.
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
from philens.support.errors import PhilensError
from philens.training.build import start_model
from philens.training.recipe import Recipe, load_recipe
from philens.training.trainer import train, training_rows

RECIPES = ("transformer_pfa", "lstm_pfa")
STEPS = 2
# Tokens of a row whose operations are counted: products cost the same for each, however long the row is.
COUNTED = 128


def count_operations(recipe: Recipe) -> float:
    """Floating-point operations of a token's forward and backward pass."""
    data, training = replace(recipe.data, length=COUNTED), replace(recipe.train, compile=False)
    recipe = replace(recipe, data=data, train=training)
    lens, tokenizer = start_model(recipe)
    lens.train()
    rows = training_rows(recipe, tokenizer)
    batch = default_collate([rows[number] for number in range(recipe.train.batch_size)])
    # oneDNN's LSTM is one operation, whose products are not seen.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        lens(**batch, returns="states", packed=recipe.data.packing).loss.backward()
    return counter.get_total_flops() / batch["input_ids"].numel()


def measure(name: str, rows: int, length: int, folder: Path) -> dict[str, Any]:
    """Train a little by a recipe, go on from its checkpoint, and count what a token costs."""
    whole = load_recipe(name)
    few = {"optimizer.warmup_steps": 1, "train.steps": STEPS + 1, "train.save_every": STEPS}
    few |= {"train.log_every": 1, "train.eval_every": 0, "train.evaluation_documents": 2}
    few |= {"train.batch_size": rows, "data.length": length, "data.workers": 0}
    recipe = load_recipe(name, few | {"train.compile": whole.train.compile and torch.cuda.is_available()})
    peak = Peak()
    peak.start()
    parameters, every = 0, []
    for _ in range(2):
        lens = train(recipe, folder, resume=True)
        if lens is None:
            raise KeyboardInterrupt
        parameters = sum(parameter.numel() for parameter in lens.parameters())
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        every.append([record for record in records if "tokens_per_second" in record])
        # As if the run had been killed after its first checkpoint.
        for part in ("model", "adapter", f"checkpoint-{STEPS + 1}"):
            shutil.rmtree(folder / part)
    straight, resumed = every
    return {
        "recipe": name,
        "parameters": parameters,
        "loss": [record["loss"] for record in straight],
        "last_loss_resumed": resumed[-1]["loss"],
        "tokens_per_second": [record["tokens_per_second"] for record in straight],
        "peak_gb": peak.gigabytes,
        "operations_per_token": count_operations(recipe),
        "tokens": whole.train.steps * whole.train.batch_size * whole.data.length,
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--rows", type=int, default=1, help="rows a step; the recipes have 16")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row; the recipes have 2,048")
    parser.add_argument("--peak", type=float, default=165, help="TFLOP/s of the GPU in bfloat16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached")
    options = parser.parse_args()
    if options.peak <= 0 or options.utilisation <= 0:
        parser.error("--peak and --utilisation must be above 0.")
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = measure(name, options.rows, options.length, Path(scratch) / "run")
            except PhilensError as error:
                parser.error(str(error))
        total = found["operations_per_token"] * found["tokens"]
        hours = total / (options.peak * 1e12 * options.utilisation) / 3600
        sys.stdout.write(json.dumps(found | {"operations": total, "gpu_hours": hours}, indent=2) + "\n")


if __name__ == "__main__":
    main()
