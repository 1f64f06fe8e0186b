"""Models as recipes have them, before their first step, and what they read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from philens.bases import hub
from philens.bases.facts import text_config
from philens.lens.attention import knows_packs, register_documents
from philens.lens.config import PHiConfig
from philens.lens.instrument import make_parts
from philens.lens.model import PHiModel, attach
from philens.support.errors import AdapterError, RecipeError
from philens.tasks.packing import TokenDocuments
from philens.tasks.rendering import with_rendering
from philens.tasks.sources import SELF, Source
from philens.tasks.text import TextMixture, open_parts
from philens.training.folder import RunFolder
from philens.training.recipe import Recipe
from philens.training.sizes import check_data_sizes, check_weights

# Characters that a tokenizer is learned from.
SAMPLE = 8_000_000
Sources = Mapping[str, Source]
"""The parts of a recipe's text that are open, by name."""


def open_sources(recipe: Recipe) -> Sources:
    """The text that a recipe reads, but for what the base is to write itself: opened once, before a large
    model is loaded.

    Raises:
        RecipeError: sizes that no machine has room for.
        PhilensError: a part cannot be read.
    """
    check_data_sizes(recipe)
    read = {name: part for name, part in recipe.data.parts.items() if part.weight and part.source != SELF}
    return open_parts(read, recipe.data.tasks, recipe.data_seed) if read else {}


def start_model(
    recipe: Recipe, checkpoint: Path | None = None, sources: Sources | None = None
) -> tuple[PHiModel, Any]:
    """The model that a recipe trains, before its first step, and its tokenizer.

    Args:
        recipe: what is to be trained.
        checkpoint: where to take a tokenizer from that was made when the run started; the model's weights are
            not read.
        sources: what is open of the text; None opens it.

    Raises:
        RecipeError: sizes that do not fit together, or a base that does not fit the data.
        PhilensError: the base, or the text that a tokenizer is made from, cannot be read.
    """
    sources = open_sources(recipe) if sources is None else sources
    if recipe.model.base is None:
        if checkpoint is None:
            tokenizer = _make_tokenizer(recipe, sources)
        else:
            tokenizer = load_tokenizer(RunFolder(checkpoint).model)
        base = build_base(recipe, tokenizer)
        set_attention(base, recipe)
        return attach_fresh(base, recipe), with_rendering(tokenizer, recipe.data.rendering)
    base, tokenizer = recipe.model.source().load_base()
    letters, known = [97, 122, 32], getattr(text_config(base), "vocab_size", None) or math.inf
    read = tokenizer("az ", add_special_tokens=False).input_ids
    if not recipe.data.parts and (read != letters or known <= max(letters)):
        raise RecipeError(
            f"{recipe.model.base} does not read characters as formal languages need it; give data.parts."
        )
    set_attention(base, recipe)
    torch.manual_seed(recipe.seed)
    return attach_fresh(base, recipe), with_rendering(tokenizer, recipe.data.rendering)


def set_attention(base: Any, recipe: Recipe) -> None:
    """Let a base compute attention as the recipe has it.

    Raises:
        RecipeError: this base or this machine cannot.
    """
    chosen = other_attention(base, recipe)
    if chosen is None:
        return
    try:
        base.set_attn_implementation(chosen)
    except (AttributeError, ImportError, ValueError) as error:
        raise RecipeError(
            f"model.attention {chosen} does not work here ({hub.reason(error)}); set it to auto."
        ) from error


def other_attention(base: Any, recipe: Recipe) -> str | None:
    """The attention that a base has in training in place of its own; None leaves it that."""
    if recipe.model.attention != "auto":
        return recipe.model.attention
    if not recipe.data.packing or not knows_packs(base) or torch.accelerator.is_available():
        return None
    return register_documents()


def attach_fresh(base: Any, recipe: Recipe) -> PHiModel:
    """A base model with the recipe's instruments, fresh. For a recipe without any, the smallest PHi layer
    there is, which stays out of the path and is neither trained nor saved."""
    if not recipe.instruments:
        lens = attach(base, PHiConfig(layer=0, latent_size=1, prior="unit", init="random"))
        lens.phi.requires_grad_(False)
        lens.disable()
        return lens
    width = getattr(text_config(base), "hidden_size", 1)
    sizes = {
        "phi": "phi.latent_size, phi.prior_mlp_size and phi.prior_depth",
        "mtd": "mtd.mlp_size and mtd.depth",
    }
    for config in recipe.instruments:
        widths = [width] * len(config.places())
        check_weights(sizes[config.kind], lambda config=config, widths=widths: make_parts(config, widths))
    lens = attach(base, recipe.instruments)
    if recipe.model.base is not None and recipe.model.frozen:
        lens.freeze_base()
    return lens


def _make_tokenizer(recipe: Recipe, sources: Sources) -> Any:
    from philens.bases.tokenizer import byte_tokenizer, character_tokenizer, train_bpe

    if recipe.model.tokenizer == "characters":
        return character_tokenizer()
    tokenizer = byte_tokenizer()
    if recipe.model.tokenizer == "bytes":
        return tokenizer
    sample = text_mixture(recipe, tokenizer, sources).sample(SAMPLE)
    return train_bpe(sample, recipe.model.vocab_size, recipe.model.split_digits)


def text_mixture(recipe: Recipe, tokenizer: Any, sources: Sources | None = None) -> TextMixture:
    """The stream of documents that a recipe with `data.parts` reads."""
    data = recipe.data
    return TextMixture(data.parts, tokenizer, data.length, recipe.data_seed, data.tasks, sources)


def evaluation_documents(
    recipe: Recipe, tokenizer: Any, count: int, sources: Sources | None = None
) -> dict[str, TokenDocuments]:
    """At most so many documents of each text part that training never reads, each at most a row long.

    Parts without any are left out: those with fewer than 20 documents.
    """
    text = text_mixture(recipe, tokenizer, sources)
    found = {name: text.held_out(name, count) for name in text.sources}
    return {name: documents for name, documents in found.items() if len(documents)}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    hub.check_small_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the files may be damaged: anything can come out of them
        raise AdapterError(
            f"{folder} does not hold a tokenizer that can be loaded ({hub.reason(error)}); it is damaged."
        ) from error


def build_base(recipe: Recipe, tokenizer: Any = None) -> Any:
    """The recipe's base model with fresh weights, drawn from its seed; a transformers model.

    Args:
        tokenizer: tokenizer whose ids the model reads; None means ASCII characters.

    Raises:
        RecipeError: sizes that do not fit together.
    """
    torch.manual_seed(recipe.seed)
    try:
        sizes = "model.layers, model.hidden_size and model.intermediate_size"
        check_weights(sizes, lambda: _build_base(recipe, tokenizer))
        return _build_base(recipe, tokenizer)
    except StrictDataclassError as error:
        raise RecipeError(f"model does not hold together ({hub.reason(error)}); change its sizes.") from error


def _build_base(recipe: Recipe, tokenizer: Any) -> Any:
    model = recipe.model
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if model.tokenizer != "characters" and tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        tokens = {"vocab_size": len(tokenizer), **ids}
    if model.architecture == "lstm":
        from philens.bases.lstm import LSTMConfig, LSTMForCausalLM

        return LSTMForCausalLM(
            LSTMConfig(
                **tokens,
                hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size,
                num_hidden_layers=model.layers,
            )
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **tokens,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            max_position_embeddings=max(2048, recipe.data.length),
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=True,
            initializer_range=model.initializer_range,
        )
    )
