"""Adapters of peft (LoRA and its like): what a folder with one says, and a base that one is merged into."""

from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import nn

from philens.bases.facts import set_merged_from
from philens.bases.fingerprint import fingerprint
from philens.support.errors import AdapterError
from philens.support.extras import require
from philens.support.files import check_safetensors, file_hash, read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Lora(NamedTuple):
    """An adapter of peft.

    Attributes:
        base: the model that it belongs to, a folder or Hub id.
        revision: revision of the base; None where it names none.
    """

    folder: Path
    base: str
    revision: str | None


def read(folder: Path, name: str) -> Lora | None:
    """The adapter of peft in a folder; None where there is none.

    Raises:
        ConfigError: peft is not installed.
        AdapterError: it is damaged, or names no base.
    """
    path = folder / CONFIG_FILE
    if not path.is_file() or "peft_type" not in (config := read_json(path)):
        return None
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise AdapterError(
            f"{name} is an adapter of peft that names no base model; write it into {path} as "
            "base_model_name_or_path."
        )
    check_safetensors(folder / WEIGHTS_FILE)
    _peft(name)  # before the base is fetched
    return Lora(folder, base, revision if isinstance(revision, str) else None)


def _peft(name: str) -> Any:
    return require("peft", "lora", f"{name}, an adapter of peft,")


def merge(base: nn.Module, lora: Lora, name: str) -> Any:
    """A base with an adapter merged into its weights, which `merged_from` tells.

    Raises:
        AdapterError: the adapter does not fit the base, or is of a kind that has no merged form.
    """
    peft = _peft(name)
    origin = {
        "base": getattr(base.config, "_name_or_path", None),
        "revision": getattr(base.config, "_commit_hash", None),
        "fingerprint": fingerprint(base),
        "lora_sha256": file_hash(lora.folder / WEIGHTS_FILE),
    }
    with safe_open(lora.folder / WEIGHTS_FILE, framework="pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    # An adapter may bring a vocabulary of its own.
    rows = [
        shape[0] for key, shape in shapes.items() if key.endswith(("embed_tokens.weight", "lm_head.weight"))
    ]
    if rows and rows[0] != base.get_input_embeddings().weight.shape[0]:  # pyright: ignore[reportCallIssue]
        base.resize_token_embeddings(rows[0])  # pyright: ignore[reportCallIssue]
    known = {f"base_model.model.{key}" for key in base.state_dict()}
    model = peft.PeftModel.from_pretrained(base, lora.folder)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise AdapterError(
            f"{name} is an adapter of the kind {model.peft_type.value}, which has no merged form; "
            "give one that changes weights, such as a LoRA."
        )
    wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    problems = [f"misses {key}" for key in wanted - shapes.keys()]
    problems += [f"has an unknown {key}" for key in shapes.keys() - wanted - known]
    if problems:
        raise AdapterError(
            f"The adapter in {name} does not fit {lora.base}: it {min(problems)}; it is damaged or of "
            "another base."
        )
    merged = model.merge_and_unload(safe_merge=True)
    set_merged_from(merged, origin)
    return merged
