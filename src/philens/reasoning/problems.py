"""Problems with known answers, GSM8K and MATH among them, and how a model is asked to solve them."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from philens.support.errors import ConfigError, InputError
from philens.support.typed import listed, numbers
from philens.tasks.problem import MARKED, Messages, Problem, Prompt

logger = logging.getLogger(__name__)

# What the paper (arXiv 2503.13431) asked in so many words was not to be found. These ask for the final answer
# in the form that Llama 3's published evaluations ask for (data sets meta-llama/Llama-3.*-Instruct-evals).
PROMPTS = {
    "gsm8k": Prompt(
        "Think this problem through step by step. Close with a last sentence of the form: The final answer "
        "is [a number].\n\n{problem}",
        ending="The final answer is {answer}",
    ),
    "math": Prompt(
        "Solve this problem, in clear steps where it needs more than two. Close with a last sentence of the "
        "form: Therefore, the final answer is: $\\boxed{[a number or expression]}$.\n\n{problem}"
    ),
    "arithmetic": Prompt(""),
    "sums": Prompt("", ending="The answer is {answer}."),
    "boxed": Prompt(
        "Solve the following problem step by step and put the final answer in \\boxed{}.",
        ending="The final answer is \\boxed{{answer}}.",
    ),
}
"""For GSM8K and MATH; the problem alone, twice; and `boxed` for problems of any kind."""

MADE_HERE = ("arithmetic", "sums")
"""Sources that are modules of `philens.tasks` with a function `problems(split, count, seed)`."""


def find_prompt(
    source: str,
    name: str | None = None,
    shots: int = 0,
    seed: int = 0,
    levels: Sequence[int] | None = None,
) -> Prompt:
    """The prompt for problems of a source.

    Args:
        source: as `load_problems` takes it.
        name: name of `PROMPTS`, or a text file with the instruction, which may have `{problem}` in it; None
            takes the source's, or `boxed` for one without its own.
        shots: so many solved training problems of the source come before, drawn by `seed`.
        levels: levels of the problems; None means any.

    Raises:
        ConfigError: there is no such prompt.
        InputError: the shots cannot be read.
    """
    name = name or (source if source in PROMPTS else "boxed")
    if name in PROMPTS:
        prompt = PROMPTS[name]
    elif Path(name).is_file():
        prompt = Prompt(Path(name).read_text(encoding="utf-8").strip())
    else:
        raise ConfigError(f"There is no prompt {name!r}; give a text file or one of {', '.join(PROMPTS)}.")
    examples = tuple(load_problems(source, "train", shots, seed, levels)) if shots else ()
    return replace(prompt, shots=examples)


PLAIN_STOP = "\n\nQuestion:"
"""Where a model that goes on after its reply to `plain_text` asks itself the next question."""


def plain_text(messages: Messages) -> str:
    """The same for a tokenizer without a chat template; ends where the reply begins.

    Each message of the user follows `Question: `, each reply `Answer: `; a system's message stands alone.
    """
    marks = {"user": "Question: ", "assistant": "Answer: "}
    parts = [
        marks.get(message["role"], "") + message["content"] + ("\n" if message["role"] == "user" else "\n\n")
        for message in messages
    ]
    return "".join(parts) + "Answer:"


def load_problems(
    source: str,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    levels: Sequence[int] | None = None,
) -> list[Problem]:
    """Problems of a known set, a file, a folder or the Hub.

    A row is a problem if it has `problem` or `question`, and an `answer` or a solution that ends in one:
    after `####`, or in the last `\\boxed{}`, where MATH's authors take it from (arXiv 2103.03874).
    `id`, `solution`, `level`, `steps`, `kind` and `subject` are read where they are given. Without a `kind`,
    answers after `####` are numbers and others mathematics.

    Args:
        source: `gsm8k` or `math` (from the Hub), `arithmetic` or `sums` (made here); a file (.jsonl, .json,
            .parquet); a folder with such files named for the split, or with a folder of that name that holds
            a JSON file for each problem, as MATH's own; or the id of a data set on the Hub. Write `./math`
            for a folder of that name.
        split: split of a known set, a folder or a data set; a file is read whole.
        limit: draw at most so many, as evenly as possible over the levels if there are any; their order
            stays. A larger limit with the same seed adds to a smaller one's. Without it, 1000 are made of
            what is made here.
        seed: seed of the draw, or of what is made here.
        levels: only problems of these levels, drawn evenly; where problems have none, those with so many
            steps. None means all.

    Raises:
        InputError: nothing to read, or a problem without text or answer, or two with one id, or none of
            these levels.
        ConfigError: a limit below 1.
    """
    from philens.tasks.sources import HUB_SETS, load_hub

    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}.")
    if source in MADE_HERE:
        made: Any = import_module(f"philens.tasks.{source}")
        count = limit or 1000
        if levels is None:
            return made.problems(split, count, seed)
        # They are made of all levels in turn.
        return _of_levels(made.problems(split, count * len(made.LEVELS), seed), levels, source)[:count]
    path = Path(source)
    if source not in HUB_SETS and path.exists():
        rows = _folder_rows(path, split) if path.is_dir() else read_rows(path)
    else:
        found_rows: Iterable[dict[str, Any]] = load_hub(source, split=split)  # pyright: ignore[reportAssignmentType]
        rows = {f"{split}/{number}": row for number, row in enumerate(found_rows)}
    found, unanswered = {}, []
    for name, row in rows.items():
        problem = _problem(row, name, source)
        if problem is None:
            unanswered.append(_text(row, *_IDS) or name)
            continue
        if problem.id in found:
            raise InputError(f"Two problems of {source} have the id {problem.id}; make ids differ.")
        found[problem.id] = problem
    if not found:
        raise InputError(f"{source} has no problem with an answer; give a source with at least one.")
    if unanswered:
        names = ", ".join(unanswered[:5]) + ", ..." * (len(unanswered) > 5)
        logger.warning(
            "Left out %d problems of %s whose solutions box nothing: %s.", len(unanswered), source, names
        )
    if levels is None:
        return _sample(list(found.values()), limit, seed, lambda problem: problem.level)
    return _sample(_of_levels(list(found.values()), levels, source), limit, seed, _level)


def parse_levels(text: str | None) -> list[int] | None:
    """Levels named as `1,2` or `2:7` (from, to before); None for None.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    levels = numbers(text)
    if not levels:
        raise ConfigError(f"levels must be given as 1,2 or 2:7 (from, to before), not {text!r}.")
    return levels


