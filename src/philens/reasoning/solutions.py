"""Metrics of replies: what a model, or someone else, wrote after a prompt.

Every number is over the reply's own tokens. The prompt and the template's marks are read, as the reply
depends on them, and do not count; nor does the token that ends a text.
"""

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.reasoning.problems import plain_text
from philens.reasoning.rules import AGGREGATES, PREFIX, STATISTICS, check_prefix
from philens.scoring.scores import group_names, of_groups
from philens.scoring.texts import Text, TokenizedText, as_texts, check_tokenizer
from philens.support.columns import Column, column_name
from philens.support.errors import InputError
from philens.tasks.chat import chat_prompt, end_marks, plain_chat, refuse_plain_text, refuse_tool_calls
from philens.tasks.problem import messages
from philens.tasks.rendering import Rendering, rendering_of, set_rendering, with_rendering

if TYPE_CHECKING:
    import pandas as pd

    from philens.lens.model import PHiModel
    from philens.scoring.scores import TokenScores
    from philens.tasks.problem import Problem, Prompt

logger = logging.getLogger(__name__)

# In nats, all of them.
METRICS = ("phi", "surprisal", "entropy")
# A chat of two texts, the prompt as the model's template has it and the reply, that go together unchanged.
_AS_THEY_ARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

Row = Mapping[str, float]


@dataclass(frozen=True)
class Solution:
    """One solution of a problem.

    Attributes:
        problem_id: with `problem`, `level`, `steps` and `reference`, its answer, as the problem has them.
        sample: its number among the problem's solutions, from 0.
        solution: the text, without special tokens.
        answer: its final answer; None where none was found.
        correct: whether that is right.
        tokens: how many the model wrote, like all that follows without the token that ends a text; None, like
            all that follows, for solutions from elsewhere.
        finished: it ended by itself, not by reaching the limit.
        token_ids: as they were drawn; the text need not give the same when it is tokenized.
        logprobs: log-probabilities of these tokens, in nats, before temperature and top-p.
    """

    problem_id: str
    problem: str
    level: int | None
    steps: int | None
    reference: str
    sample: int
    solution: str
    answer: str | None
    correct: bool
    tokens: int | None = None
    finished: bool | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None

    @classmethod
    def of(cls, problem: "Problem", **own: Any) -> "Solution":
        """A solution of this problem, with fields of its own."""
        facts = (problem.id, problem.problem, problem.level, problem.steps, problem.answer)
        return cls(*facts, **own)


# Those that are not the problem's.
OWN_FIELDS = tuple(Solution.__dataclass_fields__)[5:]


