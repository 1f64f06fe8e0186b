"""Layers trained alike but for one knob: each setting once, the same documents, a table and a figure."""

import csv
import json

import pytest
import yaml

from conftest import make_llama
from philens import cli
from philens.bases.tokenizer import character_tokenizer
from philens.findings.knobs import COMMON, GRID, read_settings, reproduce_knobs
from philens.findings.reproduce import reproduce
from philens.support.errors import ConfigError, RecipeError
from philens.training.folder import RunFolder
from philens.training.recipe import load_recipe, plain
from tiny import TINY, as_options

pytestmark = pytest.mark.usefixtures("quick_findings")
KEYS = {key: value for key, value in TINY.items() if key.startswith(("data", "optimizer", "train"))}
KEYS |= {"phi.prior_heads": 2, "phi.layer": 1, "train.steps": 4}
KNOBS = {
    "block": {0: {"phi.layer": 0}, 1: {}},
    "base": {"frozen": {}, "joint": {"model.frozen": False}},
    "size": {"D/4": {"phi": {"init": "random", "latent_size": 8}}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_llama().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "knobs.yaml"
    path.write_text(yaml.safe_dump(KNOBS, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def found(base, grid, tmp_path_factory):
    from conftest import quickly_found

    output = tmp_path_factory.mktemp("knobs")
    with quickly_found():
        words = ["--model", str(base), "--grid", str(grid), "--documents", "4", *as_options(KEYS)]
        assert cli.main(["reproduce", "knobs", *words, "--output", str(output)]) == 0
    return output, json.loads((output / "knobs" / "results.json").read_text(), parse_constant=pytest.fail)


def test_each_setting_is_trained_once_and_as_it_says(found):
    output, results = found
    assert [(one["knob"], one["setting"], one["run"]) for one in results["settings"]] == [
        ("block", "0", "block-0"),
        ("block", "1", COMMON),
        ("base", "frozen", COMMON),
        ("base", "joint", "base-joint"),
        ("size", "D/4", "size-D-4"),
    ]
    runs = {one["run"]: RunFolder(output / one["run"]) for one in results["settings"]}
    assert {path.name for path in output.iterdir()} == {"knobs", *runs}
    recipes = {name: plain(run.recipe()) for name, run in runs.items()}
    assert [recipe["phi"]["layer"] for recipe in recipes.values()] == [0, 1, 1, 1]
    assert [recipe["model"]["frozen"] for recipe in recipes.values()] == [True, True, False, True]
    assert [recipe["phi"]["latent_size"] for recipe in recipes.values()] == [None, None, None, 8]
    for recipe in recipes.values():
        assert recipe["train"]["steps"] == 4


def test_what_is_measured(found, base, grid, tmp_path):
    output, results = found
    block, common, same, joint, size = results["settings"]
    assert {key: common[key] for key in ("phi", "ratios")} == {key: same[key] for key in ("phi", "ratios")}
    for one in (results["untrained"], *results["settings"]):
        low, high = one["phi"]["ci95"]
        assert low < one["phi"]["mean"] < high
        assert set(one["ratios"]) == {"memorized_sequences", "memorized_programs", "random"}
        assert set(one["correlations"]) == {"given_surprisal", "given_letters", "gain"}
    # A layer in the path costs something; the untrained one is near the identity.
    assert abs(results["untrained"]["loss_gap"]["value"]) < abs(size["loss_gap"]["value"])
    assert len({one["phi"]["mean"] for one in (results["untrained"], block, common, joint, size)}) == 5
    # The same figures as by the commands of the findings.
    tasks = reproduce("tasks", "smoke", tmp_path, model=output / "block-0", documents=4)
    assert block["ratios"] == tasks["ratios"]
    complexity = reproduce("complexity", "smoke", tmp_path, model=output / "block-0", documents=4)
    assert block["correlations"]["given_surprisal"] == complexity["controls"]["phi"]["given_fixed"]
    assert block["correlations"]["given_letters"] == complexity["controls"]["phi"]["given_letters"]


def test_files_and_table(found, base, grid, capsys):
    output, results = found
    assert {path.name for path in (output / "knobs").iterdir()} == {
        "results.json",
        "knobs.csv",
        "knobs.png",
        "knobs.svg",
    }
    rows = list(csv.DictReader((output / "knobs" / "knobs.csv").open()))
    assert [row["setting"] for row in rows] == ["", "0", "1", "frozen", "joint", "D/4"]
    assert float(rows[1]["over_random"]) == results["settings"][0]["ratios"]["random"]["ratio"]
    again = reproduce_knobs(str(base), output, grid, documents=4, overrides=KEYS)  # nothing is trained again
    assert again["settings"] == results["settings"]
    (table,) = again.tables()
    assert table.row_count == len(results["settings"]) + 1 + len(KNOBS)


def test_a_base_is_trained_where_none_is_given(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def train(recipe, folder):
        assert (recipe.name, recipe.phi, recipe.model.base) == ("small", None, None)
        assert folder == tmp_path / "base"
        raise Stop

    monkeypatch.setattr("philens.findings.knobs.trained", train)
    with pytest.raises(Stop):
        reproduce_knobs(None, tmp_path)
    with pytest.raises(ConfigError, match="no file"):  # said before a base is trained
        reproduce_knobs(None, tmp_path, tmp_path / "nothing.yaml")


def test_the_knobs_that_come_with_philens():
    settings = read_settings(GRID, "small_layer", {"model.base": "owner/name"})
    common = load_recipe("small_layer", {"model.base": "owner/name"})
    knobs = dict.fromkeys(one.knob for one in settings)
    assert len(knobs) == 8
    for knob in knobs:  # each has the recipe of all among its settings, to compare with
        assert [one.recipe == common for one in settings if one.knob == knob].count(True) == 1
    runs = {one.run: one.recipe for one in settings}
    assert len(runs) == len({json.dumps(plain(recipe)) for recipe in runs.values()}) == 18


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block: 3", "must hold settings by name under 'block', .* not 3"),
        ("block: {first: 3}", "must hold settings by name under 'block'"),
        ("", "holds no setting"),
        ("- 3", 'must hold keys and values, such as "seed: 1", not'),
        ("block: {first: {phi.leyer: 0}}", "knobs.yaml, block first has an unknown key 'phi.leyer'"),
        ("block: {first: {phi.layer: x}}", "knobs.yaml, block first: phi.layer must be"),
        ("block: {none: {phi: null, model.frozen: false}}", "block none: Only a single PHi layer"),
        ("block: {two: {phi.layers: [0, 1], phi.mode: observe}}", "block two: Only a single PHi layer"),
        (
            "size: {D/8: {phi.layer: 0}, D 8: {phi.layer: 1}}",
            "size D/8 and size D 8 would have the same folder, size-D-8;",
        ),
    ],
)
def test_a_file_that_holds_no_knobs(tmp_path, text, message):
    path = tmp_path / "knobs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path, "small_layer", {"model.base": "x"})


def test_too_few_documents(tmp_path):
    with pytest.raises(ConfigError, match="documents must be at least 2, not 1"):
        reproduce_knobs("x", tmp_path, documents=1)


def test_a_base_that_knows_too_few_characters(tmp_path, grid):
    folder = tmp_path / "model"
    make_llama(vocab_size=122).save_pretrained(folder)  # without z
    character_tokenizer().save_pretrained(folder)
    with pytest.raises(RecipeError, match="model does not read characters as formal languages need it"):
        reproduce_knobs(str(folder), tmp_path / "out", grid, documents=4, overrides=KEYS)
