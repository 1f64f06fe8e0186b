"""Training of models with a PHi layer, on `transformers.Trainer`."""

import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from philens.adapter import load_weights, read_json, read_safetensors, save_adapter, written_whole
from philens.errors import OutputError, TrainingError
from philens.model import PHiModel
from philens.scoring.documents import score_documents
from philens.tasks.automata import TASKS, generate
from philens.tasks.packing import Mixture, PackedRows, SingleRows
from philens.training.recipe import FREE_ON_RESUME, Recipe, flatten
from philens.training.run import (
    ADAPTER_FOLDER,
    METRICS_FILE,
    MODEL_FOLDER,
    RECIPE_FILE,
    VERSIONS_FILE,
    build_model,
    read_metrics,
    recipe_yaml,
    versions,
)

logger = logging.getLogger(__name__)

CHECKPOINT_RECIPE = "recipe.json"
# Evaluation reads documents that no training stream of any run has.
EVALUATION_SEED = 2**40


def training_rows(recipe: Recipe) -> Dataset[dict[str, Tensor]]:
    """The rows a run reads, in order."""
    data, train = recipe.data, recipe.train
    documents = Mixture(data.tasks, data.mixture, recipe.seed).documents
    rows = train.steps * train.batch_size * train.accumulate
    return (PackedRows if data.packing else SingleRows)(documents, data.length, rows, data.group)


def evaluate_tasks(lens: PHiModel, recipe: Recipe, documents: int) -> dict[str, float]:
    """Mean phi and surprisal of each task in nats per token, on documents that training never reads.

    Documents are cut to the length of a training row.
    """
    metrics: dict[str, float] = {}
    # Sampled latents must not draw from the generator that training resumes from.
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        for task in TASKS:
            docs = generate(recipe.data.tasks, EVALUATION_SEED, task, np.arange(documents)).cut(recipe.data.length)
            table = score_documents(lens, docs)
            metrics[f"eval/{task}/surprisal"] = float(np.nanmean(table.surprisal))
            if lens.enabled:
                metrics[f"eval/{task}/phi"] = float(table.phi.mean())
    return metrics


@torch.no_grad()
def latent_information(mean: Tensor, logvar: Tensor, counted: Tensor) -> Tensor:
    """How much latents can tell about hidden states: the capacity, in nats per token, of Gaussian channels
    with the means' variance over the counted tokens as signal and the mean posterior variance as noise.

    Args:
        mean, logvar: (B, T, L) of the posterior. counted: (B, T) bool.
    """
    mean, noise = mean[counted], logvar[counted].exp().mean(0)
    return 0.5 * torch.log1p(mean.var(0, correction=0) / noise).sum()


