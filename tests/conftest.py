"""Shared by all tests: no network, one thread, fixed seeds, small models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make_llama(**options):
    # Weights ten times the usual: differences between tokens then stand far above rounding.
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | options))).eval()


def make_gpt2(**options):
    sizes = {
        "vocab_size": 128,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 128,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(sizes | options))).eval()


MODELS = {"llama": make_llama, "gpt2": make_gpt2}


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture(params=sorted(MODELS))
def base(request):
    """A small Transformer of either architecture, evaluation mode."""
    return MODELS[request.param]()
