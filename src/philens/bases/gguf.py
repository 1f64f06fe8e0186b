"""GGUF files, the form in which llama.cpp keeps models, as base models: dequantised, then like any other.

`transformers` converts weights, configuration and vocabulary. What it leaves open is settled here: which file
it is and whether it is whole, the precision, and how the tokenizer splits a text before it looks for tokens.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import logging
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from philens.support.errors import AdapterError, ConfigError
from philens.support.extras import require
from philens.support.files import check_file

logger = logging.getLogger(__name__)

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# How values in a header are laid out, by their number; strings and arrays have a length first.
_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
# Types of tensors that are plain numbers.
_PRECISIONS = {30: "bfloat16", 1: "float16", 0: "float32"}
# Tensors about rotary positions begin so; they are no weights.
_ROTARY = "rope_"
# The factor of each rotary frequency, and what those of Llama 3 are computed from.
_FACTORS = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What byte-level tokenizers do, as llama.cpp does it by the name in `tokenizer.ggml.pre`, where transformers
# leaves it to GPT-2's way: part every digit; nothing more; take a word that is a token without merging, and
# begin texts with a token unless the file says otherwise.
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_LIKE_GPT2 = (
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat"),
    *("a.x-4.0", "mellum"),
)
_LIKE_LLAMA3 = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("jina-v5-nano", "tekken"),
)


class Held(NamedTuple):
    """A tensor in a file: how many weights it has, the number of their type, and where it begins."""

    count: int
    kind: int
    place: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights.

    Attributes:
        values: values by key, as `general.architecture`; of arrays their length.
        tensors: tensors by name.
    """

    values: dict[str, Any]
    tensors: dict[str, Held]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    @property
    def dtype(self) -> str:
        """The precision that loses nothing: that of a file without quantization, else `float32`."""
        kinds = {tensor.kind for tensor in self.tensors.values()}
        plain = kinds <= set(_PRECISIONS)
        return next((name for kind, name in _PRECISIONS.items() if kind in kinds and plain), "float32")

    def count_weights(self, tied: bool) -> int:
        """How many weights a model has of it; one that is `tied` has no output matrix of its own."""
        own = {name: tensor.count for name, tensor in self.tensors.items() if not name.startswith(_ROTARY)}
        return sum(count for name, count in own.items() if not (tied and name == "output.weight"))


