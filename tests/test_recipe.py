import dataclasses
from pathlib import Path

import pytest
import torch

from philens.support.errors import ConfigError, RecipeError
from philens.support.typed import convert, describe, nearest
from philens.training.build import build_base, start_model
from philens.training.recipe import RECIPES, Recipe, flatten, load_recipe, recipe_keys, recipe_yaml
from philens.training.trainer import training_rows
from tiny import tiny_recipe

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
ARITHMETIC = ("arithmetic_phi", "arithmetic_phi_smoke")
# What must be given to a recipe.
GIVEN = {
    name: {"model.base": "owner/name"} for name in ("any_model", "small_layer", "small_mtd", *ARITHMETIC)
}
PRETRAINED = [*GIVEN, "llama_3_2_3b", "smollm2"]


def error_of(path: Path | str | None = None, **overrides) -> str:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, keys)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.step", "train.steps"),
        ("trian.steps", "train.steps"),
        ("learning_rate", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("model.layer", "model.layers"),
        ("data.tasks.stings", "data.tasks.strings"),
        ("phi.phiweight", "phi.phi_weight"),
        ("phi_scheduel.warmup_steps", "phi_schedule.warmup_steps"),
        ("sed", "seed"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, key, near):
    message = error_of(None, **{key: "1"})
    assert message == f"The command line has an unknown key {key!r}; the nearest valid one is {near!r}."
    *sections, last = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate([*sections, last])]
    path = written(tmp_path, "\n".join(lines) + " 1\n")
    assert error_of(path) == f"{path} has an unknown key {key!r}; the nearest valid one is {near!r}."


def test_unknown_key_inside_a_section_on_the_command_line():
    message = error_of(model="{lyers: 2}")
    assert "unknown key 'model.lyers'; the nearest valid one is 'model.layers'" in message


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.steps", "abc", "train.steps must be a whole number, not 'abc'."),
        ("train.steps", "1.5", "train.steps must be a whole number, not 1.5."),
        ("train.steps", "true", "train.steps must be a whole number, not True."),
        ("train.compile", "1", "train.compile must be true or false, not 1."),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate must be a number, not 'fast'."),
        ("model.architecture", "rnn", "model.architecture must be one of transformer, lstm, pretrained,"),
        ("phi.latent_size", "wide", "phi.latent_size must be a whole number or null, not 'wide'."),
        ("data.tasks.states", "[3]", "data.tasks.states must be a list of 2, each a whole number, not [3]."),
        ("data.mixture", "7", "data.mixture must be keys with a value each, a number, not 7."),
        ("name", "7", "name must be text, not 7."),
        ("train.report_to", "7", "train.report_to must be a list, each item text, not 7."),
        ("model", "7", "model must be a section of keys, not 7."),
        ("phi.phi_weight", "-1", "phi: phi_weight must be a finite number of at least 0, not -1.0."),
        ("phi.samples", "3", 'phi: samples above 1 need inference="sample".'),
        ("data.tasks.states", "[5, 3]", "data.tasks: states must be two numbers"),
        ("train.steps", "0", "train.steps must be above 0, not 0."),
        ("optimizer.learning_rate", ".inf", "optimizer.learning_rate must be above 0, not inf."),
        ("data.mixture.copi", "1", "data.mixture has an unknown task: There is no task 'copi'"),
        ("data.mixture.copy", "-1", "data.mixture.copy must be at least 0, not -1.0."),
        ("data.mixture", "{copy: 0}", "data.mixture needs at least one task with a weight above 0."),
        ("model.heads", "3", "model.hidden_size 128 must be a multiple of twice model.heads 3."),
        ("optimizer.beta1", "1", "optimizer.beta1 must be at least 0 and below 1, not 1.0."),
        ("data.group", "{a: [}", "The value '{a: [}' of data.group cannot be read"),
    ],
)
def test_wrong_value_is_named_in_plain_words(key, text, message):
    assert error_of(**{key: text}).startswith(message)


def test_wrong_value_in_a_file(tmp_path):
    assert error_of(written(tmp_path, "train: {steps: many}")) == (
        "train.steps must be a whole number, not 'many'."
    )
    assert error_of(written(tmp_path, "model: 3"), model__layers="2").startswith("model must be a section")
    assert error_of(written(tmp_path, "[1, 2]")).endswith('such as "seed: 1", not [1, 2].')
    assert "cannot be read as YAML" in error_of(written(tmp_path, "a: [1"))
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not readable as text" in error_of(path)
    assert error_of(tmp_path / "none.yaml").startswith("There is no recipe")
    assert error_of(tmp_path).startswith("There is no recipe")


