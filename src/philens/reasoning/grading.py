"""Is a solution right? The final answer is taken out of its text and compared with the reference.

Numbers are compared as exact fractions. Mathematics is compared as text, after what LaTeX can say in several
ways has been said in one, and where that differs by math-verify, which parses to sympy; numbers in there that
are rational are compared exactly, too, however small. math-verify runs in a process of its own, which is
ended when a comparison takes too long: sympy would work out 9^{9^9} digit by digit, and neither a signal nor
another thread can stop it there. So grading is safe in threads, too.
"""

import atexit
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import factorial, prod
from pathlib import Path
from random import Random
from typing import Any

from philens.reasoning.problems import last_boxed, read_rows
from philens.support.errors import ConfigError, InputError
from philens.tasks.problem import Problem

logger = logging.getLogger(__name__)

TIMEOUT = 5.0
"""Seconds that a comparison by math-verify may take; the answer counts as wrong after that."""
# Characters of an answer. No real one is longer, and parsing stays quick.
MAX_LENGTH = 1000


@dataclass(frozen=True)
class Grade:
    """What became of a solution.

    Attributes:
        correct: its final answer equals the reference.
        answer: that final answer as text, a number written plainly (`1000`, `0.5`, `1/3`); None where none
            was found.
    """

    correct: bool
    answer: str | None


def grade(text: str, problem: Problem) -> Grade:
    """Compare the final answer of a solution with the problem's.

    Of kind `number`, the answer is the number after the last `####`, else in the last `\\boxed{}`, else after
    "final answer is", else after "answer is", "Answer:" or `A:` at the start of a line, else the last number
    of the text. Thousands separators, currency, per cent signs and units do not count; 18.00 is 18, 1/2 is
    0.5.
    Of kind `math`, it is what stands in the last `\\boxed{}` or `\\fbox{}`, else after another of the marks.

    Args:
        text: text of the solution.

    Raises:
        ConfigError: math-verify cannot be started.
    """
    marked = last_boxed(text) or _labelled(text)
    if problem.kind == "number":
        return _grade_number(_after(text, "####") or marked, text, problem)
    answer = marked or _after(text, "####")
    return Grade(answer is not None and _equal(problem.answer, answer), answer)


def _grade_number(marked: str | None, text: str, problem: Problem) -> Grade:
    value = _last_number(text) if marked is None else plain_number(marked)
    reference = plain_number(problem.answer)
    if value is not None and reference is not None:
        return Grade(_close(value, reference), _written(value))
    if marked is None or not re.search(r"\d", marked):
        return Grade(False, None)
    return Grade(_equal(problem.answer, marked), marked)  # an expression, such as 3 * 4


# Where the answer stands

_LABELS = (
    r"\bfinal\s+answer\b(?:[^.:\n]{0,80}?\bis\b)?\s*:?",
    r"\banswer\b[^.:\n]{0,80}?(?:\bis\b\s*:?|:)|^\s*(?-i:A)\s*:",
)
# An answer in a sentence goes up to its end, one in $...$ or \(...\) up to the second mark.
_SENTENCE = r"\s*(?:\$([^$\n]*[^$\n\\])\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|(.*?)(?:\.(?=\s|$)|$))"


def _labelled(text: str) -> str | None:
    """What follows the last "final answer is", else the last "answer is", "Answer:" or "A:"."""
    bold = r"(?<![^\s:])\*\*(?=\S)|(?<=\S)\*\*(?=[\s:.]|$)"  # **Answer:** 5, or Answer: **5**
    text = re.sub(bold, "", text, flags=re.MULTILINE)
    return next((answer for label in _LABELS if (answer := _after(text, label, _SENTENCE))), None)


def _after(text: str, label: str, ending: str = r"\s*(.*)$") -> str | None:
    """What follows the last place of a label: in this line, or in the next if nothing more stands in this."""
    found = list(re.finditer(label, text, re.IGNORECASE | re.MULTILINE))
    rest = re.compile(ending, re.MULTILINE).match(text, found[-1].end()) if found else None
    answer = next(filter(None, rest.groups()), "") if rest else ""
    return answer.strip() or None


# Numbers

