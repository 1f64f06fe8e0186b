import csv
import json
import os
import signal

import pytest
import torch

from conftest import quickly_found
from philens import cli
from philens.findings.reproduce import UNTRAINED, measure, reproduce, untrained
from philens.support.errors import AdapterError, ConfigError, TrainingError
from philens.tasks.automata import TASKS
from philens.training.opening import load_run
from philens.training.trainer import PHiTrainer
from tiny import TINY, as_options

pytestmark = pytest.mark.usefixtures("quick_findings")
KEYS = {key: value for key, value in TINY.items() if key not in ("phi.layer", "data.mixture")}
OPTIONS = as_options(KEYS)
TASKS_FILES = {"results.json", "tasks.csv", "tasks.png", "tasks.svg"}
COMPLEXITY_FILES = {
    "results.json",
    "complexity_controls.csv",
    "complexity_correlations.csv",
    "complexity_curves.csv",
    "complexity.png",
    "complexity.svg",
}


def results_of(folder):
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module", params=["transformer", "lstm"])
def runs(request, tmp_path_factory):
    """Both findings of two seeds, from the command line."""
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--scale", "smoke", "--architecture", request.param, "--output", str(folder), *OPTIONS]
    with quickly_found():
        assert cli.main(["reproduce", "tasks", "--seeds", "2", "--documents", "6", *options]) == 0
        made = {path.name: path.stat().st_mtime_ns for path in (folder / "seed-0").iterdir()}
        assert cli.main(["reproduce", "complexity", "--documents", "6", *options]) == 0
    # The second finding is measured on the first one's runs.
    assert made == {path.name: path.stat().st_mtime_ns for path in (folder / "seed-0").iterdir()}
    return request.param, folder


def test_tasks_results(runs):
    architecture, folder = runs
    results = results_of(folder / "tasks")
    assert {"finding", "scale", "seed", "kl", "versions", "recipe"} <= set(results)
    assert (results["finding"], results["scale"], results["seed"]) == ("tasks", "smoke", 0)
    assert results["recipe"]["model"]["architecture"] == architecture
    assert results["recipe"]["train"]["steps"] == TINY["train.steps"]
    assert "torch" in results["versions"]
    assert set(results["tasks"]) == set(TASKS)
    for task in results["tasks"].values():
        assert task["documents"] == 6
        for quantity in ("phi", "surprisal"):
            low, high = task[quantity]["ci95"]
            assert low <= task[quantity]["mean"] <= high
        assert task["tokens"] > task["documents"]
    assert set(results["ratios"]) == {"memorized_sequences", "memorized_programs", "random"}
    assert results["known_false_positives"]["copy"]


def test_tasks_of_several_seeds(runs):
    _, folder = runs
    results = results_of(folder / "tasks")
    assert [one["seed"] for one in results["seeds"]] == [0, 1]
    first, second = (one["tasks"]["copy"]["phi"]["mean"] for one in results["seeds"])
    assert first != second
    assert first == results["tasks"]["copy"]["phi"]["mean"]
    spread = results["spread"]["tasks"]["copy"]["phi"]["mean"]
    assert spread["mean"] == pytest.approx((first + second) / 2)
    assert spread["seeds"] == 2
    assert {path.name for path in (folder / "tasks").iterdir()} == TASKS_FILES | {"seed-0", "seed-1"}
    for number in (0, 1):
        one = folder / "tasks" / f"seed-{number}"
        assert {path.name for path in one.iterdir()} == TASKS_FILES
        assert results_of(one)["seed"] == number
        assert results_of(one)["recipe"]["seed"] == number


def test_complexity_results(runs):
    _, folder = runs
    assert {path.name for path in (folder / "complexity").iterdir()} == COMPLEXITY_FILES
    results = results_of(folder / "complexity")
    assert (results["finding"], results["scale"], results["seed"]) == ("complexity", "smoke", 0)
    assert "seeds" not in results
    models = [f"untrained_model-{seed}" for seed in range(UNTRAINED)]
    assert set(results["controls"]["controls"]) == {"untrained_layer", *models, "permuted"}
    assert set(results["pairs"]["shares"]) == {"surprisal", "phi", "untrained_layer", *models}


def test_another_run_as_a_control(runs, tmp_path):
    _, folder = runs
    run, other = (folder / f"seed-{number}" for number in (0, 1))
    results = reproduce(
        "complexity", "smoke", tmp_path, model=run, documents=2, controls=[str(other), str(run)]
    )
    found = results["controls"]["controls"]
    assert found[str(run)]["given_fixed"] == results["controls"]["phi"]["given_fixed"]
    assert found[str(other)]["given_fixed"] != found[str(run)]["given_fixed"]
    with pytest.raises(AdapterError, match="nothing is not a run folder"):
        reproduce("complexity", "smoke", tmp_path, model=run, documents=2, controls=["nothing"])


