"""Whether a recipe's sizes can fit into this machine: said before memory is taken for them."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import nn

from philens.support.errors import RecipeError, TrainingError
from philens.training.recipe import Recipe

# Weights, gradients and a moment (AdamW has two), in float32; on an accelerator all but the weights, which
# are made before they go there, are in its own memory.
_TRAINED, _MADE = 12, 4
_INTEGER = 8


def check_data_sizes(recipe: Recipe) -> None:
    """Raise a RecipeError if the data that a recipe holds at once needs more memory than there is."""
    data, train, tasks = recipe.data, recipe.train, recipe.data.tasks
    if train.steps * train.batch_size * train.accumulate * data.length > 2**62:
        raise RecipeError("train.steps asks for more tokens than can be counted; lower it.")
    shortest, longest = (tasks.strings[k] * (tasks.string_length[k] + 1) for k in (0, 1))
    memorized = tasks.memorized_automata * tasks.memorized_strings * tasks.string_length[0]
    # Each is less than what is needed, so that nothing is refused that could work.
    needs = {
        "data.length and data.group": data.length * data.group,
        "data.length and train.batch_size": data.length * train.batch_size,
    }
    if not data.parts:
        needs |= {
            "data.tasks.states": tasks.states[1] ** 2,
            "data.tasks.strings and data.tasks.string_length": min(longest, tasks.max_length or longest),
            "data.tasks.memorized_automata and data.tasks.memorized_strings": memorized,
            "train.evaluation_documents": train.evaluation_documents * min(shortest, data.length),
        }
    for names, numbers in needs.items():
        _check(names, numbers * _INTEGER)


def check_weights(names: str, build: Callable[[], nn.Module]) -> None:
    """Raise a RecipeError if a module's weights, with what training adds, need more memory than there is.

    Args:
        names: what in the recipe decides its size.
        build: makes the module; is called where making it takes no memory.
    """
    each = _MADE if torch.accelerator.is_available() else _TRAINED
    try:
        # Making fresh weights must not draw the numbers that the real ones are made of.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            numbers = sum(weight.numel() for weight in build().parameters())
    except (RuntimeError, OverflowError):  # a size or a number of bytes beyond 64 bits
        numbers = math.inf
    _check(names, numbers * each)


def _check(names: str, size: float) -> None:
    memory = _memory()
    if size > memory:
        raise RecipeError(
            f"{names} would need {size / 2**30:,.0f} GB of memory or more, and this machine has "
            f"{memory / 2**30:,.0f} GB; lower one of them."
        )


def _memory() -> float:
    """Bytes of this machine's memory; infinite where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Raise a TrainingError where this machine's memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        raise TrainingError(
            "This machine's memory does not suffice; lower train.batch_size and raise train.accumulate, or "
            "lower data.length, data.group or the sizes of the model."
        ) from error
