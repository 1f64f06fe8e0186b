"""Damaged and hostile files: one sentence, nothing executed, little memory. `python -m faults` tries more."""

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

import philens
from conftest import make_llama
from philens.bases.hub import load_pretrained
from philens.lens.adapter import _hash_of
from philens.support.errors import AdapterError, TrainingError
from philens.support.files import SUMS_FILE, check_sums, write_sums
from philens.training.folder import RunFolder
from philens.training.opening import load_run
from philens.training.trainer import train
from tiny import tiny_recipe

CONFIG = "adapter_config.json"


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def change(path, values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def growth():
    """How much more memory, in MB, the process has had at once since."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


class Harm:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


# Checksums of a folder.


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a b.txt", "below/c"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    check_sums(tmp_path)
    assert [line for line in (tmp_path / SUMS_FILE).read_text().splitlines() if line[0] == "#"] == ["# 7"] * 2
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    flip(tmp_path / "below/c", 0, 3)
    with pytest.raises(AdapterError, match=r"below/c is not as it was written"):
        check_sums(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "abc", "# 1\n" + "0" * 64 + "  ../b\n", "# 1\n" + "0" * 64 + "  /b\n", "\0"]
)
def test_checksums_that_are_none(tmp_path, text):
    (tmp_path / SUMS_FILE).write_text(text)
    with pytest.raises(AdapterError, match="does not hold checksums"):
        check_sums(tmp_path)


# Adapters.


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    lens = philens.attach(make_llama(), philens.PHiConfig(layer=1, prior="mlp"))
    lens.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_no_bit_of_a_configuration_changes_numbers_silently(adapter, copy):
    base = make_llama()
    tokens = torch.arange(20)[None]

    def phi():
        lens = philens.load(base, copy)
        try:
            return lens(tokens).phi
        finally:
            lens.detach()

    whole, expected, chance = (adapter / CONFIG).read_bytes(), phi(), random.Random(0)
    # Every digit of the options, which another bit makes another digit of, and places anywhere.
    options = whole.index(b'"phi"'), whole.index(b'"module_paths"')
    digits = [place for place in range(*options) if chr(whole[place]).isdigit()]
    for place in [*digits, *chance.sample(range(len(whole)), 40)]:
        for bit in (0, 3) if place in digits else (chance.randrange(8),):
            flip(copy / CONFIG, place, bit)
            try:
                found = phi()
            except AdapterError:
                pass
            else:
                assert torch.equal(found, expected)
            (copy / CONFIG).write_bytes(whole)


def test_a_changed_option_is_refused(copy):
    description = json.loads((copy / CONFIG).read_text())
    description["phi"]["logvar_max"] = 18.0
    change(copy / CONFIG, description)
    with pytest.raises(AdapterError, match=f"{CONFIG} is not as it was saved"):
        philens.load(make_llama(), copy)
    change(copy / CONFIG, {"config_sha256": _hash_of(description)})
    assert philens.load(make_llama(), copy).config.logvar_max == 18


def test_an_adapter_of_an_older_philens_still_loads(copy):
    description = json.loads((copy / CONFIG).read_text())
    del description["config_sha256"]
    (copy / CONFIG).write_text(json.dumps(description))
    lens = philens.load(make_llama(), copy)
    assert asdict(lens.config) == description["phi"]


# Base models.


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "model"
    shutil.copytree(philens.SHIPPED / "model", folder, ignore=shutil.ignore_patterns(SUMS_FILE))
    return folder


@pytest.fixture
def model(shipped, tmp_path):
    return shutil.copytree(shipped, tmp_path / "model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 10**8}, r"asks for .* weights and the files beside it have"),
        ({"hidden_size": 10**7}, r"asks for .* weights and the files beside it have"),
        ({"intermediate_size": 10**15}, r"asks for .* weights and the files beside it have"),
        (
            {"num_hidden_layers": 10**9},
            "asks for 1,000,000,000 blocks and the files beside it hold 38 tensors",
        ),
        ({"text_config": {"n_layer": 10**9}}, "asks for 1,000,000,000 blocks"),
    ],
)
def test_a_configuration_that_asks_for_more_than_the_files_hold(model, values, message, growth):
    change(model / "config.json", values)
    with pytest.raises(AdapterError, match=message):
        load_pretrained(model)
    assert growth() < 200


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"]
)
def test_files_that_transformers_would_read_to_the_end(model, name, growth):
    path = model / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(AdapterError, match="is not a regular file"):
        load_pretrained(model)
    path.unlink()
    with path.open("w"):
        os.truncate(path, 10 << 30)
    with pytest.raises(AdapterError, match="is larger than 128 MB"):
        load_pretrained(model)
    assert growth() < 200


# Runs and checkpoints.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe(train__steps=3), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def stopped(run):
    """The same run before it was finished."""
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-3")
    return run


def resume(folder):
    return train(tiny_recipe(train__steps=3), folder, resume=True)


def unseal(folder):
    for path in folder.rglob(SUMS_FILE):
        path.unlink()


def test_a_bit_of_a_model_is_seen(run):
    path = run / "model" / "model.safetensors"
    flip(path, path.stat().st_size - 10, 2)
    with pytest.raises(AdapterError, match=r"model.safetensors is not as it was written"):
        load_run(run)


def test_a_bit_of_a_checkpoint_is_seen(stopped):
    checkpoint = stopped / "checkpoint-2"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "logs.json"} <= {
        path.name for path in files
    }
    for path in files:
        whole = path.read_bytes()
        flip(path, len(whole) // 2, 1)
        with pytest.raises(
            AdapterError, match=r"is not as it was written|does not hold checksums|There is no file"
        ):
            resume(stopped)
        path.write_bytes(whole)
    assert resume(stopped) is not None


def test_nothing_in_a_checkpoint_is_executed(stopped, tmp_path):
    mark = tmp_path / "executed"
    checkpoint = stopped / "checkpoint-2"
    unseal(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt"):
        whole = (checkpoint / name).read_bytes()
        torch.save({"state": Harm(mark)}, checkpoint / name)
        with pytest.raises(TrainingError, match=f"{name} does not hold what a checkpoint of this run does"):
            resume(stopped)
        (checkpoint / name).write_bytes(pickle.dumps(Harm(mark)))
        with pytest.raises(TrainingError, match=f"{name} does not hold"):
            resume(stopped)
        (checkpoint / name).write_bytes(whole)
    for name in ("rng_state.pth", "scaler.pt", "training_args.bin", "pytorch_model.bin"):
        torch.save(Harm(mark), checkpoint / name)
    assert resume(stopped) is not None
    assert not mark.exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: [],
        lambda state: {},
        lambda state: state | {"param_groups": state["param_groups"][:1]},
    ],
)
def test_another_state_of_the_optimiser(stopped, edit):
    checkpoint = stopped / "checkpoint-2"
    unseal(checkpoint)
    path = checkpoint / "optimizer.pt"
    torch.save(edit(torch.load(path, weights_only=True)), path)
    with pytest.raises(
        TrainingError, match=r"optimizer.pt does not hold .* or start again with another --output\.$"
    ):
        resume(stopped)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_huge_file_in_a_checkpoint_is_not_read(stopped, growth, name):
    checkpoint = stopped / "checkpoint-2"
    unseal(checkpoint)
    os.truncate(checkpoint / "model" / name, 10 << 30)
    with pytest.raises(AdapterError, match=f"{name} is larger than 128 MB"):
        resume(stopped)
    assert growth() < 200


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("trainer_state.json", {"global_step": 1}),
        ("trainer_state.json", {"unknown": 1}),
        ("logs.json", {"loss": "x"}),
        ("logs.json", {"passes_each": 0}),
        ("logs.json", {"sums": []}),
    ],
)
def test_another_record_in_a_checkpoint(stopped, name, values):
    checkpoint = stopped / "checkpoint-2"
    unseal(checkpoint)
    change(checkpoint / name, values)
    with pytest.raises(TrainingError, match=f"{name} does not hold what a checkpoint of this run does"):
        resume(stopped)


def test_weights_of_another_shape_in_a_checkpoint(stopped):
    checkpoint = stopped / "checkpoint-2"
    unseal(checkpoint)
    path = checkpoint / "adapter" / "phi_layer.safetensors"
    weights = load_file(path)
    weights["decoder.weight"] = weights["decoder.weight"][:-1]
    save_file(weights, path)
    with pytest.raises(AdapterError, match=r"does not fit this model: it has decoder\.weight of shape"):
        resume(stopped)


def test_a_damaged_record_of_metrics(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')  # half-written
    assert len(RunFolder(run).metrics()) == len(lines)
    for damaged in ('{"step": 1', "[]", "{}", '{"step": "x"}', "[" * 100_000):
        path.write_text("\n".join([lines[0], damaged, *lines[1:]]) + "\n")
        with pytest.raises(AdapterError, match=r"Line 2 of .* is not a record"):
            RunFolder(run).metrics()
