"""Texts in, scores out: equal to a direct forward pass however they are batched, ordered and cut."""

import json
import math
import re
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from conftest import make_gpt2, make_llama
from philens.bases.lstm import LSTMConfig, LSTMForCausalLM
from philens.bases.tokenizer import character_tokenizer
from philens.lens.config import MetricOptions, PHiConfig
from philens.lens.metrics import METRICS, confidence, entropy, margin, self_certainty, surprisal, varentropy
from philens.lens.model import attach
from philens.scoring.score import check_metrics, iter_scores, score
from philens.scoring.scores import TokenScores
from philens.scoring.texts import render_chat, tokenize
from philens.scoring.windows import find_windows
from philens.support.errors import ConfigError, InputError
from test_scores import byte_level
from tiny import OF_A_LAYER

TEXTS = ["the cat sat on the mat", "a", "x y", "hello world, hello cat: " * 4, "(1 + 2) * 3 = 9\n"]
CHARACTERS = character_tokenizer()
BYTES = byte_level()


def lens_of(base, **options):
    """With PHi weights so large that every part of the layer matters."""
    lens = attach(base, PHiConfig(**({"layer": 1, "init": "random", "prior_heads": 2} | options)))
    torch.manual_seed(1)
    for parameter in lens.phi.parameters():
        nn.init.normal_(parameter, std=0.3)
    return lens.eval()


@pytest.fixture
def lens(base):
    return lens_of(base)


@pytest.fixture
def small():
    return lens_of(make_llama())


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def same(some, others, tolerance=1e-4):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.text == other.text
        assert list(one.columns) == list(other.columns)
        for name, values in one.columns.items():
            close(values, other.columns[name], tolerance)


