"""From problems to findings: the whole way at smoke scale, and the paper's with a Llama from a config."""

import json
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import make_llama, quickly_found
from philens import PHiConfig, attach, cli
from philens.bases.hub import load_pretrained
from philens.findings import reasoning
from philens.findings.reasoning import Choices, reproduce_reasoning
from philens.tasks.arithmetic import problems
from test_solutions import llama_3

pytestmark = pytest.mark.usefixtures("quick_findings")


@pytest.fixture
def philens(capsys):
    def run(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Both findings at smoke scale, by the command line."""
    folder = tmp_path_factory.mktemp("smoke")
    with quickly_found():
        for finding in ("correctness", "difficulty"):
            assert cli.main(["reproduce", finding, "--scale", "smoke", "--output", str(folder)]) == 0
    return folder


def test_correctness_from_nothing(smoke):
    results = json.loads((smoke / "correctness" / "results.json").read_text())
    (seed,) = results["seeds"]
    assert list(seed["points"]) == ["model.layers.0", "model.layers.1"]
    lines = (smoke / "seed-0" / "solutions" / "solutions.jsonl").read_text().splitlines()
    solutions = [json.loads(line) for line in lines]
    by_problem = pd.DataFrame(solutions).groupby("problem_id")["correct"]
    for found in seed["points"].values():
        counts = found["counts"]
        assert (counts["samples"] + counts["unscored"], counts["problems"]) == (320, 40)
        assert counts["mixed"] == ((by_problem.mean() > 0) & (by_problem.mean() < 1)).sum() > 0
        right = by_problem.sum()
        assert counts["pairs"] == (right * (8 - right)).sum()
        scored = [one["correct"] for one in solutions if one["tokens"]]
        assert found["accuracy"]["value"] == pytest.approx(sum(scored) / len(scored))
        rules = found["choice"]["all"]["rules"]
        assert rules["highest_phi"]["accuracy"] + rules["lowest_phi"]["accuracy"] == pytest.approx(1)
    # The points differ in phi and in nothing else.
    one, other = seed["points"].values()
    for rule in ("lowest_surprisal", "lowest_entropy", "shortest"):
        assert one["choice"]["all"]["rules"][rule] == other["choice"]["all"]["rules"][rule]
    assert one["choice"]["all"]["rules"]["highest_phi"] != other["choice"]["all"]["rules"]["highest_phi"]
    assert seed["sweep"]["comparisons"] == 10
    assert seed["provenance"]["module_paths"] == list(seed["points"])
    names = {path.name for path in (smoke / "correctness").iterdir()}
    assert {"results.json", "choices.csv", "correlations.csv", "sweep.csv", "sweep.png"} <= names
    assert {"correctness-model.layers.0.png", "correctness-model.layers.1.svg"} <= names


def test_difficulty_from_nothing(smoke):
    results = json.loads((smoke / "difficulty" / "results.json").read_text())
    found = results["seeds"][0]["points"]["model.layers.1"]
    assert {level: one["problems"] for level, one in found["levels"].items()} == dict.fromkeys("12345", 8)
    # Harder problems have longer solutions; that much is sure of any model.
    assert found["spearman"]["tokens"]["value"] > 0.7
    given = problems("test", 40)
    table = pd.read_parquet(smoke / "seed-0" / "difficulty.parquet")
    assert table["problem_id"].tolist() == [problem.id for problem in given]
    assert table["correct"].all()


def test_what_is_there_is_not_made_again(smoke, monkeypatch):
    """The next call reads the trained model, the solutions and the measured table."""
    before = json.loads((smoke / "correctness" / "results.json").read_text())
    monkeypatch.setattr(reasoning, "measure", lambda *_, **__: pytest.fail("made again"))
    again = reproduce_reasoning("correctness", smoke, "smoke")
    for point, found in again["seeds"][0]["points"].items():
        expected = before["seeds"][0]["points"][point]
        for part in ("counts", "headline", "accuracy"):
            assert json.loads(json.dumps(found[part])) == expected[part]
    with pytest.raises(pytest.fail.Exception, match="made again"):
        reproduce_reasoning("correctness", smoke, "smoke", Choices(kl="official"))


def test_the_example_reads_a_seeds_folder(smoke, monkeypatch, capsys):
    script = Path(__file__).parent.parent / "examples" / "first_mistake.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(smoke / "seed-0")])
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("phi@model.layers.1") == 4
    assert out.count("same style: the higher is right") == 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with Llama 3's chat layout, and problems and solutions in the layouts of GSM8K."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = llama_3()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "num_hidden_layers": 4}
    base = make_llama(**sizes, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows, solved = [], []
    for number in range(12):
        count, steps = 10 + number, 1 + number % 3
        question = f"Ann has {count} eggs and finds {steps} times one. How many?"
        working = "\n".join(
            f"{count + k}+1=<<{count + k}+1={count + k + 1}>>{count + k + 1}" for k in range(steps)
        )
        rows.append({"question": question, "answer": f"{working}\n#### {count + steps}"})
        solved.append(
            {
                "question": question,
                "ground_truth": str(count + steps),
                "6b": {"is_correct": True, "solution": f"{working}\nA: {count + steps}"},
                "175b": {"is_correct": number % 4 == 0, "solution": f"It is {'so ' * number}\nA: {count}"},
            }
        )
        if number % 4 == 0:
            solved[-1]["175b"]["solution"] = f"Count: {count + steps}\nA: {count + steps}"
    for name, found in (("problems", rows), ("solved", solved)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    return folder


def paper(folder: Path) -> list[str]:
    """The paper's recipe, small: what it reads is local, and the model is not a Llama of 3 billion."""
    parts = {"gsm8k": {"source": str(folder / "train.jsonl")}, "automata": {"source": "automata"}}
    keys = {
        "data.parts": parts,
        "data.length": 256,
        "data.group": 4,
        "data.workers": 0,
        "phi.prior_heads": 2,
        "train.steps": 3,
        "train.eval_every": 3,
        "train.save_every": 3,
        "train.evaluation_documents": 2,
        "optimizer.warmup_steps": 1,
        "model.dtype": "float32",
        "train.precision": "fp32",
    }
    return [word for key, value in keys.items() for word in (f"--{key}", json.dumps(value))]


def test_the_papers_way_lacks_nothing_but_weights(llama, tmp_path, philens):
    words = ["--model", llama / "base", "--problems", llama / "problems.jsonl", "--layers", "2,3"]
    words += ["--prompt", "gsm8k", "--output", tmp_path / "run", *paper(llama)]
    code, out, err = philens("reproduce", "difficulty", *words)
    assert code == 0, err
    assert "model.layers.2" in out
    results = json.loads((tmp_path / "run" / "difficulty" / "results.json").read_text())
    assert results["scale"] == "paper"
    (seed,) = results["seeds"]
    levels = seed["points"]["model.layers.3"]["levels"]
    assert {level: found["problems"] for level, found in levels.items()} == {"1": 4, "2": 4, "3": 4}
    assert "The final answer is" in seed["prompt"]["instruction"]

    solutions = ["--solutions", llama / "solved.jsonl"]
    asked = ["--metrics", "confidence,deep_thinking", "--metric-option", "group=4", "--prefix", 5]
    code, out, err = philens("reproduce", "correctness", *words, *solutions, "--by", "steps", *asked)
    assert code == 0, err
    assert "by the first 5 tokens" in out
    table = pd.read_parquet(tmp_path / "run" / "seed-0" / "correctness.parquet")
    assert table.attrs["prefix"] == 5
    assert {"confidence", "deep_thinking", "phi"} < set(table.attrs["metrics"])
    assert table.attrs["provenance"]["metric_options"]["group"] == 4
    assert {"confidence_tail", "deep_thinking_prefix", "phi@model.layers.2_prefix"} < set(table)
    results = json.loads((tmp_path / "run" / "correctness" / "results.json").read_text())
    counts = results["seeds"][0]["points"]["model.layers.2"]["counts"]
    assert (counts["problems"], counts["samples"], counts["mixed"], counts["all_right"]) == (12, 24, 9, 3)

    # An untrained model's own solutions: all of the way, and at its end the one sentence.
    sampling = ["--samples", 2, "--max-new-tokens", 6, "--limit", 4]
    code, _, err = philens("reproduce", "correctness", *words, *sampling)
    assert code == 2
    assert re.search(r"philens: error: .*both right and wrong.*\.\n$", err)
    lines = (tmp_path / "run" / "seed-0" / "solutions" / "solutions.jsonl").read_text().splitlines()
    assert len(lines) == 8
    record = json.loads((tmp_path / "run" / "seed-0" / "solutions" / "solve.json").read_text())
    assert record["prompt"]["example"].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_lens_that_observes_with_its_controls(llama, tmp_path, philens):
    """An untrained layer is the lens's own before its first step; problems are of the steps asked for."""
    base, _ = load_pretrained(str(llama / "base"))
    torch.manual_seed(0)
    lens = attach(base, PHiConfig(layer=2, mode="observe"))
    lens.calibrate([{"input_ids": torch.arange(3, 60)[None]}])
    lens.save_pretrained(tmp_path / "adapter")
    words = ["--model", llama / "base", "--adapter", tmp_path / "adapter", "--problems"]
    words += [
        llama / "problems.jsonl",
        "--levels",
        "2,3",
        "--dtype",
        "bfloat16",
        "--output",
        tmp_path / "run",
    ]
    code, out, err = philens("reproduce", "difficulty", *words)
    assert code == 0, err
    table = pd.read_parquet(tmp_path / "run" / "seed-0" / "difficulty.parquet")
    assert table["steps"].tolist() == [2, 3] * 4
    assert table.attrs["provenance"]["mode"] == "observe"
    assert table.attrs["provenance"]["dtype"] == "bfloat16"
    for kind in ("mean", "sum", "max", "last_fifth"):
        assert table[f"phi_untrained_{kind}"].tolist() == table[f"phi_{kind}"].tolist()
    assert (table["state_norm_mean"] > 0).all()
    assert "phi, untrained" in out
    solutions = ["--solutions", llama / "solved.jsonl", "--by", "steps"]
    code, out, err = philens("reproduce", "correctness", *words[:6], "--output", tmp_path / "run", *solutions)
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "correctness" / "results.json").read_text())
    rules = found["seeds"][0]["points"]["model.layers.2"]["choice"]["all"]["rules"]
    assert rules["highest_phi"] == rules["highest_phi_untrained_mean"]


