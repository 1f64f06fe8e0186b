"""Training of models with a PHi layer, on `transformers.Trainer`."""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from philens.bases.facts import evaluating
from philens.bases.hub import reason
from philens.lens.insertion import find_blocks
from philens.lens.model import PHiModel
from philens.support.columns import column_name
from philens.support.errors import AdapterError, InsertionError, OutputError, TrainingError
from philens.support.extras import require
from philens.support.files import check_file, not_finite, read_json, write_sums, written_whole
from philens.tasks.packing import Mixture, PackedRows, SingleRows
from philens.tasks.random_streams import derive
from philens.training import distributed
from philens.training.arguments import trainer_arguments, wants_bf16
from philens.training.build import (
    Sources,
    evaluation_documents,
    open_sources,
    other_attention,
    start_model,
    text_mixture,
)
from philens.training.callbacks import Evaluation, Interrupt, Phases, Progress, Records, trackers
from philens.training.course import draw_course
from philens.training.folder import CHECKPOINT_RECIPE, RunFolder, step_of
from philens.training.opening import finished_model
from philens.training.optimizer import load_state, make_optimizer
from philens.training.own_text import with_own_text
from philens.training.recipe import Recipe
from philens.training.sizes import within_memory

logger = logging.getLogger(__name__)

CHECKPOINT_LOGS = "logs.json"
OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
# Rows that tell a fresh layer how large a base's hidden states are.
CALIBRATION_ROWS = 16
# The noise of latents: one of the independent streams below a seed; automata have 0 to 2, text 10 to 13.
_NOISE = 20


def training_rows(
    recipe: Recipe, tokenizer: Any = None, sources: Sources | None = None
) -> Dataset[dict[str, Tensor]]:
    """The rows a run reads, in order.

    Args:
        tokenizer: needed where the recipe reads text.
        sources: what is open of the text already.
    """
    data, train = recipe.data, recipe.train
    formal = Mixture(data.tasks, data.mixture, recipe.data_seed)
    documents = text_mixture(recipe, tokenizer, sources).documents if data.parts else formal.documents
    rows_per_step = train.batch_size * train.accumulate
    rows = train.steps * rows_per_step
    if not data.packing:
        return SingleRows(documents, data.length, rows, data.group)
    limits = {step * rows_per_step: length for step, length in data.document_lengths.items()}
    return PackedRows(documents, data.length, rows, data.group, limits)


def calibrate(lens: PHiModel, rows: Any) -> None:
    """Fit a fresh layer to the hidden states of a trained base on the first rows that it will read."""
    chosen = [rows[number] for number in range(min(CALIBRATION_ROWS, len(rows)))]
    with evaluating(lens), torch.compiler.set_stance("force_eager"):
        lens.calibrate({key: row[key][None] for key in row if key != "labels"} for row in chosen)