def distributions(lens, ids):
    """(T, V) log-probabilities by the untouched base."""
    with torch.no_grad(), lens.disabled():
        return lens.base(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def direct(lens, ids):
    """The three columns of a text from plain forward passes."""
    with torch.no_grad():
        output = lens(torch.tensor([ids]))
    after = torch.tensor(ids[1:])[:, None]
    none = torch.tensor([torch.nan])
    of_base = -distributions(lens, ids)[:-1].gather(1, after)[:, 0]
    of_layer = -output.logits[0].log_softmax(-1)[:-1].gather(1, after)[:, 0]
    return {
        "phi": output.phi[0].numpy(),
        "surprisal": torch.cat([none, of_base]).numpy(),
        "surprisal_with_layer": torch.cat([none, of_layer]).numpy(),
    }


class Calls:
    """How often modules ran."""

    def __init__(self, lens):
        path = lens.module_paths[-1].rsplit(".", 1)[0]
        blocks = lens.base.get_submodule(path)
        # Blocks that are skipped return something, too; their parts then do not run.
        self.modules = {"below": blocks[0].mlp, "above": blocks[2].mlp}
        self.modules |= {"head": lens.base.get_output_embeddings()}
        self.modules |= {"layer": lens.layers[0]}
        self.count = dict.fromkeys(self.modules, 0)
        for name, module in self.modules.items():
            module.register_forward_hook(lambda *_, name=name: self._add(name))

    def _add(self, name):
        self.count[name] += 1

    def of(self, *args, **kwargs):
        self.count = dict.fromkeys(self.modules, 0)
        score(*args, **kwargs)
        return self.count


# Numbers.


def test_columns_are_those_of_a_plain_forward_pass(lens):
    found = score(lens, CHARACTERS, TEXTS)
    assert [item.text for item in found] == TEXTS
    for item in found:
        assert list(item.columns) == ["phi", "surprisal", "surprisal_with_layer"]
        assert item.token_ids.dtype == item.offsets.dtype == np.int64
        expected = direct(lens, item.token_ids.tolist())
        for name, values in item.columns.items():
            assert values.dtype == np.float32
            close(values, expected[name])
        assert np.isnan(item.surprisal[0])
        assert np.isnan(item.columns["surprisal_with_layer"][0])
        assert np.isfinite(item.phi).all()
        assert not np.isnan(item.surprisal[1:]).any()
    # The columns differ, or the above says nothing.
    assert np.abs(found[0].surprisal - found[0].columns["surprisal_with_layer"])[1:].max() > 0.1


@pytest.mark.parametrize("batch_tokens", [1, 30, 150, 100_000])
def test_batches_and_order_change_nothing(lens, batch_tokens):
    alone = [score(lens, CHARACTERS, text, metrics=OF_A_LAYER)[0] for text in TEXTS]
    same(score(lens, CHARACTERS, TEXTS, metrics=OF_A_LAYER, batch_tokens=batch_tokens), alone)
    turned = score(lens, CHARACTERS, TEXTS[::-1], metrics=OF_A_LAYER, batch_tokens=batch_tokens)
    same(turned[::-1], alone)


def test_logits_in_parts_change_nothing(small, monkeypatch):
    whole = score(small, CHARACTERS, TEXTS, metrics=OF_A_LAYER)
    monkeypatch.setattr("philens.lens.losses.POSITIONS_AT_ONCE", 3)
    monkeypatch.setattr("philens.lens.losses.LOGITS_READ_AT_ONCE", 700)
    same(score(small, CHARACTERS, TEXTS, metrics=OF_A_LAYER), whole)


def test_only_what_was_asked_for_runs(small):
    calls = Calls(small)

    def count(*metrics):
        return calls.of(small, CHARACTERS, "some text", metrics=metrics)

    assert count("phi") == {"below": 1, "above": 0, "head": 0, "layer": 1}
    assert count("step_length") == {"below": 1, "above": 0, "head": 0, "layer": 1}
    found = count("surprisal", "entropy")
    assert (found["below"], found["above"], found["layer"]) == (1, 1, 0)
    found = count("surprisal_with_layer", "phi")
    assert (found["below"], found["above"], found["layer"]) == (1, 1, 1)
    found = count("phi", "surprisal")
    assert (found["below"], found["above"], found["layer"]) == (1, 1, 1)
    found = count("phi", "surprisal", "surprisal_with_layer")
    assert (found["below"], found["above"], found["layer"]) == (1, 2, 1)


def test_observing_takes_one_pass():
    lens = lens_of(make_llama(), mode="observe")
    calls = Calls(lens)
    found = calls.of(lens, CHARACTERS, "some text", metrics=("phi", "surprisal", "margin"))
    assert (found["below"], found["above"], found["layer"]) == (1, 1, 1)
    assert calls.of(lens, CHARACTERS, "some text", metrics=["phi"])["above"] == 0
    observing = score(lens, CHARACTERS, TEXTS)
    assert list(observing[0].columns) == ["phi", "surprisal"]
    same(observing, score(lens_of(make_llama()), CHARACTERS, TEXTS, metrics=("phi", "surprisal")))
    with pytest.raises(InputError, match="no surprisal_with_layer"):
        score(lens, CHARACTERS, TEXTS, metrics=("phi", "surprisal_with_layer"))


def test_several_layers():
    lens = lens_of(make_llama(), layer=None, layers=[0, 2], mode="observe")
    metrics = ("phi", "surprisal", "step_length", "logit_lens_divergence")
    found = score(lens, CHARACTERS, TEXTS, metrics=metrics)
    assert list(found[0].columns) == [
        "phi@model.layers.0",
        "phi@model.layers.2",
        "surprisal",
        "logit_lens_divergence@model.layers.0",
        "logit_lens_divergence@model.layers.2",
        "step_length@model.layers.0",
        "step_length@model.layers.2",
    ]
    one = score(lens_of(make_llama(), layer=0), CHARACTERS, TEXTS, metrics=metrics)
    for several, single in zip(found, one, strict=True):
        for name in ("logit_lens_divergence", "step_length"):
            close(several.columns[f"{name}@model.layers.0"], single.columns[name])
    # After the last block nothing is left to learn.
    close(found[0].columns["logit_lens_divergence@model.layers.2"], 0)
    assert found[0].columns["logit_lens_divergence@model.layers.0"].max() > 1e-2


def test_samples_have_a_standard_error():
    lens = lens_of(make_llama(), inference="sample", samples=3)
    found = score(lens, CHARACTERS, TEXTS, metrics=["phi", "surprisal"])
    assert list(found[0].columns) == ["phi", "phi_standard_error", "surprisal"]
    # What is expected of the first token depends on no sample.
    assert all((item.columns["phi_standard_error"][1:] > 0).all() for item in found)
    assert all(item.columns["phi_standard_error"][0] == 0 for item in found)
    assert found[0].provenance["samples"] == 3


def test_a_recurrent_model_and_half_precision():
    torch.manual_seed(0)
    base = LSTMForCausalLM(LSTMConfig(hidden_size=32, intermediate_size=48))
    lens = lens_of(base, layer=0)
    found = score(lens, CHARACTERS, TEXTS, metrics=OF_A_LAYER)
    expected = direct(lens, found[3].token_ids.tolist())
    for name, values in expected.items():
        close(found[3].columns[name], values)
    assert score(lens, CHARACTERS, "long " * 500)[0].provenance["window"] is None
    lens = lens_of(make_llama().to(torch.bfloat16))
    item = score(lens, CHARACTERS, TEXTS)[3]
    assert item.provenance["dtype"] == "bfloat16"
    assert item.surprisal.dtype == np.float32
    close(item.surprisal, score(lens_of(make_llama()), CHARACTERS, TEXTS)[3].surprisal, 0.5)


class OwnModel(nn.Module):
    """A model of someone's own, that knows nothing of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lstm, self.head = nn.Embedding(128, 32), nn.LSTM(32, 32), nn.Linear(32, 128)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens).transpose(0, 1))[0].transpose(0, 1))


def test_a_model_of_ones_own():
    lens = lens_of(OwnModel(), layer=None, module="lstm")
    wanted = [name for name in OF_A_LAYER if "blocks" not in METRICS[name].needs]
    alone = [score(lens, CHARACTERS, text, metrics=wanted)[0] for text in TEXTS]
    same(score(lens, CHARACTERS, TEXTS, metrics=wanted), alone)
    with pytest.raises(InputError, match=r"need the model's blocks.*OwnModel.*leave these metrics out"):
        score(lens, CHARACTERS, TEXTS, metrics=["settling_depth"])


# Baselines.


def test_entropy_and_margin_are_of_the_distribution_before_the_token(lens):
    item = score(lens, CHARACTERS, TEXTS[0], metrics=("entropy", "margin"))[0]
    assert list(item.columns) == ["entropy", "margin"]
    p = distributions(lens, item.token_ids.tolist())[:-1]
    close(item.columns["entropy"][1:], -(p.exp() * p).sum(-1))
    best = p.sort(descending=True).values
    close(item.columns["margin"][1:], best[:, 0] - best[:, 1])
    assert np.isnan(item.columns["entropy"][0])
    assert np.isnan(item.columns["margin"][0])


def test_entropy_of_an_impossible_token():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert entropy(logits, torch.tensor([2])).item() == pytest.approx(np.log(2))
    assert surprisal(logits, torch.tensor([2])).item() == np.inf
    assert margin(logits, torch.tensor([2])).item() == 0


def test_confidence_certainty_and_varentropy_are_of_the_distribution_before_the_token(lens):
    names = ("varentropy", "self_certainty", "confidence")
    item = score(lens, CHARACTERS, TEXTS[0], metrics=names)[0]
    p = distributions(lens, item.token_ids.tolist())[:-1]
    mean = (p.exp() * p).sum(-1, keepdim=True)
    close(item.columns["varentropy"][1:], (p.exp() * (p - mean) ** 2).sum(-1))
    close(item.columns["self_certainty"][1:], -(p.exp().shape[-1] * p.exp()).log().mean(-1))
    close(item.columns["confidence"][1:], -p.sort(descending=True).values[:, :20].mean(-1))
    assert all(np.isnan(item.columns[name][0]) for name in names)
    assert item.units["varentropy"] == "nats²"


@pytest.mark.parametrize("function", [varentropy, self_certainty, confidence])
def test_impossible_tokens_have_no_part_in_them(function):
    logits, targets = torch.randn(2, 30), torch.zeros(2, dtype=torch.long)
    masked = torch.cat([logits, torch.full((2, 5), -torch.inf)], 1)
    close(function(masked, targets), function(logits, targets))
    few = torch.full((2, 30), -torch.inf)
    few[:, :3] = logits[:, :3]
    close(function(few, targets), function(logits[:, :3], targets))
    assert function(torch.full((1, 4), torch.nan), targets).isnan().all()


def test_lowest_and_last_group_of_confidence(lens):
    lens.metric_options = MetricOptions(group=5)
    item = score(lens, CHARACTERS, TEXTS[0], metrics=["confidence"], steps="lines")[0]
    values = item.columns["confidence"][1:].astype(float)
    groups = [values[k : k + 5].mean() for k in range(len(values) - 4)]
    found = item.means()
    assert list(found) == ["confidence", "confidence_lowest_group", "confidence_tail"]
    assert found["confidence_lowest_group"] == pytest.approx(min(groups))
    assert found["confidence_tail"] == pytest.approx(groups[-1])
    assert min(groups) < found["confidence"] < max(groups)
    assert item.units["confidence_tail"] == "nats"
    # The same of a span, of its own tokens alone; of one shorter than a group, of all there are.
    table = item.spans([("middle", 4, 14), ("short", 4, 7), ("nothing", 4, 4)]).set_index("name")
    assert table.loc["middle", "confidence_lowest_group"] == pytest.approx(min(groups[3:9]))
    assert table.loc["middle", "confidence_tail"] == pytest.approx(groups[8])
    assert table.loc["short", "confidence_tail"] == pytest.approx(table.loc["short", "confidence_mean"])
    assert np.isnan(table.loc["nothing", "confidence_lowest_group"])
    again = TokenScores.from_json(item.to_json())
    assert again.means() == found
    assert [one.means for one in again.span_means()] == [one.means for one in item.span_means()]
    assert not {"confidence_tail"} & set(item.words())


def test_metric_options_that_are_none():
    for options, sentence in (
        ({"settled_at": 1.0}, "settled_at must be 0 or more and below 1 bit"),
        ({"deep_from": 0}, "deep_from must be above 0"),
        ({"group": 0}, "group must be at least 1"),
        ({"group": 2.5}, "group must be a whole number"),
        ({"settle_at": 0.3}, "did you mean 'settled_at'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            MetricOptions.of(options)
    assert MetricOptions.of({"deep_from": 1}) == MetricOptions(deep_from=1.0)


def block_states(lens, ids):
    """What leaves each block of the untouched base, (T, D) each."""
    blocks = lens.base.get_submodule(lens.module_paths[0].rsplit(".", 1)[0])
    kept = []
    handles = [
        block.register_forward_hook(
            lambda _, __, output: kept.append(output if torch.is_tensor(output) else output[0])
        )
        for block in blocks
    ]
    distributions(lens, ids)
    for handle in handles:
        handle.remove()
    return [states[0] for states in kept]


def gemma2():
    """Its logits are capped after the head."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, initializer_range=0.2, final_logit_softcapping=5.0,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("make", [make_llama, make_gpt2, gemma2])
def test_logit_lens(make):
    lens = lens_of(make(), layer=0)
    base = lens.base
    lens.metric_options = MetricOptions(settled_at=0.1, deep_from=0.6)
    names = ("logit_lens_divergence", "settling_depth", "settling_depth_jsd", "deep_thinking")
    item = score(lens, CHARACTERS, TEXTS[0], metrics=names)[0]
    ids = item.token_ids.tolist()
    norm = base.transformer.ln_f if make is make_gpt2 else base.model.norm

    def head(states):
        logits = base.get_output_embeddings()(norm(states))
        return 5 * torch.tanh(logits / 5) if make is gemma2 else logits

    with torch.no_grad():
        early = [head(states).log_softmax(-1) for states in block_states(lens, ids)]
    final = distributions(lens, ids)
    close(early[-1], final)
    expected = (final.exp() * (final - early[0])).sum(-1)
    close(item.columns["logit_lens_divergence"], expected)
    assert expected.max() > 0.01
    likeliest = torch.stack([p.argmax(-1) for p in early])
    depths = [
        next(k for k in range(len(early)) if (likeliest[k:, t] == likeliest[-1, t]).all())
        for t in range(len(ids))
    ]
    assert item.columns["settling_depth"].tolist() == depths
    assert len(set(depths)) > 1

    def jsd(p, q):
        m = (p.exp() + q.exp()).log() - math.log(2)
        return ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2 / math.log(2)

    # The running minimum is at most what it is to be where a value first is.
    apart = torch.stack([jsd(final, p) for p in early]).cummin(0).values
    depths = [next(k for k in range(len(early)) if apart[k, t] <= 0.1) for t in range(len(ids))]
    assert item.columns["settling_depth_jsd"].tolist() == depths
    assert len(set(depths)) > 1
    deep = [depth + 1 >= math.ceil(0.6 * len(early)) for depth in depths]
    assert item.columns["deep_thinking"].tolist() == deep
    assert item.means()["deep_thinking"] == pytest.approx(np.mean(deep))
    assert 0 < np.mean(deep) < 1
    assert item.provenance["metric_options"] == {"settled_at": 0.1, "deep_from": 0.6}
    # The hooks are gone and the base is as it was.
    close(distributions(lens, ids), final, 1e-6)


@pytest.mark.parametrize("mode", ["bottleneck", "observe"])
def test_phi_of_an_untrained_layer_is_that_of_a_fresh_one_with_the_same_statistics(mode):
    lens = lens_of(make_llama(), mode=mode)
    size = lens.phi.hidden_size
    lens.phi.calibrate(torch.randn(size), torch.rand(size) + 0.5, 7.0)
    before = {name: value.clone() for name, value in lens.phi.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.randn(2)
    torch.manual_seed(5)
    found = score(lens, CHARACTERS, TEXTS, metrics=["phi", "phi_untrained", "surprisal"])
    assert torch.equal(torch.randn(2), drawn)
    assert all(torch.equal(value, before[name]) for name, value in lens.phi.state_dict().items())
    base = make_llama()
    torch.manual_seed(0)
    fresh = attach(base, lens.config).eval()
    for name in ("shift", "scale", "sink_norm"):
        fresh.phi.get_buffer(name).copy_(lens.phi.get_buffer(name))
    for one, other in zip(found, score(fresh, CHARACTERS, TEXTS, metrics=["phi"]), strict=True):
        close(one.columns["phi_untrained"], other.phi)
        assert not np.allclose(one.phi, other.phi)
    # Of the base as it is fitted to now, by the formula that is asked for now.
    lens.phi.calibrate(torch.randn(size), torch.rand(size) + 0.5, 7.0)
    lens.phi.config = replace(lens.config, kl="official")
    for one, other in zip(found, score(lens, CHARACTERS, TEXTS, metrics=["phi_untrained"]), strict=True):
        assert not np.allclose(one.columns["phi_untrained"], other.columns["phi_untrained"])


def test_step_length(lens):
    item = score(lens, CHARACTERS, TEXTS[0], metrics=("phi", "step_length"))[0]
    states = block_states(lens, item.token_ids.tolist())[1]
    steps = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1).mean()
    assert np.isnan(item.columns["step_length"][0])
    close(item.columns["step_length"][1:], steps)
    assert np.isnan(score(lens, CHARACTERS, "a", metrics=["step_length"])[0].columns["step_length"]).all()


# Windows.


@given(st.integers(1, 300), st.integers(2, 60), st.integers(0, 3))
def test_windows_cover_every_token_once_with_half_a_window_before(length, context, leading):
    if context >= length:
        assert [len(window) for window in find_windows(length, context, leading)] == [length]
        return
    if context < 2 * leading + 1:
        with pytest.raises(InputError, match=f"choose at least {2 * leading + 1}"):
            find_windows(length, context, leading)
        return
    windows = find_windows(length, context, leading)
    scored = [token for window in windows for token in range(window.scored, window.stop)]
    assert scored == list(range(length))
    for number, window in enumerate(windows):
        assert len(window) <= context
        assert len(window) == context or number == len(windows) - 1
        if number:
            before = window.repeated + window.scored - window.start
            assert context / 2 <= before < len(window)
            assert window.repeated == leading <= window.start


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BYTES], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("window", [7, 20, 32])
def test_long_texts_go_through_windows(tokenizer, window):
    base = make_gpt2(n_positions=32, vocab_size=512)
    lens = lens_of(base)
    text = "the cat; " * 30 + "!"
    item = score(lens, tokenizer, [text, "short"], window=window, metrics=OF_A_LAYER)[0]
    ids = item.token_ids.tolist()
    bos = ids[:1] if tokenizer is BYTES else []
    assert len(ids) > 3 * window
    assert bos == [tokenizer.bos_token_id] or tokenizer is CHARACTERS
    expected = direct(lens, ids[:window])
    half, done = (window + 1) // 2, window
    while done < len(ids):
        row = bos + ids[done - half + len(bos) :][: window - len(bos)]
        part = direct(lens, row)
        expected = {name: np.append(expected[name], part[name][half:]) for name in expected}
        done += len(row) - half
    for name, values in expected.items():
        close(item.columns[name], values)
    # Only the first token has no number.
    assert all(not np.isnan(values[1:]).any() for values in item.columns.values())
    assert item.provenance["window"] == window
    assert f"{half} others" in item.provenance["window_rule"]
    assert "".join(item.pieces()) == text


