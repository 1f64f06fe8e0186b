"""Keep a trained PHi layer without its base model, and find it again.

An adapter folder is `adapter_config.json` + `phi_layer.safetensors` + `README.md`; loading is strict and
nothing is ever unpickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import philens
from philens.errors import AdapterError, OutputError, PhilensError
from philens.layer import PHiConfig
from philens.model import PHiModel, attach

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "phi_layer.safetensors", "README.md"


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when everything in it is written, or is removed.

    Raises:
        OutputError: it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}; choose another folder.") from error
    try:
        yield staging
        staging.chmod(0o755)
        if folder.exists():
            _check_replaceable(folder, staging)
            old = staging.with_name(staging.name + ".old")
            folder.rename(old)
            staging.rename(folder)
            shutil.rmtree(old)
        else:
            staging.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"Cannot write {folder}: {reason}; free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(folder: Path, staging: Path) -> None:
    """Only what an earlier save left may be replaced: nothing else of the user's is ever deleted."""
    if not folder.is_dir():
        raise OutputError(f"Cannot write {folder}: it is a file; choose another folder.")
    others = {path.name for path in folder.iterdir()} - {path.name for path in staging.iterdir()}
    if others:
        raise OutputError(
            f"Cannot write {folder}: it holds other files ({min(others)}); choose another folder."
        )


@torch.no_grad()
def fingerprint(model: nn.Module, samples: int = 64) -> str:
    """A hash of a model's weights: names, shapes, and values at evenly spread places of each.

    Values are read as bfloat16, so that a base loaded in another precision is still itself.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        flat = value.detach().reshape(-1)
        if flat.is_floating_point() and flat.numel():
            places = torch.linspace(0, flat.numel() - 1, min(samples, flat.numel())).long().to(flat.device)
            digest.update(flat[places].to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(lens: PHiModel, folder: str | os.PathLike[str], card: str | None = None) -> None:
    """Write the layer, its configuration and a model card; the folder appears whole or not at all.

    Args:
        card: text of the model card; None writes a short one.

    Raises:
        OutputError: it cannot be written.
    """
    base_config = getattr(lens.base, "config", None)
    description = {
        "format": FORMAT,
        "philens_version": philens.__version__,
        "phi": asdict(lens.config),
        "module_path": lens.module_path,
        "hidden_size": lens.phi.hidden_size,
        "base": {
            "class": type(lens.base).__name__,
            "model_type": getattr(base_config, "model_type", None),
            "name_or_path": getattr(base_config, "_name_or_path", None) or None,
            "fingerprint": fingerprint(lens.base),
        },
    }
    with written_whole(folder) as staging:
        weights = {name: value.detach().cpu().contiguous() for name, value in lens.phi.state_dict().items()}
        save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        (staging / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        (staging / CARD_FILE).write_text(card or _card(description))


def _card(description: dict[str, Any]) -> str:
    base, phi = description["base"], description["phi"]
    return f"""---
library_name: philens
tags: [philens, interpretability]
---

# PHi layer after `{description["module_path"]}` of a {base["class"]}

- base model: {base["name_or_path"] or "not named"} (`{base["model_type"]}`)
- hidden size: {description["hidden_size"]}
- prior: {phi["prior"]}
- KL: {phi["kl"]}
- weight of phi: {phi["phi_weight"]}
- weight of the contrastive loss: {phi["contrastive_weight"]}

```python
import philens

lens = philens.load(base, "path/to/this/folder")
```
"""


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AdapterError: there is no such file, or it is not a whole safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise AdapterError(f"There is no file {path}; check the path.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file ({error}); it is damaged or something else: "
            "fetch or save it again."
        ) from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict strictly.

    Raises:
        AdapterError: a missing or extra key, or another shape.
    """
    expected = module.state_dict()
    problems = [f"misses {key}" for key in expected.keys() - weights.keys()]
    problems += [f"has an unknown {key}" for key in weights.keys() - expected.keys()]
    problems += [
        f"has {key} of shape {tuple(weights[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise AdapterError(
            f"{source} does not fit this model: it {min(problems)}{more}; load what was saved for it."
        )
    module.load_state_dict(weights)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"There is no file {path}; give a folder that philens saved.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(
            f"{path} is not readable as JSON ({error}); it is damaged or something else."
        ) from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} does not hold a JSON object; it is damaged or something else.")
    return value


def load(base: nn.Module, folder: str | os.PathLike[str]) -> PHiModel:
    """Insert a saved PHi layer into the base model it was trained in.

    Args:
        base: the base model, with the weights it had.
        folder: an adapter folder.

    Raises:
        AdapterError: the folder is missing, damaged, newer than this program, or made for another base.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    description = read_json(path)
    if "format" not in description:
        raise AdapterError(f"{path} was not written by philens; give a folder that philens saved.")
    if description["format"] != FORMAT:
        raise AdapterError(
            f"{folder} has adapter format {description['format']!r} and this is philens "
            f"{philens.__version__}, which reads format {FORMAT}; install the version that wrote it."
        )
    options, saved_in = description.get("phi"), description.get("base")
    known = {field.name for field in fields(PHiConfig)}
    if not isinstance(options, dict) or set(options) != known or not isinstance(saved_in, dict):
        raise AdapterError(f"{path} does not hold the options of a PHi layer; it is damaged.")
    wanted, found = str(saved_in.get("fingerprint")), fingerprint(base)
    if wanted != found:
        raise AdapterError(
            f"{folder} was trained in another base model ({saved_in.get('class')}, weights {wanted[:12]}; "
            f"these are {found[:12]}); load that base first."
        )
    try:
        lens = attach(base, PHiConfig(**options))
    except (PhilensError, TypeError) as error:
        raise AdapterError(f"{path} holds options that do not work ({error}); it is damaged.") from error
    try:
        if lens.module_path != description.get("module_path"):
            belongs = description.get("module_path")
            raise AdapterError(f"{folder} belongs after {belongs}, not {lens.module_path}; it is damaged.")
        load_weights(lens.phi, read_safetensors(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    except AdapterError:
        lens.detach()
        raise
    return lens.eval()
