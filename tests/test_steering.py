"""Divergence steering: the definition, and generation with it."""

import math

import numpy as np
import pytest
import torch

from conftest import make_gpt2, make_llama
from philens import MTDConfig, PHiConfig, attach
from philens.bases.lstm import LSTMConfig, LSTMForCausalLM
from philens.lens.losses import token_surprisal
from philens.lens.steering import steered
from philens.support.errors import InputError

GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
SAMPLED = GREEDY | {"do_sample": True, "top_k": 20}
WATCHING = PHiConfig(layer=1, mode="observe", contrastive_weight=0.0)


def make_lstm():
    return LSTMForCausalLM(
        LSTMConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    ).eval()


def make_lens(make=make_llama, configs=None):
    """A head whose weights are large enough for differences to stand far above rounding."""
    lens = attach(make(), [MTDConfig()] if configs is None else configs).eval()
    with torch.no_grad():
        for weight in lens.attached.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return lens


def prompts(rows=2, length=6):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))


# The definition.


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def by_definition(p, m, alpha, top_k):
    """(V,) from distributions (V,), with an entropy found by searching a grid that becomes finer."""
    kept = np.argsort(-p, kind="stable")[:top_k]
    p, m = p[kept] / p[kept].sum(), m[kept] / m[kept].sum()
    theta = math.acos(np.sqrt(p * m).sum())
    tangent = (np.sqrt(m) - np.sqrt(p) * math.cos(theta)) / math.sin(theta)
    point = np.sqrt(p) * math.cos(alpha * theta) + tangent * math.sin(alpha * theta)
    q = np.maximum(point, 0) ** 2
    q /= q.sum()

    def tempered(t):
        powered = (q / q.max()) ** (1 / t)
        return powered / powered.sum()

    center, width = 0.0, 8.0
    for _ in range(40):
        grid = [math.exp(center + width * k / 10) for k in range(-10, 11)]
        best = min(grid, key=lambda t: abs(entropy(tempered(t)) - entropy(p)))
        center, width = math.log(best), width / 3
    return kept, tempered(math.exp(center)), entropy(p)


@pytest.mark.parametrize("alpha", [-0.7, -0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [7, 40])
def test_the_definition(alpha, top_k):
    own, shallow = 2 * torch.randn(3, 40), 2 * torch.randn(3, 40)
    found = steered(own, shallow, alpha, top_k).exp().double().numpy()
    for row, q in enumerate(found):
        p, m = (one[row].double().softmax(-1).numpy() for one in (own, shallow))
        kept, expected, kept_entropy = by_definition(p, m, alpha, top_k)
        np.testing.assert_allclose(q[kept], expected, atol=2e-6)
        assert q.sum() == pytest.approx(1, abs=1e-6)
        assert entropy(q) == pytest.approx(kept_entropy, abs=1e-4)


def test_it_begins_at_the_model_and_ends_at_the_head():
    own, shallow = torch.randn(4, 30), torch.randn(4, 30)
    torch.testing.assert_close(steered(own, shallow, 0.0, 0), own.log_softmax(-1), atol=1e-5, rtol=0)
    same = steered(own, own, 0.5, 0)
    torch.testing.assert_close(same, own.log_softmax(-1), atol=1e-5, rtol=0)
    # The same entropy as the model's, so the head's order and not its probabilities.
    end = steered(own, shallow, 1.0, 0)
    assert torch.equal(end.argsort(-1), shallow.argsort(-1))
    further = [float((steered(own, shallow, alpha, 0).exp() * shallow).sum()) for alpha in (-0.5, 0, 0.5, 1)]
    assert further == sorted(further)


def test_what_may_not_come_does_not():
    own, shallow = torch.randn(2, 30), torch.randn(2, 30)
    own[:, 4], shallow[:, 4] = -torch.inf, 9.0
    for alpha in (-0.5, 0.5, 1.0):
        found = steered(own, shallow, alpha, 0)
        assert (found[:, 4] == -torch.inf).all()
        assert not found.isnan().any()
    certain = torch.full((1, 30), -torch.inf)
    certain[0, 3] = 2.0  # forced by another processor
    assert steered(certain, shallow[:1], 0.5).exp()[0, 3] == 1


def test_entropy_that_cannot_be_kept_is_as_near_as_it_can_be():
    """Away from the head, only the first token is left of these two."""
    own, shallow = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[-9.0, 9.0]])
    assert torch.equal(steered(own, shallow, -0.5).exp(), torch.tensor([[1.0, 0.0]]))


# Generation.


