"""Rows about reading texts: scores, lengths, generation. Shapes: B rows, T tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import philens
from benchmarks.harness import Bench, Comparison, Target, total
from benchmarks.models import frozen_llama, random_texts, random_words, real_base
from benchmarks.training import Parts, model_text, shape_text
from philens.lens.losses import token_surprisal
from philens.lens.model import PHiModel
from philens.support.errors import InputError
from philens.training.build import start_model
from philens.training.recipe import load_recipe

NO_MINICONS = "minicons is not installed (pip install minicons)"
# Lengths of the texts of a realistic mix, in tokens: log-normal.
MEDIAN, SIGMA, SHORTEST, LONGEST = 150, 1.0, 8, 2048
# Texts that somebody who does not sort them reads at once.
UNSORTED_ROWS = 16


def _note(lens: PHiModel, what: str) -> str:
    point = lens.module_paths[0].rsplit(".", 1)[-1]
    dtype = str(next(lens.base.parameters()).dtype).removeprefix("torch.")
    return f"{what}, {model_text(lens)}, layer after block {point}, {dtype}"


def _texts_alike(bench: Bench) -> tuple[list[str], int]:
    """Texts of one length, so that none is padded, and their tokens."""
    count, length = bench.pick((2, 24), (4, 512), (16, 2048))
    return random_texts([length] * count), count * length


def _shape(bench: Bench) -> tuple[int, int]:
    return bench.pick((2, 384), (12, 768), (28, 3072))


def phi_only(bench: Bench) -> list[Comparison]:
    """`philens.score` of phi alone, which stops at the layer: from texts to columns."""
    with frozen_llama(bench, *_shape(bench)) as (lens, tokenizer, recipe):
        lens.eval()
        texts, tokens = _texts_alike(bench)
        input_ids = tokenizer(texts, return_tensors="pt").input_ids.to(bench.device)
        parts = Parts(bench, lens, recipe, {"input_ids": input_ids, "labels": input_ids})
        seconds = bench.alternate(
            {
                "scoring phi only": lambda: philens.score(
                    lens, tokenizer, texts, metrics=["phi"], batch_tokens=tokens
                ),
                "plain forward pass with logits": parts.plain,
                "blocks": parts.below,
                "layer": parts.layer_forward,
            }
        )
        ours, plain, *pieces = seconds.values()
        note = _note(lens, shape_text({"input_ids": input_ids}))
        share = (parts.number + 1) / len(parts.base.model.layers)
    details = {"share_of_blocks": share, "parts_seconds": {piece.name: piece.median for piece in pieces}}
    expected = total("blocks run + the layer, alone", pieces)
    return [
        Comparison(ours, expected, Target(1.1), note, details),
        Comparison(ours, plain, None, f"{share:.0%} of the blocks run, no head"),
    ]


def phi_and_surprisal(bench: Bench) -> list[Comparison]:
    """`philens.score` of phi and the base's surprisal, from texts to columns; the layer is float32."""
    dtypes = dict.fromkeys(["float32", str(bench.dtype).removeprefix("torch.")])
    return [comparison for dtype in dtypes for comparison in _phi_and_surprisal(bench, dtype)]


def _phi_and_surprisal(bench: Bench, dtype: str) -> list[Comparison]:
    with frozen_llama(bench, *_shape(bench), model__dtype=dtype) as (lens, tokenizer, _):
        return _beside_plain(bench, lens.eval(), tokenizer, _texts_alike(bench)[0], Target(1.0))


