"""The PHi layer: agreement with other implementations, invariances, options and errors."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from philens.lens.config import PHiConfig
from philens.lens.divergence import contrastive_loss, gaussian_kl, official_kl
from philens.lens.latents import Gaussian
from philens.lens.layer import PHiLayer
from philens.support.errors import ConfigError, InputError, PhilensError

GOLDEN = Path(__file__).parent / "golden" / "phi_layer_official.safetensors"
KEYS = {
    "weight.encoder": "encoder.weight",
    "weight.decoder": "decoder.weight",
    "weight.initial": "prior.start",
    "weight.prior_norm": "prior.norm.weight",
    "weight.prior_gate": "prior.mlp.gate_proj.weight",
    "weight.prior_up": "prior.mlp.up_proj.weight",
    "weight.prior_out": "prior.mlp.down_proj.weight",
    "bias.prior_gate": "prior.mlp.gate_proj.bias",
    "bias.prior_up": "prior.mlp.up_proj.bias",
    "bias.prior_out": "prior.mlp.down_proj.bias",
}
D = 16
PRIORS = {
    "attention": PHiConfig(init="random", prior_heads=2),
    "deep": PHiConfig(init="random", prior_heads=2, prior_depth=2),
    "mlp": PHiConfig(init="random", prior="mlp"),
    "unit": PHiConfig(init="random", prior="unit"),
    "no_bottleneck": PHiConfig(init="random", prior_heads=2, bottleneck=False),
    "official": PHiConfig(init="random", prior_heads=2, kl="official"),
    "codes": PHiConfig(init="random", prior_heads=2, codebooks=3, codes=8),
    "one_codebook": PHiConfig(init="random", prior="mlp", codebooks=1, codes=8),
}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def make_layer(config, size=D):
    """A layer with weights large enough that every part of it matters, in evaluation mode."""
    layer = PHiLayer(size, config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=2 / math.sqrt(size))
    return layer


def foretold(out):
    """(B, T, numbers) that the prior has of each token before it comes."""
    return out.prior[0][..., 0, :] if out.prior[0].ndim == 4 else out.prior[0]


@pytest.fixture(params=sorted(PRIORS))
def layer(request):
    return make_layer(PRIORS[request.param])


# Agreement with other implementations


@pytest.fixture
def golden():
    return load_file(GOLDEN)


def golden_layer(golden, kl):
    layer = PHiLayer(24, PHiConfig(prior="mlp", prior_mlp_size=40, kl=kl)).eval()
    weights = {KEYS[name]: value for name, value in golden.items() if name in KEYS}
    # The released layer reads hidden states as they are.
    layer.load_state_dict(
        weights | {"shift": torch.zeros(24), "scale": torch.ones(24), "sink_norm": torch.zeros(())},
        strict=True,
    )
    return layer


@pytest.mark.parametrize("kl", ["exact", "official"])
def test_agrees_with_the_released_layer(golden, kl):
    real = golden["input.padding"] == 0
    out = golden_layer(golden, kl)(golden["input.hidden_states"], real)
    assert 0 < real.sum() < real.numel()
    for name in ("posterior_mean", "posterior_logvar", "hidden_states"):
        close(getattr(out, name), golden[f"output.{name}"])
    for name in ("prior_mean", "prior_logvar"):
        # Behind left padding the released code predicts from the padding; here a document starts afresh.
        close(getattr(out, name)[real], golden[f"output.{name}"][real])
    if kl == "exact":
        close(out.phi[real], golden["output.phi_exact_nats"].float()[real])
    else:
        close(out.phi[real] / 24, golden["output.phi_official_mean_over_dims"][real])
    assert (out.phi[~real] == 0).all()


def test_contrastive_loss_agrees_with_the_released_layer(golden):
    real = golden["input.padding"] == 0
    out = golden_layer(golden, "official")(golden["input.hidden_states"], real)
    close(out.contrastive[real].mean()[None], golden["output.contrastive_loss"])
    exact = golden_layer(golden, "exact")(golden["input.hidden_states"], real)
    assert (exact.contrastive[real].mean() - golden["output.contrastive_loss"]).abs() > 1e-4


def slow_prior(weights, z, heads, depth):
    """The prior of one document's latents (T, L) written out, token by token, in float64."""
    weights = {name.removeprefix("prior."): value.double() for name, value in weights.items()}

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotate(vector, place):
        """Channels i and i + half are one complex number, turned by the place at frequency i."""
        half = len(vector) // 2
        angles = place * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half).double(), angles)
        return torch.cat((turned.real, turned.imag))

    def attention(x, path):
        q, k, v = (x @ weights[f"{path}attention.{name}_proj.weight"].T for name in "qkv")
        rows = []
        for t in range(len(x)):
            parts = []
            for channels in torch.arange(x.shape[1]).chunk(heads):
                query = rotate(q[t, channels], t)
                keys = torch.stack([rotate(k[s, channels], s) for s in range(t + 1)])
                share = (keys @ query / math.sqrt(len(channels))).softmax(0)
                parts.append(share @ v[: t + 1, channels])
            rows.append(torch.cat(parts))
        return torch.stack(rows) @ weights[f"{path}attention.o_proj.weight"].T

    def mlp(x, path):
        gate, up, down = (
            lambda x, name=name: (
                x @ weights[f"{path}mlp.{name}_proj.weight"].T + weights[f"{path}mlp.{name}_proj.bias"]
            )
            for name in ("gate", "up", "down")
        )
        return down(gate(x) * gate(x).sigmoid() * up(x))

    x = norm(torch.cat((weights["start"][0], z.double()[:-1])))
    for block in range(depth - 1):
        path = f"blocks.{block}."
        x = x + attention(x, path)
        x = norm(x + mlp(norm(x) * weights[f"{path}norm.weight"], path))
    x = x + attention(x, "")
    return mlp(norm(x) * weights["norm.weight"], "")


