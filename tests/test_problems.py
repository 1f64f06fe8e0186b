"""Problems from files, folders and made here; prompts."""

import json
import logging

import pandas as pd
import pytest

from philens.reasoning.problems import (
    PLAIN_STOP,
    PROMPTS,
    find_prompt,
    last_boxed,
    load_problems,
    parse_levels,
    plain_text,
    read_rows,
)
from philens.support.errors import ConfigError, InputError
from philens.tasks.problem import Problem, Prompt, messages

GSM8K = [
    {
        "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many?",
        "answer": "In May, she sold 48/2 = <<48/2=24>>24 clips.\nAltogether <<48+24=72>>72 clips.\n#### 72",
    },
    {
        "question": "A house costs $80,000 and $50,000 more. How much?",
        "answer": "80,000+50,000.\n#### 130,000",
    },
]
MATH = [
    {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."},
    {
        "problem": "What is half?",
        "level": "Level ?",
        "type": "Prealgebra",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    },
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_gsm8k_layout(tmp_path):
    write(tmp_path / "test.jsonl", GSM8K)
    write(tmp_path / "train.jsonl", GSM8K[:1])
    first, second = load_problems(str(tmp_path))
    assert first == Problem(
        id="test/0",
        problem=GSM8K[0]["question"],
        answer="72",
        solution="In May, she sold 48/2 = 24 clips.\nAltogether 72 clips.\n#### 72",
        steps=2,
        kind="number",
    )
    assert (second.answer, second.steps) == ("130,000", None)
    assert [problem.id for problem in load_problems(str(tmp_path), "train")] == ["train/0"]
    assert load_problems(str(tmp_path / "train.jsonl"))[0].answer == "72"  # a file is read whole
    with pytest.raises(InputError) as error:
        load_problems(str(tmp_path), "validation")
    assert "no split validation; it has test, train" in sentence(error)


def test_math_layout(tmp_path):
    for number, (folder, row) in enumerate(zip(("algebra", "prealgebra"), MATH, strict=True)):
        write(tmp_path / "test" / folder / f"{number}.json", [row])
    write(tmp_path / "train" / "algebra" / "7.json", MATH[:1])
    one, two = load_problems(str(tmp_path))
    assert one == Problem(
        "test/algebra/0", "What is $1+1$?", "2", MATH[0]["solution"], level=1, subject="Algebra"
    )
    assert (two.id, two.answer, two.level, two.kind) == ("test/prealgebra/1", "\\frac{1}{2}", None, "math")
    assert [problem.id for problem in load_problems(str(tmp_path), "train")] == ["train/algebra/7"]
    # A part of it can be read, too.
    assert [problem.id for problem in load_problems(str(tmp_path / "test" / "algebra"))] == ["0"]


def test_any_table(tmp_path):
    rows = [
        {"id": "a", "problem": "2+2?\u2028", "answer": 4, "level": 3, "steps": 2, "kind": "number"},
        {"problem": "x?", "answer": "$x^2$", "solution": "So $x^2$."},
        {"problem_id": 17, "question": "y?", "answer": "\\boxed{3}", "subject": "Geometry"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    a, b, c = load_problems(str(path))
    assert (a.id, a.answer, a.level, a.steps, a.kind) == ("a", "4", 3, 2, "number")
    assert (b.id, b.answer, b.solution, b.kind) == ("mine/1", "$x^2$", "So $x^2$.", "math")
    assert (c.id, c.problem, c.subject) == ("17", "y?", "Geometry")
    assert c.answer == "3"
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert [p.answer for p in load_problems(str(tmp_path / "list.json"))] == ["4", "$x^2$", "3"]
    pd.DataFrame([{"problem": "z?", "answer": "9"}, {"problem": "w?", "answer": "8"}]).to_parquet(
        tmp_path / "test-00000-of-00001.parquet"
    )
    assert [p.answer for p in load_problems(str(tmp_path))] == ["9", "8"]  # the file named for the split
    both = [{"problem": "v?", "answer": "5", "solution": "2 + 3 = 5. #### 5"}]
    marked = load_problems(write(tmp_path / "marked.jsonl", both))[0]
    assert (marked.answer, marked.kind, marked.solution) == ("5", "number", "2 + 3 = 5. #### 5")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"problem": "a", "answer": "1"}\n{"problem": "b", \n', "Line 2 of"),
        ("[1, 2]\n", "Line 1 of"),
        ('{"problem": "a", "answer": ""}\n', "Problem p/0 of"),
        ('{"problem": "a", "solution": "I do not know."}\n', "has no answer"),
        ('{"text": "a", "answer": "1"}\n', "no problem or question; its fields are text, answer"),
        ('{"problem": "a", "answer": "1", "id": 1}\n' * 2, "have the id 1"),
        ('{"problem": "a", "answer": "1", "kind": "essay"}\n', "kinds are number and math"),
        ('{"problem": "a", "solution": "It is $\\\\boxed{}$."}\n', "no problem with an answer"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        load_problems(str(path))
    assert words in sentence(error)


def test_bad_sources(tmp_path):
    with pytest.raises(InputError) as error:
        load_problems(str(tmp_path / "none.jsonl"))
    assert "There is no file or folder" in sentence(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        load_problems(str(tmp_path / "empty"))
    assert "has no JSON or parquet file" in sentence(error)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError) as error:
        load_problems(str(tmp_path / "p.parquet"))
    assert "cannot be read" in sentence(error)
    with pytest.raises(InputError) as error:
        read_rows(tmp_path / "none.jsonl")
    assert "No such file" in sentence(error)
    with pytest.raises(ConfigError, match="limit must be at least 1, not 0"):
        load_problems(write(tmp_path / "ok.jsonl", MATH), limit=0)


def test_an_empty_box_is_named(tmp_path, caplog):
    """Two problems of MATH's training set end so."""
    rows = [*MATH, {"id": "train/number_theory/7115", "problem": "?", "solution": "So $\\boxed{}$."}]
    with caplog.at_level(logging.WARNING):
        assert len(load_problems(write(tmp_path / "math.jsonl", rows))) == 2
    assert "Left out 1 problems" in caplog.text
    assert "train/number_theory/7115" in caplog.text


def test_the_hub(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        if name == "me/none":
            raise ConnectionError("offline")
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [problem.id for problem in load_problems("gsm8k", "train")] == ["train/0", "train/1"]
    assert load_problems("me/mine")[0].answer == "72"
    assert asked == [("openai/gsm8k", "main", "train"), ("me/mine", None, "test")]
    with pytest.raises(InputError) as error:
        load_problems("me/none")
    assert "nor a data set that the Hub gives (offline)" in sentence(error)


def test_limit_is_even_over_levels(tmp_path):
    counts = {1: 30, 2: 4, 3: 50, None: 9}
    rows = [
        {"problem": f"{level}.{number}", "answer": "1", "level": level}
        for level, count in counts.items()
        for number in range(count)
    ]
    path = write(tmp_path / "p.jsonl", rows)

    def levels(problems):
        return [sum(problem.level == level for problem in problems) for level in counts]

    for limit, expected in (
        (9, [3, 3, 3, 0]),
        (20, [8, 4, 8, 0]),
        (90, [30, 4, 50, 6]),
        (500, [30, 4, 50, 9]),
    ):
        drawn = load_problems(path, limit=limit)
        assert levels(drawn) == expected
        order = [int(problem.id.split("/")[1]) for problem in drawn]
        assert order == sorted(order)
    ids = {seed: {p.id for p in load_problems(path, limit=20, seed=seed)} for seed in range(3)}
    assert ids[0] != ids[1] != ids[2]
    assert ids[0] == {p.id for p in load_problems(path, limit=20)}
    assert (
        {p.id for p in load_problems(path, limit=9)} < ids[0] < {p.id for p in load_problems(path, limit=30)}
    )


def test_problems_of_some_levels(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"id": n, "problem": f"{n}?", "answer": "1", "level": n % 5 + 1} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = load_problems(str(path), levels=[2, 4])
    assert [problem.id for problem in chosen] == [str(n) for n in range(100) if n % 5 in (1, 3)]
    drawn = load_problems(str(path), limit=10, levels=[2, 4])
    assert sorted(problem.level for problem in drawn) == [2] * 5 + [4] * 5
    assert {problem.id for problem in load_problems(str(path), limit=4, levels=[2, 4])} < {
        p.id for p in drawn
    }
    with pytest.raises(InputError, match=r"No problem of .*jsonl has level 7, 8; there are 1, 2, 3, 4, 5\."):
        load_problems(str(path), levels=[7, 8])
    assert {problem.level for problem in load_problems("arithmetic", limit=20, levels=[5])} == {5}
    assert len(load_problems("arithmetic", limit=20, levels=[1, 5])) == 20


def test_problems_without_a_level_have_steps(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [
        {"question": f"{n}?", "answer": "<<1+1=2>>2 " * (1 if n < 30 else n % 4) + f"\n#### {n}"}
        for n in range(50)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Few have two or three steps, and they are drawn as often as those with one.
    drawn = load_problems(str(path), limit=9, levels=[1, 2, 3])
    assert sorted(problem.steps for problem in drawn) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    # Without levels it is a draw from all.
    assert [problem.steps for problem in load_problems(str(path), limit=40)].count(1) > 20
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"problem": "1?", "answer": "1"}\n')
    with pytest.raises(InputError, match="has level 1; there are no levels"):
        load_problems(str(bare), levels=[1])


def test_levels_are_named_as_layers_are():
    assert parse_levels("1,2") == [1, 2]
    assert parse_levels("2:5") == [2, 3, 4]
    assert parse_levels(None) is None
    for text in ("", "easy", "3:3"):
        with pytest.raises(ConfigError, match="levels must be given as 1,2 or 2:7"):
            parse_levels(text)


def test_arithmetic():
    problems = load_problems("arithmetic", "test", limit=20, seed=1)
    assert [sum(problem.level == level for problem in problems) for level in range(1, 6)] == [4] * 5
    assert {problem.kind for problem in problems} == {"number"}
    assert load_problems("arithmetic", "test", limit=20, seed=2) != problems


def test_prompts():
    problem = Problem("p", "What is {x}?", "5")
    shot = Problem("s", "What is 1+1?", "2", "1+1 = 2\n#### 2", kind="number")
    (user,) = messages(problem, PROMPTS["gsm8k"])
    assert user["role"] == "user"
    assert "The final answer is [a number]." in user["content"]
    assert user["content"].endswith("\n\nWhat is {x}?")
    assert "$\\boxed{[a number or expression]}$" in messages(problem, PROMPTS["math"])[0]["content"]
    around = Prompt("Problem: {problem}\nAnswer in \\boxed{}.")
    assert messages(problem, around)[0]["content"] == "Problem: What is {x}?\nAnswer in \\boxed{}."
    assert messages(problem, PROMPTS["arithmetic"]) == [{"role": "user", "content": "What is {x}?"}]
    assert messages(problem, PROMPTS["boxed"])[0]["content"].endswith("\\boxed{}.\n\nWhat is {x}?")

    chat = messages(problem, Prompt("", (shot,)))
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]
    assert [message["content"] for message in chat] == ["What is 1+1?", "1+1 = 2\n#### 2", "What is {x}?"]
    assert plain_text(chat) == (
        "Question: What is 1+1?\nAnswer: 1+1 = 2\n#### 2\n\nQuestion: What is {x}?\nAnswer:"
    )
    assert PLAIN_STOP in plain_text(chat)
    assert PLAIN_STOP not in plain_text(chat[-1:])
    for name, ending in (("gsm8k", "The final answer is 2"), ("boxed", "The final answer is \\boxed{2}.")):
        shown = messages(problem, Prompt(PROMPTS[name].instruction, (shot,), PROMPTS[name].ending))
        assert shown[1]["content"] == f"1+1 = 2\n{ending}"
    with pytest.raises(InputError) as error:
        messages(problem, Prompt("", (problem,)))
    assert "Problem p has no solution" in sentence(error)


def test_finding_a_prompt(tmp_path):
    write(tmp_path / "train.jsonl", GSM8K)
    assert find_prompt("gsm8k") == PROMPTS["gsm8k"]
    assert find_prompt(str(tmp_path)) == PROMPTS["boxed"]
    shown = find_prompt(str(tmp_path), "gsm8k", shots=1)
    assert (shown.instruction, len(shown.shots)) == (PROMPTS["gsm8k"].instruction, 1)
    (tmp_path / "mine.txt").write_text("Solve this:\n{problem}\n")
    assert find_prompt("math", str(tmp_path / "mine.txt")) == Prompt("Solve this:\n{problem}")
    with pytest.raises(ConfigError) as error:
        find_prompt("math", "none")
    assert "There is no prompt 'none'" in sentence(error)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"$\boxed{2}$", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed 5$", "5"),
        (r"\boxed {17}", "17"),
        (r"\fbox{4}", "4"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{7} and cut off: \boxed{\frac{1}{", "7"),
        (r"\boxed{8} or \boxed{ }", "8"),
        (r"\boxed{}", None),
        ("nothing", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed
