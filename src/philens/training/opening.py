"""Models opened: a lens from a run folder, or from a base and an adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from philens.bases.hub import is_folder, load_pretrained
from philens.bases.wheels import WHEELS
from philens.lens.config import MetricOptions
from philens.lens.model import PHiModel, load
from philens.support.errors import AdapterError, ConfigError
from philens.support.files import PACKAGE, not_finite
from philens.support.processes import device
from philens.tasks.rendering import AS_IS, Rendering, with_rendering
from philens.training.build import attach_fresh
from philens.training.folder import RunFolder
from philens.training.recipe import Recipe, check_same_recipe
from philens.training.source import ModelSource

SHIPPED = PACKAGE / "shipped" / "small"
"""The run folder of `recipes/small.yaml` that comes with philens: 1 M parameters, reads formal languages."""


class Opened(NamedTuple):
    """A model that texts can be scored with: a base model with a PHi layer in it, and its tokenizer."""

    lens: PHiModel
    tokenizer: Any


def load_lens(
    model: str = "smollm2",
    adapter: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Opened:
    """A base model with a PHi layer in it, on the accelerator where there is one, and its tokenizer.

    Args:
        model: folder, GGUF file or Hub id; or a run folder, whose own adapter is taken where none is given,
            or `smollm2`, for which philens brings one.
        adapter: folder or Hub id.
        revision: revision of the base on the Hub.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        trust_remote_code: run Python code that the base's repository brings.

    Raises:
        AdapterError: model or adapter are missing, damaged or do not belong together.
        ConfigError: there is no adapter.
    """
    return open_lens(ModelSource(model, adapter, revision, dtype, trust_remote_code))


def open_lens(
    source: ModelSource, rendering: Rendering = AS_IS, options: MetricOptions | None = None
) -> Opened:
    """What `load_lens` returns, of a source; texts and chats are put by its tokenizer as chosen, and metrics
    measured by these options."""
    run = RunFolder(source.model)
    if source.adapter is None and not has_layer(source.model):
        if run.exists:
            load_run(run.path)  # says why this run has no adapter
        raise ConfigError(
            f"No PHi layer was named for {source.model}; give --adapter, or the folder of a run."
        )
    base = source
    if run.exists and not run.model.is_dir():
        # A run keeps no copy of a frozen base from elsewhere.
        named = run.recipe().model
        base = replace(
            named.source(),
            model=named.base or source.model,
            revision=source.revision or named.revision,
            dtype=named.dtype if source.dtype == "auto" else source.dtype,
            trust_remote_code=source.trust_remote_code,
        )
    loaded, tokenizer = base.load_base()
    if (name := not_finite(loaded)) is not None:
        raise AdapterError(f"{base.model} holds a weight that is not finite ({name}); give another model.")
    lens = load(loaded, source.adapter or source.model)
    lens.metric_options = options or lens.metric_options
    if (accelerator := device()) is not None:
        lens.to(accelerator)
    return Opened(lens, with_rendering(tokenizer, rendering))


def has_layer(model: str) -> bool:
    """Whether a PHi layer comes with a model: one in its run folder, or one that philens has for it."""
    return (model in WHEELS and not is_folder(model)) or RunFolder(model).adapter.is_dir()


def finished_model(folder: Path, recipe: Recipe, base: Any = None) -> PHiModel | None:
    """A run's model if it is finished, in evaluation mode; the base alone if the recipe has no PHi layer.

    Args:
        base: the run's, where it is at hand; None loads it.

    Raises:
        TrainingError: it is another recipe's.
    """
    run = RunFolder(folder)
    if not run.exists:
        return None
    found = run.recipe()
    if not run.is_finished(found):
        return None
    check_same_recipe(found, recipe, folder)
    return _load_finished(run, found, base)


def load_run(folder: str | Path) -> tuple[PHiModel, Recipe]:
    """A finished run's model, in evaluation mode, and its recipe.

    Raises:
        AdapterError: the folder is not a finished run, is damaged, or has no PHi layer.
    """
    run = RunFolder(folder)
    if not run.exists:
        raise AdapterError(
            f"{folder} is not a run folder: it has no recipe.yaml; give the folder of a finished run."
        )
    recipe = run.recipe()
    if not run.is_finished(recipe):
        raise AdapterError(f"The run in {folder} is not finished; finish it with philens train --resume.")
    if not recipe.instruments:
        raise AdapterError(
            f"The run in {folder} has no PHi layer; give it one by training with --model.base {run.model}."
        )
    return _load_finished(run, recipe), recipe


def _load_finished(run: RunFolder, recipe: Recipe, base: Any = None) -> PHiModel:
    if base is None and (recipe.keeps_base or run.model.is_dir()):
        base, _ = load_pretrained(run.model, tokenizer=False, local_only=True)
    elif base is None:
        base, _ = recipe.model.source().load_base(tokenizer=False)
    if not recipe.instruments:
        return attach_fresh(base, recipe).eval()
    return load(base, run.adapter)
