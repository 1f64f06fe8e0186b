"""Models from recipes, and the run folders that training leaves behind."""

import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from philens.bases import hub
from philens.bases.facts import text_config
from philens.lens.adapter import WEIGHTS_FILE, read_layers, save_adapter
from philens.lens.attention import knows_packs, register_documents
from philens.lens.config import PHiConfig
from philens.lens.layer import PHiLayer
from philens.lens.model import PHiModel, attach, load
from philens.support.errors import AdapterError, OutputError, RecipeError, TrainingError
from philens.support.files import (
    PACKAGE,
    check_sums,
    load_weights,
    not_finite,
    read_json,
    read_safetensors,
    read_text,
    write_atomically,
    write_sums,
    written_whole,
)
from philens.support.versions import versions
from philens.tasks.packing import TokenDocuments
from philens.tasks.sources import SELF
from philens.tasks.text import TextMixture, open_parts
from philens.training.recipe import FREE_ON_RESUME, Recipe, flatten, load_recipe
from philens.training.sizes import check_data_sizes, check_weights

logger = logging.getLogger(__name__)

SHIPPED = PACKAGE / "shipped" / "small"
"""The run folder of `recipes/small.yaml` that comes with philens: 1 M parameters, reads formal languages."""
RECIPE_FILE, METRICS_FILE, VERSIONS_FILE = "recipe.yaml", "metrics.jsonl", "versions.json"
MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"
CHECKPOINT_RECIPE = "recipe.json"
_METRICS_BYTES = 256 << 20


def start_model(recipe: Recipe, checkpoint: Path | None = None) -> tuple[PHiModel, Any]:
    """The model that a recipe trains, before its first step, and its tokenizer.

    Args:
        checkpoint: where to take a tokenizer from that was made when the run started; the model's weights are
            not read.

    Raises:
        RecipeError: sizes that do not fit together, or a base that does not fit the data.
        PhilensError: the base, or the text that a tokenizer is made from, cannot be read.
    """
    check_data_sizes(recipe)
    if recipe.model.base is None:
        tokenizer = (
            _make_tokenizer(recipe) if checkpoint is None else load_tokenizer(checkpoint / MODEL_FOLDER)
        )
        base = build_base(recipe, tokenizer)
        set_attention(base, recipe)
        return attach_fresh(base, recipe), tokenizer
    if recipe.data.parts:
        read = {name: part for name, part in recipe.data.parts.items() if part.source != SELF}
        if any(part.weight for part in read.values()):  # an error there comes before a large model
            open_parts(read, recipe.data.tasks, recipe.seed)
    base, tokenizer = _load_named_base(recipe)
    if not recipe.data.parts and tokenizer("az ", add_special_tokens=False).input_ids != [97, 122, 32]:
        raise RecipeError(
            f"{recipe.model.base} does not read characters as formal languages need it; give data.parts."
        )
    set_attention(base, recipe)
    torch.manual_seed(recipe.seed)
    return attach_fresh(base, recipe), tokenizer


def set_attention(base: Any, recipe: Recipe) -> None:
    """Let a base compute attention as the recipe has it.

    Raises:
        RecipeError: this base or this machine cannot.
    """
    chosen = recipe.model.attention
    if chosen == "auto":
        if not recipe.data.packing or not knows_packs(base) or torch.accelerator.is_available():
            return
        chosen = register_documents()
    try:
        base.set_attn_implementation(chosen)
    except (AttributeError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"model.attention {chosen} does not work here ({reason}); set it to auto."
        ) from error


def build_model(recipe: Recipe) -> PHiModel:
    """The recipe's base model with its PHi layer, fresh."""
    return start_model(recipe)[0]


