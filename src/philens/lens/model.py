"""`PHiModel`, what people hold in their hands: a lens with its files, its checks and generation."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from philens.lens import adapter, metrics
from philens.lens.config import InstrumentConfig
from philens.lens.core import LensCore
from philens.lens.instrument import titles
from philens.support.errors import ConfigError

if TYPE_CHECKING:
    from philens.lens.check import CheckReport


class PHiModel(LensCore):
    """A base model and its instruments: PHi layers, a shallow head. Made by `philens.attach` and
    `philens.load`.

    Attributes:
        base: the base model; its weights are its own.
        phi: the `PHiLayer`, or an `nn.ModuleList` of them where the config names several `layers`; missing
            where there is none.
        layers: the same, always a list.
        mtd: the `MTDHead`; missing where there is none.
        instruments: all of these; `attached` is all as one module.
        config: the `PHiConfig`, or the `MTDConfig` of a shallow head alone; `configs` has all.
        blocks_below: the base's blocks up to the deepest of them; empty where an insertion point is no block.
        module_paths: their insertion points.
        enabled: whether they are there; `enable()`, `disable()` and `disabled()` change it.
        weight_scale: scalar that multiplies the weights of phi and the contrastive loss; schedules set it.
        source: where they were loaded from; None for fresh ones.
        metric_options: `MetricOptions`, by which depths of settling and confidence are measured.
        record: how they were trained (recipe, data, metrics), for the model card; None where not known.
    """

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the instruments without their base model; `philens.load` puts them back.

        Raises:
            OutputError: the folder cannot be written.
        """
        adapter.save_adapter(self, folder)

    def push_to_hub(self, repo_id: str, private: bool = False, **options: Any) -> str:
        """Upload the instruments with a model card to the Hub; `philens.load(base, repo_id)` fetches them.

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


def attach(base: nn.Module, config: InstrumentConfig | Sequence[InstrumentConfig]) -> PHiModel:
    """Insert PHi layers or a shallow head into a base model; nothing of the base is copied or changed.

    The layers are in the base's mode: in evaluation, where latents are not drawn, if the base is.

    Args:
        base: a causal language model: called with token ids (B, T), it returns logits (B, T, V) or an object
            that has them.
        config: a `PHiConfig` or `MTDConfig`; or both in a list: then both watch one pass, and the PHi layer
            needs `mode="observe"`.

    Raises:
        InsertionError: an insertion point does not exist.
        ConfigError: options that do not fit the base.
    """
    if not isinstance(base, nn.Module):
        raise ConfigError(f"attach needs a torch.nn.Module, not {type(base).__name__}.")
    if isinstance(base, PHiModel):
        raise ConfigError(f"This model already has a {titles(base.configs)}; detach() it first.")
    return PHiModel(base, config)


def load(
    base: nn.Module,
    folder: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    revision: str | None = None,
    mode: Literal["bottleneck", "observe"] | None = None,
) -> PHiModel:
    """Insert saved PHi layers or a saved shallow head into the base model they were trained in.

    Args:
        base: the base model, with the weights it had; in another precision or quantized, it is still itself.
        folder: an adapter folder, or a Hub id where there is no such folder. Of a run folder, its adapter.
            `own` is the multi-token head that the base brings along, as `MTDConfig(own=True)`. Of a PHi layer
            and a shallow head that were trained apart, a list of both: they watch one pass, and the layer
            observes.
        revision: branch, tag or commit on the Hub.
        mode: `bottleneck` or `observe`, whichever it was trained in; None keeps that.

    Raises:
        AdapterError: it is missing, not accessible, damaged, of another format, or made for another base.
        ConfigError: a mode that these layers cannot be in, or a list with two of a kind or with nothing.
    """
    if isinstance(base, PHiModel):
        raise ConfigError(f"This model already has a {titles(base.configs)}; detach() it first.")
    folders = [folder] if isinstance(folder, str | PathLike) else list(folder)
    if len(folders) == 1:
        return adapter.load_as(PHiModel, base, folders[0], revision, mode)
    return adapter.load_together(PHiModel, base, folders, revision, mode)
