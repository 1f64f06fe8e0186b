"""Where a final answer stands, when two answers are equal, and how often the grader errs."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from philens.reasoning import grading
from philens.reasoning.grading import (
    Grade,
    MarkedSolution,
    grade,
    marks_report,
    plain_number,
    read_marked_solutions,
    reference_report,
)
from philens.support.errors import ConfigError, InputError
from philens.tasks.problem import Problem


def number(answer: str) -> Problem:
    return Problem("n", "How many?", answer, kind="number")


def mathematics(answer: str) -> Problem:
    return Problem("m", "What?", answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("16 - 3 = <<16-3=13>>13\nSo 13 * 2 = 26.\n#### 18", "18"),
        ("#### 60\nThat is 4 more.", "60"),
        ("#### 1\n#### 2", "2"),
        ("####\n5", "5"),
        ("It is \\boxed{1{,}000} m in 3 hours.", "1000"),
        ("#### 7, not \\boxed{8}", "7"),
        ("The final answer is $18. She is 4.", "18"),
        ("The final answer is: $\\$18.50$. I hope it is correct.", "18.5"),
        ("The answer is 4. No: the answer to the problem is 5 dollars. There are 6 days.", "5"),
        ("So 3.\nA: 18", "18"),
        ("**Answer:** 18 eggs, 2 of them brown", "18"),
        ("Answer: **$1,234.50**.", "1234.5"),
        ("She has 16 - 3 = 13 eggs, so 26 dollars.", "26"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \u22125", "-5"),
        ("#### 50%", "50"),
        ("#### .5 kg", "0.5"),
        ("#### 5 1/2 hours", "5.5"),
        ("\\boxed{-\\frac{1}{3}}", "-1/3"),
        ("\\boxed{1\\,000\\text{ m}}", "1000"),
        ("#### 1e6", "1000000"),
        ("The final answer is 2.5e-1.", "0.25"),
        ("#### 0.\\overline{3}", "1/3"),
        ("\\boxed{-1.1\\bar6}", "-7/6"),
        ("#### x = 10 - 3 = 7", "7"),
        ("The final answer is $2 million.", "2000000"),
        ("#### 90^\\circ", "90"),
        ("The answer is unknown; there are 5 of them.", "5"),
        ("The final answer is unknown.", None),
        ("I cannot say.", None),
        ("", None),
        ("1 plus 9**9**9", None),
    ],
)
def test_where_the_number_is(text, answer):
    assert grade(text, number(answer or "0")) == Grade(answer is not None, answer)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("#### 9**9**9", "9"),
        ("#### 10 - 3", "10"),
        ("#### 3 + 4", "3"),
        ("\\boxed{2\\times 10^6}", "2"),
        ("#### 2e9", "2"),
        ("#### 1,5", "1"),
        ("#### 2/3", "2"),
        ("#### 18.5", "18"),
        ("#### 1000001", "1000000"),
        ("#### " + "3" * 2000, "3"),
    ],
)
def test_a_number_is_not_taken_out_of_an_expression(text, wrong):
    assert not grade(text, number(wrong)).correct


def test_an_expression_is_worked_out():
    assert grade("#### 3 * 4", number("12")) == Grade(True, "3 * 4")
    assert grade("\\boxed{2\\times 10^6}", number("2000000")).correct


WRITTEN = ["#### {}", "The final answer is {}.", "A: {}", "$\\boxed{{{}}}$", "so she has {} of them."]


@given(
    value=st.integers(-(10**15), 10**15), other=st.integers(-(10**15), 10**15), place=st.sampled_from(WRITTEN)
)
def test_any_integer(value, other, place):
    for text in (f"{value}", f"{value:,}", f"{value:,}.00", f"${value:,}"):
        assert grade(place.format(text), number(str(value))).correct
    latex = f"\\boxed{{{value:,}}}".replace(",", "{,}")
    assert grade(latex, number(f"{value:,}")) == Grade(True, str(value))
    assert grade(place.format(f"{other:,}"), number(str(value))).correct == (other == value)


@given(st.fractions(), st.sampled_from(["{}/{}", "\\frac{{{}}}{{{}}}"]))
def test_any_fraction(value, form):
    sign = "-" * (value < 0)
    text = sign + form.format(abs(value.numerator), value.denominator)
    assert plain_number(text) == value
    assert Fraction(grade("#### " + text, number("0")).answer) == value


@given(st.decimals(-(10**6), 10**6, places=4))
def test_any_decimal(value):
    result = grade(f"#### {value:f}", number(f"{value:f}"))
    assert result.correct
    assert Fraction(result.answer) == Fraction(value)
    assert not grade(f"#### {value + 1:f}", number(f"{value:f}")).correct


@given(st.text(alphabet="0123456789.,/-+*^$%#=_{}\\ \nAeo:answerboxedfinal", max_size=80))
def test_any_text_gets_a_grade(text):
    assert isinstance(grade(text, number("123456789")), Grade)


SAME = [
    ("5", "5."),
    ("5", "$5$"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "\\dfrac12"),
    ("\\frac{1}{2}", "1/2"),
    ("1\\frac{1}{2}", "\\frac{3}{2}"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{Evelyn}", "\\textbf{evelyn}"),
    ("\\text{(C)}", "C"),
    ("\\text{two lines}", "\\mbox{two lines}"),
    ("(3,4)", "\\left( 3, 4 \\right)"),
    ("1,2,3", "3, 1, 2"),
    ("6, 8\\text{, and }10", "10, 6, 8"),
    ("-2 \\text{ or } -12", "-12 and -2"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("(-\\infty,3)\\cup(3,\\infty)", "(-\\infty, 3) \\cup (3, \\infty)"),
    ("1\\pm\\sqrt{2}", "1+\\sqrt2, 1-\\sqrt2"),
    ("\\begin{pmatrix} 1 \\\\ 1/2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\0.5\\end{pmatrix}"),
    ("90^\\circ", "90"),
    ("90^\\circ", "90 \\text{ degrees}"),
    ("10\\%", "10"),
    ("\\$18.90", "18.9"),
    ("1,008,016", "1{,}008{,}016"),
    ("1,008,016", "1008016"),
    ("440\\text{ cm}^2", "440 cm^2"),
    ("18\\text{ ways.}", "18"),
    ("8:34 \\text{ p.m.}", "8\\!:\\!34 \\text{ PM}"),
    ("28_9", "28_{9}"),
    ("28_9", "28"),
    ("x \\le 3", "x \\leq 3"),
    ("3+2i", "2i+3"),
    ("1000000", "1e6"),
    ("1{,}000{,}000", "1.0E+06"),
    ("\\frac{1}{3}", "0.\\overline{3}"),
    ("0.\\overline{142857}", "\\frac17"),
    ("(\\frac{1}{6}, 1)", "(0.1\\overline{6}, 1)"),
    ("33\\frac{1}{3}", "33.\\bar{3}"),
    ("\\frac{1}{2^{98}}", "2^{-98}"),
    ("\\frac{1}{2^{98}}", "\\frac{2}{2^{99}}"),
    ("\\frac{1}{2006!}", "\\frac{2006}{2006!\\cdot 2006}"),
    ("\\frac{2006}{2007!}", "\\frac{2006}{2007\\cdot 2006!}"),
    ("\\frac{\\sqrt{2}}{2^{98}}", "\\frac{1}{\\sqrt{2}\\cdot 2^{97}}"),
    ("0", "\\sin(\\pi)"),
    ("10^{-9}", "0.000000001"),
]
OTHER = [
    ("5", "6"),
    ("5", "-5"),
    ("\\frac{1}{3}", "0.33"),
    ("\\text{Evelyn}", "Carla"),
    ("\\text{(C)}", "D"),
    ("(3,4)", "(4,3)"),
    ("[0,1)", "[0,1]"),
    ("1,2,3", "1,2"),
    ("x^2+1", "y^2+1"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("8:34 \\text{ p.m.}", "8:34 \\text{ a.m.}"),
    ("28_9", "28_8"),
    ("11\\frac{1}{2}", "\\frac{11}{2}"),
    ("x^2", "\\boxed"),
    ("\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", "\\frac{1}{3\\cdot 2^{2006}}"),
    ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}"),
    ("\\frac{1}{2^{98}}", "0"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("\\frac{1}{2004!}", "\\frac{8}{2004!}"),
    ("\\frac{1}{2004!}", "-\\frac{1}{2004!}"),
    ("1-\\frac{1}{2^{98}}", "1"),
    ("(\\frac{1}{2^{98}}, 3)", "(\\frac{1}{2^{99}}, 3)"),
    ("[0, 2^{-98}]", "[0, 2^{-99}]"),
    ("\\begin{pmatrix} 2^{-98} \\\\ 1 \\end{pmatrix}", "\\begin{pmatrix} 2^{-99} \\\\ 1 \\end{pmatrix}"),
    ("\\frac{\\sqrt{2}}{2^{98}}", "\\frac{\\sqrt{2}}{2^{99}}"),
    ("\\frac{\\sqrt{2}}{2^{98}}", "0"),
    ("\\frac{1}{2^{98}}x", "\\frac{1}{2^{99}}x"),
    ("10^{-9}", "0.000000002"),
    ("1000000", "1e5"),
    ("0.\\overline{3}", "0.3"),
    ("0.\\overline{12}_3", "\\frac{4}{33}"),
]


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_equal_mathematics(reference, answer):
    assert grade(f"So it is $\\boxed{{{answer}}}$.", mathematics(reference)) == Grade(True, answer)


@pytest.mark.parametrize(("reference", "answer"), OTHER)
def test_unequal_mathematics(reference, answer):
    assert not grade(f"So it is $\\boxed{{{answer}}}$.", mathematics(reference)).correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("$\\boxed{1}$, no, $\\boxed{\\frac{3}{4}}$", "\\frac{3}{4}"),
        ("The final answer is $\\frac34$. I hope it is correct.", "\\frac34"),
        ("Final Answer: \\(0.75\\)", "0.75"),
        ("The answer is 3/4.", "3/4"),
        ("So\n#### 3/4", "3/4"),
        ("It is $\\frac34$", None),  # nothing says that this is the answer
        ("cut off: $\\boxed{\\frac{3}{", None),
    ],
)
def test_where_mathematics_is(text, answer):
    assert grade(text, mathematics("\\frac{3}{4}")) == Grade(answer is not None, answer)


def test_what_never_ends_is_ended(monkeypatch):
    """A power tower is worked out in one operation on integers, which no signal interrupts."""
    monkeypatch.setattr(grading, "TIMEOUT", 2.0)
    start = time.monotonic()
    assert grade("\\boxed{9^{9^{9}}}", mathematics("x")) == Grade(False, "9^{9^{9}}")
    assert time.monotonic() - start < 60
    assert grade("\\boxed{\\sqrt{12}}", mathematics("2\\sqrt{3}")).correct  # and grading goes on
    assert not grade("\\boxed{" + "(x+1)" * 500 + "}", mathematics("x")).correct


def test_threads():
    def ask(k: int) -> Grade:
        return grade(f"\\boxed{{\\frac{{{k}}}{{7}}x}}", mathematics(f"\\frac{{{k % 9}x}}{{7}}"))

    with ThreadPoolExecutor(8) as pool:
        grades = list(pool.map(ask, range(1, 18)))
    assert [result.correct for result in grades] == [True] * 8 + [False] * 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork():
    """A forked process asks a worker of its own."""
    assert grade("\\boxed{\\sqrt{8}}", mathematics("2\\sqrt{2}")).correct
    program = (
        "import os\nfrom philens.reasoning.grading import grade\nfrom philens.tasks.problem import Problem\n"
        "def right(k):\n"
        "    problem = Problem('m', '?', '2\\\\sqrt{%d}' % k)\n"
        "    return grade('\\\\boxed{\\\\sqrt{%d}}' % (4 * k), problem).correct\n"
        "assert right(2); child = os.fork(); assert right(3 if child else 5)\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr(grading, "_worker", grading._Worker())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"math-verify cannot be started; .*\.$"):
        grade("\\boxed{\\sqrt{18}}", mathematics("3\\sqrt{2}"))
    assert grade("\\boxed{3}", mathematics("3")).correct  # does not need it


def solved(name: str, answer: str, solution: str, kind="number") -> Problem:
    return Problem(name, f"What is {name}?", answer, solution, kind=kind)


def test_reference_report():
    problems = [solved(f"p{k}", str(k), f"1 + 1 = 2\n#### {k}.00") for k in range(40)]
    problems += [solved("bad", "7", "7 or so\n#### 8"), Problem("none", "?", "1")]
    report = reference_report(problems, wrong=200)
    assert (report["problems"], report["solved"], report["right"]) == (42, 41, 40)
    assert report["rate"] == 40 / 41
    assert report["exceptions"] == [
        {"id": "bad", "reference": "7", "answer": "8", "ending": "7 or so\n#### 8"}
    ]
    assert 180 < report["wrong"] <= 200
    # What is accepted is the other way to be right: 8, from the problem whose own answer is not 8.
    assert all((hit["other"], hit["answer"]) in (("bad", "8"), ("p1", "1")) for hit in report["accepted"])
    with pytest.raises(InputError, match="None of the problems has a solution"):
        reference_report([Problem("none", "?", "1")])


def test_marks_report(tmp_path):
    problems = [solved("p0", "5", "#### 5"), solved("p1", "1,000", "#### 1,000")]
    rows = [
        {
            "question": "What is p0?",
            "ground_truth": "A: 5",
            "small": {"is_correct": True, "solution": "2 + 3\nA: 5"},
            "large": {"is_correct": False, "solution": "2 + 4\nA: 6"},
        },
        {
            "question": "What is p1?",
            "ground_truth": "A: 1000",
            "small": {"is_correct": False, "solution": "A: 1000.0"},
            "large": {"is_correct": True, "solution": "I give up"},
        },
    ]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = marks_report(problems, read_marked_solutions(path))
    assert report["origins"]["small"] == {
        "solutions": 2,
        "agreed": 1,
        "marked_right": 1,
        "graded_right": 2,
        "without_answer": 0,
        "rate": 0.5,
    }
    assert (report["origins"]["large"]["agreed"], report["origins"]["large"]["without_answer"]) == (1, 1)
    small, large = report["disagreements"]
    assert (small["origin"], small["id"], small["answer"]) == ("small", "p1", "1000")
    assert (small["marked"], small["graded"]) == (False, True)
    assert (large["answer"], large["marked"], large["ending"]) == (None, True, "I give up")

    path = tmp_path / "ours.jsonl"
    lines = [
        {"problem_id": "p0", "problem": "What is p0?", "sample": 0, "solution": "#### 5", "correct": True},
        {"problem_id": "p9", "problem": "What is p9?", "sample": 0, "solution": "#### 9", "correct": True},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    ours = read_marked_solutions(path)
    assert ours[0] == MarkedSolution("p0", "#### 5", True, "ours")
    report = marks_report(problems, ours)
    assert report["origins"]["ours"]["rate"] == 1
    assert report["without_problem"] == 1
    with pytest.raises(InputError, match="No solution belongs to one of the problems"):
        marks_report(problems, ours[1:])
    path.write_text(json.dumps({"problem_id": "p0", "solution": "#### 5"}))
    with pytest.raises(InputError, match=r"Row ours/0 of .* is no marked solution; .*\.$"):
        read_marked_solutions(path)
