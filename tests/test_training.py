import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.exc import TorchDynamoException
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from philens.support.errors import (
    AdapterError,
    ConfigError,
    InsertionError,
    OutputError,
    RecipeError,
    TrainingError,
)
from philens.training import callbacks, course
from philens.training.build import start_model
from philens.training.course import figure_training  # not the blank one of conftest.py
from philens.training.evaluated import record_of, rows_of
from philens.training.evaluation import evaluate_tasks
from philens.training.folder import RunFolder
from philens.training.opening import load_run
from philens.training.recipe import load_recipe, recipe_yaml
from philens.training.trainer import PHiTrainer, train, training_rows
from tiny import tiny_recipe

EVERY_STEP = {"step", "loss", "surprisal", "learning_rate", "grad_norm", "tokens_per_second"}


def steps_of(folder, *ignored):
    """The records of training steps, without what a clock decides."""
    records = [record for record in RunFolder(folder).metrics() if "loss" in record]
    return [{k: v for k, v in r.items() if k not in {"tokens_per_second", *ignored}} for r in records]


def weights_of(folder):
    files = ("model/model.safetensors", "adapter/phi_layer.safetensors")
    return {f"{file} {k}": v for file in files for k, v in load_file(folder / file).items()}


def assert_same_run(folder, other):
    assert steps_of(folder) == steps_of(other)
    first, second = weights_of(folder), weights_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A whole run of the tiny recipe, with evaluations."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    recipe = tiny_recipe(train__eval_every=3, train__report_to="tensorboard")
    return train(recipe, folder), recipe, folder


def test_a_run_writes_all_that_is_promised(smoke):
    lens, recipe, folder = smoke
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock", "adapter", "checkpoint-8", "checkpoint-9", "metrics.jsonl", "model", "recipe.yaml",
        "runs", "training.png", "versions.json",
    }  # fmt: skip
    assert not list(folder.rglob("training_args.bin"))
    assert load_recipe(folder / "recipe.yaml") == recipe
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["seed"] == 0
    assert {"philens", "torch", "transformers", "python"} <= set(versions["versions"])
    assert not lens.training
    assert lens.enabled


def test_the_picture_of_a_run_is_drawn(smoke, monkeypatch):
    *_, folder = smoke
    blank = (folder / "training.png").read_bytes()
    monkeypatch.setattr(course, "figure_training", figure_training)
    course.draw_course(RunFolder(folder))
    drawn = (folder / "training.png").read_bytes()
    assert blank[:8] == drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(drawn) > 10 * len(blank)


def test_every_step_is_logged(smoke):
    _, recipe, folder = smoke
    records = [r for r in RunFolder(folder).metrics() if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 10))
    for record in records:
        assert set(record) >= EVERY_STEP
        assert all(math.isfinite(value) for value in record.values())
        parts = {"phi", "contrastive", "information"} & set(record)
        assert parts == (set() if record["step"] <= 4 else {"phi", "contrastive", "information"})
        size, weight = recipe.model.hidden_size, min(1, (record["step"] - 4) / 3)
        if parts:
            expected = record["surprisal"] + weight * (record["phi"] / size + 0.1 * record["contrastive"])
            assert record["loss"] == pytest.approx(expected, rel=1e-5)
        else:
            assert record["loss"] == pytest.approx(record["surprisal"])
    assert [r["learning_rate"] for r in records[:4]] == pytest.approx([0, 5e-3, 1e-2, 1e-2])


def test_evaluations_are_logged_per_task(smoke):
    _, recipe, folder = smoke
    evaluations = [r for r in RunFolder(folder).metrics() if any(key.startswith("eval/") for key in r)]
    assert [r["step"] for r in evaluations] == [3, 6, 9]
    assert len([key for key in evaluations[0] if key.endswith("/surprisal")]) == 6
    assert not [key for key in evaluations[0] if key.endswith("/phi")]
    assert len([key for key in evaluations[1] if key.endswith("/phi")]) == 6
    assert [r.get("collapsed") for r in evaluations] == [None, 0.0, 0.0]
    # The last evaluation is of the model that was saved.
    again = record_of(evaluate_tasks(load_run(folder)[0], recipe, 2))
    assert record_of(rows_of(evaluations[-1])) == {k: v for k, v in evaluations[-1].items() if k in again}
    assert {k: v for k, v in evaluations[-1].items() if k in again} == pytest.approx(again, rel=1e-5)