_NUMBER = re.compile(
    r"(?<![\w.^])(?<!\w\*)(?<!\w\*\*)"  # not within a word, nor a power
    r"(?P<sign>(?:(?<![)\]}])[-+](?=[$€£\d.]))?)(?:[$€£]\s?(?P<minus>-?))?"
    r"(?:(?P<whole>\d+)\s+(?=\d+/\d))?"
    r"(?P<top>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?![\w.^]))?"
    r"(?:\s?/\s?(?P<bottom>0*[1-9]\d*)(?![\d.]))?"
    r"(?:\s*(?P<scale>thousand|million|billion|trillion)\b)?"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What makes the number before it part of an expression: 9**9, 2^{10}, 3 + 4, 2\times 10, 1,5, 28_9, 1e9x.
_GOES_ON = re.compile(
    r"\s*(?:\*+\s*[\d(\\]|\*\s*[a-z]|\^(?!\s*\{?\s*\\circ)|[/,\u00d7÷·-]\s*[\d(\\]|\+\s*[\w(\\$]|\(\s*\d|_"
    r"|\\(?:times|cdot|div|pm|frac|sqrt|pi)|\.?\d)|e[+-]?\d"
)


def plain_number(text: str) -> Fraction | None:
    """The number that a final answer states, whatever words and units stand around it.

    None if there is none, or only as a part of an expression. Of an equation, the right side counts.
    """
    if len(text) > MAX_LENGTH:
        return None
    for side in reversed(_plain(text).split("=")):
        if found := _NUMBER.search(side):
            return None if _GOES_ON.match(side, found.end()) else _value(found)
    return None


def _last_number(text: str) -> Fraction | None:
    text = _plain(re.sub(r"<<[^<>\n]*>>", "", text))
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found and not _GOES_ON.match(text, found[-1].end()) else None


_WORDS = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}"


