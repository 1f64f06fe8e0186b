"""What lies in the folder of a training run: written, read, and told from what does not belong there."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from philens.bases import hub
from philens.lens.adapter import CONFIG_FILE, load_instruments, save_adapter
from philens.lens.model import PHiModel
from philens.support.errors import AdapterError, OutputError, TrainingError
from philens.support.files import (
    check_sums,
    load_weights,
    locked,
    read_json,
    read_safetensors,
    read_text,
    write_atomically,
    write_sums,
    written_whole,
)
from philens.support.versions import versions
from philens.training.evaluated import rows_of
from philens.training.recipe import Recipe, check_same_recipe, from_plain, load_recipe, recipe_yaml

logger = logging.getLogger(__name__)

CHECKPOINT_RECIPE = "recipe.json"
_FILES = ("recipe.yaml", "metrics.jsonl", "versions.json", "training.png")
_MODEL, _ADAPTER = "model", "adapter"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NAMES = (_CHECKPOINT.pattern, r"self-.+\.jsonl", _MODEL, _ADAPTER, *map(re.escape, _FILES))
# What a process leaves half written that is killed.
_LEFT = re.compile(rf"\.({'|'.join(_NAMES)})\..+")
_ADAPTERS = re.compile(rf"{_ADAPTER}|layer-(-?\d+)")


class RunFolder:
    """The folder of a training run. A checkpoint in it has `model` and `adapter` as well.

    Attributes:
        path: path of the folder.
        recipe_file: the whole recipe; without it a folder is no run's.
        metrics_file: a record for each logged step and evaluation.
        versions_file: the seed, and the versions of what decides numbers.
        picture: the course of the training.
        model: the base and its tokenizer, unless it is a frozen one from elsewhere.
        adapter: the PHi layer, or another instrument.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe_file, self.metrics_file, self.versions_file, self.picture = map(
            self.path.joinpath, _FILES
        )
        self.model, self.adapter = self.path / _MODEL, self.path / _ADAPTER

    def own_text(self, part: str) -> Path:
        """What the base wrote for a part of the data."""
        return self.path / f"self-{part}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Those that there are, oldest first."""
        found = [path for path in self.path.glob("checkpoint-*") if is_checkpoint(path)]
        return sorted(found, key=step_of)

    @property
    def exists(self) -> bool:
        """Whether this is the folder of a run."""
        return self.recipe_file.is_file()

    def recipe(self) -> Recipe:
        """The recipe of the run; keys that came after it have their defaults."""
        return load_recipe(self.recipe_file, wrote=self.version)

    @property
    def version(self) -> str:
        """The version of philens that wrote the run."""
        try:
            return str(read_json(self.versions_file)["versions"]["philens"])
        except (AdapterError, KeyError, TypeError):
            return "of another version"

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether the run of this recipe is finished."""
        return (self.adapter if recipe.instruments else self.model).is_dir()

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the run; a half-written last line is left out.

        Raises:
            AdapterError: the file or another line is damaged.
        """
        records = []
        path = self.metrics_file
        lines = read_text(path).split("\n") if path.is_file() else []
        for number, line in enumerate(lines[:-1], 1):
            try:
                records.append(json.loads(line))
                known = isinstance(records[-1], dict) and isinstance(records[-1].get("step"), int)
            except (ValueError, RecursionError):
                known = False
            if not known:
                raise AdapterError(f"Line {number} of {path} is not a record; correct or remove it.")
        return records

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            TrainingError: it cannot be written.
        """
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self.metrics_file} could not be written ({error.strerror}); free some space and --resume."
            ) from error

    def record(self, recipe: Recipe) -> dict[str, Any]:
        """What a model card says of the run: the recipe, the data, and the last evaluation."""
        record, data = asdict(recipe), recipe.data
        # Where folders lie on this machine is nobody else's business.
        if recipe.model.base is not None and Path(recipe.model.base).exists():
            record["model"]["base"] = Path(recipe.model.base).name
        for part in record["data"]["parts"].values():
            if Path(part["source"]).exists():
                part["source"] = Path(part["source"]).name
        weights = {name: part.weight for name, part in data.parts.items()} or data.mixture
        evaluations = [rows for rows in map(rows_of, self.metrics()) if rows]
        metrics: dict[str, dict[str, float]] = {}
        for row in evaluations[-1] if evaluations else []:
            metrics.setdefault(row.part or "all parts", {})[row.column] = row.value
        texts = [f"{name}, weight {weight:g}" for name, weight in weights.items() if weight]
        return {"recipe": record, "data": texts, "metrics": metrics}

    def save_model(self, lens: PHiModel, recipe: Recipe, tokenizer: Any) -> None:
        """Write base with tokenizer, and adapter, each into a folder of its own.

        A frozen base that was loaded is left out, and so is the adapter of a recipe without an instrument.

        Raises:
            OutputError: they cannot be written.
        """
        if recipe.keeps_base:
            with written_whole(self.model) as staging, hub.quiet():
                lens.base.save_pretrained(staging)  # pyright: ignore[reportCallIssue]
                for name in ("is_local", "local_files_only"):  # how it was loaded, which transformers keeps
                    tokenizer.init_kwargs.pop(name, None)
                tokenizer.save_pretrained(staging)
                write_sums(staging)
        if recipe.instruments:
            save_adapter(lens, self.adapter)

    def load_weights(self, lens: PHiModel, recipe: Recipe) -> None:
        """Load the weights that `save_model` wrote into a model of the same shape.

        Raises:
            AdapterError: they are missing, damaged or another model's.
        """
        if recipe.keeps_base:
            path = self.model / "model.safetensors"
            weights = read_safetensors(path)
            # Tied weights are stored once, under the name that named_parameters has.
            stored = {name for name, _ in (*lens.base.named_parameters(), *lens.base.named_buffers())}
            tied = {name: value for name, value in lens.base.state_dict().items() if name not in stored}
            load_weights(lens.base, tied | weights, path)
        if recipe.instruments:
            load_instruments(lens, self.adapter)

    def resume_from(self, recipe: Recipe, resume: bool) -> Path | None:
        """Whether a run may go into the folder; the checkpoint to go on from.

        Raises:
            OutputError: it holds something else, or a run that is not to go on.
            TrainingError: the run in it is another recipe's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; choose another --output.")
        # A run that was killed when it had hardly begun leaves no more than this.
        begun = (".lock", f".{self.recipe_file.name}.")
        if not self.path.exists() or all(path.name.startswith(begun) for path in self.path.iterdir()):
            return None
        if not resume:
            raise OutputError(
                f"{self.path} is not empty; give --resume to go on with the run in it, or another --output."
            )
        if not self.exists:
            raise OutputError(f"{self.path} holds something else than a run; choose another --output.")
        checkpoints = self.checkpoints()
        if not checkpoints:
            logger.warning("There is no checkpoint in %s yet; starting from the beginning.", self.path)
            return None
        check_sums(checkpoints[-1])
        path = checkpoints[-1] / CHECKPOINT_RECIPE
        check_same_recipe(from_plain(read_json(path), path, self.version), recipe, checkpoints[-1])
        return checkpoints[-1]

    def lock(self) -> AbstractContextManager[None]:
        """Let no other process write into the folder."""
        return locked(self.path, self.recipe_file.name)

    def start(self, recipe: Recipe, step: int) -> None:
        """Write what the run is, and forget what was logged after `step`: it will be computed again.

        Args:
            step: step of the checkpoint that the run goes on from; -1 if it begins, to compute step 0 too.

        Raises:
            OutputError: the folder cannot be written, or something else is in a file's place.
        """
        self.tidy()
        kept = [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]
        about = json.dumps({"seed": recipe.seed, "versions": versions()}, indent=2) + "\n"
        contents = {
            self.recipe_file: recipe_yaml(recipe),
            self.versions_file: about,
            self.metrics_file: "".join(kept),
        }
        for path, content in contents.items():
            write_atomically(path, lambda file, text=content: file.write(text.encode()))

    def tidy(self) -> None:
        """Remove what a killed process left half written, before the folder is written into.

        Raises:
            OutputError: something else is in a file's place.
        """
        for path in map(self.path.joinpath, _FILES):
            if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for
                raise OutputError(f"Cannot write {path}: it is not a file; remove it.")
        for path in self.path.iterdir():
            if _LEFT.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("-")[2])


def adapters_in(folder: str | Path, checkpoints: bool = False) -> list[str]:
    """The adapters of a run folder or a sweep, in order: those of checkpoints if asked for, by their steps,
    `adapter`, then `layer-N` by number. None where it is an adapter itself, or no folder."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists() or not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _ADAPTERS.fullmatch(path.name))]
    found.sort(key=lambda item: (item[0][1] is not None, int(item[0][1] or 0)))
    own = [path for _, path in found]
    if checkpoints:
        own = [RunFolder(path).adapter for path in RunFolder(folder).checkpoints()] + own
    return [str(path) for path in own if path.is_dir()]


def place_of(adapter: str) -> Path:
    """The folder of the run or the checkpoint that an adapter lies in; of any other adapter its own."""
    path = Path(adapter)
    return path.parent if path.name == _ADAPTER else path


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is named as a checkpoint is."""
    return _CHECKPOINT.fullmatch(path.name) is not None
