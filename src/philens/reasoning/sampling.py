"""Solutions of problems, sampled from a model or brought from elsewhere.

Sampling goes by batches of prompts of like length, each drawn from a seed of its own; so a run that was
killed and went on gives the same as one that was not.
"""

import hashlib
import json
import logging
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from philens.reasoning.folder import (
    PART_FILE,
    RECORD_FILE,
    SOLUTIONS_FILE,
    Row,
    append,
    begin,
    in_order,
    whole_batches,
    write_record,
)
from philens.reasoning.grading import grade
from philens.reasoning.problems import read_rows
from philens.reasoning.solutions import OWN_FIELDS, Solution, render_prompt
from philens.scoring.shards import check_same_settings
from philens.scoring.texts import check_tokenizer, settings_kept
from philens.support.errors import ConfigError, InputError
from philens.support.files import locked
from philens.support.progress import working
from philens.tasks.chat import Messages, encode_text, missing_bos
from philens.tasks.problem import Problem, Prompt, messages
from philens.tasks.rendering import AS_IS, Rendering, with_rendering
from philens.training.source import ModelSource

if TYPE_CHECKING:
    from philens.reasoning.engines import Drawn, Engine

logger = logging.getLogger(__name__)

# Solutions drawn at once. vLLM does its own batching; a batch is then what a stop can lose.
BATCH_SIZES = {"transformers": 128, "vllm": 4096}
# Where solutions from elsewhere keep their text, in this order.
_TEXT_FIELDS = ("solution", "response", "completion", "text")


@dataclass(frozen=True)
class Solved:
    """What a folder of sampled solutions holds.

    Attributes:
        path: the file.
        problems: how many; `solutions`, `tokens` likewise.
        correct: solutions that are right.
        unparsed: those in which no answer was found.
        cut_off: those that reached the limit.
        levels: share of right ones at each level, where problems have one.
        new: False if all was there already.
    """

    path: Path
    problems: int
    solutions: int
    tokens: int
    correct: int
    unparsed: int
    cut_off: int
    levels: dict[str, float] = field(default_factory=dict)
    new: bool = True

    def __str__(self) -> str:
        notes = [f"{self.correct / self.solutions:.1%} right"]
        notes += [f"{self.unparsed:,} without an answer"] * bool(self.unparsed)
        notes += [f"{self.cut_off:,} cut off"] * bool(self.cut_off)
        return (
            f"{self.solutions:,} solutions of {self.problems:,} problems with {self.tokens:,} tokens, "
            f"{', '.join(notes)}"
        )


