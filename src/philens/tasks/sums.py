"""Sums of two and three numbers, in words and in symbols, for chat models that are too small for GSM8K.

> Ann has 12 pens. Ann buys 9 more. Then Ann buys 4 more. How many pens does Ann have now?
> *Ann has 12 + 9 = 21 pens. Then Ann has 21 + 4 = 25 pens. #### 25*
>
> What is 12 + 9 + 4?
> *12 + 9 = 21. 21 + 4 = 25. #### 25*

Training problems and test problems have no text in common: which a problem is, is decided by its text.
"""

import zlib
from itertools import count as integers
from itertools import pairwise
from random import Random

from philens.support.errors import ConfigError
from philens.tasks.arithmetic import NAMES, THINGS
from philens.tasks.problem import Problem

SPLITS = ("train", "test")
# Of each level how many numbers are added, and the largest sum.
LEVELS = {1: (2, 20), 2: (2, 100), 3: (3, 20), 4: (3, 100)}
SUBJECTS = ("words", "symbols")


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """So many problems, of levels 1 to 4 in turn, in words or in symbols (their `subject`), no text twice.

    Args:
        split: `train` or `test`.
        count: how many; with the same seed, more add to fewer.
        seed: seed of the problems.

    Raises:
        ConfigError: another split.
    """
    if split not in SPLITS:
        raise ConfigError(f"Sums are for train or test, not {split!r}.")
    found: dict[str, Problem] = {}
    for index in integers():
        if len(found) == count:
            break
        problem = _problem(f"sums/{split}/{seed}/{index}", len(found) % len(LEVELS) + 1)
        if SPLITS[zlib.crc32(problem.problem.encode()) % len(SPLITS)] == split:
            found.setdefault(problem.problem, problem)
    return list(found.values())


def _problem(identity: str, level: int) -> Problem:
    """A pure function of its arguments."""
    random = Random(f"{identity}/{level}")
    terms, top = LEVELS[level]
    value = random.randint(2 * terms, top)
    sums = [0, *sorted(random.sample(range(1, value), terms - 1)), value]
    numbers = [after - before for before, after in pairwise(sums)]
    equations = [f"{before} + {after - before} = {after}" for before, after in pairwise(sums[1:])]
    who, thing, subject = random.choice(NAMES), random.choice(THINGS), random.choice(SUBJECTS)
    if subject == "words":
        buys = " Then ".join(f"{who} buys {number} more." for number in numbers[1:])
        text = f"{who} has {numbers[0]} {thing}. {buys} How many {thing} does {who} have now?"
        solution = ". Then ".join(f"{who} has {equation} {thing}" for equation in equations)
    else:
        text = f"What is {' + '.join(map(str, numbers))}?"
        solution = ". ".join(equations)
    return Problem(
        id=identity,
        problem=text,
        answer=str(value),
        solution=f"{solution}. #### {value}",
        level=level,
        steps=len(equations),
        kind="number",
        subject=subject,
    )
