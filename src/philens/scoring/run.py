"""A corpus scored: shown in the terminal, written into a folder of shards, or onto a page."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from philens.scoring.corpus import Corpus, Document
from philens.scoring.shards import Done, Schedule, chunks, json_line, write_shards
from philens.support.errors import ConfigError, InputError
from philens.support.files import same_file
from philens.support.output import utf8_output
from philens.support.processes import ALONE, Rank
from philens.support.progress import working

if TYPE_CHECKING:
    from philens.lens.model import PHiModel
    from philens.lens.overflow import Overflow
    from philens.scoring.parts import Steps
    from philens.scoring.scores import TokenScores

Form = Literal["terminal", "table", "jsonl", "parquet", "html"]
# What is batched by length at once; the same everywhere, so that every form gives the same scores.
SHARD_CHARACTERS = 1_000_000


@dataclass
class Summary:
    """What was scored.

    Attributes:
        documents: documents with any text in them, and their `tokens`.
        skipped: empty ones.
        new: False if all scores were there already, or another process wrote the last of them.
        finished: False if other processes are to score the rest.
        overflowed: tokens without a value because the model overflowed.
    """

    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    new: bool = True
    finished: bool = True
    overflowed: int = 0

    def __str__(self) -> str:
        documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
        empty = f", {self.skipped:,} empty left out" if self.skipped else ""
        lost = f", {self.overflowed:,} of them NaN as the model overflowed" if self.overflowed else ""
        return f"{documents} with {self.tokens:,} tokens{lost}{empty}"


@dataclass
class Scorer:
    """Documents in, their scores out, by a lens that is loaded when there is something to score.

    Attributes:
        load: gives the lens and its tokenizer.
        metrics: as for `philens.score`, like `batch_tokens`, `window` and all that follows.
    """

    load: "Callable[[], tuple[PHiModel, Any]]"
    metrics: Sequence[str] | None = None
    batch_tokens: int = 4096
    window: int | None = None
    overflow: "Overflow" = "error"
    alternatives: bool = False
    steps: "Steps | None" = None
    _loaded: "tuple[PHiModel, Any] | None" = None

    def __call__(self, group: Sequence[Document]) -> "Iterator[TokenScores]":
        from philens.scoring.score import iter_scores

        self._loaded = self._loaded or self.load()
        return iter_scores(
            *self._loaded,
            [document.content for document in group],
            metrics=self.metrics,
            batch_tokens=self.batch_tokens,
            window=self.window,
            names=[document.id for document in group],
            overflow=self.overflow,
            alternatives=self.alternatives,
            steps=self.steps,
        )

    def record(self) -> dict[str, Any]:
        """What decides the scores but for the model, as JSON; what came later only where it is chosen."""
        chosen = {"overflow": self.overflow, "alternatives": self.alternatives, "steps": self.steps}
        return {
            "metrics": None if self.metrics is None else sorted(self.metrics),
            "batch_tokens": self.batch_tokens,
            "window": self.window,
            **{name: value for name, value in chosen.items() if value not in ("error", False, None)},
        }


def score_corpus(
    corpus: Corpus,
    score: Scorer,
    form: Form,
    output: Path | None,
    *,
    shard_characters: int = SHARD_CHARACTERS,
    options: dict[str, Any] | None = None,
    rank: Rank = ALONE,
    schedule: Schedule | None = None,
) -> Summary:
    """Score a corpus and show or write it.

    Args:
        form: `terminal` (in colours, else a `table`), `table`, `jsonl`, `parquet` or `html`.
        output: folder of `jsonl` or `parquet` shards, or the page; else None: standard output.
        shard_characters: characters in a shard, about; it also bounds which texts are batched together.
        options: what else decides the rows of shards; `philens.scoring.shards` says more.
        rank: which of several processes this is, that write a folder together.
        schedule: who scores its shards; by default this process.

    Raises:
        PhilensError: what `philens.score`, the corpus or the shards raise.
    """
    _check_output(form, output)
    if output is not None and any(same_file(name, output) for name in corpus.inputs):
        raise ConfigError(f"{output} is an input, which would be replaced; choose another --output.")
    if rank.of > 1 or schedule is not None:
        _check_shared(corpus, form, output)
    if shard_characters < 1:
        raise ConfigError(f"shard_characters must be at least 1, not {shard_characters}.")
    if score.alternatives and form == "terminal":
        raise ConfigError(
            "--alternatives has no place among coloured tokens; give --format table, html, jsonl or parquet."
        )
    shown = rank.number == 0 and (output is not None or not sys.stdout.isatty())
    with _progress(corpus, shown) as done:
        if output is not None and form in ("jsonl", "parquet"):
            read = ("inputs", "field", "by", "split", "limit")
            decisive = {name: getattr(corpus, name) for name in read} | score.record() | (options or {})
            state, new = write_shards(
                output, corpus, score, decisive, form, shard_characters, done, schedule, rank
            )
            return Summary(
                state.documents, state.tokens, corpus.skipped, new, state.finished, state.overflowed
            )
        summary = Summary()

        def scored() -> "Iterator[tuple[Document, TokenScores]]":
            for group in chunks(corpus, shard_characters):
                for document, scores in zip(group, score(group), strict=True):
                    summary.documents += 1
                    summary.tokens += len(scores)
                    summary.overflowed += scores.provenance.get("overflowed", 0)
                    done(1, len(scores), document.end)
                    yield document, scores

        _show(scored(), form, output)
        summary.skipped = corpus.skipped
    if not summary.documents:
        raise InputError("There is nothing to score: the input has no text; give a file with text.")
    return summary


def _check_output(form: str, output: Path | None) -> None:
    if form in ("terminal", "table") and output is not None:
        raise ConfigError(
            f"--format {form} goes to the terminal; with --output give --format jsonl, parquet or html."
        )
    if form in ("parquet", "html") and output is None:
        what = "FOLDER" if form == "parquet" else "PAGE.html"
        raise ConfigError(f"--format {form} needs a place to write to; give --output {what}.")
    if form in ("jsonl", "parquet") and output is not None and output.suffix == f".{form}":
        raise ConfigError(
            f"--format {form} writes a folder, and {output} is named like a file; name a folder."
        )
    if form == "html" and output is not None and output.is_dir():
        raise ConfigError(f"--format html writes a file, and {output} is a folder; name a file in it.")
    if form == "html" and output is not None and not output.parent.is_dir():
        raise ConfigError(
            f"There is no folder {output.parent} for the page; make it or choose another --output."
        )


def _check_shared(corpus: Corpus, form: str, output: Path | None) -> None:
    if form not in ("jsonl", "parquet") or output is None:
        raise ConfigError(
            "Several processes write a folder together; give --format jsonl or parquet and --output FOLDER."
        )
    if (name := corpus.once) is not None:
        raise ConfigError(
            f"{name} can be read only once, and each of several processes reads the input; "
            "write it to a file first, or score it in one process."
        )


def _show(scored: "Iterator[tuple[Document, TokenScores]]", form: str, output: Path | None) -> None:
    """Everything but shards."""
    from rich.console import Console

    from philens.show import tokens
    from philens.show.page import MAX_DOCUMENTS, MAX_TOKENS, write_scores_page

    if form == "jsonl":
        file = utf8_output()
        for document, scores in scored:
            file.write(json_line(document, scores) + "\n")
    elif form == "html" and output is not None:
        # One more than the page shows, so that it can say that there is more.
        pages, count = [], 0
        for _, scores in scored:
            pages.append(scores)
            count += len(scores)
            if count > MAX_TOKENS or len(pages) > MAX_DOCUMENTS:
                break
        write_scores_page(output, pages)
    else:
        named = ((document.id, scores) for document, scores in scored)
        console = Console()
        if form == "terminal" and tokens.has_colour(console):
            tokens.print_coloured(console, named)
        else:
            tokens.print_rows(sys.stdout, named)


@contextmanager
def _progress(corpus: Corpus, shown: bool) -> Iterator[Done]:
    """A bar on standard error, if that is a terminal; gives what is to be called as it goes on."""
    documents = tokens = read = 0
    with working("reading", corpus.size, shown) as told:

        def done(more_documents: int, more_tokens: int, end: int) -> None:
            nonlocal documents, tokens, read
            documents, tokens, read = documents + more_documents, tokens + more_tokens, max(read, end)
            told(read, f"{documents:,} documents, {tokens:,} tokens")

        yield done