@pytest.mark.parametrize("name", ["attention", "deep"])
def test_the_prior_is_that_of_a_literal_implementation(name):
    config = PRIORS[name]
    layer = make_layer(replace(config, logvar_min=-100.0, logvar_max=100.0))
    out = layer(torch.randn(1, 6, D))
    weights = layer.prior.state_dict()
    mean, logvar = slow_prior(weights, out.latent[0], config.prior_heads, config.prior_depth).chunk(2, -1)
    close(out.prior_mean[0].double(), mean, 1e-4)
    close(out.prior_logvar[0].double(), logvar, 1e-4)


def random_gaussians(shape, spread):
    mean_q, logvar_q = torch.randn(shape), torch.empty(shape).uniform_(-5, 10)
    logvar_p = (logvar_q + spread * torch.randn(shape)).clamp(-5, 10)
    mean_p = mean_q + spread * torch.exp(0.5 * logvar_q) * torch.randn(shape)
    return mean_q, logvar_q, mean_p, logvar_p


@pytest.mark.parametrize("spread", [3.0, 1.0, 0.1, 1e-2, 1e-3])
def test_kl_is_that_of_torch_distributions(spread):
    statistics = random_gaussians((200, 64), spread)
    mean_q, logvar_q, mean_p, logvar_p = (x.double() for x in statistics)
    q, p = Normal(mean_q, torch.exp(0.5 * logvar_q)), Normal(mean_p, torch.exp(0.5 * logvar_p))
    # In float32 the naive formula is off by whole percents where the divergence is tiny.
    expected = kl_divergence(q, p).sum(-1)
    torch.testing.assert_close(gaussian_kl(*statistics).double(), expected, rtol=1e-5, atol=0)


def test_kl_of_equals_is_exactly_zero():
    mean, logvar = torch.randn(5, 8), torch.randn(5, 8)
    assert (gaussian_kl(mean, logvar, mean, logvar) == 0).all()


def test_official_kl_is_the_formula_of_the_design():
    mean_q, logvar_q, mean_p, logvar_p = random_gaussians((50, 8), 0.5)
    squared = (mean_p - mean_q) ** 2 / logvar_q.exp()
    expected = (logvar_p - logvar_q) + 0.5 * (torch.exp(2 * (logvar_q - logvar_p)) + squared - 1)
    close(official_kl(mean_q, logvar_q, mean_p, logvar_p), expected.sum(-1))