def _beside_plain(
    bench: Bench, lens: PHiModel, tokenizer: Any, texts: list[str], against_minicons: Target
) -> list[Comparison]:
    """Texts of one length: a plain forward pass, and minicons where it is installed."""
    input_ids = tokenizer(texts, return_tensors="pt").input_ids.to(bench.device)
    tokens = input_ids.numel()

    def ours() -> Any:
        return philens.score(lens, tokenizer, texts, metrics=["phi", "surprisal"], batch_tokens=tokens)

    @torch.no_grad()
    def plain() -> None:
        with lens.disabled():
            lens.base(input_ids)

    works: dict[str, Callable[[], Any]] = {"scoring phi and surprisal": ours}
    works["plain forward pass with logits"] = plain
    minicons = _minicons(bench, lens, tokenizer)
    if minicons is not None:
        found = np.array([pair[1] for pair in minicons(texts)[0]][1:])
        _check_alike(ours()[0].surprisal[1:], found)
        works["minicons, surprisal alone"] = lambda: minicons(texts)
    seconds = bench.alternate(works)
    note = _note(lens, shape_text({"input_ids": input_ids}))
    note += f"; {NO_MINICONS}" * (minicons is None)
    scored, forward, *others = seconds.values()
    return [
        Comparison(scored, forward, Target(1.25), note),
        *(
            Comparison(scored, other, against_minicons, "texts of one length, all at once")
            for other in others
        ),
    ]


def real(bench: Bench) -> list[Comparison]:
    """SmolLM2 reads texts: phi alone, phi and surprisal in both precisions, texts of mixed lengths."""
    count, length = bench.pick((2, 24), (8, 512), (16, 2048))
    drawn = MEDIAN * np.exp(SIGMA * np.random.default_rng(0).standard_normal(bench.pick(6, 48, 256)))
    sizes = drawn.clip(SHORTEST, bench.pick(32, LONGEST, LONGEST)).round().astype(int).tolist()
    found = []
    changes: dict[str, Any] = {"data.parts": {"automata": {"source": "automata"}}}
    changes |= {"phi.layer": 1} if bench.scale == "smoke" else {}
    dtypes = dict.fromkeys([str(bench.dtype).removeprefix("torch."), "float32"])
    with real_base(bench) as base:
        for number, dtype in enumerate(dtypes):
            recipe = load_recipe("smollm2", {"model.base": base, "model.dtype": dtype, **changes})
            lens, tokenizer = start_model(recipe)
            lens.to(bench.device).eval()
            texts, mixed = (random_words(tokenizer, some) for some in ([length] * count, sizes))
            found += _beside_plain(bench, lens, tokenizer, texts, Target(1.1))
            if number == 0:
                found += _phi_beside_plain(bench, lens, tokenizer, texts) + _mixed(
                    bench, lens, tokenizer, mixed
                )
    return found


def _phi_beside_plain(bench: Bench, lens: PHiModel, tokenizer: Any, texts: list[str]) -> list[Comparison]:
    input_ids = tokenizer(texts, return_tensors="pt").input_ids.to(bench.device)

    @torch.no_grad()
    def plain() -> None:
        with lens.disabled():
            lens.base(input_ids)

    seconds = bench.alternate(
        {
            "scoring phi only": lambda: philens.score(
                lens, tokenizer, texts, metrics=["phi"], batch_tokens=input_ids.numel()
            ),
            "plain forward pass with logits": plain,
        }
    )
    return [Comparison(*seconds.values(), Target(0.75), _note(lens, shape_text({"input_ids": input_ids})))]


def _mixed(bench: Bench, lens: PHiModel, tokenizer: Any, texts: list[str]) -> list[Comparison]:
    """Texts of mixed lengths, against minicons in batches as they come."""
    minicons = _minicons(bench, lens, tokenizer)
    if minicons is None:
        return []
    batches = [slice(first, first + UNSORTED_ROWS) for first in range(0, len(texts), UNSORTED_ROWS)]
    seconds = bench.alternate(
        {
            "scoring phi and surprisal": lambda: philens.score(
                lens, tokenizer, texts, metrics=["phi", "surprisal"]
            ),
            "minicons, surprisal alone": lambda: [minicons(texts[batch]) for batch in batches],
        }
    )
    note = _note(lens, f"{len(texts)} texts of mixed lengths, {UNSORTED_ROWS} at once")
    return [Comparison(*seconds.values(), Target(1.0), note)]


def _minicons(bench: Bench, lens: PHiModel, tokenizer: Any) -> Callable[[list[str]], Any] | None:
    try:
        from minicons.scorer import IncrementalLMScorer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    scorer = IncrementalLMScorer(lens.base, bench.device.type, tokenizer)

    def run(texts: list[str]) -> Any:
        with lens.disabled():
            return scorer.token_score(texts, surprisal=True)

    return run