def test_an_untrained_layer_leaves_the_trained_model_alone(runs):
    _, folder = runs
    lens, recipe = load_run(folder / "seed-0")
    before = {name: value.clone() for name, value in lens.state_dict().items()}
    layer, model = (untrained(lens, recipe, 0, base_too) for base_too in (False, True))
    for name, value in lens.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in lens.base.state_dict().items():
        assert torch.equal(value, layer.base.state_dict()[name])
    assert any(
        not torch.equal(value, model.base.state_dict()[name])
        for name, value in lens.base.state_dict().items()
    )
    assert (layer.layers[0].scale != 1).any()  # calibrated


def test_tables_and_figures(runs):
    _, folder = runs
    rows = list(csv.DictReader((folder / "tasks" / "tasks.csv").open()))
    assert [row["task"] for row in rows] == list(TASKS)
    assert (folder / "tasks" / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "tasks" / "tasks.svg").read_text()


def test_a_table_is_printed(runs, capsys, tmp_path):
    _, folder = runs
    options = ["--model", str(folder / "seed-1"), "--documents", "4", "--output", str(tmp_path / "out")]
    assert cli.main(["reproduce", "tasks", *options]) == 0
    out = capsys.readouterr().out
    assert "in-context language" in out
    assert f"Wrote {tmp_path / 'out' / 'tasks'}." in out
    results = results_of(tmp_path / "out" / "tasks")
    assert results["seed"] == 1
    # Not the scale of the command line, which this model need not have.
    assert results["scale"] == "smoke" or results["scale"] == "smoke_lstm"
    assert not list((tmp_path / "out").glob("seed-*"))


def test_either_formula_measures(runs, tmp_path):
    _, folder = runs
    run = folder / "seed-0"
    phi = {}
    for kl in ("exact", "official", None):
        results = reproduce("tasks", "smoke", tmp_path, model=run, documents=2, kl=kl)
        phi[kl] = results["tasks"]["random"]["phi"]["mean"]
        assert results["kl"] == (kl or "exact")
    assert phi["exact"] == phi[None] != phi["official"]


def test_another_recipe_in_the_same_folder(runs):
    architecture, folder = runs
    with pytest.raises(TrainingError, match=r"belongs to another recipe: model.layers was 2 and is now 3;"):
        reproduce("tasks", "smoke", folder, architecture, overrides=KEYS | {"model.layers": 3})


def test_the_same_documents_are_measured_again(runs):
    _, folder = runs
    lens, recipe = load_run(folder / "seed-0")
    tables = [measure(lens, recipe, ("random", "copy"), n) for n in (3, 3)]
    assert (tables[0].docs.tokens == tables[1].docs.tokens).all()
    assert (tables[0].phi == tables[1].phi).all()
    assert len(tables[0].docs) == 6


def test_interrupted_and_called_again(tmp_path, monkeypatch, capsys):
    """Ctrl-C in training stops with a checkpoint; the same command goes on and finds the same."""

    def interrupt(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, *args, **kwargs)

    original = PHiTrainer.compute_loss
    words = ["reproduce", "tasks", "--scale", "smoke", "--documents", "4", *OPTIONS, "--output"]
    with monkeypatch.context() as patch:
        patch.setattr(PHiTrainer, "compute_loss", interrupt)
        assert cli.main([*words, str(tmp_path / "stopped")]) == 130
    assert "reproduce by the same command" in capsys.readouterr().err
    assert (tmp_path / "stopped" / "seed-0" / "checkpoint-5").is_dir()
    assert not (tmp_path / "stopped" / "tasks").exists()
    assert cli.main([*words, str(tmp_path / "stopped")]) == 0
    assert cli.main([*words, str(tmp_path / "whole")]) == 0
    stopped, whole = (results_of(tmp_path / name / "tasks") for name in ("stopped", "whole"))
    assert stopped == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finding": "everything"}, "no finding 'everything'; there are tasks, complexity"),
        ({"scale": "huge"}, "no scale 'huge' for 'transformer'; scales are smoke, small, paper"),
        ({"architecture": "rnn"}, "no scale 'smoke' for 'rnn'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"documents": 1}, "documents at least 2"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        reproduce(**{"finding": "tasks", "scale": "smoke", "output": tmp_path} | options)


def test_an_unknown_kl_is_refused_and_not_taken_for_the_official_one(runs, tmp_path):
    _, folder = runs
    for kl in ("exact", "official"):
        reproduce("tasks", "smoke", tmp_path / kl, model=folder / "seed-0", documents=2, kl=kl)
    exact, official = (results_of(tmp_path / kl / "tasks") for kl in ("exact", "official"))
    assert (exact["kl"], official["kl"]) == ("exact", "official")
    assert exact["tasks"]["random"]["phi"]["mean"] != official["tasks"]["random"]["phi"]["mean"]
    with pytest.raises(ConfigError, match="kl must be"):
        reproduce("tasks", "smoke", tmp_path / "x", model=folder / "seed-0", documents=2, kl="offical")
