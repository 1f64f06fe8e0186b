"""Models from recipes, and the run folders that training leaves behind."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from philens.adapter import load, read_json, read_safetensors
from philens.errors import AdapterError
from philens.model import PHiModel, attach
from philens.training.recipe import Recipe, load_recipe

RECIPE_FILE, METRICS_FILE, VERSIONS_FILE = "recipe.yaml", "metrics.jsonl", "versions.json"
MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"


def build_base(recipe: Recipe) -> Any:
    """The recipe's base model with fresh weights, drawn from its seed; a transformers model."""
    torch.manual_seed(recipe.seed)
    model = recipe.model
    if model.architecture == "lstm":
        from philens.lstm import LSTMConfig, LSTMForCausalLM

        return LSTMForCausalLM(
            LSTMConfig(
                vocab_size=128,
                hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size,
                num_hidden_layers=model.layers,
            )
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            max_position_embeddings=max(2048, recipe.data.length),
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def build_model(recipe: Recipe) -> PHiModel:
    """The recipe's base model with its PHi layer, fresh."""
    return attach(build_base(recipe), recipe.phi)


def load_base(folder: str | Path) -> Any:
    """A base model that philens saved; its weights file is checked first.

    Raises:
        AdapterError: it is missing or damaged.
    """
    from transformers import AutoModelForCausalLM

    import philens.lstm  # noqa: F401  (registers the LSTM with transformers)

    folder = Path(folder)
    read_json(folder / "config.json")
    read_safetensors(folder / "model.safetensors")
    try:
        base, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(f"{folder} does not hold a model that can be loaded ({reason}).") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise AdapterError(f"{folder} has missing or unknown weights ({wrong[0]}); it is damaged or something else.")
    return base


def load_run(folder: str | Path) -> tuple[PHiModel, Recipe]:
    """A finished run's model, in evaluation mode, and its recipe.

    Raises:
        AdapterError: the folder is not a finished run, or is damaged.
    """
    folder = Path(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise AdapterError(f"{folder} is not a run folder: it has no {RECIPE_FILE}; give the folder of a finished run.")
    if not (folder / ADAPTER_FOLDER).is_dir():
        raise AdapterError(f"The run in {folder} is not finished; finish it with philens train --resume.")
    recipe = load_recipe(folder / RECIPE_FILE)
    return load(load_base(folder / MODEL_FOLDER), folder / ADAPTER_FOLDER), recipe


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a half-written last line is left out."""
    records = []
    path = Path(folder) / METRICS_FILE
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def recipe_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML that loads to the same."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(recipe))), sort_keys=False)


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    import platform

    import numpy
    import transformers

    import philens

    return {
        "philens": philens.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
