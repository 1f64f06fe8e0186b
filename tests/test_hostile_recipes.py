"""Recipes that a slip, a program or an enemy wrote: one sentence. `python -m faults recipes` tries more."""

import pytest
import torch
from transformers import LlamaForCausalLM

from philens.support.errors import PhilensError, RecipeError
from philens.training.build import build_base, start_model
from philens.training.recipe import load_recipe
from tiny import tiny_recipe, tiny_values

GROWS = "\n".join(
    [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" if k else "a0: &a0 [1]" for k in range(12)]
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GROWS.encode(), "an alias is not allowed: write out what it stands for"),
        (b"model: &a {hidden_size: *a}", "an alias is not allowed"),
        (b"seed: 1\nseed: 2\n", "'seed' is given twice"),
        (b"model: {layers: 2, heads: 2, layers: 4}", "'layers' is given twice"),
        (b"[" * 20_000, "cannot be read as YAML"),
        (b"{a: " * 20_000, "cannot be read as YAML"),
        (b"seed: !!python/object/apply:os.mkdir [executed]", "cannot be read as YAML"),
        (b"? !!python/object/apply:os.mkdir [executed]\n: 1", "cannot be read as YAML"),
        (b"seed: !!timestamp abc", "cannot be read as YAML"),
        (b"seed: 2001-99-99", "cannot be read as YAML"),
        (b"seed: !!int abc", "cannot be read as YAML"),
        (b"seed: " + b"9" * 5000, "cannot be read as YAML"),
        (b"name: \xff", "is not readable as text"),
        (b"\x00" * 100, "cannot be read as YAML"),
        (b"name: " + b"a" * (1 << 18), "is larger than 262144 bytes"),
        (b"a: 1\n---\nb: 2\n", "cannot be read as YAML"),
        (b"optimizer: {learning_rate: " + b"9" * 400 + b"}", r"optimizer.learning_rate must be a number"),
        (b"name: [" + b"1, " * 30_000 + b"1]", r"name must be text, not \[1, 1.*\.\.\.\.$"),
        (b"model: {layers: 1000000}", "model.layers must be at most 1000, not 1000000"),
        (b"phi: {prior_depth: 1000000}", "phi.prior_depth must be at most 1000"),
        (b"data: {workers: 100000}", "data.workers must be at most 256"),
        (b"seed: 1000000000000", "seed must be at least 0 and below 4294967296, not 1000000000000"),
        (b"seed: -1", "seed must be at least 0"),
        (b"data: {seed: -1}", "data.seed must be at least 0"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(path)
    assert len(str(raised.value)) < 1000
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_many_keys_are_read_in_time(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"a{k}: 1\n" for k in range(20_000)))
    with pytest.raises(RecipeError, match="has an unknown key 'a0'"):
        load_recipe(path)


def test_values_of_a_command_line_are_read_alike():
    for text in (GROWS, "&a [*a]", "[" * 20_000, "2001-99-99"):
        with pytest.raises(RecipeError, match="cannot be read; quote it as YAML") as raised:
            load_recipe(None, {"seed": text})
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model__hidden_size": 10**6, "model__heads": 1}, "model.layers, model.hidden_size"),
        ({"model__intermediate_size": 10**12}, "model.layers, model.hidden_size"),
        ({"model__hidden_size": 2**62, "model__heads": 1}, "model.layers, model.hidden_size"),
        (
            {"model__architecture": "lstm", "model__intermediate_size": 10**9},
            "model.layers, model.hidden_size",
        ),
        ({"phi__latent_size": 10**10}, "phi.latent_size"),
        ({"phi__prior_mlp_size": 10**12}, "phi.latent_size"),
        ({"data__length": 10**11}, "data.length and data.group"),
        ({"data__group": 10**11}, "data.length and data.group"),
        ({"train__batch_size": 10**11}, "data.length and train.batch_size"),
        ({"train__evaluation_documents": 10**12}, "train.evaluation_documents"),
        ({"data__tasks.states": [8, 10**7]}, "data.tasks.states"),
        ({"data__tasks.memorized_strings": 10**12}, "data.tasks.memorized_automata"),
    ],
)
def test_sizes_that_no_machine_has(changes, names):
    recipe = tiny_recipe(**changes)
    with pytest.raises(RecipeError, match=rf"^{names}.* would need .* GB of memory or more, and this"):
        start_model(recipe)


def test_more_rows_than_can_be_counted():
    with pytest.raises(RecipeError, match=r"train\.steps asks for more tokens than can be counted"):
        start_model(tiny_recipe(train__steps=10**18))


def test_comparing_sizes_draws_no_numbers():
    """Weights are the ones that they were before sizes were compared."""
    recipe = tiny_recipe()
    found = build_base(recipe)
    torch.manual_seed(recipe.seed)
    expected = LlamaForCausalLM(found.config).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_every_kind_of_value_in_every_key():
    """Accepted, or one sentence."""
    values = [
        None,
        True,
        -1,
        0,
        0.5,
        10**30,
        10**400,
        float("nan"),
        float("inf"),
        "x",
        "",
        [],
        {},
        [1, 2],
        {"a": 1},
    ]
    for key in tiny_values():
        for value in values:
            try:
                load_recipe(None, tiny_values() | {key: value})
            except PhilensError as error:
                text = str(error)
                assert text.endswith("."), text
                assert "\n" not in text
                assert len(text) < 700