class PHiTrainer(Trainer):
    """A Trainer that logs every part of the loss, stops at a loss that is not finite, and writes each
    checkpoint whole or not at all. Several processes compute what one would.

    Args:
        fresh: whether the layer is to be fitted to its base before the first step.
    """

    def __init__(
        self,
        recipe: Recipe,
        lens: PHiModel,
        tokenizer: Any,
        run: RunFolder,
        fresh: bool = False,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.lens, self.tokenizer, self.run = recipe, lens, tokenizer, run
        self.fresh, self.bf16 = fresh, wants_bf16(recipe)
        self._rows: Any = None
        # Of each part of the loss since the last record: its sum over this process's passes, and how many.
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._informed: dict[str, int] = {}  # the step in which information was summed
        self._pass = (-1, 0)  # the step at hand, and this process's passes in it so far
        self._tokens, self._since = 0, time.monotonic()
        super().__init__(model=lens, **kwargs)
        # The loss is already a mean over tokens; Trainer then averages over the passes of a step.
        self.model_accepts_loss_kwargs = False

    def create_accelerator_and_postprocess(self) -> None:
        from accelerate.state import DistributedType, PartialState

        if distributed.is_sharded() and PartialState().distributed_type == DistributedType.MULTI_CPU:
            # accelerate (AcceleratorState) shards over accelerators only; torch does it on a CPU as well.
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self._choose_shards(self.accelerator.state.fsdp_plugin)

    def _choose_shards(self, plugin: Any) -> None:
        """Shard block by block, and each instrument, which may have another precision, by itself."""
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        # True of in-place operations on what the layers return; there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        units = {type(one).__name__ for one in self.lens.instruments}
        with contextlib.suppress(InsertionError):
            units |= {type(block).__name__ for block in find_blocks(self.lens.base)[1]}
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(units)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.fresh:
            # Not before: a base that is sharded may not fit into one device.
            calibrate(self.lens, self.train_dataset)
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> distributed.StepSampler:
        train = self.recipe.train
        return distributed.StepSampler(train.steps, train.accumulate, train.batch_size, self.args.world_size)

    def get_train_dataloader(self) -> DataLoader:
        loader: Any = super().get_train_dataloader()
        self._rows = loader.base_dataloader  # accelerate's holds the one that has workers
        self._rows.worker_init_fn = _prepare_worker
        return loader

    def end_data_workers(self) -> None:
        """End the processes that make rows. They heed no SIGTERM, by which Python would end them when it
        exits, and wait for them."""
        if (rows := self._rows and self._rows._iterator) is not None:
            rows._shutdown_workers()
            for worker in rows._workers:
                worker.kill()  # if it is held up

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.lens, self.recipe.optimizer)
        return self.optimizer

    def autocast(self) -> torch.autocast:
        """The precision of the run's forward passes."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bf16)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> torch.autocast:
        return self.autocast()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        step, each = self.state.global_step, self.args.gradient_accumulation_steps
        number = self._pass[1] if self._pass[0] == step else 0
        self._pass = (step, number + 1)
        # Noise is set by the seed and the pass alone, whichever process makes it, resumed or not.
        number += step * self.recipe.train.accumulate + self.args.process_index * each
        torch.manual_seed(int(derive(derive(_NOISE, self.recipe.seed), number)[0]))
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        output = model(**inputs, returns="states", packed=self.recipe.data.packing)
        for name, value in output.losses.items():
            self._add(name, value)
        counted = inputs["labels"] != -100
        layers = zip(self.lens.column_points, self.lens.layers, output.layer_outputs, strict=False)
        for point, layer, found in layers:
            name, step = column_name("information", point), self.state.global_step
            # It costs something: only the first step since the last record.
            if name not in self._sums or self._informed.get(name) == step:
                self._informed[name] = step
                self._add(name, layer.latents.carried(found.posterior, counted))
        self._tokens += inputs["input_ids"].numel()
        return output.loss

    def _add(self, name: str, value: Tensor) -> None:
        # Nothing is read here: reading would wait for the device.
        self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._counts[name] = self._counts.get(name, 0) + 1

    def _sums_over_processes(self) -> dict[str, float]:
        """The sums since the last record, averaged over processes, and `loss`, that of Trainer."""
        sums = torch.stack([self._tr_loss.float(), *self._sums.values()])
        return dict(zip(("loss", *self._sums), distributed.mean_over_processes(sums).tolist(), strict=True))

    def information(self, point: str | None = None) -> float | None:
        """What a layer's latents could tell in the first step since the last record, in nats per token; all
        processes must ask."""
        name = column_name("information", point)
        return self._sums_over_processes()[name] / self._counts[name] if name in self._sums else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, sums = time.monotonic(), self._sums_over_processes()
            logs |= {name: sums[name] / count for name, count in self._counts.items()}
            tokens = self._tokens * self.args.world_size
            logs["tokens_per_second"] = tokens / max(now - self._since, 1e-9)
            self._sums, self._counts, self._informed = {}, {}, {}
            self._tokens, self._since = 0, now
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0.0)):
                    self._fail(f"{name} is {logs[name]}")
        super().log(logs, start_time)

    def pause_clock(self, since: float) -> None:
        """Don't count the time from `since` until now in tokens per second."""
        self._since += time.monotonic() - since

    def check_weights(self) -> None:
        """Raise a TrainingError if a weight is not finite; all processes must check."""
        weights = [p.to_local() if isinstance(p, DTensor) else p for p in self.lens.parameters()]
        finite = torch.stack([torch.isfinite(value).all() for value in weights]).all()
        if distributed.any_process(not bool(finite)):
            self._fail("a weight is not finite")

    def _fail(self, what: str) -> None:
        raise TrainingError(
            f"Training failed, {what} at step {self.state.global_step}; {self._last_checkpoint()}: "
            "lower optimizer.learning_rate, and start again with another --output."
        )

    def _last_checkpoint(self) -> str:
        found = self.run.checkpoints()
        return f"{found[-1].name} is intact" if found else "no checkpoint was written yet"

    # Checkpoints: a folder each with the base, the layer, and what Trainer itself keeps. They are the same
    # however many processes there are, and however the model is sharded.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        begin, writes = time.monotonic(), self.args.should_save
        self.check_weights()
        logs = self._log_state()
        optimizer = distributed.whole(self.optimizer.state_dict(), keep=writes)  # pyright: ignore[reportOptionalMemberAccess]
        with distributed.whole_weights(self.lens, keep=writes):
            if writes:
                self._write_checkpoint(optimizer, logs)
        self.pause_clock(begin)

    def _write_checkpoint(self, optimizer: dict[str, Any], logs: dict[str, Any]) -> None:
        try:
            with written_whole(self.run.checkpoint(self.state.global_step)) as staging:
                RunFolder(staging).save_model(self.lens, self.recipe, self.tokenizer)
                torch.save(optimizer, staging / OPTIMIZER_FILE)
                torch.save(self.lr_scheduler.state_dict(), staging / SCHEDULER_FILE)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
                self.state.save_to_json(str(staging / STATE_FILE))
                (staging / CHECKPOINT_RECIPE).write_text(json.dumps(asdict(self.recipe)))
                (staging / CHECKPOINT_LOGS).write_text(json.dumps(logs))
                write_sums(staging)
        except (OutputError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            if "DataLoader worker" in str(error):  # torch says that one has ended wherever training is
                raise
            known = isinstance(error, OutputError)
            why = str(error.__cause__ or error) if known else "a file stopped growing before it was whole"
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} could not be written ({why}); "
                f"{self._last_checkpoint()}: free some space and --resume."
            ) from error
        for old in self.run.checkpoints()[: -self.recipe.train.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights are loaded before the model is sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _reading(Path(checkpoint) / OPTIMIZER_FILE) as path:
                load_state(self.optimizer.optimizer, _load_tensors(path))  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            with _reading(Path(checkpoint) / SCHEDULER_FILE) as path:
                self.lr_scheduler.load_state_dict(_load_tensors(path))  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing scales losses, whatever lies in a checkpoint."""

    # A record may be a mean over several steps; a checkpoint between two records keeps what is summed so far.

    def _log_state(self) -> dict[str, Any]:
        sums = self._sums_over_processes()
        state = {"loss": sums.pop("loss"), "sums": sums, "counts": self._counts}
        each = self.args.gradient_accumulation_steps
        return state | {"passes_each": each, "last_step": self._globalstep_last_logged}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """No generator's state matters; this is where Trainer is ready for the sums since the last record."""
        if checkpoint is not None:
            with _reading(Path(checkpoint) / CHECKPOINT_LOGS) as path:
                logs, device = read_json(path), self.args.device
                self._tr_loss.fill_(logs["loss"])
                self._globalstep_last_logged = int(logs["last_step"])
                # A process may now make more or fewer of a step's passes.
                change = self.args.gradient_accumulation_steps / logs["passes_each"]
                sums, counts = logs["sums"].items(), logs["counts"].items()
                self._sums = {n: torch.tensor(value * change, device=device) for n, value in sums}
                self._counts = {name: count * change for name, count in counts}
            # What is free to differ on resuming is this run's, not the checkpoint's.
            self.state.compute_steps(self.args, self.state.max_steps)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Raise a TrainingError about whatever goes wrong with a checkpoint's file in the block: its path."""
    try:
        yield path
    except AdapterError:
        raise
    except Exception as error:  # what is in it may be anything, and so may what comes out
        raise TrainingError(
            f"{path} does not hold what a checkpoint of this run does ({reason(error)}); remove its folder "
            "and --resume from the one before, or start again with another --output."
        ) from error


def _load_tensors(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, if it is tensors, numbers and text: other objects are never made."""
    check_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _prepare_worker(worker: int) -> None:
    """Ctrl-C in a terminal, and what a launcher sends, reaches data workers too; the trainer still needs them
    for its last step. And rows that cannot be handed over, for want of shared memory, end the worker: without
    a word they would be waited for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(lambda error, rows: os._exit(1))  # pyright: ignore[reportAttributeAccessIssue]


def train(
    recipe: Recipe, folder: str | Path, resume: bool = False, progress: bool | None = None
) -> PHiModel | None:
    """Train a model from nothing by a recipe.

    The run folder holds the resolved `recipe.yaml`, `versions.json`, `metrics.jsonl`, `training.png`,
    checkpoints, and at the end `model/` and `adapter/`, which `philens.load_run` reads.

    Started by `accelerate launch` or `torchrun`, several processes share the passes of each step and compute
    what one would; the first of them writes the folder, which all must see.

    Args:
        folder: the run folder; must be empty or missing unless resuming.
        resume: go on from the last checkpoint; the loss curve is then the uninterrupted run's, also with
            another number of processes.
        progress: show a bar; None does where standard error is a terminal.

    Returns:
        The trained model as `philens.load_run` reads it, or None if the user stopped the run. Of several
        processes, all but the first return the model that they trained, which may be sharded.

    Raises:
        OutputError: the folder cannot be written or holds something else.
        ConfigError: options that do not fit the model.
        TrainingError: the run in the folder is another recipe's, a loss is not finite, a checkpoint cannot
            be written, memory does not suffice, or the processes cannot share the passes of a step.
        SystemExit: in all processes but the first that fails, where there are several.
    """
    with distributed.one_voice(), within_memory(), contextlib.ExitStack() as held:
        return _train(recipe, RunFolder(folder), resume, progress, held)


def _train(
    recipe: Recipe, run: RunFolder, resume: bool, progress: bool | None, held: contextlib.ExitStack
) -> PHiModel | None:
    rank, processes = distributed.join()
    passes = distributed.passes_each(recipe.train, processes)
    distributed.is_sharded()  # an error there comes before a large model
    reporting = trackers(recipe)  # and here before data are fetched
    if recipe.model.quantization != "none":
        require("bitsandbytes", "quantize", f"A base in {recipe.model.quantization}")
    if resume and (lens := finished_model(run.path, recipe)):
        if rank == 0:  # it may have been killed before all was tidy
            run.tidy()
            draw_course(run)
        return lens
    checkpoint = run.resume_from(recipe, resume)
    sources = open_sources(recipe)
    lens, tokenizer = start_model(recipe, checkpoint, sources)
    if checkpoint is not None:
        with _reading(checkpoint / STATE_FILE) as path:
            if (step := TrainerState(**read_json(path)).global_step) != step_of(checkpoint):
                raise ValueError(f"it is of step {step}")
        RunFolder(checkpoint).load_weights(lens, recipe)
    place, remedy = recipe.model.base, "give another model.base"
    if checkpoint is not None:
        place, remedy = checkpoint, "remove it and --resume, or start again with another --output"
    if place is not None and (name := not_finite(lens)) is not None:
        raise TrainingError(f"{place} holds a weight that is not finite ({name}); {remedy}.")
    if recipe.train.checkpoint_activations:
        lens.checkpoint_activations()
    distributed.wait_for_all()  # until they have seen the folder as it was
    if rank == 0:
        held.enter_context(run.lock())
        run.start(recipe, -1 if checkpoint is None else step_of(checkpoint))
    with lens.disabled():
        read = with_own_text(recipe, lens.base, tokenizer, run, writes=rank == 0)
    rows, held_out = training_rows(read, tokenizer, sources), {}
    if recipe.data.parts:
        count = recipe.train.evaluation_documents
        held_out = evaluation_documents(read, tokenizer, count, sources)
    interrupt, evaluation = Interrupt(), Evaluation(recipe, lens, run, held_out)
    callbacks: list[TrainerCallback] = [evaluation, interrupt]
    if recipe.phi is not None:
        callbacks.insert(0, Phases(recipe, lens))
    bar = Progress() if rank == 0 and (sys.stderr.isatty() if progress is None else progress) else None
    if rank == 0:
        callbacks += [Records(run), *reporting]
    if bar:
        callbacks.append(bar)
    trainer = PHiTrainer(
        recipe,
        lens,
        tokenizer,
        run,
        fresh=checkpoint is None and recipe.phi is not None and recipe.model.base is not None,
        args=trainer_arguments(recipe, run.path, passes),
        train_dataset=rows,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    evaluation.trainer = trainer
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
    if recipe.train.compile:
        torch.compiler.reset()  # what this process compiled before counts among the programs it may make
        lens.compile(dynamic=False)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "The device's memory does not suffice; lower train.batch_size and raise train.accumulate, "
            "or set train.checkpoint_activations."
        ) from error
    except TorchDynamoException as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"torch.compile failed ({first}); set train.compile to false.") from error
    finally:
        trainer.end_data_workers()
        interrupt.restore()
        if bar:
            bar.stop()
    if interrupt.stopped and trainer.state.global_step < recipe.train.steps:
        return None
    trainer.check_weights()
    with distributed.whole_weights(lens, keep=rank == 0):
        if rank == 0:
            lens.record = run.record(recipe)
            run.save_model(lens, recipe, tokenizer)
            draw_course(run)
    if rank > 0:
        return lens.eval()
    # Not the layer that was trained, which may be compiled; a base that is as it was is not loaded again.
    as_it_was = not (recipe.keeps_base or distributed.is_sharded() or other_attention(lens.base, recipe))
    base: Any = lens.detach() if as_it_was else None
    if base is not None and recipe.model.quantization == "none":
        base.cpu()
    return finished_model(run.path, recipe, base)
