"""Quantised latents: codes by definition, their length in a real code, and training that uses them."""

import itertools
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.optim import Adam

from conftest import make_gpt2, make_llama
from philens import PHiConfig, attach
from philens.bases.facts import evaluating
from philens.lens import latents
from philens.lens.layer import PHiLayer
from philens.tasks.automata import generate
from philens.training.folder import RunFolder
from philens.training.opening import load_run
from philens.training.trainer import train
from tiny import tiny_recipe

D, Q, K = 16, 3, 8
CONFIG = PHiConfig(init="random", prior_heads=2, codebooks=Q, codes=K)
TRAINED = {"phi__codebooks": 2, "phi__codes": 16, "phi_schedule__start_step": 0}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def make_layer(config=CONFIG, size=D):
    """A layer with weights large enough that every part of it matters, in evaluation mode."""
    layer = PHiLayer(size, config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=2 / math.sqrt(size))
        layer.codes.vectors /= 2
    return layer


# The definition


@torch.no_grad()
def logprobs_by_definition(codes, context, before):
    """(K,) of the next code of a token in float64, given the prior's numbers (L,) and the codes before it."""
    state = context.double()
    for book, code in enumerate(before):
        state = state + codes.before[book, code].double()
    state = state / (state.square().mean() + 1e-5).sqrt()
    read = state * state.sigmoid()
    return (codes.outputs[len(before)].double() @ read + codes.bias[len(before)].double()).log_softmax(0)


def contexts(layer, latent):
    """(T, L) the prior's numbers for the tokens of one document, latents (T, L)."""
    starts = torch.arange(len(latent)) == 0
    return layer.prior(latent[None], starts[None], torch.arange(len(latent))[None], None)[0]


@torch.no_grad()
def test_codes_and_phi_are_those_of_a_literal_implementation():
    layer, rows = make_layer(), torch.randn(9, D)
    out = layer(rows[None])
    for t, row in enumerate(rows):
        rest = (layer.encoder.weight @ row).double()
        rest = rest / rest.norm()
        found = torch.zeros(D).double()
        for book in range(Q):
            distances = [(rest - vector).norm() for vector in layer.codes.vectors[book].double()]
            code = int(np.argmin(distances))
            assert out.posterior.index[0, t, book] == code
            rest, found = (x + sign * layer.codes.vectors[book, code] for x, sign in ((rest, -1), (found, 1)))
        close(out.latent[0, t].double(), math.sqrt(D) * found)
        close(out.hidden_states[0, t], layer.decoder.weight @ out.latent[0, t])
    close(layer.codes.latent(out.posterior.index), out.latent, 0)
    phi = []
    for context, told in zip(contexts(layer, out.latent[0]), out.posterior.index[0].tolist(), strict=True):
        each = [logprobs_by_definition(layer.codes, context, told[:q])[told[q]] for q in range(Q)]
        phi.append(-sum(each))
    close(out.phi[0].double(), torch.stack(phi))


@torch.no_grad()
def test_drawn_phi_is_an_unbiased_estimate_of_its_mean_over_codes():
    layer = make_layer(replace(CONFIG, codebooks=2, codes=3))
    # Alike: each is drawn now and then.
    layer.codes.vectors[:] = (torch.randn(2, 1, D) + 0.15 * torch.randn(2, 3, D)) / 8
    row, vectors = torch.randn(D), layer.codes.vectors.double()
    context = contexts(layer, torch.zeros(1, D))[0]  # the start's alone
    point = (layer.encoder.weight @ row).double()
    point = point / point.norm()

    def likely(rest, book):
        scale = latents.SHARPNESS / vectors[book].square().sum(-1).mean()
        return (-scale * (rest - vectors[book]).square().sum(-1)).softmax(0)

    share, phi = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    for first, second in itertools.product(range(3), repeat=2):
        share[first, second] = likely(point, 0)[first] * likely(point - vectors[0, first], 1)[second]
        phi[first, second] -= logprobs_by_definition(layer.codes, context, [])[first]
        phi[first, second] -= logprobs_by_definition(layer.codes, context, [first])[second]
    count = 20_000
    out = layer.train()(row.expand(count, 1, D))
    found = torch.zeros(3, 3).double()
    found.index_put_(tuple(out.posterior.index[:, 0].T), torch.tensor(1.0 / count).double(), accumulate=True)
    assert (share > 0.01).sum() > 4
    error = (share * (1 - share) / count).sqrt()
    assert ((found - share).abs() < 5 * error + 1e-6).all()
    error = out.phi.std() / math.sqrt(count)
    assert error > 0
    assert abs(out.phi.mean() - (share * phi).sum()) < 4 * error