def _plain(text: str) -> str:
    """LaTeX as plain text, without the separators of thousands that cannot be anything else."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\[,!;]|[\u00a0\u2009\u202f'])\s*(?=\d{3})", "", text)
    text = re.sub(r"[\u2212\u2013]", "-", _repeating(text))
    text = re.sub(r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r" \1\2/\3\4", text)
    text = re.sub(r"-\s+(?=\d+/\d)", "-", text)
    text = re.sub(_WORDS, r" \1 ", text)
    return re.sub(r"\\([$%])", r"\1", text)


# 0.1\overline{6}, 0.\bar3
_PERIOD = re.compile(r"(?<![\w.])(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{\s*(\d+)\s*\}|(\d))(?![\d_])")


def _repeating(text: str) -> str:
    """Decimals whose last digits repeat without end as fractions."""

    def fraction(found: re.Match[str]) -> str:
        before, period = (found[1] or "0") + found[2], found[3] or found[4]
        bottom = 10 ** len(found[2]) * (10 ** len(period) - 1)
        value = Fraction(int(before + period) - int(before), bottom)
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _PERIOD.sub(fraction, text)


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > MAX_LENGTH:
        return None
    value = Fraction(found["top"].replace(",", "")) * Fraction(10) ** int(found["power"] or 0)
    value = value / int(found["bottom"] or 1) + int(found["whole"] or 0)
    value *= _SCALES.get(found["scale"], 1)
    return -value if "-" in (found["sign"], found["minus"]) else value


def _close(value: Fraction, reference: Fraction) -> bool:
    """Equal up to what is lost in writing a float: a millionth, or that of the reference if it is below 1."""
    return abs(value - reference) <= min(1, abs(reference)) / 10**6


def _written(value: Fraction) -> str:
    """18, 0.5 or 1/3."""
    scaled, places = value, 0
    while scaled.denominator != 1 and places < 15:
        scaled, places = scaled * 10, places + 1
    if scaled.denominator != 1 or not places:
        return str(value)
    digits = str(abs(scaled.numerator)).rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"


# Mathematics


# 6, 8\text{, and }10 is a list like 6, 8, 10.
_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<=[\s\d}])(?:and|or)\b)\s*")


def _equal(reference: str, answer: str) -> bool:
    if max(len(reference), len(answer)) <= MAX_LENGTH:
        reference, answer = (_repeating(_AND.sub(", ", side)) for side in (reference, answer))
    ours, theirs = _normal(reference), _normal(answer)
    if ours == theirs:
        return True
    if max(len(reference), len(answer)) > MAX_LENGTH:
        return False
    tagged = [_TAGGED.fullmatch(side) for side in (ours, theirs)]
    if any(tagged):  # a tag may be missing, as the problem names it, but not be another
        bare = [
            found[1] or found[2] if found else side
            for found, side in zip(tagged, (ours, theirs), strict=True)
        ]
        return bare[0] == bare[1] and not all(tagged)
    numbers = [_value(found) if (found := _NUMBER.fullmatch(side)) else None for side in (ours, theirs)]
    if numbers[0] is not None and numbers[1] is not None and "%" not in reference + answer:
        return _close(numbers[1], numbers[0])
    return _worker.equal(reference, answer)


# A unit after a number, as \text{ cm}^2 or in plain letters. The time of day is none.
_UNIT = (
    r"(?<=[\d})])(?:\s*"
    + _WORDS.replace("([^{}]*)", r"(?!\s*(?:or|and|[ap]\.?m)\b)[^{}\d]*")
    + r"|\s+(?:(?!and|or)(?:[a-z]{3,}|[cmk]m|kg|ft|in)\b\.?\s*)+)(?:\s*\^\s*\{?\d\}?)?\s*\.?$"
)
_SAME = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[,!;:]|~|\{,\}", ""),
        (r"\\\s", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"^\s*(-?)\s*(\d+)\s*/\s*(\d+)\s*$", r"\1\\frac{\2}{\3}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\(le|ge|ne)q?(?![a-zA-Z])", r"\\\1q"),
        (r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree(?![a-zA-Z])", ""),
        (_UNIT, ""),
        (_WORDS, r"\1"),
        (r"\\?[$%]|\*\*|\s+", ""),
        (r"_\{(\w+)\}", r"_\1"),
        (r"(?i)(?<=\d)([ap])\.?m\.?$", lambda found: found[1].lower() + "m"),
        (r"\.$", ""),
        (r"^\(([A-Za-z])\)$", r"\1"),  # a choice
    )
]
# A numeral with its base, a time with its half of the day: math-verify would leave those out.
_TAGGED = re.compile(r"([\dA-Z]+)_\d+|(\d+(?::\d\d)+)[ap]m")


def _normal(answer: str) -> str:
    """The answer with what LaTeX can say in several ways said in one; without units, spaces, $ and %."""
    for pattern, replacement in _SAME:
        answer = pattern.sub(replacement, answer)
    return answer.casefold() if re.fullmatch(r"[A-Za-z.'-]{2,}", answer) else answer


class _Worker:
    """A process in which math-verify compares, started when it is first needed and again after a timeout."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self.equal = lru_cache(1 << 16)(self._equal)

    def _equal(self, reference: str, answer: str) -> bool:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
            reply = _ask(self._process, [reference, answer])
            if not reply:
                self.stop()
                logger.info("Comparing %r with %r took more than %g s.", answer, reference, TIMEOUT)
            return reply == "true\n"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", "from philens.reasoning.grading import _serve; _serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for the program that grades, which may want to finish a line
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if not _ask(process, ["1", "1"]):
        process.kill()
        process.communicate()
        raise ConfigError(
            "The package math-verify cannot be started; install it again: pip install math-verify."
        )
    return process