def test_a_window_is_by_default_the_models_context():
    lens = lens_of(make_gpt2(n_positions=32))
    text = "0123456789" * 10
    by_default = score(lens, CHARACTERS, text)
    assert by_default[0].provenance["window"] == 32
    same(by_default, score(lens, CHARACTERS, text, window=32))
    same(score(lens, CHARACTERS, [text[:32]]), score(lens, CHARACTERS, [text[:32]], window=32))
    with pytest.raises(InputError, match="window of 64 tokens is longer than the model's context of 32"):
        score(lens, CHARACTERS, text, window=64)
    with pytest.raises(InputError, match="choose at least 2"):
        score(lens, CHARACTERS, text, window=1)
    with pytest.raises(InputError, match="too short beside the 1 special"):
        score(lens_of(make_llama(vocab_size=512)), BYTES, text, window=2)


# Streams.


def test_streams_are_read_a_little_ahead_and_kept_in_order(small):
    read = []

    def texts():
        for number in count():
            read.append(number)
            yield f"text {number} " * (1 + number % 7)

    found = list(islice(iter_scores(small, CHARACTERS, texts(), metrics=["phi"], batch_tokens=100), 30))
    assert len(read) < 200
    expected = [f"text {number} " * (1 + number % 7) for number in range(30)]
    assert [item.text for item in found] == expected
    same(found, score(small, CHARACTERS, expected, metrics=["phi"]))
    assert list(iter_scores(small, CHARACTERS, iter([]))) == []


