"""Sentences in which it is known where a result has to be worked out, and where a number only comes.

Each ends in a number. Before it stands a sum, a difference or a product whose result it is; or something
after which the number is copied from the text, said to be so, counted on to, known to everybody, or
arbitrary. All kinds share their frames ("On the board stands ... = 68."), so that the same words stand
before and after, about as far into the text, and their numbers have two digits unless their kind says
otherwise. Half of the frames and wordings are held out: what is fitted on the others can be tried on them.

Sentence i of a kind is a function of the seed and i alone.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from philens.tasks.arithmetic import NAMES, THINGS
from philens.tasks.problem import Messages, Problem, Prompt, messages

Role = Literal["worked", "other", "variant", "problem", "written"]

KINDS: dict[str, Role] = {
    "sum": "worked",
    "difference": "worked",
    "product": "worked",
    "copied": "other",
    "assigned": "other",
    "identity": "other",
    "counted": "other",
    "recalled": "other",
    "arbitrary": "other",
    "unknown_operation": "other",
    "one_digit_sum": "variant",
    "three_digit_sum": "variant",
    "plus_zero": "variant",
    "wrong_result": "variant",
    "sum_after_sum": "variant",
    "same_sum_again": "variant",
    "problem_result": "problem",
    "problem_operand": "problem",
    "problem_result_again": "problem",
    "written_right": "written",
    "written_wrong": "written",
}
"""What stands before a number. `worked`: its result has to be worked out. `other`: it has not. `variant`:
results of other sizes, trivial ones, wrong ones, and the second of two sums. `problem`: in the solution of a
problem. `written`: a result that the model wrote itself."""
SENTENCE_KINDS = tuple(kind for kind, role in KINDS.items() if role in ("worked", "other", "variant"))


class Place(NamedTuple):
    """A number in a text: characters `start` to `end` (not included), of a kind of `KINDS`."""

    kind: str
    start: int
    end: int
    detail: str = ""


@dataclass(frozen=True)
class MarkedText:
    """A text with the numbers in it before which something is measured.

    Attributes:
        name: what it is called in tables.
        text: what is measured; places are characters of it.
        places: places in order.
        template: frame and wording.
        held_out: whether these are kept from what is fitted.
        chat: what a user asked to get this text; empty for a text alone.
    """

    name: str
    text: str
    places: tuple[Place, ...]
    template: str = ""
    held_out: bool = False
    chat: Messages = field(default_factory=list)


@dataclass(frozen=True)
class _Template:
    """A frame; each kind has a wording of `_WORDINGS` for each, in the same order."""

    name: str
    opening: str
    frame: str  # {what} and {sign}, then {number}
    sign: str
    held_out: bool


_OPENING = "{one} has {p} {things} and {other} has {q}."
HELD_OUT = "held-out "
"""What the name of a template begins with that is like another and held out."""
_HELD_OPENING = "There are {p} {things} in the bag of {one} and {q} in that of {other}."
_TEMPLATES = (
    _Template("equation", _OPENING, "On the board stands {what}{sign}{number}.", " = ", False),
    _Template("statement", _OPENING, "{third} says that {what}{sign}{number}.", " is ", False),
    _Template("list", _OPENING, "Then comes the next line of the list, {what}{sign}{number}.", ": ", False),
    _Template(f"{HELD_OUT}equation", _HELD_OPENING, "{third} now writes {what}{sign}{number}.", " = ", True),
    _Template(
        f"{HELD_OUT}statement", _HELD_OPENING, "As everybody heard, {what}{sign}{number}.", " is ", True
    ),
    _Template(
        f"{HELD_OUT}list", _HELD_OPENING, "From the notes on the desk, {what}{sign}{number}.", ": ", True
    ),
)
_SUMS = (
    *("{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}"),
    *("{a} + {b}", "{b} added to {a}", "the total of {a} and {b}"),
)
_WORDINGS: dict[str, tuple[str, ...]] = {
    "sum": _SUMS,
    "difference": (
        *("{a} - {b}", "{a} minus {b}", "the difference of {a} and {b}"),
        *("{a} - {b}", "{a} less {b}", "what is left of {a} without {b}"),
    ),
    "product": (
        *("{a} * {b}", "{a} times {b}", "the product of {a} and {b}"),
        *("{a} x {b}", "{a} multiplied by {b}", "the number in {a} boxes of {b} each"),
    ),
    "copied": (
        *("the number of {one}'s {things}",) * 3,
        *("the count of {things} in the bag of {one}",) * 3,
    ),
    "assigned": ("n", "the value of k", "the letter m", "x", "the constant y", "the variable t"),
    "identity": ("{n}",) * 6,
    "counted": (
        *("a = {n-2}, b = {n-1}, c", "a is {n-2}, b is {n-1} and c", "a: {n-2}, b: {n-1}, c"),
        *("p = {n-2}, q = {n-1}, r", "p is {n-2}, q is {n-1} and r", "p: {n-2}, q: {n-1}, r"),
    ),
    "recalled": ("{fact}",) * 6,
    "arbitrary": (
        *("the house number of {one}", "the number of {one}'s room", "{one}'s seat number"),
        *("the number on {one}'s shirt", "the page that {one} reads", "the number of {one}'s bus"),
    ),
    "unknown_operation": (
        *("{a} # {b}", "{a} blim {b}", "the blim of {a} and {b}"),
        *("{a} @ {b}", "{b} zorped to {a}", "the zorp of {a} and {b}"),
    ),
    "one_digit_sum": _SUMS,
    "three_digit_sum": _SUMS,
    "plus_zero": tuple(text.replace("{b}", "0") for text in _SUMS),
    "wrong_result": _SUMS,
    "sum_after_sum": _SUMS,
    "same_sum_again": _SUMS,
}
# Two digits each, as most other results have.
_FACTS = (
    *(("the number of weeks in a year", 52), ("the number of hours in a day", 24)),
    *(("the number of minutes in an hour", 60), ("the number of months in a year", 12)),
    *(("the number of letters in the English alphabet", 26), ("the number of days in January", 31)),
    *(("the number of days in April", 30), ("the number of cards in a deck", 52)),
    *(("the number of states in the USA", 50), ("the number of keys on a piano", 88)),
    *(("the number of squares on a chess board", 64), ("the number of degrees in a right angle", 90)),
    *(("the number of ounces in a pound", 16), ("the number of players in a football team", 11)),
    *(("the number of eggs in a dozen", 12), ("the number of days in two weeks", 14)),
    *(("the number of seconds in a minute", 60), ("the number of years in two decades", 20)),
    *(("the number of cents in a quarter", 25), ("the number of holes on a golf course", 18)),
    *(("the number of signs of the zodiac", 12), ("the number of inches in a foot", 12)),
)


def make_sentences(count: int, seed: int = 0) -> list[MarkedText]:
    """So many sentences of each of `SENTENCE_KINDS`, one place each; templates and details take turns."""
    return [_sentence(kind, index, seed) for kind in SENTENCE_KINDS for index in range(count)]


def _sentence(kind: str, index: int, seed: int) -> MarkedText:
    random = np.random.default_rng([seed, SENTENCE_KINDS.index(kind), index])
    number = index % len(_TEMPLATES)
    template, alternate = _TEMPLATES[number], bool(index // len(_TEMPLATES) % 2)
    detail, values = _values(kind, alternate, random)
    one, other, third = (NAMES[k] for k in random.choice(len(NAMES), 3, replace=False))
    p, q = (int(x) for x in random.choice(_others(values), 2, replace=False))
    names = {"one": one, "other": other, "third": third, "things": THINGS[random.integers(len(THINGS))]}
    fill: dict[str, object] = names | values | {"p": p, "q": q, "sign": template.sign}
    fill |= {"n-2": int(values["n"]) - 2, "n-1": int(values["n"]) - 1}  # pyright: ignore[reportArgumentType]
    if kind == "copied":
        fill["p"] = values["n"]
    wording = _WORDINGS[kind][number]
    opening = template.opening.format(**fill)
    what = wording.format(**fill)
    if kind in ("sum_after_sum", "same_sum_again"):
        first = fill
        while kind == "sum_after_sum" and first["n"] == values["n"]:
            first = {**fill, **_sum_values(2, alternate, random)}
        opening = f"First we read that {wording.format(**first)}{template.sign}{first['n']}."
    shown = str(values.get("shown", values["n"]))
    before, after = template.frame.split("{number}")
    before = f"{opening} {before.format(**fill | {'what': what})}"
    place = Place(kind, len(before), len(before) + len(shown), detail)
    name = f"{kind} {index}"
    return MarkedText(name, before + shown + after, (place,), template.name, template.held_out)


def _values(kind: str, alternate: bool, random: np.random.Generator) -> tuple[str, dict[str, object]]:
    """What kind of a kind this is, and the numbers in it: n is the last, a and b those it is made of."""
    if kind == "recalled":
        fact, n = _FACTS[random.integers(len(_FACTS))]
        return "", {"fact": fact, "n": n}
    if kind == "product":
        return _product_values(alternate, random)
    digits = {"one_digit_sum": 1, "three_digit_sum": 3}.get(kind, 2)
    values = _sum_values(digits, alternate, random)
    detail = "with carry" if alternate else "without carry"
    a, b, n = (int(str(values[key])) for key in "abn")
    if kind == "difference":
        return detail, {"a": n, "b": b, "n": a}
    if kind == "plus_zero":
        return "", {"a": n, "n": n}
    if kind == "wrong_result":
        wrong = [x for x in (n - 10, n - 2, n - 1, n + 1, n + 2, n + 10) if 10 <= x <= 99]
        return detail, {**values, "shown": int(random.choice(wrong))}
    if kind == "unknown_operation":
        return "", {**values, "n": int(random.choice(_others(values)))}
    return detail if kind in _SUM_KINDS else "", values


_SUM_KINDS = ("sum", "one_digit_sum", "three_digit_sum", "sum_after_sum", "same_sum_again")


def _sum_values(digits: int, carry: bool, random: np.random.Generator) -> dict[str, object]:
    """Two numbers of so many digits and their sum, of as many digits where there is more than one; a carry,
    if any, goes from the ones alone."""
    while True:
        a, b = (int(x) for x in random.integers(2 if digits == 1 else 10 ** (digits - 1), 10**digits, 2))
        n = a + b
        carries = [int(str(a)[k]) + int(str(b)[k]) > 9 for k in range(digits)]
        if digits == 1 and carry == carries[0]:
            return {"a": a, "b": b, "n": n}
        if digits > 1 and not any(carries[:-1]) and carry == carries[-1] and len(str(n)) == digits:
            return {"a": a, "b": b, "n": n}


def _product_values(table: bool, random: np.random.Generator) -> tuple[str, dict[str, object]]:
    second = range(2, 10) if table else range(11, 50)
    pairs = [(a, b) for a in range(2, 10) for b in second if 10 <= a * b <= 99]
    a, b = pairs[random.integers(len(pairs))]
    return "of the times table" if table else "beyond the times table", {"a": a, "b": b, "n": a * b}


def _others(values: dict[str, object]) -> list[int]:
    """Numbers of two digits that are none of these."""
    return [x for x in range(11, 99) if x not in values.values()]


# Numbers as solutions write them: 48, 1,200, 0.5, .5
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")


def mark_solutions(problems: Iterable[Problem], prompt: Prompt) -> list[MarkedText]:
    """The solutions of problems whose author marked what they calculated (GSM8K), as replies to `prompt`.

    The numbers marked are results that stand after a calculator annotation; numbers that the problem has
    (operands); and results that come up once more. Others, and the line with the answer, are left out.
    """
    marked = []
    for problem in problems:
        if problem.solution is None or not problem.results:
            continue
        given = {_value(found[0]) for found in _NUMBER.finditer(problem.problem)}
        text, results, places = problem.solution.partition("\n####")[0], set(), []
        # An annotation may stand before a sign for money.
        begins = {found.end() for at in problem.results if (found := _AFTER.match(text, at))}
        for found in _NUMBER.finditer(text):
            value, kind = _value(found[0]), None
            if found.start() in begins:
                kind = "problem_result"
                results.add(value)
            elif value in results:
                kind = "problem_result_again"
            elif value in given:
                kind = "problem_operand"
            if kind is not None:
                places.append(Place(kind, *found.span()))
        if places:
            chat = messages(problem, prompt)
            marked.append(MarkedText(f"problem {problem.id}", text, tuple(places), "problem", True, chat))
    return marked


_AFTER = re.compile(r"[ $]*(?=[\d.])")


def _value(text: str) -> float:
    return float(text.replace(",", "").rstrip(".") or 0)


class Question(NamedTuple):
    """Something to work out, as a text that ends where the result begins."""

    detail: str
    text: str
    answer: int


# Questions of one kind already answered stand before each.
SHOTS = 4


def make_questions(count: int, seed: int = 0) -> list[Question]:
    """So many questions of each of six kinds of calculation, each after four with their answers."""
    made = []
    for number, (detail, ask) in enumerate(_ASKED.items()):
        for index in range(count):
            random = np.random.default_rng([seed, len(SENTENCE_KINDS) + number, index])
            asked: dict[str, int] = {}
            while len(asked) <= SHOTS:
                asked.update([ask(random)])
            *shots, (text, answer) = asked.items()
            lines = [f"{before} = {result}\n" for before, result in shots]
            made.append(Question(detail, f"{''.join(lines)}{text} =", answer))
    return made


def _ask(sign: str, draw: Callable[[np.random.Generator], dict[str, object]]) -> Callable:
    def ask(random: np.random.Generator) -> tuple[str, int]:
        values = draw(random)
        return f"{values['a']} {sign} {values['b']}", int(str(values["n"]))

    return ask


def _tens(random: np.random.Generator) -> dict[str, object]:
    a, b = (int(x) for x in 10 * random.integers(1, 5, 2))
    return {"a": a, "b": b, "n": a + b}


def _difference(random: np.random.Generator) -> dict[str, object]:
    values = _sum_values(1, bool(random.integers(2)), random)
    return {"a": values["n"], "b": values["b"], "n": values["a"]}


_ASKED = {
    "sum of one digit each": _ask("+", lambda random: _sum_values(1, bool(random.integers(2)), random)),
    "sum of tens": _ask("+", _tens),
    "sum without carry": _ask("+", lambda random: _sum_values(2, False, random)),
    "sum with carry": _ask("+", lambda random: _sum_values(2, True, random)),
    "difference": _ask("-", _difference),
    "product of the times table": _ask("*", lambda random: _product_values(True, random)[1]),
}


def mark_answer(question: Question, reply: str) -> MarkedText | None:
    """A question with what a model wrote after it, up to its first number's end; None without one."""
    found = re.match(r"[ ]*(\d+)", reply)
    if found is None:
        return None
    start = len(question.text) + found.start(1)
    kind = "written_right" if int(found[1]) == question.answer else "written_wrong"
    place = Place(kind, start, start + len(found[1]), question.detail)
    text = question.text + found[0]
    return MarkedText(f"written {text.splitlines()[-1]}", text, (place,), "written", True)


WORKED_EXAMPLE = (
    "Ann has 23 pens and Bob has 45 pens. Together they have 23 + 45 = 68 pens. "
    "Once more, 23 + 45 = 68. Ann still has 23 pens, and she is 14 years old."
)
"""A sum that is worked out, the same sum again, a number that is copied, and one that is arbitrary."""
