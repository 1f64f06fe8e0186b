"""What draws solutions: `transformers`, for every model and with a PHi layer in the path, or vLLM, for speed.

Both read the same token ids, draw with temperature and top-p alone, whatever else a model's own generation
settings say, and log each token's probability before temperature and top-p change it. B rows, V vocabulary.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList

from philens.bases.facts import cache_argument
from philens.bases.fingerprint import fingerprint
from philens.bases.hub import find, is_folder, reason
from philens.lens.cache import new_cache
from philens.lens.generation import unmeasured
from philens.lens.model import PHiModel
from philens.lens.overflow import Overflowed, first_row, overflow_error
from philens.reasoning.problems import PLAIN_STOP
from philens.scoring.windows import context_length
from philens.support.errors import AdapterError, ConfigError, InputError
from philens.support.extras import require
from philens.support.files import read_json
from philens.training.folder import RunFolder
from philens.training.opening import open_lens
from philens.training.source import ModelSource

logger = logging.getLogger(__name__)

# Tokens after a prompt and their natural log-probabilities; what follows the end of a reply is not cut off.
Drawn = tuple[list[int], list[float]]
# A smaller batch is not worth less: a step costs much the same.
_FEW_ROWS = 8
# Generation settings that say nothing about what is drawn.
_UNRELATED = re.compile(r"_|output_|use_cache|do_sample|transformers_version|\w+_token_id$")


class Engine(Protocol):
    """A model that goes on from prompts."""

    tokenizer: Any
    context: int | None  # tokens that it reads at most; None where there is no limit
    ends: list[int]  # ids of the tokens that end a reply
    stop: str  # a text that ends it, too; empty for none
    record: dict[str, Any]  # what the samples come from, as JSON

    def draw(self, prompts: Sequence[list[int]], limits: Sequence[int], seed: int) -> list[Drawn]:
        """Go on from each prompt until an end or, at the latest, after its limit of tokens.

        The result depends on the arguments alone, on the same machine.
        """
        ...


def load_engine(name: str, source: ModelSource, temperature: float, top_p: float) -> Engine:
    """The engine of a name, `transformers` or `vllm`; other arguments as of `TransformersEngine`.

    Raises:
        ConfigError: a PHi layer with vLLM.
        PhilensError: what the engines raise.
    """
    if name == "transformers":
        return TransformersEngine(source, temperature, top_p)
    if _has_layer(source):
        raise ConfigError(
            "vLLM runs a base model alone, and here is a PHi layer; leave out --engine, or give the base."
        )
    return VLLMEngine(source, temperature, top_p)


def _has_layer(source: ModelSource) -> bool:
    """Whether a PHi layer goes into a model: one that was named, or the one of a run folder."""
    return source.adapter is not None or RunFolder(source.model).adapter.is_dir()


class TransformersEngine:
    """Draws with `generate` of transformers, on the accelerator where there is one.

    Args:
        source: source of the base; with a PHi layer where one is named, or lies in the run folder.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draws among the likeliest tokens that together have this probability.

    Raises:
        AdapterError: model or adapter are missing, damaged or do not belong together.
        InputError: the model cannot generate.
    """

    def __init__(self, source: ModelSource, temperature: float, top_p: float) -> None:
        self.lens: PHiModel | None = None
        if _has_layer(source):
            self.lens, self.tokenizer = open_lens(source)
            self.base: Any = self.lens.base
        else:
            self.base, self.tokenizer = source.load_base()
            if torch.accelerator.is_available():
                self.base.to(torch.accelerator.current_accelerator())
        generates = isinstance(self.base, GenerationMixin)
        if not generates:
            raise InputError(
                f"{type(self.base).__name__} has no generate; use a causal model of transformers."
            )
        own: Any = self.base.generation_config
        self.context = context_length(self.base)
        self.ends = _ends(self.tokenizer, own.eos_token_id)
        self.stop = _stop(self.tokenizer)
        self._options: dict[str, Any] = {"pad_token_id": 0, "do_sample": bool(temperature)}
        if temperature:
            self._options |= {"temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
        parameter = next(p for p in self.base.parameters() if p.is_floating_point())
        self._device = parameter.device
        ignored = {name: value for name, value in own.to_diff_dict().items() if not _UNRELATED.match(name)}
        if ignored:
            settings = ", ".join(f"{name}={value}" for name, value in ignored.items())
            logger.info("The model's own generation settings are not used: %s.", settings)
        self.record = {
            "base": str(self.base.config._name_or_path or source.model),
            "revision": getattr(self.base.config, "_commit_hash", None),
            "fingerprint": fingerprint(self.base),
            "adapter": None if self.lens is None else self.lens.source,
            "adapter_fingerprint": None if self.lens is None else fingerprint(self.lens.attached),
            "layer_in_path": self.lens is not None and self.lens.config.mode != "observe",
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "ends": self.ends,
            "stop": self.stop,
            "generation_settings_not_used": ignored,
        }

    def draw(self, prompts: Sequence[list[int]], limits: Sequence[int], seed: int) -> list[Drawn]:
        """As `Engine.draw`.

        A prompt that several rows begin with is read once. Rows that have ended are left out as soon as they
        are half of the batch, so that a few long replies do not hold up all the others.

        Raises:
            InputError: not enough memory, or the model's predictions are no numbers.
        """
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        input_ids = torch.tensor(padded, device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        mask = (torch.arange(width, device=self._device) >= width - lengths[:, None]).long()
        drawn: list[Drawn] = [([], []) for _ in prompts]
        rows, done = list(range(len(prompts))), 0
        try:
            layers = nullcontext() if self.lens is None else unmeasured(self.lens)
            with torch.random.fork_rng(), _settings_aside(self.base), layers:
                argument = cache_argument(self.base)  # None for a model with a cache of its own
                cache: dict[str, Any] = {} if argument is None else {argument: new_cache(self.base)}
                if cache and width > 1:
                    self._read_once(prompts, input_ids, mask, cache)
                torch.manual_seed(seed)
                while rows:
                    steps = min(limits[row] for row in rows) - done
                    log, ending = _Log(mask), _Ending(self, len(rows), width)
                    input_ids = self.base.generate(
                        input_ids=input_ids,
                        attention_mask=mask,
                        generation_config=GenerationConfig(max_new_tokens=steps, **self._options),
                        logits_processor=[log],
                        stopping_criteria=StoppingCriteriaList([ending]),
                        **cache,
                    )
                    tokens = input_ids[:, width + done :]
                    logprobs = log.of(input_ids)[:, : tokens.shape[1]]
                    for row, *found in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                        for whole, part in zip(drawn[row], found, strict=True):
                            whole += part
                    done += tokens.shape[1]
                    going = [not end and limits[row] > done for row, end in zip(rows, ending, strict=True)]
                    rows = [row for row, goes in zip(rows, going, strict=True) if goes]
                    kept = torch.tensor(going, device=self._device).nonzero()[:, 0]
                    input_ids, mask = input_ids[kept], torch.cat((mask, torch.ones_like(tokens)), 1)[kept]
                    if cache and rows:
                        next(iter(cache.values())).reorder_cache(kept)
        except Overflowed as error:
            raise overflow_error(self.lens or self.base, error.token_ids, "A solution") from error
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"There is not enough memory for {len(prompts)} solutions at once; "
                "give a smaller --batch-size."
            ) from error
        return drawn

    def _read_once(
        self, prompts: Sequence[list[int]], input_ids: Tensor, mask: Tensor, cache: dict[str, Any]
    ) -> None:
        """Fill a cache with all but the last column of (B, T) rows; equal ones are read together."""
        numbers: dict[tuple[int, ...], int] = {}
        places = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
        if len(numbers) == len(prompts):
            return
        first = torch.tensor([places.index(number) for number in range(len(numbers))], device=self._device)
        self.base.generate(
            input_ids=input_ids[first, :-1],
            attention_mask=mask[first, :-1],
            generation_config=GenerationConfig(max_new_tokens=1, pad_token_id=0, do_sample=False),
            **cache,
        )
        next(iter(cache.values())).reorder_cache(torch.tensor(places, device=self._device))


class VLLMEngine:
    """Draws with vLLM, which must be installed; without a PHi layer. Arguments as of `TransformersEngine`.

    Raises:
        ConfigError: vLLM is not installed.
        AdapterError: there is no such model, or vLLM cannot load it.
    """

    def __init__(self, source: ModelSource, temperature: float, top_p: float) -> None:
        vllm, model = require("vllm", "vllm", "The engine vllm"), source.model
        folder, commit = find(model, ("*.json",), "model", "config.json", revision=source.revision)
        try:
            self.llm = vllm.LLM(
                model=str(folder) if is_folder(model) else model,
                revision=commit,
                tokenizer_revision=commit,
                dtype=source.dtype,
                trust_remote_code=source.trust_remote_code,
                generation_config="vllm",  # its defaults, not the model's
                logprobs_mode="raw_logprobs",
            )
        except Exception as error:  # anything a compiler, a driver or somebody else's file can do
            raise AdapterError(f"vLLM cannot load {model} ({reason(error)}); leave out --engine.") from error
        config = self.llm.llm_engine.model_config
        self.tokenizer = self.llm.get_tokenizer()
        self.context = config.max_model_len
        self.ends = _ends(self.tokenizer, _saved_ends(folder))
        self.stop = _stop(self.tokenizer)
        self._options = {"temperature": temperature, "top_p": top_p, "logprobs": 0}
        self.record = {
            "base": model,
            "revision": commit,
            "dtype": str(config.dtype).removeprefix("torch."),
            "ends": self.ends,
            "stop": self.stop,
        }

    def draw(self, prompts: Sequence[list[int]], limits: Sequence[int], seed: int) -> list[Drawn]:
        """As `Engine.draw`; vLLM itself says how far the same seed gives the same tokens."""
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        parameters = [
            SamplingParams(
                max_tokens=limit,
                seed=(seed + number) % 2**63,
                stop_token_ids=self.ends,
                stop=[self.stop] if self.stop else None,
                **self._options,
            )
            for number, limit in enumerate(limits)
        ]
        tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        drawn = []
        for output in self.llm.generate(tokens, parameters, use_tqdm=False):
            ids = list(output.outputs[0].token_ids)
            steps = zip(ids, output.outputs[0].logprobs, strict=True)
            logprobs = [step[token].logprob for token, step in steps]
            if not all(map(math.isfinite, logprobs)):
                raise InputError(
                    f"The predictions of {self.record['base']} are not numbers in {self.record['dtype']}: it "
                    "overflows; give another --dtype."
                )
            drawn.append((ids, logprobs))
        return drawn


def _ends(tokenizer: Any, of_model: int | Sequence[int] | None) -> list[int]:
    """Tokens that end a reply: those of the model's generation settings and the tokenizer's own.

    Both are needed: Llama 3's chats end messages with <|eot_id|>, which not every copy names in both places.
    """
    found = [of_model] if isinstance(of_model, int) else list(of_model or ())
    return sorted({*found, tokenizer.eos_token_id} - {None})


def _saved_ends(folder: Path) -> Any:
    path = folder / "generation_config.json"
    return read_json(path).get("eos_token_id") if path.is_file() else None


def _stop(tokenizer: Any) -> str:
    """What ends a reply beside tokens, for a model that reads prompts as plain text."""
    return "" if tokenizer.chat_template else PLAIN_STOP


@contextmanager
def _settings_aside(base: Any) -> Iterator[None]:
    """Without the model's own generation settings, which would fill in whatever a call leaves open."""
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


