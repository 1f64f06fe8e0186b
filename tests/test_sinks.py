"""Attention sinks: tokens whose hidden state is many times as long as the others'."""

import numpy as np
import pytest
import torch

import philens
from conftest import make_gpt2, make_llama
from philens import PHiConfig, attach
from philens.bases.tokenizer import character_tokenizer
from philens.tasks.packing import TokenDocuments
from philens.training.evaluated import record_of
from philens.training.evaluation import evaluate_text

SIZE, PLACE = 4e4, 5  # of the planted activation: how large, in which dimension


def with_sink(base):
    """A base whose first token has a massive activation from its first block on, as in Llama."""

    def plant(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        grown = states.clone()
        grown[:, 0, PLACE] += SIZE
        return (grown, *output[1:]) if isinstance(output, tuple) else grown

    base.model.layers[0].register_forward_hook(plant)
    return base


def make_lens(base, calibrated=True, **options):
    options = {"layer": 1, "mode": "observe", "init_scale": 2.0, "contrastive_weight": 0.0} | options
    lens = attach(base, PHiConfig(**options)).eval()
    lens.freeze_base()
    if calibrated:
        lens.calibrate([{"input_ids": row[None]} for row in some_tokens(8, 24, seed=3)])
    return lens


def some_tokens(rows, length, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_without_sinks_calibration_is_as_it_was(make):
    lens = make_lens(make())
    rows = some_tokens(8, 24, seed=3)
    states = lens(rows, returns="phi").layer_outputs[0].observed.flatten(0, 1).double()
    layer = lens.layers[0]
    torch.testing.assert_close(layer.shift.double(), states.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.scale.double(), states.std(0, correction=0), rtol=1e-5, atol=1e-6)
    norms = states.norm(dim=-1)
    torch.testing.assert_close(layer.sink_norm.double(), 4 * norms.median(), rtol=1e-5, atol=1e-6)
    assert norms.max() < layer.sink_norm
    assert not lens(rows, returns="phi").layer_outputs[0].sinks.any()


def test_sinks_are_found_and_left_out_of_calibration():
    lens = make_lens(with_sink(make_llama()))
    tokens = some_tokens(3, 20)
    output = lens(tokens, returns="phi").layer_outputs[0]
    assert output.sinks[:, 0].all()
    assert not output.sinks[:, 1:].any()
    others = lens(some_tokens(8, 24, seed=3), returns="phi").layer_outputs[0].observed[:, 1:]
    deviation = others.flatten(0, 1).double().std(0, correction=0)
    torch.testing.assert_close(lens.layers[0].scale.double(), deviation, rtol=1e-5, atol=1e-6)
    whole = lens(some_tokens(8, 24, seed=3), returns="phi").layer_outputs[0].observed.flatten(0, 1)
    assert whole.double().std(0)[PLACE] > 100 * deviation[PLACE]


def test_a_sink_passes_the_layer_as_it_is_and_its_phi_is_like_others():
    lens = make_lens(with_sink(make_llama()), mode="bottleneck").train()
    output = lens(some_tokens(3, 20), returns="phi").layer_outputs[0]
    assert torch.equal(output.hidden_states[:, 0], output.observed[:, 0])
    assert not torch.equal(output.hidden_states[:, 1:], output.observed[:, 1:])
    # What is encoded of it is as long as what is encoded of others.
    layer = lens.layers[0]
    read = layer.standardise(output.observed, output.sinks).norm(dim=-1)
    assert read[:, 0].max() < 2 * read[:, 1:].median()
    assert output.phi[:, 0].max() < 10 * output.phi[:, 1:].median()


def test_a_sink_does_not_rule_the_gradient():
    def of_first_tokens(lens):
        """The norm of the gradient that comes from them."""
        torch.manual_seed(0)
        lens.zero_grad()
        lens(some_tokens(4, 20), returns="phi").phi[:, 0].sum().backward()
        return torch.stack([p.grad.norm() for p in lens.parameters() if p.grad is not None]).norm()

    usual = of_first_tokens(make_lens(make_llama()).train())
    lens = make_lens(with_sink(make_llama())).train()
    assert of_first_tokens(lens) < 10 * usual
    lens.layers[0].sink_norm.zero_()  # it knows of no sinks
    assert of_first_tokens(lens) > 1e5 * usual


def test_an_uncalibrated_layer_knows_of_no_sinks():
    lens = make_lens(with_sink(make_llama()), calibrated=False)
    output = lens(some_tokens(2, 20), returns="phi").layer_outputs[0]
    assert lens.layers[0].sink_norm == 0
    assert not output.sinks.any()


def test_what_comes_before_and_beside_decides_nothing():
    """Padding, batches and packs change neither sinks nor phi."""
    lens = make_lens(with_sink(make_llama()))
    tokens = some_tokens(2, 12)
    alone = [lens(row[None], returns="phi") for row in tokens]
    together = lens(tokens, returns="phi")
    for number, one in enumerate(alone):
        torch.testing.assert_close(together.phi[number], one.phi[0])
        assert torch.equal(together.layer_outputs[0].sinks[number], one.layer_outputs[0].sinks[0])


def test_sinks_are_kept_with_the_layer(tmp_path):
    lens = make_lens(with_sink(make_llama()))
    lens.save_pretrained(tmp_path / "adapter")
    again = philens.load(with_sink(make_llama()), tmp_path / "adapter")
    assert torch.equal(again.phi.sink_norm, lens.phi.sink_norm)
    assert lens.phi.sink_norm > 0
    tokens = some_tokens(2, 12)
    assert torch.equal(again(tokens, returns="phi").phi, lens(tokens, returns="phi").phi)


def test_scores_name_sinks_and_leave_them_out_of_means():
    lens = make_lens(with_sink(make_llama()), layer=None, layers=[0, 1])
    scores = philens.score(lens, character_tokenizer(), "hello world", metrics=["phi", "surprisal"])[0]
    assert scores.sinks.tolist() == [True] + [False] * 10
    for path in lens.module_paths:
        column = scores.columns[f"phi@{path}"]
        assert np.isfinite(column).all()  # it is reported
        assert scores.means()[f"phi@{path}"] == pytest.approx(column[1:].mean(), rel=1e-6)
        words = scores.words()
        assert words[f"phi@{path}_sum"][0] == pytest.approx(column[1:5].sum(), rel=1e-5)
    assert scores.means()["surprisal"] == pytest.approx(np.nanmean(scores.columns["surprisal"]))
    again = philens.TokenScores.from_json(scores.to_json())
    assert np.array_equal(again.sinks, scores.sinks)
    older = scores.to_json().replace('"sinks": [0], ', "")
    assert not philens.TokenScores.from_json(older).sinks.any()


def test_evaluation_tells_their_share():
    lens = make_lens(with_sink(make_llama()))
    ids = some_tokens(1, 60)[0].numpy()
    documents = TokenDocuments(ids, np.array([0, 20, 40, 60]), np.ones(60, bool))
    found = record_of(evaluate_text(lens, {"part": documents}, batch_size=2))
    assert found["eval/part/sinks"] == pytest.approx(3 / 60)
    rows = torch.from_numpy(ids).view(3, 20)
    phi = lens(rows, returns="phi").phi[:, 1:].detach().mean()
    assert found["eval/part/phi"] == pytest.approx(float(phi), rel=1e-5)


def test_check_names_them():
    lens = make_lens(with_sink(make_llama()))
    report = lens.check()
    assert report.ok
    assert list(report.points[0].sinks) == [0]
    assert report.points[0].sinks[0] > 100
    assert "token 0 is an attention sink" in str(report)
    assert "calibrate" not in str(report)
    assert "calibrate the layer" in str(make_lens(with_sink(make_llama()), calibrated=False).check())
    assert "sink" not in str(make_lens(make_llama()).check())
