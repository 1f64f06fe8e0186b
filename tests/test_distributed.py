"""Training in two processes that a launcher started, against training in one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_llama
from philens.bases.tokenizer import character_tokenizer
from philens.support.errors import TrainingError
from philens.tasks.packing import PackedRows
from philens.training import trainer as trainer_module
from philens.training.distributed import StepSampler, is_sharded, passes_each
from philens.training.folder import RunFolder
from philens.training.opening import load_run
from philens.training.recipe import load_recipe, recipe_yaml
from philens.training.trainer import train, training_rows
from tiny import tiny_recipe, tiny_values

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Two passes in a step, of rows with padding; records of several steps, with noise in the latents.
PLAIN = {"train__accumulate": 2, "train__keep": 9, "train__log_every": 2}
FROZEN = PLAIN | {"phi_schedule__start_step": 0, "phi__layer": 1, "train__log_every": 1}
FROZEN |= {"train__steps": 4, "train__save_every": 0}
VARIANTS = {
    "lstm": PLAIN | {"model__architecture": "lstm", "train__accumulate": 4, "data__workers": 1},
    "muon": PLAIN | {"optimizer__name": "muon"},
    "bf16": PLAIN | {"train__precision": "bf16", "train__checkpoint_activations": True},
    "observing": FROZEN | {"phi__mode": "observe", "phi__pressure": "reconstruction"},
}


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("", 0))
        return str(found.getsockname()[1])


def launch(scenarios, folder):
    """Run scenarios in two processes; returns what these said."""
    file = folder / "scenarios.json"
    file.write_text(json.dumps(scenarios))
    script = str(Path(__file__).with_name("launched_runs.py"))
    command = [*TORCHRUN, script, str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)


def scenario(folder, name, recipe, shard=False, resume=False, bad_step=None):
    path = folder / f"{name}.yaml"
    path.write_text(recipe_yaml(recipe))
    arguments = ["train", str(path), "--output", str(folder / name), *["--resume"][: int(resume)]]
    return {"arguments": arguments, "shard": shard, "bad_step": bad_step, "codes": f"{folder / name}.codes"}


def cut(folder, to, step):
    """A copy of a finished run as it was when it was stopped after the checkpoint of a step."""
    shutil.copytree(folder, to)
    later = [path for path in RunFolder(to).checkpoints() if int(path.name[11:]) > step]
    for path in (*later, to / "adapter", to / "model"):
        shutil.rmtree(path, ignore_errors=True)


def weights_of(folder):
    names = ("model/model.safetensors", "adapter/phi_layer.safetensors", "adapter/mtd_head.safetensors")
    files = [name for name in names if (folder / name).exists()]
    return {f"{file} {name}": value for file in files for name, value in load_file(folder / file).items()}


def assert_same_run(folder, other, rounding=2e-6):
    """The same records, each once, and the same weights but for the order of summation."""
    records, others = RunFolder(folder).metrics(), RunFolder(other).metrics()
    assert len(records) == len(others) > 4
    assert [r.keys() for r in records] == [r.keys() for r in others]
    for record, one in zip(records, others, strict=True):
        record.pop("tokens_per_second", None), one.pop("tokens_per_second", None)
        # A small divergence is a difference of numbers of some nats and is rounded as they are: 1e-7 is
        # float32's unit at 1.
        assert record == pytest.approx(one, rel=rounding, abs=1e-7)
    weights, those = weights_of(folder), weights_of(other)
    assert weights.keys() == those.keys()
    assert weights
    for name, value in weights.items():
        torch.testing.assert_close(value, those[name], rtol=rounding, atol=rounding, msg=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained base, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def other_instruments(base):
    """A shallow head, in a base and with one from nothing; codes, most of which no token of a step has."""
    values = tiny_values(**FROZEN, mtd__heads=2)
    together = {key: value for key, value in values.items() if not key.startswith("phi")}
    frozen = {key: value for key, value in together.items() if not key.startswith("model.")}
    return {
        "head": load_recipe(None, frozen | {"model.base": str(base)}),
        "together": load_recipe(None, together),
        "codes": tiny_recipe(**FROZEN, phi__codebooks=2, phi__codes=128),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Runs of one process and of two, some resumed from the other's checkpoints; `said` by the two."""
    folder = tmp_path_factory.mktemp("runs")
    plain, frozen = tiny_recipe(**PLAIN), tiny_recipe(**FROZEN, model__base=str(base))
    others = other_instruments(base)
    for name, recipe in {"one": plain, "frozen-one": frozen, **others}.items():
        train(recipe, folder / name)
    cut(folder / "one", folder / "one-to-two", 6)
    cut(folder / "one", folder / "one-to-sharded", 4)
    done = launch(
        [
            scenario(folder, "two", plain),
            scenario(folder, "one-to-two", plain, resume=True),
            scenario(folder, "one-to-sharded", plain, shard=True, resume=True),
            scenario(folder, "frozen-sharded", frozen, shard=True),
            *(scenario(folder, f"{name}-two", recipe) for name, recipe in others.items()),
            *(scenario(folder, f"{name}-sharded", recipe, shard=True) for name, recipe in others.items()),
            scenario(folder, "bad", tiny_recipe(**PLAIN | {"train__log_every": 1}), bad_step=6),
        ],
        folder,
    )
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.parametrize(
    ("run", "other"),
    [
        ("two", "one"),
        ("one-to-two", "one"),
        ("one-to-sharded", "one"),
        ("frozen-sharded", "frozen-one"),
    ],
)
def test_two_processes_compute_what_one_does(runs, run, other):
    codes = (runs / f"{run}.codes").read_text().split()
    assert codes == ["0", "0"], (runs / "said").read_text()
    assert_same_run(runs / run, runs / other)
    lens, _ = load_run(runs / run)  # strict
    with torch.no_grad():
        assert torch.isfinite(lens(torch.randint(97, 115, (2, 20))).phi).all()


