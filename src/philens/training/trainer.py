"""Training of models with a PHi layer, on `transformers.Trainer`."""

import json
import logging
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from philens.errors import OutputError, TrainingError
from philens.files import read_json, written_whole
from philens.model import PHiModel
from philens.tasks.packing import Mixture, PackedRows, SingleRows
from philens.training.callbacks import (
    Evaluation,
    Interrupt,
    Phases,
    Progress,
    Records,
    draw_course,
    require_trackers,
)
from philens.training.optimizer import make_optimizer
from philens.training.recipe import Recipe
from philens.training.run import (
    METRICS_FILE,
    RECIPE_FILE,
    VERSIONS_FILE,
    check_same_recipe,
    evaluation_documents,
    find_checkpoints,
    finished_model,
    load_model_weights,
    read_metrics,
    recipe_yaml,
    save_model,
    start_model,
    text_mixture,
    versions,
)

logger = logging.getLogger(__name__)

# Rows that tell a fresh layer how large a base's hidden states are.
CALIBRATION_ROWS = 16
CHECKPOINT_RECIPE, CHECKPOINT_LOGS = "recipe.json", "logs.json"


def training_rows(recipe: Recipe, tokenizer: Any = None) -> Dataset[dict[str, Tensor]]:
    """The rows a run reads, in order.

    Args:
        tokenizer: needed where the recipe reads text.
    """
    data, train = recipe.data, recipe.train
    formal = Mixture(data.tasks, data.mixture, recipe.seed)
    documents = text_mixture(recipe, tokenizer).documents if data.parts else formal.documents
    rows_per_step = train.batch_size * train.accumulate
    rows = train.steps * rows_per_step
    if not data.packing:
        return SingleRows(documents, data.length, rows, data.group)
    limits = {step * rows_per_step: length for step, length in data.document_lengths.items()}
    return PackedRows(documents, data.length, rows, data.group, limits)


@torch.no_grad()
def latent_information(mean: Tensor, logvar: Tensor, counted: Tensor) -> Tensor:
    """How much latents can tell about hidden states: the capacity, in nats per token, of Gaussian channels
    with the means' variance over the counted tokens as signal and the mean posterior variance as noise.

    Args:
        mean, logvar: (B, T, L) of the posterior. counted: (B, T) bool.
    """
    mean, noise = mean[counted], logvar[counted].exp().mean(0)
    return 0.5 * torch.log1p(mean.var(0, correction=0) / noise).sum()


def calibrate(lens: PHiModel, rows: Any) -> None:
    """Fit a fresh layer to the hidden states of a trained base on the first rows that it will read."""
    was_training = lens.training
    lens.eval()
    if torch.accelerator.is_available():
        lens.to(torch.accelerator.current_accelerator())
    chosen = [rows[number] for number in range(min(CALIBRATION_ROWS, len(rows)))]
    lens.calibrate({key: row[key][None] for key in row if key != "labels"} for row in chosen)
    lens.train(was_training)


