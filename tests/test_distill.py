"""The pressure that keeps the base's own next-token distribution, and pressure on a share of the rows."""

import pytest
import torch
import torch.nn.functional as F

from conftest import make_gpt2, make_llama
from philens import PHiConfig, attach
from philens.lens.passing import Rows
from philens.support.errors import ConfigError, RecipeError
from philens.training.recipe import load_recipe


def make_lens(base=None, **options):
    options = {"pressure": "distill", "mode": "observe", "contrastive_weight": 0.0} | options
    if not options.keys() & {"layers", "module"}:
        options["layer"] = options.get("layer", 1)
    lens = attach(base if base is not None else make_llama(), PHiConfig(init_scale=2.0, **options))
    lens.freeze_base()
    generator = torch.Generator().manual_seed(1)
    for layer in lens.layers:  # fresh layers leave the model as it is
        weight = layer.decoder.weight.data
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return lens


@pytest.fixture
def tokens():
    return torch.randint(3, 128, (4, 12))


def by_definition(lens, tokens, rows):
    """The divergence from whole distributions, with the noise of one draw."""
    with lens.disabled():
        own = lens(tokens).logits.log_softmax(-1)
    lens._observing, was = False, lens._observing
    try:
        other = lens(tokens).logits.log_softmax(-1)
    finally:
        lens._observing = was
    apart = F.kl_div(other, own, reduction="none", log_target=True).sum(-1)
    return apart[rows, :-1].mean()


@pytest.mark.parametrize("mode", ["observe", "bottleneck"])
@pytest.mark.parametrize("returns", ["logits", "states"])
def test_the_divergence_is_that_of_whole_distributions(mode, returns, tokens):
    lens = make_lens(mode=mode).eval()
    expected = by_definition(lens, tokens, slice(None))
    out = lens(tokens, labels=tokens, returns=returns)
    assert expected > 1e-3
    torch.testing.assert_close(out.losses["divergence"], expected, rtol=1e-4, atol=1e-6)
    size = lens.layers[0].latent_size
    torch.testing.assert_close(out.loss, out.losses["divergence"] + out.losses["phi"] / size)