def solve(
    model: str | ModelSource,
    problems: Sequence[Problem],
    output: Path,
    *,
    prompt: Prompt,
    samples: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    batch_size: int | None = None,
    engine: Literal["transformers", "vllm"] = "transformers",
    seed: int = 0,
    chat_options: Mapping[str, Any] | None = None,
    system: str | None = None,
    bos: bool = False,
) -> Solved:
    """Sample solutions from a model, grade them, and write them into a folder; the same call goes on.

    Args:
        model: where it comes from, or the folder or Hub id of a base model; or a run folder, whose PHi layer
            is in the path where it has one (its `model` folder is the base alone).
        problems: what to solve.
        output: the folder.
        prompt: how a problem is put.
        samples: solutions of each problem.
        temperature: divides the logits; 0 takes the likeliest token, for one sample.
        top_p: draws among the likeliest tokens that together have this probability.
        max_new_tokens: most tokens of a solution; less where the model's context ends earlier.
        batch_size: solutions drawn at once; None takes that of `BATCH_SIZES`. Other sizes draw others.
        engine: `transformers`, or `vllm` for speed.
        seed: seed of the drawing.
        chat_options: as in `philens.score`, like `system` and `bos`.

    Raises:
        ConfigError: settings out of range or that exclude each other; chat options that the template does not
            have, or no BOS.
        InputError: no problem, two with the same id, or a prompt longer than the model's context.
        AdapterError: model or adapter are missing, damaged or do not belong together.
        OutputError: the folder cannot be written, or belongs to something else or to other settings.
        KeyboardInterrupt: the user stopped it.
    """
    from philens.reasoning.engines import load_engine

    if engine not in BATCH_SIZES:
        raise ConfigError(f"engine must be one of {', '.join(BATCH_SIZES)}, not {engine!r}.")
    batch_size = BATCH_SIZES[engine] if batch_size is None else batch_size
    _check_numbers(samples, temperature, top_p, max_new_tokens, batch_size)
    _check_problems(problems)
    named = model if isinstance(model, ModelSource) else ModelSource(model)
    rendering = Rendering(chat_options or {}, system, bos)
    compared = [item.name for item in fields(Problem) if item.compare]
    identities = [{name: getattr(problem, name) for name in compared} for problem in problems]
    settings = {
        "model": named.model,
        "adapter": named.adapter,
        "revision": named.revision,
        "dtype": named.dtype,
        "engine": engine,
        "problems": f"{len(problems)} with hash {_digest(identities)}",
        "prompt": f"{prompt.instruction[:40]!r} with hash {_digest(asdict(prompt))}",
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        **rendering.record(),
    }
    output = Path(output)
    with locked(output, RECORD_FILE):
        record = begin(output, settings)
        if record["counts"]:
            return Solved(output / SOLUTIONS_FILE, **record["counts"], new=False)
        source = load_engine(engine, named, temperature, top_p)
        source.tokenizer = with_rendering(source.tokenizer, rendering)
        origin = json.loads(json.dumps(source.record, default=str))
        check_same_settings(output, record["origin"] or origin, origin)
        chats = [messages(problem, prompt) for problem in problems]
        prompts = [prompt_ids(source.tokenizer, chat) for chat in chats]
        limits = _limits(problems, prompts, source.context, max_new_tokens)
        record["origin"] = origin
        record["prompt"] = {
            "instruction": prompt.instruction,
            "shots": [shot.id for shot in prompt.shots],
            "example": source.tokenizer.decode(prompts[0]),
        }
        write_record(output, record)
        plan = _plan(prompts, samples, batch_size)
        _sample(output / PART_FILE, source, problems, prompts, limits, plan, seed)
        record["counts"] = in_order(output, plan)
        write_record(output, record)
        (output / PART_FILE).unlink()
        return Solved(output / SOLUTIONS_FILE, **record["counts"])


def prompt_ids(tokenizer: Any, chat: Messages) -> list[int]:
    """The tokens after which a model writes its reply to a chat; the tokenizer is left as it was.

    They are those that scoring the finished chat reads: by the chat template, ending where the reply begins;
    without a template, as plain text after what comes before texts.

    Raises:
        InputError: the template refuses the chat, or the tokenizer is no fast one.
    """
    check_tokenizer(tokenizer)
    text = render_prompt(tokenizer, chat)
    with settings_kept(tokenizer.backend_tokenizer):
        begin, tokens, _ = encode_text(tokenizer, text)
    return (missing_bos(tokenizer, tokens) if tokenizer.chat_template else begin) + tokens


def read_rendering(path: str | Path) -> Rendering:
    """How the prompts of a folder of `solve` were put; of solutions from elsewhere it is not known."""
    record = Path(path) / RECORD_FILE
    if not record.is_file():
        return AS_IS
    settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    known = (item.name for item in fields(Rendering))
    return Rendering(**{name: settings[name] for name in known if name in settings})


