"""A small Llama with a byte-level tokenizer as a GGUF file, as llama.cpp's converter writes one."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

from conftest import make_llama
from philens.bases.tokenizer import train_bpe

TEXTS = [
    "def area(radius):\n    return 3 * radius ** 2\n",
    "In 1969 there were 2500 of them, in 1970 3000.",
] * 20
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
Q = GGMLQuantizationType


def make_model(**options: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, which parts digits; `options` of its configuration."""
    tokenizer = train_bpe(TEXTS, 300, split_digits=True)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 1}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return make_llama(vocab_size=len(tokenizer), **(sizes | ids | options)), tokenizer


def write(
    path: Path,
    model: Any,
    tokenizer: Any,
    kind: GGMLQuantizationType = Q.F32,
    architecture: str = "llama",
    pre: str | None = "smollm",
    begins: bool = True,
    tensors: Mapping[str, np.ndarray] = MappingProxyType({}),
    **values: Any,
) -> Path:
    """Write a model as a GGUF file.

    Args:
        kind: of matrices; vectors are in float32.
        architecture: the file's name for it.
        pre: name of the rule by which texts are split.
        begins: say that texts begin with a token.
        tensors: more of them, by name.
        values: more of the header, by key with __ for dots; integers and texts.
    """
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_name("A small one")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = tokenizer.backend_tokenizer
    tokens = [token for token, _ in sorted(bpe.get_vocab().items(), key=lambda item: item[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if one in special else TokenType.NORMAL for one in tokens])
    writer.add_token_merges([" ".join(pair) for pair in _merges(bpe)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    if begins:
        writer.add_add_bos_token(True)
    writer.add_chat_template(tokenizer.chat_template)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    for name, weight in model.named_parameters():
        value = weight.detach().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp has the halves of a head's rows interleaved
            value = (
                value.reshape(-1, 2, config.head_dim // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            )
        own = kind if value.ndim == 2 else Q.F32
        writer.add_tensor(_name(name), quantize(np.ascontiguousarray(value), own), raw_dtype=own)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(bpe: Any) -> list[tuple[str, str]]:
    found = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(one) if isinstance(one, list) else tuple(one.split(" ")) for one in found]


def _name(name: str) -> str:
    """A weight's name in the file."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed:
        return fixed[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"
