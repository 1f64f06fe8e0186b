import re
from collections import Counter

import pytest

from philens.bases.tokenizer import train_bpe
from philens.support.errors import ConfigError
from philens.tasks.arithmetic import LEVELS, is_test, problem_at, problems
from philens.tasks.sources import TextPart, open_source

FACTORS = {"twice": 2, "three times": 3, "four times": 4, "five times": 5}
FACTOR = "|".join(FACTORS)


def solve(text: str) -> int:
    """An answer from the text alone, by reading its sentences; not how the problems are made."""
    *facts, question = re.findall(r"[^.?]+[.?]", text)
    who = re.search(r"does (\w+) have", question)[1]
    return story(facts, who) if "now?" in question else people(facts, who)


def story(facts: list[str], who: str) -> int:
    value = 0
    for fact in facts:
        name, rest = fact.strip().split(" ", 1)
        if name != who:
            continue
        number = int((re.search(r"\d+", rest) or ["0"])[0])
        if rest.startswith("has"):
            value = number
        elif rest.startswith(("finds", "buys")):
            value += number
        elif rest.startswith(("loses", "gives")):
            value -= number
        elif found := re.search(f"until there are ({FACTOR}) as many", rest):
            value *= FACTORS[found[1]]
        else:
            assert rest == "sells half of them."
            value = value // 2
    return value


def people(facts: list[str], who: str) -> int:
    known: dict[str, int] = {}
    patterns = {
        r"(\w+) has (\d+) \w+\.": lambda m: int(m[2]),
        r"(\w+) has (\d+) more \w+ than (\w+)\.": lambda m: known[m[3]] + int(m[2]),
        r"(\w+) has (\d+) fewer \w+ than (\w+)\.": lambda m: known[m[3]] - int(m[2]),
        rf"(\w+) has ({FACTOR}) as many \w+ as (\w+)\.": lambda m: known[m[3]] * FACTORS[m[2]],
        r"(\w+) has half as many \w+ as (\w+)\.": lambda m: known[m[2]] // 2,
        r"(\w+) has as many \w+ as (\w+) and (\w+) together\.": lambda m: known[m[2]] + known[m[3]],
        r"(\w+) has as many \w+ as (\w+) has more than (\w+)\.": lambda m: known[m[2]] - known[m[3]],
    }
    waiting = [fact.strip() for fact in facts]
    while who not in known:
        before = len(waiting)
        for fact in list(waiting):
            found = [(m, value) for pattern, value in patterns.items() if (m := re.fullmatch(pattern, fact))]
            assert len(found) == 1, fact
            match, value = found[0]
            try:
                known[match[1]] = value(match)
            except KeyError:
                continue
            waiting.remove(fact)
        assert len(waiting) < before, "the facts do not lead to the answer"
    return known[who]


@pytest.mark.parametrize("level", LEVELS)
def test_solutions_are_right_and_of_their_level(level):
    sizes = LEVELS[level]
    found = [problem_at(index, level, "train") for index in range(400)]
    for problem in found:
        assert solve(problem.problem) == int(problem.answer)
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.solution)
        assert len(equations) == problem.steps
        assert sizes.steps[0] <= problem.steps <= sizes.steps[1]
        for left, sign, right, result in equations:
            x, y, z = int(left), int(right), int(result)
            assert z == {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign]
            assert 0 <= z <= sizes.limit
        assert equations[-1][3] == problem.answer
        assert problem.solution.endswith(f". #### {problem.answer}")
        assert (problem.level, problem.kind) == (level, "number")
    signs = Counter(re.findall(r" ([-+*/]) ", " ".join(problem.solution for problem in found)))
    kinds = {"+": {"more", "sum"}, "-": {"fewer", "difference"}, "*": {"times"}, "/": {"half"}}
    assert {sign for sign, names in kinds.items() if names & set(sizes.kinds)} == set(signs)
    now = sum("now?" in problem.problem for problem in found)
    assert 150 < now < 250
    assert 100 < sum(problem.solution.count("has") > 0 for problem in found) < 300  # whole sentences


def test_hard_problems_hide_the_order():
    """At level 5 facts often come before those they rest on, and some lead nowhere."""
    found = [problem_at(index, 5, "train") for index in range(200)]
    compared = [problem for problem in found if "now?" not in problem.problem]

    def early(problem):
        names = re.findall(r"(?:^|\. )(\w+) has", problem.problem)
        used = [re.findall(r"(?:than|as|and) (\w+)", fact) for fact in problem.problem.split(". ")[:-1]]
        return any(name in names[k + 1 :] for k, others in enumerate(used) for name in others)

    assert sum(map(early, compared)) > 0.9 * len(compared)
    facts = [problem.problem.count(".") for problem in found]
    assert sum(count > problem.steps + 1 for count, problem in zip(facts, found, strict=True)) > 100


def test_training_never_shows_a_test_problem():
    train = {problem_at(index, level, "train").problem for level in LEVELS for index in range(300)}
    test = {problem.problem for problem in problems("test", 500)}
    assert not train & test
    assert all(map(is_test, test))
    assert not any(map(is_test, train))
    # One in ten of all: the easiest level has too few texts for chance alone to keep them apart.
    share = sum(map(is_test, (f"{number} shells" for number in range(10_000)))) / 10_000
    assert 0.09 < share < 0.11


def test_problems_in_numbers():
    found = problems("test", 203, seed=3)
    assert Counter(problem.level for problem in found) == {1: 41, 2: 41, 3: 41, 4: 40, 5: 40}
    assert len({problem.problem for problem in found}) == len({problem.id for problem in found}) == 203
    assert problems("test", 50, seed=3) == found[:50]
    assert problems("test", 50, seed=4) != found[:50]
    assert problem_at(7, 2, "test", 3) == problem_at(7, 2, "test", 3)


def test_as_a_source():
    source = open_source(TextPart(source="arithmetic"), seed=5)
    chat = source[3]
    problem = problem_at(3, 4, "train", 5)
    assert chat == [
        {"role": "user", "content": problem.problem},
        {"role": "assistant", "content": problem.solution},
    ]
    assert open_source(TextPart(source="arithmetic", name="2"), seed=5)[3][0]["content"] == (
        problem_at(3, 2, "train", 5).problem
    )


def test_digits_are_tokens_of_their_own():
    texts = [problem.problem for problem in problems("train", 50)]
    tokenizer = train_bpe(texts, 400, split_digits=True)
    pieces = tokenizer.tokenize("Ann has 123 pens.")
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == ["1", "2", "3"]
    assert tokenizer.decode(tokenizer("Ann has 123 pens.").input_ids, skip_special_tokens=True) == (
        "Ann has 123 pens."
    )
    assert not [token for token in tokenizer.get_vocab() if re.search(r"\d.|.\d", token)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: problem_at(0, 6), "levels 1 to 5, not 6"),
        (lambda: problem_at(0, 1, "dev"), "for train or test, not 'dev'"),
        (lambda: problems("dev", 3), "for train or test, not 'dev'"),
        (lambda: open_source(TextPart(source="arithmetic", name="hard")), "level of arithmetic, from 1 to 5"),
    ],
)
def test_bad_choices(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
