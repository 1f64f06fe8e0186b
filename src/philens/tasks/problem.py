"""A problem with a known answer, and how it is put to a model."""

import re
from dataclasses import dataclass, field
from typing import Literal

from philens.support.errors import InputError

MARKED = re.compile(r"####(.*)\Z")  # at the end of a solution of GSM8K

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Problem:
    """A problem and what is known of its solution.

    Attributes:
        id: differs from that of every other problem of its set.
        problem: the text of the task.
        answer: the final answer.
        solution: a worked solution that ends in the answer, as a model should write it.
        level: difficulty; 1 to 5 in MATH and `arithmetic`.
        steps: number of calculator annotations (`<<48/2=24>>`) in a solution of GSM8K; None where its author
            wrote none.
        kind: how answers are compared: `number`, or `math` for anything written in LaTeX.
        subject: field of mathematics.
        results: characters of GSM8K's solution that followed a calculator annotation, where the result
            that its author calculated begins. No part of what a problem is: it does not count when two are
            compared.
    """

    id: str
    problem: str
    answer: str
    solution: str | None = None
    level: int | None = None
    steps: int | None = None
    kind: Literal["number", "math"] = "math"
    subject: str | None = None
    results: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Prompt:
    """How a problem is put to a model.

    Attributes:
        instruction: stands before the problem, with a blank line between, or around it where it has
            `{problem}`; empty for the problem alone.
        shots: solved problems that come before, each as a message of the user and a reply.
        ending: what takes the place of a last `#### 42` in the shots' replies, `{answer}` in it being the
            answer; empty to leave that as it is.
    """

    instruction: str
    shots: tuple[Problem, ...] = ()
    ending: str = ""


def messages(problem: Problem, prompt: Prompt) -> Messages:
    """The chat that asks for a solution, up to and with the user's last message.

    Raises:
        InputError: a shot has no solution.
    """
    chat = []
    for shot in prompt.shots:
        if shot.solution is None:
            raise InputError(
                f"Problem {shot.id} has no solution and cannot be shown as solved; leave it out."
            )
        reply = shot.solution
        if prompt.ending:
            ending = prompt.ending.replace("{answer}", shot.answer)
            reply = MARKED.sub(ending.replace("\\", r"\\"), reply)
        chat += [_message("user", _asked(shot, prompt)), _message("assistant", reply)]
    return [*chat, _message("user", _asked(problem, prompt))]


def _asked(problem: Problem, prompt: Prompt) -> str:
    if "{problem}" in prompt.instruction:
        return prompt.instruction.replace("{problem}", problem.problem)
    return f"{prompt.instruction}\n\n{problem.problem}" if prompt.instruction else problem.problem


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