def test_solve_grade_and_rank_by_command(smoke, llama, tmp_path, philens):
    base, adapter = smoke / "seed-0" / "base" / "model", smoke / "seed-0" / "sweep" / "layer-1"
    words = ["--model", base, "--problems", "arithmetic", "--limit", 5, "--samples", 3]
    words += ["--max-new-tokens", 20, "--output", tmp_path / "solved"]
    code, out, err = philens("solve", *words)
    assert code == 0, err
    assert re.search(r"Wrote .*solutions.jsonl: 15 solutions of 5 problems", out)
    assert "level 5: " in out
    assert "Already finished" in philens("solve", *words)[1]
    ranking = ["--adapter", adapter, "--format", "jsonl", "--output", tmp_path / "ranked.jsonl"]
    code, out, err = philens("rank", tmp_path / "solved" / "solutions.jsonl", "--model", base, *ranking)
    assert code == 0, err
    assert "candidates of 5 prompts" in out
    ranked = pd.read_json(tmp_path / "ranked.jsonl", lines=True)
    assert len(ranked) == 15
    best_first = ranked.groupby("prompt")["score"].rank(method="min", ascending=False)
    assert ranked["rank"].tolist() == best_first.astype(int).tolist()
    assert ranked["score"].tolist() == ranked["phi_mean"].tolist()
    code, out, _ = philens("grade", "arithmetic", "--limit", 50)
    assert code == 0
    assert "50 of 50 own solutions graded as right (100.000%)" in out
    code, out, _ = philens("grade", llama / "problems.jsonl", "--solutions", llama / "solved.jsonl")
    assert code == 0
    assert out.count("100.00%") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("reproduce correctness --scale big", "must be one of smoke, small, paper or null, not 'big'"),
        ("reproduce correctness --seeds 0 --scale smoke", "seeds must be at least 1, not 0"),
        (
            "reproduce correctness --seeds 2 --model x",
            "Several seeds are several models trained from nothing",
        ),
        ("reproduce difficulty --model x --problems nowhere.jsonl", "nowhere.jsonl"),
        ("reproduce difficulty --model x --problems arithmetic --prompt mine", "There is no prompt 'mine'"),
        ("reproduce difficulty --model x --problems sums --levels 9", "No problem of sums has level 9;"),
        ("solve --model x --problems sums --levels hard", "levels must be given as 1,2 or 2:7"),
        ("reproduce correctness --model x --prefix 0", "prefix must be at least 1 token, not 0"),
        ("reproduce correctness --model x --metrics confidance", "did you mean 'confidence'"),
        ("reproduce difficulty --model x --metric-option groups=3", "There is no metric option 'groups'"),
        ("rank nothing.jsonl --model x --prefix 0", "prefix must be at least 1 token, not 0"),
        ("reproduce difficulty --model x --layers few", "layers must name blocks as 4,8,12"),
        ("solve --model x", "No problems were named; give --problems."),
        ("solve --model nowhere --problems arithmetic --limit 2 --output here", "nowhere"),
        ("rank nothing.jsonl --model x", "nothing.jsonl"),
        ("grade nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_errors_are_one_sentence(philens, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = philens(*words.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(r"philens: error: [^\n]+[.?]\n", err.splitlines(keepends=True)[-1]), err
    assert message in err


def test_an_adapter_for_another_model(smoke, llama, tmp_path, philens):
    adapter = smoke / "seed-0" / "sweep" / "layer-1"
    words = ["--model", llama / "base", "--adapter", adapter, "--problems", llama / "problems.jsonl"]
    code, _, err = philens("reproduce", "difficulty", *words, "--output", tmp_path / "run")
    assert code == 2
    assert err.startswith("philens: error: ")
    assert "base" in err