def _ask(process: "subprocess.Popen[str]", pair: list[str]) -> str:
    """The line that the process replies, or nothing if it has ended."""
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(json.dumps(pair) + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""


def _new_worker() -> None:
    global _worker
    _worker = _Worker()


_new_worker()
atexit.register(lambda: _worker.stop())
if hasattr(os, "register_at_fork"):  # a fork must not talk into its parent's pipe
    os.register_at_fork(after_in_child=_new_worker)


def _serve() -> None:
    """Reply true or false to each pair [reference, answer] from stdin; end if that takes too long."""
    import faulthandler

    from math_verify import grader, verify

    # In all that an answer may be, a list or a matrix, numbers are compared by this function. It takes for
    # equal what differs by less than it can round: 1/2^98 and 1/2^99, for one.
    rounded = grader.sympy_numeric_eq
    grader.sympy_numeric_eq = lambda a, b, *options: _same_number(a, b, lambda: rounded(a, b, *options))

    logging.disable(logging.CRITICAL)
    # What a library might print must not stand between the replies.
    replies = os.fdopen(os.dup(1), "w")
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(nowhere.fileno(), 1)
    for line in sys.stdin:
        # This watchdog does not need the interpreter's lock: it also ends one long operation on integers.
        faulthandler.dump_traceback_later(TIMEOUT, exit=True, file=nowhere)
        try:
            ours, theirs = (_parsed(side) for side in json.loads(line))
            equal = bool(verify(ours, theirs, timeout_seconds=None))
        except Exception:  # of whatever kind sympy raises for what makes no sense
            equal = False
        faulthandler.cancel_dump_traceback_later()
        replies.write(json.dumps(equal) + "\n")
        replies.flush()


# Bits of a number that is worked out; that of 2006! has 19,000.
_MOST_BITS = 1 << 20
# What is smaller may not be rounded to so many places.
_SMALL = 1e-6


def _same_number(a: Any, b: Any, rounded: Callable[[], bool]) -> bool:
    """Whether two sympy expressions are the same number: exactly where both are rational, else as `rounded`
    says, which must not have taken both for 0."""
    ours, theirs = _rational(a), _rational(b)
    if ours is not None and theirs is not None:
        return ours == theirs
    return bool(rounded()) and not _differ_near_zero(a, b)


def _rational(value: Any) -> Fraction | None:
    """The value of an expression of whole numbers, sums, products, powers and factorials, if that is not too
    long; None for any other."""
    import sympy

    if isinstance(value, sympy.Rational):
        return Fraction(int(value.p), int(value.q))
    if not isinstance(value, sympy.Add | sympy.Mul | sympy.Pow | sympy.factorial):
        return None
    parts = [_rational(part) for part in value.args]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if isinstance(value, sympy.Add):
        return sum(known, Fraction(0))
    if isinstance(value, sympy.Mul):
        return prod(known, start=Fraction(1))
    if isinstance(value, sympy.factorial):
        fits = known[0].denominator == 1 and 0 <= known[0] < 50_000
        return Fraction(factorial(int(known[0]))) if fits else None
    base, power = known
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    fits = power.denominator == 1 and abs(power) * bits <= _MOST_BITS and (base or power > 0)
    return base ** int(power) if fits else None


def _differ_near_zero(a: Any, b: Any) -> bool:
    """Whether two numbers differ by more than a millionth of the larger, which is too small to round."""
    try:
        ours, theirs = a.evalf(20), b.evalf(20)
        size = max(abs(ours), abs(theirs))
        if not 0 < size < _SMALL:
            return False
        if not ours or not theirs:
            return (a - b).is_zero is False
        return bool(abs(ours - theirs) > size * _SMALL)
    except Exception:  # no numbers
        return False


def _parsed(side: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${side}$", [LatexExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]


# Reports


def reference_report(problems: Sequence[Problem], wrong: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Is the grader right where the truth is known: on every problem's own solution, and on those of others?

    Args:
        wrong: how often to grade a problem with the solution of another one whose answer reads otherwise;
            both are drawn at random.
        seed: seed of the draw.

    Returns:
        `problems` and `solved`, how many there are and how many have a solution; `right` and `rate` of their
        own solutions; `exceptions`, those that grade as wrong, each with `id`, `reference`, `answer` and
        `ending`; `wrong`, how many were graded with another's solution; `accepted`, those of them that grade
        as right, each with `id`, `reference`, `answer` and `other`, the id that the solution is from.

    Raises:
        InputError: no problem has a solution.
    """
    solved = [(problem, problem.solution) for problem in problems if problem.solution]
    if not solved:
        raise InputError("None of the problems has a solution; give problems with one.")
    grades = [(problem, text, grade(text, problem)) for problem, text in solved]
    exceptions = [
        {"id": problem.id, "reference": problem.answer, "answer": result.answer, "ending": text[-200:]}
        for problem, text, result in grades
        if not result.correct
    ]
    random = Random(seed)
    draws = [(*random.choice(solved), random.choice(problems)) for _ in range(wrong)]
    pairs = [(one, text, other) for other, text, one in draws if _normal(one.answer) != _normal(other.answer)]
    accepted = [
        {"id": one.id, "reference": one.answer, "answer": result.answer, "other": other.id}
        for one, text, other in pairs
        if (result := grade(text, one)).correct
    ]
    right = len(solved) - len(exceptions)
    return {
        "problems": len(problems),
        "solved": len(solved),
        "right": right,
        "rate": right / len(solved),
        "exceptions": exceptions,
        "wrong": len(pairs),
        "accepted": accepted,
    }


@dataclass(frozen=True)
class MarkedSolution:
    """A solution that someone has marked.

    Attributes:
        problem: id or text of the problem.
        text: text of the solution.
        correct: the mark.
        origin: the model or file that it is from.
    """

    problem: str
    text: str
    correct: bool
    origin: str


def read_marked_solutions(path: str | os.PathLike[str]) -> list[MarkedSolution]:
    """Solutions with marks: as philens writes them (`problem_id`, `solution`, `correct`), or as GSM8K's
    example_model_solutions.jsonl has them (`question`, and for each model `is_correct` and `solution`).

    Raises:
        InputError: the file cannot be read, or has a row of another form.
    """
    path = Path(path)
    marked = []
    for name, row in read_rows(path).items():
        problem = row.get("problem_id") or row.get("problem") or row.get("question")
        models = {
            key: value for key, value in row.items() if isinstance(value, dict) and "is_correct" in value
        }
        alone = {path.stem: {"is_correct": row.get("correct"), "solution": row.get("solution")}}
        for origin, value in (models or alone).items():
            text, mark = value.get("solution"), value["is_correct"]
            if not (isinstance(problem, str) and isinstance(text, str) and isinstance(mark, bool)):
                raise InputError(
                    f"Row {name} of {path} is no marked solution; it needs problem_id, solution and correct "
                    "(true or false), or the form of GSM8K's example_model_solutions.jsonl."
                )
            marked.append(MarkedSolution(problem, text, mark, origin))
    return marked


def marks_report(problems: Sequence[Problem], solutions: Iterable[MarkedSolution]) -> dict[str, Any]:
    """Where the grader agrees with marks.

    Returns:
        `origins`: for each, `solutions`, `agreed`, `rate` (of agreement), `marked_right`, `graded_right` and
        `without_answer`; `disagreements`, each with `origin`, `id`, `reference`, `answer`, `marked`, `graded`
        and `ending`; `without_problem`, how many solutions belong to none of the problems and were left out.

    Raises:
        InputError: all of them are.
    """
    by_name = {problem.problem: problem for problem in problems}
    by_name |= {problem.id: problem for problem in problems}
    origins: dict[str, dict[str, Any]] = {}
    disagreements, without_problem = [], 0
    for solution in solutions:
        problem = by_name.get(solution.problem)
        if problem is None:
            without_problem += 1
            continue
        result = grade(solution.text, problem)
        names = ("solutions", "agreed", "marked_right", "graded_right", "without_answer")
        counts = origins.setdefault(solution.origin, dict.fromkeys(names, 0))
        counts["solutions"] += 1
        counts["agreed"] += result.correct == solution.correct
        counts["marked_right"] += solution.correct
        counts["graded_right"] += result.correct
        counts["without_answer"] += result.answer is None
        if result.correct != solution.correct:
            disagreements.append(
                {
                    "origin": solution.origin,
                    "id": problem.id,
                    "reference": problem.answer,
                    "answer": result.answer,
                    "marked": solution.correct,
                    "graded": result.correct,
                    "ending": solution.text[-200:],
                }
            )
    if not origins:
        raise InputError("No solution belongs to one of the problems; give the problems that were solved.")
    for counts in origins.values():
        counts["rate"] = counts["agreed"] / counts["solutions"]
    return {"origins": origins, "disagreements": disagreements, "without_problem": without_problem}