def test_tensorboard_gets_the_records(smoke):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    *_, folder = smoke
    (place,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(place)).Reload()
    assert {"train/loss", "train/phi", "train/eval/copy/surprisal"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))


def test_what_is_returned_is_what_is_loaded(smoke):
    lens, recipe, folder = smoke
    loaded, found = load_run(folder)
    assert found == recipe
    ids = torch.randint(97, 115, (2, 20))
    with torch.no_grad():
        assert torch.equal(lens(ids).phi, loaded(ids).phi)
        assert torch.equal(lens(ids).logits, loaded(ids).logits)


def test_resuming_a_finished_run_returns_it(smoke):
    lens, recipe, folder = smoke
    before = (folder / "metrics.jsonl").read_text()
    again = train(recipe, folder, resume=True)
    assert torch.equal(again.phi.encoder.weight, lens.phi.encoder.weight)
    assert (folder / "metrics.jsonl").read_text() == before


def test_wandb_gets_the_records_and_the_recipe(tmp_path, monkeypatch):
    wandb = MagicMock(run=None)
    wandb.__spec__ = ModuleSpec("wandb", None)
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, wandb)
    wandb.init.side_effect = lambda **options: setattr(wandb, "run", MagicMock())
    train(tiny_recipe(train__report_to="wandb", train__steps=2, name="mine"), tmp_path / "run")
    assert wandb.init.call_args.kwargs["name"] == "mine"
    assert wandb.config.update.call_args.args[0]["optimizer"]["schedule"] == "constant"
    rows = [call.args[0] for call in wandb.log.call_args_list]
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [1, 2]


class Tracker(TrainerCallback):
    """Stands for one that transformers knows."""

    def __init__(self):
        self.begun, self.rows = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begun.append(model.config.to_dict())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append((state.global_step, dict(logs)))


def test_every_tracker_gets_the_records_and_the_recipe(tmp_path, monkeypatch):
    """Whichever names transformers knows, tomorrow's as well."""
    made = {}

    def stands_for(name):
        return lambda: made.setdefault(name, Tracker())

    names = sorted(INTEGRATION_TO_CALLBACK)
    assert {"tensorboard", "wandb", "mlflow", "trackio", "comet_ml"} < set(names)
    for name in names:
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, stands_for(name))
    monkeypatch.setattr(callbacks, "require", lambda *args: None)
    monkeypatch.setattr(callbacks, "get_available_reporting_integrations", lambda: names)
    train(tiny_recipe(train__report_to=names, train__steps=2), tmp_path / "run")
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept if "loss" in row] == [1, 2]
    assert list(made) == names
    for tracker in made.values():
        assert [recipe["optimizer"]["schedule"] for recipe in tracker.begun] == ["constant"]
        rows = [(step, logs["loss"]) for step, logs in tracker.rows if "loss" in logs]
        assert rows == [(row["step"], row["loss"]) for row in kept if "loss" in row]


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
def test_a_missing_tracker(tmp_path, monkeypatch, name):
    known = vars(integration_utils)
    for check in [key for key in known if re.fullmatch(r"is_\w+_available", key)]:
        monkeypatch.setitem(known, check, lambda *args: False)
    monkeypatch.setitem(known, "_is_comet_installed", False)
    monkeypatch.setitem(sys.modules, name, None)  # of the two that are extras
    with pytest.raises(ConfigError) as caught:
        train(tiny_recipe(train__report_to=name), tmp_path / "run")
    said = str(caught.value).removeprefix(f"train.report_to {name} ")
    if name in ("tensorboard", "wandb"):
        assert said == f"needs {name}: install it with `pip install 'philens[{name}]'`."
    elif name in callbacks._NEVER_LISTED:
        lacking = r"(installed|environment variable to be set)"
        assert re.fullmatch(
            rf"does not work \(.* {lacking}\); give it what it needs, or leave it out\.", said
        )
    else:
        assert said == "needs a package that is not installed; install it."
    assert not (tmp_path / "run").exists()