def slow_contrastive(z, mean, logvar, negatives):
    """The released code's way, (B, B, T, L): every latent under every row's posterior, in float64."""
    z, mean, logvar = z.double(), mean.double(), logvar.double()
    density = Normal(mean[None], torch.exp(0.5 * logvar)[None])
    scores = density.log_prob(z[:, None]).sum(-1)  # (b, c, T): latent of row b, posterior of row c
    own = torch.eye(len(z), dtype=torch.bool)[:, :, None]
    scores = scores.masked_fill(~(own | negatives[:, None, :]), -torch.inf)
    return -torch.diagonal(scores.log_softmax(0), dim1=0, dim2=1).T


@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_loss_is_that_of_a_literal_implementation(masked):
    mean, logvar = 3 + torch.randn(5, 7, 6), torch.randn(5, 7, 6)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    negatives = torch.rand(5, 7) < 0.5 if masked else torch.ones(5, 7, dtype=torch.bool)
    fast = contrastive_loss(z, mean, logvar, negatives if masked else None)
    expected = slow_contrastive(z, mean, logvar, negatives)
    assert expected.max() > 0.1
    close(fast, expected)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # A view that repeats its data costs none: what is counted is storage.
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.largest = max(self.largest, elements)
        return out


def test_contrastive_memory_has_no_factor_of_the_latent_size():
    rows, length, size = 12, 10, 64
    z, mean, logvar = (torch.randn(rows, length, size, requires_grad=True) for _ in range(3))
    with LargestTensor() as memory:
        contrastive_loss(z, mean, logvar).sum().backward()
    assert memory.largest <= max(rows * length * size, rows * rows * length)
    with LargestTensor() as memory:
        slow_contrastive(z, mean, logvar, torch.ones(rows, length, dtype=torch.bool))
    assert memory.largest >= rows * rows * length * size


# The file format

ALWAYS = {"encoder.weight", "decoder.weight", "shift", "scale", "sink_norm"}
WITH_PRIOR = (
    ALWAYS
    | {"prior.start", "prior.norm.weight"}
    | {f"prior.mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")}
)
WITH_ATTENTION = WITH_PRIOR | {f"prior.attention.{name}_proj.weight" for name in "qkvo"}


def test_state_dict_keys():
    keys = {name: set(PHiLayer(D, config).state_dict()) for name, config in PRIORS.items()}
    assert keys["attention"] == keys["official"] == keys["no_bottleneck"] == WITH_ATTENTION
    assert keys["mlp"] == WITH_PRIOR
    assert keys["unit"] == ALWAYS
    code = {"codes.vectors", "codes.outputs", "codes.bias"}
    assert keys["one_codebook"] == WITH_PRIOR | code
    assert keys["codes"] == WITH_ATTENTION | code | {"codes.before"}
    assert keys["deep"] > WITH_ATTENTION
    assert all(key.startswith("prior.blocks.0.") for key in keys["deep"] - WITH_ATTENTION)
    deeper = PHiLayer(D, replace(PRIORS["deep"], prior_depth=4))
    assert {key.split(".")[2] for key in deeper.state_dict() if "blocks" in key} == {"0", "1", "2"}


# Calibration


@pytest.mark.parametrize("factor", [0.01, 1.0, 300.0])
def test_a_calibrated_layer_does_not_see_how_large_hidden_states_are(factor):
    torch.manual_seed(3)
    small = torch.randn(4, 50, D) * torch.rand(D).add(0.1)
    states = factor * small + 5 * factor
    layer, plain = PHiLayer(D, PHiConfig(prior_heads=2)), PHiLayer(D, PHiConfig(prior_heads=2))
    plain.load_state_dict(layer.state_dict())
    flat = states.flatten(0, 1)
    layer.calibrate(flat.mean(0), flat.std(0, correction=0))
    flat = small.flatten(0, 1)
    out, expected = layer.eval()(states), plain.eval()((small - flat.mean(0)) / flat.std(0, correction=0))
    torch.testing.assert_close(out.phi, expected.phi, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out.hidden_states, states, rtol=1e-4, atol=1e-4 * factor)  # near identity
    assert float(out.posterior_mean.detach().std()) == pytest.approx(8.0, rel=0.02)  # init_scale


def test_a_dimension_that_never_changes_is_not_blown_up():
    layer = PHiLayer(D, PHiConfig(prior_heads=2))
    layer.calibrate(torch.zeros(D), torch.ones(D).index_fill(0, torch.tensor([0]), 0.0))
    assert layer.scale[0] == pytest.approx(1e-3)
    assert torch.isfinite(layer(torch.randn(1, 5, D)).phi).all()


