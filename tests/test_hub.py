import base64
import hashlib
import json
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conftest import make_gpt2, make_llama
from philens import PHiConfig, attach, load
from philens.bases.fingerprint import fingerprint
from philens.bases.hub import load_pretrained
from philens.bases.lstm import LSTMConfig, LSTMForCausalLM
from philens.bases.tokenizer import character_tokenizer
from philens.lens.adapter import describe_base
from philens.scoring.score import score
from philens.support.errors import AdapterError, ConfigError, OutputError

IDS = torch.arange(97, 107)[None]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    make_llama().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model's folder, to be damaged."""
    return shutil.copytree(model, tmp_path / "model")


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def error_of(name, kind=AdapterError, **options):
    with pytest.raises(kind) as caught:
        load_pretrained(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 500
    return message


# Folders


def test_a_folder(model):
    base, tokenizer = load_pretrained(model)
    assert not base.training
    assert base.dtype == torch.float32
    assert torch.equal(base(IDS).logits, make_llama()(IDS).logits)
    assert tokenizer("az ").input_ids == [97, 122, 32]
    assert load_pretrained(str(model), tokenizer=False)[1] is None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_another_precision(model, dtype):
    assert load_pretrained(model, dtype=dtype)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_other_architectures(tmp_path, name):
    sizes = LSTMConfig(hidden_size=16, intermediate_size=16)
    base = make_gpt2() if name == "gpt2" else LSTMForCausalLM(sizes).eval()
    base.save_pretrained(tmp_path)
    found, _ = load_pretrained(tmp_path, tokenizer=False)
    assert type(found) is type(base)
    assert torch.equal(found(IDS).logits, base(IDS).logits)


def test_a_model_in_several_files(tmp_path):
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    found, _ = load_pretrained(tmp_path, tokenizer=False)
    assert torch.equal(found(IDS).logits, make_llama()(IDS).logits)
    part = min(tmp_path.glob("model-*-of-*.safetensors"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert f"{part} is not a whole safetensors file" in error_of(tmp_path, tokenizer=False)
    part.unlink()
    assert f"There is no file {part}" in error_of(tmp_path, tokenizer=False)
    index = tmp_path / "model.safetensors.index.json"
    for parts in ({"lm_head.weight": "../secret.safetensors"}, {"lm_head.weight": "a.bin"}):
        index.write_text(json.dumps({"weight_map": parts}))
        assert "names something else than safetensors files" in error_of(tmp_path, tokenizer=False)
    index.write_text("{}")
    assert "does not say which file holds which weights" in error_of(tmp_path, tokenizer=False)


def test_parts_under_any_name(hub, tmp_path):
    """They are the files that the index names, here and on the Hub."""
    folder = tmp_path / "parts"
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for number, part in enumerate(sorted(set(listed["weight_map"].values()))):
        (folder / part).rename(folder / f"weights [{number}].safetensors")
        listed["weight_map"] = {
            key: f"weights [{number}].safetensors" if file == part else file
            for key, file in listed["weight_map"].items()
        }
    index.write_text(json.dumps(listed))
    files = contents(folder) | {"other.safetensors": b"another model's", "pytorch_model.bin": b"pickle"}
    hub.add("someone/llama", files)
    for name in (folder, "someone/llama"):
        found, _ = load_pretrained(name, tokenizer=False)
        assert torch.equal(found(IDS).logits, make_llama()(IDS).logits)
    assert set(hub.fetched) == set(contents(folder))
    count = len(hub.fetched)
    assert load_pretrained("someone/llama", tokenizer=False, local_only=True)
    assert len(hub.fetched) == count


def add_keys(folder, **tensors):
    weights = load_file(folder / WEIGHTS) | {key.replace("__", "."): value for key, value in tensors.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_what_older_versions_wrote_and_carries_no_weight(copy, caplog, tmp_path):
    mask = torch.ones(8, 8).tril()[None, None]
    add_keys(
        copy,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.rand(8),
        model__layers__0__self_attn__bias=mask.bool(),
        model__layers__1__attention__bias=mask - mask.tril(-4),  # local attention
        model__layers__1__attention__masked_bias=torch.tensor(-1e9),
        model__position_ids=torch.arange(8)[None],
    )
    base, _ = load_pretrained(copy)
    assert torch.equal(base(IDS).logits, make_llama()(IDS).logits)
    assert "tensors of an older version, which the model computes by itself" in caplog.text
    assert "model.layers.0.self_attn.bias" in caplog.text
    # GPT-2 of the first days: without the name of the part, with a mask in each block.
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2" / WEIGHTS)
    weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
    weights |= {f"h.{n}.attn.bias": torch.ones(1, 1, 128, 128).tril() for n in range(3)}
    save_file(weights, tmp_path / "gpt2" / WEIGHTS, metadata={"format": "pt"})
    base, _ = load_pretrained(tmp_path / "gpt2", tokenizer=False)
    assert torch.equal(base(IDS).logits, make_gpt2()(IDS).logits)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("model__layers__0__self_attn__bias", torch.ones(8, 8)),
        ("model__layers__0__self_attn__bias", torch.rand(8, 8).tril()),
        ("model__layers__0__self_attn__bias", torch.ones(8)),
        ("model__layers__0__self_attn__o_proj__bias", torch.ones(8, 8).tril()),
        ("model__layers__3__position_ids__weight", torch.arange(8)),
    ],
)
def test_what_may_be_a_weight_is_none_to_leave_out(copy, key, tensor):
    add_keys(copy, **{key: tensor}, model__inv_freq=torch.rand(8))
    name = key.replace("__", ".")
    assert f"do not fit its config.json: it has an unknown {name}; it is damaged" in error_of(copy)


def test_a_missing_weight_stays_an_error(copy):
    add_keys(copy, model__inv_freq=torch.rand(8))
    weights = load_file(copy / WEIGHTS)
    del weights["model.norm.weight"]
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    assert "it misses model.norm.weight; it is damaged" in error_of(copy)


# Adapters of peft.


@pytest.fixture
def tuned(model, tmp_path):
    """A LoRA of the model, and the two together."""
    peft = pytest.importorskip("peft")
    base = load_pretrained(model, tokenizer=False)[0]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    together = peft.get_peft_model(base, config).eval()
    together.peft_config["default"].base_model_name_or_path = str(model)
    together.save_pretrained(tmp_path / "lora")
    return together


def test_a_lora_is_merged_into_its_base(hub, model, tmp_path, tuned):
    folder = tmp_path / "lora"
    hub.add("someone/llama", contents(model))
    plain = load_pretrained(model, tokenizer=False)[0]
    with torch.no_grad():
        expected = tuned(IDS).logits
        assert (expected - plain(IDS).logits).abs().max() > 0.1
        base, tokenizer = load_pretrained(folder)
        torch.testing.assert_close(base(IDS).logits, expected)
    assert type(base) is type(plain)
    assert len(tokenizer) == 128  # of its base
    assert base.state_dict().keys() == plain.state_dict().keys()
    described = describe_base(base)
    assert described["name_or_path"] == "lora"
    assert described["merged_from"] == {
        "base": str(model),
        "revision": None,
        "fingerprint": fingerprint(plain),
        "lora_sha256": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }
    assert described["fingerprints"] != describe_base(plain)["fingerprints"]
    lens = attach(base, PHiConfig(layer=1, prior_heads=2))
    (scores,) = score(lens, tokenizer, ["a cat"])
    assert scores.provenance["merged_from"] == described["merged_from"]
    lens.save_pretrained(tmp_path / "layer")
    load(load_pretrained(folder, tokenizer=False)[0], tmp_path / "layer").detach()
    with pytest.raises(AdapterError, match="was trained in another base model"):
        load(plain, tmp_path / "layer")

    # From the Hub, both.
    configured = json.loads((folder / "adapter_config.json").read_text())
    configured |= {"base_model_name_or_path": "someone/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(configured))
    hub.add("someone/lora", contents(folder) | {"optimizer.pt": b"pickle"})
    base, _ = load_pretrained("someone/lora")
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, expected)
    assert "optimizer.pt" not in hub.fetched
    origin = describe_base(base)
    assert origin["revision"] == hub.repositories["someone/lora"]["sha"]
    assert origin["merged_from"]["revision"] == hub.repositories["someone/llama"]["sha"]


def test_loras_that_cannot_be_merged(model, tmp_path, tuned, monkeypatch):
    folder = tmp_path / "lora"
    path = folder / "adapter_config.json"
    whole, weights = json.loads(path.read_text()), load_file(folder / "adapter_model.safetensors")

    def refused(kind=AdapterError, tensors=weights, given=None, **values):
        path.write_text(json.dumps(whole | values))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return error_of(folder, kind, **(given or {}))

    assert "names no base model; write it into" in refused(base_model_name_or_path=None)
    assert "names itself as its base" in refused(base_model_name_or_path=str(folder))
    message = refused(base_model_name_or_path="/no/where")
    assert "is an adapter of peft for /no/where: There is no folder /no/where" in message
    with monkeypatch.context() as patch:
        patch.setattr(
            "philens.bases.hub._quantization_config", lambda *_: None
        )  # bitsandbytes is not at hand
        assert "leave out quantization" in refused(ConfigError, given={"quantization": "int8"})
    name = min(weights)
    less = {key: value for key, value in weights.items() if key != name}
    assert f"it misses {name}; it is damaged or of another base" in refused(tensors=less)
    assert "has an unknown other.lora_A.weight" in refused(
        tensors=weights | {"other.lora_A.weight": torch.ones(2)}
    )
    misshapen = weights | {name: torch.ones(3, 3)}
    assert "has no adapter that can be loaded" in refused(tensors=misshapen)
    shutil.copy(model / WEIGHTS, folder)
    assert "holds a whole model and an adapter of peft" in refused()
    (folder / WEIGHTS).unlink()
    monkeypatch.setitem(sys.modules, "peft", None)
    message = refused(ConfigError)
    assert message.endswith("an adapter of peft, needs peft: install it with `pip install 'philens[lora]'`.")
    (folder / "adapter_model.safetensors").unlink()
    path.write_text(json.dumps(whole))
    assert "There is no file" in error_of(folder)


def test_prompts_of_peft_have_no_merged_form(model, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_pretrained(model, tokenizer=False)[0]
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompts = peft.get_peft_model(base, config)
    prompts.peft_config["default"].base_model_name_or_path = str(model)
    prompts.save_pretrained(tmp_path / "prompts")
    message = error_of(tmp_path / "prompts")
    assert "is an adapter of the kind PROMPT_TUNING, which has no merged form" in message


# Models that see as well, and how the language part is loaded: by itself, or by the class that has all parts.
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SEEING = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
CLIP = SEEING | {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8}
QWEN = SEEING | {"depth": 2, "num_heads": 4, "out_hidden_size": 32}
HYBRID = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
PLACES = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
WRAPPED = {
    "Qwen3_5ForCausalLM": lambda: hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=TEXT | HYBRID, vision_config=QWEN | {"num_position_embeddings": 16})
    ),
    "Llama4ForCausalLM": lambda: hf.Llama4ForConditionalGeneration(
        hf.Llama4Config(
            text_config=TEXT | {"head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": []},
            vision_config=CLIP
            | {
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        )
    ),
    "Mistral3ForConditionalGeneration": lambda: hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config=hf.MistralConfig(**TEXT, head_dim=8), vision_config=hf.PixtralVisionConfig(**CLIP)
        )
    ),
    "Qwen2_5_VLForConditionalGeneration": lambda: hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=TEXT | ROTARY, vision_config=QWEN | {"fullatt_block_indexes": [1]}, **PLACES
        )
    ),
    "Qwen3VLForConditionalGeneration": lambda: hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            text_config=TEXT | ROTARY | {"head_dim": 8},
            vision_config=QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **PLACES,
        )
    ),
    "LlavaForConditionalGeneration": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**CLIP), image_token_index=5
        )
    ),
    "Gemma3ForConditionalGeneration": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=TEXT | {"head_dim": 8}, vision_config=CLIP, mm_tokens_per_image=1, image_token_index=5
        )
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_that_sees_as_well_reads_text(hub, tmp_path, name, caplog):
    made = WRAPPED[name]().eval()
    made.save_pretrained(tmp_path)
    hub.add("someone/sees", contents(tmp_path))
    ids = IDS.clone()
    with torch.no_grad():
        # Llama 4 with all its parts does not run in transformers 5.24.
        whole = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval() if name[:6] == "Llama4" else made
        expected = whole(input_ids=ids).logits
        for source in (tmp_path, "someone/sees"):
            base, _ = load_pretrained(source, tokenizer=False)
            assert type(base).__name__ == name
            assert torch.equal(base(input_ids=ids).logits, expected)
    assert "philens" not in caplog.text
    lens = attach(base, PHiConfig(layer=1, prior_heads=2)).eval()
    with torch.no_grad():
        whole, first = lens(ids).phi, lens(ids[:, :4], use_cache=True)
        rest = lens(ids[:, 4:], cache=first.cache, use_cache=True)
        torch.testing.assert_close(torch.cat((first.phi, rest.phi), 1), whole, rtol=1e-4, atol=1e-3)
    generation = lens.generate(ids, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(generation.phi[:, : ids.shape[1]], whole, rtol=1e-4, atol=1e-3)
    lens.save_pretrained(tmp_path / "adapter")
    lens.detach()
    assert load(base, tmp_path / "adapter").module_paths == lens.module_paths


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "LlavaForConditionalGeneration"])
def test_a_part_of_a_model_that_sees_is_as_strict(tmp_path, name):
    WRAPPED[name]().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    keys = (key for key in weights if key.endswith("layers.1.self_attn.q_proj.weight"))
    text = next(key for key in keys if "vision" not in key)
    added = text.replace("layers.1", "layers.7")
    save_file(weights | {added: torch.ones(3)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert "it has an unknown " in error_of(tmp_path, tokenizer=False)
    del weights[text]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert "it misses " in error_of(tmp_path, tokenizer=False)


def test_what_needs_an_image_or_an_encoder_reads_no_text(tmp_path):
    hf.BlipForConditionalGeneration(
        hf.BlipConfig(text_config=TEXT | {"bos_token_id": 1}, vision_config=CLIP)
    ).save_pretrained(tmp_path / "blip")
    assert "(BlipForConditionalGeneration) is not a causal language model" in error_of(tmp_path / "blip")


def test_a_run_folder(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    base, tokenizer = load_pretrained(tmp_path)
    assert torch.equal(base(IDS).logits, make_llama()(IDS).logits)
    assert len(tokenizer) == 128


@pytest.mark.parametrize("name", ["no/such/folder", "./folder", "~/folder", "", "a\0b", "x" * 300])
def test_a_name_that_is_none(name):
    assert "it is no Hub id either: those look like owner/name." in error_of(name)


def test_what_is_not_a_models_folder(model, tmp_path):
    assert "is a file; give the folder it is in" in error_of(model / "config.json")
    assert f"{tmp_path} has no config.json, so no model" in error_of(tmp_path)
    message = error_of(model, revision="main")
    assert message.endswith("is a folder here and has no revisions; leave out revision='main'.")


def test_offline():
    unknown = "is neither a folder nor (whole) in the local cache, and the Hub is not to be asked"
    assert f"someone/model {unknown}" in error_of("someone/model")
    assert f"gpt2 {unknown}" in error_of("gpt2", local_only=True)


def test_settings_that_do_not_exist(model):
    assert "dtype must be one of auto, float32" in error_of(model, ConfigError, dtype="float99")
    assert "must be int8, int4 or None, not 'int2'" in error_of(model, ConfigError, quantization="int2")


def test_bitsandbytes_is_missing(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = error_of(model, ConfigError, quantization="int4")
    assert message == (
        "A base in int4 needs bitsandbytes: install it with `pip install 'philens[quantize]'`."
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "(BertForMaskedLM) is not a causal"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "(T5Model) is not a causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "Classification) is not a causal"),
        ({"model_type": "next_year"}, "has the model type 'next_year', which transformers"),
        ({"model_type": 3}, "has the model type 3, which transformers"),
        (
            {"hidden_size": "wide"},
            "has no configuration that can be loaded (Validation error for field 'hidden_size'",
        ),
        (
            {"hidden_size": 64},
            "do not fit its config.json: it has model.embed_tokens.weight of another shape",
        ),
        ({"num_hidden_layers": 2}, "it has an unknown model.layers.2."),
        ({"num_hidden_layers": 4}, "it misses model.layers.3."),
        ({"auto_map": 3}, "is not that of a model; it is damaged"),
        ({"architectures": "Llama"}, "is not that of a model; it is damaged"),
    ],
)
def test_a_configuration_that_does_not_fit(copy, values, message):
    configure(copy, **values)
    assert message in error_of(copy)


def test_code_of_a_repository_runs_only_when_trusted(copy):
    ran = copy.parent / "ran"
    (copy / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    configure(copy, model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    message = error_of(copy)
    assert (
        "runs Python code of its own; read that code, and if you trust it, say --trust-remote-code" in message
    )
    assert not ran.exists()
    configure(copy, model_type="llama", architectures=["LlamaForCausalLM"], auto_map={})
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    assert "runs Python code of its own" in error_of(copy)
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert not ran.exists()
    configure(copy, model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    base, _ = load_pretrained(copy, trust_remote_code=True)
    assert type(base).__name__ == "OwnForCausalLM"
    assert torch.equal(base(IDS).logits, make_llama()(IDS).logits)


def test_pickles_are_refused(copy):
    weights = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    assert "has no model.safetensors; save the model with safetensors." in error_of(copy)
    torch.save(weights, copy / "pytorch_model.bin")
    message = error_of(copy)
    assert "has no model.safetensors, only pytorch_model.bin, and pickles are never loaded" in message
    shutil.move(copy / "pytorch_model.bin", copy / WEIGHTS)
    assert "is not a whole safetensors file" in error_of(copy)


def test_damaged_weights(copy):
    whole = (copy / WEIGHTS).read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (copy / WEIGHTS).write_bytes(whole[:size])
        assert "is not a whole safetensors file" in error_of(copy)
    (copy / WEIGHTS).write_bytes(whole)
    weights = load_file(copy / WEIGHTS)
    weights["model.norm.wait"] = weights.pop("model.norm.weight")
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    assert "it has an unknown model.norm.wait and 1 more; it is damaged or something else" in error_of(copy)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_odd_things_in_a_files_place(copy, file):
    (copy / file).unlink()
    (copy / file).symlink_to(file)
    assert "is not a regular file" in error_of(copy)
    (copy / file).unlink()
    (copy / file).mkdir()
    assert "is not a regular file" in error_of(copy)


def test_a_huge_configuration_is_not_read(copy):
    with (copy / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "is larger than" in error_of(copy)


def test_tokenizers_that_are_none(copy):
    (copy / "tokenizer.json").write_text("{}")
    assert "has no tokenizer that can be loaded" in error_of(copy)
    empty = Tokenizer(models.BPE(vocab={}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>").save_pretrained(copy)
    assert "holds a tokenizer without a vocabulary" in error_of(copy)
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer; save the model's tokenizer beside it" in error_of(copy)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_base(tmp_path, quantization, caplog):
    """On a CPU too: forward, backward through the frozen base, and the same adapter."""
    pytest.importorskip("bitsandbytes")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    whole, _ = load_pretrained(tmp_path / "base", tokenizer=False)
    base, _ = load_pretrained(tmp_path / "base", quantization=quantization, tokenizer=False)
    matrices = [p for name, p in base.named_parameters() if "proj" in name]
    assert {p.dtype for p in matrices} == {torch.int8 if quantization == "int8" else torch.uint8}
    lens = attach(base, PHiConfig(layer=1, prior_heads=2))
    lens.freeze_base()
    lens(IDS, labels=IDS).loss.backward()
    assert lens.phi.encoder.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in base.parameters())
    with torch.no_grad():
        difference = (base(IDS).logits.float() - whole(IDS).logits).abs().mean()
    assert 0 < difference < 2

    lens.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base"]
    assert saved["quantization"] == quantization
    assert saved["fingerprints"]["weights"] == []
    lens.detach()
    assert load(base, tmp_path / "adapter").detach() is base
    assert "philens" not in caplog.text
    load(whole, tmp_path / "adapter").detach()
    assert f"was trained in a base with weights in {quantization}, these are in float32" in caplog.text
    with torch.no_grad():
        whole.model.norm.weight[3] += 1
    with pytest.raises(AdapterError, match="was trained in another base model"):
        load(whole, tmp_path / "adapter")


# The Hub, by a server that speaks as much of its protocol as fetching and uploading take


class FakeHub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.fetched = []

    def add(self, name, files, gated=False, private=False):
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repositories[name] = {"files": files, "gated": gated, "private": private, "sha": commit}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message=""):
        self.answer(status, X_Error_Code=code, X_Error_Message=message)

    def repository(self, name, revision="main"):
        token = self.headers.get("Authorization")
        repository = self.server.repositories.get(name)
        if token == "Bearer expired":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if repository is None or (repository["private"] and token is None):
            return self.refuse(401 if token is None else 404, "RepoNotFound")
        if revision not in ("main", repository["sha"]):
            return self.refuse(404, "RevisionNotFound")
        return repository

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if repository := self.repository(*found.groups()):
                files = repository["files"].items()
                listed = [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in files]
                self.answer(200, listed)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if repository := self.repository(found[1], found[2] or "main"):
                private = repository["private"]
                self.answer(200, {"id": found[1], "sha": repository["sha"], "private": private})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if repository := self.repository(found[1], found[2]):
                if repository["gated"] and self.headers.get("Authorization") is None:
                    return self.refuse(401, "GatedRepo")
                if found[3] not in repository["files"]:
                    return self.refuse(404, "EntryNotFound")
                body = repository["files"][found[3]]
                self.server.fetched.append(found[3])
                self.answer(200, body, ETag=f'"{_oid(body)}"', X_Repo_Commit=repository["sha"])
        else:
            self.refuse(404)

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer good":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            wanted = json.loads(sent)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name in self.server.repositories:
                return self.answer(409, {"url": f"{constants.ENDPOINT}/{name}"})
            self.server.add(name, {}, private=wanted["visibility"] == "private")
            self.answer(200, {"url": f"{constants.ENDPOINT}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(sent)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            self.answer(200, {"files": modes})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repository = self.server.repositories[found[1]]
            lines = [json.loads(line)["value"] for line in sent.splitlines() if b'"file"' in line]
            files = {line["path"]: base64.b64decode(line["content"]) for line in lines}
            self.server.add(found[1], repository["files"] | files, private=repository["private"])
            sha = self.server.repositories[found[1]]["sha"]
            url = f"{constants.ENDPOINT}/{found[1]}/commit/{sha}"
            self.answer(200, {"commitUrl": url, "commitOid": sha, "success": True})
        else:
            self.refuse(404)


def _oid(body):
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = FakeHub()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CARD = b"---\nlicense: other\nlicense_name: llama3.2\nlicense_link: https://example.org/l\n---\n# Base\n"


def test_a_model_from_the_hub(hub, model):
    files = contents(model) | {
        "README.md": CARD,
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.pth": b"pickle",
        "consolidated.safetensors": b"twice",
        "own.py": b"raise SystemExit",
    }
    hub.add("someone/llama", files)
    base, tokenizer = load_pretrained("someone/llama")
    assert torch.equal(base(IDS).logits, make_llama()(IDS).logits)
    assert len(tokenizer) == 128
    assert {*contents(model), "README.md"} == set(hub.fetched)
    described = describe_base(base)
    assert described["name_or_path"] == "someone/llama"
    assert described["revision"] == hub.repositories["someone/llama"]["sha"]
    # Again, without a network.
    count = len(hub.fetched)
    assert load_pretrained("someone/llama", local_only=True)[0].config._commit_hash == described["revision"]
    hub.repositories.clear()
    assert load_pretrained("someone/llama", revision=described["revision"], tokenizer=False)[1] is None
    assert len(hub.fetched) == count


def test_a_folder_goes_before_the_hub(hub, model, tmp_path, monkeypatch):
    hub.add("someone/llama", {})
    shutil.copytree(model, tmp_path / "someone" / "llama")
    monkeypatch.chdir(tmp_path)
    assert describe_base(load_pretrained("someone/llama")[0])["name_or_path"] == "llama"
    assert not hub.fetched


def test_what_the_hub_refuses(hub, model, monkeypatch):
    hub.add("someone/gated", contents(model), gated=True)
    assert error_of("someone/gated") == (
        f"someone/gated is gated: accept the licence on {constants.ENDPOINT}/someone/gated and log in with "
        "`hf auth login` or set HF_TOKEN."
    )
    message = error_of("someone/else")
    assert (
        "There is neither a folder nor a repository on the Hub called someone/else; check the name" in message
    )
    hub.add("someone/private", contents(model), private=True)
    assert "and if it is private, log in with `hf auth login` or set HF_TOKEN." in error_of("someone/private")
    hub.add("someone/llama", contents(model))
    message = error_of("someone/llama", revision="v7")
    assert message.startswith("someone/llama has no revision 'v7'; give a branch, tag or commit that http")
    monkeypatch.setenv("HF_TOKEN", "expired")
    message = error_of("someone/llama")
    assert message.startswith("The Hub refuses your token for someone/llama; log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert load_pretrained("someone/gated")[0].config._name_or_path == "someone/gated"


def test_no_network(hub):
    hub.shutdown()
    hub.server_close()
    message = error_of("someone/llama")
    assert message.startswith("someone/llama is not a folder here, and the Hub did not give it (")
    assert "refused" in message
    assert message.endswith("check the name and the network.")


def test_a_layer_goes_to_the_hub_and_back(hub, model, tmp_path, monkeypatch):
    hub.add("someone/llama", contents(model) | {"README.md": CARD})
    base, _ = load_pretrained("someone/llama")
    torch.manual_seed(3)
    lens = attach(base, PHiConfig(layer=-2, prior_heads=2, init="random")).eval()
    monkeypatch.setenv("HF_TOKEN", "good")
    training = {
        "recipe": {"model": {"base": "someone/llama"}, "train": {"steps": 7}},
        "data": ["letters", "words"],
        "metrics": {"surprisal_base": 2.0, "surprisal": 2.25, "loss_gap": 0.25, "phi": 31.5},
    }
    address = lens.push_to_hub("me/phi-llama", training=training)
    assert address == f"{constants.ENDPOINT}/me/phi-llama"
    pushed = hub.repositories["me/phi-llama"]
    assert set(pushed["files"]) == {"adapter_config.json", "phi_layer.safetensors", "README.md"}
    assert not pushed["private"]
    with torch.no_grad():
        phi = lens(IDS).phi
    lens.detach()

    # What else lies there is not fetched.
    pushed["files"]["huge.bin"] = b"pickle"
    again = load(base, "me/phi-llama")
    assert "huge.bin" not in hub.fetched
    assert again.source == f"me/phi-llama@{pushed['sha']}"
    with torch.no_grad():
        assert torch.equal(again(IDS).phi, phi)
    again.push_to_hub("me/copy")
    card = hub.repositories["me/copy"]["files"]["README.md"].decode()
    assert "| all | 2 | 2.25 | 0.25 | 31.5 |" in card
    assert "- letters\n- words" in card
    assert "train:\n  steps: 7\n" in card
    again.detach()

    # The card's own snippet, in a fresh process's place.
    assert "base_model: someone/llama" in card
    assert "license_name: llama3.2" in card
    assert "- licence of the base: llama3.2" in card
    snippet = re.search(r"```python\n(.+?)```", card, re.DOTALL)[1]
    assert (
        f'load_pretrained("someone/llama", revision="{hub.repositories["someone/llama"]["sha"]}")' in snippet
    )
    assert 'philens.load(base, "me/copy")' in snippet
    names = {}
    exec(snippet, names)
    assert names["lens"].module_paths == ["model.layers.1"]
    assert len(names["scores"][0].phi) == len("One morning, Gregor Samsa woke.")


def test_what_uploading_refuses(hub, monkeypatch):
    lens = attach(make_llama(), PHiConfig(layer=1, prior_heads=2))

    def refused(name, **options):
        with pytest.raises(OutputError) as caught:
            lens.push_to_hub(name, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "Cannot upload to me/phi: the Hub refuses it; log in with `hf auth login`" in refused("me/phi")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert "Cannot upload to a/b/c: Repo id must be" in refused("a/b/c")
    hub.add("me/open", {})
    assert "me/open is public already; make it private there" in refused("me/open", private=True)
    assert hub.repositories["me/open"]["files"] == {}
    lens.push_to_hub("me/hidden", private=True)
    assert hub.repositories["me/hidden"]["private"]
    hub.shutdown()
    hub.server_close()
    assert "check the name and the network." in refused("me/phi")


def test_what_is_on_the_hub_but_no_adapter(hub, model):
    hub.add("someone/llama", contents(model))
    base = make_llama()
    for name, message in {
        "someone/llama": "has no adapter_config.json, so no adapter",
        "someone/nothing": "There is neither a folder nor a repository on the Hub",
    }.items():
        with pytest.raises(AdapterError, match=message):
            load(base, name)
    with pytest.raises(AdapterError, match="has no revision 'v7'"):
        load(base, "someone/llama", revision="v7")
