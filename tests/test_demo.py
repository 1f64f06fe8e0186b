"""What comes with philens: the models load and say what they should, and the demo writes what it promises."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import philens
from conftest import needs_smollm2
from philens.bases.wheels import SHIPPED
from philens.cli import main
from philens.lens.adapter import CONFIG_FILE
from philens.tasks.automata import TASKS
from philens.training.folder import RunFolder
from philens.training.recipe import load_recipe


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo writes where the language model is not to be had."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHILENS_CACHE", str(folder / "cache"))
        patch.setenv("PIP_FIND_LINKS", "")
        patch.setattr("philens.bases.wheels._installed", lambda wheel: None)
        assert main(["demo", "--output", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it writes of texts."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("philens.findings.demo.demo_tasks", lambda output, documents: {})
        patch.setattr("philens.findings.language_tables.tasks_table", lambda results: "")
        assert main(["demo", "--output", str(folder)]) == 0
    return folder / "texts"


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("without_smollm2")
def test_without_the_language_model_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--documents", "2", "--output", str(tmp_path / "out")]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "Only formal languages are shown: smollm2 is not in the cache, and pip did not give"
    )
    assert first.endswith("check the network.")
    assert not any("memorised" in line for line in rest)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tasks"]


@needs_smollm2
def test_the_language_model_reads_five_levels(texts: Path) -> None:
    results = results_in(texts)
    assert list(results["levels"]) == ["trivial", "memorised", "shuffled", "code", "prose"]
    for level in results["levels"].values():
        assert level["texts"] == 6
        for name in ("phi", "surprisal"):
            low, high = level[name]["ci95"]
            assert low < level[name]["mean"] < high
    surprisal = {name: level["surprisal"]["mean"] for name, level in results["levels"].items()}
    # What no layer changes: it predicts what is trivial, and words in no order least of all.
    assert min(surprisal, key=surprisal.__getitem__) == "trivial"
    assert max(surprisal, key=surprisal.__getitem__) == "shuffled"
    phi = {name: level["phi"]["mean"] for name, level in results["levels"].items()}
    assert phi["code"] > phi["trivial"]
    assert (texts / "texts.png").read_bytes().startswith(b"\x89PNG")
    page = (texts / "page.html").read_text(encoding="utf-8")
    assert all(f"{level}: " in page for level in results["levels"])
    assert "<script" not in page


def test_results_have_the_promised_form(output: Path) -> None:
    results = results_in(output / "tasks")
    assert {"finding", "scale", "seed", "versions", "recipe", "tasks"} <= results.keys()
    assert list(results["tasks"]) == list(TASKS)
    for task in results["tasks"].values():
        assert task["documents"] == 32
        assert task["tokens"] > 32 * 100
        for name in ("phi", "surprisal"):
            low, high = task[name]["ci95"]
            assert low < task[name]["mean"] < high


def test_the_shipped_model_shows_the_first_finding(output: Path) -> None:
    results = results_in(output / "tasks")
    phi = {name: task["phi"] for name, task in results["tasks"].items()}
    surprisal = {name: task["surprisal"]["mean"] for name, task in results["tasks"].items()}
    for boring in ("memorized_sequences", "memorized_programs", "random"):
        assert phi["in_context_language"]["ci95"][0] > phi[boring]["ci95"][1]
    assert surprisal["random"] > surprisal["in_context_language"] > surprisal["memorized_programs"]


def test_the_page_shows_one_document_of_each_task(output: Path) -> None:
    page = (output / "tasks" / "page.html").read_text(encoding="utf-8")
    for name in TASKS:
        assert name.replace("_", " ") in page
    assert "<script" not in page
    assert "http" not in page.split("</head>")[1]


def test_figures_are_written(output: Path) -> None:
    assert (output / "tasks" / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "tasks" / "tasks.svg").read_text()


def test_the_shipped_run_is_one_of_the_small_recipe() -> None:
    _, recipe = philens.load_run(philens.SHIPPED)
    small = load_recipe("small")
    assert (recipe.model, recipe.phi, recipe.data, recipe.optimizer) == (
        small.model,
        small.phi,
        small.data,
        small.optimizer,
    )
    last = RunFolder(philens.SHIPPED).metrics()[-1]
    assert last["step"] == recipe.train.steps == small.train.steps
    assert last["eval/in_context_language/phi"] > last["eval/memorized_programs/phi"]


def test_too_few_documents_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--documents", "1", "--output", str(tmp_path / "x")]) == 2
    assert "documents" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@needs_smollm2
def test_texts_are_read_by_the_language_model_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
    backwards = " ".join(reversed(text.split()))
    Path("a.txt").write_text(f"{text}\n{backwards}\n")
    assert main(["score", "a.txt", "--by", "line", "--format", "jsonl", "--output", "scores"]) == 0
    rows = [json.loads(line) for path in Path("scores").glob("*.jsonl") for line in path.open()]
    assert [row["text"] for row in rows] == [text, backwards]
    known, unknown = (row["means"]["surprisal"] for row in rows)
    assert known < unknown / 2
    assert all(min(row["columns"]["phi"]) >= 0 for row in rows)
    origin = json.loads(Path("scores/_manifest.json").read_text())["provenance"]
    assert origin["base"] == origin["tokenizer"] == "smollm2"  # not where they lie on this machine


def test_the_shipped_layer_of_smollm2_is_one_of_its_recipe() -> None:
    folder = SHIPPED / "smollm2"
    recipe, own = load_recipe(folder / "recipe.yaml"), load_recipe("smollm2")
    assert (recipe.model, recipe.phi, recipe.data, recipe.optimizer) == (
        own.model,
        own.phi,
        own.data,
        own.optimizer,
    )
    assert json.loads((folder / "adapter" / CONFIG_FILE).read_text())["base"]["name_or_path"] == "smollm2"
    assert any("eval/math/phi" in record for record in RunFolder(folder).metrics())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    # Nothing of the machine that trained it.
    written = [path.read_text(encoding="utf-8") for path in files if path.suffix != ".safetensors"]
    assert not any(re.search(r"[ \"'](/|[A-Za-z]:\\)\w", text) for text in written)