class _Log:
    """A logits processor that changes nothing and notes the log-probabilities of the tokens drawn.

    It stands before temperature and top-p. No more than one (B, V) is held.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask  # (B, T), 0 on padding, which is on the left
        self._columns: list[Tensor] = []
        self._scores: Tensor | None = None  # (B, V) of the token that is drawn next

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids)
        self._scores, self._total = scores, scores.float().logsumexp(-1, keepdim=True)
        if not (finite := self._total[:, 0].isfinite()).all():
            raise Overflowed(first_row(input_ids, self._mask, ~finite))
        return scores

    def _note(self, sequences: Tensor) -> None:
        if self._scores is not None:
            self._columns.append(self._scores.gather(1, sequences[:, -1:]).float() - self._total)

    def of(self, sequences: Tensor) -> Tensor:
        """(B, n) of what came last, n tokens, in these finished rows."""
        self._note(sequences)
        return torch.cat(self._columns, 1)


class _Ending:
    """A stopping criterion: a row ends with a token of `ends` or the text `stop`; half of them end the batch.

    Args:
        engine: has the ends.
        rows: B.
        prompt: columns of the prompt, padding included; `stop` in there does not count.
    """

    def __init__(self, engine: TransformersEngine, rows: int, prompt: int) -> None:
        self._ended = torch.zeros(rows, dtype=torch.bool, device=engine._device)
        self._ends = torch.tensor(engine.ends, dtype=torch.long, device=engine._device)
        self._tokenizer, self._stop, self._prompt = engine.tokenizer, engine.stop, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self._ended |= torch.isin(input_ids[:, -1], self._ends)
        if self._stop:
            # Each of its characters is at most one token.
            first = max(self._prompt, input_ids.shape[1] - len(self._stop) - 1)
            texts = self._tokenizer.batch_decode(input_ids[:, first:])
            self._ended |= torch.tensor([self._stop in text for text in texts], device=self._ended.device)
        worth_it = len(self._ended) > _FEW_ROWS and 2 * int(self._ended.sum()) >= len(self._ended)
        return torch.ones_like(self._ended) if worth_it else self._ended

    def __iter__(self) -> Iterator[bool]:
        """Whether each row has ended."""
        return iter(self._ended.tolist())