@pytest.mark.parametrize("kind", ["two", "sharded"])
@pytest.mark.parametrize("name", ["head", "together", "codes"])
def test_other_instruments_in_two_processes(runs, name, kind):
    run = f"{name}-{kind}"
    assert (runs / f"{run}.codes").read_text().split() == ["0", "0"], (runs / "said").read_text()
    assert_same_run(runs / run, runs / name)
    part = {"head": "mtd_head", "together": "mtd_head", "codes": "codes.vectors"}[name]
    assert any(part in weight for weight in weights_of(runs / run))


@pytest.mark.parametrize("start", ["two", "one-to-sharded"])
def test_one_process_goes_on_from_two(runs, start):
    folder = runs / f"{start}-to-one"
    cut(runs / start, folder, 6)
    train(tiny_recipe(**PLAIN), folder, resume=True)
    assert_same_run(folder, runs / "one")


def test_checkpoints_do_not_tell_how_many_wrote_them(runs):
    names = [
        {str(p.relative_to(runs / run)) for p in (runs / run).rglob("checkpoint-*/**/*")}
        for run in ("one", "two", "one-to-sharded")
    ]
    assert all(one == names[0] for one in names)
    assert not [name for name in names[0] if "rng" in name]


def test_a_loss_that_is_not_finite_in_one_of_two(runs):
    said = (runs / "said").read_text()
    assert (runs / "bad.codes").read_text().split() == ["2", "2"], said
    assert said.count("philens: error: ") == 1
    assert "Training failed, loss is nan at step 6; checkpoint-4 is intact" in said
    assert "Traceback" not in said
    assert [path.name for path in RunFolder(runs / "bad").checkpoints()] == ["checkpoint-2", "checkpoint-4"]


# What each process reads


@pytest.mark.parametrize(("passes", "processes"), [(1, 1), (2, 2), (6, 3), (4, 2), (8, 1)])
def test_each_row_is_read_once_in_its_step(passes, processes):
    steps, size = 3, 2
    rows = list(StepSampler(steps, passes, size, processes))
    assert len(rows) == len(StepSampler(steps, passes, size, processes)) == steps * passes * size
    # accelerate deals batches out in turn.
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    each = passes // processes
    for rank in range(processes):
        mine = batches[rank::processes]
        for step in range(steps):
            first = (step * passes + rank * each) * size
            read = [row for batch in mine[step * each : (step + 1) * each] for row in batch]
            assert read == list(range(first, first + each * size))


def test_one_process_reads_in_order():
    assert list(StepSampler(2, 3, 4, 1)) == list(range(24))


def test_groups_are_made_by_one_process_where_they_can_be(monkeypatch):
    recipe = tiny_recipe(train__accumulate=4, train__batch_size=2, data__group=4, train__steps=3)
    made, make = Counter(), PackedRows._make
    monkeypatch.setattr(PackedRows, "_make", lambda rows, group: made.update([group]) or make(rows, group))
    sampler = StepSampler(3, 4, 2, 2)
    order = list(sampler)
    batches = [order[start : start + 2] for start in range(0, len(order), 2)]
    for rank in range(2):
        rows = training_rows(recipe)
        for batch in batches[rank::2]:
            for row in batch:
                rows[row]
    assert made == dict.fromkeys(range(6), 1)