def test_names(small):
    found = score(small, CHARACTERS, ["a", "b"], names=["one", "two"])
    assert [item.name for item in found] == ["one", "two"]
    assert score(small, CHARACTERS, "a")[0].name is None
    with pytest.raises(InputError, match="two is empty"):
        score(small, CHARACTERS, ["a", ""], names=["one", "two"])
    with pytest.raises(InputError, match="2 texts and 1 names"):
        score(small, CHARACTERS, ["a", "b"], names=["one"])
    with pytest.raises(InputError, match="only 1 names"):
        list(iter_scores(small, CHARACTERS, ["a", "b"], names=iter(["one"])))


# What stays as it was.


def test_model_and_tokenizer_stay_as_they_were(small):
    small.train()
    small.base.model.layers[0].eval()
    modes = [module.training for module in small.modules()]
    hooks = [len(module._forward_hooks) for module in small.modules()]
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=50, pad_id=1)
    settings = tokenizer.backend_tokenizer.to_str()
    lens = lens_of(make_llama(vocab_size=512))
    item = score(lens, tokenizer, "the cat sat on the mat")[0]
    assert 3 < len(item) < 50
    assert tokenizer.backend_tokenizer.to_str() == settings
    same([item], score(lens, BYTES, "the cat sat on the mat"))
    trained = score(small, CHARACTERS, TEXTS, metrics=OF_A_LAYER)
    assert [module.training for module in small.modules()] == modes
    assert [len(module._forward_hooks) for module in small.modules()] == hooks
    assert torch.is_grad_enabled()
    same(trained, score(small.eval(), CHARACTERS, TEXTS, metrics=OF_A_LAYER))