def test_codes_are_drawn_in_training_and_where_it_is_asked_for_alone():
    layer, rows = make_layer(), torch.randn(4, 6, D)
    same = lambda: torch.equal(layer(rows).posterior.index, layer(rows).posterior.index)  # noqa: E731
    assert same()
    layer.train()
    assert not same()
    layer.eval().config = replace(CONFIG, inference="sample", samples=3)
    assert not same()
    assert layer(rows).phi_standard_error.max() > 0


def test_codes_that_nobody_predicts_have_all_the_same_length():
    out = make_layer(replace(CONFIG, prior="unit"))(torch.randn(2, 3, D))
    close(out.phi, torch.full((2, 3), Q * math.log(K)))


def test_the_gradient_goes_straight_through():
    layer = make_layer()
    rows = torch.randn(1, 4, D, requires_grad=True)
    weight = torch.randn(1, 4, D)
    out = layer(rows)
    (out.latent * weight).sum().backward()
    point = layer.encoder(rows)
    expected = torch.autograd.grad(
        (math.sqrt(D) * point / point.norm(dim=-1, keepdim=True) * weight).sum(), rows
    )
    close(rows.grad, expected[0])


def test_what_codes_miss_is_the_encoders_fault_and_theirs():
    layer, rows = make_layer(), torch.randn(3, 5, D)
    out = layer(rows)
    missed = (out.posterior.rest - out.posterior.chosen).square().sum((-1, -2))
    close(out.parts["commitment"], missed)
    assert out.parts.keys() == layer.codes.weights.keys() == {"commitment", "codebook"}
    assert layer(rows, contrastive=False).parts == {}
    weights = [layer.encoder.weight, layer.codes.vectors]
    for name, reached in (("commitment", [True, False]), ("codebook", [False, True])):
        found = torch.autograd.grad(layer(rows).parts[name].sum(), weights, allow_unused=True)
        assert [one is not None and bool(one.abs().max() > 0) for one in found] == reached


def test_padding_is_no_code_in_use():
    layer, mask = make_layer(), torch.ones(2, 6)
    mask[1, 2:] = 0
    rows = torch.randn(2, 6, D)
    other = torch.where(mask[..., None] != 0, rows, torch.randn(2, 6, D))
    found = [layer(x, mask).parts["codebook"] for x in (rows, other)]
    close(*found)
    assert (found[0][mask == 0] == 0).all()


def test_a_state_that_is_no_number_has_no_phi():
    rows = torch.randn(1, 4, D)
    rows[0, 2, 3] = math.inf
    phi = make_layer(replace(CONFIG, prior="mlp"))(rows).phi[0]
    assert phi.isfinite().tolist() == [True, True, False, False]