def test_documents_must_fit_the_rows():
    message = error_of(data__length=16, data__group=4)
    assert message.startswith("A document may have 949 tokens and does not fit into data.group 4 rows of")
    assert load_recipe(None, {"data.length": 16, "data.group": 4, "data.packing": False})


def test_a_schedule_must_fit_the_steps():
    keys = {"optimizer__schedule": "wsd", "train__steps": 10, "optimizer__warmup_steps": 8}
    assert error_of(**keys).startswith("optimizer.warmup_steps 8 and optimizer.decay 0.3 do not fit")


def test_values_are_read_as_their_types():
    overrides = {
        "optimizer.learning_rate": "1e-3",
        "model.rope_theta": "10000",
        "phi.latent_size": "null",
        "train.compile": "true",
        "train.report_to": "tensorboard",
        "data.mixture.copy": "2",
        "data.tasks": "{states: [4, 5], edges: [1, 2]}",
        "name": "mine",
    }
    recipe = load_recipe("smoke", overrides)
    assert recipe.optimizer.learning_rate == 1e-3
    assert isinstance(recipe.model.rope_theta, float)
    assert recipe.phi.latent_size is None
    assert recipe.train.compile is True
    assert recipe.train.report_to == ["tensorboard"]
    assert recipe.data.mixture["copy"] == 2.0
    assert recipe.data.mixture["random"] == 1.0
    assert recipe.data.tasks.states == (4, 5)
    assert recipe.name == "mine"


def test_an_insertion_point_replaces_the_recipes():
    module = "model.layers.1"
    assert load_recipe("smoke", {"phi.module": module}).phi.layer is None
    assert load_recipe(None, {"phi": f"{{module: {module}}}"}).phi.module == module
    assert load_recipe(None, {"phi.phi_weight": 2}).phi.layer == 0
    both = {"phi__module": module, "phi__layer": 1}
    assert (
        error_of(**both) == "phi: Give one of layer, module and layers as the insertion point, not several."
    )
    layers = load_recipe("smoke", {"phi.layers": "[0, 1]", "phi.mode": "observe"})
    assert (layers.phi.layer, layers.phi.layers) == (None, [0, 1])


def test_a_recipe_without_a_layer(tmp_path):
    plain = load_recipe("text_base")
    assert plain.phi is None
    assert (
        load_recipe("smoke", {"phi": "null", "phi_schedule": "{start_step: 0, warmup_steps: 0}"}).phi is None
    )
    assert load_recipe("text_base", {"phi.layer": 2}).phi.layer == 2
    assert load_recipe("text_base", {"phi": "{layer: 3, kl: official}"}).phi.layer == 3
    assert load_recipe(written(tmp_path, recipe_yaml(plain))).phi is None
    message = error_of("smoke", phi="null")
    assert message.endswith("set phi_schedule.start_step and phi_schedule.warmup_steps to 0.")


def test_parts_of_a_text(tmp_path):
    changes = {"data.parts.licences.source": "other.jsonl", "data.parts.mine": "{source: x, weight: 1e-1}"}
    parts = load_recipe("text_base", changes).data.parts
    assert list(parts) == ["code", "documentation", "licences", "mine"]
    assert (parts["licences"].source, parts["licences"].name) == ("other.jsonl", "licences")
    assert parts["mine"].weight == 0.1
    only = load_recipe("text_base", {"data.parts": "{one: {source: x, files: '*.py'}}"})
    assert list(only.data.parts) == ["one"]
    assert only.data.parts["one"].files == ["*.py"]
    assert load_recipe(written(tmp_path, recipe_yaml(only))) == only

    where = "the nearest valid one is 'data.parts.code.weight'."
    assert error_of("text_base", data__parts__code__wieght="1").endswith(where)
    assert error_of("text_base", data__parts="7") == "data.parts must be a section of keys, not 7."
    message = error_of("text_base", data__parts__code="installed")
    assert message == "data.parts.code must be a section of keys, not 'installed'."
    message = error_of("text_base", data__parts__code__weight="-1")
    assert message == "data.parts.code: weight must be a finite number of at least 0, not -1.0."
    message = error_of("text_base", data__parts__new__weight="1")
    assert message.startswith("data.parts.new: source must be given: a file, a folder, math")
    nothing = {f"data__parts__{name}__weight": 0 for name in ("code", "documentation", "licences")}
    message = error_of("text_base", **nothing)
    assert message == "data.parts needs at least one part with a weight above 0."
    message = error_of("text_base", data__mixture__copy="1")
    assert message == "Give data.mixture (formal languages) or data.parts (text), not both."


