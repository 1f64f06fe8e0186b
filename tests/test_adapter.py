import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_gpt2, make_llama
from philens import SHIPPED, PHiConfig, attach, load, load_run
from philens.bases.fingerprint import fingerprint, fingerprints
from philens.bases.tokenizer import character_tokenizer
from philens.lens.adapter import FORMAT, describe_base, save_adapter
from philens.lens.layer import PHiLayer
from philens.support.errors import AdapterError, ConfigError, OutputError

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
    assert again.module_paths == lens.module_paths == ["model.layers.1"]
    assert again.source == str(folder)
    assert not again.training
    ids = torch.randint(97, 115, (3, 25))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        first, second = lens(ids, attention_mask=mask), again(ids, attention_mask=mask)
    assert torch.equal(first.phi, second.phi)
    assert torch.equal(first.logits, second.logits)


def test_files_of_an_adapter(saved):
    lens, folder = saved
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", WEIGHTS, "README.md"}
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["format"] == FORMAT
    assert description["phi"]["kl"] == "official"
    assert description["module_paths"] == ["model.layers.1"]
    assert description["hidden_size"] == 32
    base = description["base"]
    assert base.pop("fingerprints") == fingerprints(lens.base)
    assert base == {
        "class": "LlamaForCausalLM",
        "model_type": "llama",
        "name_or_path": None,
        "revision": None,
        "dtype": "float32",
        "quantization": None,
    }
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: philens\n")
    assert {"encoder.weight", "decoder.weight", "prior.start"} <= set(load_file(folder / WEIGHTS))


def test_saving_again_replaces_the_whole(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "adapter")
    other = attach(make_llama(), PHiConfig(layer=0, prior_heads=2))
    save_adapter(other, folder, card="mine")
    assert load(make_llama(), folder).module_paths == ["model.layers.0"]
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
    assert "no Hub id either" in error_of(tmp_path / "none")
    assert "is a file; give the folder it is in" in error_of(folder / "README.md")
    (folder / WEIGHTS).unlink()
    assert f"There is no file {folder / WEIGHTS}" in error_of(folder)
    (folder / "adapter_config.json").unlink()
    assert f"{folder} has no adapter_config.json, so no adapter" in error_of(folder)


@pytest.mark.parametrize("file", ["adapter_config.json", WEIGHTS])
def test_odd_things_in_a_files_place(folder, file):
    (folder / file).unlink()
    (folder / file).symlink_to(file)
    assert f"{folder / file} is not a regular file" in error_of(folder)
    (folder / file).unlink()
    (folder / file).mkdir()
    assert f"{folder / file} is not a regular file" in error_of(folder)
    (folder / file).rmdir()
    os.mkfifo(folder / file)  # reading it would wait for ever
    assert f"{folder / file} is not a regular file" in error_of(folder)


