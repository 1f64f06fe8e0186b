"""Observing: the base's outputs stay its own, phi is that of the path, layers do not disturb each other, and
what need not run does not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, MambaConfig

import philens.lens.losses
from conftest import make_gpt2, make_llama
from philens.lens.config import PHiConfig
from philens.lens.losses import logits_in_parts, token_surprisal
from philens.lens.model import attach
from philens.support.errors import ConfigError, InputError

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    # These change logits after the head.
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.5, pad_token_id=0),
    "mamba": lambda: MambaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=4, state_size=8, initializer_range=0.2
    ),
}


def make(name):
    if name in CONFIGS:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    sizes = {"num_hidden_layers": 4} if name == "llama" else {"n_layer": 4}
    return {"llama": make_llama, "gpt2": make_gpt2}[name](**sizes)


def shaken(base, **options):
    """With the same weights for the same insertion point, whichever else there are."""
    lens = attach(base, PHiConfig(**({"prior_heads": 2} | options)))
    for path, layer in zip(lens.module_paths, lens.layers, strict=True):
        generator = torch.Generator().manual_seed(int(path.rsplit(".", 1)[1]))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.3, generator=generator)
    return lens.eval()


def in_the_path(base, layer, **options):
    return shaken(base, layer=layer, **options)


def observing(base, layers, **options):
    return shaken(base, layers=layers, mode="observe", **options)


@pytest.fixture
def tokens():
    return torch.randint(128, (3, 9), generator=torch.Generator().manual_seed(2))


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def batches(tokens):
    """Plain, padded and packed."""
    mask = torch.ones_like(tokens)
    mask[1, 4:], mask[2, 1:] = 0, 0
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4]).expand(3, 9)
    return {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": positions}}


# Outputs and phi


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba"])
@torch.no_grad()
def test_outputs_are_those_of_the_base_bit_for_bit(name, tokens):
    base = make(name)
    plain, given = base(tokens), base(tokens, attention_mask=batches(tokens)["padded"]["attention_mask"])
    lens = observing(base, [0, 2, -1])
    for mode in (lens.eval, lambda: lens.train() and base.eval()):
        mode()
        out = lens(tokens)
        assert torch.equal(out.logits, plain.logits)
        assert torch.equal(lens(tokens, **batches(tokens)["padded"]).logits, given.logits)
        assert torch.equal(base(tokens).logits, plain.logits)
    assert out.phi.shape == (3, 9, 3)
    assert [output.phi.shape for output in out.layer_outputs] == [(3, 9)] * 3
    assert torch.equal(out.phi, torch.stack([output.phi for output in out.layer_outputs], -1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
@torch.no_grad()
def test_phi_is_that_of_the_path_and_layers_do_not_disturb_each_other(name, tokens):
    base = make(name)
    given = {kind: kwargs for kind, kwargs in batches(tokens).items() if (name, kind) != ("mamba", "packed")}
    alone = []
    for layer in (0, 2, 3):
        lens = in_the_path(base, layer)
        alone.append({kind: lens(tokens, **kwargs).phi for kind, kwargs in given.items()})
        lens.detach()
        lens = shaken(base, layer=layer, mode="observe")
        for kind, kwargs in given.items():
            assert torch.equal(lens(tokens, **kwargs).phi, alone[-1][kind])
        lens.detach()
    lens = observing(base, [3, 0, 2])
    for kind, kwargs in given.items():
        for returns in ("logits", "states", "phi"):
            phi = lens(tokens, returns=returns, **kwargs).phi
            assert torch.equal(phi, torch.stack([alone[i][kind] for i in (2, 0, 1)], -1))


@torch.no_grad()
def test_caches_of_several_priors(tokens):
    lens = observing(make("llama"), [0, 2], prior_depth=2)
    first = lens(tokens[:, :4], use_cache=True)
    second = lens(tokens[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat((first.phi, second.phi), 1), lens(tokens).phi, 1e-4)


def test_layers_are_numbered_as_given_and_named_once():
    base = make("llama")
    assert observing(base, [3, 0, -2]).module_paths == ["model.layers.3", "model.layers.0", "model.layers.2"]
    with pytest.raises(ConfigError, match="name the same block twice"):
        attach(make("llama"), PHiConfig(layers=[3, -1], mode="observe", prior_heads=2))
    with pytest.raises(ConfigError, match='set mode="observe"'):
        PHiConfig(layers=[0, 1])


# Losses


def gradients_of(lens):
    return [
        {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        for layer in lens.layers
    ]


def learn(lens, tokens, **kwargs):
    lens.freeze_base()
    lens.zero_grad()
    torch.manual_seed(7)
    out = lens.train()(tokens, labels=tokens, **kwargs)
    out.loss.backward()
    found = gradients_of(lens)
    assert all(p.grad is None for p in lens.base.parameters())
    return out, found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("returns", ["logits", "states"])
def test_each_layer_learns_as_it_would_alone_in_the_path(name, returns, tokens):
    """Without noise, which several layers would draw one after the other."""
    base, options = make(name), {"bottleneck": False}
    kinds = [kind for kind in batches(tokens) if (name, kind) != ("mamba", "packed")]
    alone = {}
    for layer in (0, 2, 3):
        lens = in_the_path(base, layer, **options)
        for kind in kinds:
            alone[layer, kind] = learn(lens, tokens, returns=returns, **batches(tokens)[kind])
        lens.detach()
    with torch.no_grad():
        base_losses = {kind: lens(tokens, labels=tokens, **batches(tokens)[kind]).losses for kind in kinds}
    lens = observing(base, [0, 2, 3], **options)
    for kind in kinds:
        out, found = learn(lens, tokens, returns=returns, **batches(tokens)[kind])
        close(out.losses["surprisal_base"], base_losses[kind]["surprisal"])
        total = 0.0
        for path, gradients, layer in zip(lens.module_paths, found, (0, 2, 3), strict=True):
            expected, expected_gradients = alone[layer, kind][0], alone[layer, kind][1][0]
            close(out.losses[f"surprisal@{path}"], expected.losses["surprisal"])
            close(out.losses[f"phi@{path}"], expected.losses["phi"])
            assert gradients.keys() == expected_gradients.keys()
            for parameter, gradient in gradients.items():
                scale = expected_gradients[parameter].abs().max()
                close(gradient / scale, expected_gradients[parameter] / scale, 1e-4)
            total += expected.loss.detach()
        close(out.loss.detach(), total)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_layer_learns_as_in_the_path_with_the_same_noise(name, tokens):
    base = make(name)
    lens = in_the_path(base, 1)
    expected, expected_gradients = learn(lens, tokens)
    lens.detach()
    out, found = learn(shaken(base, layer=1, mode="observe"), tokens)
    close(out.loss, expected.loss)
    assert out.losses.keys() == {"surprisal_base", "surprisal", "phi", "contrastive"}
    for key in ("surprisal", "phi", "contrastive"):
        close(out.losses[key], expected.losses[key])
    for key, gradient in found[0].items():
        close(gradient, expected_gradients[0][key], 1e-4)


def test_losses_add_up_as_documented(tokens):
    lens = observing(
        make("llama"), [0, 2], phi_weight=0.5, pressure="reconstruction", reconstruction_weight=3.0
    )
    out = lens(tokens, labels=tokens)
    parts, total = out.losses, 0.0
    for path, output in zip(lens.module_paths, out.layer_outputs, strict=True):
        total += 0.5 / 32 * parts[f"phi@{path}"] + 0.1 * parts[f"contrastive@{path}"]
        total += 3.0 * parts[f"reconstruction@{path}"]
        target, found = output.observed.flatten(0, 1), output.hidden_states.flatten(0, 1)
        lost = (found - target).square().mean(0) / target.var(0, correction=0)
        close(parts[f"reconstruction@{path}"], lost.mean().detach())
    close(out.loss.detach(), total)
    # What it would be with the layer in the path is told, but does not press.
    for layer, path in zip((0, 2), lens.module_paths, strict=True):
        lens.detach()
        alone = in_the_path(lens.base, layer)
        close(parts[f"surprisal@{path}"], alone(tokens, labels=tokens).losses["surprisal"])
        alone.detach()
    close(parts["surprisal_base"], lens(tokens, labels=tokens).losses["surprisal"])


def test_nothing_flows_below_an_observing_layer(tokens):
    base = make("llama")
    for pressure in ("next_token", "reconstruction"):
        lens = observing(base, [1], pressure=pressure).train()
        lens.zero_grad()
        lens(tokens, labels=tokens).loss.backward()
        for number, block in enumerate(base.model.layers):
            reached = any(p.grad is not None for p in block.parameters())
            # Above, gradients reach an unfrozen base where the layer is in the path of the second pass.
            assert reached == (pressure == "next_token" and number > 1)
        lens.detach()


# What runs


def count_calls(lens):
    calls = {}
    modules = {f"block {i}": block.mlp for i, block in enumerate(lens.base.model.layers)}
    modules["head"] = lens.base.lm_head
    modules |= {f"layer {i}": layer for i, layer in enumerate(lens.layers)}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    return calls


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_below_run_once(checkpointing, tokens):
    lens = observing(make("llama"), [0, 2])
    lens.freeze_base()
    if checkpointing:
        lens.checkpoint_activations()
    calls = count_calls(lens)
    lens(tokens, labels=tokens)
    # Once all; then those above block 0, and those above block 2.
    blocks = {f"block {i}": count for i, count in enumerate([1, 2, 2, 3])}
    assert {name: n for name, n in calls.items() if name != "head"} == blocks | {"layer 0": 1, "layer 1": 1}


def test_blocks_run_as_before_after_a_loss(tokens):
    base = make("llama")
    with torch.no_grad():
        plain = base(tokens).logits
    lens = observing(base, [0, 2]).train()
    lens(tokens, labels=tokens).loss.backward()
    assert torch.equal(lens(tokens).logits, plain)
    assert not any("forward" in module.__dict__ for module in base.modules())


def test_training_to_reconstruct_needs_nothing_above_the_layers(tokens):
    lens = observing(make("llama"), [0, 1], pressure="reconstruction")
    calls = count_calls(lens)
    out = lens.train()(tokens, labels=tokens, returns="states")
    assert calls == {"block 0": 1, "block 1": 1, "layer 0": 1, "layer 1": 1}
    assert not any(key.startswith("surprisal") for key in out.losses)
    with pytest.raises(InputError, match="There are no logits"):
        out.logits_at(slice(0, 1))
    out.loss.backward()
    assert all(p.grad is None for p in lens.base.parameters())
    # An evaluation tells the surprisals all the same.
    out = lens.eval()(tokens, labels=tokens, returns="states")
    assert {key.split("@")[0] for key in out.losses} >= {"surprisal", "surprisal_base", "reconstruction"}


def test_only_phi_stops_at_the_deepest_layer(tokens):
    lens = observing(make("llama"), [2, 0])
    calls = count_calls(lens)
    out = lens(tokens, returns="phi")
    assert calls == {"block 0": 1, "block 1": 1, "block 2": 1, "layer 0": 1, "layer 1": 1}
    assert out.logits is None
    with pytest.raises(InputError, match='after returns="phi"'):
        token_surprisal(out, tokens)


# Training


@pytest.fixture(scope="module")
def trained():
    """A small model that has learnt to copy: random letters, each text twice."""
    torch.manual_seed(0)
    base = make_llama(num_hidden_layers=2, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(40, (16, 8)).repeat(1, 2)
        loss = base(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base.eval()


def fit(base, steps=80, **options):
    torch.manual_seed(0)
    settings = {"layer": 0, "mode": "observe", "pressure": "reconstruction", "prior_heads": 2}
    lens = attach(base, PHiConfig(**(settings | {"init": "random", "contrastive_weight": 0.0} | options)))
    lens.freeze_base()
    lens.train()
    optimizer, history = torch.optim.AdamW(lens.phi.parameters(), lr=1e-2, weight_decay=0.0), []
    for _ in range(steps):
        ids = torch.randint(40, (16, 8)).repeat(1, 2)
        out = lens(ids, labels=ids, returns="states")
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({key: float(value) for key, value in out.losses.items()})
    lens.detach()
    return history


def test_reconstruction_keeps_phi_from_collapsing(trained):
    plain = {name: value.clone() for name, value in trained.state_dict().items()}
    history = fit(trained)
    assert history[0]["reconstruction"] > 0.9
    assert history[-1]["reconstruction"] < 0.5 * history[0]["reconstruction"]
    assert history[-1]["phi"] > 5
    without = fit(trained, reconstruction_weight=0.0)
    assert without[-1]["phi"] < 0.1 * history[-1]["phi"]
    assert without[-1]["reconstruction"] > 0.9
    more = fit(trained, reconstruction_weight=4.0)
    assert more[-1]["phi"] > history[-1]["phi"]
    assert more[-1]["reconstruction"] < history[-1]["reconstruction"]
    assert all(torch.equal(value, plain[name]) for name, value in trained.state_dict().items())


# Cross-entropy in parts


class MadeLogits(TorchDispatchMode):
    """Notes how many rows of logits every product with the head's weights makes."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.rows = head.weight, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # One position of several texts is a batched product until torch 2.14, a plain one since.
        products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        if func in products and args[1].data_ptr() == self.weight.data_ptr():
            self.rows += [out[..., 0].numel()] * (out.shape[-1] == len(self.weight))
        return out