def test_provenance_says_what_was_used(small):
    item = score(small, CHARACTERS, "abc")[0]
    found = json.loads(json.dumps(item.provenance))
    assert found["module_paths"] == ["model.layers.1"]
    assert found["mode"] == "bottleneck"
    assert found["kl"] == "exact"
    assert found["dtype"] == "float32"
    assert found["window"] == 512
    assert len(found["fingerprint"]) == len(found["adapter_fingerprint"]) == 64
    assert found["base"] == "LlamaForCausalLM"
    assert found["versions"]["torch"] == torch.__version__
    assert item.to_json()
    with torch.no_grad():
        small.layers[0].decoder.weight.mul_(2)
    changed = score(small, CHARACTERS, "abc")[0].provenance
    assert changed["fingerprint"] == found["fingerprint"]
    assert changed["adapter_fingerprint"] != found["adapter_fingerprint"]


# Chats.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Trims, adds a system message of its own, and begins with BOS.
TRIMMING = (
    "<s>{% if messages[0].role != 'system' %}<h>system</h>You are a user.</e>{% endif %}"
    "{% for m in messages %}<h>{{ m.role }}</h>{{ m.content | trim }}</e>{% endfor %}"
)
# Looks at contents, so that marks in their place give another text.
LOOKING = "{% for m in messages %}{% if 'cat' in m.content %}!{% endif %}[{{ m.content }}]{% endfor %}"
# Leaves out what was thought.
DROPPING = (
    "{% for m in messages %}{% if m.role != 'thought' %}{{ m.role }}: {{ m.content }};{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('Roles must alternate.') }}"
CHAT = [
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": " the cat\nsat "},
    {"role": "user", "content": "user"},
]


def with_template(template):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, TRIMMING, LOOKING])
def test_chats_have_a_span_per_message(template):
    lens = lens_of(make_llama(vocab_size=512))
    tokenizer = with_template(template)
    plain = "the cat"
    item, beside = score(lens, tokenizer, [CHAT, plain])
    assert item.text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "".join(item.pieces()) == item.text
    assert [span.name for span in item.spans] == ["user", "assistant", "user"]
    contents = [item.text[start:end] for _, start, end in item.spans]
    assert [content.strip() for content in contents] == ["user", "the cat\nsat", "user"]
    # In place, not in a header that says the same.
    first, _, last = item.spans
    assert item.text.rindex("user") == last.start
    assert item.text[first.end :].startswith(("<|im_end|>", "</e>", "]"))
    # Exactly the template's tokens, with no second BOS.
    ids = tokenizer(item.text, add_special_tokens=False)["input_ids"]
    assert item.token_ids.tolist() == ids
    for name, values in direct(lens, ids).items():
        close(item.columns[name], values)
    assert beside.token_ids[0] == tokenizer.bos_token_id
    assert beside.spans == []
    table = item.spans()
    assert table["name"].tolist() == ["user", "assistant", "user"]
    assert (table["tokens"] > 0).all()
    words = item.words()
    assert words.loc[words["span"] == "assistant", "word"].tolist() == ["the", "cat", "sat"]
    assert words["tokens"].sum() == sum(bool(piece.strip()) for piece in item.pieces())


