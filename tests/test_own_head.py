"""The multi-token head that a base brings along: loaded, measured, and equal to a reference by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import philens
from conftest import make_llama
from philens import MTDConfig, PHiConfig, TokenScores, attach, score
from philens.cli import main
from philens.support.errors import AdapterError, ConfigError, InputError, RecipeError
from philens.training.recipe import load_recipe

# Older ones take the block of a head for one of the first, which are dense.
READS = DeepseekV3Config(first_k_dense_replace=1).get_mtp_config().first_k_dense_replace == 0
pytestmark = pytest.mark.skipif(not READS, reason="this transformers does not read DeepSeek-V3's head")

CHARACTERS = philens.character_tokenizer()
BLOCKS = 2


@pytest.fixture(scope="module")
def whole():
    """The blocks of a model, and one more: that of its head."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": BLOCKS + 1,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).eval()


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """A checkpoint as DeepSeek-V3's: the head is a block after the last, with what it has of its own."""
    folder = tmp_path_factory.mktemp("model")
    whole.save_pretrained(folder)
    CHARACTERS.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    head = f"model.layers.{BLOCKS}."
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{head}{norm}.weight"] = 1 + 0.3 * torch.randn(32)
    weights[f"{head}eh_proj.weight"] = 0.2 * torch.randn(32, 64)
    weights[f"{head}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    weights[f"{head}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS}))
    return folder


@pytest.fixture
def base(folder):
    return philens.load_pretrained(folder)[0]


def rms(x, weight):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def by_hand(folder, whole, ids):
    """(T,) KL(main[1:-1] || head[:-1]), and of the last token likewise; NaN of the first.

    Tensors are read from the file; of transformers come the blocks alone, that of the head from `whole`.
    """
    saved, model = load_file(folder / "model.safetensors"), whole.model
    head = {name.removeprefix(f"model.layers.{BLOCKS}."): value for name, value in saved.items()}
    length = len(ids)

    def run(block, x, places):
        later = torch.ones(len(places), len(places)).triu(1) * torch.finfo(torch.float32).min
        turns = model.rotary_emb(x, position_ids=places[None])
        return block(
            x, position_embeddings=turns, attention_mask=later[None, None], position_ids=places[None]
        )

    places = torch.arange(length)
    embedded = saved["model.embed_tokens.weight"][ids][None]
    h = embedded
    for block in model.layers[:BLOCKS]:
        h = run(block, h, places)
    h = rms(h, saved["model.norm.weight"])
    main = (h @ saved["lm_head.weight"].T)[0].log_softmax(-1)
    # h_t beside the embedding of token t + 1.
    both = rms(embedded[:, 1:], head["enorm.weight"]), rms(h[:, :-1], head["hnorm.weight"])
    x = torch.cat(both, -1) @ head["eh_proj.weight"].T
    x = rms(run(model.layers[BLOCKS], x, places[1:]), head["shared_head.norm.weight"])
    ahead = (x @ head["shared_head.head.weight"].T)[0].log_softmax(-1)
    found = (main[1:].exp() * (main[1:] - ahead)).sum(-1)
    torch.testing.assert_close(found[:-1], (main[1:-1].exp() * (main[1:-1] - ahead[:-1])).sum(-1))
    return torch.cat((torch.tensor([math.nan]), found))