class PHiTrainer(Trainer):
    """A Trainer that logs every part of the loss, stops at a loss that is not finite, and writes each
    checkpoint whole or not at all."""

    def __init__(self, recipe: Recipe, lens: PHiModel, tokenizer: Any, folder: Path, **kwargs: Any) -> None:
        self.recipe, self.lens, self.tokenizer, self.folder = recipe, lens, tokenizer, folder
        self._parts: dict[str, list[Tensor]] = {}  # of the loss, since the last record
        self._tokens, self._since = 0, time.monotonic()
        self._staging: Path | None = None
        super().__init__(model=lens, **kwargs)
        # The loss is already a mean over tokens; Trainer then averages over the passes of a step.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # pyright: ignore[reportArgumentType]

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.worker_init_fn = _ignore_interrupt
        return loader

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.lens, self.recipe.optimizer)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # A large vocabulary's logits are made in parts; a compiled program has them whole.
        returns = "logits" if self.recipe.train.compile else "states"
        output = model(**inputs, returns=returns)
        for name, value in output.losses.items():
            self._parts.setdefault(name, []).append(value.float())
        counted = inputs["labels"] != -100
        for path, layer in zip(self.lens.module_paths, output.layer_outputs, strict=False):
            name = "information" if self.lens.config.layers is None else f"information@{path}"
            if name not in self._parts:
                information = latent_information(layer.posterior_mean, layer.posterior_logvar, counted)
                self._parts[name] = [information.float()]
        self._tokens += inputs["input_ids"].numel()
        return output.loss

    def information(self, at: str = "") -> float | None:
        """What a layer's latents could tell in the first batch since the last record, in nats per token."""
        values = self._parts.get(f"information{at}")
        return float(values[0]) if values else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._parts.items()}
            logs["tokens_per_second"] = self._tokens / max(now - self._since, 1e-9)
            self._parts, self._tokens, self._since = {}, 0, now
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0.0)):
                    self._fail(f"{name} is {logs[name]}")
        super().log(logs, start_time)

    def pause_clock(self, since: float) -> None:
        """Don't count the time from `since` until now in tokens per second."""
        self._since += time.monotonic() - since

    def check_weights(self) -> None:
        """Raise a TrainingError if a weight is not finite."""
        if not all(bool(torch.isfinite(value).all()) for value in self.lens.parameters()):
            self._fail("a weight is not finite")

    def _fail(self, what: str) -> None:
        raise TrainingError(
            f"Training failed, {what} at step {self.state.global_step}; {self._last_checkpoint()}: "
            "lower optimizer.learning_rate, and start again with another --output."
        )

    def _last_checkpoint(self) -> str:
        found = find_checkpoints(self.folder)
        return f"{found[-1].name} is intact" if found else "no checkpoint was written yet"

    # Checkpoints: a folder each with the base, the layer, and what Trainer itself keeps.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        begin = time.monotonic()
        self.check_weights()
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        try:
            with written_whole(folder) as staging:
                self._staging = staging
                super()._save_checkpoint(model, trial)
                inner = staging / folder.name
                for entry in inner.iterdir():
                    entry.rename(staging / entry.name)
                inner.rmdir()
                (staging / CHECKPOINT_RECIPE).write_text(json.dumps(asdict(self.recipe)))
                (staging / CHECKPOINT_LOGS).write_text(json.dumps(self._log_state()))
        except (OutputError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            known = isinstance(error, OutputError)
            reason = str(error.__cause__ or error) if known else "a file stopped growing before it was whole"
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} could not be written ({reason}); "
                f"{self._last_checkpoint()}: free some space and --resume."
            ) from error
        finally:
            self._staging = None
        for old in find_checkpoints(self.folder)[: -self.recipe.train.keep]:
            shutil.rmtree(old, ignore_errors=True)
        self.pause_clock(begin)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_model(self.lens, Path(output_dir or self.folder), self.recipe, self.tokenizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model_weights(self.lens, Path(resume_from_checkpoint), self.recipe)

    # A record may be a mean over several steps; a checkpoint between two records keeps what is summed so far.

    def _log_state(self) -> dict[str, Any]:
        parts = {name: [float(value) for value in values] for name, values in self._parts.items()}
        return {"loss": float(self._tr_loss), "parts": parts, "last_step": self._globalstep_last_logged}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            logs, device = read_json(Path(checkpoint) / CHECKPOINT_LOGS), self.args.device
            self._tr_loss.fill_(logs["loss"])
            self._globalstep_last_logged = logs["last_step"]
            for name, values in logs["parts"].items():
                self._parts[name] = list(torch.tensor(values, device=device))
            # What is free to differ on resuming is this run's, not the checkpoint's.
            self.state.compute_steps(self.args, self.state.max_steps)


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


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C in a terminal reaches data workers too; the trainer still needs them for its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Whether a run may go into the folder; returns the checkpoint to resume from."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose another --output.")
    if not folder.exists() or not any(folder.iterdir()):
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
    check_same_recipe(read_json(checkpoints[-1] / CHECKPOINT_RECIPE), recipe, checkpoints[-1])
    return checkpoints[-1]


