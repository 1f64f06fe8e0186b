"""Keep trained instruments without their base model, share them, and put them back.

An adapter folder is `adapter_config.json` + `phi_layer.safetensors` + `README.md` (the model card), of a
shallow head `mtd_head.safetensors`; loading is strict and nothing is ever unpickled.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from philens.bases import hub
from philens.bases.facts import merged_from, quantization_of
from philens.bases.fingerprint import fingerprints
from philens.lens.card import model_card
from philens.lens.config import MTDConfig
from philens.lens.core import LensCore
from philens.lens.instrument import KINDS, titles
from philens.support.errors import AdapterError, ConfigError, OutputError, PhilensError
from philens.support.files import (
    file_hash,
    load_weights,
    not_finite,
    read_json,
    read_safetensors,
    written_whole,
)
from philens.support.versions import __version__, versions

logger = logging.getLogger(__name__)

Lens = TypeVar("Lens", bound=LensCore)

FORMAT = 2
OWN = "own"  # what the multi-token head that a base brings along is loaded by
CONFIG_FILE, CARD_FILE = "adapter_config.json", "README.md"
_KEYS = {"format", "module_paths", "hidden_size", "base", "training", "versions", "weights_sha256"}
_OWN_HASH = "config_sha256"


def describe_base(base: nn.Module) -> dict[str, Any]:
    """What an adapter remembers of its base model.

    A model's folder is remembered by its name only: where it lies on this machine is nobody else's business.
    """
    config = getattr(base, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    revision = getattr(config, "_commit_hash", None)
    if name is not None and (revision is None or hub.is_folder(name)):
        name, revision = Path(name).name or None, None
    return {
        "class": type(base).__name__,
        "model_type": getattr(config, "model_type", None),
        "name_or_path": name,
        "revision": revision,
        "dtype": _dtype(base),
        "quantization": quantization_of(base),
        "fingerprints": fingerprints(base),
        **({} if (merged := merged_from(base)) is None else {"merged_from": merged}),
    }


def _dtype(base: nn.Module) -> str:
    parameter = next(base.parameters(), None)
    return str(getattr(base, "dtype", getattr(parameter, "dtype", None))).removeprefix("torch.")


def save_adapter(
    lens: LensCore,
    folder: str | os.PathLike[str],
    card: str | None = None,
    training: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> None:
    """Write the instruments, their options and a model card; the folder appears whole or not at all.

    Args:
        card: text of the model card; None writes one.
        training: what the card says of the training: `recipe` (a dict), `data` (a text, or a list of texts)
            and `metrics` (name to number, or part of the data to such a dict). None keeps what a loaded lens
            brought with it.
        repo_id: the Hub id the card's loading snippet names.

    Raises:
        OutputError: it cannot be written.
        ConfigError: the multi-token head is the base's own.
    """
    if lens.has_own_head:
        raise ConfigError(
            "The multi-token head of a base is saved with the base; load it as the adapter 'own'."
        )
    training = getattr(lens, "record", None) if training is None else training
    kinds = [config.kind for config in lens.configs]
    description = {
        "format": FORMAT,
        # A PHi layer by itself is what an adapter held before there were others.
        **({} if kinds == ["phi"] else {"instruments": kinds}),
        **{config.kind: asdict(config) for config in lens.configs},
        "module_paths": lens.module_paths,
        "hidden_size": lens.instruments[0].hidden_size,
        "base": describe_base(lens.base),
        "training": json.loads(json.dumps(training, default=str)),
        "versions": versions("torch", "transformers", "python"),
    }
    if card is None:
        card = model_card(description, hub.licence_of(lens.base), repo_id)
    with written_whole(folder) as staging:
        hashes = {}
        for kind in kinds:
            path, values = staging / KINDS[kind].file, getattr(lens, kind).state_dict().items()
            weights = {name: value.detach().cpu().contiguous() for name, value in values}
            save_file(weights, path, metadata={"format": "pt"})
            hashes[kind] = file_hash(path)
        description["weights_sha256"] = hashes if len(kinds) > 1 else hashes[kinds[0]]
        description[_OWN_HASH] = _hash_of(description)
        (staging / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (staging / CARD_FILE).write_text(card, encoding="utf-8")


def _hash_of(description: Mapping[str, Any]) -> str:
    """SHA-256 of what an adapter's configuration says, in hexadecimal, its own hash aside."""
    rest = {key: value for key, value in description.items() if key != _OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def push_to_hub(
    lens: LensCore,
    repo_id: str,
    private: bool = False,
    *,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    card: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """Upload the layers with a model card; `philens.load(base, repo_id)` fetches them.

    Args:
        repo_id: `owner/name`; made if there is no such repository.
        private: whether a new repository is private; an existing public one is then refused.
        revision: branch to upload to, made if there is none; None is the main branch.
        commit_message: None says what is uploaded.
        token: None takes the one of `hf auth login` or HF_TOKEN.
        card, training: as in `save_adapter`.

    Returns:
        The address of the repository.

    Raises:
        OutputError: not logged in, not allowed, or no network.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        save_adapter(lens, folder, card, training, repo_id)
        try:
            address = str(api.create_repo(repo_id, private=private, exist_ok=True))
            if private and not api.model_info(repo_id).private:
                raise OutputError(
                    f"{repo_id} is public already; make it private there or choose another name."
                )
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or f"{titles(lens.configs)}, by philens",
            )
        except PhilensError:
            raise
        except Exception as error:  # anything a network can do
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                advice = (
                    "the Hub refuses it; log in with `hf auth login` or set HF_TOKEN, as one who may write"
                )
            else:
                advice = f"{hub.reason(error)}; check the name and the network"
            raise OutputError(f"Cannot upload to {repo_id}: {advice}.") from error
    return address


def load_as(
    kind: type[Lens],
    base: nn.Module,
    folder: str | os.PathLike[str],
    revision: str | None = None,
    mode: Literal["bottleneck", "observe"] | None = None,
) -> Lens:
    """A lens of this class with saved instruments, in evaluation mode; see `philens.load`."""
    if folder == OWN and not hub.is_folder(folder):
        lens = kind(base, MTDConfig(own=True))
        lens.source = OWN
        return lens.eval()
    folder, source = _find(folder, revision)
    try:
        return _load(kind, base, folder, source, mode)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, PhilensError) or _OWN_HASH in read_json(folder / CONFIG_FILE):
            raise
        raise _unusable(folder, error) from error  # nothing vouches for what it says


def load_together(
    kind: type[Lens],
    base: nn.Module,
    folders: Sequence[str | os.PathLike[str]],
    revision: str | None = None,
    mode: Literal["bottleneck", "observe"] | None = None,
) -> Lens:
    """A lens of this class with the instruments of several adapters, which were trained apart."""
    apart = []
    for folder in folders:
        apart.append(load_as(kind, base, folder, revision))
        apart[-1].detach()
    parts = [(config, getattr(one, config.kind)) for one in apart for config in one.configs]
    lens = kind(base, [_in_mode(config, mode or "observe") for config, _ in parts])
    for config, part in parts:
        getattr(lens, config.kind).load_state_dict(part.state_dict())
    lens.source = ", ".join(str(one.source) for one in apart)
    return lens.eval()


def _load(
    kind: type[Lens],
    base: nn.Module,
    folder: Path,
    source: str,
    mode: Literal["bottleneck", "observe"] | None,
) -> Lens:
    description = _read_description(folder)
    names = description.get("instruments", ["phi"])
    try:
        configs: list[Any] = [KINDS[name].config(**description[name]) for name in names]
    except (PhilensError, TypeError) as error:
        raise _unusable(folder, error) from error
    if mode is not None:
        configs = [_in_mode(config, mode) for config in configs]
    _check_base(description["base"], base, source)
    weights = {name: read_weights(folder / KINDS[name].file) for name in names}
    try:
        lens = kind(base, configs)
    except PhilensError as error:
        raise _unusable(folder, error) from error
    try:
        if lens.module_paths != description["module_paths"]:
            belongs, goes = (", ".join(p) for p in (description["module_paths"], lens.module_paths))
            raise AdapterError(f"{folder} belongs after {belongs}, not {goes}; it is damaged.")
        hashes = description["weights_sha256"]
        hashes = hashes if isinstance(hashes, dict) else {names[0]: hashes}
        for name in names:
            path = folder / KINDS[name].file
            load_weights(getattr(lens, name), weights[name], path)
            if (weight := not_finite(getattr(lens, name))) is not None:
                raise AdapterError(
                    f"{path} holds a weight that is not finite ({weight}); train the layer anew."
                )
            if file_hash(path) != hashes.get(name):
                raise AdapterError(f"{path} is not as it was saved; fetch or save it again.")
    except Exception:
        lens.detach()
        raise
    lens.source, lens.record = source, description["training"]
    return lens.eval()


def _in_mode(config: Any, mode: Literal["bottleneck", "observe"]) -> Any:
    """The same options in another mode."""
    if config.mode == mode:
        return config
    if config.kind != "phi":
        raise ConfigError(f"A {titles([config])} only observes; leave out mode={mode!r}.")
    # What pressed in training no longer matters, but reconstruction is of one mode only.
    only_observing = mode == "bottleneck" and config.pressure == "reconstruction"
    return replace(config, mode=mode, pressure="next_token" if only_observing else config.pressure)


def load_instruments(lens: LensCore, folder: Path) -> None:
    """Load the weights that `save_adapter` wrote into instruments of the same shape.

    Raises:
        AdapterError: they are missing, damaged or of others.
    """
    for config in lens.configs:
        path = folder / KINDS[config.kind].file
        load_weights(getattr(lens, config.kind), read_weights(path), path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a saved instrument by name, with defaults for what there was not yet when it was saved.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    weights = read_safetensors(path)
    encoders = [name for name in weights if name.endswith("encoder.weight")]
    later = {name.replace("encoder.weight", "sink_norm"): torch.zeros(()) for name in encoders}
    return later | weights


def _find(folder: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    """The adapter's folder, and what to call it."""
    name = os.fspath(folder)
    files = (CONFIG_FILE, *(kind.file for kind in KINDS.values()), CARD_FILE)
    found, commit = hub.find(name, files, "adapter", CONFIG_FILE, revision=revision)
    return found, name if commit is None else f"{name}@{commit}"


def _unusable(folder: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{folder / CONFIG_FILE} holds options that do not work ({hub.reason(error)}); it is damaged."
    )


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    description = read_json(path)
    if "format" not in description:
        raise AdapterError(f"{path} was not written by philens; give a folder that philens saved.")
    if description["format"] != FORMAT:
        raise AdapterError(
            f"{folder} has adapter format {description['format']!r} and this is philens "
            f"{__version__}, which reads format {FORMAT}; install the version that wrote it."
        )
    # Adapters of philens 0.1 have no hash of their configuration.
    if description.get(_OWN_HASH, own := _hash_of(description)) != own:
        raise AdapterError(f"{path} is not as it was saved; fetch or save it again.")
    kinds = description.get("instruments", ["phi"])
    unknown = [f"is of an instrument {kind!r}" for kind in sorted({*kinds} - KINDS.keys())]
    if not unknown and set(description) - {_OWN_HASH, "instruments"} != _KEYS | {*kinds}:
        raise AdapterError(f"{path} does not hold the options of a PHi layer; it is damaged.")
    for kind in [] if unknown else kinds:
        # Options that came later have their defaults in an older file.
        known = {field.name for field in fields(KINDS[kind].config)}
        unknown += [f"has an option {name!r}" for name in sorted(description[kind].keys() - known)]
    if unknown:
        wrote = description["versions"].get("philens")
        raise AdapterError(
            f"{path} {unknown[0]} that this philens {__version__} does not know; install philens {wrote}, "
            "which wrote it, or a newer one."
        )
    return description


def _check_base(saved_in: dict[str, Any], base: nn.Module, source: str) -> None:
    """Raise an AdapterError unless the adapter was trained in this base."""
    saved, found = saved_in["fingerprints"], fingerprints(base)
    # All weights where both have them, else those that neither has quantized.
    key = "weights" if saved["weights"] and found["weights"] else "unquantized_weights"
    if not set(saved[key]) & set(found[key]):
        name = saved_in.get("name_or_path") or saved_in.get("class")
        first = saved[key][0][:12] if saved[key] else "unknown"
        raise AdapterError(
            f"{source} was trained in another base model ({name}, weights {first}; "
            f"these are {found[key][0][:12]}); load that base first."
        )
    if saved_in.get("quantization") != quantization_of(base):
        logger.warning(
            "%s was trained in a base with weights in %s, these are in %s: phi differs somewhat.",
            source,
            saved_in.get("quantization") or saved_in.get("dtype"),
            quantization_of(base) or _dtype(base),
        )
