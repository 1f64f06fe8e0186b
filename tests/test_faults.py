"""Faults that were not survived once; `python -m faults` injects many more, at random."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from philens.support.errors import InputError, OutputError, PhilensError, RecipeError, TrainingError
from philens.support.files import SUMS_FILE, locked
from philens.training.distributed import one_voice
from philens.training.folder import RunFolder
from philens.training.trainer import train
from tiny import tiny_recipe

SHORT: dict[str, Any] = {"train__steps": 4, "phi_schedule__start_step": 1}
FROZEN = SHORT | {"phi_schedule__start_step": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(tiny_recipe(**SHORT), folder)
    return folder


def unfinished(run: Path, folder: Path) -> Path:
    """A copy of a run that was killed after its first checkpoint, at step 2."""
    shutil.copytree(run, folder)
    for name in ("model", "adapter", "checkpoint-4"):
        shutil.rmtree(folder / name)
    (folder / "training.png").unlink()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Training.


def test_what_a_killed_run_left_half_written_is_removed(run, tmp_path):
    folder = unfinished(run, tmp_path / "run")
    for name in (".checkpoint-4.ab12cd", ".model.x1", ".adapter.x1.old"):
        (folder / name / "part").mkdir(parents=True)
    for name in (".recipe.yaml.77.tmp", ".metrics.jsonl.77.tmp", ".training.png.77.tmp"):
        (folder / name).write_text("")
    (folder / ".mine").write_text("not philens'")
    train(tiny_recipe(**SHORT), folder, resume=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in run.iterdir()} | {".mine"}
    # All that was there in the end but the picture: it is drawn.
    (folder / "training.png").unlink()
    (folder / ".training.png.78.tmp").write_text("")
    train(tiny_recipe(**SHORT), folder, resume=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in run.iterdir()} | {".mine"}


def test_a_resumed_run_writes_the_same_files(run, tmp_path):
    folder = unfinished(run, tmp_path / "run")
    train(tiny_recipe(**SHORT), folder, resume=True)
    for name in ("model", "adapter"):
        assert files(folder / name) == files(run / name)


def test_a_run_killed_as_it_began_begins_anew(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").write_text("")
    (folder / ".recipe.yaml.77.tmp").write_text("name: ")
    train(tiny_recipe(**SHORT), folder)
    assert files(folder / "adapter") == files(run / "adapter")


def test_what_was_measured_before_the_first_step_is_recorded_once(run, tmp_path):
    recipe, folder = tiny_recipe(**FROZEN, model__base=str(run / "model")), tmp_path / "run"
    train(recipe, folder)
    expected = [set(record) - {"tokens_per_second"} for record in RunFolder(folder).metrics()]
    for path in [*RunFolder(folder).checkpoints(), folder / "adapter"]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    train(recipe, folder, resume=True)
    records = RunFolder(folder).metrics()
    assert [record["step"] for record in records].count(0) == 1
    assert [set(record) - {"tokens_per_second"} for record in records] == expected


def test_two_trainings_into_one_folder(run, tmp_path):
    folder = unfinished(run, tmp_path / "run")
    before = files(folder)
    with (
        RunFolder(folder).lock(),
        pytest.raises(OutputError, match=r"Another process is writing into .*; wait for it"),
    ):
        train(tiny_recipe(**SHORT), folder, resume=True)
    assert files(folder) == before | {".lock": b""}


# Something happens to the data worker of each of two trainings once there is a checkpoint. Arguments: this
# folder and that of the runs.
STRUCK_WORKER = f"""
import multiprocessing, os, pathlib, resource, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from philens.support.errors import TrainingError
from philens.training.trainer import train
from tiny import tiny_recipe

def strike(folder, strike_worker):
    while not list(folder.glob("checkpoint-*")):
        time.sleep(0.01)
    for child in multiprocessing.active_children():
        strike_worker(child.pid)

happens = {{
    "killed": lambda worker: os.kill(worker, signal.SIGKILL),
    "no room": lambda worker: resource.prlimit(worker, resource.RLIMIT_FSIZE, (64, 64)),  # to hand over rows
}}
for name, strike_worker in happens.items():
    folder = pathlib.Path(sys.argv[2], name)
    threading.Thread(target=strike, args=(folder, strike_worker), daemon=True).start()
    try:
        train(tiny_recipe(**{SHORT | {"train__steps": 2000, "data__workers": 1}}), folder)
    except TrainingError as error:
        print(error)