def test_a_content_that_the_template_leaves_out_has_an_empty_span():
    chat = [
        {"role": "user", "content": "x"},
        {"role": "thought", "content": "hm"},
        {"role": "user", "content": "y"},
    ]
    text, spans = render_chat(with_template(DROPPING), chat, "the chat")
    assert text == "user: x;user: y;"
    assert [text[start:end] for _, start, end in spans] == ["x", "", "y"]
    empty = [{"role": "user", "content": ""}, {"role": "user", "content": "\ue0000\ue001 {{ 1 }}"}]
    text, spans = render_chat(with_template(CHATML), empty, "the chat")
    assert [text[start:end] for _, start, end in spans] == ["", "\ue0000\ue001 {{ 1 }}"]


def test_a_bos_from_the_template_begins_later_windows():
    tokenizer = with_template(TRIMMING)
    found = tokenize(tokenizer, [{"role": "user", "content": "the cat " * 30}], "the chat")
    assert found.token_ids[0] == tokenizer.bos_token_id
    assert found.leading == 1
    assert tokenize(tokenizer, "the cat", "the text").leading == 1
    assert tokenize(CHARACTERS, "the cat", "the text").leading == 0


# Docs.


def test_the_docs_run_as_they_stand(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "scoring.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert (names["again"].phi == names["first"].phi).all()
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"first.png", "first.html", "first.json", "read.html"}
    assert all(f"| `{metric}` |" in text for metric in METRICS)


