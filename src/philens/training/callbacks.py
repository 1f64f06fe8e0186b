"""What happens between training steps: phases, records, evaluations, trackers, a bar, and a way to stop."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, Protocol

from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from philens.bases.hub import reason
from philens.lens.model import PHiModel
from philens.support.errors import ConfigError
from philens.support.extras import require
from philens.support.typed import listed, shown
from philens.tasks.packing import TokenDocuments
from philens.training.course import draw_course
from philens.training.distributed import any_process, processes
from philens.training.evaluated import Evaluated, record_of
from philens.training.evaluation import evaluate
from philens.training.folder import RunFolder
from philens.training.recipe import Recipe

logger = logging.getLogger(__name__)

# Trackers that transformers may leave out of what is available; they say by themselves what they lack.
_NEVER_LISTED = ("azure_ml", "flyte", "kubeflow")


class Reporting(Protocol):
    """What an evaluation asks of the trainer; `PHiTrainer` says what each does."""

    def check_weights(self) -> None: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def information(self, point: str | None = None) -> float | None: ...
    def log(self, logs: dict[str, float]) -> None: ...
    def pause_clock(self, since: float) -> None: ...


class Phases(TrainerCallback):
    """Takes the layer in at its step and raises its weight."""

    def __init__(self, recipe: Recipe, lens: PHiModel) -> None:
        self.schedule, self.lens = recipe.phi_schedule, lens

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        since, ramp = state.global_step - self.schedule.start_step, self.schedule.warmup_steps
        if since < 0:
            self.lens.disable()
            return
        self.lens.enable()
        self.lens.weight_scale.fill_(min(1.0, (since + 1) / ramp) if ramp else 1.0)


class Records(TrainerCallback):
    """Appends every record to the run's."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "train_runtime" not in logs:
            values = {key: value for key, value in logs.items() if key != "epoch"}
            self.run.add_metrics({"step": state.global_step} | values)


def trackers(recipe: Recipe) -> list[TrainerCallback]:
    """The experiment trackers that a recipe names, as `transformers` has them; they show the recipe.

    Raises:
        ConfigError: one is not known or does not start, such as where its package is not installed; later,
            in its callbacks, also where it takes no records.
    """
    found = []
    for name in recipe.train.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = listed(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"train.report_to must name trackers of {known}, not {shown(name)}.")
        if name in ("tensorboard", "wandb"):  # extras of philens
            require(name, name, f"train.report_to {name}")
        elif name not in {*get_available_reporting_integrations(), *_NEVER_LISTED}:
            raise ConfigError(f"train.report_to {name} needs a package that is not installed; install it.")
        try:
            found.append(_showing(recipe, name, INTEGRATION_TO_CALLBACK[name]()))
        except Exception as error:  # trackers raise what they like
            raise _useless(name, error) from error
    return found


def _showing(recipe: Recipe, name: str, tracker: TrainerCallback) -> TrainerCallback:
    """A tracker that is given a recipe where it asks the model for its configuration."""
    run = SimpleNamespace(config=PreTrainedConfig(**asdict(recipe)))

    def replaced(event: Callable[..., None]) -> Callable[..., None]:
        def told(*args: Any, **kwargs: Any) -> None:
            try:
                event(*args, **kwargs | {"model": run})
            except Exception as error:  # the same
                raise _useless(name, error) from error

        return told

    for event in ("on_train_begin", "on_log"):
        setattr(tracker, event, replaced(getattr(tracker, event)))
    return tracker


def _useless(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"train.report_to {name} does not work ({reason(error)}); give it what it needs, or leave it out."
    )


class Evaluation(TrainerCallback):
    """Measures the model now and then, draws the course, and says when a layer has collapsed.

    Attributes:
        trainer: trainer whose log takes the figures; set once it is made.
    """

    trainer: Reporting

    def __init__(
        self, recipe: Recipe, lens: PHiModel, run: RunFolder, held_out: dict[str, TokenDocuments]
    ) -> None:
        self.recipe, self.lens, self.run, self.held_out = recipe, lens, run, held_out

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Where a layer goes into a trained base, its course begins with the fresh layer.
        if state.global_step == 0 and self.recipe.model.base is not None:
            self._evaluate(state, control)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        train = self.recipe.train
        last = state.global_step == train.steps
        if last or (train.eval_every and state.global_step % train.eval_every == 0):
            self._evaluate(state, control)
            if not last and state.is_world_process_zero:
                draw_course(self.run)

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        begin, should_log = time.monotonic(), control.should_log
        self.trainer.check_weights()
        with self.trainer.autocast():
            rows = evaluate(self.lens, self.recipe, self.held_out, state.global_step)
        record = record_of(rows)
        if self.lens.enabled and self.lens.layers:
            found = [self._collapsed(point, rows, state) for point in self.lens.column_points]
            record["collapsed"] = float(any(found))
        self.trainer.log(record)
        # Trainer takes any record for the step's own, which is still to come.
        control.should_log = should_log
        self.trainer.pause_clock(begin)

    def _collapsed(self, point: str | None, rows: list[Evaluated], state: TrainerState) -> bool:
        of_parts = [row for row in rows if row.part is not None]
        values = [row.value for row in of_parts if row.metric == "phi" and row.point == point]
        phi = sum(values) / len(values) if values else math.inf
        information = self.trainer.information(point)
        collapsed = (
            min(phi, phi if information is None else information) < self.recipe.train.collapse_threshold
        )
        if collapsed:
            logger.warning(
                "The PHi layer%s has collapsed at step %d: its latents carry almost no information (phi is "
                "%.3g nats on average); lower phi.phi_weight, or insert the layer deeper.",
                "" if point is None else f" after {point}",
                state.global_step,
                phi,
            )
        return collapsed


class Interrupt(TrainerCallback):
    """Turns Ctrl-C and a polite kill into a checkpoint after the step at hand."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}

    def _stop(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        if processes() == 1:
            self._say()

    def _say(self) -> None:
        logger.warning("Stopping after this step, with a checkpoint; once more stops at once.")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._stop) for number in numbers}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Several processes hear of it at different moments, and must stop after the same step.
        if any_process(self.stopped):
            if processes() > 1:
                self._say()
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Progress(TrainerCallback):
    """A bar with the time left and the newest figures."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, figures=""
        )
        self.bar.start()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        shown = [
            f"{key} {logs[key]:.3f}" for key in ("loss", "surprisal", "phi", "mtd") if key in (logs or {})
        ]
        if shown:
            self.bar.update(self.task, figures=" ".join(shown))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()