def read_solutions(path: str | Path, problems: Sequence[Problem]) -> list[Solution]:
    """Solutions of these problems: those that `solve` sampled, or existing ones from elsewhere.

    Those from elsewhere are rows of JSON Lines, JSON or Parquet that name a problem by `problem_id` or `id`,
    or by its text, `problem` or `question`, and hold a text, `solution`, `response`, `completion` or `text`;
    or several in a list `solutions`; or, as GSM8K's example_model_solutions.jsonl, an object with `solution`
    for each model. A mark beside a text, `correct` or `is_correct`, is kept; others are graded.

    Args:
        path: the folder that `solve` wrote, or a file.
        problems: the problems, at least those that were solved.

    Raises:
        InputError: no file, a broken row, one without a solution or of none of the problems, one twice.
    """
    path = Path(path)
    file = path / SOLUTIONS_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        begun = (path / RECORD_FILE).is_file()
        raise InputError(
            f"The solutions in {path} are not all there yet; finish them with philens solve."
            if begun
            else f"{path} has no {SOLUTIONS_FILE}; give a folder of philens solve, or a file."
        )
    if not file.is_file():
        raise InputError(f"There is no file {file}; check the path.")
    by_id = {problem.id: problem for problem in problems}
    by_text = {_words(problem.problem): problem for problem in problems}
    taken: dict[str, set[int]] = defaultdict(set)
    found = []
    for number, row in enumerate(read_rows(file).values(), 1):
        where = f"Row {number} of {file}"
        problem = _problem_of(row, by_id, by_text, where)
        for solution in _solutions_of(row, problem, len(taken[problem.id]), where):
            if solution.sample in taken[problem.id]:
                raise InputError(
                    f"{where} is sample {solution.sample} of problem {problem.id} once more; leave it out."
                )
            taken[problem.id].add(solution.sample)
            found.append(solution)
    unparsed = [f"{one.problem_id} sample {one.sample}" for one in found if one.answer is None]
    if unparsed:
        more = f" and {len(unparsed) - 5:,} more" if len(unparsed) > 5 else ""
        logger.warning(
            "No answer was found in %d of %d solutions: %s%s.",
            len(unparsed),
            len(found),
            ", ".join(unparsed[:5]),
            more,
        )
    return found


# Sampling.


def _check_numbers(
    samples: int, temperature: float, top_p: float, max_new_tokens: int, batch_size: int
) -> None:
    counts = {"samples": samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}.")
    if not 0 <= temperature < inf:
        raise ConfigError(f"temperature must be 0 or more, not {temperature}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {top_p}.")
    if temperature == 0 and samples > 1:
        raise ConfigError(
            f"At temperature 0 all {samples} samples would be the same; give samples 1, or a temperature."
        )


def _check_problems(problems: Sequence[Problem]) -> None:
    if not problems:
        raise InputError("There is nothing to solve; give at least one problem.")
    identity, count = Counter(problem.id for problem in problems).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} problems have the id {identity!r}; give each its own.")


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _limits(
    problems: Sequence[Problem], prompts: Sequence[list[int]], context: int | None, max_new_tokens: int
) -> list[int]:
    """How many tokens may be drawn after each prompt."""
    if context is None:
        return [max_new_tokens] * len(prompts)
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) >= context:
            raise InputError(
                f"The prompt of problem {problem.id} has {len(prompt)} tokens and the model reads {context}; "
                "leave the problem out or give a shorter prompt."
            )
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def _plan(prompts: Sequence[list[int]], samples: int, batch_size: int) -> list[list[Row]]:
    """What is drawn in which batch, the longest prompts first, so that what fits at first fits to the end."""
    rows = [(number, sample) for number in range(len(prompts)) for sample in range(samples)]
    rows.sort(key=lambda row: -len(prompts[row[0]]))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _sample(
    path: Path,
    source: "Engine",
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    plan: Sequence[list[Row]],
    seed: int,
) -> None:
    """Draw the batches that are not yet in a file and append them to it."""
    done = whole_batches(path, problems, plan)
    count = sum(map(len, plan[:done]))
    with working("solving", sum(map(len, plan))) as told:
        told(count)
        for number, batch in enumerate(plan[done:], done):
            drawn = source.draw(
                [prompts[problem] for problem, _ in batch],
                [limits[problem] for problem, _ in batch],
                int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]),
            )
            lines = [
                json.dumps(asdict(_graded(source, problems[problem], sample, one)), ensure_ascii=False)
                for (problem, sample), one in zip(batch, drawn, strict=True)
            ]
            append(path, "".join(f"{line}\n" for line in lines).encode())
            count += len(batch)
            told(count)