def attach_fresh(base: Any, recipe: Recipe) -> PHiModel:
    """A base model with the recipe's PHi layer, fresh. For a recipe without one, the smallest there is, which
    stays out of the path and is neither trained nor saved."""
    if recipe.phi is None:
        lens = attach(base, PHiConfig(layer=0, latent_size=1, prior="unit", init="random"))
        lens.phi.requires_grad_(False)
        lens.disable()
        return lens
    config, width = recipe.phi, getattr(text_config(base), "hidden_size", 1)
    sizes = "phi.latent_size, phi.prior_mlp_size and phi.prior_depth"
    check_weights(sizes, lambda: nn.ModuleList(PHiLayer(width, config) for _ in config.layers or [0]))
    lens = attach(base, config)
    if recipe.model.base is not None and recipe.model.frozen:
        lens.freeze_base()
    return lens


def _load_named_base(recipe: Recipe, tokenizer: bool = True) -> tuple[Any, Any]:
    model = recipe.model
    return hub.load_pretrained(
        str(model.base),
        revision=model.revision,
        dtype=model.dtype,
        quantization=None if model.quantization == "none" else model.quantization,
        trust_remote_code=model.trust_remote_code,
        tokenizer=tokenizer,
    )


def _make_tokenizer(recipe: Recipe) -> Any:
    from philens.bases.tokenizer import byte_tokenizer, character_tokenizer, train_bpe

    if recipe.model.tokenizer == "characters":
        return character_tokenizer()
    tokenizer = byte_tokenizer()
    if recipe.model.tokenizer == "bytes":
        return tokenizer
    sample = text_mixture(recipe, tokenizer).sample()
    return train_bpe(sample, recipe.model.vocab_size, recipe.model.split_digits)


def text_mixture(recipe: Recipe, tokenizer: Any) -> TextMixture:
    """The stream of documents that a recipe with `data.parts` reads."""
    return TextMixture(recipe.data.parts, tokenizer, recipe.data.length, recipe.seed, recipe.data.tasks)


def evaluation_documents(recipe: Recipe, tokenizer: Any, count: int) -> dict[str, TokenDocuments]:
    """At most so many documents of each text part that training never reads, each at most a row long.

    Parts without any are left out: those with fewer than 20 documents.
    """
    text = text_mixture(recipe, tokenizer)
    found = {name: text.held_out(name, count) for name in text.sources}
    return {name: documents for name, documents in found.items() if len(documents)}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    hub.check_small_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the files may be damaged: anything can come out of them
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"{folder} does not hold a tokenizer that can be loaded ({reason}); it is damaged."
        ) from error


def build_base(recipe: Recipe, tokenizer: Any = None) -> Any:
    """The recipe's base model with fresh weights, drawn from its seed; a transformers model.

    Args:
        tokenizer: whose ids the model reads; None means ASCII characters.

    Raises:
        RecipeError: sizes that do not fit together.
    """
    torch.manual_seed(recipe.seed)
    try:
        sizes = "model.layers, model.hidden_size and model.intermediate_size"
        check_weights(sizes, lambda: _build_base(recipe, tokenizer))
        return _build_base(recipe, tokenizer)
    except StrictDataclassError as error:
        raise RecipeError(
            f"model does not hold together ({' '.join(str(error).split())}); change its sizes."
        ) from error


def _build_base(recipe: Recipe, tokenizer: Any) -> Any:
    model = recipe.model
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if model.tokenizer != "characters" and tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        tokens = {"vocab_size": len(tokenizer), **ids}
    if model.architecture == "lstm":
        from philens.bases.lstm import LSTMConfig, LSTMForCausalLM

        return LSTMForCausalLM(
            LSTMConfig(
                **tokens,
                hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size,
                num_hidden_layers=model.layers,
            )
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **tokens,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            max_position_embeddings=max(2048, recipe.data.length),
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=True,
            initializer_range=model.initializer_range,
        )
    )


def _keeps_base(recipe: Recipe) -> bool:
    """Whether the base belongs to the run; one from elsewhere that nothing changes is not copied."""
    return recipe.model.base is None or not recipe.model.frozen