def same(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_it_is_the_divergence_by_definition(base, folder, whole):
    lens = attach(base, MTDConfig(own=True))
    ids = torch.randint(3, 128, (2, 11))
    found = lens(ids).mtd
    assert found[:, 1:].mean() > 0.1
    for row, one in zip(ids, found, strict=True):
        same(one, by_hand(folder, whole, row))
    plain = base.lm_head.weight.clone(), lens.detach()(input_ids=ids).logits
    assert torch.equal(plain[0], load_file(folder / "model.safetensors")["lm_head.weight"])
    assert torch.equal(plain[1], philens.load_pretrained(folder)[0](input_ids=ids).logits)
    assert all(weight.requires_grad for weight in base.parameters())


def test_scored(base, folder, whole, tmp_path, capsys):
    text = "abcab abcab"
    expected = by_hand(folder, whole, torch.tensor(CHARACTERS(text)["input_ids"]))
    lens = attach(base, [PHiConfig(layer=0, mode="observe", prior_heads=1), MTDConfig(own=True)])
    (one,) = score(lens, CHARACTERS, text)
    assert list(one.columns) == ["phi", "mtd", "surprisal"]
    same(one.columns["mtd"], expected)
    lens.detach()
    alone = attach(base, PHiConfig(layer=0, prior_heads=1))
    alone.save_pretrained(tmp_path / "layer")
    together = philens.load(alone.detach(), [tmp_path / "layer", "own"])
    same(score(together, CHARACTERS, text)[0].columns["mtd"], expected)
    together.detach()
    (tmp_path / "a.txt").write_text(text)
    call = ["score", str(tmp_path / "a.txt"), "--model", str(folder), "--adapter", "own"]
    output = tmp_path / "scores"
    assert main([*call, "--metrics", "mtd,surprisal", "--format", "jsonl", "--output", str(output)]) == 0
    (shard,) = output.glob("*.jsonl")
    record = TokenScores.from_json(shard.read_text())
    same(record.columns["mtd"], expected)
    assert main([*call, "--metrics", "mtd"]) == 0
    assert f"{float(expected[1]):.3f}"[:4] in capsys.readouterr().out
    assert np.isnan(record.columns["surprisal"][0])
    assert main([*call, "--metrics", "phi"]) == 2
    assert "phi needs a PHi layer, and this model has a shallow head alone" in capsys.readouterr().err


def test_what_is_promised_holds(base):
    report = attach(base, MTDConfig(own=True)).check()
    assert report.ok, str(report)
    proven = {name for name, result in report.results.items() if result == "yes"}
    assert proven >= {"causal", "batch", "left padding", "packing", "cache", "states", "greedy", "beams"}
    assert report.results["gradient"] == report.results["saved"] == "not applicable"
    assert report.layer_trainable == 0


def test_another_attention(base, folder, whole):
    """The head keeps to one that takes any mask."""
    base.set_attn_implementation("eager")
    lens = philens.load(base, "own")
    ids = torch.randint(3, 128, (1, 7))
    same(lens(ids).mtd[0], by_hand(folder, whole, ids[0]))


# Errors.


def test_a_base_without_a_head(base, folder, tmp_path, capsys):
    told = r"LlamaForCausalLM brings no multi-token head .*\(its configuration names none\); train a shallow"
    with pytest.raises(ConfigError, match=told):
        attach(make_llama(), MTDConfig(own=True))
    make_llama().save_pretrained(tmp_path / "llama")
    CHARACTERS.save_pretrained(tmp_path / "llama")
    (tmp_path / "a.txt").write_text("abc")
    call = ["score", str(tmp_path / "a.txt"), "--model", str(tmp_path / "llama"), "--adapter", "own"]
    assert main(call) == 2
    assert "LlamaForCausalLM brings no multi-token head that can be measured" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="it was not loaded from a checkpoint"):
        attach(DeepseekV3ForCausalLM(base.config.__class__(**small(base))), MTDConfig(own=True))
    copy = without(f"layers.{BLOCKS}.", folder, tmp_path)
    with pytest.raises(ConfigError, match="its checkpoint holds none"):
        attach(philens.load_pretrained(copy)[0], MTDConfig(own=True))


def test_a_head_that_is_not_whole(folder, tmp_path):
    """As one of a kind that transformers does not know yet."""
    copy = without(f"layers.{BLOCKS}.mlp.gate.weight", folder, tmp_path)
    with pytest.raises(ConfigError, match=r"transformers .* does not find all its weights; a newer one may"):
        philens.load(philens.load_pretrained(copy)[0], "own")


def small(base):
    return base.config.to_dict() | {"_name_or_path": ""}


def without(part, folder, tmp_path):
    """A copy of the checkpoint that lacks the weights whose names have `part`."""
    copy = tmp_path / "without"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_block_too_many_is_no_head(folder, tmp_path):
    copy = without(f"layers.{BLOCKS}.eh_proj.weight", folder, tmp_path)
    with pytest.raises(AdapterError, match=f"has an unknown model.layers.{BLOCKS}"):
        philens.load_pretrained(copy)


def test_it_is_not_trained(base, tmp_path):
    lens = attach(base, MTDConfig(own=True))
    ids = torch.randint(3, 128, (1, 5))
    with pytest.raises(InputError, match="measured as it is, and not trained; leave out labels"):
        lens(ids, labels=ids)
    with pytest.raises(ConfigError, match="saved with the base; load it as the adapter 'own'"):
        lens.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()
    with pytest.raises(ConfigError, match="leave out embedding, depth, heads and mlp_size"):
        MTDConfig(own=True, depth=2)
    with pytest.raises(RecipeError, match=r"mtd\.own measures a head of the base as it is"):
        load_recipe(None, {"model.base": "somewhere", "mtd.own": True})
