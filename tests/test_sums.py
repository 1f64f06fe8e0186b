"""Sums in words and in symbols: what is made, and how it is asked."""

import re
from itertools import pairwise

import pytest

from philens.reasoning.grading import grade
from philens.reasoning.problems import find_prompt, load_problems
from philens.support.errors import ConfigError
from philens.tasks.problem import messages
from philens.tasks.sums import LEVELS, SUBJECTS, problems


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_problems_ask_for_the_sum_of_their_numbers() -> None:
    made = problems("test", 400)
    assert [problem.level for problem in made] == [*LEVELS] * 100
    assert {(problem.level, problem.subject) for problem in made} == {
        (n, s) for n in LEVELS for s in SUBJECTS
    }
    for problem in made:
        count, top = LEVELS[problem.level or 0]
        asked = numbers(problem.problem)
        assert len(asked) == count == (problem.steps or 0) + 1
        assert min(asked) > 0
        assert str(sum(asked)) == problem.answer
        assert sum(asked) <= top
        assert ("What is" in problem.problem) == (problem.subject == "symbols")
    assert max(int(problem.answer) for problem in made if problem.level == 1) == 20
    assert max(int(problem.answer) for problem in made if problem.level == 4) > 80


def test_solutions_go_step_by_step_to_the_answer() -> None:
    for problem in problems("train", 200):
        solution = problem.solution or ""
        equations = [[int(n) for n in found] for found in re.findall(r"(\d+) \+ (\d+) = (\d+)", solution)]
        assert len(equations) == problem.steps
        assert all(a + b == c for a, b, c in equations)
        assert all(before[2] == after[0] for before, after in pairwise(equations))
        assert grade(solution, problem).correct
        assert solution.endswith(f"{equations[-1][2]}. #### {problem.answer}") or "words" in str(
            problem.subject
        )


def test_splits_have_no_text_in_common_and_more_add_to_fewer() -> None:
    test, train = problems("test", 600), problems("train", 600)
    texts = [problem.problem for problem in (*test, *train)]
    assert len(set(texts)) == len(texts) == 1200
    assert len({problem.id for problem in (*test, *train)}) == 1200
    assert problems("test", 50) == test[:50]
    assert problems("test", 50, seed=1) != test[:50]
    with pytest.raises(ConfigError, match="Sums are for train or test, not 'dev'"):
        problems("dev", 4)


def test_shots_are_of_the_levels_asked_for() -> None:
    chosen = load_problems("sums", limit=30, levels=[3, 4])
    assert [problem.level for problem in chosen] == [3, 4] * 15
    prompt = find_prompt("sums", shots=4, levels=[3, 4])
    assert [shot.level for shot in prompt.shots] == [3, 4, 3, 4]
    assert not {shot.problem for shot in prompt.shots} & {problem.problem for problem in chosen}
    chat = messages(chosen[0], prompt)
    assert chat[-1]["content"] == chosen[0].problem
    assert chat[1]["content"].endswith(f" The answer is {prompt.shots[0].answer}.")
    assert "####" not in chat[1]["content"]
