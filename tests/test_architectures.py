"""Every architecture, made small from its config, and every promise: what `lens.check()` finds is what is
written down here and in docs/architectures.md. One architecture of each family in every run, the others and
compiling among the slow tests.

`PHILENS_WRITE_DOCS=1 pytest tests/test_architectures.py` writes the page anew.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
import transformers as hf
from packaging import version

import philens
from philens.lens.check import check
from philens.lens.proofs import PROMISES

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
WRITE = bool(os.environ.get("PHILENS_WRITE_DOCS"))

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Weights ten times the usual: differences between tokens then stand far above rounding.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small(*left_out, **changes):
    return {name: value for name, value in (SMALL | changes).items() if name not in left_out}


# meta-llama/Llama-3.2-3B-Instruct: its config.json, key by key, with fewer blocks and narrower.
LLAMA_3_2 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 80,  # 128000
    "eos_token_id": [81, 88, 89],  # 128001, 128008, 128009
    "head_dim": 8,  # 128
    "hidden_act": "silu",
    "hidden_size": 48,  # 3072
    "initializer_range": 0.2,  # 0.02
    "intermediate_size": 128,  # 8192
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 6,  # 24
    "num_hidden_layers": 3,  # 28
    "num_key_value_heads": 2,  # 8
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 96,  # 128256
}
RECURRENT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "eos_token_id": None}

ARCHITECTURES = {
    "Llama": lambda: hf.LlamaConfig(**SMALL),
    "Llama 3.2": lambda: hf.LlamaConfig(**LLAMA_3_2),
    "Qwen 2": lambda: hf.Qwen2Config(**SMALL),
    "Qwen 3": lambda: hf.Qwen3Config(**SMALL, head_dim=8),
    "Mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=8),
    "Gemma 2": lambda: hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=8, final_logit_softcapping=5.0),
    "Gemma 3 (text)": lambda: hf.Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    # Of keys and values shared with a block below, the cache holds a placeholder.
    "Gemma 4 (text)": lambda: hf.Gemma4TextConfig(
        **small("num_hidden_layers"),
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "Phi-3": lambda: hf.Phi3Config(**SMALL),
    "OLMo 2": lambda: hf.Olmo2Config(**SMALL),
    "Mixtral (experts)": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
    "Qwen 2 MoE (experts)": lambda: hf.Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24
    ),
    "Qwen 3.5 (text)": lambda: hf.Qwen3_5TextConfig(
        **SMALL,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    # Blocks without attention or state have a placeholder, too.
    "Nemotron-H": lambda: hf.NemotronHConfig(
        **small("num_hidden_layers"),
        layer_types=["linear_attention", "mlp", "full_attention", "mlp"],
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=4,
    ),
    "GPT-2": lambda: hf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2, eos_token_id=2
    ),
    "GPT-NeoX": lambda: hf.GPTNeoXConfig(**small("num_key_value_heads")),
    "OPT": lambda: hf.OPTConfig(
        **small("intermediate_size", "num_key_value_heads", "initializer_range"),
        ffn_dim=48,
        word_embed_proj_dim=32,
        init_std=0.2,
    ),
    "Bloom": lambda: hf.BloomConfig(
        vocab_size=96, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2, eos_token_id=2
    ),
    "Falcon": lambda: hf.FalconConfig(
        **small("intermediate_size", "num_key_value_heads"), alibi=False, new_decoder_architecture=False
    ),
    "Mamba": lambda: hf.MambaConfig(**RECURRENT, state_size=8, initializer_range=0.2),
    "Mamba 2": lambda: hf.Mamba2Config(
        **RECURRENT, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4, initializer_range=0.2
    ),
    "RecurrentGemma": lambda: hf.RecurrentGemmaConfig(
        **small("max_position_embeddings", "initializer_range"),
        lru_width=32,
        attention_window_size=8,
        block_types=("recurrent", "attention", "recurrent"),
    ),
    "RWKV": lambda: hf.RwkvConfig(**RECURRENT, attention_hidden_size=32),
    "LSTM of philens": lambda: philens.LSTMConfig(**RECURRENT, intermediate_size=32, initializer_range=0.2),
}

# Where it is not `yes`: all of these are limits of the base models in transformers, with the reason in words.
ABSOLUTE = "its attention does not tell documents apart by their positions"
NO_POSITIONS = "it takes no positions, by which it could tell documents apart"
RUNS_ON = "its state runs on from document to document"
NO_GOING_BACK = "its state cannot forget the tokens that were guessed wrong"
UNSUPPORTED = {
    "Qwen 3.5 (text)": {
        "packing": RUNS_ON,
        "assisted": NO_GOING_BACK,
        "compiled": "torch 2.13 fails in the compiled base's backward pass",
    },
    "Nemotron-H": {"packing": RUNS_ON, "assisted": NO_GOING_BACK},
    "OPT": {"packing": ABSOLUTE},
    "Bloom": {"packing": NO_POSITIONS},
    "Falcon": {"packing": ABSOLUTE},
    "Mamba": {"packing": RUNS_ON, "assisted": NO_GOING_BACK},
    "Mamba 2": {"packing": RUNS_ON, "assisted": NO_GOING_BACK},
    "RecurrentGemma": {"packing": RUNS_ON, "assisted": NO_GOING_BACK},
    "RWKV": {
        "left padding": "it reads padding like any token",
        "packing": RUNS_ON,
        "cache": "it keeps its state in a form of its own, not in a cache of transformers",
        "greedy": "with its state, its own generate mixes up the rows of a batch",
        "beams": "its state cannot be reordered",
        "assisted": NO_GOING_BACK,
    },
    "LSTM of philens": {"assisted": NO_GOING_BACK},
}
# What a version of transformers mended.
SINCE = {"Falcon": {"packing": "5.24"}}
COLUMNS = [
    *("disabled", "gradient", "causal", "batch", "right padding", "left padding", "packing", "cache"),
    *("early exit", "states", "observing", "same phi", "greedy", "sampling", "beams", "assisted"),
    *("checkpointing", "compiled", "saved"),
]
# Checked in every run: rotary and absolute positions, sliding windows, experts, states, and one of our own.
FAMILIES = {"Llama 3.2", "GPT-2", "Gemma 2", "Mixtral (experts)", "Mamba 2", "LSTM of philens"}


def make(name):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()


def hooks_of(model):
    return [
        (type(module).__name__, number)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for number in hooks
    ]


def shaken_lens(base, **options):
    lens = philens.attach(base, philens.PHiConfig(**({"layer": 1, "prior_heads": 2} | options)))
    with torch.no_grad():
        for parameter in lens.phi.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lens


def slow_but(names):
    """All architectures; those not in `names` are slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]


