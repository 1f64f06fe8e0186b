"""Multi-step arithmetic word problems with written steps, for models that are trained from nothing.

A problem states facts and asks for a number. In half of them people are compared ("Ann has 4 more pens than
Bob"), from level 3 on in any order, so that what to compute first has to be found; the others tell what
happens, one thing after the other. Difficulty is a level from 1 to 5: more steps, more kinds of steps, larger
numbers, and facts that lead nowhere (`LEVELS`). The solution writes one equation for each step, tersely or in
whole sentences, and ends in `#### ` and the answer, as in GSM8K.

Training problems and test problems have no text in common: which a problem is, is decided by its text.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count as integers
from random import Random
from typing import Literal

from philens.support.errors import ConfigError
from philens.tasks.problem import Problem

Split = Literal["train", "test"]

NAMES = (
    *("Ann", "Bob", "Cid", "Dan", "Eva", "Fay", "Gus", "Hal"),
    *("Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Ola"),
)
THINGS = ("apples", "pens", "coins", "cards", "books", "stamps", "shells", "nuts", "keys", "balls")


@dataclass(frozen=True)
class Level:
    """What problems of a level are made of.

    Attributes:
        steps: fewest and most equations that lead to the answer.
        kinds: kinds of steps: `more`, `fewer`, `times`, `half`, `sum`, `difference`.
        start: the largest number that is given.
        limit: the largest number that comes up.
        distractors: facts that lead nowhere, at most.
    """

    steps: tuple[int, int]
    kinds: tuple[str, ...]
    start: int
    limit: int
    distractors: int


LEVELS = {
    1: Level((1, 2), ("more", "fewer"), 20, 50, 0),
    2: Level((2, 3), ("more", "fewer", "times"), 30, 100, 0),
    3: Level((3, 4), ("more", "fewer", "times", "half", "sum"), 50, 200, 1),
    4: Level((4, 5), ("more", "fewer", "times", "half", "sum", "difference"), 80, 500, 2),
    5: Level((6, 7), ("more", "fewer", "times", "half", "sum", "difference"), 99, 999, 3),
}


def problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    """So many problems, of levels 1 to 5 in turn, no text twice.

    Args:
        split: `train` or `test`.
        seed: seed of the problems.

    Raises:
        ConfigError: another split.
    """
    found: dict[str, Problem] = {}
    index = 0
    while len(found) < count:
        problem = problem_at(index, len(found) % len(LEVELS) + 1, split, seed)
        found.setdefault(problem.problem, problem)
        index += 1
    return list(found.values())


def problem_at(index: int, level: int, split: Split = "train", seed: int = 0) -> Problem:
    """Problem `index` of a level's endless list, a pure function of the arguments.

    Raises:
        ConfigError: there is no such level or split.
    """
    if level not in LEVELS:
        raise ConfigError(f"Arithmetic problems have levels 1 to {len(LEVELS)}, not {level}.")
    if split not in ("train", "test"):
        raise ConfigError(f"Arithmetic problems are for train or test, not {split!r}.")
    randoms = (Random(f"arithmetic/{seed}/{level}/{index}/{attempt}") for attempt in integers())
    # Half of them are stories; None where a step would have led out of the level's range.
    drafts = ((_tell if one.random() < 0.5 else _compare)(one, LEVELS[level]) for one in randoms)
    draft = next(one for one in drafts if one is not None and is_test(one.text) == (split == "test"))
    return Problem(
        id=f"arithmetic/{split}/{seed}/{level}/{index}",
        problem=draft.text,
        answer=str(draft.answer),
        solution=draft.solution,
        level=level,
        steps=len(draft.equations),
        kind="number",
    )


def is_test(text: str) -> bool:
    """Whether a problem of this text is for testing: one in ten."""
    return zlib.crc32(text.encode()) % 10 == 0


@dataclass
class _Draft:
    text: str
    equations: list[str]
    answer: int

    @property
    def solution(self) -> str:
        return " ".join([*self.equations, f"#### {self.answer}"])


_FACTORS = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


def _operand(random: Random, kind: str, value: int, level: Level) -> int | None:
    """The number a step takes, or None where the step would leave the level's range or the integers."""
    if kind == "more":
        operand = random.randint(2, level.start)
        return operand if value + operand <= level.limit else None
    if kind == "fewer":
        return random.randint(1, min(value - 1, level.start)) if value > 1 else None
    if kind == "times":
        operand = random.choice([*_FACTORS])
        return operand if value * operand <= level.limit else None
    return 2 if value % 2 == 0 and value > 0 else None  # half


