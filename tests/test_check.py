"""`lens.check()`: it finds what is broken, says what the base cannot do, and leaves the model as it was."""

import pytest
import torch
import transformers
from packaging import version
from torch import nn

from conftest import make_gpt2, make_llama
from philens.lens.check import CheckReport, check
from philens.lens.config import PHiConfig
from philens.lens.model import attach
from philens.support.errors import InputError


def shaken(base, **options):
    lens = attach(base, PHiConfig(**({"layer": 1, "prior_heads": 2} | options)))
    with torch.no_grad():
        for parameter in lens.phi.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lens


@pytest.fixture
def lens():
    return shaken(make_llama()).eval()


def state_of(lens):
    """All that a check could disturb, as comparable values."""
    modules = list(lens.modules())
    return {
        "training": [module.training for module in modules],
        "hooks": [
            list(hooks.values())
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        "keys": [{key for key in vars(module) if key != "_head_is_last"} for module in modules],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in modules],
        "wanted": [parameter.requires_grad for parameter in lens.parameters()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in lens.parameters()],
        "values": {name: value.tolist() for name, value in lens.state_dict().items()},
        "random": torch.get_rng_state().tolist(),
        "configs": [lens.config, *(id(layer.config) for layer in lens.layers)],
        "enabled": lens.enabled,
        "recomputed": len(lens._undo_recompute),
        "generation": (id(lens.base.generation_config), str(lens.base.generation_config)),
        "frozen": (lens._frozen, len(lens._trainable)),
    }


def alike(one, other):
    # Hooks that are put back are new functions of the same kind.
    names = [[getattr(h, "__qualname__", str(h)) for h in hooks] for hooks in one.pop("hooks")]
    assert names == [[getattr(h, "__qualname__", str(h)) for h in hooks] for hooks in other.pop("hooks")]
    for key in one:
        assert one[key] == other[key], key


def odd_state(lens, which):
    tokens = torch.randint(128, (2, 6))
    if which == "in training":
        lens.train()
        lens(tokens, labels=tokens).loss.backward()
    elif which == "mixed modes, partly frozen, gradients kept":
        lens.train()
        lens.base.model.layers[0].eval()
        lens.base.model.norm.weight.requires_grad_(False)
        lens.phi.encoder.weight.requires_grad_(False)
        lens(tokens, labels=tokens).loss.backward()
    elif which == "frozen and recomputed":
        lens.freeze_base()
        lens.checkpoint_activations()
        lens.train()
    elif which == "recomputed by transformers":
        lens.base.gradient_checkpointing_enable()
        lens.train()
    elif which == "disabled":
        lens.disable()
    elif which == "settings of generation":
        lens.base.generation_config.update(
            do_sample=True, min_new_tokens=3, repetition_penalty=3.0, eos_token_id=7
        )