def _check_alike(ours: Any, theirs: Any) -> None:
    """Raise an InputError unless both say the same; of 17 nats bfloat16 leaves steps of 0.125."""
    apart = float((np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))).max())
    if not apart < 0.01:
        raise InputError(f"philens and minicons differ by {apart:.1%} in surprisal; one of them is wrong.")


def lengths(bench: Bench) -> list[Comparison]:
    """Texts of a realistic mix of lengths, tokens a second: phi and surprisal in one pass that observes."""
    blocks, width = bench.pick((2, 384), (4, 384), (28, 3072))
    count, shrink = bench.pick((6, 10), (48, 1), (256, 1))
    drawn = MEDIAN / shrink * np.exp(SIGMA * np.random.default_rng(0).standard_normal(count))
    sizes = drawn.clip(SHORTEST, LONGEST).round().astype(int)
    texts = random_texts(sizes.tolist())
    with frozen_llama(bench, blocks, width, phi__mode="observe") as (lens, tokenizer, _):
        lens.eval()

        @torch.no_grad()
        def read(texts: list[str]) -> None:
            """As anybody would: texts as they come, padded to the longest, without what `score` adds."""
            batch = tokenizer(texts, padding=True, return_tensors="pt").to(bench.device)
            result = lens(batch.input_ids, batch.attention_mask, returns="states")
            for values in (result.phi, token_surprisal(result, batch.input_ids)):
                values.float().cpu()

        batches = [slice(first, first + UNSORTED_ROWS) for first in range(0, count, UNSORTED_ROWS)]
        works: dict[str, Callable[[], Any]] = {
            "philens.score": lambda: philens.score(lens, tokenizer, texts),
            "padded, unsorted": lambda: [read(texts[batch]) for batch in batches],
            "one by one": lambda: [read([text]) for text in texts],
        }
        minicons = _minicons(bench, lens, tokenizer)
        if minicons is not None:
            works["minicons, surprisal alone"] = lambda: [minicons(texts[batch]) for batch in batches]
        seconds = bench.alternate(works)
        mix = f"{count} texts, log-normal, median {MEDIAN} tokens, sigma {SIGMA:g}; {UNSORTED_ROWS} at once"
        note = _note(lens, mix)
    tokens = int(sizes.sum())
    ours, *others = (series.per_second(tokens, "tokens") for series in seconds.values())
    padded = sum(int(sizes[batch].max()) * len(sizes[batch]) for batch in batches)
    details = {"tokens": tokens, "tokens_unsorted_with_padding": padded}
    return [
        Comparison(ours, others[0], Target(3.0, at_most=False), note, details),
        Comparison(ours, others[1], None, "each text a batch of its own"),
        *(Comparison(ours, other, Target(1.0, at_most=False), "the same batches") for other in others[2:]),
    ]


def generation(bench: Bench) -> list[Comparison]:
    """Greedy generation with phi of every token; the row does not end before the last token."""
    blocks, width = _shape(bench)
    rows, prompt, new = bench.pick((2, 8, 4), (4, 32, 96), (16, 128, 256))
    with frozen_llama(bench, blocks, width) as (lens, tokenizer, _):
        lens.eval()
        input_ids = tokenizer(random_texts([prompt] * rows), return_tensors="pt").input_ids.to(bench.device)
        one = input_ids[:1]
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        base: Any = lens.base

        def alone(ids: torch.Tensor) -> None:
            with lens.disabled(), torch.no_grad():
                base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

        seconds = bench.alternate(
            {
                "generation with phi": lambda: lens.generate(input_ids, **options),
                "transformers' generate alone": lambda: alone(input_ids),
            }
        )
        streamed = bench.alternate(
            {
                "phi as each token comes": lambda: lens.generate(one, on_token=lambda *_: None, **options),
                "transformers' generate, one row": lambda: alone(one),
            }
        )
        note = _note(lens, f"{rows} rows, prompts of {prompt}, {new} new tokens")
    (ours, theirs), (followed, followed_alone) = seconds.values(), streamed.values()
    return [
        Comparison(ours, theirs, Target(1.15), note),
        Comparison(followed, followed_alone, None, "one row, on_token"),
    ]