def test_a_huge_configuration_is_not_read(folder):
    with (folder / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "is larger than 268435456 bytes; it is damaged" in error_of(folder)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    assert "is not readable as JSON" in error_of(folder)


def test_a_run_folder(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "run" / "adapter")
    assert load(make_llama(), tmp_path / "run").config == CONFIG


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


def test_flipped_bytes(folder):
    """Wherever in the file they are: in its header or among the numbers."""
    path, chance = folder / WEIGHTS, random.Random(0)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    places = [*range(12), *chance.sample(range(8, 8 + header), 20), *chance.sample(range(len(whole)), 20)]
    for place in places:
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
        )
        error_of(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{path} is not as it was saved; fetch or save it again." in error_of(folder)


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
    for name in ("phi_layer.bin", "phi_layer.pt", "adapter_model.bin"):
        shutil.move(folder / WEIGHTS, folder / name)
        assert f"There is no file {folder / WEIGHTS}" in error_of(folder)
        shutil.move(folder / name, folder / WEIGHTS)


@pytest.mark.parametrize("other", [1, FORMAT + 1, "2", None])
def test_another_format(folder, other):
    change(folder, format=other)
    message = error_of(folder)
    assert f"has adapter format {other!r} and this is philens" in message
    assert f"which reads format {FORMAT}; install the version that wrote it." in message


def test_an_adapter_of_another_program(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "was not written by philens" in error_of(folder)


def test_another_base(saved, folder):
    other = make_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert "was trained in another base model (LlamaForCausalLM, weights" in error_of(folder, other)
    assert "another base model" in error_of(folder, make_llama(num_hidden_layers=2))
    lens = attach(make_llama(), CONFIG)
    with pytest.raises(ConfigError, match=r"already has a PHi layer; detach\(\) it first"):
        load(lens, folder)


def test_the_same_base_in_another_precision(saved):
    assert fingerprint(make_llama()) == fingerprint(make_llama().bfloat16())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert load(make_llama().to(dtype), saved[1]).phi.encoder.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_a_base_in_half_precision(tmp_path, dtype):
    save_adapter(attach(make_llama().to(dtype), CONFIG), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base"]["dtype"] in str(
        dtype
    )
    assert load(make_llama(), tmp_path / "adapter").config == CONFIG
    assert load(make_llama().to(dtype), tmp_path / "adapter").config == CONFIG
    assert "another base model" in error_of(
        tmp_path / "adapter", make_llama(rms_norm_eps=0.1, vocab_size=127)
    )


def test_fingerprints_see_every_weight_of_a_small_tensor_and_the_ends_of_a_large_one():
    module = torch.nn.Linear(3, 2)
    before = fingerprint(module)
    for index in range(6):
        with torch.no_grad():
            module.weight.view(-1)[index] += 1
        assert fingerprint(module) != before
        with torch.no_grad():
            module.weight.view(-1)[index] -= 1
    assert fingerprint(module) == before
    # float32 would round the last place up, out of the tensor.
    large = torch.nn.ParameterList([torch.zeros(2**25 + 3, dtype=torch.float16)])
    before = fingerprint(large)
    with torch.no_grad():
        large[0][-1] = 1
    assert fingerprint(large) != before


def test_a_base_that_is_not_in_memory():
    with torch.device("meta"):
        base = torch.nn.Linear(2, 2)
    with pytest.raises(AdapterError, match="is not in memory; load the base without offloading"):
        fingerprint(base)


def test_where_a_base_lies_is_not_remembered(tmp_path):
    base = make_llama()
    base.config._name_or_path = str(tmp_path / "llama")
    assert describe_base(base)["name_or_path"] == "llama"
    base.config._name_or_path, base.config._commit_hash = "someone/llama", "c0ffee"
    assert describe_base(base)["name_or_path"] == "someone/llama"
    assert describe_base(base)["revision"] == "c0ffee"
    assert describe_base(torch.nn.LSTM(2, 2))["dtype"] == "float32"


# Several layers, and modes


def test_several_layers(tmp_path):
    torch.manual_seed(5)
    config = PHiConfig(layers=[0, -1], mode="observe", pressure="reconstruction", prior_heads=2)
    lens = attach(make_llama(), config).eval()
    lens.save_pretrained(tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter" / WEIGHTS))
    assert {"0.encoder.weight", "1.encoder.weight", "1.prior.start"} <= names
    again = load(make_llama(), tmp_path / "adapter")
    assert again.module_paths == ["model.layers.0", "model.layers.2"]
    ids = torch.randint(97, 115, (2, 9))
    with torch.no_grad():
        phi = again(ids).phi
        assert phi.shape == (2, 9, 2)
        assert torch.equal(phi, lens(ids).phi)
    assert "`model.layers.0`, `model.layers.2`" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(ConfigError, match="Several layers would disturb each other in the path"):
        load(make_llama(), tmp_path / "adapter", mode="bottleneck")
    with pytest.raises(ConfigError, match="mode must be"):
        load(make_llama(), tmp_path / "adapter", mode="watch")


def test_another_mode(saved, tmp_path):
    lens, folder = saved
    ids = torch.randint(97, 115, (2, 9))
    base = make_llama()
    watching = load(base, folder, mode="observe")
    with torch.no_grad():
        out = watching(ids)
        assert torch.equal(out.logits, make_llama()(ids).logits)
        assert torch.equal(out.phi, lens(ids).phi)
    watching.detach()
    watching = attach(base, PHiConfig(layer=1, prior_heads=2, mode="observe", pressure="reconstruction"))
    watching.save_pretrained(tmp_path / "adapter")
    watching.detach()
    assert load(base, tmp_path / "adapter", mode="bottleneck").config.mode == "bottleneck"


# The model card


def test_the_card_of_a_training(saved, tmp_path):
    lens, _ = saved
    training = {
        "recipe": {"phi": {"layer": 1}, "data": {"parts": ["a", "b"]}},
        "data": "equal parts of a and b",
        "metrics": {"a": {"surprisal": 1.25, "phi": 100.123}, "b": {"surprisal": 2, "spread": 0.5}},
    }
    lens.base.config._name_or_path, lens.base.config._commit_hash = "some: one/llama", "c0ffee"
    save_adapter(lens, tmp_path / "adapter", training=training)
    lens.base.config._name_or_path, lens.base.config._commit_hash = "", None
    card = (tmp_path / "adapter" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "library_name": "philens",
        "pipeline_tag": "text-generation",
        "tags": ["philens", "phi", "interpretability"],
        "base_model": "some: one/llama",
        "base_model_relation": "adapter",
    }
    assert "# PHi layer after `model.layers.1` of some: one/llama\n" in card
    assert "|  | surprisal with the layer | phi | spread |" in card
    assert "| a | 1.25 | 100.1 |  |\n| b | 2 |  | 0.5 |" in card
    assert "equal parts of a and b" in card
    assert yaml.safe_load(re.search(r"```yaml\n(.+?)```", card, re.DOTALL)[1]) == training["recipe"]
    assert "- torch " in card
    assert "KL: official" in card
    # Kept when it is loaded and saved again.
    again = load(make_llama(), tmp_path / "adapter")
    save_adapter(again, tmp_path / "copy")
    assert "| a | 1.25 | 100.1 |  |" in (tmp_path / "copy" / "README.md").read_text()
    assert json.loads((tmp_path / "copy" / "adapter_config.json").read_text())["training"] == training


def test_the_card_of_a_layer_of_which_nothing_is_known(saved):
    card = (saved[1] / "README.md").read_text()
    assert "base_model:" not in card
    assert "# PHi layer after `model.layers.1` of a LlamaForCausalLM" in card
    assert "licence of the base: not known here" in card
    assert "None were recorded." in card


@pytest.mark.parametrize("licence", ["mit", None, ["mit"], "broken"])
def test_the_licence_of_a_local_base(tmp_path, licence):
    base = make_gpt2()
    base.save_pretrained(tmp_path / "base")
    header = (
        "---\n: {[\n---\n" if licence == "broken" else f"---\n{yaml.safe_dump({'license': licence})}---\n"
    )
    (tmp_path / "base" / "README.md").write_text(header)
    base.config._name_or_path = str(tmp_path / "base")
    attach(base, PHiConfig(layer=0, prior_heads=2)).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"licence of the base: {'mit' if licence == 'mit' else 'not known here'}" in card
    assert ("license: mit" in card) == (licence == "mit")


def test_the_snippet_of_a_card_works(saved, tmp_path, monkeypatch):
    shutil.copytree(saved[1], tmp_path / "path/to/this/folder")
    make_llama().save_pretrained(tmp_path / "path/to/the/base")
    character_tokenizer().save_pretrained(tmp_path / "path/to/the/base")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.+?)```", (saved[1] / "README.md").read_text(), re.DOTALL)[1], names)
    assert names["lens"].config == CONFIG
    assert len(names["scores"]) == 1
    assert len(names["scores"][0].phi) == len("One morning, Gregor Samsa woke.")


def test_the_shipped_adapter():
    lens, _ = load_run(SHIPPED)
    description = json.loads((SHIPPED / "adapter" / "adapter_config.json").read_text())
    assert description["format"] == FORMAT
    assert description["base"]["fingerprints"] == fingerprints(lens.base)


@pytest.mark.parametrize(
    "values",
    [
        {"phi": None},
        {"phi": {"layer": 1}},
        {"base": "llama"},
        {"training": "long"},
        {"module_paths": ["model.layers.0"]},
    ],
)
def test_a_damaged_configuration(folder, values):
    change(folder, **values)
    assert "adapter_config.json is not as it was saved; fetch or save it again." in error_of(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"module_paths": ["model.layers.0"]}, "belongs after model.layers.0, not model.layers.1"),
        ({"depth": 2}, "does not hold the options of a PHi layer"),
        *(
            ({"phi": {"layer": 1} | options}, "holds options that do not work")
            for options in ({"layer": 9}, {"prior_heads": "two"}, {"kl": "approximate"})
        ),
        ({"phi": {"layer": 1}}, "does not fit this model"),
        *(
            (values, "holds options that do not work")
            for values in (
                {"phi": None},
                {"phi": {"layer": 1, "latent_size": 10**9}},
                {"instruments": 3},
                {"base": "llama"},
                {"base": {"fingerprints": None}},
                {"module_paths": None},
            )
        ),
    ],
)
def test_an_adapter_without_a_hash_of_its_configuration(folder, values, message):
    """As philens 0.1 saved them."""
    path = folder / "adapter_config.json"
    description = json.loads(path.read_text())
    del description["config_sha256"]
    path.write_text(json.dumps(description | values))
    assert message in error_of(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_configuration_that_is_none(folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert "it is damaged or something else" in error_of(folder)


SHIPPED_BEFORE = sorted((Path(__file__).parent / "data" / "adapters").iterdir())


@pytest.mark.parametrize("shipped", SHIPPED_BEFORE, ids=lambda path: path.stem)
def test_every_adapter_that_was_ever_shipped_is_read(shipped, tmp_path):
    """Its description is; the base is then the wrong one. Add a copy when another is shipped."""
    shutil.copy(shipped, tmp_path / "adapter_config.json")
    description = json.loads(shipped.read_text())
    points = description["phi"].get("layers") or [0]
    layers = [PHiLayer(description["hidden_size"], PHiConfig(**description["phi"])) for _ in points]
    own = layers[0] if len(layers) == 1 else nn.ModuleList(layers)
    save_file(own.state_dict(), tmp_path / "phi_layer.safetensors")
    with pytest.raises(AdapterError, match="was trained in another base model"):
        load(make_llama(), tmp_path)


def replaced(module):
    module.weight = nn.Parameter(module.weight.detach() + 1)


def in_place(module):
    with torch.no_grad():
        module.weight.add_(1)


def stepped(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.AdamW(module.parameters(), lr=1.0).step()


def other_memory(module):
    module.weight.data = module.weight.data + 1


def loaded(module):
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})


@pytest.mark.parametrize("change", [replaced, in_place, stepped, other_memory, loaded])
def test_a_fingerprint_is_made_once_and_anew_when_weights_change(change, monkeypatch):
    import philens.bases.fingerprint as module

    made, own = [], module._digest
    monkeypatch.setattr(module, "_digest", lambda *args: made.append(1) or own(*args))
    model = nn.Linear(5, 7)
    first = fingerprint(model)
    assert fingerprint(model) == first
    assert len(made) == 1
    for count in (2, 3):  # what a freed tensor leaves behind is not taken for it
        change(model)
        assert fingerprint(model) != first
        assert len(made) == count
        first = fingerprint(model)
    assert first == fingerprints(model)["weights"][0]
    with torch.inference_mode():  # where torch counts nothing
        model = nn.Linear(5, 7)
        first = fingerprint(model)
        model.weight.add_(1)
        assert fingerprint(model) != first