@pytest.mark.parametrize(
    "which",
    [
        "in training",
        "mixed modes, partly frozen, gradients kept",
        "frozen and recomputed",
        "recomputed by transformers",
        "disabled",
        "settings of generation",
    ],
)
def test_the_model_is_as_before(which, capsys):
    lens = shaken(make_llama(attention_dropout=0.5), inference="sample", samples=3)
    odd_state(lens, which)
    lens.base.lm_head.register_forward_hook(lambda *_: None)
    torch.manual_seed(5)
    before = state_of(lens)
    report = lens.check()
    assert report.ok, str(report)
    assert set(report.results.values()) == {"yes"}
    alike(state_of(lens), before)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_the_report(lens):
    lens.freeze_base()
    report = lens.check()
    assert isinstance(report, CheckReport)
    assert report.ok
    assert (report.base, report.mode) == ("LlamaForCausalLM", "bottleneck")
    point = report.points[0]
    assert (point.path, point.width, point.latent_size) == ("model.layers.1", 32, 32)
    assert (point.below, point.above) == (2, 1)
    assert report.base_parameters == sum(p.numel() for p in lens.base.parameters())
    assert report.layer_parameters == report.layer_trainable == sum(p.numel() for p in lens.phi.parameters())
    assert report.base_trainable == 0
    assert (report.base_dtype, report.layer_dtype) == ("float32", "float32")
    assert report.tolerance == 1e-4
    shown = str(report)
    for part in (
        "after model.layers.1: width 32, latent size 32; 2 blocks below, 1 above",
        f"base: float32, 0 parameters trainable, {report.base_parameters:,} frozen",
        f"layer: float32, {report.layer_parameters:,} parameters trainable, 0 frozen",
        "token by token, with the cache",
        "Allowed: 0.0001 + 0.0001 of the largest value; 0 is bit-identical.",
    ):
        assert part in shown
    assert report.table().row_count == len(report.proofs) == 18
    exact = {proof.name for proof in report.proofs if proof.allowed == 0}
    assert exact == {"disabled", "observing"}
    assert all(proof.difference == 0 for proof in report.proofs if proof.name in exact)
    # A fresh layer, which does almost nothing, is none the worse.
    assert attach(make_llama(), PHiConfig(layer=1, prior_heads=2)).check().ok


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "observe"},
        {"layer": None, "layers": [0, 2], "mode": "observe"},
        {"layer": None, "layers": [-1, 0], "mode": "observe", "pressure": "reconstruction"},
        {"layer": None, "module": "model.layers.1.mlp"},
        {"prior": "unit"},
        {"prior": "mlp", "contrastive_weight": 0.0},
        {"bottleneck": False, "latent_size": 20, "init": "random"},
        {"prior_depth": 2, "kl": "official", "reduction": "sum", "detach_input": True},
        {"phi_weight": 0.0},
        {"codebooks": 2, "codes": 16},
        {"codebooks": 1, "codes": 16, "layer": None, "layers": [0, 2], "mode": "observe"},
    ],
    ids=str,
)
def test_every_kind_of_layer(options):
    report = shaken(make_llama(), **options).check()
    assert report.ok, str(report)
    assert set(report.results.values()) == {"yes"}
    assert len(report.points) == len(options.get("layers", [1]))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_a_base_in_half_precision(make):
    report = shaken(make().bfloat16()).check()
    assert report.ok, str(report)
    assert (report.base_dtype, report.layer_dtype) == ("bfloat16", "float32")
    assert report.tolerance == pytest.approx(4 * 2**-7)
    assert "as suits bfloat16" in str(report)


# What is broken is found


def tampered(lens, change):
    """A layer whose output is changed by `change(hidden states, output)`."""
    forward = lens.phi.forward

    def run(hidden_states, *args, **kwargs):
        output = forward(hidden_states, *args, **kwargs)
        change(hidden_states, output)
        return output

    lens.phi.forward = run


def sees_later_tokens(hidden_states, output):
    output.phi = output.phi + hidden_states[..., 0].sum(1, keepdim=True)


def sees_other_rows(hidden_states, output):
    output.phi = output.phi + hidden_states[..., 0].sum(0, keepdim=True)


def is_no_number(hidden_states, output):
    output.phi = output.phi * torch.nan


def counts_its_runs(hidden_states, output):
    counts_its_runs.n = getattr(counts_its_runs, "n", 0) + 1
    output.phi = output.phi + counts_its_runs.n


@pytest.mark.parametrize(
    ("change", "fails", "holds"),
    [
        (
            sees_later_tokens,
            {"causal", "right padding", "left padding", "packing", "cache"},
            {"batch", "states"},
        ),
        (sees_other_rows, {"batch", "right padding", "left padding"}, {"packing", "cache"}),
        (is_no_number, {"causal", "early exit", "same phi", "greedy"}, {"disabled", "observing"}),
        (counts_its_runs, {"causal", "batch", "cache", "early exit", "same phi", "saved"}, {"observing"}),
    ],
)
def test_a_faulty_layer(lens, change, fails, holds):
    tampered(lens, change)
    report = lens.check()
    assert not report.ok
    results = report.results
    assert {results[name] for name in fails} == {"no"}, str(report)
    assert {results[name] for name in holds} == {"yes"}
    for proof in report.proofs:
        assert proof.result != "no" or proof.note or not proof.difference <= proof.allowed


def test_a_prior_that_forgets(lens):
    """With a cache, a prior that starts anew at every token."""
    forward = lens.phi.forward
    lens.phi.forward = lambda h, mask=None, documents=None, memories=(), contrastive=True: forward(
        h, mask, documents, contrastive=contrastive
    )
    report = lens.check()
    assert {name for name, result in report.results.items() if result != "yes"} == {"cache"}
    assert report.results["cache"] == "no"


