"""Models, batches and texts that rows measure with, made from seeds: nothing is downloaded.

Shapes: B rows, T tokens, D hidden size.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.harness import Bench, Unavailable
from philens.bases.hub import load_pretrained
from philens.lens.model import PHiModel
from philens.support.errors import PhilensError
from philens.training.build import start_model
from philens.training.recipe import Recipe, load_recipe
from philens.training.trainer import training_rows

VOCABULARY = 128_256  # of Llama 3


def write_llama(folder: Path, blocks: int, width: int, vocabulary: int = VOCABULARY) -> int:
    """Write a bfloat16 model of Llama 3.2 3B's proportions with random weights, and a tokenizer of bytes.

    Args:
        width: D, a multiple of 384; 3072 is the 3B model's.

    Returns:
        Its number of parameters.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from philens.bases.tokenizer import byte_tokenizer

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 384,
        head_dim=128,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for module in model.modules():  # what is no parameter is made again
        if hasattr(module, "inv_freq"):
            module.__init__(config)
    generator = torch.Generator().manual_seed(0)
    tile = (0.02 * torch.randn(2**20, generator=generator)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            repeats = -(-parameter.numel() // tile.numel())
            parameter.copy_(tile.repeat(repeats)[: parameter.numel()].view(parameter.shape))
            if parameter.ndim == 1:
                parameter.fill_(1.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def scratch_recipe(bench: Bench, **changes: Any) -> Recipe:
    """The paper's recipe for a Transformer from nothing, or a tiny one; `phi=None` is the plain model."""
    values: dict[str, Any] = {"train.batch_size": bench.pick(2, 2, 16)}
    if bench.scale == "smoke":
        sizes = {"hidden_size": 48, "intermediate_size": 64, "layers": 3, "heads": 2}
        values |= {f"model.{name}": size for name, size in sizes.items()}
        values |= {"phi.layer": 1, "phi.prior_heads": 2, "data.length": 64, "train.compile": False}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    if "phi" in changes:
        values = {key: value for key, value in values.items() if not key.startswith("phi.")}
    return load_recipe("transformer_pfa", values)


@contextlib.contextmanager
def frozen_llama(
    bench: Bench, blocks: int, width: int, **changes: Any
) -> Iterator[tuple[PHiModel, Any, Recipe]]:
    """A frozen base of Llama 3.2 3B's proportions with a layer after two thirds of its blocks, its tokenizer,
    and the recipe that made it.

    The vocabulary is as large in proportion to the width as the 3B model's, so that the head takes as large a
    share of the time.
    """
    values = {
        "model.dtype": str(bench.dtype).removeprefix("torch."),
        "phi.layer": blocks * 2 // 3 - 1,
        "data.parts": {"automata": {"source": "automata"}},
        "data.workers": 0,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    with tempfile.TemporaryDirectory() as scratch:
        write_llama(Path(scratch), blocks, width, VOCABULARY * width // 3072)
        recipe = load_recipe("llama_3_2_3b", values | {"model.base": scratch})
        lens, tokenizer = start_model(recipe)
        yield lens.to(bench.device), tokenizer, recipe


@contextlib.contextmanager
def real_base(bench: Bench) -> Iterator[str]:
    """SmolLM2-135M-Instruct, as `model.base` names it; at smoke scale a tiny model of random weights.

    Raises:
        Unavailable: it has not been fetched.
    """
    if bench.scale == "smoke":
        with tempfile.TemporaryDirectory() as scratch:
            write_llama(Path(scratch), 3, 384, 512)
            yield scratch
        return
    try:
        load_pretrained("smollm2", local_only=True, tokenizer=False)
    except PhilensError as error:
        raise Unavailable(f"it needs SmolLM2: {error}") from error
    yield "smollm2"


def packed_batch(bench: Bench, recipe: Recipe, tokenizer: Any = None) -> dict[str, Tensor]:
    """The first batch that training by the recipe reads, each value (B, T)."""
    rows = training_rows(recipe, tokenizer)
    batch = default_collate([rows[number] for number in range(recipe.train.batch_size)])
    return {name: value.to(bench.device) for name, value in batch.items()}


def random_words(tokenizer: Any, lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Texts of words that are a token each, of as many tokens."""
    pieces = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    words = [piece for piece in pieces if piece[:1] == " " and piece[1:].isascii() and piece[1:].isalpha()]
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(words or [" "], length)) for length in lengths]


def random_texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Texts of letters and spaces, each of as many tokens for a tokenizer of bytes that puts one before."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz    ", np.uint8)
    generator = np.random.default_rng(seed)
    return [generator.choice(letters, max(1, length - 1)).tobytes().decode("ascii") for length in lengths]
