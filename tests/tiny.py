"""A recipe so small that a run takes a second, and what its layer has."""

from typing import Any

from philens.lens.metrics import METRICS
from philens.training.recipe import Recipe, load_recipe

# What a PHi layer in the path has; a shallow head has another one (test_mtd.py).
OF_A_LAYER = [name for name, metric in METRICS.items() if "head" not in metric.needs]

TINY: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.intermediate_size": 16,
    "model.layers": 2,
    "model.heads": 2,
    "phi.layer": 0,
    "phi.prior_heads": 2,
    "phi_schedule.start_step": 4,
    "phi_schedule.warmup_steps": 3,
    "data.mixture": {"memorized_sequences": 1, "in_context_language": 2},
    "data.tasks.strings": [2, 3],
    "data.tasks.string_length": [8, 12],
    "data.length": 32,
    "data.group": 3,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 2,
    "train.steps": 9,
    "train.batch_size": 2,
    "train.precision": "fp32",
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.save_every": 2,
    "train.evaluation_documents": 2,
}


def tiny_values(**changes: Any) -> dict[str, Any]:
    """Dotted keys of the tiny recipe; `train__steps=3` changes `train.steps`."""
    return TINY | {key.replace("__", "."): value for key, value in changes.items()}


def tiny_recipe(**changes: Any) -> Recipe:
    return load_recipe(None, tiny_values(**changes))


def as_options(values: dict[str, Any]) -> list[str]:
    """Keys as a command line."""
    import json

    return [word for key, value in values.items() for word in (f"--{key}", json.dumps(value))]
