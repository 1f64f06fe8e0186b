"""What comes with philens: the models load and say what they should, and the demo writes what it promises."""

import json
from pathlib import Path

import pytest

import philens
from philens.cli import main
from philens.tasks.automata import TASKS
from philens.training.recipe import load_recipe
from philens.training.run import read_metrics


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output", str(folder)]) == 0
    return folder


def test_results_have_the_promised_form(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    assert {"finding", "scale", "seed", "versions", "recipe", "tasks"} <= results.keys()
    assert list(results["tasks"]) == list(TASKS)
    for task in results["tasks"].values():
        assert task["documents"] == 32
        assert task["tokens"] > 32 * 100
        for name in ("phi", "surprisal"):
            low, high = task[name]["ci95"]
            assert low < task[name]["mean"] < high


def test_the_shipped_model_shows_the_first_finding(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    phi = {name: task["phi"] for name, task in results["tasks"].items()}
    surprisal = {name: task["surprisal"]["mean"] for name, task in results["tasks"].items()}
    for boring in ("memorized_sequences", "memorized_programs", "random"):
        assert phi["in_context_language"]["ci95"][0] > phi[boring]["ci95"][1]
    assert surprisal["random"] > surprisal["in_context_language"] > surprisal["memorized_programs"]


def test_the_page_shows_one_document_of_each_task(output: Path) -> None:
    page = (output / "page.html").read_text(encoding="utf-8")
    for name in TASKS:
        assert name.replace("_", " ") in page
    assert "<script" not in page
    assert "http" not in page.split("</head>")[1]


def test_figures_are_written(output: Path) -> None:
    assert (output / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "tasks.svg").read_text()


def test_the_shipped_run_is_one_of_the_small_recipe() -> None:
    _, recipe = philens.load_run(philens.SHIPPED)
    small = load_recipe("small")
    assert (recipe.model, recipe.phi, recipe.data, recipe.optimizer) == (
        small.model,
        small.phi,
        small.data,
        small.optimizer,
    )
    last = read_metrics(philens.SHIPPED)[-1]
    assert last["step"] == recipe.train.steps == small.train.steps
    assert last["eval/in_context_language/phi"] > last["eval/memorized_programs/phi"]


def test_too_few_documents_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--documents", "1", "--output", str(tmp_path / "x")]) == 2
    assert "documents" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_shipped_model_of_text_reads_text_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
    Path("a.txt").write_text(text)
    assert main(["score", "a.txt", "--format", "jsonl", "--output", "scores"]) == 0
    row = json.loads(next(Path("scores").glob("*.jsonl")).read_text())
    assert row["text"] == text
    # Known by heart, once it has begun.
    assert sum(row["columns"]["surprisal"][6:]) / len(row["columns"]["surprisal"][6:]) < 0.5
    assert min(row["columns"]["phi"]) >= 0


@pytest.mark.parametrize(("folder", "block"), [("adapter", 3), ("layer-1", 1), ("layer-5", 5)])
def test_insertion_points_of_the_shipped_model_of_text(folder: str, block: int) -> None:
    base, _ = philens.load_pretrained(philens.SHIPPED_TEXT / "model")
    lens = philens.load(base, philens.SHIPPED_TEXT / folder)
    assert lens.module_paths == [f"model.layers.{block}"]


def test_a_run_that_holds_its_base_is_read_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lens, recipe = philens.load_run(philens.SHIPPED_TEXT)
    assert recipe.model.base == "model"  # a name of no meaning here
    assert lens.module_paths == ["model.layers.3"]
