"""Texts to begin with: one of each formal task and one of each level of text."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from philens.findings.demo import EXPLANATIONS
from philens.tasks.automata import TASKS, generate
from philens.tasks.levels import LevelText, in_order, role, with_built
from philens.training.folder import RunFolder
from philens.training.opening import SHIPPED

# Of which stream of documents, that no run has been trained on; and how long they are.
_SEED, _CHARACTERS = 4_321, 480

LEVELS = {
    "trivial": "A text that goes on and on: there is nothing to find out.",
    "memorised": "The MIT licence, which models know by heart: they recite.",
    "shuffled": "Words of the other texts in random order: much surprise and nothing to find out.",
    "code": "A function that the model has not seen.",
    "prose": "A paragraph that the model has not seen.",
}

_LICENCE = """\
Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.
"""
_CODE = '''\
def ferry_trips(weights, limit):
    """Fewest crossings of a ferry that carries two cars at most and no more than `limit`."""
    waiting = sorted(weights)
    if waiting and waiting[-1] > limit:
        raise ValueError("One car is too heavy for the ferry")
    light, heavy, trips = 0, len(waiting) - 1, 0
    while light <= heavy:
        if light < heavy and waiting[light] + waiting[heavy] <= limit:
            light += 1
        heavy -= 1
        trips += 1
    return trips
'''
_PROSE = (
    "When the ferry stopped running in October, the lighthouse keeper began to leave two lamps burning, one "
    "for the boats and one for his daughter, who walked along the shore each evening to see that he was "
    "still there. Nobody had asked him to. The second lamp used oil that he could not well spare, and it "
    "shone toward the land, where there was nothing to warn. But she had learned to count the seconds "
    "between its turns, and from a small delay, a breath too long, she could tell that his knee was bad "
    "again.\n"
)


@dataclass(frozen=True)
class Example:
    """A text to begin with."""

    name: str  # of its task or level
    about: str  # what it is, in a sentence
    text: str
    formal: bool  # whether it is in a formal language


@cache
def examples() -> dict[str, Example]:
    """By name, first the levels of text, from trivial to interesting, then the formal tasks."""
    own = [LevelText("memorised", "licence", _LICENCE), LevelText("code", "function", _CODE)]
    built = with_built([*own, LevelText("prose", "paragraph", _PROSE)])
    found = {}
    for level in in_order(text.level for text in built):
        text = next(one.text for one in built if one.level == level)
        name = role(level) or level
        found[name] = Example(name, LEVELS[name], text, formal=False)
    # Of the same sizes, and with the same to know by heart, as the shipped model was trained on.
    config = replace(RunFolder(SHIPPED).recipe().data.tasks, max_length=_CHARACTERS)
    for task in TASKS:
        documents = generate(config, _SEED, task, np.arange(8))
        text = documents.text(int(documents.lengths.argmax()))
        name = task.replace("_", " ")
        found[name] = Example(name, EXPLANATIONS[task], text, formal=True)
    return found