def test_no_such_tracker(tmp_path):
    with pytest.raises(ConfigError, match=r"report_to must name trackers of azure_ml, .*, not 'paper'"):
        train(tiny_recipe(train__report_to="paper"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("event", ["on_train_begin", "on_log"])
def test_a_tracker_that_fails_is_a_sentence(tmp_path, monkeypatch, event):
    """Most find out only then that nobody has logged in."""

    class Failing(Tracker):
        pass

    def fail(*args, **kwargs):
        raise RuntimeError("No API key.\nLog in first.")

    setattr(Failing, event, fail)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "flyte", Failing)
    with pytest.raises(ConfigError, match=r"report_to flyte does not work \(No API key"):
        train(tiny_recipe(train__report_to="flyte", train__steps=2), tmp_path / "run")
    train(tiny_recipe(train__steps=2), tmp_path / "run", resume=True)  # nothing is lost


def test_the_layer_enters_at_its_step_and_its_weight_rises(tmp_path, monkeypatch):
    seen = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append((self.lens.enabled, float(self.lens.weight_scale)))
        return original(self, model, inputs, *args, **kwargs)

    original = PHiTrainer.compute_loss
    monkeypatch.setattr(PHiTrainer, "compute_loss", compute_loss)
    recipe = tiny_recipe(phi_schedule__start_step=2, phi_schedule__warmup_steps=4, train__steps=7)
    train(recipe, tmp_path / "run")
    assert [enabled for enabled, _ in seen] == [False, False, True, True, True, True, True]
    assert [weight for _, weight in seen[2:]] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_before_it_enters_the_layer_changes_nothing(tmp_path):
    """Phase 1 is the training of the plain base model: the layer's weights stay as they were drawn."""
    recipe = tiny_recipe(phi_schedule__start_step=100, train__steps=3, optimizer__weight_decay=0.0)
    lens = train(recipe, tmp_path / "run")
    fresh = start_model(recipe)[0]
    assert all(torch.equal(v, fresh.phi.state_dict()[k]) for k, v in lens.phi.state_dict().items())
    assert not torch.equal(lens.base.get_input_embeddings().weight, fresh.base.get_input_embeddings().weight)


def test_accumulated_passes_equal_one_big_batch(tmp_path):
    """Means of passes are averaged: exactly the big batch's mean where passes hold equally many tokens."""
    keys = {"data__packing": False, "data__length": 16, "phi__bottleneck": False, "train__steps": 5}
    keys["phi_schedule__start_step"] = 2
    big = tiny_recipe(**keys, train__batch_size=6)
    small = tiny_recipe(**keys, train__batch_size=2, train__accumulate=3)
    assert all((row["labels"] != -100).all() for row in (training_rows(big)[i] for i in range(6)))
    train(big, tmp_path / "big")
    train(small, tmp_path / "small")
    # Information is of a step's first pass.
    runs = (steps_of(tmp_path / name, "information") for name in ("big", "small"))
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=2e-4)
    first, second = weights_of(tmp_path / "big"), weights_of(tmp_path / "small")
    assert all(torch.allclose(v, second[k], atol=1e-4) for k, v in first.items())


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
def test_activation_checkpointing_changes_no_loss(tmp_path, architecture):
    keys = {"model__architecture": architecture, "phi_schedule__start_step": 2, "train__steps": 5}
    train(tiny_recipe(**keys), tmp_path / "plain")
    train(tiny_recipe(**keys, train__checkpoint_activations=True), tmp_path / "recomputed")
    for one, other in zip(steps_of(tmp_path / "plain"), steps_of(tmp_path / "recomputed"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_bfloat16_autocast_on_cpu(tmp_path):
    lens = train(tiny_recipe(train__precision="bf16"), tmp_path / "bf16")
    train(tiny_recipe(), tmp_path / "fp32")
    assert all(p.dtype == torch.float32 for p in lens.parameters())
    ours, theirs = steps_of(tmp_path / "bf16"), steps_of(tmp_path / "fp32")
    assert ours != theirs
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
def test_compiled_training_across_the_phases(tmp_path, architecture):
    keys = {"model__architecture": architecture, "phi_schedule__start_step": 3, "train__steps": 6}
    keys["train__eval_every"] = 2
    train(tiny_recipe(**keys), tmp_path / "eager")
    train(tiny_recipe(**keys, train__compile=True), tmp_path / "compiled")
    eager, compiled = steps_of(tmp_path / "eager"), steps_of(tmp_path / "compiled")
    assert [set(r) for r in eager] == [set(r) for r in compiled]
    # A compiled program may draw other noise for the latents.
    for one, other in zip(eager[:3], compiled[:3], strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    for one, other in zip(eager, compiled, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


def test_collapse_is_seen(tmp_path, caplog):
    keys = {"phi__phi_weight": 1e4, "phi__contrastive_weight": 0.0, "phi_schedule__start_step": 0}
    recipe = tiny_recipe(**keys, phi_schedule__warmup_steps=0, train__steps=60, train__save_every=0)
    with caplog.at_level(logging.WARNING, "philens"):
        train(recipe, tmp_path / "run")
    assert "The PHi layer has collapsed at step 60" in caplog.text
    assert [r["collapsed"] for r in RunFolder(tmp_path / "run").metrics() if "collapsed" in r] == [1.0]


# Stopped and resumed


ARCHITECTURES = {
    "transformer": {},
    # Records that cover several steps and passes, and data made by workers.
    "lstm": {
        "model__architecture": "lstm",
        "train__log_every": 4,
        "train__accumulate": 2,
        "data__workers": 1,
    },
    "muon": {"optimizer__name": "muon", "optimizer__schedule": "wsd", "phi_schedule__start_step": 2},
}
# Before the first checkpoint, in phase 1 after it, and with the layer in; a checkpoint is due every 2 steps.
STOPS = {
    "early": ("kill", 2),
    "phase_1": ("kill", 4),
    "phase_2": ("kill", 8),
    "saving": ("kill_while_saving", 6),
    "ctrl_c": ("interrupt", 3),
}
# Of the LSTM in every run, what its records, sums over several passes, add to the Transformer's.
STOPPED = [("transformer", stop) for stop in STOPS] + [("lstm", "phase_2"), ("lstm", "ctrl_c")]
OTHERS = [("lstm", "early"), ("lstm", "phase_1"), ("lstm", "saving")]
FULL = ("fill_disk", "fill_disk_to_the_brim")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders of runs that were stopped."""
    cases = {(a, s): (*STOPS[s], ARCHITECTURES[a]) for a, s in STOPPED}
    cases[("muon", "phase_2")] = ("kill", 6, ARCHITECTURES["muon"])
    return stop(tmp_path_factory.mktemp("stopped"), cases | {("transformer", m): (m, 5, {}) for m in FULL})


def stop(folder, cases):
    """Runs that are stopped in their folders, all made in one process that imports torch once."""
    scenarios = []
    for (architecture, name), (mishap, step, changes) in cases.items():
        path = folder / f"{architecture}-{name}"
        path.with_suffix(".yaml").write_text(recipe_yaml(tiny_recipe(**changes)))
        arguments = ["train", str(path.with_suffix(".yaml")), "--output", str(path)]
        log = str(path.with_suffix(".log"))
        scenarios.append({"arguments": arguments, "mishap": mishap, "step": step, "log": log})
    file = folder / "scenarios.json"
    file.write_text(json.dumps(scenarios))
    script = Path(__file__).with_name("stopped_runs.py")
    subprocess.run(
        [sys.executable, str(script), str(file)],
        check=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    for name, changes in ARCHITECTURES.items():
        train(tiny_recipe(**changes), folder / name)
    return folder


@pytest.mark.parametrize(("architecture", "stop"), STOPPED)
def test_a_resumed_run_is_the_uninterrupted_one(stopped, uninterrupted, architecture, stop):
    resume(stopped, uninterrupted, architecture, stop)


@pytest.mark.slow
def test_resumed_runs_of_other_stops(tmp_path, uninterrupted):
    stop(tmp_path, {(a, s): (*STOPS[s], ARCHITECTURES[a]) for a, s in OTHERS})
    for architecture, name in OTHERS:
        resume(tmp_path, uninterrupted, architecture, name)


def resume(stopped, uninterrupted, architecture, stop):
    folder = stopped / f"{architecture}-{stop}"
    checkpoints = [path.name for path in RunFolder(folder).checkpoints()]
    expected = {"early": [], "phase_1": ["checkpoint-2"], "phase_2": ["checkpoint-4", "checkpoint-6"]}
    expected |= {"saving": ["checkpoint-2", "checkpoint-4"], "ctrl_c": ["checkpoint-2", "checkpoint-3"]}
    assert checkpoints == expected[stop]
    assert not (folder / "adapter").exists()
    # Whether workers make the data is free to change.
    recipe = tiny_recipe(**ARCHITECTURES[architecture] | {"data__workers": 0})
    train(recipe, folder, resume=True)
    assert_same_run(folder, uninterrupted / architecture)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


def test_a_resumed_run_with_muon(stopped, uninterrupted):
    folder = stopped / "muon-phase_2"
    train(tiny_recipe(**ARCHITECTURES["muon"]), folder, resume=True)
    assert_same_run(folder, uninterrupted / "muon")


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
def test_ctrl_c_says_how_to_go_on(stopped, architecture):
    log = stopped / f"{architecture}-ctrl_c.log"
    assert log.with_suffix(".log.code").read_text() == "130"
    text = log.read_text()
    assert "Traceback" not in text
    assert text.count("Stopping after this step, with a checkpoint") == 1
    arguments = f"{log.with_suffix('.yaml')} --output {log.with_suffix('')} --resume"
    assert f"go on with: philens train {arguments}" in text


@pytest.mark.parametrize("mishap", FULL)
def test_a_full_disk(stopped, mishap):
    folder = stopped / f"transformer-{mishap}"
    log = folder.with_suffix(".log")
    assert log.with_suffix(".log.code").read_text() == "2"
    lines = log.read_text().strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("philens: error: ")
    assert "could not be written" in lines[0]
    assert lines[0].endswith("free some space and --resume.")
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


def test_after_a_full_disk_it_goes_on(stopped, uninterrupted):
    folder = stopped / "transformer-fill_disk"
    train(tiny_recipe(), folder, resume=True)
    assert_same_run(folder, uninterrupted / "transformer")


def test_other_records_and_checkpoints_on_resuming(stopped, uninterrupted, tmp_path):
    """How often is logged and saved is free to change; what is computed stays the same."""
    folder = stopped / "transformer-fill_disk_to_the_brim"
    train(tiny_recipe(train__log_every=5, train__save_every=3, train__keep=9), folder, resume=True)
    assert [r["step"] for r in steps_of(folder)] == [1, 2, 3, 4, 5]
    assert [p.name[11:] for p in RunFolder(folder).checkpoints()] == ["2", "4", "6", "9"]
    first, second = weights_of(folder), weights_of(uninterrupted / "transformer")
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# What goes wrong


def poison(monkeypatch, step):
    """Make a weight NaN before a step."""

    def compute_loss(self, model, *args, **kwargs):
        if self.state.global_step + 1 == step:
            next(self.lens.parameters()).data[0] = math.nan
        return original(self, model, *args, **kwargs)

    original = PHiTrainer.compute_loss
    monkeypatch.setattr(PHiTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, log_every):
    recipe, folder = tiny_recipe(train__log_every=log_every, train__steps=8), tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 5)
        with pytest.raises(TrainingError, match="checkpoint-4 is intact") as caught:
            train(recipe, folder)
    found = "loss is nan at step 5" if log_every == 1 else "a weight is not finite at step 6"
    assert found in str(caught.value)
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert train(recipe, folder, resume=True) is not None


def test_a_loss_that_is_not_finite_at_the_very_end(tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    with pytest.raises(TrainingError, match="no checkpoint was written yet"):
        train(tiny_recipe(train__steps=3, train__log_every=10, train__save_every=0), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_huge_learning_rate(tmp_path):
    keys = {"optimizer__learning_rate": 1e30, "optimizer__clip": 0.0, "train__steps": 9}
    with pytest.raises(TrainingError, match=r"Training failed, .* lower optimizer.learning_rate"):
        train(tiny_recipe(**keys), tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "lower train.batch_size"),
        (TorchDynamoException("no compiler\nmore"), r"torch.compile failed \(no compiler\); set train.c"),
    ],
)
def test_what_the_machine_cannot_do(tmp_path, monkeypatch, error, message):
    def compute_loss(*args, **kwargs):
        raise error

    monkeypatch.setattr(PHiTrainer, "compute_loss", compute_loss)
    with pytest.raises(TrainingError, match=message):
        train(tiny_recipe(), tmp_path / "run")


@pytest.mark.parametrize("sort", [RuntimeError, OSError])
def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, sort):
    def save(*args, **kwargs):
        raise sort(28, "No space left on device") if sort is OSError else sort("file write failed\nmore")

    recipe, folder = tiny_recipe(train__steps=5), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(TrainingError, match="no checkpoint was written yet: free some space") as caught:
            train(recipe, folder)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("*checkpoint*"))


def test_a_checkpoint_of_another_recipe(stopped):
    folder = stopped / "muon-phase_2"
    recipe = tiny_recipe(**ARCHITECTURES["muon"] | {"model__layers": 3, "seed": 1})
    with pytest.raises(TrainingError) as caught:
        train(recipe, folder, resume=True)
    message = str(caught.value)
    assert "belongs to another recipe: model.layers was 2 and is now 3 (and 1 more keys differ)" in message


def rewritten(path, change):
    """Change what a checkpoint holds, with its sums."""
    old = path.read_bytes()
    values = json.loads(old)
    change(values)
    path.write_text(json.dumps(values))
    sums = path.parent / "SHA256SUMS"
    lines = [f"# {len(one)}\n{hashlib.sha256(one).hexdigest()}" for one in (old, path.read_bytes())]
    assert lines[0] in sums.read_text()
    sums.write_text(sums.read_text().replace(*lines))


def test_a_run_of_another_version(stopped, tmp_path):
    """Keys that came later have their defaults; those of a newer version are refused, naming it."""
    folder = tmp_path / "run"
    shutil.copytree(stopped / "muon-phase_2", folder)
    recipe = tiny_recipe(**ARCHITECTURES["muon"])
    path = RunFolder(folder).checkpoints()[-1] / "recipe.json"

    def of_before(values):
        for section, key in (("phi", "pressure"), ("phi", "pressure_share"), ("train", "keep")):
            del values[section][key]

    rewritten(path, of_before)
    train(recipe, folder, resume=True)
    text = (folder / "recipe.yaml").read_text()
    shorter = "".join(line for line in text.splitlines(True) if "pressure" not in line)
    assert shorter != text
    (folder / "recipe.yaml").write_text(shorter)
    assert load_run(folder)[1] == recipe

    versions = json.loads((folder / "versions.json").read_text())
    versions["versions"]["philens"] = "9.1"
    (folder / "versions.json").write_text(json.dumps(versions))
    message = "has a key 'phi.depth' that this philens .* does not know; install philens 9.1, which wrote it"
    (folder / "recipe.yaml").write_text(text.replace("phi:\n", "phi:\n  depth: 1\n"))
    with pytest.raises(RecipeError, match=message):
        load_run(folder)
    shutil.rmtree(folder / "adapter")
    path = RunFolder(folder).checkpoints()[-1] / "recipe.json"
    rewritten(path, lambda values: values["phi"].update(depth=1))
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        train(recipe, folder, resume=True)


def test_a_damaged_checkpoint(tmp_path):
    recipe, folder = tiny_recipe(train__steps=3), tmp_path / "run"
    train(recipe, folder)
    for finished in (folder / "adapter", folder / "model"):
        finished.rename(tmp_path / finished.name)
    weights = folder / "checkpoint-3" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterError, match=r"model\.safetensors is not as it was written"):
        train(recipe, folder, resume=True)


def test_folders_that_cannot_be_used(tmp_path):
    recipe = tiny_recipe(train__steps=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty; give --resume"):
        train(recipe, tmp_path)
    with pytest.raises(OutputError, match="holds something else than a run"):
        train(recipe, tmp_path, resume=True)
    with pytest.raises(OutputError, match="is a file; choose another --output"):
        train(recipe, tmp_path / "notes.txt")
    with pytest.raises(OutputError, match=r"Cannot write .*: Not a directory"):
        train(recipe, tmp_path / "notes.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_that_cannot_be_built_leaves_no_folder(tmp_path):
    with pytest.raises(InsertionError, match="Layer 7 is out of range"):
        train(tiny_recipe(phi__layer=7), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_layers_are_measured_on_formal_languages():
    keys = {"phi__layer": None, "phi__mode": "observe", "phi__layers": [0, 1], "phi_schedule__start_step": 0}
    recipe = tiny_recipe(**keys)
    lens = start_model(recipe)[0]
    metrics = record_of(evaluate_tasks(lens, recipe, 2))
    alone = tiny_recipe(phi__layer=1, phi__mode="observe", phi_schedule__start_step=0)
    one = start_model(alone)[0]
    one.phi.load_state_dict(lens.layers[1].state_dict())
    expected = record_of(evaluate_tasks(one, alone, 2))
    for name, value in expected.items():
        found = metrics[name if name.endswith("surprisal") else f"{name}@model.layers.1"]
        assert found == pytest.approx(value, rel=1e-5)
    assert sum("@model.layers.0" in name for name in metrics) == sum(n.endswith("phi") for n in expected)
