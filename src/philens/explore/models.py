"""Models to explore: their insertion points, and work on them that can be followed and stopped."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from philens.bases import hub
from philens.lens.config import MetricOptions
from philens.lens.insertion import find_blocks
from philens.lens.metrics import METRICS
from philens.lens.model import PHiModel, load
from philens.scoring.score import score
from philens.scoring.scores import TokenScores
from philens.scoring.texts import tokenize_all
from philens.scoring.windows import context_length, find_windows
from philens.support.errors import AdapterError, ConfigError, InputError, InsertionError
from philens.tasks.chat import prompt_tokens
from philens.tasks.rendering import AS_IS, Rendering
from philens.training.folder import RunFolder, adapters_in
from philens.training.opening import SHIPPED as SMALL
from philens.training.opening import open_lens
from philens.training.source import ModelSource

logger = logging.getLogger(__name__)

MOST_WRITTEN = 1_000
_ERROR = "phi_standard_error"  # comes with phi


class Stopped(Exception):
    """The reader does not want it any more."""


class Job:
    """Something that a model does in a thread of its own."""

    def __init__(self) -> None:
        self.done, self.total = 0, 0  # blocks that have run, and that will
        self.text = ""  # what has been written so far
        self._stop = threading.Event()

    @property
    def share(self) -> float | None:
        """How much is done, 0 to 1; None before the model is at work."""
        return min(1.0, self.done / self.total) if self.total else None

    def stop(self) -> None:
        """Let it end at the next block."""
        self._stop.set()

    def check(self) -> None:
        """Raise `Stopped` if it is to end."""
        if self._stop.is_set():
            raise Stopped

    def step(self, *_: Any) -> None:
        """A block begins."""
        self.check()
        self.done += 1


@dataclass(frozen=True)
class Point:
    """An insertion point: a lens, and of a lens with several layers the module path of one."""

    lens: PHiModel
    path: str | None


class Explored:
    """A base model with PHi layers at one or several insertion points, for many readers.

    One reader is served at a time, and one lens is in the base at a time.

    Attributes:
        name: name of the model.
        tokenizer: its tokenizer.
        points: insertion points by label, in order.
        first_metrics: read at once, as they come from one pass: phi, a surprisal, and more. The others are
            read when they are asked for.
        context: tokens read at once; None means whole texts.

    Args:
        lenses: lenses by label, in one base.
        together: whether the base was trained with the layer in the path, without which it is no model.
    """

    def __init__(
        self, name: str, tokenizer: Any, lenses: Mapping[str, PHiModel], together: bool = False
    ) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.first_metrics = ["phi", "surprisal", "entropy", "margin"]
        if together:
            self.first_metrics = ["phi", "surprisal_with_layer"]
        self.points = {
            f"{own} (after {path})": Point(lens, point)
            for own, lens in lenses.items()
            for path, point in zip(lens.module_paths, lens.column_points, strict=False)
        }
        self.base = next(iter(lenses.values())).base
        self.context = context_length(self.base)
        self._lacking: dict[PHiModel, dict[str, str]] = {}
        for lens in lenses.values():
            lens.enable()
            reasons = lens.supports()
            self._lacking[lens] = {name: reason for name, reason in reasons.items() if reason is not None}
            lens.disable()
        self._lock = threading.Lock()
        try:
            self._blocks: Sequence[nn.Module] = list(find_blocks(self.base)[1])
        except InsertionError:
            self._blocks = [self.base]

    @classmethod
    def open(
        cls,
        source: ModelSource,
        adapters: Sequence[str] = (),
        name: str | None = None,
        rendering: Rendering = AS_IS,
        options: MetricOptions | None = None,
    ) -> "Explored":
        """Load a base and layers for it.

        Args:
            source: source of the base, or a run folder.
            adapters: folders or Hub ids, or folders that hold several, such as a sweep's; by default those
                in the run folder.
            name: what readers see.
            rendering: how texts are put.
            options: what metrics leave open.

        Raises:
            PhilensError: something is missing, damaged, or does not belong together.
        """
        found = [one for given in adapters for one in (adapters_in(given) or [given])]
        found = found or adapters_in(source.model)
        named = replace(source, adapter=found[0] if found else None)
        first, tokenizer = open_lens(named, rendering, options)
        first.need_layers("philens explore")
        lenses = {Path(found[0] if found else source.model).name: first}
        for one in found[1:]:
            next(reversed(lenses.values())).disable()
            label = Path(one).name
            lens = load(first.base, one).to(next(first.attached.parameters()).device)
            lens.need_layers("philens explore")
            lens.metric_options = first.metric_options
            lenses[label if label not in lenses else one] = lens
        return cls(name or Path(source.model).name, tokenizer, lenses, _trained_together(source.model))

    def metrics(self, point: str) -> list[str]:
        """The columns that can be read there, in their order."""
        lacking, samples = self.lacking(point), self._at(point).lens.config.samples
        first, *others = METRICS
        names = [first, *([_ERROR] if samples > 1 else []), *others]
        return [name for name in names if name not in lacking]

    def lacking(self, point: str) -> dict[str, str]:
        """The metrics that cannot be read there, and why."""
        return self._lacking[self._at(point).lens]

    def _at(self, point: str) -> Point:
        if point not in self.points:
            raise ConfigError(
                f"{self.name} has no insertion point {point!r}; choose {' or '.join(self.points)}."
            )
        return self.points[point]

    def read(
        self, texts: Mapping[str, str], point: str, metrics: Sequence[str], job: Job
    ) -> list[TokenScores]:
        """Score texts at an insertion point; their columns are those of that point alone.

        Args:
            texts: texts by name.
            point: one of `points`.
            metrics: names of columns.

        Raises:
            InputError: a text with nothing to read in it.
            Stopped: the job was stopped.
        """
        at = self._at(point)
        tokens = tokenize_all(self.tokenizer, list(texts.values()), list(texts))
        windows = [find_windows(len(one.token_ids), self.context, one.leading) for one in tokens]
        with self._at_work(at.lens, job, sum(map(len, windows))):
            # A window at a time, which can be followed and stopped; scores do not depend on it.
            found = score(
                at.lens,
                self.tokenizer,
                list(texts.values()),
                metrics=[name for name in metrics if name != _ERROR],
                batch_tokens=1,
                names=list(texts),
                alternatives=True,
            )
        return [_of_point(one, at, point) for one in found]

    def unknown(self, scores: TokenScores) -> list[str]:
        """Pieces of a text that the tokenizer does not know, each once."""
        unknown = self.tokenizer.unk_token_id
        pieces = zip(scores.token_ids.tolist(), scores.offsets.tolist(), strict=True)
        found = (scores.text[start:end] for token, (start, end) in pieces if token == unknown)
        return list(dict.fromkeys(piece for piece in found if piece != self.tokenizer.unk_token))

    def write(
        self, prompt: str, point: str, count: int, job: Job, sample: bool = False, temperature: float = 1.0
    ) -> str:
        """Go on writing after a prompt; `job.text` grows meanwhile.

        Args:
            prompt: may be empty if the tokenizer begins texts with a token.
            point: the lens that is in the path, if it is one that is.
            count: most tokens to write.
            sample: draw tokens, instead of taking the likeliest.
            temperature: temperature of drawing.

        Returns:
            The prompt and what was written.

        Raises:
            InputError: an empty prompt, one that leaves no room, or a count or temperature out of range.
            Stopped: the job was stopped.
        """
        at = self._at(point)
        prompt_ids = prompt_tokens(self.tokenizer, prompt)
        length = len(prompt_ids)
        if not length:
            raise InputError("There is nothing to go on from; write at least one character.")
        if not 1 <= count <= MOST_WRITTEN:
            raise InputError(
                f"The model writes 1 to {MOST_WRITTEN:,} tokens at a time, not {count:,}; give another."
            )
        if self.context is not None and length + count > self.context:
            raise InputError(
                f"The text has {length:,} tokens and the model reads {self.context:,} at once, which leaves "
                f"no room for {count:,} more; shorten the text or ask for fewer."
            )
        if sample and not temperature > 0:
            raise InputError(f"The temperature must be above 0, not {temperature:g}.")
        device = next(at.lens.parameters()).device
        options: dict[str, Any] = {"do_sample": sample, "max_new_tokens": count}
        if sample:
            options["temperature"] = temperature
        with self._at_work(at.lens, job, count + 1):
            job.text = prompt
            at.lens.generate(
                torch.tensor([prompt_ids], device=device),
                streamer=_Writing(self.tokenizer, prompt, job),
                **options,
            )
        return job.text

    @contextlib.contextmanager
    def _at_work(self, lens: PHiModel, job: Job, passes: int) -> Iterator[None]:
        """Wait for the model; put the lens in; follow the job block by block through so many passes."""
        while not self._lock.acquire(timeout=0.1):
            job.check()
        with contextlib.ExitStack() as stack:
            stack.callback(self._lock.release)
            stack.callback(lens.disable)
            lens.enable()
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(job.step).remove)
            job.total = passes * len(self._blocks)
            yield


class _Writing(BaseStreamer):
    """Hands on to a job the text of tokens as they come; special tokens have none."""

    def __init__(self, tokenizer: Any, prompt: str, job: Job) -> None:
        self.tokenizer, self.prompt, self.job = tokenizer, prompt, job
        self.ids: list[int] = []
        self.start: str | None = None

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self.start is None:  # the prompt comes first
            self.start = text
        # A token may end within a character.
        self.job.text = self.prompt + text[len(self.start or "") :].rstrip("\N{REPLACEMENT CHARACTER}")

    def end(self) -> None:
        pass


def open_all(
    source: ModelSource | None,
    adapters: Sequence[str] = (),
    rendering: Rendering = AS_IS,
    options: MetricOptions | None = None,
) -> dict[str, Explored]:
    """The models to choose from, by name: the one asked for, or those that come with philens; of these the
    formal-language model alone, and a warning, where the other's base is not available.

    Raises:
        PhilensError: as `Explored.open`; adapters without a model.
    """
    if source is not None:
        opened = Explored.open(source, adapters, rendering=rendering, options=options)
        return {opened.name: opened}
    if adapters:
        raise ConfigError("An adapter belongs to a base model; give --model too.")
    shipped = dict(SHIPPED)
    try:
        if not hub.is_folder(shipped[TEXT]):
            hub.fetch_named(shipped[TEXT])
    except (AdapterError, ConfigError) as error:
        logger.warning("Only formal languages can be read: %s", error)
        del shipped[TEXT]
    return {
        name: Explored.open(ModelSource(model), name=name, rendering=rendering, options=options)
        for name, model in shipped.items()
    }


TEXT, FORMAL = "SmolLM2 135M", "formal-language model"
SHIPPED = {TEXT: "smollm2", FORMAL: str(SMALL)}
"""The models with layers that come with philens, by the names that readers see."""


def _trained_together(model: str) -> bool:
    """Whether a run folder's base was trained with the layer in it."""
    run = RunFolder(model)
    if not run.exists:
        return False
    recipe = run.recipe()
    return recipe.phi is not None and recipe.phi.mode == "bottleneck" and recipe.keeps_base


def _of_point(scores: TokenScores, point: Point, label: str) -> TokenScores:
    """Scores without the columns of other layers, and with the label of the point in their provenance."""
    return replace(scores.at_point(point.path), provenance=scores.provenance | {"insertion_point": label})