def measure_replies(
    lens: "PHiModel",
    tokenizer: Any,
    prompts: Iterable[Text],
    replies: Iterable[str],
    *,
    metrics: Sequence[str] = METRICS,
    prefix: int | None = None,
    batch_tokens: int = 4096,
    window: int | None = None,
    chat_options: Mapping[str, Any] | None = None,
    system: str | None = None,
    bos: bool = False,
) -> "pd.DataFrame":
    """Measure replies, each after its prompt.

    Args:
        lens: a model with a PHi layer.
        tokenizer: its tokenizer, a fast one of transformers; it is left as it was.
        prompts: one for each reply: plain text in front of it, or a chat, a list of messages with `role` and
            `content`, that the reply answers (`render_prompt`).
        replies: as the model wrote them, nothing trimmed. An empty one has 0 tokens and NaN in all metrics.
        metrics: metrics of the tokens, as `philens.score` takes them.
        prefix: also take means over so many tokens from each reply's beginning.
        batch_tokens: tokens read at once, padding included; numbers do not depend on it.
        window: as in `philens.score`, like `chat_options`, `system` and `bos`.

    Returns:
        A row for each reply, in order: `tokens`, and for each metric m over these n tokens `m_mean`, `m_sum`,
        `m_max` and `m_last_fifth`, the mean over the last ⌈n/5⌉; of confidence also `m_lowest_group` and
        `m_tail`, as `TokenScores.means` has them. With `prefix` also
        `tokens_prefix`, how many tokens the reply has of so many, and `m_prefix`, the mean over these. Where
        a lens observes with several layers, the columns of the layer carry the insertion point, as in
        `phi@model.layers.8_mean`.

    Raises:
        InputError: not one prompt for each reply; no reply with a token; a chat that the template refuses; or
            what `philens.score` raises.
        ConfigError: a prefix below 1; chat options that the template does not have, or no BOS.
    """
    import pandas as pd

    prompts, replies = list(as_texts(prompts, "prompts")), list(as_texts(replies, "replies"))
    if len(prompts) != len(replies):
        raise InputError(
            f"There are {len(prompts)} prompts and {len(replies)} replies; give one prompt for each reply."
        )
    tokenizer = with_rendering(tokenizer, Rendering(chat_options or {}, system, bos))
    pairs = zip(prompts, replies, strict=True)
    names = (f"replies[{number}]" for number in range(len(replies)))
    reading: dict[str, Any] = {"metrics": metrics, "batch_tokens": batch_tokens, "window": window}
    rows = list(iter_replies(lens, tokenizer, pairs, names, prefix=prefix, **reading))
    if not any(row["tokens"] for row in rows):
        raise InputError("There is nothing to measure: no reply has a token; give one that is not empty.")
    return pd.DataFrame(rows)


def measure(
    lens: "PHiModel",
    tokenizer: Any,
    solutions: Sequence[Solution],
    problems: Iterable["Problem"],
    prompt: "Prompt",
    **options: Any,
) -> "pd.DataFrame":
    """Measure solutions, each after its problem as a model reads it when it is to solve it.

    A sampled one is read as it was written. One from elsewhere begins with a space where the tokenizer has no
    chat template, as replies do after the `Answer:` of plain text.

    Args:
        lens: a model with a PHi layer.
        tokenizer: its tokenizer.
        solutions: solutions of these problems, as `philens.reasoning.sampling` samples or reads them, or
            `reference_solutions` makes them.
        problems: the problems, at least those that were solved.
        prompt: what they were put in when they were solved.
        options: `metrics`, `prefix`, `batch_tokens` and `window`, as for `measure_replies`.

    Returns:
        A row for each solution, in order: problem_id, level and steps (NaN where not known), sample, correct,
        answer, parsed (an answer was found), finished (it ended by itself; None where not known), and what
        `measure_replies` gives.

    Raises:
        InputError: a solution of none of the problems; or as `measure_replies`.
    """
    import pandas as pd

    by_id = {problem.id: problem for problem in problems}
    for number, solution in enumerate(solutions):
        if solution.problem_id not in by_id:
            raise InputError(
                f"solutions[{number}] belongs to problem {solution.problem_id!r}, which is not among the "
                f"{len(by_id)} problems; give the problems that were solved."
            )
    measured = measure_replies(
        lens,
        tokenizer,
        [messages(by_id[solution.problem_id], prompt) for solution in solutions],
        [_as_written(solution, tokenizer) for solution in solutions],
        **options,
    )
    empty = int((measured["tokens"].to_numpy() == 0).sum())
    if empty:
        logger.warning("%d of %d solutions have no token, and so no metrics.", empty, len(measured))
    names = ("problem_id", "level", "steps", "sample", "correct", "answer", "finished")
    facts = pd.DataFrame([{name: getattr(solution, name) for name in names} for solution in solutions])
    facts.insert(6, "parsed", [solution.answer is not None for solution in solutions])
    for name in ("level", "steps"):  # None alone would make a column of objects
        facts[name] = pd.to_numeric(facts[name])
    return pd.concat([facts, measured], axis=1)


def _as_written(solution: Solution, tokenizer: Any) -> str:
    text = solution.solution
    begins = tokenizer.chat_template or solution.token_ids is not None or text[:1].isspace()
    return text if begins or not text else f" {text}"


