"""A base model with a PHi layer in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philens.errors import ConfigError, InputError, InsertionError
from philens.insertion import find_insertion_point, text_config, transform_output
from philens.layer import PHiConfig, PHiLayer, PHiOutput


@dataclass
class PHiModelOutput:
    """What a `PHiModel` returns.

    Attributes:
        loss: scalar, next-token cross-entropy + phi_weight * phi / L + contrastive_weight * contrastive loss
            (phi itself with `reduction="sum"`), each averaged over the tokens that carry a label. None
            without labels.
        logits: (B, T, V).
        phi: (B, T) PHi loss in nats, float32, 0 on padding. None while the layer is disabled.
        losses: means over labelled tokens, detached: `surprisal` and `phi` in nats per token, `contrastive`.
        layer_output: everything the layer computed. None while it is disabled.
    """

    loss: Tensor | None
    logits: Tensor
    phi: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    layer_output: PHiOutput | None = None


class PHiModel(nn.Module):
    """A base model and the PHi layer in its path. Made by `philens.attach`.

    Attributes:
        base: the base model; its weights are its own.
        phi: the `PHiLayer`.
        config: its `PHiConfig`.
        module_path: the insertion point.
        enabled: whether the layer is in the path; `enable()`, `disable()` and `disabled()` change it.
        weight_scale: scalar that multiplies the weights of phi and the contrastive loss; schedules set it.
    """

    weight_scale: Tensor

    def __init__(self, base: nn.Module, config: PHiConfig) -> None:
        super().__init__()
        path, block = find_insertion_point(base, config.layer, config.module)
        parameter = next(iter(block.parameters()), None)
        self.base = base
        self.config = config
        self.module_path = path
        self.phi = PHiLayer(hidden_width(base, block), config)
        if parameter is not None:
            self.phi.to(parameter.device)
        self.register_buffer("weight_scale", torch.ones(()), persistent=False)
        # From the base's outermost module to the block. A list, as the module tree has them already.
        names = path.split(".")
        self._path = [base.get_submodule(".".join(names[: depth + 1])) for depth in range(len(names))]
        self._not_recomputed: list[nn.Module] = []
        self._structure: tuple[Tensor | None, Tensor | None] = (None, None)
        self._output: PHiOutput | None = None
        self._handle = transform_output(block, self._through_layer)
        # By itself, as torch.compile cannot look at the handle.
        self.enabled = True

    def _through_layer(self, hidden_states: Tensor) -> Tensor:
        output = self.phi(hidden_states, *self._structure)
        self._output = output
        return output.hidden_states

    def enable(self) -> None:
        """Put the layer into the path."""
        if not self.enabled:
            self._handle = transform_output(self._path[-1], self._through_layer)
            self.enabled = True

    def disable(self) -> None:
        """Take the layer out of the path; the model is then exactly the base model."""
        if self.enabled:
            self._handle.remove()
            self.enabled = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is exactly the base model."""
        was = self.enabled
        self.disable()
        try:
            yield
        finally:
            if was:
                self.enable()

    def detach(self) -> nn.Module:
        """Remove the layer for good and return the base model as it was."""
        self.disable()
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            for module in self._not_recomputed:
                module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        return self.base

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the layer without its base model; `philens.load` puts it back.

        Raises:
            OutputError: the folder cannot be written.
        """
        from philens.adapter import save_adapter

        save_adapter(self, folder)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the base's activations in the backward pass, those of the layer's own block excepted."""
        self.base.gradient_checkpointing_enable(**kwargs)  # pyright: ignore[reportCallIssue]

    def _run_once(self) -> None:
        """Take what holds the layer out of activation checkpointing: recomputed, it would run twice."""
        for module in self._path:
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]
                self._not_recomputed.append(module)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> PHiModelOutput:
        """Read tokens; with labels, compute the training loss.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 on padding, on either side; on the left, a base with absolute positions
                needs position_ids, as in transformers.
            position_ids: (B, T). Where they do not go up by one, a new document starts (the convention of
                transformers for packs); padding in a pack is then a document of its own.
            labels: (B, T), -100 on tokens that do not count. A token's own id, not the next one's; a
                document's first token is never predicted from the document before it.
            kwargs: passed to the base model.

        Raises:
            InputError: shapes that do not fit.
        """
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise InputError(
                f"input_ids must have shape (B, T) with at least one token, not {tuple(input_ids.shape)}."
            )
        others = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        for name, value in others.items():
            if value is not None and value.shape != input_ids.shape:
                raise InputError(
                    f"{name} must have the shape {tuple(input_ids.shape)} of input_ids, "
                    f"not {tuple(value.shape)}."
                )
        if kwargs.get("past_key_values") is not None:
            raise InputError("The prior keeps no cache: give the whole text, without past_key_values.")
        if self.enabled:
            self._run_once()
        documents = None if position_ids is None else document_ids(position_ids)
        self._structure, self._output = (attention_mask, documents), None
        if documents is None:
            kwargs["attention_mask"] = attention_mask
        else:
            # The base sees documents by their positions; a padding mask beside them would switch that off.
            kwargs["position_ids"] = position_ids
        logits = self.base(input_ids=input_ids, use_cache=False, **kwargs).logits
        output, self._output, self._structure = self._output, None, (None, None)
        if self.enabled and output is None:
            raise InsertionError(
                f"{self.module_path} did not run in the forward pass; choose another insertion point."
            )
        result = PHiModelOutput(None, logits, None if output is None else output.phi, layer_output=output)
        if labels is not None:
            self._add_losses(result, output, labels, attention_mask, documents)
        return result

    def _add_losses(
        self,
        result: PHiModelOutput,
        output: PHiOutput | None,
        labels: Tensor,
        attention_mask: Tensor | None,
        documents: Tensor | None,
    ) -> None:
        counted = labels != -100
        if attention_mask is not None:
            counted = counted & (attention_mask != 0)
        predicted = counted[:, 1:]
        if documents is not None:
            predicted = predicted & (documents[:, 1:] == documents[:, :-1])
        elif attention_mask is not None:
            predicted = predicted & (attention_mask[:, :-1] != 0)
        targets = labels[:, 1:].masked_fill(~predicted, -100)
        logits = result.logits[:, :-1].flatten(0, 1).float()
        surprisal = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        surprisal = surprisal / predicted.sum().clamp(min=1)
        loss, result.losses = surprisal, {"surprisal": surprisal.detach()}
        if output is not None:
            weights, count = counted.float(), counted.sum().clamp(min=1)
            phi = (output.phi * weights).sum() / count
            scale = 1.0 if self.config.reduction == "sum" else 1.0 / self.phi.latent_size
            loss = loss + self.weight_scale * self.config.phi_weight * scale * phi
            result.losses["phi"] = phi.detach()
            if output.contrastive is not None:
                contrastive = (output.contrastive * weights).sum() / count
                loss = loss + self.weight_scale * self.config.contrastive_weight * contrastive
                result.losses["contrastive"] = contrastive.detach()
        result.loss = loss