def in_parts(monkeypatch, lens, tokens, positions, **kwargs):
    """Losses and gradients with few rows of logits at once, and how many the products made."""
    monkeypatch.setattr(philens.lens.losses, "LOGITS_AT_ONCE", positions * 128)
    with MadeLogits(lens.base.get_output_embeddings()) as made:
        found = learn(lens, tokens, returns="states", **kwargs)
    return *found, made.rows


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("positions", [4, 7, 1000])
@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_cross_entropy_in_parts_equals_the_whole(monkeypatch, name, positions, kind, tokens):
    lens, kwargs = in_the_path(make(name), 1), batches(tokens)[kind]
    expected, expected_gradients = learn(lens, tokens, **kwargs)
    out, gradients, made = in_parts(monkeypatch, lens, tokens, positions, **kwargs)
    close(out.loss, expected.loss)
    assert out.logits is None
    for key, gradient in gradients[0].items():
        close(gradient, expected_gradients[0][key], 1e-4)
    # The backward pass does not make them again. Before, two passes make those of the last position.
    count = tokens.numel()
    assert made[:2] == [len(tokens)] * 2
    assert made[2:] == [min(positions, count - start) for start in range(0, count, positions)]
    monkeypatch.setattr(philens.lens.losses, "POSITIONS_AT_ONCE", positions)
    logits = lens.eval()(tokens).logits
    output = lens(tokens, returns="states")
    close(torch.cat([part for _, part in logits_in_parts(output, torch.arange(27))]), logits.flatten(0, 1))
    expected = -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    found = token_surprisal(output, tokens)
    assert found[:, 0].isnan().all()
    close(found[:, 1:], expected)


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_logits_changed_after_the_head_are_right_too(monkeypatch, name, tokens):
    lens = in_the_path(make(name), 1, bottleneck=False)
    expected, expected_gradients = learn(lens, tokens)
    for _ in range(2):  # it is found out the first time, known the second
        out, gradients, _ = in_parts(monkeypatch, lens, tokens, 4)
        close(out.loss, expected.loss)
        close(out.phi, expected.phi)
        for key, gradient in gradients[0].items():
            close(gradient, expected_gradients[0][key], 1e-4)
    with torch.no_grad():
        states, logits = lens.eval()(tokens, returns="states"), lens(tokens).logits
    close(states.logits_at(slice(2, 5)), logits[:, 2:5])


@pytest.mark.parametrize("name", ["gemma2", "llama"])
@torch.no_grad()
def test_states_with_a_cache(name, tokens):
    lens = in_the_path(make(name), 1)
    expected = lens(tokens)
    first = lens(tokens[:, :5], returns="states", use_cache=True)
    second = lens(tokens[:, 5:], returns="states", past_key_values=first.past_key_values)
    close(torch.cat((first.phi, second.phi), 1), expected.phi, 1e-4)
    logits = [out.logits_at(slice(0, 9)) for out in (first, second)]
    close(torch.cat(logits, 1), expected.logits, 1e-4)


def test_logits_in_half_precision_are_made_in_parts(tokens):
    """Mamba gives logits in float32 whatever its weights are: that is no change of them."""
    lens = in_the_path(make("mamba").bfloat16(), 1)
    assert lens(tokens, returns="states").logits is None