def reference_solutions(problems: Iterable["Problem"]) -> list[Solution]:
    """The problems' own worked solutions, as `measure` takes them; a problem without one is left out."""
    return [
        Solution.of(
            problem, sample=0, solution=problem.solution, answer=problem.answer, correct=True, finished=True
        )
        for problem in problems
        if problem.solution is not None
    ]


def by_insertion_point(table: "pd.DataFrame") -> "dict[str, pd.DataFrame]":
    """The table of a lens with several layers as one for each layer, as a lens with that layer alone has it.

    By insertion point: `phi@model.layers.8_mean` is `phi_mean` in the table of `model.layers.8`.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in table:
        column = Column(name, STATISTICS)
        if column.point is not None and column.statistic is not None:
            plain = column_name(column.metric, statistic=column.statistic)
            layers.setdefault(column.point, {})[name] = plain
    return {
        path: table.drop(
            columns=[name for names in layers.values() if names is not own for name in names]
        ).rename(columns=own)
        for path, own in layers.items()
    }


def iter_replies(
    lens: "PHiModel",
    tokenizer: Any,
    pairs: Iterable[tuple[Text, str]],
    names: Iterable[str],
    *,
    metrics: Sequence[str] = METRICS,
    prefix: int | None = None,
    whole: bool = True,
    **reading: Any,
) -> Iterator[Row]:
    """The rows of `measure_replies` for any number of (prompt, reply), which are read a few batches ahead.

    Args:
        names: what errors call the replies, one for each.
        whole: False reads the first tokens alone; rows then have `tokens` and what is of `prefix`.
        reading: `batch_tokens` and `window`, as for `measure_replies`.

    Raises:
        InputError: as `measure_replies`; about a reply when it is reached, about anything else at once.
    """
    from philens.scoring.score import check_metrics, iter_scores

    check_tokenizer(tokenizer)
    if prefix is not None:
        check_prefix(prefix)
    # Whether there is something to read of each reply, where it starts and ends in the text that is read, and
    # which tokens of that, (T,), are its own.
    read: deque[bool] = deque()
    places: deque[tuple[int, int]] = deque()
    owned: deque[NDArray[np.bool_]] = deque()
    ending = end_marks(tokenizer)

    def texts() -> Iterator[tuple[Text, str]]:
        for (prompt, reply), name in zip(pairs, names, strict=False):
            if not isinstance(reply, str):
                raise InputError(f"{name} is of type {type(reply).__name__}; a reply is a string.")
            read.append(bool(reply))
            if not reply:
                continue
            text, start = after_prompt(tokenizer, prompt, reply, f"the prompt of {name}")
            places.append((start, start + len(ending.sub("", reply))))
            yield text, name

    def cut(text: TokenizedText) -> TokenizedText:
        start, stop = places.popleft()
        starts, ends = text.offsets.T
        owned.append((ends > start) & (ends > starts) & (ends <= stop))
        return text if whole else text.first(_end(_first(owned[-1], prefix)))

    contents, labels = tee(texts())
    scored = iter_scores(
        lens,
        joining(tokenizer),
        (content for content, _ in contents),
        metrics=metrics,
        names=(name for _, name in labels),
        cut=cut,
        **reading,
    )
    wanted = check_metrics(lens, metrics)
    # Replies that begin alike have the same numbers of their beginning. In batches of other shapes they would
    # differ by rounding, which would tell how long the replies get.
    beginnings: dict[bytes, Row] = {}

    def rows() -> Iterator[Row]:
        for scores in scored:
            while not read.popleft():
                yield {"tokens": 0}
            own = owned.popleft()
            row: Row = {"tokens": int(own.sum())}
            if prefix is not None:
                first = _first(own, prefix)[: len(scores)]
                start = scores.token_ids[: _end(first)].tobytes()
                beginning = beginnings.get(start) or _of_prefix(scores, first, wanted)
                if whole:  # all of them are held anyway
                    beginnings[start] = beginning
                row = {**row, **beginning}
            yield {**row, **_aggregate(scores, own, wanted)} if whole else row
        yield from ({"tokens": 0} for _ in read)

    return rows()


def joining(tokenizer: Any) -> Any:
    """A copy of a tokenizer that reads what `after_prompt` gives."""
    copied = copy.copy(tokenizer)
    copied.chat_template = _AS_THEY_ARE
    set_rendering(copied, Rendering(bos=rendering_of(tokenizer).bos))
    return copied


def after_prompt(tokenizer: Any, prompt: Text, reply: str, where: str = "the prompt") -> tuple[Text, int]:
    """A reply after its prompt, for `joining(tokenizer)` to read, and the character where the reply starts.

    Raises:
        InputError: as `render_prompt`.
    """
    before = render_prompt(tokenizer, prompt, where)
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return before + reply, len(before)
    # What a template writes brings its own special tokens.
    parts = (("prompt", before), ("reply", reply))
    return [{"role": role, "content": content} for role, content in parts], len(before)


def render_prompt(tokenizer: Any, prompt: Text, where: str = "the prompt") -> str:
    """What stands in front of a reply: a text as it is, a chat as the tokenizer's template has it.

    The reply itself does not go through the template, as it did not when the model wrote it: templates
    change messages (Llama 3's trims them, Qwen 3's leaves out thoughts). Without a template, a chat is
    `philens.reasoning.problems.plain_text`.

    Raises:
        InputError: neither text nor chat, or the template refuses the chat or leaves out its tool calls.
    """
    if isinstance(prompt, str):
        refuse_plain_text(tokenizer, where)
        return prompt
    if tokenizer.chat_template:
        return chat_prompt(tokenizer, prompt, where)
    chat = plain_chat(tokenizer, prompt, where)
    refuse_tool_calls(chat, where)
    return plain_text(chat)


def _first(own: NDArray[np.bool_], prefix: int | None) -> NDArray[np.bool_]:
    """(T,) the first of the tokens where `own`, (T,), is true."""
    return own & (own.cumsum() <= (prefix or 0))


def _end(chosen: NDArray[np.bool_]) -> int:
    """How many tokens there are up to the last one chosen, (T,); at least one."""
    return int(np.flatnonzero(chosen).max(initial=0)) + 1


def _values(
    scores: "TokenScores", own: NDArray[np.bool_], metrics: Sequence[str]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """The values that count, by column, of the tokens where `own`, (T,), is true."""
    for name, column in scores.columns.items():
        if not own.any() or Column(name).metric not in metrics:  # a standard error has no sum
            continue
        kept = own & scores.counts(name)
        values = column[kept if kept.any() else own].astype(np.float64)
        if np.isnan(values).any():
            raise InputError(f"{scores.name} has a token without {name}; put a prompt in front of it.")
        yield name, values


def _of_prefix(scores: "TokenScores", first: NDArray[np.bool_], metrics: Sequence[str]) -> Row:
    """What a row has of a reply's first tokens, where `first`, (T,), is true."""
    means = {
        column_name(name, statistic=PREFIX): float(values.mean())
        for name, values in _values(scores, first, metrics)
    }
    return {column_name("tokens", statistic=PREFIX): int(first.sum())} | means


def _aggregate(scores: "TokenScores", own: NDArray[np.bool_], metrics: Sequence[str]) -> Row:
    """What a row has of a reply whose tokens are those where `own`, (T,), is true."""
    row: dict[str, float] = {}
    for name, values in _values(scores, own, metrics):
        last_fifth = values[-ceil(len(values) / 5) :]
        found = (values.mean(), values.sum(), values.max(), last_fifth.mean())
        row |= {
            column_name(name, statistic=kind): float(value)
            for kind, value in zip(AGGREGATES, found, strict=True)
        }
        if names := group_names(name):
            row |= zip(names, of_groups(values, scores.group), strict=True)
    return row
