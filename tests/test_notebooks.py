"""The notebooks run in a real kernel, at the scale they have for a machine without a GPU, and show what their
text says.

`PHILENS_WRITE_DOCS=1 pytest tests/test_notebooks.py -m 'docs or slow'` writes them as they were run.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import needs_smollm2

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ("where_a_model_thinks", "layer_in_your_model", "choosing_among_answers")


def run(name: str, folder: Path, expression: str) -> Any:
    """Execute a notebook in `folder`; the value of an expression in its kernel afterwards, as JSON has it."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    probe = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))")
    notebook.cells.append(probe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        # A cell that fails raises CellExecutionError, with the traceback.
        waits = {"timeout": 600, "startup_timeout": 300, "iopub_timeout": 120}
        NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **waits).execute()
    printed = [output.text for output in probe.outputs if output.get("name") == "stdout"]
    notebook.cells.pop()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # Progress and warnings of this machine are nobody else's business.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            assert all(output.output_type != "error" for output in cell.outputs)
            assert cell.outputs or not cell.source.startswith("figure"), cell.source
    if os.environ.get("PHILENS_WRITE_DOCS"):
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    return json.loads(printed[-1])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 500_000
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].source.startswith("# ")
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    # Executed from top to bottom, and nothing of the machine that did it.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = path.read_text(encoding="utf-8")
    for place in ("/home/", "/root/", "/tmp/", "/work/", "site-packages", "Traceback"):
        assert place not in text, place


def test_links_lead_somewhere() -> None:
    for name in NAMES:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        words = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        for target in re.findall(r"\]\(([^)#]+)", words):
            assert (FOLDER / target).is_file(), (name, target)


@pytest.mark.docs
@needs_smollm2
def test_where_a_model_thinks(tmp_path: Path) -> None:
    found = run(
        "where_a_model_thinks",
        tmp_path,
        """{
            "phi": tasks["phi"].to_dict(),
            "phi_low": tasks["phi_low"].to_dict(),
            "phi_high": tasks["phi_high"].to_dict(),
            "surprisal": tasks["surprisal"].to_dict(),
            "copied": words[["phi_mean", "surprisal_with_layer_mean"]].values.tolist(),
            "text": means["surprisal"].to_dict(),
            "pieces": ["".join(one.pieces()) == one.text for one in [*scores, *read]],
        }""",
    )
    for boring in ("memorized_sequences", "memorized_programs", "random"):
        assert found["phi_low"]["in_context_language"] > found["phi_high"][boring]
    assert max(found["surprisal"], key=found["surprisal"].__getitem__) == "random"
    first, again = found["copied"][2::2], found["copied"][3::2]
    for (noise, surprise), (copied, known) in zip(first, again, strict=True):
        assert copied > 3 * noise
        assert known < 0.2 < 2 < surprise
    assert max(found["text"], key=found["text"].__getitem__) == "shuffled"
    assert all(found["pieces"])
    assert "<script" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow  # it trains a base and five layers
def test_layer_in_your_model(tmp_path: Path) -> None:
    found = run(
        "layer_in_your_model",
        tmp_path,
        """{
            "ok": bool(report.ok),
            "untouched": bool(untouched),
            "paths": trained.module_paths,
            "layer": LAYER,
            "gaps": evaluations["eval/loss_gap"].tolist(),
            "phi": evaluations["eval/phi"].tolist(),
            "static": evaluations["eval/phi_static"].tolist(),
            "steps": len(losses),
            "loop": [losses[0]["phi"], losses[-1]["phi"]],
            "same": bool((philens.score(again, tokenizer, text)[0].phi == scores.phi).all()),
            "refused": "another" in str(refused),
            "points": list(swept["points"]),
        }""",
    )
    assert found["ok"]
    assert found["untouched"]
    assert found["paths"] == [f"model.layers.{found['layer']}"]
    assert found["gaps"][0] == pytest.approx(0, abs=1e-3)  # fresh, it changes nothing
    assert 0 < found["gaps"][-1] < 0.5
    assert found["phi"][-1] < found["phi"][0]
    assert all(phi < static for phi, static in zip(found["phi"], found["static"], strict=True))
    assert found["loop"][1] < found["loop"][0]
    assert found["same"]
    assert found["refused"]
    assert len(found["points"]) == 3
    for name in ("layer/run/recipe.yaml", "layer/adapter/phi_layer.safetensors", "layer/sweep/sweep.csv"):
        assert (tmp_path / name).is_file()


@pytest.mark.docs
def test_choosing_among_answers(tmp_path: Path) -> None:
    found = run(
        "choosing_among_answers",
        tmp_path,
        """{
            "problems": len(problems),
            "solutions": len(solutions),
            "right": sum(one.correct for one in solutions),
            "columns": list(table),
            "ranks": ranked["rank"].tolist(),
            "surprisals": ranked["surprisal_mean"].tolist(),
            "marks": ranked["right"].tolist(),
            "phis": by_phi["phi_mean"].tolist(),
            "choices": choices[["accuracy", "accuracy_low", "accuracy_high"]].to_dict("index"),
            "pairs": int(choices["pairs"].iloc[0]),
            "mixed": int(((share > 0) & (share < 1)).sum()),
            "measured": int(choices["problems"].iloc[0]),
        }""",
    )
    assert (found["problems"], found["solutions"]) == (60, 480)
    assert 10 < found["right"] < 470  # there is something to choose
    assert {"correct", "phi_mean", "surprisal_mean", "tokens"} <= set(found["columns"])
    assert found["ranks"][0] == 1
    assert found["surprisals"] == sorted(found["surprisals"])
    assert found["phis"] == sorted(found["phis"], reverse=True)
    assert set(found["marks"]) == {"✓", ""}
    assert found["measured"] == found["mixed"] > 10
    assert found["pairs"] >= found["mixed"]
    assert {"highest_phi", "lowest_surprisal", "shortest"} <= found["choices"].keys()
    for choice in found["choices"].values():
        assert 0 <= choice["accuracy_low"] <= choice["accuracy"] <= choice["accuracy_high"] <= 1
    assert (tmp_path / "choosing" / "solutions" / "solutions.jsonl").is_file()
