"""Text that a base model writes itself: training text for a layer in any model, without any data."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin

from philens.bases.facts import evaluating
from philens.support.errors import RecipeError
from philens.support.files import read_text, write_atomically
from philens.support.progress import shown
from philens.tasks.chat import begin_of_text, chat_prompt
from philens.tasks.random_streams import derive
from philens.tasks.sources import SELF, TextPart
from philens.training.distributed import wait_for_all
from philens.training.folder import RunFolder
from philens.training.recipe import Recipe

# Documents that a part has unless it says how many, and those written at once.
DOCUMENTS, AT_ONCE = 1024, 128
# A user's message that a model writes for itself has at most this share of a row.
_MESSAGE = 4
_OWN_TEXT = 21  # one of the independent streams below a seed


def with_own_text(recipe: Recipe, base: Any, tokenizer: Any, run: RunFolder, writes: bool) -> Recipe:
    """The recipe, with files in the run folder in place of the source `self`; they are written first.

    Args:
        base: the model that writes, on any device.
        writes: whether this process writes them; the others wait.

    Raises:
        RecipeError: the base cannot write.
        OutputError: a file cannot be written.
    """
    parts = dict(recipe.data.parts)
    for number, (name, part) in enumerate(parts.items()):
        if part.source == SELF and part.weight:
            path = run.own_text(name)
            if writes:
                _write(recipe, number, part, base, tokenizer, path)
            parts[name] = replace(part, source=str(path), name=None, documents=None)
    wait_for_all()
    return replace(recipe, data=replace(recipe.data, parts=parts))


def _write(recipe: Recipe, number: int, part: TextPart, base: Any, tokenizer: Any, path: Path) -> None:
    """Write a part's documents, going on from those that are there; batch by batch, each by its own seed."""
    if not isinstance(base, GenerationMixin):
        raise RecipeError(
            f"{type(base).__name__} has no generate and cannot write the text of source self; name another."
        )
    count = part.documents or DOCUMENTS
    lines = read_text(path).splitlines(keepends=True) if path.is_file() else []
    done = len(lines) // AT_ONCE if len(lines) < count else -(-count // AT_ONCE)
    lines = lines[: done * AT_ONCE]
    is_chat = part.name == "chat" or (part.name is None and bool(tokenizer.chat_template))
    for batch in shown(range(done, -(-count // AT_ONCE)), "writing text", -(-count // AT_ONCE) - done):
        torch.manual_seed(int(derive(derive(derive(_OWN_TEXT, recipe.data_seed), number), batch)[0]))
        rows = min(AT_ONCE, count - batch * AT_ONCE)
        write = _chats if is_chat else _texts
        lines += [f"{json.dumps(one)}\n" for one in write(base, tokenizer, rows, recipe.data.length)]
        content = "".join(lines).encode()
        write_atomically(path, lambda file, content=content: file.write(content))


def _texts(base: Any, tokenizer: Any, rows: int, length: int) -> Iterator[dict[str, Any]]:
    first = begin_of_text(tokenizer) or [tokenizer.eos_token_id or 0]
    for ids in _go_on(base, tokenizer, [first] * rows, length):
        yield {"text": tokenizer.decode(ids, skip_special_tokens=True)}


def _chats(base: Any, tokenizer: Any, rows: int, length: int) -> Iterator[dict[str, Any]]:
    """Chats: the model writes what a user asks, and then the reply."""
    opening = chat_prompt(tokenizer, [{"role": "user", "content": "\0"}]).partition("\0")[0]
    first = tokenizer(opening, add_special_tokens=False).input_ids
    asked = _go_on(base, tokenizer, [first] * rows, length // _MESSAGE)
    users = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in asked]
    prompts = [chat_prompt(tokenizer, [{"role": "user", "content": user}]) for user in users]
    read = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    for user, ids in zip(users, _go_on(base, tokenizer, read, length), strict=True):
        reply = tokenizer.decode(ids, skip_special_tokens=True).strip()
        yield {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]}


def _go_on(base: Any, tokenizer: Any, prompts: list[list[int]], length: int) -> list[list[int]]:
    """What the base draws after each prompt, until its end or `length` tokens in all."""
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    device = next(base.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
    # Whatever its authors would have it show. A small model's unlikely tokens soon make no sense, and text of
    # which they are left out is closer to people's (Holtzman et al. 2020, arXiv 1904.09751).
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9}
    with evaluating(base):
        drawn = base.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(1, length - longest),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            **options,
        )
    found = []
    for row in drawn[:, longest:].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        found.append(row[:end])
    return found
