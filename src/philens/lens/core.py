"""A base model with instruments in it: they put in and taken out, and the forward pass."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from philens.bases.facts import (
    CACHE_NAME,
    CACHE_NAMES,
    accepted_arguments,
    cache_argument,
    find_cache,
    text_config,
    token_embedding,
)
from philens.lens.attention import document_ids
from philens.lens.cache import new_cache, prior_memories
from philens.lens.config import SINK, InstrumentConfig, MetricOptions
from philens.lens.insertion import (
    StopForward,
    find_blocks,
    find_insertion_point,
    recompute,
    recorded_forms,
    skipped,
    transform_output,
)
from philens.lens.instrument import KINDS, Instrument, make_parts, titles
from philens.lens.layer import PHiLayer
from philens.lens.losses import PHiModelOutput, add_losses, counted_tokens
from philens.lens.passing import Pass, Pressing, Reading, Rows, plan_pressing
from philens.support.errors import ConfigError, InputError, InsertionError


class LensCore(nn.Module):
    """What a `PHiModel` computes; its attributes are explained there."""

    weight_scale: Tensor
    phi: Any

    def __init__(self, base: nn.Module, config: InstrumentConfig | Sequence[InstrumentConfig]) -> None:
        super().__init__()
        self.base = base
        self.configs = in_order(config)
        self.source: str | None = None
        self.record: dict[str, Any] | None = None
        self.metric_options = MetricOptions()
        self.module_paths: list[str] = []
        self._modules_at: list[nn.Module] = []
        for one in self.configs:
            self._add(one)
        self.training = base.training  # a base that was loaded evaluates, and what is made anew trains
        self.attached.train(base.training)
        self.register_buffer("weight_scale", torch.ones(()), persistent=False)
        self._arguments, self._takes_others = accepted_arguments(base)
        self._head_is_last: bool | None = None  # whether logits are the output head's output, untouched
        self._head: list[Any] = []  # the output head that is watched, and what ends that
        self._head_states: list[Tensor] | None = None  # what it would read, while that is asked for
        self._watch_head(self._output_head())
        self.blocks_below = self._find_blocks_below()
        self._not_recomputed: list[nn.Module] = []
        self._undo_recompute: list[Callable[[], None]] = []
        self._trainable: list[nn.Parameter] = []  # parameters of the base that freeze_base() froze
        self._frozen = False
        self._handles: list[RemovableHandle] = []
        self._observing = self.config.mode == "observe"
        self._pass: Pass | None = None  # the one that runs
        self.enabled = False
        self.enable()

    @property
    def config(self) -> Any:
        """The first of `configs`: of the PHi layers where there are any."""
        return self.configs[0]

    @config.setter
    def config(self, config: Any) -> None:
        self.configs[0] = config

    def _add(self, config: Any) -> None:
        """Make an instrument, and note its places."""
        places = config.places()
        points = dict(find_insertion_point(self.base, *place) for place in places)
        if len(points) < len(places):
            raise ConfigError(f"layers {config.layers} name the same block twice; name each once.")
        widths = [hidden_width(self.base, module) for module in points.values()]
        setattr(self, config.kind, make_parts(config, widths, self.base))
        for part, module in zip(self.parts_of(config.kind), points.values(), strict=True):
            parameter = next(iter(module.parameters()), next(iter(self.base.parameters()), None))
            if parameter is not None:
                part.to(parameter.device)
        self.module_paths += points
        self._modules_at += points.values()

    def parts_of(self, kind: str) -> list[Any]:
        """The instruments of a kind; none where it is not attached."""
        found: Any = getattr(self, kind, None)
        return [] if found is None else list(found) if isinstance(found, nn.ModuleList) else [found]

    @property
    def instruments(self) -> list[Instrument]:
        """All that is attached, one for each of `module_paths`; PHi layers come first."""
        return [part for config in self.configs for part in self.parts_of(config.kind)]

    @property
    def attached(self) -> nn.Module:
        """All that is attached, as one module."""
        modules = {config.kind: getattr(self, config.kind) for config in self.configs}
        return modules[self.config.kind] if len(modules) == 1 else nn.ModuleDict(modules)

    @property
    def layers(self) -> list[PHiLayer]:
        """The PHi layers, one for each of the first of `module_paths`."""
        return self.parts_of("phi")

    def need_layers(self, who: str) -> None:
        """Raise a ConfigError unless there is a PHi layer, without which `who` can do nothing."""
        if not self.layers:
            raise ConfigError(
                f"{who} needs a PHi layer, and this model has a {titles(self.configs)} alone; give another "
                "model or adapter."
            )

    @property
    def has_own_head(self) -> bool:
        """Whether the shallow head is one that the base brought along."""
        return any(getattr(config, "own", False) for config in self.configs)

    @property
    def column_points(self) -> list[str | None]:
        """What the columns of each PHi layer are named after: its insertion point where there may be several,
        else None."""
        return self._points[: len(self.layers)]

    @property
    def _points(self) -> list[str | None]:
        """What the columns of each instrument are named after."""
        several = isinstance(getattr(self, "phi", None), nn.ModuleList)
        layers = len(self.layers)
        return [path if several and k < layers else None for k, path in enumerate(self.module_paths)]

    # What happens at the insertion points during one forward pass of the base.

    @contextlib.contextmanager
    def passing(self, current: Pass) -> Iterator[Pass]:
        """Within this context instruments are in this pass; it ends with it, also where the base raises."""
        before, self._pass = self._pass, current
        try:
            yield current
        finally:
            self._pass = before

    def _through_layer(self, number: int, hidden_states: Tensor) -> Tensor:
        if self._pass is None and self._observing:  # the base was called by itself
            return hidden_states
        current, observe = self._pass or Pass(), self._observing
        if current.replaced is not None:
            return current.replaced[1] if current.replaced[0] == number else hidden_states
        if 0 < current.stop <= number:  # the pass ends without it
            return hidden_states
        memories = current.memories[number] if current.memories else ()
        states = hidden_states.detach() if observe and not current.joint else hidden_states
        output: Any = self.instruments[number].read(states, current, memories)
        current.outputs[number] = output
        if len(current.outputs) == current.stop:
            raise StopForward
        return hidden_states if observe else output.hidden_states

    def enable(self) -> None:
        """Put the instruments in."""
        if not self.enabled:
            for number, module in enumerate(self._modules_at):
                through = lambda states, number=number: self._through_layer(number, states)  # noqa: E731
                self._handles.append(transform_output(module, through, self.module_paths[number]))
            self.enabled = True

    def disable(self) -> None:
        """Take the instruments out; the model is then exactly the base model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.enabled = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is exactly the base model."""
        was = self.enabled
        self.disable()
        try:
            yield
        finally:
            if was:
                self.enable()

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Within this context the instruments read hidden states and leave them as they are, as with
        `mode="observe"`: phi is the same, and logits are the base's own."""
        was, self._observing = self._observing, True
        try:
            yield
        finally:
            self._observing = was

    def detach(self) -> nn.Module:
        """Remove the instruments for good and return the base model as it was."""
        self.disable()
        self._watch_head(None)
        self.keep_activations()
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            for module in self._not_recomputed:
                module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._trainable, self._frozen = [], False
        return self.base

    # Training.

    def freeze_base(self) -> None:
        """Train instruments only: no gradient for the base, which stays in evaluation mode until `detach`."""
        self._trainable += [parameter for parameter in self.base.parameters() if parameter.requires_grad]
        self.base.requires_grad_(False)
        self._frozen = True
        self.base.eval()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Fit fresh PHi layers to the size of the base's hidden states; see `PHiLayer.calibrate`.

        Attention sinks, tokens whose hidden state is more than `SINK` times as long as the median, don't
        count: a handful of them would make some dimensions seem tens of times larger than they are elsewhere.

        Args:
            batches: arguments of `forward` other than labels, such as input_ids (B, T) and attention_mask.
        """
        device = next(self.parameters()).device
        found: list[list[Tensor]] = [[] for _ in self.layers]
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            mask = inputs.get("attention_mask")
            real = torch.ones_like(inputs["input_ids"]) if mask is None else mask
            outputs = self(**inputs, returns="phi").layer_outputs
            for states, output in zip(found, outputs, strict=True):
                states.append(output.observed[real != 0])
        for layer, states in zip(self.layers, found, strict=True):
            norms = torch.cat([some.float().norm(dim=-1) for some in states])
            sink_norm = SINK * float(norms.median())
            count, sums = 0, torch.zeros(2, layer.hidden_size, dtype=torch.float64, device=device)
            for some in states:
                rest = some[some.float().norm(dim=-1) <= sink_norm].double()
                sums += torch.stack((rest.sum(0), rest.square().sum(0)))
                count += len(rest)
            mean, square = sums / max(count, 1)
            layer.calibrate(mean, (square - mean.square()).clamp(min=0).sqrt(), sink_norm)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; a frozen base stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.base.eval()
        return self

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the base's blocks and recompute the rest in the backward pass.

        A block with an insertion point inside it is left out; `keep_activations` or `detach` undo it.

        Raises:
            InsertionError: the base's blocks cannot be found.
        """
        if not self._undo_recompute:
            path, blocks = find_blocks(self.base)
            for number, block in enumerate(blocks):
                if not any(point.startswith(f"{path}.{number}.") for point in self.module_paths):
                    self._undo_recompute.append(recompute(block))

    def keep_activations(self) -> None:
        """Undo `checkpoint_activations`."""
        for undo in self._undo_recompute:
            undo()
        self._undo_recompute = []

    def _run_once(self) -> None:
        """Take what holds instruments out of the base's own activation checkpointing: they'd run twice."""
        for path in self.module_paths:
            names = path.split(".")
            for depth in range(len(names)):
                module = self.base.get_submodule(".".join(names[: depth + 1]))
                if getattr(module, "gradient_checkpointing", False):
                    module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]
                    self._not_recomputed.append(module)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        returns: Literal["logits", "states", "phi"] = "logits",
        packed: bool | None = None,
        **kwargs: Any,
    ) -> PHiModelOutput:
        """Read tokens; with labels, compute the training loss.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 on padding, on either side; on the left, a base with absolute positions
                needs position_ids, as in transformers. With a cache (B, earlier + T).
            position_ids: (B, T). Where they do not go up by one, a new document starts (the convention of
                transformers for packs); padding in a pack is then a document of its own.
            labels: (B, T), -100 on tokens that do not count. A token's own id, not the next one's; a
                document's first token is never predicted from the document before it.
            cache: that an earlier call returned: the tokens go on from those it has read, and so does the
                prior. `past_key_values` is another name of it.
            use_cache: return a cache.
            returns: `logits`; `states` leaves logits to be made in parts by `logits_at`, so that no
                (B, T, V) is held; `phi` stops at the deepest layer: no blocks above it, no vocabulary.
            packed: whether rows hold several documents, by their position_ids. None looks, for which a GPU
                must be waited for.
            kwargs: passed to the base model.

        Raises:
            InputError: shapes that do not fit; labels where nothing is trained, or a shallow head beside a
                PHi layer would train the base.
        """
        cache = find_cache({"cache": cache} | kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        self._check(input_ids, attention_mask, position_ids, labels, cache, returns)
        if self.enabled:
            self._run_once()
        if use_cache and cache is None:
            cache = new_cache(self.base)
        documents = None if position_ids is None or cache is not None else document_ids(position_ids)
        arguments: dict[str, Any] = {"use_cache": cache is not None, "position_ids": position_ids} | kwargs
        if cache is not None:
            arguments[cache_argument(self.base) or CACHE_NAME] = cache
        # A base sees the documents of a pack by their positions; a padding mask would switch that off.
        if documents is None or "position_ids" not in self._arguments:
            packed = False
        if attention_mask is not None and packed is None and documents is not None:
            packed = is_pack(documents, attention_mask)
        if not packed:
            arguments["attention_mask"] = attention_mask
        pressing = Pressing(Rows(None, input_ids.shape))
        if labels is not None and self.enabled:
            pressing = plan_pressing(self.configs, self._observing, self.training, returns, input_ids)
        instruments, embed = self.instruments if self.enabled else [], token_embedding(self.base)
        counts = [one.memory_count for one in instruments]
        wanted = len(self.layers) if returns == "phi" else len(instruments)
        current = Pass(
            input_ids,
            embed,
            attention_mask,
            documents,
            prior_memories(cache, counts) if cache is not None and counts else (),
            stop=wanted if returns == "phi" or pressing.part else 0,
            contrastive=labels is not None,
            joint=self._is_joint(labels),
        )
        forms: dict[int, Any] = {}
        with contextlib.ExitStack() as stack:
            if pressing.apart:
                stack.enter_context(self.observing())
            if pressing.again or any(one.compared for one in instruments):
                stack.enter_context(recorded_forms(self.blocks_below, forms))
            stack.enter_context(self.passing(current))
            result = self._read(input_ids, arguments, returns)
        outputs, result.cache = current.outputs, cache
        if self.enabled and len(outputs) < wanted:
            missing = next(p for number, p in enumerate(self.module_paths) if number not in outputs)
            raise InsertionError(
                f"{missing} did not run in the forward pass; choose another insertion point."
            )
        found: list[Any] = [outputs[number] for number in sorted(outputs)]
        result.layer_outputs = found[: len(self.layers)]
        if result.layer_outputs:
            phis = [output.phi for output in result.layer_outputs]
            result.phi = phis[0] if self.config.layers is None else torch.stack(phis, -1)
        result.shallow, result.attention_mask = self.shallow_pass(input_ids, current, forms), attention_mask
        if labels is not None:
            counted, predicted = counted_tokens(labels, attention_mask, documents)
            passes: list[PHiModelOutput | None] = [result]
            untouched = None
            if pressing.apart or pressing.again:
                passes = [None] * len(instruments)
                untouched = result if pressing.apart and not pressing.part else None
            if pressing.again:
                passes, untouched = self._press(input_ids, arguments, found, forms, pressing.rows, untouched)
                labels, predicted = pressing.rows.take(labels), pressing.rows.take(predicted)
            add_losses(
                result,
                labels,  # pyright: ignore[reportArgumentType]
                counted,
                predicted,
                found,
                passes,
                untouched,
                self.instruments,
                self.weight_scale,
                self._points,
                current.joint,
            )
            if pressing.again and not self._observing and (path := passes[0]) is not None:
                # Who asks for logits asks for those with the layer in the path.
                result.logits, result.head, result.head_states = path.logits, path.head, path.head_states
                if returns == "logits" and path.logits is None and path.head is not None:
                    result.logits = path.head(path.head_states)  # pyright: ignore[reportArgumentType]
        return result

    def _is_joint(self, labels: Tensor | None) -> bool:
        """Whether a pass trains a shallow head and the base together."""
        trains = labels is not None and self.enabled and torch.is_grad_enabled()
        return trains and bool(self.parts_of("mtd")) and any(p.requires_grad for p in self.base.parameters())

    def shallow_pass(
        self, input_ids: Tensor, current: Pass, forms: dict[int, Any]
    ) -> Callable[[], PHiModelOutput] | None:
        """Makes the predictions that the base's are compared with; None where no instrument of a pass is.

        Args:
            input_ids: (B, T), of that pass.
            forms: what `recorded_forms` noted of `blocks_below` in it.
        """
        for number, output in current.outputs.items():
            states = output.hidden_states
            if self.instruments[number].final:
                return partial(PHiModelOutput, head=self._output_head(), head_states=states)
            if self.instruments[number].compared:
                return partial(self.read_again, input_ids, {"use_cache": False}, number, states, forms)
        return None

    def _press(
        self,
        input_ids: Tensor,
        arguments: dict[str, Any],
        outputs: Sequence[Reading],
        forms: dict[int, Any],
        rows: Rows,
        untouched: PHiModelOutput | None,
    ) -> tuple[list[PHiModelOutput | None], PHiModelOutput | None]:
        """What presses on instruments: for each the pass with it in the path, and the untouched one.

        Args:
            outputs: outputs of the pass that all rows went through, at least up to the deepest instrument.
            untouched: what that pass returned, if it went on without any; None makes one if it is needed.
        """
        # A compiler cannot follow how blocks are passed over.
        read_again = torch.compiler.disable(self.read_again)
        inputs, given = rows.take(input_ids), {name: rows.of(value) for name, value in arguments.items()}
        forms = {number: rows.of(form) for number, form in forms.items()}

        def read(number: int, states: Tensor) -> PHiModelOutput:
            return read_again(inputs, given, number, rows.take(states), forms)  # pyright: ignore[reportCallIssue]

        pressures = [one.config.pressure for one in self.instruments]
        if untouched is None and "distill" in pressures:
            deepest = self._deepest()
            with torch.no_grad():
                untouched = read(deepest, outputs[deepest].observed)
        passes: list[PHiModelOutput | None] = []
        for number, (one, pressure) in enumerate(zip(outputs, pressures, strict=True)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and pressure != "reconstruction"):
                passes.append(read(number, one.hidden_states))
        return passes, untouched

    def _deepest(self) -> int:
        """The instrument of most blocks below it; any where an insertion point is no block."""
        places = [next((k for k, b in enumerate(self.blocks_below) if b is m), 0) for m in self._modules_at]
        return places.index(max(places))

    def _accepts(self, name: str) -> bool:
        return self._takes_others or name in self._arguments

    def _check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        cache: Any,
        returns: str,
    ) -> None:
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise InputError(
                f"input_ids must have shape (B, T) with at least one token, not {tuple(input_ids.shape)}."
            )
        others = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        for name, value in others.items():
            fits = value is None or value.shape == input_ids.shape
            if not fits and not (name == "attention_mask" and cache is not None):
                raise InputError(
                    f"{name} must have the shape {tuple(input_ids.shape)} of input_ids, "
                    f"not {tuple(value.shape)}."  # pyright: ignore[reportOptionalMemberAccess]
                )
        if returns not in ("logits", "states", "phi"):
            raise InputError(f"returns must be logits, states or phi, not {returns!r}.")
        if returns == "phi" and not self.layers:
            raise InputError('returns="phi" needs a PHi layer, and there is none; ask for returns="states".')
        if returns == "phi" and not self.enabled:
            raise InputError('returns="phi" needs the PHi layer, which is disabled; enable() it first.')
        if labels is not None and (returns == "phi" or cache is not None):
            raise InputError('Losses need the whole text at once, and not returns="phi"; leave out labels.')
        if labels is not None and self.enabled and self.has_own_head:
            raise InputError(
                "The multi-token head of the base is measured as it is, and not trained; leave out labels."
            )
        if self.layers and self._is_joint(labels):
            raise InputError(
                "A shallow head beside a PHi layer learns in a base that stays as it is; call freeze_base() "
                "first, or leave out labels."
            )

    def _call_base(self, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The base's logits (B, T, V); arguments that its forward does not take are left out."""
        accepted = {
            name: value for name, value in arguments.items() if value is not None and self._accepts(name)
        }
        named = self._accepts("input_ids")
        output = self.base(input_ids=input_ids, **accepted) if named else self.base(input_ids, **accepted)
        logits = getattr(output, "logits", None)
        if logits is None:
            logits = output[0] if isinstance(output, tuple) else output
        if not (isinstance(logits, Tensor) and logits.ndim == 3 and logits.is_floating_point()):
            what = type(logits).__name__
            if isinstance(logits, Tensor):
                what = f"{str(logits.dtype).removeprefix('torch.')} of shape {tuple(logits.shape)}"
            raise InsertionError(
                f"{type(self.base).__name__} returns {what}, not logits; "
                "wrap it so that it returns logits of shape (B, T, V)."
            )
        return logits

    def _read(self, input_ids: Tensor, arguments: dict[str, Any], returns: str) -> PHiModelOutput:
        """One forward pass: logits, or the states that the output head reads, or neither."""
        head = self._output_head()
        try:
            # Finding out may take a second pass, which a cache or a compiled program would not bear.
            unknown, once = self._head_is_last is None, arguments.get("use_cache")
            last = self._head_is_last or (unknown and not once and not torch.compiler.is_compiling())
            if returns == "states" and head is not None and last:
                states, logits = self._read_states(head, input_ids, arguments)
                if self._head_is_last is None:
                    # Some models scale or cap logits after the head; theirs are taken whole.
                    with torch.no_grad():
                        self._head_is_last = len(states) == 1 and bool(
                            torch.equal(logits.float(), head(_first_tokens(states[0])).float())
                        )
                if self._head_is_last:
                    return PHiModelOutput(head=head, head_states=states[0])
                if self._pass is not None:
                    self._pass.outputs.clear()
            return PHiModelOutput(logits=self._call_base(input_ids, arguments))
        except StopForward:
            return PHiModelOutput()

    def _read_states(
        self, head: nn.Module, input_ids: Tensor, arguments: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor]:
        """What the output head would read, and the base's logits of each row's first token."""
        if not self._head or self._head[0] is not head:
            self._watch_head(head)
        self._head_states = []
        try:
            logits = self._call_base(input_ids, arguments)
            return self._head_states, logits
        finally:
            self._head_states = None

    def _output_head(self) -> Any:
        return getattr(self.base, "get_output_embeddings", lambda: None)()

    def _watch_head(self, head: nn.Module | None) -> None:
        """See what this output head reads, and no other any more; where it is asked for, the head itself is
        spared all but each row's first token."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if self._head_states is None:
                return None
            self._head_states.append(args[0])
            return (_first_tokens(args[0]), *args[1:])

        if self._head:
            self._head[1].remove()
        self._head = [] if head is None else [head, head.register_forward_pre_hook(hook)]

    @torch.no_grad()
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward pass, as `torch.nn.Module.compile`; the first call here reads two tokens."""
        device = next(self.base.parameters()).device
        with self.disabled():
            self(torch.zeros((1, 2), dtype=torch.long, device=device), returns="states")
        super().compile(*args, **kwargs)

    def _find_blocks_below(self) -> Sequence[nn.Module]:
        """The blocks up to the deepest instrument, where all insertion points are blocks."""
        try:
            _, blocks = find_blocks(self.base)
        except InsertionError:
            return ()
        numbers = [index for index, block in enumerate(blocks) if any(block is m for m in self._modules_at)]
        return list(blocks)[: max(numbers) + 1] if len(numbers) == len({*map(id, self._modules_at)}) else ()

    def read_again(
        self,
        input_ids: Tensor,
        arguments: dict[str, Any],
        number: int,
        decoded: Tensor,
        forms: dict[int, Any],
    ) -> PHiModelOutput:
        """A pass with one instrument in the path; blocks up to it do not run again.

        Args:
            input_ids: (B, T), as read before.
            number: number of the instrument, in `instruments`.
            decoded: (B, T, D) its `hidden_states`.
            forms: what `recorded_forms` noted of `blocks_below` in that pass.

        Returns:
            With `head_states`, or `logits` where the base changes them after its head.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.passing(Pass(replaced=(number, decoded))))
            if self.blocks_below:
                place = [block is self._modules_at[number] for block in self.blocks_below].index(True)
                stack.enter_context(skipped(self.blocks_below[: place + 1], forms, decoded))
            return self._read(input_ids, arguments, "states")


def _first_tokens(states: Tensor) -> Tensor:
    """(B, T, D) -> (B, 1, D), with the strides of a tensor of its own: else torch copies the weights of a
    linear map in order to multiply them."""
    return states[:, :1].clone(memory_format=torch.contiguous_format)


def in_order(config: InstrumentConfig | Sequence[InstrumentConfig]) -> list[Any]:
    """Configurations of instruments in the order of `KINDS`.

    Raises:
        ConfigError: none, two of a kind, or one in the path of another.
    """
    configs: list[Any] = list(config) if isinstance(config, Sequence) else [config]
    kinds = [getattr(one, "kind", None) for one in configs]
    names = " and ".join(kind.config.__name__ for kind in KINDS.values())
    if not configs or any(kind not in KINDS for kind in kinds):
        found = ", ".join(type(one).__name__ for one in configs) or "an empty list"
        raise ConfigError(f"attach needs {names}, one or several of them, not {found}.")
    if len({*kinds}) < len(kinds):
        raise ConfigError(f"Give each of {names} once; several PHi layers are one PHiConfig with layers.")
    if len(configs) > 1 and any(one.mode != "observe" for one in configs):
        raise ConfigError('A PHi layer in the path would disturb the other instrument; set mode="observe".')
    return sorted(configs, key=lambda one: list(KINDS).index(one.kind))


def is_pack(documents: Tensor, attention_mask: Tensor) -> bool:
    """Whether a row holds the real tokens of two documents, all (B, T)."""
    real = attention_mask != 0
    last = documents.masked_fill(~real, -1).amax(1)
    return bool((real & (documents != last[:, None])).any())


def hidden_width(base: nn.Module, module: nn.Module) -> int:
    """D of what leaves `module`: of a linear map or recurrent module its own, else the base's by its config.

    Raises:
        InsertionError: neither says.
    """
    if isinstance(module, nn.RNNBase):
        return module.proj_size or module.hidden_size
    owners = ((module, "out_features"), (text_config(base), "hidden_size"), (module, "hidden_size"))
    for owner, name in owners:
        if isinstance(getattr(owner, name, None), int):
            return getattr(owner, name)
    raise InsertionError(
        f"The width of the hidden states of {type(base).__name__} is not known; "
        "give the model a config with hidden_size."
    )