@pytest.mark.parametrize("configs", [None, [WATCHING, MTDConfig(embedding=False)]])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, GREEDY | {"num_beams": 3}])
def test_at_0_it_is_the_model(configs, settings):
    lens = make_lens(configs=configs)
    torch.manual_seed(5)
    plain = lens.base.generate(prompts(), **settings)
    torch.manual_seed(5)
    assert torch.equal(lens.generate(prompts(), steer=0, **settings).sequences, plain)
    torch.manual_seed(5)
    assert not torch.equal(lens.generate(prompts(), steer=0.9, **settings).sequences, plain)


@torch.no_grad()
def drawn_from(lens, ids, alpha, top_k):
    """(T, V) what should be drawn from after each of the tokens (T,), from a reading of them at once."""
    out = lens(ids[None])
    p, m = out.logits[0], out.shallow().logits_at(slice(None))[0]
    return steered(p, m, alpha, top_k)


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_lstm])
@pytest.mark.parametrize("settings", [GREEDY, GREEDY | {"use_cache": False}, SAMPLED])
@pytest.mark.parametrize("alpha", [-0.4, 0.6])
def test_what_is_drawn_from(make, settings, alpha):
    """Also of prompts with padding, each of which is steered as it would be alone."""
    lens, ids, mask = make_lens(make), prompts(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :4], ids[1, :4] = 0, 0
    more = {"return_dict_in_generate": True, "output_scores": True}
    found = lens.generate(ids, mask, steer=alpha, **settings, **more)
    scores = torch.stack(found.output.scores, 1).float().softmax(-1)
    assert torch.isfinite(found.mtd[mask.new_ones(3, 15) == 1]).any()
    for row, sequence in enumerate(found.sequences):
        own = sequence[4:] if row == 1 else sequence
        expected = drawn_from(lens, own, alpha, settings.get("top_k", 50))[-9:-1].exp()
        torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-3)
        out = lens(own[None])
        torch.testing.assert_close(found.mtd[row, -len(own) :], out.mtd[0], atol=1e-4, rtol=1e-4)
        surprisal = token_surprisal(out, own[None])[0]
        torch.testing.assert_close(found.surprisal[row, 1 - len(own) :], surprisal[1:], atol=1e-4, rtol=1e-4)
        if not settings["do_sample"]:
            assert torch.equal(expected.argmax(-1), own[-8:])


def test_beams():
    """The best of all texts of two tokens, by what is drawn from."""
    lens, ids = make_lens(), prompts(1)
    found = lens.generate(ids, steer=0.6, do_sample=False, num_beams=50, max_new_tokens=2, pad_token_id=0)
    first = drawn_from(lens, ids[0], 0.6, 50)[-1]
    best, text = -math.inf, None
    for token in range(128):
        both = torch.cat((ids[0], torch.tensor([token])))
        second = drawn_from(lens, both, 0.6, 50)[-1].max(-1)
        if first[token] + second.values > best:
            best, text = first[token] + second.values, [token, int(second.indices)]
    assert found.sequences[0, 6:].tolist() == text


@pytest.mark.parametrize("configs", [None, [WATCHING, MTDConfig()]])
@pytest.mark.parametrize("steer", [0.0, 0.5])
def test_followed(configs, steer):
    lens, seen = make_lens(configs=configs), []
    torch.manual_seed(2)
    plain = lens.generate(prompts(1), steer=steer, **SAMPLED)
    torch.manual_seed(2)
    follow = {"on_token": lambda *token: seen.append(token), "skip_prompt": False}
    found = lens.generate(prompts(1), steer=steer, **follow, **SAMPLED)
    assert torch.equal(found.sequences, plain.sequences)
    assert [token for token, *_ in seen] == found.sequences[0].tolist()
    values = found.mtd if configs is None else found.phi
    for place, expected in ((1, values[0]), (2, found.surprisal[0])):
        told = torch.tensor([one[place] for one in seen])
        torch.testing.assert_close(told, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_what_cannot_be_steered():
    lens = make_lens()
    for options, told in (
        ({"steer": 1.5}, "steer must be from -1 to 1, not 1.5"),
        ({"steer": math.nan}, "steer must be from -1 to 1, not nan"),
        ({"prompt_lookup_num_tokens": 2}, "and no assistance; leave out steer"),
        ({"assistant_model": make_llama()}, "and no assistance; leave out steer"),
    ):
        with pytest.raises(InputError, match=told):
            lens.generate(prompts(1, 3).repeat(1, 3), **({"steer": 0.5} | GREEDY | options))
    with lens.disabled(), pytest.raises(InputError, match="the shallow head, which is disabled"):
        lens.generate(prompts(), steer=0.5, **GREEDY)
    with pytest.raises(InputError, match="needs a shallow head, and this model has a PHi layer alone"):
        attach(make_llama(), PHiConfig(layer=1)).generate(prompts(), steer=0.5, **GREEDY)
    # All is as before after an error.
    assert lens.generate(prompts(), **GREEDY).mtd is not None