def _level(problem: Problem) -> int | None:
    return problem.steps if problem.level is None else problem.level


def _of_levels(problems: list[Problem], levels: Sequence[int], source: str) -> list[Problem]:
    chosen = [problem for problem in problems if _level(problem) in levels]
    if not chosen:
        there = sorted({level for problem in problems if (level := _level(problem)) is not None})
        raise InputError(
            f"No problem of {source} has level {listed(levels)}; there are {listed(there) or 'no levels'}."
        )
    return chosen


def _sample(
    problems: list[Problem], limit: int | None, seed: int, level_of: Callable[[Problem], int | None]
) -> list[Problem]:
    if limit is None or limit >= len(problems):
        return problems
    order = list(range(len(problems)))
    Random(seed).shuffle(order)
    drawn: dict[int | None, int] = {}
    ranks = {}
    for index in order:
        level = level_of(problems[index])
        drawn[level] = drawn.get(level, 0) + 1
        # The first of each level, then the second of each, ...; those without one come last.
        ranks[index] = (level is None, drawn[level], level or 0)
    return [problems[index] for index in sorted(sorted(order, key=ranks.__getitem__)[:limit])]


def _folder_rows(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    from philens.tasks.sources import TABLES

    tables = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TABLES and path.is_file())
    if not tables:
        raise InputError(f"{folder} has no JSON or parquet file; give another folder.")

    def named(path: Path) -> str:
        """`test` of test.jsonl, test-00000-of-00001.parquet and test/algebra/1.json."""
        return re.split(r"[-.]", path.relative_to(folder).parts[0])[0]

    chosen = [path for path in tables if named(path) == split]
    if not chosen and {named(path) for path in tables} & {"train", "test", "validation"}:
        names = listed(sorted({named(path) for path in tables}))
        raise InputError(f"{folder} has no split {split}; it has {names}.")
    rows = {}
    for path in chosen or tables:
        found = read_rows(path)
        alone = len(found) == 1 and path.suffix.lower() == ".json"
        name = path.relative_to(folder).with_suffix("").as_posix()
        rows |= {name if alone else f"{name}/{k}": row for k, row in enumerate(found.values())}
    return rows


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a table by a name each, FILE/NUMBER, counted from 0.

    Args:
        path: .parquet, or JSON: an object, a list of objects, or one on each line.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            rows = _json_rows(path, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read ({reason}); correct it or give another file.") from error
    if not rows:
        raise InputError(f"{path} is empty; give a file with at least one row.")
    return {f"{path.stem}/{number}": row for number, row in enumerate(rows)}


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            pass  # one object on each line, perhaps
        else:
            rows = value if isinstance(value, list) else [value]
            if not all(isinstance(row, dict) for row in rows):
                raise InputError(f"{path} is neither a JSON object nor a list of them; correct it.")
            return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            raise InputError(f"Line {number} of {path} is not a JSON object; correct it or leave it out.")
    return rows


_IDS = ("id", "unique_id", "problem_id")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_CALCULATED = re.compile(r"<<[^=]*[\d.)%]\s*[-+*/x][^=]*=")


def _problem(row: Mapping[str, Any], name: str, source: str) -> Problem | None:
    """A row as a problem; None if all that its solution ends in is an empty box, as two of MATH do."""
    name = _text(row, *_IDS) or name
    text = _text(row, "problem", "question")
    if not text:
        fields = listed(row)
        raise InputError(f"Row {name} of {source} has no problem or question; its fields are {fields}.")
    answer, solution = _text(row, "answer"), _text(row, "solution")
    if answer and "####" in answer:  # GSM8K keeps the solution there
        solution = answer
    steps, results, marked = None, (), solution is not None and MARKED.search(solution)
    if solution is not None and marked:
        answer = answer if answer and answer != solution else marked[1].strip()
        steps = len(_ANNOTATION.findall(solution)) or None
        solution, results = _without_annotations(solution)
    elif answer or solution:
        answer = last_boxed(answer or solution or "") or answer
    if not answer and solution is not None and re.search(r"\\boxed\s*\{\s*\}", solution):
        return None
    if not answer:
        raise InputError(
            f"Problem {name} of {source} has no answer; add one, or a solution that ends in #### or \\boxed."
        )
    kind = _text(row, "kind") or ("number" if marked else "math")
    if kind not in ("number", "math"):
        raise InputError(f"Problem {name} of {source} has the kind {kind!r}; kinds are number and math.")
    return Problem(
        id=name,
        problem=text,
        answer=answer,
        solution=solution,
        level=_whole(row.get("level")),
        steps=_whole(row.get("steps")) or steps,
        kind=kind,
        subject=_text(row, "subject", "type"),
        results=results,
    )


def _without_annotations(solution: str) -> tuple[str, tuple[int, ...]]:
    """The solution as it reads, and the characters in it that followed an annotation with a calculation,
    which `<<8=8>>` has none of."""
    *parts, last = _ANNOTATION.split(solution)
    ends = zip(accumulate(map(len, parts)), _ANNOTATION.findall(solution), strict=True)
    return "".join([*parts, last]), tuple(end for end, found in ends if _CALCULATED.match(found))


_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|\S)")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` or `\fbox{}` that is closed and not empty; the innermost of nested.

    `\boxed 5` boxes one character, as in TeX.
    """
    for found in reversed(list(_BOX.finditer(text))):
        content = found[1] if found[1] != "{" else _braced(text, found.end())
        if content and content.strip():
            return content.strip()
    return None


def _braced(text: str, start: int) -> str | None:
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[start : brace.start()]
    return None


def _text(row: Mapping[str, Any], *names: str) -> str | None:
    """The first of the fields that has text, or a number, which is written out."""
    values = (row.get(name) for name in names)
    return next((text for value in values if value is not None and (text := str(value).strip())), None)


def _whole(value: Any) -> int | None:
    """3 of 3, "3" or "Level 3"; nothing of "Level ?"."""
    found = re.search(r"\d+", str(value)) if value is not None else None
    return int(found[0]) if found else None
