"""Candidate answers put in order by a rule, the best first."""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from philens.bases.hub import reason
from philens.reasoning.rules import Rule, best_half, check_prefix
from philens.reasoning.solutions import METRICS, Row, iter_replies
from philens.scoring.texts import Text, as_texts
from philens.support.errors import ConfigError, InputError
from philens.support.files import same_file, write_atomically
from philens.support.output import utf8_output
from philens.support.progress import shown
from philens.support.typed import plain
from philens.tasks.chat import check_chat, content_text
from philens.tasks.rendering import Rendering, with_rendering

if TYPE_CHECKING:
    import pandas as pd

    from philens.lens.model import PHiModel

logger = logging.getLogger(__name__)

Form = Literal["terminal", "jsonl", "csv"]
# Fields of a record; of several the first counts.
PROMPT_FIELDS = ("prompt", "problem", "question")
CANDIDATE_FIELDS = ("candidate", "response", "completion", "solution")
PAIR_FIELDS = ("chosen", "rejected")  # of TRL's preferences
_MUST = 'it must have a "prompt" and "candidates", a list, or one of them as "response"'


@dataclass(frozen=True)
class Candidates:
    """Answers among which to choose."""

    id: str | int  # what the prompt is called
    prompt: Text  # as in `philens.reasoning.solutions.measure_replies`
    texts: Sequence[str]  # the answers, at least two, none empty


class Ranked(NamedTuple):
    """What `rank_file` has done."""

    prompts: int  # how many there were
    saved: float | None  # share of tokens that need not have been written, where there was a prefix

    def __str__(self) -> str:
        saved = "" if self.saved is None else f"; choosing early saved {self.saved:.1%} of their tokens"
        return f"candidates of {self.prompts:,} prompts{saved}"


def rank(
    lens: "PHiModel",
    tokenizer: Any,
    prompts: Text | Iterable[Text],
    candidates: Iterable[str] | Iterable[Sequence[str]],
    *,
    rule: str | Rule = "highest_phi",
    prefix: int | None = None,
    prefix_rule: str | Rule | None = None,
    metrics: Sequence[str] = METRICS,
    batch_tokens: int = 4096,
    window: int | None = None,
    chat_options: Mapping[str, Any] | None = None,
    system: str | None = None,
    bos: bool = False,
) -> "pd.DataFrame":
    """Order the candidate answers to each prompt by a rule.

    Args:
        lens: a model with a PHi layer.
        tokenizer: its tokenizer.
        prompts: a prompt, or several: plain text in front of the answers, or a chat, a list of messages.
        candidates: the answers to the prompt; to several prompts, a list of answers for each. Lists may be
            arrays or columns of a table.
        rule: `highest_COLUMN` or `lowest_COLUMN` of this table, where a metric means its mean per token; or
            `shortest`.
        prefix: choose early: read so many tokens of every candidate, and go on with the better half alone,
            rounded up; of equal ones with the earlier.
        prefix_rule: what is better then, a rule of which the metric counts, as the mean over these tokens;
            None means that of `rule`.
        metrics: metrics of the tokens, as `philens.score` takes them; what the rule needs is added.
        batch_tokens: tokens read at once, padding included.
        window: as in `philens.score`, like `chat_options`, `system` and `bos`.

    Returns:
        A row for each candidate, prompt by prompt and in these the best first: prompt and candidate (numbers
        from 0), rank (1 is the best; of equal ones all have the better), score (what the rule looks at, the
        higher the better, so for `lowest_` the negative), the columns of `measure_replies`, and text. A
        notebook shows it prompt by prompt. With a prefix also whether it was `kept`, `tokens_prefix`, and the
        metric's `m_prefix`; those that were not come after the others, in the order of that, and have no
        score and no other metrics. `attrs["saved"]` is the share of all candidates' tokens that need not have
        been written: what comes after the prefix in those that were not kept.

    Raises:
        ConfigError: no rule; a prefix below 1, or its rule without it; chat options that the template does
            not have, or no BOS.
        InputError: a prompt with fewer than two candidates, or with an empty one; a column that does not
            exist; or what `measure_replies` raises.
    """
    import pandas as pd

    from philens.reasoning.ranked import RankTable

    one = isinstance(prompts, str)
    asked: list[Any] = list(as_texts(prompts, "prompts"))
    if asked and isinstance(asked[0], Mapping):  # a chat
        one, asked = True, [asked]
    replies: list[Any] = [plain(candidates)] if one else list(as_texts(candidates, "candidates"))
    if len(asked) != len(replies):
        raise InputError(
            f"There are {len(asked)} prompts and {len(replies)} lists of candidates; give one for each."
        )
    if not asked:
        raise InputError("There is nothing to rank; give at least one prompt with its candidates.")
    groups = [
        Candidates(number, prompt, texts)
        for number, (prompt, texts) in enumerate(zip(asked, replies, strict=True))
    ]
    options: dict[str, Any] = {"metrics": metrics, "batch_tokens": batch_tokens, "window": window}
    options |= {"prefix": prefix, "prefix_rule": prefix_rule}
    tokenizer = with_rendering(tokenizer, Rendering(chat_options or {}, system, bos))
    ranked = iter_ranked(lens, tokenizer, groups, rule=rule, **options)
    whole = RankTable(pd.concat([table for _, table in ranked], ignore_index=True))
    if prefix is not None:
        whole.attrs["saved"] = _saved([_tokens(whole)])
    return whole


