"""A sweep over insertion points: layers trained at once are each what they would be alone."""

import json

import numpy as np
import pytest
import torch

from conftest import make_llama
from philens.bases.hub import load_pretrained
from philens.bases.tokenizer import byte_tokenizer
from philens.cli import main
from philens.findings.sweep import parse_layers, sweep
from philens.lens.model import load
from philens.support.errors import ConfigError
from philens.training.folder import RunFolder
from philens.training.opening import load_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = byte_tokenizer()
    make_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    texts = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": f"{n} bottles of beer on the wall, {n} bottles of beer."} for n in range(300)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "data.parts": {"beer": {"source": str(texts)}},
        "data.length": 48,
        "data.group": 4,
        "data.workers": 0,
        "phi.prior_heads": 2,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 1,
        "train.steps": 4,
        "train.eval_every": 2,
        "train.save_every": 2,
        "train.log_every": 1,
        "train.precision": "fp32",
    }


@pytest.fixture(scope="module")
def swept(base, options, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep")
    return output, sweep(str(base), [0, 2], output, overrides=options)


def test_what_is_written(swept):
    output, results = swept
    assert list(results["points"]) == ["model.layers.0", "model.layers.2"]
    written = json.loads((output / "results.json").read_text())
    assert written["points"] == results["points"]
    assert written["base"] == "model"
    names = {path.name for path in output.iterdir()}
    assert names >= {"sweep.csv", "course.csv", "sweep.png", "sweep.svg", "layer-0", "layer-2", "run"}
    assert (output / "sweep.png").stat().st_size > 10_000
    assert [record["step"] for record in results["course"]] == [0, 0, 2, 2, 4, 4]


def test_a_fresh_layer_leaves_the_loss_as_it_is_and_training_lowers_phi(swept):
    _, results = swept
    for path in results["points"]:
        first, *_, last = [one for one in results["course"] if one["insertion_point"] == path]
        assert abs(first["loss_gap"]) < 0.01 * first["surprisal_base"]
        assert last["phi"] < first["phi"]
        assert last["surprisal"] == pytest.approx(last["surprisal_base"] + last["loss_gap"], abs=1e-6)


def test_each_layer_alone_in_the_path_gives_the_sweeps_figures(swept, base, options):
    output, _ = swept
    together, _ = load_run(output / "run")
    assert together.config.mode == "observe"
    model, tokenizer = load_pretrained(str(base))
    ids = torch.tensor([tokenizer("7 bottles of beer on the wall.")["input_ids"]])
    with torch.no_grad():
        expected = together(ids, labels=ids)
        plain = model(ids).logits
    for place, block in enumerate((0, 2)):
        lens = load(model, output / f"layer-{block}")
        assert lens.config.mode == "bottleneck"
        assert lens.config.layer == block
        with torch.no_grad():
            alone = lens(ids, labels=ids)
        torch.testing.assert_close(alone.phi, expected.phi[..., place], rtol=1e-5, atol=1e-4)
        key = f"surprisal@model.layers.{block}"
        torch.testing.assert_close(alone.losses["surprisal"], expected.losses[key], rtol=1e-5, atol=1e-5)
        lens.detach()
    assert torch.equal(model(ids).logits, plain)


def test_called_again_it_takes_the_finished_run(swept, base, options, capsys):
    output, results = swept
    records = RunFolder(output / "run").metrics()
    again = sweep(str(base), [0, 2], output, overrides=options)
    assert again == results
    assert RunFolder(output / "run").metrics() == records


def test_the_command(base, options, tmp_path, capsys):
    words = [word for key, value in options.items() for word in (f"--{key}", json.dumps(value))]
    output = ["--output", str(tmp_path / "s"), "--train.steps", "2"]
    assert main(["sweep", str(base), "--layers", "0:3:2", *words, *output]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0" in shown
    assert "model.layers.2" in shown
    assert "model.layers.1" not in shown
    numbers = json.loads((tmp_path / "s" / "results.json").read_text())["points"]
    assert all(np.isfinite(list(found.values())).all() for found in numbers.values())
    assert main(["sweep", str(base), *words]) == 2
    assert "layers must name blocks" in capsys.readouterr().err
    assert main(["sweep", str(base), "--layers", "7", *words, "--output", str(tmp_path / "t")]) == 2
    assert "Layer 7 is out of range" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "layers"),
    [("4:28:4", [4, 8, 12, 16, 20, 24]), ("3", [3]), ("1,-1", [1, -1]), ("2:5", [2, 3, 4])],
)
def test_naming_blocks(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "5:2", "1:9:0", "1,,2", "1.5"])
def test_blocks_that_are_none(text):
    with pytest.raises(ConfigError, match="layers must name blocks"):
        parse_layers(text)