def find(name: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a name stands for: the file, or the only one in a folder without other weights.

    Raises:
        AdapterError: there are several in the folder, or there is no file with a name like that.
    """
    path = Path(name)
    try:
        if path.is_dir():
            found = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
        else:
            found = [path] if path.suffix == ".gguf" or _begins_like_one(path) else []
    except (OSError, ValueError):
        return None
    if len(found) > 1:
        names = ", ".join(one.name for one in found[:3])
        raise AdapterError(f"{path} holds {len(found)} GGUF files ({names}); name one of them.")
    return found[0] if found else None


def _begins_like_one(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class _Reading:
    """A file's bytes, read in order."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self.data, self.place)
        self.skip(struct.calcsize(f"<{layout}"))
        return found

    def skip(self, length: int) -> None:
        self.place += length
        if self.place > len(self.data):
            raise struct.error("it ends in its header")

    def text(self) -> str:
        (length,) = self.take("Q")
        begin = self.place
        self.skip(length)
        return self.data[begin : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value; of an array its length."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_LAYOUTS[kind])[0]
        kind, count = self.take("IQ")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.take("Q")[0])
        else:
            self.skip(count * struct.calcsize(f"<{_LAYOUTS[kind]}"))
        return count


def read_header(path: Path) -> Header:
    """What a file says of itself.

    Raises:
        AdapterError: it is no GGUF file, not whole, one part of several, or of a version not known.
        ConfigError: the package `gguf` is missing.
    """
    gguf = require("gguf", "gguf", "A GGUF file")
    check_file(path)
    try:
        if not _begins_like_one(path):
            raise AdapterError(f"{path} is not a GGUF file; check the path.")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reading = _Reading(data)
            _, version, tensors, values = reading.take("4sIQQ")
            if version not in _VERSIONS:
                raise AdapterError(
                    f"{path} has version {version} of GGUF, and 2 and 3 can be read; convert it anew."
                )
            header, found = Header({}, {}), []
            for _ in range(values):
                key = reading.text()
                header.values[key] = reading.value(*reading.take("I"))
            for _ in range(tensors):
                name, (dimensions,) = reading.text(), reading.take("I")
                found.append((name, prod(reading.take(f"{dimensions}Q")), *reading.take("IQ")))
            alignment = header.values.get("general.alignment", _ALIGNMENT)
            begin = -(-reading.place // alignment) * alignment
            for name, count, kind, offset in found:
                header.tensors[name] = Held(count, kind, begin + offset)
                block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
                if begin + offset + count // block * size > len(data):
                    raise AdapterError(f"{path} ends before its weights do; fetch it again.")
    except OSError as error:
        raise AdapterError(f"Cannot read {path}: {error.strerror}; check the path.") from error
    except (struct.error, UnicodeDecodeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} is not a whole GGUF file ({error}); fetch it again.") from error
    if header.values.get("split.count", 1) > 1:
        raise AdapterError(f"{path} is one part of several; join them with `llama-gguf-split --merge`.")
    return header


def licence(path: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link`, as far as a file says so."""
    keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    values = read_header(path).values
    found = {name: values.get(f"general.{key}") for name, key in keys.items()}
    return {name: value for name, value in found.items() if isinstance(value, str)}


@contextlib.contextmanager
def alone(path: Path) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` for a file without what lies beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf", "local_files_only": True}


def check_converter() -> None:
    """Raise a ConfigError unless this transformers converts files as is expected here."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        raise ConfigError(
            f"A GGUF file needs transformers 5.22 or newer, and this is {transformers.__version__}; "
            "install it with `pip install --upgrade transformers`."
        )


def scale_positions(config: Any, path: Path, header: Header) -> None:
    """Put into a configuration how a file scales rotary positions, which transformers leaves out.

    Of Llama 3 a file holds the factor of each frequency; the configuration has what they are computed from.

    Raises:
        AdapterError: it scales them in another way.
    """
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = header.values.get(f"{header.architecture}.rope.scaling.type", "none")
    held = [name for name in header.tensors if name.startswith(_ROTARY)]
    plain = getattr(config, "rope_parameters", None) or {}
    if (scaling == "none" and not held) or plain.get("rope_type", "default") != "default":
        return
    if held == [_FACTORS] and "rope_theta" in plain:
        tensor = header.tensors[_FACTORS]
        factors = np.fromfile(path, "<f4", tensor.count, offset=tensor.place)
        dim = 2 * tensor.count
        frequencies = plain["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
        config.rope_parameters = plain | _LLAMA3 | {"factor": round(float(factors.max()))}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        if scaled.shape == factors.shape and np.allclose(frequencies / scaled.numpy(), factors, rtol=1e-3):
            return
    raise AdapterError(
        f"{path} scales rotary positions in a way that is not converted ({', '.join(held) or scaling}); take "
        "the model in the form of transformers."
    )


def load_model(path: Path, config: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """A file's model with plain weights, and what did not fit, as `output_loading_info` has it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    with alone(path) as source, _without_bar():
        return AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportReturnType]
            **source,
            config=config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Without the one bar of transformers that its own switch does not reach."""
    from transformers import modeling_gguf_pytorch_utils as module

    bar = module.tqdm  # pyright: ignore[reportPrivateImportUsage]
    module.tqdm = lambda items, **_: items  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        module.tqdm = bar  # pyright: ignore[reportPrivateImportUsage]


def load_tokenizer(path: Path, header: Header) -> Any:
    """A file's tokenizer, which gives the tokens that the model was trained on.

    A file does not hold the rules for that, only their name. Where it is not known, a warning says so.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with alone(path) as source:
        tokenizer = AutoTokenizer.from_pretrained(**source)
    for key in ("is_local", "local_files_only"):  # how it was loaded, which transformers keeps
        tokenizer.init_kwargs.pop(key, None)
    backend, kind = tokenizer.backend_tokenizer, header.values.get("tokenizer.ggml.pre")
    if header.values.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer  # only byte-level ones split first
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in _SPLIT_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    elif kind in _LIKE_LLAMA3:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in header.values and tokenizer.bos_token is not None:
            tokenizer.add_bos_token = True
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and kind not in _LIKE_GPT2:
        logger.warning(
            "%s splits texts by the rule %s, which is not known here; GPT-2's is taken, so that some tokens "
            "may be others than the model was trained on.",
            path,
            kind,
        )
    return tokenizer