def _start_folder(folder: Path, recipe: Recipe, step: int) -> None:
    """Write what a run is, and forget what was logged after `step`: it will be computed again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for half_written in folder.glob(".checkpoint-*"):
            shutil.rmtree(half_written, ignore_errors=True)
        (folder / RECIPE_FILE).write_text(recipe_yaml(recipe))
        about = {"seed": recipe.seed, "versions": versions()}
        (folder / VERSIONS_FILE).write_text(json.dumps(about, indent=2) + "\n")
        kept = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= step]
        new = folder / f".{METRICS_FILE}.new"
        new.write_text("".join(kept))
        new.replace(folder / METRICS_FILE)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}; choose another --output.") from error


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    train, optimizer = recipe.train, recipe.optimizer
    decay = {"num_decay_steps": round(train.steps * optimizer.decay), "decay_type": "linear"}
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("linear", {}),
        "cosine": ("cosine", {}),
        "wsd": ("warmup_stable_decay", decay),
    }
    schedule, options = schedules[optimizer.schedule]
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.clip,
        optim="adamw_torch",
        use_cpu=not torch.accelerator.is_available(),
        bf16=train.precision == "bf16" or (train.precision == "auto" and _has_bf16()),
        seed=recipe.seed,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or 1,
        dataloader_num_workers=recipe.data.workers,
        dataloader_persistent_workers=recipe.data.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def _has_bf16() -> bool:
    """Whether bfloat16 is fast on the device at hand."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mps.is_available() or bool(torch.cpu._is_avx512_bf16_supported())


def train(
    recipe: Recipe, folder: str | Path, resume: bool = False, progress: bool | None = None
) -> PHiModel | None:
    """Train a model from nothing by a recipe.

    The run folder holds the resolved `recipe.yaml`, `versions.json`, `metrics.jsonl`, `training.png`,
    checkpoints, and at the end `model/` and `adapter/`, which `philens.load_run` reads.

    Args:
        recipe: what to train.
        folder: the run folder; must be empty or missing unless resuming.
        resume: go on from the last checkpoint; the loss curve is then the uninterrupted run's.
        progress: show a bar; None does where standard error is a terminal.

    Returns:
        The trained model as `philens.load_run` reads it, or None if the user stopped the run.

    Raises:
        OutputError: the folder cannot be written or holds something else.
        ConfigError: options that do not fit the model.
        TrainingError: the run in the folder is another recipe's, a loss is not finite, a checkpoint cannot
            be written, or memory does not suffice.
    """
    folder = Path(folder)
    require_trackers(recipe)
    if resume and (lens := finished_model(folder, recipe)):
        return lens
    checkpoint = _check_folder(folder, recipe, resume)
    lens, tokenizer = start_model(recipe, checkpoint)
    rows = training_rows(recipe, tokenizer)
    if recipe.train.checkpoint_activations:
        lens.checkpoint_activations()
    if checkpoint is None and recipe.phi is not None and recipe.model.base is not None:
        calibrate(lens, rows)
    _start_folder(folder, recipe, 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1]))
    held_out = {}
    if recipe.data.parts:
        held_out = evaluation_documents(recipe, tokenizer, recipe.train.evaluation_documents)
    interrupt, evaluation = Interrupt(), Evaluation(recipe, lens, folder, held_out)
    callbacks: list[TrainerCallback] = [Records(recipe, folder), evaluation, interrupt]
    if recipe.phi is not None:
        callbacks.insert(0, Phases(recipe, lens))
    bar = Progress() if (sys.stderr.isatty() if progress is None else progress) else None
    if bar:
        callbacks.append(bar)
    trainer = PHiTrainer(
        recipe,
        lens,
        tokenizer,
        folder,
        args=_arguments(recipe, folder),
        train_dataset=rows,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    evaluation.trainer = trainer
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
    if recipe.train.compile:
        lens.compile(dynamic=False)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "The device's memory does not suffice; lower train.batch_size and raise train.accumulate, "
            "or set train.checkpoint_activations."
        ) from error
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"torch.compile failed ({reason}); set train.compile to false.") from error
    finally:
        interrupt.restore()
        if bar:
            bar.stop()
    if interrupt.stopped and trainer.state.global_step < recipe.train.steps:
        return None
    trainer.check_weights()
    lens.record = training_record(recipe, folder)
    save_model(lens, folder, recipe, tokenizer)
    draw_course(folder)
    # Not the one that was trained: it may be compiled, and cast what it computes.
    return finished_model(folder, recipe)
