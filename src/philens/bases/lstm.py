"""An LSTM language model in the shape of a `transformers` model: residual blocks, RMSNorm, tied embeddings.

The paper's LSTM has 2 layers and about 0.1B parameters (Herrmann, Csordas, Schmidhuber, arXiv 2503.13431,
section 3.1); the defaults of `LSTMConfig` give 99M at the Transformer's hidden size. In the released code the
state of one document runs on into the next of its pack; here it is reset, so a document's result does not
depend on what it is packed with. Shapes: B rows, T tokens, D hidden size, H LSTM size, V vocabulary.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from philens.bases.facts import CACHE_NAME, CACHE_NAMES
from philens.support.errors import ConfigError, InputError

# Packed sequences compute no padding, but their backward pass is about five times slower on a CPU.
_PACK_ABOVE_PADDING = 4


@strict
class LSTMConfig(PreTrainedConfig):
    """Settings of the LSTM language model; the defaults are the paper-scale model (99M parameters).

    Attributes:
        vocab_size: V; 128 is one token per ASCII character.
        hidden_size: D, width of the residual stream and so of the hidden state a PHi layer sees.
        intermediate_size: H, width of each block's LSTM, projected back to D.
        num_hidden_layers: number of residual blocks.
        rms_norm_eps: added to the mean square in each RMSNorm.
        initializer_range: standard deviation of embeddings and linear maps at the start.
        use_cache: return the LSTM states outside training, so that generation reads each token once.
        tie_word_embeddings: use the embedding matrix as the output matrix too.

    Raises:
        ConfigError: if a size is not positive.
    """

    model_type = "philens_lstm"
    keys_to_ignore_at_inference = [*CACHE_NAMES]  # noqa: RUF012

    vocab_size: int = 128
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 2
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name} of an LSTMConfig must be at least 1, not {value}.")
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Kind of each block, from which `DynamicCache(config=...)` makes one `LSTMState` per block."""
        return ["lstm"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Nothing to check: `layer_types` is derived, and the list in transformers knows no LSTM."""


class LSTMState(DynamicLayer):
    """One block's part of a `Cache`: hidden state in `keys` and cell state in `values`, (B, H) each."""

    _layer_type = "lstm"
    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cumulative_length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, tokens: int = 1, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Replace the state by a later one, (B, H) each; `tokens` columns were read in between."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        self.cumulative_length += tokens
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of token columns read so far, padding included."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Raise InputError: a recurrent state cannot forget its last tokens."""
        if tokens_to_remove:
            raise InputError("The state of an LSTM cannot be cropped; read the shorter text again instead.")


@dataclass(frozen=True)
class Segments:
    """Where the runs of tokens lie that one LSTM state passes through: N real tokens in S segments.

    A segment is a document, or the part of it that is in this batch. All index tensors are int64.
    """

    token: Tensor  # (N,) each real token's index among B * T
    slot: Tensor  # (N,) its index among S * longest
    lengths: Tensor  # (S,) tokens in each segment
    longest: int
    row: Tensor  # (S,) the row each segment lies in
    continues: Tensor  # (S,) bool: goes on from an earlier call's state
    last: Tensor  # (S,) bool: the last segment of its row

    @classmethod
    def find(cls, attention_mask: Tensor, position_ids: Tensor | None) -> "Segments":
        """Split rows where `position_ids` (B, T) is 0, leaving out tokens whose `attention_mask` (B, T) is 0.

        Raises:
            InputError: if every token is masked.
        """
        token = attention_mask.flatten().nonzero().squeeze(1)
        if not len(token):
            raise InputError("There is no token to read: give at least one token whose attention_mask is 1.")
        row = token // attention_mask.shape[1]
        changes = row.diff() != 0
        edge = changes.new_ones(1)
        restarts = torch.zeros_like(token, dtype=torch.bool)
        if position_ids is not None:
            restarts = position_ids.flatten()[token] == 0
        begins = torch.cat([edge, changes]) | restarts
        begin = begins.nonzero().squeeze(1)
        lengths = begin.diff(append=begin.new_tensor([len(token)]))
        longest = int(lengths.max())
        segment = begins.cumsum(0) - 1
        slot = segment * longest + torch.arange(len(token), device=token.device) - begin[segment]
        row = row[begin]
        last = torch.cat([row.diff() != 0, edge])
        return cls(token, slot, lengths, longest, row, ~restarts[begin], last)


class LSTMBlock(GradientCheckpointingLayer):
    """One residual block: x + out_proj(LSTM(RMSNorm(x)))."""

    def __init__(self, config: LSTMConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lstm = nn.LSTM(config.hidden_size, config.intermediate_size, batch_first=True)
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    # Each batch's documents have other lengths, for which a compiler would make a new program each time.
    @torch.compiler.disable()
    def forward(self, hidden_states: Tensor, segments: Segments, cache: Cache | None = None) -> Tensor:
        """Map hidden states (B, T, D) to (B, T, D), padding unchanged, and update this block's state."""
        batch, width, size = hidden_states.shape
        inputs = self.norm(hidden_states).reshape(batch * width, size)[segments.token]
        count = len(segments.lengths)
        padded = inputs.new_zeros(count * segments.longest, size).index_copy(0, segments.slot, inputs)
        padded = padded.view(count, segments.longest, size)

        state = None if cache is None else _find_state(cache, self.layer_idx)
        hidden = cell = inputs.new_zeros(count, self.lstm.hidden_size)
        if state is not None and state.keys is not None and state.values is not None:
            goes_on, rows = segments.continues, segments.row[segments.continues]
            hidden = hidden.masked_scatter(goes_on[:, None], state.keys[rows].to(hidden.dtype))
            cell = cell.masked_scatter(goes_on[:, None], state.values[rows].to(cell.dtype))

        # cuDNN goes backward only in training mode, and a frozen model in eval mode must pass gradients on.
        # There is no dropout, so the mode changes nothing else.
        self.lstm.training = torch.is_grad_enabled()
        outputs, (hidden, cell) = self._run(padded, (hidden, cell), segments, exact_end=state is not None)
        if state is not None:
            rows = segments.row[segments.last]
            ends = []
            for end, before in ((hidden, state.keys), (cell, state.values)):
                # A row without a real token keeps the state it had.
                before = end.new_zeros(batch, end.shape[-1]) if before is None else before.to(end.dtype)
                ends.append(before.index_copy(0, rows, end[segments.last]))
            state.update(*ends, tokens=width)

        outputs = self.out_proj(outputs.reshape(count * segments.longest, -1)[segments.slot])
        outputs = outputs.new_zeros(batch * width, size).index_copy(0, segments.token, outputs)
        return hidden_states + outputs.view(batch, width, size)

    def _run(
        self, padded: Tensor, start: tuple[Tensor, Tensor], segments: Segments, exact_end: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run S segments (S, longest, D) from two states (S, H): outputs (S, longest, H), end states (S, H).

        Only with `exact_end` are those the states at each segment's own end, not after its padding.
        """
        tokens, slots = len(segments.slot), padded.shape[0] * padded.shape[1]
        hidden, cell = start[0][None], start[1][None]
        with contextlib.ExitStack() as stack:
            if _autocast_fails(padded):
                stack.enter_context(torch.autocast("cpu", enabled=False))
                weight = self.lstm.all_weights[0][0]
                padded, hidden, cell = padded.to(weight), hidden.to(weight), cell.to(weight)
            if tokens < slots and (exact_end or slots > _PACK_ABOVE_PADDING * tokens):
                lengths = segments.lengths.cpu()
                packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
                packed, (hidden, cell) = self.lstm(packed, (hidden, cell))
                outputs, _ = pad_packed_sequence(packed, batch_first=True)
            else:
                outputs, (hidden, cell) = self.lstm(padded, (hidden, cell))
        return outputs, (hidden[0], cell[0])


def _autocast_fails(inputs: Tensor) -> bool:
    """Whether autocast asks for an LSTM in a precision that oneDNN has only for CPUs with AVX-512."""
    if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    if torch.get_autocast_dtype("cpu") == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class LSTMPreTrainedModel(PreTrainedModel):
    """What the LSTM models share: initialisation, and what `transformers` needs to know about them."""

    config: LSTMConfig
    config_class = LSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LSTMBlock"]  # noqa: RUF012
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": LSTMBlock}  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """LSTM weights: uniform within 1/sqrt(H); biases 0, but 1 for forget gates so that memory lasts."""
        if isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    initialization.uniform_(parameter, -bound, bound)
                else:
                    gates = torch.zeros_like(parameter).view(4, -1)  # input, forget, cell, output
                    # The gate adds two biases: of the input and of the recurrent map.
                    gates[1] = float(name.startswith("bias_ih"))
                    initialization.copy_(parameter, gates.view(-1))
        else:
            super()._init_weights(module)


class LSTMModel(LSTMPreTrainedModel):
    """Embeddings, residual blocks in `layers`, and a final RMSNorm."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LSTMBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens, on from a cache if given.

        Args:
            input_ids: (B, T); or `inputs_embeds` (B, T, D) in its place.
            attention_mask: (B, T), or (B, earlier + T) with a cache; 0 on padding, which may be anywhere.
            position_ids: (B, T) or (1, T); 0 starts a new document, with a fresh state. Without them a row
                is one document.
            cache: states after the tokens before, of `DynamicCache(config=model.config)`.
            use_cache: return the states after these tokens; None means the config's, and no in training.
            output_hidden_states: return the embeddings and each block's output (B, T, D), the last of them
                after the final norm.
            past_key_values: another name of `cache`, which transformers used before 5.24.

        Raises:
            InputError: if shapes do not fit together, no token is real, or the cache is another model's.
        """
        if input_ids is not None and inputs_embeds is None:
            hidden_states = self.embed_tokens(input_ids)
        elif input_ids is None and inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            raise InputError("Give either input_ids or inputs_embeds, and not both.")
        segments = _find_segments(hidden_states, attention_mask, position_ids)

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values if cache is None else cache
        if self.training and self.gradient_checkpointing:
            use_cache = False  # a block run twice would update its state twice
            if cache is not None:
                raise InputError(
                    "A cache cannot be read on while activations are checkpointed; call model.eval() first."
                )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        record = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, segments=segments, cache=cache)
            record.append(hidden_states)
        record[-1] = hidden_states = self.norm(hidden_states)

        states: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(record) if output_hidden_states else None,
            **states,
        )


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """The LSTM language model, with `generate`; `model.layers[i]` are its residual blocks."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `LSTMModel.forward`, with logits (B, T, V) and, given labels, a loss.

        Args:
            labels: (B, T), shifted here; -100 leaves a token out. The loss is the mean cross-entropy in nats.
            logits_to_keep: only the last so many positions, or the positions in a tensor; 0 means all.
        """
        base = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(base.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        states: dict[str, Any] = {CACHE_NAME: base.get(CACHE_NAME)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=base.hidden_states, **states)


@torch.compiler.disable()
def _find_segments(
    hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Segments:
    """Check the shapes of mask and positions against hidden states (B, T, D), and split the rows."""
    if hidden_states.dim() != 3:
        raise InputError(
            f"input_ids has {hidden_states.dim() - 1} dimension(s): give rows of tokens, shape (B, T)."
        )
    batch, width, _ = hidden_states.shape
    shape = f"but the tokens have {(batch, width)}: give one entry for each token."
    if attention_mask is None:
        attention_mask = torch.ones(batch, width, dtype=torch.bool, device=hidden_states.device)
    elif attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < width:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)} {shape}")
    if position_ids is not None:
        if position_ids.shape not in ((batch, width), (1, width)):
            raise InputError(f"position_ids has shape {tuple(position_ids.shape)} {shape}")
        position_ids = position_ids.expand(batch, width)
    return Segments.find(attention_mask[:, -width:], position_ids)


def _find_state(cache: Cache, index: int) -> LSTMState:
    """Block `index`'s part of a cache, which may carry more layers than the model has."""
    state = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(state, LSTMState):
        raise InputError("The cache is not of this model: make it with DynamicCache(config=model.config).")
    return state


AutoConfig.register("philens_lstm", LSTMConfig)
AutoModel.register(LSTMConfig, LSTMModel)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM)