def iter_ranked(
    lens: "PHiModel",
    tokenizer: Any,
    groups: Iterable[Candidates],
    *,
    rule: str | Rule = "highest_phi",
    prefix: int | None = None,
    prefix_rule: str | Rule | None = None,
    metrics: Sequence[str] = METRICS,
    **reading: Any,
) -> "Iterator[tuple[Candidates, pd.DataFrame]]":
    """The table of `rank` prompt by prompt, for any number of prompts, which are read a few batches ahead.

    Args:
        reading: `batch_tokens` and `window`, as for `rank`, like all others.

    Raises:
        ConfigError, InputError: as `rank`; about a prompt when it is reached, about anything else at once.
    """
    import pandas as pd

    rule = Rule.parse(rule) if isinstance(rule, str) else rule
    early = _early_rule(rule, prefix, prefix_rule)
    read = partial(_read, lens, tokenizer, **reading)
    wanted = list(dict.fromkeys([*metrics, *rule.metrics]))
    if early is None:
        found = read(((group, range(len(group.texts))) for group in groups), metrics=wanted)
        return ((group, _ranked(group, rows, rule)) for group, rows in found)
    beginnings = read(
        ((group, range(len(group.texts))) for group in groups),
        metrics=early.metrics or wanted,
        prefix=prefix,
        whole=False,
    )

    def kept(rows: Sequence[Row]) -> NDArray[np.bool_]:
        return best_half(early.scores(pd.DataFrame(rows)), np.zeros(len(rows), np.int64))

    here, ahead = tee((group, rows, kept(rows)) for group, rows in beginnings)
    found = read(((group, np.flatnonzero(kept)) for group, _, kept in ahead), metrics=wanted)
    return (
        (group, _ranked(group, rows, rule, (first, kept, early)))
        for (group, first, kept), (_, rows) in zip(here, found, strict=True)
    )


def _early_rule(rule: Rule, prefix: int | None, prefix_rule: str | Rule | None) -> Rule | None:
    """What keeps candidates by their first tokens; None where all are read whole."""
    if prefix is None:
        if prefix_rule is not None:
            raise ConfigError("A prefix_rule needs a prefix, the number of first tokens it looks at.")
        return None
    check_prefix(prefix)
    chosen = rule if prefix_rule is None else prefix_rule
    return (Rule.parse(chosen) if isinstance(chosen, str) else chosen).of_prefix


def _read(
    lens: "PHiModel", tokenizer: Any, chosen: "Iterable[tuple[Candidates, Iterable[int]]]", **options: Any
) -> Iterator[tuple[Candidates, list[Row]]]:
    """The rows of the candidates chosen of each prompt, read a few batches ahead."""
    waiting: deque[tuple[Candidates, int]] = deque()

    def replies() -> Iterator[tuple[Text, str, str]]:
        for group, numbers in chosen:
            _check_candidates(group.texts, f"Prompt {group.id}")
            numbers = list(numbers)
            waiting.append((group, len(numbers)))
            for number in numbers:
                yield group.prompt, group.texts[number], f"candidate {number} of prompt {group.id}"

    pairs, names = tee(replies())
    rows = iter_replies(
        lens,
        tokenizer,
        ((prompt, text) for prompt, text, _ in pairs),
        (name for *_, name in names),
        **options,
    )

    def found() -> Iterator[tuple[Candidates, list[Row]]]:
        for first in rows:
            group, count = waiting.popleft()
            own = [first, *islice(rows, count - 1)]
            for number, row in enumerate(own):
                if not row["tokens"]:
                    raise InputError(f"Candidate {number} of prompt {group.id} has no token; leave it out.")
            yield group, own

    return found()