def test_a_layer_that_stays_when_disabled(lens):
    lens.base.model.layers[0].register_forward_hook(
        lambda module, args, output: output + 1e-6 * (len(lens._handles) == 0)
    )
    plain = lens._call_base
    lens._call_base = lambda ids, arguments: plain(ids, arguments) + (1e-6 if "use_cache" in arguments else 0)
    report = lens.check()
    assert report.results["disabled"] == "no"
    disabled = next(proof for proof in report.proofs if proof.name == "disabled")
    assert disabled.allowed == 0 < disabled.difference < 1e-5


def test_a_layer_without_gradient(lens):
    encode = lens.phi.encoder.forward
    lens.phi.encoder.forward = lambda states: encode(states).detach()
    proofs = {proof.name: proof for proof in lens.check().proofs}
    assert proofs["gradient"].result == "no"
    assert "does not reach 1 of the layer's" in proofs["gradient"].note


def test_a_layer_that_runs_twice_when_recomputed(lens, monkeypatch):
    """Recomputation around the block and its hooks: the trap that `checkpoint_activations` avoids."""
    from torch.utils.checkpoint import checkpoint

    import philens.lens.core

    def around(block):
        call = type(block).__call__
        monkeypatch.setattr(
            type(block), "__call__", lambda b, *a, **k: checkpoint(call, b, *a, use_reentrant=False, **k)
        )
        return lambda: monkeypatch.setattr(type(block), "__call__", call)

    monkeypatch.setattr(philens.lens.core, "recompute", around)
    proofs = {proof.name: proof for proof in lens.check().proofs}
    assert proofs["checkpointing"].result == "no"
    # What runs in the backward pass finds the arguments of the forward pass gone.
    assert "CheckpointError" in proofs["checkpointing"].note


# What the base cannot do


class Own(nn.Module):
    def __init__(self, causal=True):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30)
        self.causal = causal

    def forward(self, tokens):
        x = self.embed(tokens)
        around = x.cumsum(1) if self.causal else x.sum(1, keepdim=True).expand_as(x)
        return self.head(self.block(x + around))


def test_a_base_that_sees_later_tokens():
    report = shaken(Own(causal=False), layer=None, module="block", prior_heads=1).check()
    assert report.results["causal"] == report.results["right padding"] == "not supported by the base"
    assert report.ok  # nothing of philens is broken
    assert report.points[0].below is None
    assert report.results["greedy"] == report.results["checkpointing"] == "not applicable"
    assert "the base has no generate" in " ".join(str(report).split())


def test_a_vocabulary_that_is_not_known():
    class Continuous(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(1, 8)

        def forward(self, tokens):
            return self.block(tokens[..., None].float())

    lens = attach(Continuous(), PHiConfig(module="block", prior_heads=1))
    with pytest.raises(
        InputError, match="The vocabulary of Continuous is not known; give the model a config"
    ):
        lens.check()


def test_compiling_is_tried_when_asked(lens):
    torch._dynamo.reset()
    assert "compiled" not in lens.check().results
    assert check(lens, compile="no such backend").results["compiled"] == "not supported by the base"


@pytest.mark.slow
@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="needs transformers 5.23, see docs/extras.md",
)
def test_compiled_it_is_the_same(lens):
    """Compiled step by step in test_held.py; here every way of reading is, which takes half a minute."""
    torch._dynamo.reset()
    report = check(lens, compile="eager")
    assert report.results["compiled"] == "yes", str(report)


@pytest.mark.slow
def test_a_base_that_only_cannot_learn_compiled(lens):
    """As Qwen 3.5's with torch 2.13: its compiled forward pass is fine."""

    def without_gradients(graph, inputs):
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients")
        return graph

    torch._dynamo.reset()
    torch._dynamo.register_backend(without_gradients, "without_gradients")
    before = [parameter.requires_grad for parameter in lens.parameters()]
    assert check(lens, compile="without_gradients").results["compiled"] == "not supported by the base"
    assert [parameter.requires_grad for parameter in lens.parameters()] == before
