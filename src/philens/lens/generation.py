"""Generation with phi, mtd and surprisal of every token; `transformers`' own generate does the generating.

Shapes: B rows, T tokens.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from philens.bases.facts import CACHE_NAMES, evaluating, find_cache, unwrapped
from philens.lens.calls import Call, followed
from philens.lens.core import LensCore
from philens.lens.insertion import transform_output
from philens.lens.losses import PHiModelOutput, token_surprisal
from philens.lens.overflow import Overflow, Overflowed, check_overflow, first_row, overflow_error
from philens.lens.steering import Steering
from philens.support.errors import InputError

# Called with each token's id, phi (or mtd) and surprisal.
OnToken = Callable[[int, float, float], None]


@dataclass(frozen=True)
class PHiGeneration:
    """Generated tokens and their scores, prompt included.

    Attributes:
        sequences: (B, T) token ids, as `transformers` returns them.
        phi: (B, T) nats ((B, T, N) with N `layers`), NaN on padding; None while the layer is disabled.
        surprisal: (B, T) nats, of the distribution that the model generates from before temperature and
            other changes of it; NaN on each row's first token and on padding.
        prompt_length: tokens of the prompt, padding included.
        output: what `transformers` returned; more than sequences with `return_dict_in_generate`.
        mtd: (B, T) multiple-token divergence in nats, NaN on padding; None without a shallow head.
    """

    sequences: Tensor
    phi: Tensor | None
    surprisal: Tensor
    prompt_length: int
    output: Any
    mtd: Tensor | None = None


def generate(
    lens: LensCore,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    on_token: OnToken | None = None,
    skip_prompt: bool = True,
    overflow: Overflow = "error",
    steer: float = 0.0,
    **options: Any,
) -> PHiGeneration:
    """Generate with the base's own `generate` (greedy, sampling, beams, assisted) and score what comes out.

    The layers are in the path or not as `lens.config.mode` and `lens.enabled` say. Scores are those of any
    other reading of the same text. Where the base reads each row once, token after token, the layers and the
    output head see afterwards what it had in passing; beams, assisted generation and the like take one more
    pass over the finished rows.

    Args:
        input_ids: (B, T) prompts.
        attention_mask: (B, T), 0 on padding, which is on the left.
        on_token: called with id, phi (mtd where there is no PHi layer) and surprisal of every new token as
            soon as the model has read it; for one row without padding, token by token, and one PHi layer at
            most.
        skip_prompt: False calls it with the prompt's tokens first.
        overflow: what becomes of tokens whose phi or surprisal the model cannot hold, as in `philens.score`;
            what has no finite predictions cannot be drawn from either way.
        steer: how far what is drawn from lies from the model's predictions (0) towards those of a shallow
            head (1) or, below 0, away from them, at the same entropy; see `steered`. `top_k` comes before
            it, also in greedy generation, and temperature and `top_p` after it. Scores stay the model's.
        options: options of the base's `generate`.

    Raises:
        InputError: the base cannot generate, or overflows, or tokens cannot be streamed or steered.
    """
    check_overflow(overflow)
    generator: Any = unwrapped(lens.base)
    if not isinstance(unwrapped(lens.base), GenerationMixin):
        raise InputError(f"{type(lens.base).__name__} has no generate; use a causal model of transformers.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if on_token is not None and (len(input_ids) > 1 or not mask.all()):
        raise InputError("Tokens can be followed in one row without padding; leave out on_token.")
    if on_token is not None and not (lens.enabled and len(lens.layers or lens.instruments) == 1):
        raise InputError(
            "Tokens can be followed with one PHi layer or a shallow head, enabled; leave out on_token."
        )
    own: list[Any] = []
    if overflow == "error" or _setting(generator, options, "do_sample"):
        own.append(_Finite(mask))
    own += options.get("logits_processor") or ()
    hear: list[Callable[[Call], None]] = []
    if steer:
        steering = Steering(lens, steer, _setting(generator, options, "top_k"))
        own.append(steering)
        hear.append(steering.hear)
    # What is compared reads what goes into blocks, too, of which no record is kept.
    compared = lens.enabled and any(one.compared for one in lens.instruments)
    follower = None if on_token is None else _Follower(lens, on_token, input_ids.shape[1], overflow)
    if follower is not None:
        hear.append(follower.hear)
    if own:
        options = options | {"logits_processor": LogitsProcessorList(own)}

    def hand_on(
        ids: Tensor, phi: Tensor | None, surprisal: Tensor, mtd: Tensor | None, places: range
    ) -> None:
        values = mtd if phi is None else phi
        for place in places:
            if on_token is not None and values is not None:
                on_token(int(ids[0, place]), float(values[0, place]), float(surprisal[0, place]))

    with evaluating(lens):
        try:
            with contextlib.ExitStack() as stack:
                record = None
                if on_token is not None and not skip_prompt:
                    hand_on(input_ids, *_scores(lens, input_ids, mask, overflow), range(input_ids.shape[1]))
                if hear:
                    stack.enter_context(followed(lens, hear))
                # Beams change rows; a user's cache must not be read on; sampled latents are drawn once.
                elif (
                    (_setting(generator, options, "num_beams") or 1) == 1
                    and not {*CACHE_NAMES, "return_dict_in_generate"} & options.keys()
                    and lens.config.inference == "mean"
                    and not compared
                ):
                    record = _Record(lens, input_ids.shape[1])
                    stack.enter_context(record.recording())
                    if "logits_to_keep" in lens._arguments:
                        options = {"logits_to_keep": 0} | options
                output = generator.generate(input_ids=input_ids, attention_mask=mask, **options)
                sequences = output if isinstance(output, Tensor) else output.sequences
                finished = record is not None and isinstance(output, Tensor) and record.finish(sequences)
            mask = mask.repeat_interleave(len(sequences) // len(input_ids), 0)
            mask = _finished_mask(generator, sequences, mask, options)
            phi, surprisal, mtd = _scores(lens, sequences, mask, overflow, record if finished else None)
            if follower is not None:
                hand_on(sequences, phi, surprisal, mtd, range(follower.read, int(mask[0].sum())))
        except Overflowed as error:
            raise overflow_error(lens, error.token_ids, "The text") from error
    return PHiGeneration(sequences, phi, surprisal, input_ids.shape[1], output, mtd)


class _Finite(LogitsProcessor):
    """Changes nothing, and ends generation where predictions are no numbers: none can be drawn."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken = (scores.isnan() | scores.isposinf()).any(-1)
        if broken.any():
            raise Overflowed(first_row(input_ids, self.mask, broken))
        return scores