# Invariances: nothing but a token's own document, up to the token, may change its phi


def states(*lengths, size=D):
    return [torch.randn(length, size) for length in lengths]


def test_phi_has_the_promised_form(layer):
    out = layer(torch.randn(3, 5, D))
    assert out.phi.shape == (3, 5)
    assert out.phi.dtype == torch.float32
    assert out.hidden_states.shape == (3, 5, D)
    assert out.phi_standard_error is None
    if layer.config.kl == "exact":
        assert (out.phi > 0).all()


def test_a_document_in_a_pack_equals_it_alone(layer):
    documents = states(4, 1, 6, 3)
    ids = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])[None]
    packed = layer(torch.cat(documents)[None], None, ids)
    alone = [layer(d[None]) for d in documents]
    close(packed.phi[0], torch.cat([a.phi[0] for a in alone]))
    close(packed.hidden_states[0], torch.cat([a.hidden_states[0] for a in alone]))


def test_document_ids_may_repeat_elsewhere_and_need_not_be_ordered(layer):
    documents = states(3, 2, 4)
    for numbers in ([0, 1, 2], [7, 0, 7]):
        ids = torch.cat([torch.full((len(d),), i) for i, d in zip(numbers, documents, strict=True)])[None]
        phi = layer(torch.cat(documents)[None], None, ids).phi[0]
        close(phi, torch.cat([layer(d[None]).phi[0] for d in documents]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_padding_on_either_side_changes_nothing(layer, side, dtype):
    documents = states(4, 7, 1)
    width = 9
    rows, mask = torch.randn(3, width, D) * 5, torch.zeros(3, width, dtype=torch.bool)
    for row, document in enumerate(documents):
        place = slice(width - len(document), None) if side == "left" else slice(len(document))
        rows[row, place], mask[row, place] = document, True
    out = layer(rows, mask.to(dtype))
    assert (out.phi[~mask] == 0).all()
    assert out.contrastive is None or (out.contrastive[~mask] == 0).all()
    close(out.phi[mask], torch.cat([layer(d[None]).phi[0] for d in documents]))


def test_padding_in_a_pack_is_not_read(layer):
    first, second = states(3, 4)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    phi = layer(torch.cat((first, second, states(1)[0]))[None], mask, ids).phi[0]
    close(phi[:-1], torch.cat([layer(d[None]).phi[0] for d in (first, second)]))
    assert phi[-1] == 0


def test_batch_size_changes_nothing(layer):
    rows = torch.randn(8, 5, D)
    close(layer(rows).phi, torch.cat([layer(row[None]).phi for row in rows]))


def test_later_tokens_change_nothing(layer):
    rows = torch.randn(2, 6, D)
    changed = rows.clone()
    changed[:, 4:] = torch.randn(2, 2, D)
    before, after = layer(rows), layer(changed)
    close(before.phi[:, :4], after.phi[:, :4])
    close(foretold(before)[:, :5], foretold(after)[:, :5])
    assert not torch.allclose(before.phi[:, 4:], after.phi[:, 4:])


REACH = {"attention": 5, "deep": 5, "mlp": 1, "unit": 0, "codes": 5, "one_codebook": 1}


@pytest.mark.parametrize(("name", "reach"), REACH.items())
def test_the_prior_sees_as_far_back_as_it_says(name, reach):
    layer = make_layer(PRIORS[name])
    hidden_states = torch.randn(1, 6, D, requires_grad=True)
    # The decoder's output, at weight 0, makes the input part of the graph whatever the prior reads.
    out = layer(hidden_states)
    (foretold(out)[0, 5].square().sum() + 0 * out.hidden_states.sum()).backward()
    seen = hidden_states.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [5 - reach <= place < 5 for place in range(6)]


def test_padding_is_no_negative_example():
    layer = make_layer(PRIORS["attention"])
    rows, mask = torch.randn(4, 3, D), torch.ones(4, 3)
    mask[2:, 1:] = 0
    other = rows.clone()
    other[2:, 1:] = torch.randn(2, 2, D)
    close(layer(rows, mask).contrastive, layer(other, mask).contrastive)
    close(layer(rows, mask).contrastive[:2, 1:], layer(rows[:2]).contrastive[:, 1:])


# Options


@pytest.mark.parametrize("size", [8, 16, 24])
def test_latent_size(size):
    layer = PHiLayer(D, PHiConfig(latent_size=size, init="random", prior_heads=2))
    out = layer(torch.randn(2, 3, D))
    assert out.latent.shape == out.prior_mean.shape == out.posterior_logvar.shape == (2, 3, size)
    assert out.hidden_states.shape == (2, 3, D)
    assert PHiConfig(latent_size=size).latent_width(D) == size
    assert PHiConfig().latent_width(D) == D


def test_a_larger_latent_may_start_near_identity():
    layer = PHiLayer(D, PHiConfig(latent_size=24, prior_heads=2)).eval()
    rows = torch.randn(2, 3, D)
    close(layer(rows).hidden_states, rows)


def test_prior_sizes():
    layer = PHiLayer(128, PHiConfig(prior_mlp_size=50))
    assert layer.prior.mlp.gate_proj.weight.shape == (50, 128)
    assert layer.prior.attention.heads == 2
    assert PHiLayer(128, PHiConfig(prior_heads=8)).prior.attention.heads == 8
    assert PHiLayer(128, PHiConfig()).prior.mlp.gate_proj.out_features == pytest.approx(128 * 8 / 3, abs=8)


def test_unit_prior_is_the_unit_gaussian():
    out = make_layer(PRIORS["unit"])(torch.randn(2, 3, D))
    q = Normal(out.posterior_mean, torch.exp(0.5 * out.posterior_logvar))
    close(out.phi, kl_divergence(q, Normal(0.0, 1.0)).sum(-1))


def test_no_bottleneck_is_half_the_squared_error():
    layer = make_layer(PRIORS["no_bottleneck"]).train()
    out = layer(torch.randn(2, 3, D))
    close(out.latent, out.posterior_mean)  # deterministic, in training too
    close(out.phi, 0.5 * (out.posterior_mean - out.prior_mean).square().sum(-1))
    assert out.contrastive is None


def test_what_gaussian_latents_can_tell():
    latents, counted = PHiLayer(2, PHiConfig()).latents, torch.ones(3, 50, dtype=torch.bool)
    logvar = torch.zeros(3, 50, 2)
    assert latents.carried(Gaussian(torch.ones(3, 50, 2), logvar), counted) == 0
    told = Gaussian(torch.randn(3, 50, 2), logvar)
    expected = 0.5 * (1 + told.mean.flatten(0, 1).var(0, correction=0)).log().sum()
    close(latents.carried(told, counted), expected)
    close(latents.untold(told), kl_divergence(Normal(told.mean, 1.0), Normal(0.0, 1.0)).sum(-1))


def test_log_variances_are_clamped():
    layer = make_layer(replace(PRIORS["attention"], logvar_min=-0.5, logvar_max=0.25))
    out = layer(torch.randn(4, 8, D))
    for logvar in (out.posterior_logvar, out.prior_logvar):
        assert logvar.min() == -0.5
        assert logvar.max() == 0.25
    default = make_layer(PRIORS["attention"])(100 * torch.randn(4, 8, D))
    assert (default.posterior_logvar.min(), default.posterior_logvar.max()) == (-5, 10)


def encoder_gradient(layer, loss):
    gradient = torch.autograd.grad(loss, layer.encoder.weight, allow_unused=True, retain_graph=True)[0]
    return 0.0 if gradient is None else gradient.abs().max().item()


def test_detached_input_gives_no_gradient_below():
    for detached in (False, True):
        layer = make_layer(replace(PRIORS["attention"], detach_input=detached)).train()
        rows = torch.randn(2, 3, D, requires_grad=True)
        out = layer(rows)
        (out.phi.sum() + out.hidden_states.sum() + out.contrastive.sum()).backward()
        assert (rows.grad is None) == detached
        assert layer.encoder.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["attention", "codes"])
def test_detached_targets_give_phi_no_gradient_to_what_it_predicts(name):
    for detached in (False, True):
        layer = make_layer(replace(PRIORS[name], detach_targets=detached)).train()
        out = layer(torch.randn(2, 1, D))  # one token: nothing but the target leads back to the encoder
        assert (encoder_gradient(layer, out.phi.sum()) == 0) == detached
        assert encoder_gradient(layer, out.hidden_states.sum()) > 0
        out = layer(torch.randn(2, 4, D))
        assert encoder_gradient(layer, out.phi.sum()) > 0  # by way of the latents the prior reads


def test_gradients_reach_every_parameter(layer):
    layer.train()
    out = layer(torch.randn(3, 4, D))
    loss = out.phi.mean() + out.hidden_states.square().mean()
    (loss if out.contrastive is None else loss + out.contrastive.mean()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_training_samples_and_evaluation_does_not():
    layer = make_layer(PRIORS["attention"])
    rows = torch.randn(2, 3, D)
    close(layer(rows).latent, layer(rows).posterior_mean, 0)
    layer.train()
    rows = torch.randn(1, 1, D).expand(4000, 1, D)
    out = layer(rows)
    noise = (out.latent - out.posterior_mean) * torch.exp(-0.5 * out.posterior_logvar)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


@torch.no_grad()
def test_sampled_inference_averages_over_samples():
    sampled = replace(PRIORS["attention"], inference="sample")
    rows = torch.randn(40, 6, D)
    layer = PHiLayer(D, sampled).eval()
    one = layer(rows)
    assert not torch.equal(one.latent, one.posterior_mean)
    assert one.phi_standard_error is None

    errors, means = {}, {}
    for k in (32, 64, 1024):
        layer.config = replace(sampled, samples=k)
        out = layer(rows)
        assert out.phi_standard_error.shape == (40, 6)
        # The first token's prediction depends on no latent, hence has no error.
        assert (out.phi_standard_error[:, 0] < 1e-4).all()
        errors[k], means[k] = out.phi_standard_error[:, 1:], out.phi[:, 1:]
    # Like 1 / sqrt(k), and the true error is of the size it says.
    assert (errors[64].mean() / errors[1024].mean()).item() == pytest.approx(4, rel=0.1)
    z = (means[32] - means[1024]) / errors[32]
    assert z.square().mean().sqrt().item() == pytest.approx(1, rel=0.2)

    layer.train()
    assert layer(rows).phi_standard_error is None


def test_standard_error_is_zero_on_padding():
    layer = make_layer(replace(PRIORS["attention"], inference="sample", samples=4))
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    error = layer(torch.randn(1, 5, D), mask).phi_standard_error[0]
    assert (error[3:] == 0).all()
    assert error[2] > 0


def test_contrastive_is_left_out_at_weight_zero():
    rows = torch.randn(2, 3, D)
    assert PHiLayer(D, PHiConfig(contrastive_weight=0))(rows).contrastive is None
    assert PHiLayer(D, PHiConfig())(rows).contrastive.shape == (2, 3)


@torch.no_grad()
def test_near_identity_passes_hidden_states_on():
    layer = PHiLayer(64, PHiConfig()).eval()
    rows = torch.randn(20, 30, 64)
    close(layer(rows).hidden_states, rows)
    phi = layer(rows).phi.mean()
    layer.train()
    noise = layer(rows).hidden_states - rows
    assert noise.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert phi < 64 * 8**2 / 2 / 10  # a prior of unit width would begin at about 8²/2 per dimension
    scaled = PHiLayer(64, PHiConfig(init_scale=20.0))(rows).hidden_states - rows
    assert scaled.std().item() == pytest.approx(1 / 20, rel=0.05)


def test_random_init_is_random():
    layer = PHiLayer(64, PHiConfig(init="random")).eval()
    rows = torch.randn(2, 3, 64)
    assert (layer(rows).hidden_states - rows).std() > 0.5
    weight = layer.encoder.weight
    assert weight[64:].abs().max() > 0  # log-variances too
    assert len(weight.unique()) > 0.99 * weight.numel()


# Precision


def test_half_precision_input_is_read_in_float32():
    layer = make_layer(PRIORS["attention"])
    rows = torch.randn(2, 5, D).bfloat16()
    half, full = layer(rows), layer(rows.float())
    assert half.hidden_states.dtype == torch.bfloat16
    assert half.phi.dtype == torch.float32
    close(half.phi, full.phi)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_may_have_any_dtype(layer, dtype):
    layer.to(dtype)
    out = layer(torch.randn(2, 5, D, dtype=dtype))
    assert out.phi.dtype == torch.float32
    assert out.hidden_states.dtype == dtype
    assert out.phi.isfinite().all()


def test_autocast_keeps_the_divergence_in_float32():
    layer = make_layer(PRIORS["attention"]).train()
    rows = torch.randn(4, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(rows)
    assert out.phi.dtype == out.contrastive.dtype == torch.float32
    statistics = (out.posterior_mean, out.posterior_logvar, out.prior_mean, out.prior_logvar)
    close(out.phi, gaussian_kl(*(x.float() for x in statistics)))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "lstm"}, "prior must be one of attention, mlp, unit, not 'lstm'"),
        ({"kl": "approximate"}, "kl must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"inference": "mode"}, "inference must be one of"),
        ({"init": "zeros"}, "init must be one of"),
        ({"latent_size": 0}, "latent_size must be positive, not 0"),
        ({"latent_size": "8"}, "latent_size must be a whole number or null, not '8'"),
        ({"latent_size": 8.5}, "latent_size must be a whole number or null, not 8.5"),
        ({"bottleneck": "no"}, "bottleneck must be true or false, not 'no'"),
        ({"phi_weight": None}, "phi_weight must be a number, not None"),
        ({"layer": "19"}, "layer must be a whole number or null, not '19'"),
        ({"prior_heads": -1}, "prior_heads must be positive"),
        ({"prior_depth": 0}, "prior_depth must be positive"),
        ({"prior_mlp_size": 0}, "prior_mlp_size must be positive"),
        ({"samples": 0}, "samples must be positive"),
        ({"init_scale": math.nan}, "init_scale must be positive"),
        ({"phi_weight": -1.0}, "phi_weight must be a finite number of at least 0, not -1.0"),
        ({"contrastive_weight": math.inf}, "contrastive_weight must be a finite number"),
        ({"logvar_min": 3.0, "logvar_max": 3.0}, "logvar_min must be below logvar_max"),
        ({"logvar_max": 1e308}, "both between -100 and 100, not -5 and 1e+308"),
        ({"samples": 4}, 'samples above 1 need inference="sample"'),
        ({"layer": 1, "module": "model.layers.1"}, "one of layer, module and layers"),
        ({"codebooks": -1}, "codebooks must be at least 0, and codes at least 2, not -1 and 1024"),
        ({"codebooks": 1, "codes": 1}, "not 1 and 1"),
        ({"commitment_weight": math.nan}, "commitment_weight must be a finite number"),
        ({"codebooks": 1, "bottleneck": False}, "leave out codebooks, or those two"),
        ({"codebooks": 1, "kl": "official"}, "codebooks are one kind of latents"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError) as caught:
        PHiConfig(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_do_for_weights():
    assert PHiConfig(phi_weight=2, contrastive_weight=0, init_scale=4).phi_weight == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_size": 8}, "needs a latent_size of at least the hidden size 16"),
        ({"prior_heads": 3}, "set prior_heads"),
        ({"prior_heads": 16}, "multiple of twice"),
    ],
)
def test_sizes_that_do_not_fit_together(options, message):
    with pytest.raises(ConfigError, match=message):
        PHiLayer(D, PHiConfig(**options))


@pytest.mark.parametrize(
    ("hidden", "mask", "ids", "message"),
    [
        ((2, 3, D + 1), None, None, r"must have shape \(B, T, 16\), not \(2, 3, 17\)"),
        ((3, D), None, None, r"must have shape \(B, T, 16\)"),
        ((0, 3, D), None, None, "There is no token"),
        ((2, 0, D), None, None, "There is no token"),
        ((2, 3, D), (2, 4), None, r"attention_mask must have shape \(2, 3\).*not \(2, 4\)"),
        ((2, 3, D), None, (3,), r"document_ids must have shape \(2, 3\).*not \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(hidden, mask, ids, message):
    optional = (None if shape is None else torch.ones(shape, dtype=torch.long) for shape in (mask, ids))
    with pytest.raises(InputError, match=message):
        PHiLayer(D)(torch.zeros(hidden), *optional)


def test_errors_are_also_value_errors():
    assert issubclass(ConfigError, PhilensError)
    assert issubclass(PhilensError, ValueError)
