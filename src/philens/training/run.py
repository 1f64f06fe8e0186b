"""Models from recipes, and the run folders that training leaves behind."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from philens.adapter import (
    WEIGHTS_FILE,
    load,
    load_weights,
    read_json,
    read_safetensors,
    save_adapter,
    written_whole,
)
from philens.errors import AdapterError, RecipeError, TrainingError
from philens.model import PHiModel, attach
from philens.training.recipe import FREE_ON_RESUME, Recipe, flatten, load_recipe

# The run of recipes/small.yaml that comes with philens.
SHIPPED = Path(__file__).resolve().parent.parent / "shipped" / "small"
RECIPE_FILE, METRICS_FILE, VERSIONS_FILE = "recipe.yaml", "metrics.jsonl", "versions.json"
MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"


def build_base(recipe: Recipe) -> Any:
    """The recipe's base model with fresh weights, drawn from its seed; a transformers model.

    Raises:
        RecipeError: sizes that do not fit together.
    """
    torch.manual_seed(recipe.seed)
    try:
        return _build_base(recipe)
    except StrictDataclassError as error:
        raise RecipeError(f"model does not hold together: {' '.join(str(error).split())}.") from error


def _build_base(recipe: Recipe) -> Any:
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
            initializer_range=model.initializer_range,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def build_model(recipe: Recipe) -> PHiModel:
    """The recipe's base model with its PHi layer, fresh."""
    return attach(build_base(recipe), recipe.phi)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that transformers shows for every file: training has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
        with _no_bars():
            base, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                folder, output_loading_info=True, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(f"{folder} does not hold a model that can be loaded ({reason}).") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise AdapterError(
            f"{folder} has missing or unknown weights ({wrong[0]}); it is damaged or something else."
        )
    return base


def save_model(lens: PHiModel, folder: Path) -> None:
    """Write base and layer into `folder`, each in a folder of its own.

    Raises:
        OutputError: they cannot be written.
    """
    from philens.tokenizer import character_tokenizer

    with written_whole(folder / MODEL_FOLDER) as staging, _no_bars():
        lens.base.save_pretrained(staging)  # pyright: ignore[reportCallIssue]
        character_tokenizer().save_pretrained(staging)
    save_adapter(lens, folder / ADAPTER_FOLDER)


def load_model_weights(lens: PHiModel, folder: Path) -> None:
    """Load the weights that `save_model` wrote into a model of the same shape.

    Raises:
        AdapterError: they are missing, damaged or another model's.
    """
    path = folder / MODEL_FOLDER / "model.safetensors"
    weights = read_safetensors(path)
    # Tied weights are stored once, under the name that named_parameters has.
    stored = {name for name, _ in (*lens.base.named_parameters(), *lens.base.named_buffers())}
    tied = {name: value for name, value in lens.base.state_dict().items() if name not in stored}
    load_weights(lens.base, tied | weights, path)
    path = folder / ADAPTER_FOLDER / WEIGHTS_FILE
    load_weights(lens.phi, read_safetensors(path), path)


def find_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def check_same_recipe(then: dict[str, Any], recipe: Recipe, source: Path) -> None:
    """Raise a TrainingError if a recipe, as a nested dict, differs in a key that decides what is computed."""
    before, now = flatten(then), flatten(_plain(recipe))
    keys = sorted((before.keys() | now.keys()) - FREE_ON_RESUME)
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more keys differ)" if len(changed) > 1 else ""
        raise TrainingError(
            f"{source} belongs to another recipe: {key} was {before.get(key)!r} and is now "
            f"{now.get(key)!r}{more}; give the same recipe or choose another --output."
        )


def finished_model(folder: Path, recipe: Recipe) -> PHiModel | None:
    """The model of a run if it is finished.

    Raises:
        TrainingError: it is another recipe's.
    """
    if not (folder / ADAPTER_FOLDER).is_dir():
        return None
    lens, found = load_run(folder)
    check_same_recipe(_plain(found), recipe, folder)
    return lens


def load_run(folder: str | Path) -> tuple[PHiModel, Recipe]:
    """A finished run's model, in evaluation mode, and its recipe.

    Raises:
        AdapterError: the folder is not a finished run, or is damaged.
    """
    folder = Path(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise AdapterError(
            f"{folder} is not a run folder: it has no {RECIPE_FILE}; give the folder of a finished run."
        )
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
    return yaml.safe_dump(_plain(recipe), sort_keys=False)


def _plain(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(recipe)))


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