def test_surprisals_beside_it_are_those_of_the_two_models(tokens):
    lens = make_lens(mode="bottleneck").eval()
    out = lens(tokens, labels=tokens, returns="states")
    with lens.disabled():
        base = lens(tokens, labels=tokens).losses["surprisal"]
    path = F.cross_entropy(lens(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.losses["surprisal_base"], base)
    torch.testing.assert_close(out.losses["surprisal"], path)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_its_gradient_is_that_of_the_definition(make, tokens, monkeypatch):
    # In several parts, the last one shorter.
    monkeypatch.setattr("philens.lens.losses.COMPARED_AT_ONCE", 128 * 7)
    lens = make_lens(make()).eval()
    lens(tokens, labels=tokens, returns="states").loss.backward()
    found = {name: p.grad.clone() for name, p in lens.phi.named_parameters() if p.grad is not None}
    lens.zero_grad()
    layer = lens.layers[0]
    phi = lens(tokens, returns="phi").phi.mean() / layer.latent_size
    (by_definition(lens, tokens, slice(None)) + phi).backward()
    assert found.keys() >= {"encoder.weight", "decoder.weight", "prior.mlp.down_proj.weight"}
    for name, grad in found.items():
        torch.testing.assert_close(grad, lens.phi.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def test_heads_that_are_trained_get_their_gradient(tokens):
    lens = make_lens(make_llama(tie_word_embeddings=False)).eval()
    weight = lens.base.get_output_embeddings().weight.requires_grad_(True)
    lens(tokens, labels=tokens, returns="states").loss.backward()
    found, weight.grad = weight.grad.clone(), None
    with lens.disabled(), torch.no_grad():
        own = lens(tokens).logits.log_softmax(-1)
    lens._observing = False
    other = lens(tokens).logits.log_softmax(-1)
    F.kl_div(other, own, reduction="none", log_target=True).sum(-1)[:, :-1].mean().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)


def test_the_base_gets_no_gradient_and_logits_are_those_asked_for(tokens):
    lens = make_lens(mode="bottleneck").eval()
    path = lens(tokens).logits
    out = lens(tokens, labels=tokens)
    torch.testing.assert_close(out.logits, path)
    with lens.disabled():
        assert not torch.equal(out.logits, lens(tokens).logits)
    observing = make_lens()
    torch.testing.assert_close(observing(tokens, labels=tokens).logits, observing.base(tokens).logits)


def test_several_layers_are_compared_with_one_pass_of_the_base(tokens):
    base = make_llama()
    lens = make_lens(base, layers=[0, 1]).eval()
    out = lens(tokens, labels=tokens, returns="states")
    for number, path in enumerate(lens.module_paths):
        single = make_lens(make_llama(), layer=number).eval()
        single.phi.load_state_dict(lens.layers[number].state_dict())
        alone = single(tokens, labels=tokens, returns="states")
        torch.testing.assert_close(out.losses[f"divergence@{path}"], alone.losses["divergence"])
    assert "surprisal_base" in out.losses


@pytest.mark.parametrize("pressure", ["distill", "next_token"])
@pytest.mark.parametrize("mode", ["observe", "bottleneck"])
def test_a_share_of_the_rows_presses_and_all_have_phi(pressure, mode, tokens):
    """Over many draws the share's loss is on average that of all rows."""
    lens = make_lens(pressure=pressure, mode=mode, pressure_share=0.5, inference="mean").train()
    for layer in lens.layers:
        layer.eval()  # no noise: what differs is which rows were drawn
    name = "divergence" if pressure == "distill" else "surprisal"
    found = [lens(tokens, labels=tokens, returns="states") for _ in range(200)]
    values = torch.stack([out.losses[name] for out in found])
    whole = make_lens(pressure=pressure, mode=mode)
    whole.phi.load_state_dict(lens.phi.state_dict())
    expected = whole.eval()(tokens, labels=tokens, returns="states")
    assert values.std() > 0
    assert abs(values.mean() - expected.losses[name]) < 4 * values.std() / 200**0.5
    for out in found[:3]:
        torch.testing.assert_close(out.phi, expected.phi)


def test_blocks_above_run_for_the_share_alone(tokens):
    lens = make_lens(pressure_share=0.25).train()
    rows = []
    lens.base.model.layers[2].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    lens(tokens, labels=tokens, returns="states").loss.backward()
    assert rows == [1, 1]  # the base's own distribution, and the one with the layer in the path


def test_arguments_that_rows_share_stay_whole(monkeypatch):
    """An argument of (T,) with as many tokens as there are rows is no argument of rows."""
    tokens = torch.randint(3, 128, (4, 4))
    lens = make_lens(pressure_share=0.5).train()
    seen = []
    call = lens._call_base
    monkeypatch.setattr(lens, "_call_base", lambda ids, given: seen.append(given) or call(ids, given))
    lens(tokens, labels=tokens, returns="states", cache_position=torch.arange(4))
    assert len(seen) > 1
    assert all(torch.equal(given["cache_position"], torch.arange(4)) for given in seen)
    rows = Rows(torch.tensor([2]), (4, 4))
    mask = torch.zeros(4, 1, 4, 4)
    assert rows.of([mask, torch.arange(4)])[0].shape == (1, 1, 4, 4)


def test_in_evaluation_all_rows_press(tokens):
    lens = make_lens(pressure_share=0.25).eval()
    expected = by_definition(lens, tokens, slice(None))
    torch.testing.assert_close(
        lens(tokens, labels=tokens).losses["divergence"], expected, rtol=1e-4, atol=1e-6
    )


def test_tokens_that_do_not_count_do_not_press(tokens):
    lens = make_lens().eval()
    labels = tokens.clone()
    labels[:, :6] = -100
    labels[1] = -100
    out = lens(tokens, labels=labels, returns="states")
    with lens.disabled():
        own = lens(tokens).logits.log_softmax(-1)
    with torch.no_grad():
        lens._observing = False
        other = lens(tokens).logits.log_softmax(-1)
    apart = F.kl_div(other, own, reduction="none", log_target=True).sum(-1)[[0, 2, 3], 5:-1].mean()
    torch.testing.assert_close(out.losses["divergence"], apart, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ConfigError, match="pressure_share must be above 0 and at most 1"):
        PHiConfig(layer=0, pressure_share=share)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phi.pressure": "distill"}, "distill needs a trained base"),
        (
            {
                "phi.pressure": "distill",
                "model.base": "x/y",
                "model.frozen": False,
                "data.parts": {"a": {"source": "math"}},
            },
            "set model.frozen to true",
        ),
    ],
)
def test_there_must_be_a_base_to_keep(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, {"phi.layer": 0} | changes)