# Errors.


COLUMN = ["the cat sat", "a", "on the mat"]


def table():
    return {"text": COLUMN, "number": [1, 2, 3]}


def dataset():
    import datasets

    return datasets.Dataset.from_dict(table())


# The same texts as whatever people have them in.
COLUMNS = {
    "series": lambda: pd.Series(COLUMN, index=[7, 9, 9]),
    "column": lambda: pd.DataFrame(table())["text"],
    "index": lambda: pd.Index(COLUMN),
    "array": lambda: np.array(COLUMN),
    "objects": lambda: np.array(COLUMN, dtype=object),
    "tuple": lambda: tuple(COLUMN),
    "arrow": lambda: pa.table(table())["text"],
    "arrow array": lambda: pa.array(COLUMN),
    "datasets": lambda: dataset()["text"],
    "formatted": lambda: dataset().with_format("numpy")["text"],
    "stream": lambda: dataset().to_iterable_dataset()["text"],
    "generator": lambda: iter(COLUMN),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("read", [score, iter_scores])
def test_columns_of_tables_and_arrays(small, kind, read):
    found = list(read(small, CHARACTERS, COLUMNS[kind]()))
    assert all(type(item.text) is str for item in found)
    same(found, score(small, CHARACTERS, COLUMN))


def test_a_column_of_chats(tmp_path):
    """As Parquet gives them back to pandas: arrays of dicts."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    path = tmp_path / "chats.parquet"
    pd.DataFrame({"messages": [CHAT, CHAT[:1]], "parts": [parts, parts]}).to_parquet(path)
    table = pd.read_parquet(path)
    assert isinstance(table["messages"][0], np.ndarray)
    lens, tokenizer = lens_of(make_llama(vocab_size=384)), with_template(CHATML)
    same(score(lens, tokenizer, table["messages"]), score(lens, tokenizer, [CHAT, CHAT[:1]]))
    same(score(lens, tokenizer, table["parts"]), score(lens, tokenizer, [parts, parts]))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (pd.DataFrame({"text": ["a"]}), r"texts is a whole table \(DataFrame\); give one of its columns"),
        ({"text": ["a"]}, "must be a string or a list of them, or a column of a table, not dict"),
        (np.array("a"), "column of a table, not ndarray"),
        (pd.Series(["a", None]), r"texts\[1\] has no value \(nan\); leave it out"),
        (pd.Series(["a", pd.NA], dtype=object), r"texts\[1\] has no value \(<NA>\)"),
        (["a", None], r"texts\[1\] has no value \(None\)"),
        (np.array([["a"], ["b"]]), r"texts\[0\] holds 'a'; a chat is a list of messages"),
    ],
)
@pytest.mark.parametrize("read", [score, iter_scores])
def test_tables_that_are_no_column(small, read, texts, sentence):
    with pytest.raises(InputError, match=sentence):
        list(read(small, CHARACTERS, texts))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], "nothing to score"),
        ("", r"texts\[0\] is empty"),
        (["a", ""], r"texts\[1\] is empty"),
        ("</s>", "only special tokens"),
        ([3], r"texts\[0\] is of type int"),
        (5, "must be a string or a list of them, or a column of a table, not int"),
        (b"abc", "not bytes"),
        ([b"abc"], "of type bytes"),
        (CHAT, "put it in a list of its own"),
        ([[]], "chat without messages"),
        ([["a"]], "each with role and content"),
        ([[{"role": "user"}]], "each with role and content"),
        ([[{"role": "user", "content": None}]], r"texts\[0\] has a content that is no text in message 1"),
        ([CHAT], "no chat template"),
        ("ab\ud800", r"half a character .*at character 2"),
    ],
)
def test_texts_that_cannot_be_scored(texts, sentence):
    with pytest.raises(InputError, match=sentence):
        score(lens_of(make_llama(vocab_size=512)), BYTES, texts)


def test_a_template_that_refuses():
    with pytest.raises(InputError, match=r"refuses texts\[0\] \(Roles must alternate"):
        score(lens_of(make_llama(vocab_size=512)), with_template(REFUSING), [CHAT])


class SlowTokenizer:
    is_fast = False


def test_tokenizers_that_do_not_fit(small):
    with pytest.raises(InputError, match="SlowTokenizer does not say which characters"):
        score(small, SlowTokenizer(), "a")
    with pytest.raises(InputError, match="does not say which characters"):
        score(small, BYTES.backend_tokenizer, "a")
    with pytest.raises(InputError, match=r"token id \d+ and the model knows 128 tokens"):
        score(small, BYTES, "the cat")


def test_options_that_do_not_fit(small):
    with pytest.raises(InputError, match="did you mean 'surprisal'"):
        score(small, CHARACTERS, "a", metrics=["phi", "suprisal"])
    with pytest.raises(InputError, match="No metric was asked for"):
        score(small, CHARACTERS, "a", metrics=[])
    with pytest.raises(InputError, match="batch_tokens must be at least 1"):
        score(small, CHARACTERS, "a", batch_tokens=0)
    with pytest.raises(InputError, match="not LlamaForCausalLM"):
        score(small.base, CHARACTERS, "a")
    assert check_metrics(small, "phi") == ["phi"]
    assert check_metrics(small, ["surprisal", "phi", "phi"]) == ["phi", "surprisal"]


MODELS = {
    "all": lambda: lens_of(make_llama()),
    "observe": lambda: lens_of(make_llama(), mode="observe"),
    "several": lambda: lens_of(make_llama(), layer=None, layers=[0, 1], mode="observe"),
    "own": lambda: lens_of(OwnModel(), layer=None, module="lstm"),
    "headless": lambda: lens_of(make_llama().model),
}
OF_BLOCKS = [name for name in OF_A_LAYER if "blocks" in METRICS[name].needs]
WITHOUT = {
    "all": {},
    "observe": {"surprisal_with_layer": "not in the path"},
    "several": {"surprisal_with_layer": "not in the path"},
    "own": {name: "told apart" for name in OF_BLOCKS},
    "headless": {
        name: "LlamaModel has no output head"
        for name in OF_A_LAYER
        if {"predictions", "path"} & set(METRICS[name].needs)
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_lens_supports_is_known_before_any_pass(name):
    lens, passes = MODELS[name](), []
    lens.base.register_forward_pre_hook(lambda *_: passes.append(1))
    found = lens.supports()
    assert list(found) == list(METRICS)
    assert "needs a shallow head" in (found.pop("mtd") or "")
    assert {metric for metric, reason in found.items() if reason} == set(WITHOUT[name])
    for metric, reason in found.items():
        if reason is None:
            continue
        assert WITHOUT[name][metric] in reason
        with pytest.raises(InputError, match=re.escape(reason)):
            score(lens, CHARACTERS, "abcab", metrics=[metric])
    assert not passes
    for metric, reason in found.items():
        if reason is None:
            columns = score(lens, CHARACTERS, "abcab", metrics=[metric])[0].columns
            assert all(np.isfinite(values[1:]).all() for values in columns.values())
    assert passes


def test_the_docs_have_a_row_for_each_metric():
    docs = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", docs, re.MULTILINE)
    assert rows == [(name, metric.unit or "none") for name, metric in METRICS.items()]


def test_a_disabled_layer_has_no_phi(small):
    enabled = score(small, CHARACTERS, "abc", metrics=["surprisal", "settling_depth"])
    with small.disabled():
        same(score(small, CHARACTERS, "abc", metrics=["surprisal", "settling_depth"]), enabled)
        for metrics in (None, ["phi"], ["step_length"], ["logit_lens_divergence"]):
            with pytest.raises(InputError, match="layer is disabled"):
                score(small, CHARACTERS, "abc", metrics=metrics)
        assert {name for name, reason in small.supports().items() if reason is None} == {
            *("surprisal", "entropy", "margin", "varentropy", "self_certainty", "confidence"),
            *("settling_depth", "settling_depth_jsd", "deep_thinking"),
        }
        assert not small.enabled
