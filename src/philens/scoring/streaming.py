"""Texts as a model writes them, token by token."""

from collections.abc import Callable
from typing import Any

import torch

from philens.lens.generation import PHiGeneration, generate
from philens.lens.model import PHiModel
from philens.support.errors import InputError
from philens.tasks.chat import prompt_tokens


def stream(
    lens: PHiModel,
    tokenizer: Any,
    prompt: str,
    write: Callable[[str, float, float], None],
    **options: Any,
) -> PHiGeneration:
    """Generate after a prompt and call `write` with the text, phi (mtd where there is no PHi layer) and
    surprisal of every token as it comes, those of the prompt first.

    Tokens that end within a character are held back until it is whole; their values are summed.

    Args:
        options: options of `philens.lens.generation.generate`.

    Raises:
        InputError: an empty prompt, or tokens cannot be streamed.
    """
    prompt_ids = prompt_tokens(tokenizer, prompt)
    if not prompt_ids:
        raise InputError("The prompt is empty; give at least one token to start from.")
    device = next(lens.parameters()).device
    ids: list[int] = []
    held: list[tuple[float, float]] = []
    shown = ""

    def write_held(ended: bool = False) -> None:
        nonlocal shown
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if ended or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            write(text[len(shown) :], *map(sum, zip(*held, strict=True)))
            held.clear()
            shown = text

    def on_token(token: int, value: float, surprisal: float) -> None:
        ids.append(token)
        held.append((value, surprisal))
        write_held()

    input_ids = torch.tensor([prompt_ids], device=device)
    generation = generate(lens, input_ids, on_token=on_token, skip_prompt=False, **options)
    if held:  # it ended within a character
        write_held(ended=True)
    return generation