@contextlib.contextmanager
def unmeasured(lens: LensCore) -> Iterator[None]:
    """Within this context the base runs as with its layers, in evaluation, and nothing is measured.

    The layers are in the path or not as `lens.config.mode` and `lens.enabled` say; no prior predicts.
    """
    if lens.config.inference != "mean":  # what is drawn is the layer's affair
        yield
        return
    numbers = range(len(lens.layers) * lens.enabled)
    with lens.disabled(), contextlib.ExitStack() as stack:
        for number in numbers:
            hook = transform_output(lens._modules_at[number], partial(_above, lens, number))
            stack.callback(hook.remove)
        yield


def _above(lens: LensCore, number: int, states: Tensor) -> Tensor:
    """(B, T, D) what the blocks above a layer read in place of its block's output, without a prior."""
    if lens._observing:
        return states
    layer = lens.layers[number]
    sinks = layer.find_sinks(states)
    return layer.pass_through(states, layer.encode(states, sinks), sinks)


class _Record:
    """What a base has at its insertion points and at its output head while it generates: all that scores are
    made of, if it reads each row once and token after token."""

    def __init__(self, lens: LensCore, prompt_length: int) -> None:
        self.lens, self.prompt_length = lens, prompt_length
        self.states: list[list[Tensor]] = [[] for _ in lens.layers] if lens.enabled else []
        self.ids: list[Tensor] = []
        self.at_head: list[Tensor] = []
        self.arguments: dict[str, Any] = {}  # of the base's last call

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the base within this context; the layers are in the path as always."""
        lens, head = self.lens, unwrapped(self.lens.base).get_output_embeddings()
        if lens._head_is_last is None:
            with lens.disabled():
                lens(torch.zeros((1, 1), dtype=torch.long, device=head.weight.device), returns="states")
        with lens.disabled(), contextlib.ExitStack() as stack:
            for number in range(len(self.states)):
                hook = transform_output(lens._modules_at[number], partial(self._at_layer, number))
                stack.callback(hook.remove)
            stack.callback(head.register_forward_pre_hook(self._at_head).remove)
            before = unwrapped(lens.base).register_forward_pre_hook(self._at_base, with_kwargs=True)
            stack.callback(before.remove)
            yield

    def _at_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.arguments = kwargs
        self.ids.append(kwargs["input_ids"])

    def _at_layer(self, number: int, states: Tensor) -> Tensor:
        self.states[number].append(states)
        return _above(self.lens, number, states)

    def _at_head(self, module: nn.Module, args: Any) -> Any:
        self.at_head.append(args[0])
        # Of the prompt's logits only the last are used. Other calls that read several tokens are those of
        # assisted generation, which needs them all.
        is_prompt = len(self.ids) == 1 and self.ids[0].shape[1] == self.prompt_length
        return (args[0][:, -1:], *args[1:]) if is_prompt else None

    def finish(self, sequences: Tensor) -> bool:
        """Read the last token, which nobody needed so far; False where the record is not that of these rows
        (B, T)."""
        cache = find_cache(self.arguments)
        mask, positions = (self.arguments.get(name) for name in ("attention_mask", "position_ids"))
        ids = torch.cat(self.ids, 1) if len({len(some) for some in self.ids}) == 1 else sequences[:0]
        complete = (
            bool(self.lens._head_is_last)
            and isinstance(cache, Cache)
            and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
            and all(some.shape[1] == 1 for some in self.ids[1:])
            and sum(some.shape[1] for some in self.at_head) == ids.shape[1]
            and torch.equal(ids, sequences[:, :-1])
        )
        if complete:
            following: dict[str, Any] = {"input_ids": sequences[:, -1:].clamp(min=0)}
            if mask is not None:
                following["attention_mask"] = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            if positions is not None:
                following["position_ids"] = positions[..., -1:] + 1
            unwrapped(self.lens.base)(**(self.arguments | following))
        return complete

    def result(self, order: Tensor, hidden: Tensor) -> PHiModelOutput:
        """What a pass over the rows' tokens in this order (B, T) gives; (B, T) bool `hidden` are padding."""

        def ordered(parts: list[Tensor]) -> Tensor:
            states = torch.cat(parts, 1)
            states = states.gather(1, order[..., None].expand_as(states))
            return states.masked_fill(hidden[..., None], 0)

        layers = zip(self.lens.layers, self.states, strict=False)
        phis = [layer(ordered(parts), contrastive=False).phi for layer, parts in layers]
        phi = None if not phis else phis[0] if self.lens.config.layers is None else torch.stack(phis, -1)
        head = unwrapped(self.lens.base).get_output_embeddings()
        return PHiModelOutput(phi=phi, head=head, head_states=ordered(self.at_head))


