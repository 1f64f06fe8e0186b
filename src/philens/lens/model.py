"""`PHiModel`, what people hold in their hands: a lens with its files, its checks and generation."""

from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from philens.lens import adapter, metrics
from philens.lens.config import PHiConfig
from philens.lens.core import LensCore
from philens.support.errors import ConfigError

if TYPE_CHECKING:
    from philens.lens.check import CheckReport


class PHiModel(LensCore):
    """A base model and its PHi layers. Made by `philens.attach` and `philens.load`.

    Attributes:
        base: the base model; its weights are its own.
        phi: the `PHiLayer`, or an `nn.ModuleList` of them where the config names several `layers`.
        layers: the same, always a list.
        config: their `PHiConfig`.
        blocks_below: the base's blocks up to the deepest layer; empty where an insertion point is no block.
        module_paths: their insertion points.
        enabled: whether the layers are there; `enable()`, `disable()` and `disabled()` change it.
        weight_scale: scalar that multiplies the weights of phi and the contrastive loss; schedules set it.
        source: where the layers were loaded from; None for fresh ones.
        record: how they were trained (recipe, data, metrics), for the model card; None where not known.
    """

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the layers without their base model; `philens.load` puts them back.

        Raises:
            OutputError: the folder cannot be written.
        """
        adapter.save_adapter(self, folder)

    def push_to_hub(self, repo_id: str, private: bool = False, **options: Any) -> str:
        """Upload the layers with a model card to the Hub; `philens.load(base, repo_id)` fetches them.

        Returns:
            The address of the upload.

        Raises:
            OutputError: not logged in, not allowed, or no network.
        """
        return adapter.push_to_hub(self, repo_id, private=private, **options)

    def check(self, compile: bool | str = False) -> "CheckReport":
        """Try on this very model what philens promises, and show the plan: `print(lens.check())`; see
        `philens.lens.check.check`."""
        from philens.lens.check import check

        return check(self, compile)

    def supports(self) -> dict[str, str | None]:
        """For each metric of `philens.score` why this lens cannot have it, None where it can.

        Nothing is read to know it.
        """
        return metrics.supports(self)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the base's own `generate` does, with phi and surprisal of every token; see
        `philens.lens.generation.generate`."""
        from philens.lens.generation import generate

        return generate(self, *args, **kwargs)


def attach(base: nn.Module, config: PHiConfig) -> PHiModel:
    """Insert PHi layers into a base model; nothing of the base is copied or changed.

    The layers are in the base's mode: in evaluation, where latents are not drawn, if the base is.

    Args:
        base: a causal language model: called with token ids (B, T), it returns logits (B, T, V) or an object
            that has them.
        config: the layers' options, their insertion points among them.

    Raises:
        InsertionError: an insertion point does not exist.
        ConfigError: options that do not fit the base.
    """
    if not isinstance(base, nn.Module):
        raise ConfigError(f"attach needs a torch.nn.Module, not {type(base).__name__}.")
    if isinstance(base, PHiModel):
        raise ConfigError("This model already has a PHi layer; detach() it first.")
    return PHiModel(base, config)


def load(
    base: nn.Module,
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    mode: Literal["bottleneck", "observe"] | None = None,
) -> PHiModel:
    """Insert saved PHi layers into the base model they were trained in.

    Args:
        base: the base model, with the weights it had; in another precision or quantized, it is still itself.
        folder: an adapter folder, or a Hub id where there is no such folder. Of a run folder, its adapter.
        revision: branch, tag or commit on the Hub.
        mode: `bottleneck` or `observe`, whichever it was trained in; None keeps that.

    Raises:
        AdapterError: it is missing, not accessible, damaged, of another format, or made for another base.
        ConfigError: a mode that these layers cannot be in.
    """
    if isinstance(base, PHiModel):
        raise ConfigError("This model already has a PHi layer; detach() it first.")
    return adapter.load_as(PHiModel, base, folder, revision, mode)