def _ranked(
    group: Candidates,
    rows: Sequence[Row],
    rule: Rule,
    early: tuple[Sequence[Row], NDArray[np.bool_], Rule] | None = None,
) -> "pd.DataFrame":
    """The table of a prompt.

    Args:
        rows: of the candidates that were read whole.
        early: rows of the first tokens of all, which were kept, and by which rule.
    """
    import pandas as pd

    table = pd.DataFrame(rows)
    scores = pd.Series(rule.scores(table))
    ranks = scores.rank(method="min", ascending=False)
    if early is not None:
        first, kept, early_rule = pd.DataFrame(early[0]), early[1], early[2]
        places = np.flatnonzero(kept)
        late = pd.Series(early_rule.scores(first)).where(~kept).rank(method="min", ascending=False)
        table, scores, ranks = (one.set_axis(places).reindex(first.index) for one in (table, scores, ranks))
        ranks = ranks.fillna(late + len(places))
        table = first.join(table.drop(columns="tokens"))
        table.insert(0, "kept", kept)
    table.insert(0, "prompt", group.id)
    table.insert(1, "candidate", range(len(table)))
    table.insert(2, "rank", ranks.astype(int))
    table.insert(3, "score", scores)
    table["text"] = list(group.texts)
    return table.sort_values("rank", kind="stable", ignore_index=True)


def _tokens(table: "pd.DataFrame") -> tuple[int, int]:
    """How many tokens candidates have, and how many of these follow the prefix of one that was not kept, so
    that they need not have been written."""
    kept, tokens, first = (table[name].to_numpy() for name in ("kept", "tokens", "tokens_prefix"))
    return int(tokens.sum()), int((tokens - first)[~kept].sum())


def _saved(counts: Iterable[tuple[int, int]]) -> float:
    """The share of tokens that need not have been written, by what `_tokens` counted."""
    every, unwritten = map(sum, zip(*counts, strict=True))
    return unwritten / every


def _check_candidates(texts: Any, where: str) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"{where} has {type(texts).__name__} for candidates; give a list of strings.")
    if len(texts) < 2:
        count = "one candidate" if texts else "no candidate"
        raise InputError(f"{where} has {count}; choosing takes at least two.")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            what = "empty" if text == "" else f"of type {type(text).__name__}, not a string"
            raise InputError(f"{where}: candidate {number} is {what}; correct it or leave it out.")


class CandidatesFile:
    """Prompts with their candidates from a file of JSON Lines, in the order in which prompts come first.

    A line is a prompt with all its candidates, `{"prompt": ..., "candidates": [...]}` or a preference of
    TRL (`chosen`, `rejected`); or it is one candidate, `{"prompt": ..., "response": ...}`, wherever the
    others of the same prompt are, as in what `philens solve` writes. A prompt is text or a chat; a `problem`
    or `question` is a user's message. Prompts are called by their `prompt_id` or `problem_id` (or `id`, in a
    line with all candidates), else by number from 0.

    Opening reads the file once to check every line; all that is kept is where lines are. Empty solutions of
    `philens solve` are left out.

    Raises:
        InputError: no such file, or nothing in it; a line that is something else; a prompt with fewer than
            two candidates, or with an empty one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"There is no file {path}; check the path.")
        # Of each prompt, the bytes at which its lines start.
        self._places: dict[bytes | int, list[int]] = {}
        alone: dict[bytes | int, int] = {}
        place, silent = 0, 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    group, whole = _read_line(line, where)
                    key = number if whole else hashlib.sha256(json.dumps(group.prompt).encode()).digest()
                    if whole:
                        _check_candidates(group.texts, where)
                    elif not group.texts:
                        silent += 1
                    elif key not in self._places:
                        alone[key] = number
                    else:
                        alone.pop(key, None)
                    if group.texts:
                        self._places.setdefault(key, []).append(place)
                place += len(line)
        if silent:
            logger.warning("Empty solutions in %s left out: %d.", path, silent)
        if not self._places:
            raise InputError(f"{path} has no candidates; give a file of JSON Lines.")
        if alone:
            number = min(alone.values())
            raise InputError(
                f"{path} line {number} has the only candidate of its prompt; choosing takes at least two."
            )

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Candidates]:
        with self.path.open("rb") as file:
            for number, places in enumerate(self._places.values()):
                groups = []
                for place in places:
                    file.seek(place)
                    groups.append(_read_line(file.readline(), f"{self.path} byte {place}")[0])
                name = number if groups[0].id == "" else groups[0].id
                yield Candidates(name, groups[0].prompt, [text for group in groups for text in group.texts])


def _read_line(line: bytes, where: str) -> tuple[Candidates, bool]:
    """What a line holds, its id empty if it has none, and whether that is all candidates of the prompt."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({reason(error)}); correct or remove it.") from error
    fields = record if isinstance(record, dict) else {}
    field = next((name for name in PROMPT_FIELDS if name in fields), None)
    single = next((name for name in CANDIDATE_FIELDS if name in fields), None)
    if field is None:
        raise InputError(f"{where} has no candidates of a prompt: {_MUST}.")
    if "candidates" in fields:
        texts, whole = fields["candidates"], True
    elif all(name in fields for name in PAIR_FIELDS):
        texts, whole = [_reply(fields[name]) for name in PAIR_FIELDS], True
    elif single is not None:
        texts, whole = [_reply(fields[single])], False
        if single == "solution" and texts == [""]:  # a model that was asked may say nothing
            texts = []
        # One alone: checked as a list would be.
        _check_candidates([*texts, "another", "one more"], where)
    else:
        raise InputError(f"{where} has a {field} and no candidate: {_MUST}.")
    prompt = fields[field]
    if isinstance(prompt, str) and field != "prompt":
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        check_chat(prompt, where)
    names = ("prompt_id", "problem_id", *(["id"] if whole else []))
    name = next((fields[name] for name in names if isinstance(fields.get(name), str | int)), "")
    return Candidates(name, prompt, texts), whole


