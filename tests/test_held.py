"""What keeps philens fast and small, held by counts that no machine's mood changes."""

import pytest
import torch
from benchmarks.peak import peak_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import philens.lens.losses
from conftest import make_llama
from philens import PHiConfig, attach
from philens.lens.attention import (
    Documents,
    document_attention,
    document_ids,
    knows_packs,
    register_documents,
)
from philens.lens.divergence import contrastive_loss, gaussian_kl
from philens.lens.layer import PHiLayer
from philens.training.build import start_model
from philens.training.trainer import training_rows
from tiny import tiny_recipe

# A host waits for its device where a number is taken out of a tensor, or a shape depends on one.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2"}


class Watch(TorchDispatchMode):
    """Notes the operations and the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.operations, self.shapes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(func._schema.name.removeprefix("aten::"))
        found = out if isinstance(out, tuple | list) else (out,)
        self.shapes += [tuple(one.shape) for one in found if isinstance(one, torch.Tensor)]
        return out

    @property
    def waits(self):
        return [name for name in self.operations if name in WAITING]


def trained_on_packs(**changes):
    """A lens in training and a batch of packs, each row of several documents and padding."""
    options = {"model__hidden_size": 32, "model__layers": 3, "data__length": 80, "phi__layer": 1}
    recipe = tiny_recipe(**{**options, "phi_schedule__start_step": 0, **changes})
    lens, tokenizer = start_model(recipe)
    rows = training_rows(recipe, tokenizer)
    batch = {name: torch.stack([rows[i][name] for i in range(3)]) for name in rows[0]}
    assert (document_ids(batch["position_ids"]).amax(1) > 1).all()
    return lens.train(), batch


def learn(lens, batch, returns="states"):
    lens.zero_grad()
    torch.manual_seed(3)
    out = lens(**batch, returns=returns, packed=True)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in lens.named_parameters() if p.grad is not None}
    return out, gradients


def watched_step(lens, batch):
    learn(lens, batch)  # what is found out once
    with Watch() as watch:
        out = lens(**batch, returns="states", packed=True)
        out.loss.backward()
    return watch


# No graph breaks. `eager` finds them and takes less time; `aot_eager` also traces the backward pass.

TWO_BLOCKS = {"model__layers": 2, "phi__layer": 0}


@pytest.mark.parametrize(
    ("frozen", "returns", "backend"),
    [
        (False, "states", "aot_eager"),
        (True, "states", "eager"),
        pytest.param(True, "states", "aot_eager", marks=pytest.mark.slow),
        pytest.param(False, "logits", "aot_eager", marks=pytest.mark.slow),  # no training step asks for them
        pytest.param(True, "logits", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_is_one_graph(frozen, returns, backend):
    lens, batch = trained_on_packs(**TWO_BLOCKS)
    if frozen:
        lens.freeze_base()
    expected, gradients = learn(lens, batch, returns)
    torch.compiler.reset()
    lens.compile(fullgraph=True, dynamic=False, backend=backend)  # a graph break would raise
    found, again = learn(lens, batch, returns)
    torch.testing.assert_close(found.loss, expected.loss)
    assert gradients.keys() == again.keys()
    assert any(name.startswith("base.") for name in gradients) is not frozen
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_the_base_alone_is_one_graph_too(backend):
    lens, batch = trained_on_packs(**TWO_BLOCKS)
    lens.disable()
    torch.compiler.reset()
    lens.compile(fullgraph=True, dynamic=False, backend=backend)
    assert learn(lens, batch)[0].loss.isfinite()


def test_the_compiled_base_alone_learns(monkeypatch):
    """By the compiler that trainings use: it makes one tensor of the loss and of its only part, surprisal."""
    # The compiler imports setuptools, which takes offence at the distutils that other tests imported.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.map, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

        def forward(self, input_ids):
            return self.head(self.map(self.embed(input_ids)))

    lens = attach(Three(), PHiConfig(module="map", prior_heads=2)).train()
    lens.disable()
    tokens = torch.randint(0, 20, (2, 9))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    expected, gradients = learn(lens, batch)
    torch.compiler.reset()
    lens.compile(fullgraph=True, dynamic=False)
    found, again = learn(lens, batch)
    torch.testing.assert_close(found.loss, expected.loss)
    assert gradients.keys() == again.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_layers_that_observe_compile_too(backend):
    """Not to one graph: a pass that begins after a layer stands by itself."""
    lens, batch = trained_on_packs(**TWO_BLOCKS, phi__mode="observe")
    lens.freeze_base()
    expected, gradients = learn(lens, batch)
    torch.compiler.reset()
    lens.compile(dynamic=False, backend=backend)
    found, again = learn(lens, batch)
    torch.testing.assert_close(found.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


# No waiting for the device.


@pytest.mark.parametrize("frozen", [False, True], ids=["from scratch", "frozen base"])
def test_a_training_step_waits_for_nothing(frozen):
    lens, batch = trained_on_packs()
    if frozen:
        lens.freeze_base()
    with Watch() as alone:
        lens.base(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    # transformers looks once whether positions are a pack's.
    assert alone.waits == ["_local_scalar_dense"]
    assert watched_step(lens, batch).waits == alone.waits


def test_reconstruction_waits_for_nothing():
    lens, batch = trained_on_packs(phi__mode="observe", phi__pressure="reconstruction")
    lens.freeze_base()
    assert watched_step(lens, batch).waits == ["_local_scalar_dense"]


# No mask, no logits.


def largest_square(watch, length):
    return [shape for shape in watch.shapes if len(shape) > 1 and shape[-1] == shape[-2] == length]


def test_no_mask_of_every_pair_of_tokens():
    lens, batch = trained_on_packs()
    length = batch["input_ids"].shape[1]
    assert largest_square(watched_step(lens, batch), length) == []
    other, batch = trained_on_packs(model__attention="sdpa")
    assert largest_square(watched_step(other, batch), length) != []  # what would have been seen


def test_no_logits_of_every_token(monkeypatch):
    lens, batch = trained_on_packs()
    monkeypatch.setattr(philens.lens.losses, "LOGITS_AT_ONCE", 50 * 128)
    shapes = watched_step(lens, batch).shapes
    assert max(torch.Size(shape).numel() // 128 for shape in shapes if shape[-1:] == (128,)) == 50
    assert batch["input_ids"].numel() > 4 * 50


# Memory beyond the inputs: what more tokens add, in units of one more (B, T, L) float32.


def more(works):
    """How much more the second work holds at most than the first; each with the tensors that it has."""
    peaks = [peak_bytes(torch.device("cpu"), work, before) for work, before in works]
    return (peaks[1] - peaks[0]) / (8 * 2048 * 64 * 4)


def loss_of(function, count, length):
    inputs = [torch.randn(8, length, 64, requires_grad=True) for _ in range(count)]
    return lambda: function(*inputs).sum().backward(), inputs


@pytest.mark.parametrize(("function", "count"), [(contrastive_loss, 3), (gaussian_kl, 4)])
def test_losses_hold_their_gradients_and_no_more(function, count):
    grown = more([loss_of(function, count, length) for length in (2048, 4096)])
    assert grown == pytest.approx(count, abs=0.1)  # the losses themselves, (B, T), are 1/64 of a unit


def test_memory_of_the_layer():
    def step(length):
        layer = PHiLayer(64, PHiConfig(layer=0, prior_heads=2, init="random"))
        states = torch.randn(8, length, 64, requires_grad=True)
        documents = torch.arange(length).div(100, rounding_mode="floor").expand(8, -1)

        def work():
            out = layer(states, document_ids=documents)
            (out.phi.mean() + out.contrastive.mean() + out.hidden_states.square().mean()).backward()

        return work, [states, documents, *layer.parameters(), *layer.buffers()]

    # 40.4 as it is; a (T, T) mask of bytes would add 24, latents kept by the losses 3 or more.
    assert more([step(length) for length in (2048, 4096)]) < 42


# Attention within documents.


def dense(q, k, v, positions, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=Documents(positions).mask(), scale=scale
    )


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_document_attention_equals_a_dense_mask(scale, dtype):
    torch.manual_seed(1)
    whole = range(3, 12)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2], whole, whole, [0, 1, 2, 3, 4, 0, 1, 2, 3]])
    inputs = [torch.randn(4, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    weight = torch.randn(4, 3, 9, 8, dtype=dtype)
    found = document_attention(*inputs, positions, scale)[0]
    # Bit for bit what a row is alone, though rows that are cut alike are read together.
    alone = [document_attention(*(x[n : n + 1] for x in (*inputs, positions)), scale)[0] for n in range(4)]
    assert torch.equal(found, torch.cat(alone))
    expected = dense(*inputs, positions, scale)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    for one, other in zip(ours, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(ours, torch.autograd.grad((torch.cat(alone) * weight).sum(), inputs), strict=True):
        assert torch.equal(one, other)


def test_document_attention_is_an_operator_that_compilers_understand():
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    inputs = [torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(document_attention, (*inputs, positions, None))


@pytest.mark.parametrize("heads", [2, 1], ids=["multi-head", "grouped queries"])
def test_packs_in_a_base_without_a_mask(heads):
    torch.manual_seed(0)
    base = make_llama(num_key_value_heads=heads)
    assert knows_packs(base)
    tokens = torch.randint(128, (2, 12))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], list(range(12))])
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0

    def readings():
        packed = base(tokens, position_ids=positions, use_cache=False).logits
        padded = base(tokens, attention_mask=mask, use_cache=False).logits[mask != 0]
        first = base(tokens[:, :7], use_cache=True)
        cached = base(tokens[:, 7:], past_key_values=first.past_key_values).logits
        return (
            packed,
            padded,
            first.logits,
            cached,
            base.generate(tokens[1:], max_new_tokens=5, do_sample=False),
        )

    expected = readings()
    base.set_attn_implementation(register_documents())
    for found, wanted in zip(readings(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_bases_that_know_more_than_documents_keep_their_attention():
    assert not knows_packs(torch.nn.Linear(2, 2))
    assert not knows_packs(
        make_llama(layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2)
    )


# Losses by their gradients' formulas.


def test_gradients_of_phi_and_of_the_contrastive_loss():
    torch.manual_seed(2)
    four = [torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(gaussian_kl, four)
    assert torch.autograd.gradcheck(contrastive_loss, four[:3])
    negatives = torch.rand(3, 5) > 0.4
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, negatives), four[:3])


@pytest.mark.parametrize("at_once", [1, 7, 2**18])
def test_stretches_change_nothing(at_once, monkeypatch):
    torch.manual_seed(2)
    four = [torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(4)]
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(four[0], (0.5 * four[1]).exp()),
        torch.distributions.Normal(four[2], (0.5 * four[3]).exp()),
    ).sum(-1)
    literal = torch.distributions.Normal(four[1][None], (0.5 * four[2][None]).exp())
    log_density = literal.log_prob(four[0][:, None]).sum(-1)  # (b, c, T)
    monkeypatch.setattr("philens.lens.divergence.AT_ONCE_CPU", at_once)
    torch.testing.assert_close(gaussian_kl(*four), expected)
    own = log_density.logsumexp(0) - log_density.diagonal().T
    torch.testing.assert_close(contrastive_loss(*four[:3]), own)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_cross_entropy_of_a_linear_head(bias, frozen, monkeypatch):
    torch.manual_seed(2)
    head = torch.nn.Linear(6, 11, bias=bias, dtype=torch.float64).requires_grad_(not frozen)
    states = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 10, 5, -100, 5, 1, 2])
    monkeypatch.setattr(philens.lens.losses, "LOGITS_AT_ONCE", 4 * 11)

    def gradients(loss):
        wanted = [states, *(p for p in head.parameters() if p.requires_grad)]
        return loss.detach().double(), *torch.autograd.grad(2 * loss, wanted)

    found = gradients(philens.lens.losses.head_cross_entropy(states, head, targets))
    expected = gradients(torch.nn.functional.cross_entropy(head(states), targets, reduction="sum"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # logits are float32


def test_observing_gives_phi_and_the_base_s_logits():
    torch.manual_seed(0)
    lens = attach(make_llama(), PHiConfig(layer=1, prior_heads=2, init="random")).eval()
    tokens = torch.randint(128, (2, 9))
    with torch.no_grad():
        in_path = lens(tokens)
        with lens.observing():
            observed = lens(tokens)
        with lens.disabled():
            plain = lens(tokens)
        again = lens(tokens)
    assert torch.equal(observed.phi, in_path.phi)
    assert torch.equal(observed.logits, plain.logits)
    assert not torch.allclose(in_path.logits, plain.logits)
    assert torch.equal(again.logits, in_path.logits)
    assert observed.layer_outputs[0].contrastive is None