def save_model(lens: PHiModel, folder: Path, recipe: Recipe, tokenizer: Any) -> None:
    """Write base with tokenizer, and layer, into `folder`, each in a folder of its own.

    A frozen base that was loaded is left out, and so is the layer of a recipe without one.

    Raises:
        OutputError: they cannot be written.
    """
    if _keeps_base(recipe):
        with written_whole(folder / MODEL_FOLDER) as staging, hub.quiet():
            lens.base.save_pretrained(staging)  # pyright: ignore[reportCallIssue]
            for name in ("is_local", "local_files_only"):  # how it was loaded, which transformers keeps
                tokenizer.init_kwargs.pop(name, None)
            tokenizer.save_pretrained(staging)
            write_sums(staging)
    if recipe.phi is not None:
        save_adapter(lens, folder / ADAPTER_FOLDER)


def load_model_weights(lens: PHiModel, folder: Path, recipe: Recipe) -> None:
    """Load the weights that `save_model` wrote into a model of the same shape.

    Raises:
        AdapterError: they are missing, damaged or another model's.
    """
    if _keeps_base(recipe):
        path = folder / MODEL_FOLDER / "model.safetensors"
        weights = read_safetensors(path)
        # Tied weights are stored once, under the name that named_parameters has.
        stored = {name for name, _ in (*lens.base.named_parameters(), *lens.base.named_buffers())}
        tied = {name: value for name, value in lens.base.state_dict().items() if name not in stored}
        load_weights(lens.base, tied | weights, path)
    if recipe.phi is not None:
        path = folder / ADAPTER_FOLDER / WEIGHTS_FILE
        load_weights(lens.phi, read_layers(path), path)


def check_finite(lens: PHiModel, source: Path | str, way: str) -> None:
    """Raise a TrainingError, with a way out, if a weight that came from `source` is not finite."""
    if (name := not_finite(lens)) is not None:
        raise TrainingError(f"{source} holds a weight that is not finite ({name}); {way}.")


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


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Whether a run may go into the folder; returns the checkpoint to resume from."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose another --output.")
    # A run that was killed when it had hardly begun leaves no more than this.
    begun = (".lock", f".{RECIPE_FILE}.")
    if not folder.exists() or all(path.name.startswith(begun) for path in folder.iterdir()):
        return None
    if not resume:
        raise OutputError(
            f"{folder} is not empty; give --resume to go on with the run in it, or another --output."
        )
    if not (folder / RECIPE_FILE).is_file():
        raise OutputError(f"{folder} holds something else than a run; choose another --output.")
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        logger.warning("There is no checkpoint in %s yet; starting from the beginning.", folder)
        return None
    check_sums(checkpoints[-1])
    check_same_recipe(read_json(checkpoints[-1] / CHECKPOINT_RECIPE), recipe, checkpoints[-1])
    return checkpoints[-1]


def start_folder(folder: Path, recipe: Recipe, step: int) -> None:
    """Write what a run is, and forget what was logged after `step`: it will be computed again.

    Args:
        step: of the checkpoint that the run goes on from; -1 if it begins, where step 0 is computed as well.

    Raises:
        OutputError: the folder cannot be written, or something else is in a file's place.
    """
    tidy(folder)
    kept = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= step]
    about = json.dumps({"seed": recipe.seed, "versions": versions()}, indent=2) + "\n"
    contents = {RECIPE_FILE: recipe_yaml(recipe), VERSIONS_FILE: about, METRICS_FILE: "".join(kept)}
    for name, content in contents.items():
        write_atomically(folder / name, lambda file, text=content: file.write(text.encode()))


_FILES = (RECIPE_FILE, VERSIONS_FILE, METRICS_FILE, "training.png")
_NAMES = (r"checkpoint-\d+", r"self-.+\.jsonl", MODEL_FOLDER, ADAPTER_FOLDER, *map(re.escape, _FILES))
_LEFT = re.compile(rf"\.({'|'.join(_NAMES)})\..+")