"""


def test_a_data_worker_ends(tmp_path):
    """The trainer says so, and the run can go on from its last checkpoint."""
    command = [sys.executable, "-c", STRUCK_WORKER, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stderr
    assert all(line.startswith("A data worker ended without a word") for line in said)
    assert RunFolder(tmp_path / "killed").checkpoints()
    assert RunFolder(tmp_path / "no room").checkpoints()


def test_data_workers_end_with_the_training(tmp_path):
    """They heed no SIGTERM, by which Python would end them, and wait for them, when it exits."""
    train(tiny_recipe(**SHORT | {"data__workers": 2}), tmp_path / "run")
    assert multiprocessing.active_children() == []


def test_errors_of_data_workers_are_one_sentence():
    """torch hands them on with the worker's traceback as their message."""
    text = "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    with pytest.raises(InputError, match=r"^a\.txt: not UTF-8; convert it\.$"), one_voice():
        raise InputError(
            f'{text}  File "x.py", line 1\nphilens.errors.InputError: a.txt: not UTF-8; convert it.\n'
        )
    with (
        pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: 'a\.txt'$"),
        one_voice(),
    ):
        raise FileNotFoundError(f"{text}FileNotFoundError: [Errno 2] No such file or directory: 'a.txt'\n")
    with pytest.raises(RuntimeError, match="Original Traceback"), one_voice():  # ours to mend
        raise RuntimeError(f"{text}RuntimeError: shapes\n")


def test_a_data_workers_end_that_is_noticed_late():
    """torch tells of it by a signal, also while another error is being looked at."""

    class Looked(OSError):
        def __str__(self):
            raise RuntimeError("DataLoader worker (pid 3) exited unexpectedly with exit code 1.")

    with pytest.raises(TrainingError, match=r"^A data worker ended without a word .*--resume"), one_voice():
        raise Looked


@pytest.mark.parametrize("name", ["versions.json", "metrics.jsonl", "training.png"])
def test_a_pipe_in_a_files_place_is_not_waited_for(run, tmp_path, name):
    folder = unfinished(run, tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(PhilensError, match=f"{name}.* not a file"):
        train(tiny_recipe(**SHORT), folder, resume=True)


def test_a_pipe_in_a_finished_run_is_not_waited_for(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "training.png").unlink()
    os.mkfifo(folder / "training.png")
    with pytest.raises(OutputError, match=r"training\.png: it is not a file"):
        train(tiny_recipe(**SHORT), folder, resume=True)


@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/phi_layer.safetensors", "optimizer.pt"])
def test_nan_in_a_checkpoint(run, tmp_path, name):
    folder = unfinished(run, tmp_path / "run")
    checkpoint = folder / "checkpoint-2"
    for sums in checkpoint.rglob(SUMS_FILE):  # they would tell
        sums.unlink()
    if name == "optimizer.pt":
        state = torch.load(checkpoint / name, weights_only=True)
        next(iter(state["state"].values()))["exp_avg"].view(-1)[0] = torch.nan
        torch.save(state, checkpoint / name)
    else:
        spoil(checkpoint / name)
    with pytest.raises(TrainingError, match=r"checkpoint-2.* not finite.*; remove"):
        train(tiny_recipe(**SHORT), folder, resume=True)


def spoil(file: Path) -> None:
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, file, {"format": "pt"})


def test_nan_in_the_base(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "base")
    (tmp_path / "base" / SUMS_FILE).unlink()
    spoil(tmp_path / "base" / "model.safetensors")
    recipe = tiny_recipe(**FROZEN, model__base=str(tmp_path / "base"))
    with pytest.raises(
        TrainingError, match=r"base holds a weight that is not finite \(.*\); give another model"
    ):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_frozen_base_without_a_layer_in_the_path_has_nothing_to_learn():
    with pytest.raises(
        RecipeError, match=r"Until phi_schedule\.start_step nothing would be trained .*; set it to 0"
    ):
        tiny_recipe(**SHORT, model__base="base")


# The command line.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_standard_output_on_a_full_disk_or_closed():
    command = [sys.executable, "-m", "philens", "env"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("philens: error: No space left on device; ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_in_which_nothing_was_begun_goes_again(tmp_path):
    with locked(tmp_path / "new", "record.json"):
        with pytest.raises(OutputError, match="Another process"), locked(tmp_path / "new", "record.json"):
            pass
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new", "record.json"):
        (tmp_path / "new" / "record.json").touch()
    assert (tmp_path / "new" / "record.json").exists()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine", "record.json"):
        pass
    assert (tmp_path / "mine").is_dir()
