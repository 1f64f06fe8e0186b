"""Keep trained PHi layers without their base model, share them, and put them back.

An adapter folder is `adapter_config.json` + `phi_layer.safetensors` + `README.md` (the model card); loading
is strict and nothing is ever unpickled.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
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
from philens.lens.config import PHiConfig
from philens.lens.core import LensCore
from philens.lens.layer import PHiLayer
from philens.support.errors import AdapterError, OutputError, PhilensError
from philens.support.files import (
    check_weights,
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
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "phi_layer.safetensors", "README.md"
_KEYS = {"format", "phi", "module_paths", "hidden_size", "base", "training", "versions", "weights_sha256"}
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
    """Write the layers, their configuration and a model card; the folder appears whole or not at all.

    Args:
        card: text of the model card; None writes one.
        training: what the card says of the training: `recipe` (a dict), `data` (a text, or a list of texts)
            and `metrics` (name to number, or part of the data to such a dict). None keeps what a loaded lens
            brought with it.
        repo_id: the Hub id the card's loading snippet names.

    Raises:
        OutputError: it cannot be written.
    """
    training = getattr(lens, "record", None) if training is None else training
    description = {
        "format": FORMAT,
        "phi": asdict(lens.config),
        "module_paths": lens.module_paths,
        "hidden_size": lens.layers[0].hidden_size,
        "base": describe_base(lens.base),
        "training": json.loads(json.dumps(training, default=str)),
        "versions": versions("torch", "transformers", "python"),
    }
    if card is None:
        card = model_card(description, hub.licence_of(lens.base), repo_id)
    with written_whole(folder) as staging:
        weights = {name: value.detach().cpu().contiguous() for name, value in lens.phi.state_dict().items()}
        save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        description["weights_sha256"] = file_hash(staging / WEIGHTS_FILE)
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
    commit_message: str = "PHi layer, by philens",
    token: str | None = None,
    card: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """Upload the layers with a model card; `philens.load(base, repo_id)` fetches them.

    Args:
        repo_id: `owner/name`; made if there is no such repository.
        private: whether a new repository is private; an existing public one is then refused.
        revision: branch to upload to, made if there is none; None is the main branch.
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
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
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
    """A lens of this class with saved layers, in evaluation mode; see `philens.load`."""
    folder, source = _find(folder, revision)
    description = _read_description(folder)
    try:
        config = PHiConfig(**description["phi"])
    except (PhilensError, TypeError) as error:
        raise _unusable(folder, error) from error
    if mode is not None:
        # What pressed in training no longer matters, but reconstruction is of one mode only.
        only_observing = mode == "bottleneck" and config.pressure == "reconstruction"
        pressure = "next_token" if only_observing else config.pressure
        config = replace(config, mode=mode, pressure=pressure)
    _check_base(description["base"], base, source)
    weights = read_layers(folder / WEIGHTS_FILE)
    _check_weights(config, description["hidden_size"], weights, folder)
    try:
        lens = kind(base, config)
    except PhilensError as error:
        raise _unusable(folder, error) from error
    try:
        if lens.module_paths != description["module_paths"]:
            belongs, goes = (", ".join(p) for p in (description["module_paths"], lens.module_paths))
            raise AdapterError(f"{folder} belongs after {belongs}, not {goes}; it is damaged.")
        load_weights(lens.phi, weights, folder / WEIGHTS_FILE)
        if (name := not_finite(lens.phi)) is not None:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE} holds a weight that is not finite ({name}); train the layer anew."
            )
        # Adapters of philens 0.1 have no hash of their configuration.
        for file, found, saved in (
            (WEIGHTS_FILE, file_hash(folder / WEIGHTS_FILE), description["weights_sha256"]),
            (CONFIG_FILE, _hash_of(description), description.get(_OWN_HASH, _hash_of(description))),
        ):
            if found != saved:
                raise AdapterError(f"{folder / file} is not as it was saved; fetch or save it again.")
    except AdapterError:
        lens.detach()
        raise
    lens.source, lens.record = source, description["training"]
    return lens.eval()


def read_layers(path: Path) -> dict[str, Tensor]:
    """The weights of saved layers by name, with defaults for what layers had not yet when they were saved.

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
    files = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
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
    options, base = description.get("phi"), description.get("base")
    known = {field.name for field in fields(PHiConfig)}
    saved = base.get("fingerprints") if isinstance(base, dict) else None
    whole = (
        set(description) - {_OWN_HASH} == _KEYS
        and isinstance(options, dict)
        and isinstance(description["hidden_size"], int)
        and isinstance(saved, dict)
        and all(_is_texts(saved.get(key)) for key in ("weights", "unquantized_weights"))
        and _is_texts(description.get("module_paths"))
        and isinstance(description.get("training"), dict | None)
        and isinstance(description.get("weights_sha256"), str)
        and isinstance(description.get("versions"), dict)
    )
    if not whole:
        raise AdapterError(f"{path} does not hold the options of a PHi layer; it is damaged.")
    # Options that came later have their defaults in an older file.
    if unknown := sorted(options.keys() - known):  # pyright: ignore[reportOptionalMemberAccess]
        raise AdapterError(
            f"{path} has an option {unknown[0]!r} that this philens {__version__} does not know; "
            f"install philens {description['versions'].get('philens')}, which wrote it, or a newer one."
        )
    return description


def _check_weights(config: PHiConfig, hidden_size: int, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise an AdapterError unless these are the weights that the options ask for, at no cost in memory."""
    count = 1 if config.layers is None else len(config.layers)
    if count * config.prior_depth > len(weights):
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds fewer layers than {CONFIG_FILE} says; it is damaged."
        )
    try:
        with torch.device("meta"):
            layers = [PHiLayer(hidden_size, config) for _ in range(count)]
    except (PhilensError, RuntimeError, TypeError, OverflowError) as error:
        raise _unusable(folder, error) from error
    check_weights(
        layers[0] if config.layers is None else nn.ModuleList(layers), weights, folder / WEIGHTS_FILE
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


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