def document_ids(position_ids: Tensor) -> Tensor:
    """(B, T) positions -> (B, T) documents from 0 on; one starts where positions do not go up by one."""
    jumps = torch.diff(position_ids, dim=1) != 1
    return F.pad(jumps.long().cumsum(1), (1, 0))


def hidden_width(base: nn.Module, module: nn.Module) -> int:
    """D of what leaves `module`: of a linear map its own, else the base's by its config.

    Raises:
        InsertionError: neither says.
    """
    owners = ((module, "out_features"), (text_config(base), "hidden_size"), (module, "hidden_size"))
    for owner, name in owners:
        if isinstance(getattr(owner, name, None), int):
            return getattr(owner, name)
    raise InsertionError(
        f"The width of the hidden states of {type(base).__name__} is not known; "
        "give the model a config with hidden_size."
    )


def attach(base: nn.Module, config: PHiConfig) -> PHiModel:
    """Insert a PHi layer into a base model; nothing of the base is copied or changed.

    Args:
        base: a causal language model: called with input_ids, it returns an object with logits (B, T, V).
        config: the layer's options, its insertion point among them.

    Raises:
        InsertionError: the insertion point does not exist.
        ConfigError: options that do not fit the base.
    """
    if not isinstance(base, nn.Module):
        raise ConfigError(f"attach needs a torch.nn.Module, not {type(base).__name__}.")
    if isinstance(base, PHiModel):
        raise ConfigError("This model already has a PHi layer; detach() it first.")
    return PHiModel(base, config)