def _graded(source: "Engine", problem: Problem, sample: int, drawn: "Drawn") -> Solution:
    text, count, finished = _reply(source, drawn[0])
    found = grade(text, problem)
    return Solution.of(
        problem,
        sample=sample,
        solution=text,
        answer=found.answer,
        correct=found.correct,
        tokens=count,
        finished=finished,
        token_ids=drawn[0][:count],
        logprobs=[round(value, 6) for value in drawn[1][:count]],
    )


def _reply(source: "Engine", ids: list[int]) -> tuple[str, int, bool]:
    """Text and number of tokens of what was drawn, up to its end, and whether there is one."""

    def decoded(count: int) -> str:
        return source.tokenizer.decode(
            ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    count = next((place for place, token in enumerate(ids) if token in source.ends), len(ids))
    finished, text = count < len(ids), decoded(count)
    if source.stop and source.stop in text:
        finished, text = True, text.partition(source.stop)[0]
        # The fewest tokens that write it; the last may hold the beginning of the stop.
        count = bisect_left(range(count), len(text), key=lambda place: len(decoded(place)))
    return text, count, finished


# Solutions from elsewhere.


def _words(text: str) -> str:
    return " ".join(text.split())


def _problem_of(
    row: Mapping[str, Any], by_id: Mapping[str, Problem], by_text: Mapping[str, Problem], where: str
) -> Problem:
    """The problem that a row names; where id and text differ, by its text: ids are easily of another set."""
    identity = next((str(row[name]) for name in ("problem_id", "id") if row.get(name) is not None), None)
    text = next((row[name] for name in ("problem", "question") if isinstance(row.get(name), str)), None)
    if identity is None and text is None:
        raise InputError(f"{where} names no problem; it needs problem_id or id, or problem or question.")
    problem = by_id.get(identity or "")
    if problem is None or (text is not None and _words(text) != _words(problem.problem)):
        problem = by_text.get(_words(text or ""))
    if problem is None:
        raise InputError(
            f"{where} belongs to a problem that is not among the {len(by_id)} given "
            f"({(identity or text)!r:.80}); give the problems that were solved."
        )
    return problem


def _solutions_of(row: Mapping[str, Any], problem: Problem, first: int, where: str) -> list[Solution]:
    """The solutions in a row; those without a number have numbers from `first` on."""
    if row.keys() >= {"problem_id", "reference", "sample", "solution", "answer", "correct"}:
        own: dict[str, Any] = {name: row.get(name) for name in OWN_FIELDS}
        if not (isinstance(own["solution"], str) and isinstance(own["correct"], bool)):
            raise InputError(f"{where} needs a text as solution and true or false as correct; correct it.")
        return [Solution.of(problem, **own)]
    found = []
    for text, mark in _texts(row, where):
        if mark is not None and mark not in (False, True):
            raise InputError(f"{where} marks a solution with {mark!r}; give true or false, or no mark.")
        graded = grade(text, problem)
        correct = graded.correct if mark is None else bool(mark)
        number = row["sample"] if isinstance(row.get("sample"), int) else first + len(found)
        own = {"sample": number, "solution": text, "answer": graded.answer, "correct": correct}
        found.append(Solution.of(problem, **own))
    return found


def _texts(row: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    """The texts of a row with their marks."""
    mark = row.get("correct", row.get("is_correct"))
    for name in _TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return [(row[name], mark)]
    several = row.get("solutions")
    if isinstance(several, list) and several:
        marks = mark if isinstance(mark, list) else [None] * len(several)
        if len(marks) != len(several):
            raise InputError(f"{where} has {len(several)} solutions and {len(marks)} marks; give one each.")
        if strange := [one for one in several if not isinstance(one, str | dict)]:
            raise InputError(f"{where} holds {strange[0]!r:.40} among its solutions; give texts.")
        pairs = zip(several, marks, strict=True)
        return [(one, own) if isinstance(one, str) else _texts(one, where)[0] for one, own in pairs]
    models = [value for value in row.values() if isinstance(value, dict) and "solution" in value]
    if not models:
        raise InputError(
            f"{where} has no solution; it needs a text in {', '.join(_TEXT_FIELDS)}, or a list solutions."
        )
    return [_texts(model, where)[0] for model in models]