def test_what_codes_can_tell():
    latent, counted = make_layer(replace(CONFIG, codebooks=1)).latents, torch.ones(2, K).bool()

    def told(weights):
        return latents.Codes(torch.zeros(2, K, 1).long(), weights, *torch.zeros(2, 2, K, 1, D))

    each = torch.eye(K).expand(2, K, K)[:, :, None]
    assert latent.carried(told(each), counted) == pytest.approx(math.log(K))
    assert latent.carried(told(each[:, :1].expand(2, K, 1, K)), counted) == pytest.approx(0, abs=1e-6)
    assert latent.carried(told(torch.full((2, K, 1, K), 1 / K)), counted) == pytest.approx(0, abs=1e-6)
    half = counted & (torch.arange(K) < K // 2)
    assert latent.carried(told(each), half) == pytest.approx(math.log(K // 2))
    close(latent.untold(told(each)), torch.full((2, K), math.log(K)))


def test_codes_near_identity():
    """A state that has a code of its own passes, but for its length."""
    layer = PHiLayer(D, PHiConfig(prior_heads=2, codebooks=2, codes=4)).eval()
    rows = torch.randn(1, 4, D)
    rows = math.sqrt(D) * rows / rows.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        layer.codes.vectors[0] = rows[0] / math.sqrt(D)
        layer.codes.vectors[1] = 0
    close(layer(rows).hidden_states, rows)
    close(layer(7 * rows).hidden_states, rows)


# Training


def codes_in_use(layer, rows):
    """(Q,) how many codes of each codebook tokens have."""
    index = layer(rows).posterior.index.flatten(0, 1)
    return [len(index[:, q].unique()) for q in range(index.shape[1])]


@pytest.mark.parametrize("revived", [True, False])
def test_dead_codes_come_to_life(revived, monkeypatch):
    if not revived:
        monkeypatch.setattr(latents.CodeLatent, "_idle", lambda *args: torch.zeros(()))
    layer, rows = make_layer(replace(CONFIG, codebooks=2, codes=32)), torch.randn(8, 32, D)
    with torch.no_grad():
        layer.codes.vectors[:] = 3 * torch.randn(D)  # far from all states, and from each other not at all
        layer.codes.vectors += 1e-3 * torch.randn_like(layer.codes.vectors)
    assert max(codes_in_use(layer, rows)) <= 4
    optimizer = Adam([layer.codes.vectors], 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        layer(rows).parts["codebook"].mean().backward()
        optimizer.step()

    assert (min(codes_in_use(layer, rows)) > 24) == revived


def test_training_is_resumed_as_if_it_had_not_stopped(tmp_path):
    """Codes that come to life included: they do by a loss, which needs no state."""
    recipe = tiny_recipe(**TRAINED, train__steps=6)
    train(recipe, tmp_path / "whole")
    whole = RunFolder(tmp_path / "whole").metrics()
    train(recipe, tmp_path / "parts")
    folder = RunFolder(tmp_path / "parts")
    for path in (folder.path / "checkpoint-6", folder.path / "model", folder.path / "adapter"):
        shutil.rmtree(path)
    train(recipe, folder.path, resume=True)
    parts = folder.metrics()
    assert [{**r, "tokens_per_second": 0} for r in parts] == [{**r, "tokens_per_second": 0} for r in whole]
    record = whole[0]
    assert {"phi", "commitment", "codebook", "information"} <= record.keys()
    total = record["surprisal"] + (record["phi"] / 16 + 0.25 * record["commitment"] + record["codebook"]) / 3
    assert record["loss"] == pytest.approx(total, rel=1e-5)


# Their length in a real code


class Coder:
    """An arithmetic coder over numbers of 32 bits, with frequencies that are whole numbers.

    Source: Witten, Neal, Cleary, "Arithmetic coding for data compression", CACM 30(6), 1987.
    """

    TOP, TOTAL = 1 << 32, 1 << 24

    def __init__(self, bits=None):
        self.low, self.high, self.pending = 0, self.TOP - 1, 0
        self.bits, self.place, self.value = [] if bits is None else bits, 0, 0
        if bits is not None:
            for _ in range(32):
                self.value = 2 * self.value + self._bit()

    @classmethod
    def frequencies(cls, logprobs):
        """Bounds of each symbol below TOTAL, whole numbers; none is impossible."""
        probabilities = np.exp(np.asarray(logprobs, np.float64))
        parts = 1 + (probabilities / probabilities.sum() * (cls.TOTAL - len(probabilities))).astype(np.int64)
        bounds = [0, *np.cumsum(parts).tolist()]
        return [*bounds[:-1], cls.TOTAL]

    def encode(self, symbol, logprobs):
        self._narrow(self.frequencies(logprobs), symbol)

    def decode(self, logprobs):
        bounds, span = self.frequencies(logprobs), self.high - self.low + 1
        count = ((self.value - self.low + 1) * self.TOTAL - 1) // span
        symbol = int(np.searchsorted(bounds, count, side="right")) - 1
        self._narrow(bounds, symbol, decoding=True)
        return symbol

    def finish(self):
        self.pending += 1
        self._put(int(self.low >= self.TOP // 4))
        return self.bits

    def _narrow(self, bounds, symbol, decoding=False):
        span, half = self.high - self.low + 1, self.TOP // 2
        self.high = self.low + span * bounds[symbol + 1] // self.TOTAL - 1
        self.low += span * bounds[symbol] // self.TOTAL
        while True:
            if self.high < half or self.low >= half:
                shift = half if self.low >= half else 0
                if not decoding:
                    self._put(int(shift > 0))
            elif self.low >= half // 2 and self.high < half + half // 2:
                shift = half // 2
                self.pending += not decoding
            else:
                return
            self.low, self.high = 2 * (self.low - shift), 2 * (self.high - shift) + 1
            if decoding:
                self.value = 2 * (self.value - shift) + self._bit()

    def _put(self, bit):
        self.bits += [bit, *[1 - bit] * self.pending]
        self.pending = 0

    def _bit(self):
        self.place += 1
        return self.bits[self.place - 1] if self.place <= len(self.bits) else 0


def test_the_coder_has_the_length_of_the_codes():
    random = np.random.default_rng(0)
    symbols = random.choice(5, 4000, p=(p := [0.5, 0.3, 0.15, 0.04, 0.01])).tolist()
    coder = Coder()
    for symbol in symbols:
        coder.encode(symbol, np.log(p))
    bits = coder.finish()
    assert len(bits) == pytest.approx(-np.log2(p)[symbols].sum(), abs=4)
    decoder = Coder(bits)
    assert [decoder.decode(np.log(p)) for _ in symbols] == symbols


def follow(layer, length, choose):
    """Codes of a document, chosen one after the other from their log-probabilities, by earlier ones alone."""
    index = torch.zeros(length, layer.codes.vectors.shape[0], dtype=torch.long)
    for t, q in np.ndindex(*index.shape):
        if q == 0:
            context = contexts(layer, layer.codes.latent(index[: t + 1]))[t]
        index[t, q] = choose(t, q, layer.codes.logprobs(context, index[t])[q].tolist())
    return index


def test_phi_is_the_length_of_codes_in_an_arithmetic_code(tmp_path):
    """Of real documents, by the probabilities of a trained prior: the bits, and the codes back from them."""
    train(tiny_recipe(**TRAINED, phi__phi_weight=0.1, train__steps=30, train__save_every=0), tmp_path / "run")
    lens, recipe = load_run(tmp_path / "run")
    documents, coder, nats, codes = [], Coder(), 0.0, []
    for task in ("in_context_language", "memorized_sequences"):
        docs = generate(recipe.data.tasks, 1, task, np.arange(8))
        documents += [torch.as_tensor(docs.tokens[slice(*docs.offsets[n : n + 2])]) for n in range(8)]
    with evaluating(lens), torch.no_grad():
        for document in documents:
            out = lens(document[None].long(), returns="phi").layer_outputs[0]
            nats += float(out.phi.double().sum())
            index = out.posterior.index[0]
            coder_codes = index.tolist()

            def put(t, q, logprobs, told=coder_codes):
                coder.encode(told[t][q], logprobs)
                return told[t][q]

            codes.append(follow(lens.phi, len(index), put))
            assert torch.equal(codes[-1], index)
        bits = coder.finish()
        decoder = Coder(list(bits))
        for told in codes:
            assert torch.equal(follow(lens.phi, len(told), lambda t, q, p: decoder.decode(p)), told)
    assert len(bits) > 1000
    assert len(bits) * math.log(2) == pytest.approx(nats, rel=0.01)

    fixed = sum(map(len, documents)) * 2 * math.log2(16)
    assert len(bits) < 0.97 * fixed  # by what was learned


@pytest.mark.slow
@pytest.mark.parametrize("books", [1, 3])
def test_settings_that_were_published(books):
    """1,024 codes at a width of 768, for a few steps and a short text."""
    sizes = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.02}
    base = make_llama(**sizes, num_attention_heads=12, num_key_value_heads=12)
    lens = attach(base, PHiConfig(layer=0, codebooks=books)).train()
    lens.freeze_base()
    (ids, text), losses = torch.randint(3, 128, (2, 2, 32)), []
    lens.calibrate([{"input_ids": ids}])
    optimizer = Adam(lens.phi.parameters(), lr=1e-3)
    for _ in range(8):
        out = lens(ids, labels=ids)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.losses)
    assert all(math.isfinite(value) for one in losses for value in one.values())
    for name in ("codebook", "commitment"):
        assert losses[-1][name] < losses[0][name]
    with evaluating(lens):
        (found,) = lens(text, returns="phi").layer_outputs
        index = found.posterior.index
        assert (found.phi.shape, index.shape) == ((2, 32), (2, 32, books))
        assert lens.phi.codes.vectors.shape == (books, 1024, 768)
        told, coder = index[0].tolist(), Coder()

        def put(t, q, logprobs):
            coder.encode(told[t][q], logprobs)
            return told[t][q]

        follow(lens.phi, len(told), put)
        bits = coder.finish()
        decoder = Coder(list(bits))
        assert follow(lens.phi, len(told), lambda t, q, p: decoder.decode(p)).tolist() == told
    assert len(bits) * math.log(2) == pytest.approx(float(found.phi[0].sum()), rel=0.01)


# In models


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("books", [1, 3])
def test_losses_with_codes(make, books):
    lens = attach(make(), PHiConfig(layer=1, prior_heads=2, codebooks=books, codes=16)).train()
    tokens = torch.randint(3, 128, (3, 12))
    out = lens(tokens, labels=tokens)
    assert out.losses.keys() == {"surprisal", "phi", "commitment", "codebook"}
    parts = out.losses
    total = parts["surprisal"] + parts["phi"] / 32 + 0.25 * parts["commitment"] + parts["codebook"]
    close(out.loss.detach(), total)
    assert 0 < parts["phi"] < 2 * books * math.log(16)