@functools.cache
def checked(name, compiled=False):
    """The report of `check`, and what it cannot see: the base before attaching, and after detaching."""
    base = make(name)
    ids = torch.randint(3, 96, (2, 14))
    with torch.no_grad():
        before = base(ids).logits
    state, hooks = {key: value.clone() for key, value in base.state_dict().items()}, hooks_of(base)
    lens = shaken_lens(base).train()
    torch._dynamo.reset()
    random = torch.get_rng_state()
    report = check(lens, "aot_eager" if compiled else False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in lens.modules())
    assert all(p.requires_grad and p.grad is None for p in lens.parameters())
    with torch.no_grad():
        assert not torch.equal(lens(ids).logits, before)
        assert lens.detach().eval() is base
        assert torch.equal(base(ids).logits, before)
    assert hooks_of(base) == hooks
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert not any("forward" in module.__dict__ for module in base.modules())
    return report


def mended(name, column):
    since = SINCE.get(name, {}).get(column)
    return since is not None and version.parse(hf.__version__) >= version.parse(since)


def expected(name):
    lacks = {c for c in UNSUPPORTED.get(name, {}) if not mended(name, c)}
    return {c: "not supported by the base" if c in lacks else "yes" for c in COLUMNS}


@pytest.mark.parametrize("name", slow_but(FAMILIES))
def test_promises(name):
    report = checked(name)
    assert report.ok
    assert report.results == {c: e for c, e in expected(name).items() if c != "compiled"}, str(report)
    point = report.points[0]
    blocks = ARCHITECTURES[name]().num_hidden_layers
    assert (point.below, point.above) == (2, blocks - 2)
    assert point.path.endswith(".1")
    for proof in report.proofs:
        assert proof.result != "yes" or proof.difference is None or proof.difference <= proof.allowed
        # What exact arithmetic would make equal is far closer than what is allowed.
        if proof.result == "yes" and proof.allowed:
            assert proof.difference < 0.3 * proof.allowed, proof


