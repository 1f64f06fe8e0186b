"""What one tab of a browser is doing: a job at a time, and what it read last."""

import io
import json
import logging
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock, RLock
from typing import Any, TypeVar

import numpy as np

from philens.explore import view
from philens.explore.link import Shown
from philens.explore.models import Explored, Job, Stopped
from philens.explore.record import Record
from philens.explore.view import Look
from philens.scoring.scores import TokenScores
from philens.show.colours import plain_label
from philens.show.page import write_scores_page
from philens.support.errors import InputError, OutputError, PhilensError
from philens.support.output import visible

logger = logging.getLogger(__name__)

NAMES = ("Text A", "Text B")
# Files to keep, by address; figures are numbered by text.
EXPORTS = {"page.html": "text/html", "scores.csv": "text/csv", "figure-0.png": "image/png"}
EXPORTS["figure-1.png"] = "image/png"
# Seconds between looks at a job.
_INTERVAL = 0.15
_pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="explore")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Update:
    """What changes on the page; None leaves as it is."""

    status: str | None = None  # markup of the line that says what is going on
    result: str | None = None  # markup of what was read
    texts: tuple[str | None, str | None] = (None, None)  # where one is being written or was put there
    busy: bool = False  # whether a job is running
    metrics: tuple[str, ...] = ()  # columns shown with a result


