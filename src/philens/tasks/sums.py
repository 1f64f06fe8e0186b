"""Sums of one and two steps, in words and in symbols, for chat models that are too small for GSM8K.

> Ann has 12 pens. Ann buys 9 more. Then Ann loses 4. How many pens does Ann have now?
> *Ann has 12 + 9 = 21 pens. Then Ann has 21 - 4 = 17 pens. #### 17*
>
> What is 12 + 9 - 4?
> *12 + 9 = 21. 21 - 4 = 17. #### 17*

Training problems and test problems have no text in common: which a problem is, is decided by its text.
"""

import zlib
from itertools import count as integers
from random import Random

from philens.errors import ConfigError
from philens.tasks.arithmetic import NAMES, THINGS
from philens.tasks.problems import Problem

SPLITS = ("train", "test")
# Of each level the number of steps, and the largest number that comes up.
LEVELS = {1: (1, 20), 2: (1, 100), 3: (2, 20), 4: (2, 100)}
FORMS = ("words", "symbols")


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """So many problems, of levels 1 to 4 in turn, in words or in symbols (their `subject`), no text twice.

    Args:
        split: `train` or `test`.
        count: how many; with the same seed, more add to fewer.
        seed: which ones.

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
    steps, top = LEVELS[level]
    value = first = random.randint(2, top - 2)
    changes, equations = [], []
    for _ in range(steps):
        # No step by one or to nothing, and none beyond the level's largest number.
        change = random.choice([step for step in range(1 - value, top - value + 1) if abs(step) > 1])
        changes.append(change)
        equations.append(f"{value} {_signed(change)} = {value + change}")
        value += change
    who, thing, subject = random.choice(NAMES), random.choice(THINGS), random.choice(FORMS)
    if subject == "words":
        happens = [f"{who} buys {n} more." if n > 0 else f"{who} loses {-n}." for n in changes]
        text = f"{who} has {first} {thing}. {' Then '.join(happens)} How many {thing} does {who} have now?"
        solution = ". Then ".join(f"{who} has {equation} {thing}" for equation in equations)
    else:
        text = f"What is {first} {' '.join(map(_signed, changes))}?"
        solution = ". ".join(equations)
    return Problem(
        id=identity,
        problem=text,
        answer=str(value),
        solution=f"{solution}. #### {value}",
        level=level,
        steps=steps,
        kind="number",
        subject=subject,
    )


def _signed(change: int) -> str:
    return f"{'+' if change > 0 else '-'} {abs(change)}"