@pytest.mark.slow  # test_held.py and test_check.py compile a model in every run
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled(name):
    assert checked(name, True).results == expected(name)


@functools.cache
def attached(name):
    """Where a layer after block 1 goes, once it has been seen to go in and out."""
    base, ids = make(name), torch.randint(3, 96, (2, 14))
    with torch.no_grad():
        before = base(ids).logits
        lens = shaken_lens(base).eval()
        with lens.disabled():
            assert torch.equal(lens(ids).logits, before)
        out = lens(ids)
        assert out.phi.shape == ids.shape
        assert torch.isfinite(out.phi).all()
        assert (out.phi > 0).all()
        assert not torch.equal(out.logits, before)
        later = torch.cat([ids[:, :10], ids[:, 10:].flip(1)], dim=1)
        torch.testing.assert_close(lens(later).phi[:, :10], out.phi[:, :10], atol=1e-4, rtol=1e-4)
        path = lens.module_paths[0]
        assert torch.equal(lens.detach()(ids).logits, before)
    return path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_layer_goes_in_and_out(name):
    assert attached(name).endswith(".1")


def page():
    """docs/architectures.md: `expected`, to which `test_promises` holds what is found."""
    promises = {promise.name: promise.meaning for promise in PROMISES}
    signs = {"yes": "✓", "not supported by the base": "-"}
    lines = [
        "# What works with which architecture",
        "",
        "<!-- Written by `PHILENS_WRITE_DOCS=1 pytest tests/test_architectures.py`; its tests compare. -->",
        "",
        "philens has no table of architectures inside: it finds a model's blocks by structure. This page",
        "shows small models made from the configs of `transformers` and what `lens.check()` proves on each;",
        "the same function tries your own model:",
        "",
        "```python",
        "import philens",
        "",
        "lens, _ = philens.load_run(philens.SHIPPED)  # or philens.attach(base, philens.PHiConfig(layer=19))",
        "print(lens.check())",
        "```",
        "",
        "✓ holds; - the base itself cannot do it: with the layer disabled it fails the same trial; a number:",
        "it can since that version of transformers.",
        "",
        f"| model | inserted after | {' | '.join(COLUMNS)} |",
        f"|---|---|{':-:|' * len(COLUMNS)}",
    ]
    for name in ARCHITECTURES:
        results = expected(name)
        cells = (SINCE.get(name, {}).get(column, signs[results[column]]) for column in COLUMNS)
        lines.append(f"| {name} | `{attached(name)}` | {' | '.join(cells)} |")
    lines += [
        "",
        "Float32; a value may differ by 1e-4 + 1e-4 of the largest of its kind (a phi of 300 nats by 0.03),",
        "and in fact differs by less than a third of that. Texts are longer than the sliding windows of",
        "these models. `torch.compile` with the backend `aot_eager`.",
        "",
        "What the columns mean:",
        "",
        *[f"- **{column}**: {promises[column].replace('... ', 'generated ')}" for column in COLUMNS],
        "",
        "What the bases cannot do:",
        "",
    ]
    for name, reasons in UNSUPPORTED.items():
        grouped = {reason: [c for c in reasons if reasons[c] == reason] for reason in reasons.values()}
        said = "; ".join(f"{', '.join(columns)}: {reason}" for reason, columns in grouped.items())
        until = "".join(f" ({c} until transformers {since})" for c, since in SINCE.get(name, {}).items())
        lines.append(f"- **{name}**: {said}{until}")
    return "\n".join([*lines, ""])


def test_the_page_says_what_is_found():
    if WRITE:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_written_config_is_that_of_llama_3_2():
    config = ARCHITECTURES["Llama 3.2"]()
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["rope_theta"] == 500000.0
    base = make("Llama 3.2")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    assert heads / key_heads == 24 / 8
