import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_llama
from philens import PHiConfig, attach, load
from philens.adapter import FORMAT, fingerprint, save_adapter
from philens.errors import AdapterError, OutputError

CONFIG = PHiConfig(layer=1, prior_heads=2, latent_size=40, init="random", kl="official")
WEIGHTS = "phi_layer.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    torch.manual_seed(5)
    lens = attach(make_llama(), CONFIG).eval()
    save_adapter(lens, folder)
    return lens, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the adapter, to be damaged."""
    return shutil.copytree(saved[1], tmp_path / "adapter")


def error_of(folder, base=None):
    base = base or make_llama()
    logits = base(torch.arange(97, 107)[None]).logits
    with pytest.raises(AdapterError) as caught:
        load(base, folder)
    # The base is left as it was.
    assert torch.equal(base(torch.arange(97, 107)[None]).logits, logits)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_round_trip_is_exact(saved):
    lens, folder = saved
    again = load(make_llama(), folder)
    assert again.config == lens.config
    assert again.module_path == lens.module_path == "model.layers.1"
    assert not again.training
    ids = torch.randint(97, 115, (3, 25))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        first, second = lens(ids, attention_mask=mask), again(ids, attention_mask=mask)
    assert torch.equal(first.phi, second.phi)
    assert torch.equal(first.logits, second.logits)


def test_files_of_an_adapter(saved):
    _, folder = saved
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", WEIGHTS, "README.md"}
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["format"] == FORMAT
    assert description["phi"]["kl"] == "official"
    assert description["base"]["model_type"] == "llama"
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: philens\n")
    assert {"encoder.weight", "decoder.weight", "prior.start"} <= set(load_file(folder / WEIGHTS))


def test_saving_again_replaces_the_whole(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "adapter")
    other = attach(make_llama(), PHiConfig(layer=0, prior_heads=2))
    save_adapter(other, folder, card="mine")
    assert load(make_llama(), folder).module_path == "model.layers.0"
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_nothing_of_the_users_is_ever_deleted(saved, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"it holds other files \(thesis.txt\); choose another folder"):
        save_adapter(saved[0], tmp_path)
    with pytest.raises(OutputError, match=r"it is a file|Not a directory"):
        save_adapter(saved[0], tmp_path / "thesis.txt")
    with pytest.raises(OutputError, match=r"Cannot write"):
        save_adapter(saved[0], tmp_path / "thesis.txt" / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_changes_nothing(saved, tmp_path, monkeypatch, existing):
    folder = tmp_path / "adapter"
    if existing:
        shutil.copytree(saved[1], folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)  # after the weights
    with pytest.raises(OutputError, match=r"No space left on device; free some space"):
        save_adapter(attach(make_llama(), PHiConfig(layer=0, prior_heads=2)), folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if existing else [])


def test_missing_files(folder, tmp_path):
    assert "There is no file" in error_of(tmp_path / "none")
    (folder / WEIGHTS).unlink()
    assert f"There is no file {folder / WEIGHTS}" in error_of(folder)
    assert "is not readable as JSON" in error_of(folder / "README.md")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("encoder.weight"), "misses encoder.weight; load what was saved for it."),
        (lambda w: w.update(extra=torch.ones(2)), "has an unknown extra; load what was saved for it."),
        (
            lambda w: w.update({"prior.norm.weight": torch.ones(3)}),
            "has prior.norm.weight of shape (3,), not (40,); load what was saved for it.",
        ),
        (
            lambda w: w.update({"encoder.weights": w.pop("encoder.weight")}),
            "has an unknown encoder.weights and 1 more; load what was saved for it.",
        ),
    ],
)
def test_weights_that_do_not_fit(folder, damage, message):
    weights = load_file(folder / WEIGHTS)
    damage(weights)
    save_file(weights, folder / WEIGHTS)
    assert error_of(folder).endswith(f"does not fit this model: it {message}")


def test_a_truncated_file(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        assert "is not a whole safetensors file" in error_of(folder)


def test_a_foreign_safetensors_file(folder):
    save_file({"lm_head.weight": torch.ones(3, 3)}, folder / WEIGHTS)
    assert "does not fit this model" in error_of(folder)


def test_nothing_is_unpickled(folder):
    class Harm:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    (folder / WEIGHTS).write_bytes(pickle.dumps(Harm()))
    assert "is not a whole safetensors file" in error_of(folder)
    torch.save({"encoder.weight": torch.ones(2)}, folder / WEIGHTS)
    assert "is not a whole safetensors file" in error_of(folder)


def test_a_newer_format(folder):
    change(folder, format=FORMAT + 1)
    message = error_of(folder)
    assert f"has adapter format {FORMAT + 1}" in message
    assert "install the version that wrote it" in message


def test_an_adapter_of_another_program(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "was not written by philens" in error_of(folder)


def test_another_base(saved, folder):
    other = make_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert "was trained in another base model (LlamaForCausalLM, weights" in error_of(folder, other)
    assert "another base model" in error_of(folder, make_llama(num_hidden_layers=2))


def test_the_same_base_in_another_precision(saved):
    assert fingerprint(make_llama()) == fingerprint(make_llama().bfloat16())
    assert load(make_llama().bfloat16(), saved[1]).phi.encoder.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phi": None}, "does not hold the options of a PHi layer"),
        ({"phi": {"layer": 1}}, "does not hold the options of a PHi layer"),
        ({"base": "llama"}, "does not hold the options of a PHi layer"),
        ({"module_path": "model.layers.0"}, "belongs after model.layers.0, not model.layers.1"),
    ],
)
def test_a_damaged_configuration(folder, values, message):
    change(folder, **values)
    assert message in error_of(folder)


@pytest.mark.parametrize("options", [{"layer": 9}, {"prior_heads": "two"}, {"kl": "approximate"}])
def test_options_that_do_not_work(saved, folder, options):
    phi = json.loads((folder / "adapter_config.json").read_text())["phi"]
    change(folder, phi=phi | options)
    assert "holds options that do not work" in error_of(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_configuration_that_is_none(folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert "it is damaged or something else" in error_of(folder)