def _reply(value: Any) -> Any:
    """A reply that is a chat of one message, as TRL has it, as its text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return content_text(value[0])
    return value


def rank_file(
    path: str | Path,
    load: "Callable[[], tuple[PHiModel, Any]]",
    form: Form = "terminal",
    output: Path | None = None,
    *,
    rule: str | Rule = "highest_phi",
    prefix: int | None = None,
    prefix_rule: str | Rule | None = None,
    **options: Any,
) -> Ranked:
    """Rank the candidates of a file, and show or write the rows of `rank`.

    Args:
        path: as `CandidatesFile` reads it. What is held of it at once is a few batches.
        load: gives the lens and its tokenizer; called once the file is known to be right.
        form: a `terminal`'s tables, or rows as `jsonl` or `csv`.
        output: file for the rows; None means standard output.
        rule: as for `rank`, like all that follows and other options.

    Returns:
        What was ranked.

    Raises:
        ConfigError: form and output do not fit, or what `rank` raises.
        InputError: what `CandidatesFile` and `rank` raise.
        OutputError: the file cannot be written.
    """
    from rich.console import Console

    if form == "terminal" and output is not None:
        raise ConfigError("--format terminal goes to the terminal; with --output give --format jsonl or csv.")
    if output is not None and same_file(path, output):
        raise ConfigError(f"{output} is an input, which would be replaced; choose another --output.")
    rule = Rule.parse(rule) if isinstance(rule, str) else rule
    _early_rule(rule, prefix, prefix_rule)
    groups = CandidatesFile(path)
    lens, tokenizer = load()
    options |= {"rule": rule, "prefix": prefix, "prefix_rule": prefix_rule}
    counts: list[tuple[int, int]] = []

    def counted() -> "Iterator[tuple[Candidates, pd.DataFrame]]":
        for group, table in iter_ranked(lens, tokenizer, groups, **options):
            counts.extend([_tokens(table)] if prefix is not None else [])
            yield group, table

    ranked = counted()
    if form == "terminal":
        from philens.reasoning.tables import ranking_table

        console = Console()
        for group, table in ranked:
            console.print(ranking_table(table, group.prompt, rule.name), "")
        return Ranked(len(groups), _saved(counts) if counts else None)

    def lines() -> Iterator[str]:
        for number, (_, table) in enumerate(shown(ranked, "ranking", len(groups))):
            if form == "jsonl":
                yield str(table.to_json(orient="records", lines=True, force_ascii=False, double_precision=15))
            else:
                yield str(table.to_csv(index=False, header=number == 0))

    if output is None:
        utf8_output().writelines(lines())
    else:
        write_atomically(output, lambda file: file.writelines(line.encode() for line in lines()))
    return Ranked(len(groups), _saved(counts) if counts else None)