_SIGNS = {"more": "+", "fewer": "-", "times": "*", "half": "/", "sum": "+", "difference": "-"}


def _result(kind: str, value: int, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // max(1, operand)}[
        _SIGNS[kind]
    ]


def _tell(random: Random, level: Level) -> _Draft | None:
    """A story: what happens to what one person has."""
    who, *others = random.sample(NAMES, 2 + level.distractors)
    thing = random.choice(THINGS)
    whole = random.random() < 0.5
    value = random.randint(2, level.start)
    facts, equations = [f"{who} has {value} {thing}."], []
    kinds = [kind for kind in level.kinds if kind not in ("sum", "difference")]
    for _ in range(random.randint(*level.steps)):
        kind = random.choice(kinds)
        operand = _operand(random, kind, value, level)
        if operand is None:
            return None
        after = _result(kind, value, operand)
        happens, then = {
            "more": (random.choice([f"finds {operand} more", f"buys {operand} more"]), "Now"),
            "fewer": (random.choice([f"loses {operand}", f"gives {operand} to {others[-1]}"]), "Then"),
            "times": (f"collects until there are {_FACTORS.get(operand)} as many", "Now"),
            "half": ("sells half of them", "Then"),
        }[kind]
        facts.append(f"{who} {happens}.")
        equation = f"{value} {_SIGNS[kind]} {operand} = {after}."
        equations.append(f"{then} {who} has {equation}" if whole else equation)
        value = after
    for other in others[: random.randint(0, level.distractors)]:
        facts.insert(random.randint(0, len(facts)), f"{other} has {random.randint(2, level.start)} {thing}.")
    return _Draft(" ".join([*facts, f"How many {thing} does {who} have now?"]), equations, value)


@dataclass
class _People:
    """What is known of people: their numbers, and the facts and equations so far."""

    values: dict[str, int] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)


def _compare(random: Random, level: Level) -> _Draft | None:
    """People compared with one another, in an order that has to be found."""
    steps = random.randint(*level.steps)
    names = iter(random.sample(NAMES, len(NAMES)))
    thing = random.choice(THINGS)
    whole = random.random() < 0.5
    people = _People()
    last = _given(random, people, next(names), thing, level)
    for _ in range(steps):
        following = _step(random, people, last, names, thing, level, whole)
        if following is None:
            return None
        last = following
    solution = list(people.equations)
    for _ in range(random.randint(0, level.distractors)):
        # A fact about someone the question does not need.
        if random.random() < 0.5:
            _given(random, people, next(names), thing, level)
        elif _step(random, people, random.choice([*people.values]), names, thing, level, whole) is None:
            return None
    if level.steps[0] > 2:
        random.shuffle(people.facts)
    text = " ".join([*people.facts, f"How many {thing} does {last} have?"])
    return _Draft(text, solution, people.values[last])


def _given(random: Random, people: _People, name: str, thing: str, level: Level) -> str:
    people.values[name] = random.randint(2, level.start)
    people.facts.append(f"{name} has {people.values[name]} {thing}.")
    return name


def _step(
    random: Random, people: _People, last: str, names: Iterator[str], thing: str, level: Level, whole: bool
) -> str | None:
    """Someone new, whose number follows from that of `last`; None where no such number fits."""
    kind = random.choice(level.kinds)
    value, name = people.values[last], next(names)
    if kind in ("sum", "difference"):
        known = [other for other in people.values if other != last]
        other = random.choice(known) if known else _given(random, people, next(names), thing, level)
        operand = people.values[other]
        if (kind == "sum" and value + operand > level.limit) or (kind == "difference" and value <= operand):
            return None
        fact = {
            "sum": f"as many {thing} as {last} and {other} together",
            "difference": f"as many {thing} as {last} has more than {other}",
        }[kind]
    else:
        operand = _operand(random, kind, value, level)
        if operand is None:
            return None
        fact = {
            "more": f"{operand} more {thing} than {last}",
            "fewer": f"{operand} fewer {thing} than {last}",
            "times": f"{_FACTORS.get(operand)} as many {thing} as {last}",
            "half": f"half as many {thing} as {last}",
        }[kind]
    people.values[name] = _result(kind, value, operand)
    people.facts.append(f"{name} has {fact}.")
    equation = f"{value} {_SIGNS[kind]} {operand} = {people.values[name]}."
    people.equations.append(f"{name} has {fact}, so {equation}" if whole else f"{name}: {equation}")
    return name