def _setting(base: Any, options: dict[str, Any], name: str) -> Any:
    """What `transformers` takes for a setting of generation."""
    given = getattr(options.get("generation_config"), name, None)
    return options.get(name, getattr(base.generation_config, name) if given is None else given)


def _finished_mask(base: Any, sequences: Tensor, prompt_mask: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, T) 1 on the prompt's tokens and on generated ones up to the one that ended the row."""
    generated = sequences[:, prompt_mask.shape[1] :]
    ends = _setting(base, options, "eos_token_id")
    ends = torch.as_tensor([] if ends is None else ends, device=generated.device, dtype=generated.dtype)
    is_end = torch.isin(generated, ends)
    ended = (is_end.cumsum(1) - is_end.long()) > 0
    # What fills rows that other criteria ended; transformers does so only where there is a token that ends.
    pad = _setting(base, options, "pad_token_id") if ends.numel() else -1
    if pad is not None:
        ended |= (generated != pad).flip(1).cumsum(1).flip(1) == 0
        ended &= ~(is_end & (is_end.cumsum(1) == 1))  # padding may be the token that ends, too
    return torch.cat((prompt_mask, (~ended).to(prompt_mask.dtype)), 1)


@torch.no_grad()
def _scores(
    lens: LensCore, sequences: Tensor, mask: Tensor, overflow: Overflow, record: _Record | None = None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Phi, surprisal and mtd of rows whose padding may lie on either side, NaN there; from a record or a
    pass."""
    place = torch.arange(mask.shape[1], device=mask.device)
    # Real tokens first: padding on the right changes nothing in any causal model, and needs no mask.
    order = torch.argsort(torch.where(mask != 0, place, place + mask.shape[1]), 1)
    real = mask.gather(1, order)
    ids = sequences.gather(1, order).masked_fill(real == 0, 0)  # what fills a row may be no token at all
    result = lens(ids, returns="states") if record is None else record.result(order, real == 0)
    surprisal = token_surprisal(result, ids)
    later = (real != 0) & (place > 0)
    mtd = result.mtd
    for values in (surprisal, result.phi, mtd):
        if values is not None:
            lost = ~values.isfinite() & (later if values.ndim == 2 else later[..., None])
            if overflow == "error" and lost.any():
                row = int(lost.flatten(1).any(1).nonzero()[0, 0])
                raise Overflowed(ids[row, real[row] != 0])
            values.masked_fill_(lost, torch.nan)

    def back(values: Tensor) -> Tensor:
        spread = order if values.ndim == 2 else order[..., None].expand_as(values)
        hidden = (mask == 0) if values.ndim == 2 else (mask == 0)[..., None]
        return torch.empty_like(values).scatter(1, spread, values).masked_fill(hidden, torch.nan)

    phi, mtd = (None if values is None else back(values) for values in (result.phi, mtd))
    return phi, back(surprisal), mtd


class _Follower:
    """Hands on every token that the base reads after its first `count`."""

    def __init__(self, lens: LensCore, on_token: OnToken, count: int, overflow: Overflow) -> None:
        self.lens, self.on_token, self.count, self.overflow = lens, on_token, count, overflow
        self.ids: list[Tensor] = []
        self.expected: Tensor | None = None  # what the model expects next, (V,) log-probabilities

    @property
    def read(self) -> int:
        """Tokens read so far."""
        return sum(map(len, self.ids))

    def hear(self, call: Call) -> None:
        rows, length = call.input_ids.shape
        if rows > 1 or (length > 1 and self.read + length > self.count):
            raise InputError(
                "Tokens can be followed in one row and token by token: not with beams, several sequences or "
                "assistance; leave out on_token."
            )
        if not call.cached:
            name = type(self.lens.base).__name__
            raise InputError(f"{name} generates without a cache; leave out on_token.")
        self.ids.append(call.input_ids[0])
        if self.read > self.count and self.expected is not None:
            token = int(call.input_ids[0, -1])
            values = (call.value(), -float(self.expected[token]))
            if self.overflow == "error" and not all(map(math.isfinite, values)):
                raise Overflowed(torch.cat(self.ids))
            self.on_token(token, *(value if math.isfinite(value) else math.nan for value in values))
        self.expected = call.logits[0, -1].float().log_softmax(-1)