@dataclass
class Session:
    """One tab."""

    most: int  # characters that a text may have
    record: Record | None = None  # where views are kept, if they are
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # secret, in addresses of exports
    look: Look = field(default_factory=Look)  # how `scores` were shown last
    scores: list[TokenScores] = field(default_factory=list)  # of the texts read last
    _read: "tuple[Explored, str, dict[str, str]] | None" = None  # where and what was read last
    _job: Job | None = None
    _reading: dict[str, str] | None = None  # what the job reads
    _when: float = 0.0  # when the page asked for the job
    _marked: float = 0.0  # when it asked for the span marked last
    _lock: RLock = field(default_factory=RLock)
    _turn: Lock = field(default_factory=Lock)  # held by the job that the page hears

    def stop(self) -> bool:
        """Stop the job, if there is one."""
        with self._lock:
            running, self._job, self._reading = self._job, None, None
        if running is not None:
            running.stop()
        return running is not None

    def read(
        self,
        model: Explored,
        point: str,
        texts: Mapping[str, str] | None,
        look: Look,
        about: str = "",
        when: float = 0.0,
    ) -> Iterator[Update]:
        """Read texts, as far as they were not read yet, and show them.

        Args:
            point: one of the model's.
            texts: texts by name; None means those being read, else those read last.
            look: how they are shown.
            about: a sentence about them.
            when: time at which the page asked, on its own clock; what it asked for later has precedence.
        """
        if texts is None:
            texts = self._reading or (self._read[2] if self._read else None)
        if texts is not None:
            chosen = dict(texts)
            work = partial(self._scored, model=model, point=point, texts=chosen, look=look, about=about)
            yield from self._answer(work, when, chosen)

    def write(
        self, model: Explored, point: str, prompt: str, look: Look, when: float = 0.0, **options: Any
    ) -> Iterator[Update]:
        """Go on writing after a prompt, then read it all; options are those of `Explored.write`."""

        def work(job: Job) -> Iterator[Update]:
            self._check(NAMES[0], prompt)
            yield from self._written(job, model, point, {NAMES[0]: prompt}, look, options)

        yield from self._answer(work, when)

    def branch(
        self,
        model: Explored,
        point: str,
        number: int,
        token: int,
        alternative: int | None,
        look: Look,
        when: float = 0.0,
        **options: Any,
    ) -> Iterator[Update]:
        """Change a text at a token, and read what becomes of it as the second text beside it.

        Args:
            number: number of the text, which becomes the first.
            token: number of a token in the text, counted from 0.
            alternative: which of its alternatives to put there, before the rest of the text; None lets the
                model write on after the token, with options of `Explored.write`.
        """

        def work(job: Job) -> Iterator[Update]:
            if not (0 <= number < len(self.scores) and 0 <= token < len(self.scores[number])):
                raise InputError("There is no such token; read a text first.")
            scores = self.scores[number]
            start, kept = "".join(scores.pieces()[:token]), "".join(scores.pieces()[: token + 1])
            texts = {NAMES[0]: scores.text, NAMES[1]: kept}
            if alternative is None:
                yield Update(texts=(scores.text, kept), busy=True)
                yield from self._written(job, model, point, texts, look, options)
                return
            others = scores.alternatives[token] if scores.alternatives is not None else []
            if not 0 <= alternative < len(others):
                raise InputError("There is no such alternative; read the text again.")
            chosen = others[alternative]
            if not chosen.text or "\N{REPLACEMENT CHARACTER}" in chosen.text:
                raise InputError(
                    "This token is no text by itself, but a part of a character; choose another."
                )
            texts[NAMES[1]] = start + chosen.text + scores.text[len(kept) :]
            yield Update(texts=(scores.text, texts[NAMES[1]]), busy=True)
            self._reading = texts
            quoted = (f"“{visible(piece)}”" for piece in (chosen.text, kept[len(start) :]))
            about = f"{' in place of '.join(quoted)} at token {token}."
            yield from self._scored(job, model, point, texts, look, about)
            # Tokens are made of the whole text anew.
            at = int(np.argmax(self.scores[1].offsets[:, 1] > len(start)))
            if self.scores[1].token_ids[at] != chosen.token_id:
                cut = " ".join(f"“{visible(piece)}”" for piece in self.scores[1].pieces()[at : at + 2])
                said = [about, f"The tokenizer cuts the text otherwise here: {cut} …"]
                yield Update(view.status(" ".join([*said, *self._summary(model, self.scores)])))

        yield from self._answer(work, when)

    def _written(
        self,
        job: Job,
        model: Explored,
        point: str,
        texts: dict[str, str],
        look: Look,
        options: Mapping[str, Any],
    ) -> Iterator[Update]:
        """Go on writing after the last of one or two texts, then read them."""
        what, name, others = "The model is writing", list(texts)[-1], (None,) * (len(texts) - 1)
        prompt = texts[name]
        work = partial(model.write, prompt, point, job=job, **options)
        for update in self._followed(job, what, work):
            yield replace(update, texts=(*others, job.text or None, None)[:2])
        text = job.text
        first, second, *_ = (*others, text, None)
        yield Update(view.status(f"{what} …", 1.0, "working"), texts=(first, second), busy=True)
        self._reading = texts | {name: text}
        yield from self._scored(job, model, point, self._reading, look)

    def _answer(
        self, work: Callable[[Job], Iterator[Update]], when: float, reading: dict[str, str] | None = None
    ) -> Iterator[Update]:
        """Do one thing, in the place of what is still being done."""
        job = Job()
        with self._lock:
            if when < self._when:  # Gradio lets what is asked for in quick succession overtake
                return
            self.stop()
            self._job, self._reading, self._when = job, reading, when
        # Gradio may bring the last word of one answer to the page after the first of the next; so an answer
        # waits for the end of the one before.
        while not (turn := self._turn.acquire(timeout=_INTERVAL)) and self._job is job:
            pass
        try:
            yield from self._told(job, work)
        finally:
            job.stop()  # also where the reader has left
            if self._job is job:
                self._reading = None
            if turn:
                self._turn.release()

    def _told(self, job: Job, work: Callable[[Job], Iterator[Update]]) -> Iterator[Update]:
        """What is done for a job; whatever happens ends in a sentence, but where another took its place."""
        kind = "error"
        try:
            job.check()
            yield Update(busy=True)
            for update in work(job):
                job.check()
                yield update
            return
        except Stopped:
            problem, kind = "Cancelled.", "note"
        except PhilensError as error:
            problem = " ".join(str(error).split())
        except Exception as error:  # a model can raise anything; the page must go on
            logger.exception("The page could not do what was asked.")
            problem = f"This did not work ({type(error).__name__}); the terminal says more."
        if self._job is job or self._job is None:
            yield Update(view.status(problem, kind=kind))

    def _scored(
        self, job: Job, model: Explored, point: str, texts: dict[str, str], look: Look, about: str = ""
    ) -> Iterator[Update]:
        for name, text in texts.items():
            self._check(name, text)
        wanted = set(look.metrics)
        same = self._read == (model, point, texts)
        have = {metric for one in self.scores[:1] for metric in one.columns} if same else set()
        scores = self.scores
        if not same or wanted - have:
            metrics = [
                name for name in model.metrics(point) if name in {*(have or model.first_metrics), *wanted}
            ]
            known = self._known(model, point, texts, metrics)
            new = {name: text for name, text in texts.items() if name not in known}
            if new:
                read = yield from self._followed(
                    job, "The model is reading", lambda: model.read(new, point, metrics, job)
                )
                known |= dict(zip(new, read, strict=True))
            scores = [known[name] for name in texts]
        # Another model, or the same at another point, may not have a metric.
        left, right = (
            metric if metric in scores[0].columns else first
            for metric, first in zip(look.metrics, model.first_metrics, strict=False)
        )
        look = replace(look, metrics=(left, right))
        link = Shown(model.name, point, texts, look).to_fragment()
        markup = view.result(scores, look, f"export/{self.key}", link)
        job.check()  # what is kept and marked is what the page shows
        self._read, self.scores, self.look = (model, point, texts), scores, look
        why = [reason for metric, reason in model.lacking(point).items() if metric in wanted]
        said = [about, *self._summary(model, scores), *why, *self._recorded(model, scores, look)]
        yield Update(view.status(" ".join(said)), markup, metrics=look.metrics)

    def _known(
        self, model: Explored, point: str, texts: Mapping[str, str], metrics: Sequence[str]
    ) -> dict[str, TokenScores]:
        """Of these texts by name the scores of those that were read last, with these columns."""
        if self._read is None or self._read[:2] != (model, point):
            return {}
        return {
            name: one
            for name, one in zip(self._read[2], self.scores, strict=True)
            if texts.get(name) == one.text and list(one.columns) == metrics
        }

    def _recorded(self, model: Explored, scores: Sequence[TokenScores], look: Look) -> list[str]:
        """Keep a view where views are kept; what is to be said if that does not work."""
        if self.record is None:
            return []
        shown = " beside ".join(f"“{visible(one.text[:40])}…”" for one in scores)
        metrics = " and ".join(plain_label(metric) for metric in dict.fromkeys(look.metrics))
        point = scores[0].provenance["insertion_point"]
        try:
            self.record.add(f"{shown} {metrics}, {model.name}, {point}", view.result(scores, look, None))
        except OutputError as error:
            return [f"It is not in the record: {error}"]
        return []

    def _check(self, name: str, text: str) -> None:
        if not text:
            raise InputError(f"{name} is empty; paste a text, choose an example, or let the model write.")
        if len(text) > self.most:
            raise InputError(
                f"{name} has {len(text):,} characters and this page reads {self.most:,} at most; shorten it, "
                "or start philens explore with a higher --max-characters."
            )

    def _followed(self, job: Job, what: str, work: Callable[[], Answer]) -> Iterator[Update]:
        """Let a model work in a thread of its own, and say how far it is; returns what it gives."""
        future = _pool.submit(work)
        while not wait([future], _INTERVAL).done:
            share = job.share
            waiting = f"{what} …" if share is not None else "Waiting for the model …"
            yield Update(view.status(waiting, share, "working"), busy=True)
        return future.result()

    def _summary(self, model: Explored, scores: list[TokenScores]) -> list[str]:
        said = [f"{one.name}: {view.tokens(len(one))} read ({model.name})." for one in scores]
        for one in scores:
            if unknown := model.unknown(one):
                shown = " ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
                said.append(
                    f"{one.name} has characters that this model does not know and reads as one "
                    f"and the same: {shown}"
                )
        return said

    def marks(self, when: float) -> bool:
        """Whether no span was marked after this time, on the page's own clock; it is then the last one."""
        with self._lock:
            newest = when >= self._marked
            self._marked = max(when, self._marked)
        return newest

    def marked(self, number: int, first: int, last: int) -> str:
        """Markup of a marked span; an error is a sentence, too."""
        try:
            if not 0 <= number < len(self.scores):
                raise InputError("There is no such text; read one first.")
            return view.marked(self.scores[number], number, first, last)
        except PhilensError as error:
            return view.status(str(error), kind="error")

    def export(self, file: str) -> bytes:
        """One of `EXPORTS`.

        Raises:
            InputError: there is nothing to export, or no such file.
        """
        metrics = list(dict.fromkeys(self.look.metrics))
        number = int(file[len("figure-")]) if file.startswith("figure-") else 0
        if file not in EXPORTS or number >= len(self.scores):
            raise InputError(f"There is no {file} to keep; read a text first.")
        if file == "page.html":
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / file
                return write_scores_page(path, self.scores, metrics).read_bytes()
        if file == "scores.csv":
            import pandas as pd

            tables = [one.to_pandas().assign(text=one.name) for one in self.scores]
            table = pd.concat(tables)
            for column in table.columns.intersection(["alternatives", "probabilities"]):
                table[column] = [json.dumps(some, ensure_ascii=False) for some in table[column]]
            return table.to_csv(index=False).encode()
        image = io.BytesIO()
        self.scores[number].plot(metrics).savefig(image, format="png")
        return image.getvalue()


class Sessions:
    """All tabs, by the hash that Gradio gives each; those left longest go first beyond `limit`."""

    def __init__(self, most: int, record: Record | None = None, limit: int = 500) -> None:
        self.most, self.record, self.limit = most, record, limit
        self._by_hash: dict[str, Session] = {}
        self._lock = Lock()

    def of(self, hash: str) -> Session:
        """A tab's session, new if it is."""
        with self._lock:
            session = self._by_hash.pop(hash, None) or Session(self.most, self.record)
            self._by_hash[hash] = session
            beyond = [*self._by_hash][: -self.limit]
        for one in beyond:
            self.end(one)
        return session

    def keyed(self, key: str) -> Session | None:
        """The session with this secret."""
        return next((one for one in [*self._by_hash.values()] if secrets.compare_digest(one.key, key)), None)

    def end(self, hash: str) -> None:
        """The tab was closed."""
        if (session := self._by_hash.pop(hash, None)) is not None:
            session.stop()

    def end_all(self) -> None:
        """The server stops."""
        for hash in [*self._by_hash]:
            self.end(hash)