def test_bases():
    assert error_of("any_model") == "model.base must be given: the model's id on the Hub, or its folder."
    recipe = load_recipe("any_model", {"model.base": "owner/name"})
    assert (recipe.model.frozen, recipe.model.dtype, recipe.model.quantization) == (True, "auto", "none")
    llama = load_recipe("llama_3_2_3b", {"data.parts.math.source": "here.jsonl"})
    assert llama.data.parts["math"].source == "here.jsonl"
    assert llama.data.parts.keys() == recipe.data.parts.keys() == {"math", "gsm8k", "automata", "slimpajama"}
    assert {part.weight for part in llama.data.parts.values()} == {1.0}
    assert (llama.phi.layer, llama.phi.phi_weight, llama.phi.contrastive_weight) == (19, 1.0, 0.0)
    assert (llama.train.steps, llama.train.batch_size, llama.data.length) == (10_000, 2, 2048)
    base = {"model__base": "x"}
    message = "Nothing would be trained: give phi, or set model.frozen to false."
    assert error_of("any_model", phi="null", **base) == message
    message = error_of("any_model", model__quantization="int8", model__frozen="false", **base)
    assert message == "A quantized base cannot be trained; set model.frozen to true."
    message = error_of(None, model__revision="main")
    assert message == "model.revision is for a trained base model; give model.base too."
    message = error_of(None, model__tokenizer="bytes")
    assert message == "model.tokenizer must be characters for formal languages, or give data.parts."
    message = error_of("text_base", model__vocab_size="100")
    assert message == "model.vocab_size must be at least 262 (all bytes), not 100."


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_round_trip(tmp_path, name):
    recipe = load_recipe(name, GIVEN.get(name))
    assert recipe == load_recipe(RECIPES / f"{name}.yaml", GIVEN.get(name))
    assert load_recipe(written(tmp_path, recipe_yaml(recipe))) == recipe


def test_round_trip_of_every_kind_of_value(tmp_path):
    changes = {"phi.module": "model.layers.1", "data.tasks.max_length": 20}
    changes |= {"data.document_lengths": {0: 8, 3: 16}, "train.report_to": ["wandb", "tensorboard"]}
    recipe = load_recipe(None, changes)
    text = recipe_yaml(recipe)
    assert load_recipe(written(tmp_path, text)) == recipe
    assert "!!" not in text


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - set(PRETRAINED)))
def test_models_have_the_size_the_recipe_says(name):
    recipe = load_recipe(name)
    if recipe.model.tokenizer == "bpe":  # as large a one as the recipe says takes seconds to learn
        recipe = load_recipe(name, {"model.tokenizer": "bytes"})
    with torch.device("meta"):
        lens = start_model(recipe)[0]
    config = lens.base.config
    assert config.hidden_size == recipe.model.hidden_size == lens.phi.hidden_size
    assert config.num_hidden_layers == recipe.model.layers
    assert config.intermediate_size == recipe.model.intermediate_size
    assert config.vocab_size == (128 if recipe.model.tokenizer == "characters" else 262)
    assert lens.enabled == (recipe.phi is not None)
    parameters = sum(p.numel() for p in lens.base.parameters())
    if name.endswith("_pfa"):
        assert 0.08e9 < parameters < 0.12e9
        assert lens.module_paths[0].endswith("layers.5" if name.startswith("transformer") else ".0")
    else:
        assert parameters < 5e6


def test_weights_depend_on_the_seed_alone():
    first, again, other = (build_base(tiny_recipe(seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_documents_by_a_seed_of_their_own():
    recipe = tiny_recipe(seed=1)
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, seed=0))
    rows = [training_rows(one)[0]["input_ids"] for one in (tiny_recipe(seed=0), recipe, other)]
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    first, second = (build_base(one).state_dict() for one in (recipe, other))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_model_that_transformers_refuses_is_a_recipe_error():
    recipe = tiny_recipe()
    broken = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, heads=3))
    with pytest.raises(RecipeError, match="model does not hold together"):
        build_base(broken)


def test_keys_and_flatten():
    keys = recipe_keys()
    assert {"seed", "model", "model.layers", "data.tasks.states", "phi.kl", "train.steps"} <= set(keys)
    assert len(keys) == len(set(keys))
    flat = flatten(dataclasses.asdict(Recipe()))
    assert flat["data.mixture"] == {"in_context_language": 1.0}
    assert set(flat) <= set(keys)
    assert {"data.parts", "data.parts.NAME", "data.parts.NAME.source", "phi.layers"} <= set(keys)


def test_convert_and_words():
    assert convert({"3": 4}, dict[int, int], "x") == {3: 4}
    assert convert("a", Path | None, "x") == Path("a")
    assert convert(None, Path | None, "x") is None
    assert describe(list[int]) == "a list, each item a whole number"
    with pytest.raises(ConfigError, match="x must be a path or null, not 3"):
        convert(3, Path | None, "x")
    assert nearest("documets", ["output", "documents"]) == "documents"