class PHiTrainer(Trainer):
    """A Trainer that logs every part of the loss, stops at a loss that is not finite, and writes each checkpoint
    whole or not at all."""

    def __init__(self, recipe: Recipe, lens: PHiModel, **kwargs: Any) -> None:
        self.recipe, self.lens = recipe, lens
        self._parts: dict[str, list[Tensor]] = {}
        self._tokens, self._since = 0, time.monotonic()
        self._staging: Path | None = None
        super().__init__(model=lens, **kwargs)
        # The loss is already a mean over tokens; Trainer then averages over the passes of a step.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # pyright: ignore[reportArgumentType]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        output = model(**inputs)
        for name, value in output.losses.items():
            self._parts.setdefault(name, []).append(value)
        if output.layer_output is not None and "information" not in self._parts:
            layer = output.layer_output
            information = latent_information(layer.posterior_mean, layer.posterior_logvar, inputs["labels"] != -100)
            self._parts["information"] = [information]
        self._tokens += inputs["input_ids"].numel()
        return output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._parts.items()}
            logs["tokens_per_second"] = self._tokens / max(now - self._since, 1e-9)
            self._parts, self._tokens, self._since = {}, 0, now
            bad = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))]
            if bad:
                raise TrainingError(
                    f"{bad[0]} is {logs[bad[0]]} at step {self.state.global_step}; {self._last_checkpoint()} is intact: "
                    "lower optimizer.learning_rate or check the data, and start again or --resume."
                )
        super().log(logs, start_time)

    def _last_checkpoint(self) -> str:
        found = find_checkpoints(Path(str(self.args.output_dir)))
        return f"the checkpoint {found[-1].name}" if found else "no checkpoint was written yet; nothing"

    # Checkpoints: a folder each with the base, the layer, and what Trainer itself keeps.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.lens.parameters()):
            raise TrainingError(
                f"A weight is not finite at step {self.state.global_step}; {self._last_checkpoint()} is intact: "
                "lower optimizer.learning_rate and start again or --resume."
            )
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with written_whole(folder) as staging:
                self._staging = staging
                super()._save_checkpoint(model, trial)
                inner = staging / folder.name
                for entry in inner.iterdir():
                    entry.rename(staging / entry.name)
                inner.rmdir()
                (staging / CHECKPOINT_RECIPE).write_text(json.dumps(asdict(self.recipe)))
        except (OutputError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} could not be written ({_first_line(error)}); "
                f"{self._last_checkpoint()} is intact: free some space and --resume."
            ) from error
        finally:
            self._staging = None
        for old in find_checkpoints(folder.parent)[: -self.recipe.train.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_model(self.lens, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model_weights(self.lens, Path(resume_from_checkpoint))


def save_model(lens: PHiModel, folder: Path) -> None:
    """Write base and layer into `folder`, each in a folder of its own."""
    with written_whole(folder / MODEL_FOLDER) as staging:
        from philens.tokenizer import character_tokenizer

        lens.base.save_pretrained(staging)  # pyright: ignore[reportCallIssue]
        character_tokenizer().save_pretrained(staging)
    save_adapter(lens, folder / ADAPTER_FOLDER)


def load_model_weights(lens: PHiModel, folder: Path) -> None:
    """Load the weights that `save_model` wrote into a model of the same shape."""
    path = folder / MODEL_FOLDER / "model.safetensors"
    weights = read_safetensors(path)
    # Tied weights are stored once.
    tied = {k: v for k, v in lens.base.state_dict().items() if k not in weights}
    own = dict(lens.base.named_parameters())
    load_weights(lens.base, {**{k: v for k, v in tied.items() if k not in own}, **weights}, path)
    path = folder / ADAPTER_FOLDER / "phi_layer.safetensors"
    load_weights(lens.phi, read_safetensors(path), path)


class _Phases(TrainerCallback):
    """Takes the layer in at its step and raises its weight."""

    def __init__(self, recipe: Recipe, lens: PHiModel) -> None:
        self.schedule, self.lens, self.compile = recipe.phi_schedule, lens, recipe.train.compile

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        since = state.global_step - self.schedule.start_step
        if (since >= 0) != self.lens.enabled:
            if since >= 0:
                self.lens.enable()
            else:
                self.lens.disable()
        ramp = self.schedule.warmup_steps
        self.lens.weight_scale.fill_(min(1.0, (since + 1) / ramp) if ramp and since >= 0 else 1.0)


class _Records(TrainerCallback):
    """Appends every record to `metrics.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        record = {"step": state.global_step} | {k: v for k, v in logs.items() if k != "epoch"}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self.path} could not be written ({error.strerror}); free some space and --resume from the last checkpoint."
            ) from error


class _Evaluation(TrainerCallback):
    """Measures every task now and then, draws the course, and says when the layer has collapsed."""

    def __init__(self, recipe: Recipe, lens: PHiModel, folder: Path) -> None:
        self.recipe, self.lens, self.folder = recipe, lens, folder
        self.trainer: PHiTrainer | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        every = self.recipe.train.eval_every
        last = state.global_step == self.recipe.train.steps
        if self.trainer is None or not (last or (every and state.global_step % every == 0)):
            return
        metrics = evaluate_tasks(self.lens, self.recipe, self.recipe.train.evaluation_documents)
        if self.lens.enabled:
            phi = np.mean([value for name, value in metrics.items() if name.endswith("/phi")])
            metrics["collapsed"] = float(phi < self.recipe.train.collapse_threshold)
            if metrics["collapsed"]:
                logger.warning(
                    "The PHi layer has collapsed at step %d: phi is %.3g nats on average over all tasks, so its latents "
                    "carry almost no information. Lower phi.phi_weight, or insert the layer deeper.",
                    state.global_step,
                    phi,
                )
        self.trainer.log(metrics)
        draw_course(self.folder)


class _Interrupt(TrainerCallback):
    """Turns Ctrl-C and a polite kill into a checkpoint after the step at hand."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}

    def _stop(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        logger.warning("Stopping after this step; a checkpoint will be written. Once more stops at once.")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        import threading

        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Progress(TrainerCallback):
    """A bar with the time left and the newest figures."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
        self.bar.start()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        shown = {k: (logs or {})[k] for k in ("loss", "surprisal", "phi") if k in (logs or {})}
        if shown:
            self.bar.update(self.task, figures=" ".join(f"{k} {v:.3f}" for k, v in shown.items()))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def stop(self) -> None:
        self.bar.stop()


def draw_course(folder: Path) -> None:
    """Draw a run's `metrics.jsonl` as `training.png`."""
    from philens.report.figures import figure_training

    records = read_metrics(folder)
    if any("loss" in record for record in records):
        figure_training(records).savefig(folder / "training.png")


def find_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _prepare_folder(folder: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Make or check the run folder; returns the checkpoint to resume from."""
    checkpoints = find_checkpoints(folder)
    if resume:
        if not checkpoints:
            if (folder / METRICS_FILE).exists() or not folder.exists():
                (folder / METRICS_FILE).unlink(missing_ok=True)
            logger.warning("There is no checkpoint in %s yet; starting from the beginning.", folder)
        else:
            _check_same_recipe(checkpoints[-1], recipe)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is not empty; give --resume to go on with the run in it, or another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(recipe_yaml(recipe))
        (folder / VERSIONS_FILE).write_text(json.dumps({"seed": recipe.seed, "versions": versions()}, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}; choose another --output.") from error
    return checkpoints[-1] if resume and checkpoints else None


def _check_same_recipe(checkpoint: Path, recipe: Recipe) -> None:
    then, now = flatten(read_json(checkpoint / CHECKPOINT_RECIPE)), flatten(json.loads(json.dumps(asdict(recipe))))
    changed = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k) and k not in FREE_ON_RESUME)
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise TrainingError(
            f"{checkpoint} belongs to another recipe: {key} was {then.get(key)!r} and is now {now.get(key)!r}{more}; "
            "resume with the same recipe or choose another --output."
        )


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    train, optimizer = recipe.train, recipe.optimizer
    for name in train.report_to:
        _require_tracker(name)
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("linear", {}),
        "cosine": ("cosine", {}),
        "wsd": ("warmup_stable_decay", {"num_decay_steps": round(train.steps * optimizer.decay), "decay_type": "linear"}),
    }
    schedule, options = schedules[optimizer.schedule]
    bf16 = train.precision == "bf16" or (train.precision == "auto" and _has_bf16())
    if train.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
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
        bf16=bf16,
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
        report_to=train.report_to or "none",
        run_name=recipe.name,
        disable_tqdm=True,
    )


def _has_bf16() -> bool:
    """Whether bfloat16 is fast on the device at hand."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mps.is_available() or bool(torch.cpu._is_avx512_bf16_supported())


def _require_tracker(name: str) -> None:
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise TrainingError(f"train.report_to names {name}, which is not installed; pip install 'philens[{name}]'.")


def train(recipe: Recipe, folder: str | Path, resume: bool = False, progress: bool | None = None) -> PHiModel | None:
    """Train a model from nothing by a recipe.

    The run folder holds the resolved `recipe.yaml`, `versions.json`, `metrics.jsonl`, `training.png`, checkpoints, and
    at the end `model/` and `adapter/`, which `philens.load_run` reads.

    Args:
        recipe: what to train.
        folder: the run folder; must be empty or missing unless resuming.
        resume: go on from the last checkpoint; the loss curve is then the uninterrupted run's.
        progress: show a bar; None does where standard error is a terminal.

    Returns:
        The trained model in evaluation mode, or None if the user stopped the run.

    Raises:
        OutputError: the folder cannot be written or holds another run.
        TrainingError: the checkpoint is another recipe's, or a loss is not finite, or a checkpoint cannot be written.
    """
    folder = Path(folder)
    arguments = _arguments(recipe, folder)
    checkpoint = _prepare_folder(folder, recipe, resume)
    lens = build_model(recipe)
    if recipe.train.checkpoint_activations:
        lens.gradient_checkpointing_enable()
    interrupt, evaluation = _Interrupt(), _Evaluation(recipe, lens, folder)
    callbacks: list[TrainerCallback] = [_Phases(recipe, lens), _Records(folder), evaluation, interrupt]
    bar = _Progress() if (progress if progress is not None else sys.stderr.isatty()) else None
    if bar:
        callbacks.append(bar)
    trainer = PHiTrainer(recipe, lens, args=arguments, train_dataset=training_rows(recipe), callbacks=callbacks)
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    evaluation.trainer = trainer
    if checkpoint is not None:
        _drop_records_after(folder, int(checkpoint.name.rsplit("-", 1)[1]))
        logger.info("Resuming from %s.", checkpoint)
    if recipe.train.compile:
        lens.compile(dynamic=False)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        interrupt.restore()
        if bar:
            bar.stop()
    if interrupt.stopped and trainer.state.global_step < recipe.train.steps:
        return None
    lens.enable()
    save_model(lens, folder)
    draw_course(folder)
    return lens.eval()


def _drop_records_after(folder: Path, step: int) -> None:
    """Forget what was logged after a checkpoint; it will be computed again."""
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    path = folder / METRICS_FILE
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(record) + "\n" for record in kept))
    new.replace(path)