def tidy(folder: Path) -> None:
    """Remove what a killed process left half written in a run folder that is about to be written into.

    Raises:
        OutputError: something else is in a file's place.
    """
    for path in (folder / name for name in _FILES):
        if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for
            raise OutputError(f"Cannot write {path}: it is not a file; remove it.")
    for path in folder.iterdir():
        if _LEFT.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def training_record(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a model card says of a run: the recipe, the data, and the last evaluation."""
    record, data = asdict(recipe), recipe.data
    # Where folders lie on this machine is nobody else's business.
    if recipe.model.base is not None and Path(recipe.model.base).exists():
        record["model"]["base"] = Path(recipe.model.base).name
    for part in record["data"]["parts"].values():
        if Path(part["source"]).exists():
            part["source"] = Path(part["source"]).name
    weights = {name: part.weight for name, part in data.parts.items()} or data.mixture
    evaluations = [one for one in read_metrics(folder) if any(name.startswith("eval/") for name in one)]
    metrics: dict[str, dict[str, float]] = {}
    for key, value in (evaluations[-1] if evaluations else {}).items():
        if key.startswith("eval/"):
            part, name = ["all parts", *key.split("/")[1:]][-2:]
            metrics.setdefault(part, {})[name] = value
    texts = [f"{name}, weight {weight:g}" for name, weight in weights.items() if weight]
    return {"recipe": record, "data": texts, "metrics": metrics}


def finished_model(folder: Path, recipe: Recipe) -> PHiModel | None:
    """A run's model if it is finished, in evaluation mode; the base alone if the recipe has no PHi layer.

    Raises:
        TrainingError: it is another recipe's.
    """
    if not (folder / RECIPE_FILE).is_file():
        return None
    found = load_recipe(folder / RECIPE_FILE)
    if not _is_finished(folder, found):
        return None
    check_same_recipe(_plain(found), recipe, folder)
    return _load_finished(folder, found)


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    return (folder / (MODEL_FOLDER if recipe.phi is None else ADAPTER_FOLDER)).is_dir()


def _load_finished(folder: Path, recipe: Recipe) -> PHiModel:
    if _keeps_base(recipe) or (folder / MODEL_FOLDER).is_dir():
        base, _ = hub.load_pretrained(folder / MODEL_FOLDER, tokenizer=False, local_only=True)
    else:
        base, _ = _load_named_base(recipe, False)
    if recipe.phi is None:
        return attach_fresh(base, recipe).eval()
    return load(base, folder / ADAPTER_FOLDER)


def load_run(folder: str | Path) -> tuple[PHiModel, Recipe]:
    """A finished run's model, in evaluation mode, and its recipe.

    Raises:
        AdapterError: the folder is not a finished run, is damaged, or has no PHi layer.
    """
    folder = Path(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise AdapterError(
            f"{folder} is not a run folder: it has no {RECIPE_FILE}; give the folder of a finished run."
        )
    recipe = load_recipe(folder / RECIPE_FILE)
    if not _is_finished(folder, recipe):
        raise AdapterError(f"The run in {folder} is not finished; finish it with philens train --resume.")
    if recipe.phi is None:
        raise AdapterError(
            f"The run in {folder} has no PHi layer; give it one by training with --model.base "
            f"{folder / MODEL_FOLDER}."
        )
    return _load_finished(folder, recipe), recipe


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a half-written last line is left out.

    Raises:
        AdapterError: the file or another line is damaged.
    """
    records = []
    path = Path(folder) / METRICS_FILE
    lines = read_text(path, _METRICS_BYTES).split("\n") if path.is_file() else []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
            known = isinstance(records[-1], dict) and isinstance(records[-1].get("step"), int)
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise AdapterError(f"Line {number} of {path} is not a record; correct or remove it.")
    return records


def recipe_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML that loads to the same."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False)


def _plain(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(recipe)))