def test_passes_that_cannot_be_shared():
    recipe = tiny_recipe(train__batch_size=16, train__accumulate=1).train
    with pytest.raises(TrainingError) as caught:
        passes_each(recipe, 2)
    assert "--train.batch_size 8 --train.accumulate 2 reads as many rows" in str(caught.value)
    with pytest.raises(TrainingError, match=r"make train\.accumulate a multiple of 3"):
        passes_each(recipe, 3)
    assert passes_each(tiny_recipe(train__accumulate=6).train, 3) == 2


def test_only_fsdp2_shards(monkeypatch):
    assert not is_sharded()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(TrainingError, match="A model is sharded by FSDP2 only; give accelerate launch"):
        is_sharded()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert is_sharded()


def test_noise_is_set_by_the_pass(tmp_path):
    """Whatever else draws random numbers in between, a run's losses are the same."""
    recipe = tiny_recipe(phi_schedule__start_step=0, train__steps=3, train__save_every=0)
    train(recipe, tmp_path / "one")
    original = trainer_module.PHiTrainer.training_step

    def drawing(self, *args, **kwargs):
        torch.rand(5)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.PHiTrainer, "training_step", drawing)
        train(recipe, tmp_path / "two")
    assert [r["phi"] for r in RunFolder(tmp_path / "one").metrics() if "phi" in r] == [
        r["phi"] for r in RunFolder(tmp_path / "two").metrics() if "phi" in r
    ]


# Slow: more models, and the launchers as people use them.


@pytest.mark.slow
def test_every_kind_of_training(tmp_path, base):
    recipes = {name: tiny_recipe(**values) for name, values in VARIANTS.items() if name != "observing"}
    recipes["observing"] = tiny_recipe(**VARIANTS["observing"], model__base=str(base))
    scenarios = []
    for name, recipe in recipes.items():
        train(recipe, tmp_path / name)
        scenarios += [
            scenario(tmp_path, f"{name}-{kind}", recipe, shard=kind == "sharded")
            for kind in ("two", "sharded")
        ]
    done = launch(scenarios, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in recipes:
        assert_same_run(tmp_path / f"{name}-two", tmp_path / name)
        # Muon orthogonalises in bfloat16.
        assert_same_run(tmp_path / f"{name}-sharded", tmp_path / name, 1e-2 if name == "muon" else 2e-6)


FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
mixed_precision: "no"
num_machines: 1
num_processes: 2
"""


@pytest.mark.slow
def test_accelerate_launch_with_a_configuration(tmp_path, base):
    recipe = tiny_recipe(**FROZEN, model__base=str(base))
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    train(recipe, tmp_path / "one")
    own = ["-m", "philens", "train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "two")]
    command = [*ACCELERATE, "--main_process_port", free_port(), "--config_file", str(tmp_path / "fsdp2.yaml")]
    done = subprocess.run([*command, *own], capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_stopped(tmp_path, number):
    """Both processes stop after the same step, with a checkpoint; the launcher's own report comes after."""
    recipe, folder = (
        tiny_recipe(**PLAIN | {"train__steps": 100_000, "train__save_every": 0}),
        tmp_path / "run",
    )
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    own = ["-m", "philens", "train", str(tmp_path / "recipe.yaml"), "--output", str(folder)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*TORCHRUN, *own], stdout=log, stderr=log, env=ENVIRONMENT)
        try:
            limit = time.monotonic() + 120
            while len(RunFolder(folder).metrics()) < 3 and time.monotonic() < limit:
                time.sleep(0.2)
            process.send_signal(number)
            process.wait(120)
        finally:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert said.count("Stopping after this step, with a checkpoint") == 1, said
    assert "philens: error" not in said
    steps = [record["step"] for record in RunFolder(folder).metrics()]
    (checkpoint,) = RunFolder(folder).checkpoints()
    assert int(checkpoint.name[11:]) in (steps[-1], steps[-1] + 1)
    assert load_recipe(folder / "recipe.yaml") == recipe


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path):
    recipe, folder = tiny_recipe(**PLAIN | {"train__steps": 100_000}), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    own = ["-m", "philens", "train", str(tmp_path / "recipe.yaml"), "--output", str(folder)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*TORCHRUN, *own], stdout=log, stderr=log, env=ENVIRONMENT)
        try:
            limit = time.monotonic() + 120
            while not RunFolder(folder).checkpoints() and time.monotonic() < limit:
                time.sleep(0.2)
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
            os.kill(int(found.split()[-1]), signal.SIGKILL)
            process.wait(120)
        finally:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert said.count("philens: error: Another process of this training ended without a word") == 1, said
    checkpoint = RunFolder(folder).checkpoints()[-1]
    assert json.loads((checkpoint / "recipe.json").read_text())["train"]["steps"] == 100_000
