"""The typed recipe: everything that decides what a training run is."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from philens.bases.hub import reason
from philens.lens.config import MTDConfig, PHiConfig
from philens.support.errors import AdapterError, ConfigError, RecipeError, TrainingError
from philens.support.files import PACKAGE, read_text
from philens.support.typed import convert, nearest, shown
from philens.support.versions import __version__
from philens.tasks.automata import TaskConfig, task_index
from philens.tasks.rendering import Rendering
from philens.tasks.sources import SELF, TextPart
from philens.training.source import ModelSource

# Some seconds to read; the recipes that come with philens have 2 kB at most.
_MAX_BYTES = 1 << 18
RECIPES = PACKAGE / "recipes"


@dataclass
class ModelRecipe:
    """The base model: made from its configuration with fresh weights, or a trained one.

    Attributes:
        base: a trained model, as an id on the Hub or a folder; None makes one by what stands from
            `architecture` on, which is not looked at otherwise.
        revision: revision of the base on the Hub.
        dtype: precision of the base's weights; `auto` is what they are stored in.
        quantization: precision of the base's weights, when they are loaded; needs philens[quantize].
        frozen: train only the PHi layer or shallow head in the base. The base is then not saved with it.
        trust_remote_code: run code that comes with the base.
        attention: how the base computes it in training, an `attn_implementation` of transformers. `auto` is
            its own choice, but for packs on a CPU: there it is one that passes over what lies between
            documents.
        architecture: `transformer` (Llama-shaped) or `lstm`; `pretrained` says that a base must be given.
        tokenizer: `characters` of ASCII, `bytes`, or `bpe`, byte pairs learned from the training text.
        vocab_size: tokens of `bpe`; the others have their own number.
        split_digits: whether each digit is a token of `bpe`, so that numbers can be calculated with.
        hidden_size: D.
        intermediate_size: width of the MLP (Transformer) or of the LSTM inside a block.
        layers: number of blocks.
        heads: attention heads (Transformer).
        rope_theta: base of the rotary position embedding (Transformer).
        initializer_range: standard deviation of fresh weights (Transformer). 0.02 is what transformers
            takes for models of any width.
    """

    base: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantization: Literal["none", "int8", "int4"] = "none"
    frozen: bool = True
    trust_remote_code: bool = False
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "auto"
    architecture: Literal["transformer", "lstm", "pretrained"] = "transformer"
    tokenizer: Literal["characters", "bytes", "bpe"] = "characters"
    vocab_size: int = 2048
    split_digits: bool = False
    hidden_size: int = 128
    intermediate_size: int = 344
    layers: int = 4
    heads: int = 4
    rope_theta: float = 500_000.0
    initializer_range: float = 0.02

    def source(self) -> ModelSource:
        """Where the base comes from."""
        quantization = None if self.quantization == "none" else self.quantization
        return ModelSource(
            str(self.base), None, self.revision, self.dtype, self.trust_remote_code, quantization
        )


@dataclass
class DataRecipe:
    """What the model reads: formal languages, or text.

    Attributes:
        parts: parts of a training text by name (docs/data.md); if there are any, they are all that is read.
        rendering: how their texts and chats are put.
        mixture: weight of each task of formal languages among the documents.
        tasks: sizes of the tasks.
        length: T, tokens in a row.
        document_lengths: number of tokens that documents are cut to from a step on. Short ones first make a
            Transformer find in-context learning much sooner. Needs packing.
        packing: several whole documents in a row; otherwise one, cut or padded.
        group: rows made together.
        workers: processes that make them ahead.
        seed: seed of the documents; None takes the recipe's.
    """

    parts: dict[str, TextPart] = field(default_factory=dict)
    rendering: Rendering = field(default_factory=Rendering)
    mixture: dict[str, float] = field(default_factory=lambda: {"in_context_language": 1.0})
    tasks: TaskConfig = field(default_factory=TaskConfig)
    length: int = 2048
    document_lengths: dict[int, int] = field(default_factory=dict)
    packing: bool = True
    group: int = 16
    workers: int = 0
    seed: int | None = None


@dataclass
class OptimizerRecipe:
    """The optimiser and its schedule.

    Attributes:
        name: `adamw`; or `muon`, which orthogonalises the updates of weight matrices and leaves the rest to
            AdamW.
        learning_rate: peak.
        schedule: after the warm-up: constant, decaying, or constant and then decaying over the last
            `decay` of the steps (`wsd`).
        warmup_steps: linear warm-up from 0.
        decay: share of the steps that `wsd` decays over.
        weight_decay: weight decay of AdamW.
        beta1: decay rate of AdamW's first moment.
        beta2: decay rate of AdamW's second moment.
        clip: largest gradient norm; 0 does not clip.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 500
    decay: float = 0.3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0


@dataclass
class PhiSchedule:
    """When the PHi layer enters, and how fast its weights rise.

    Attributes:
        start_step: until this step the layer is out of the path: learn first.
        warmup_steps: over so many steps from there, the weights of phi and of the contrastive loss rise to
            their full values.
    """

    start_step: int = 0
    warmup_steps: int = 0


@dataclass
class TrainRecipe:
    """How long, how fast, and what is kept.

    Attributes:
        steps: optimiser steps.
        batch_size: rows in a forward pass.
        accumulate: forward passes in a step, in all: several processes share them out evenly. The step's loss
            is the mean of the passes' means over their tokens, and the contrastive loss compares the rows of
            one pass, so that a recipe computes the same with any number of processes.
        precision: `auto` is bfloat16 autocast where the device has it.
        compile: `torch.compile` the training forward pass.
        checkpoint_activations: recompute activations in the backward pass to save memory.
        log_every: steps between records.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        save_every: steps between checkpoints; 0 saves at the end only.
        keep: number of checkpoints kept.
        evaluation_documents: documents of each task, at every evaluation.
        report_to: names of trackers beside `metrics.jsonl`, as `transformers.TrainingArguments` has them.
        collapse_threshold: mean phi in nats below which training warns that the layer has collapsed.
    """

    steps: int = 30_000
    batch_size: int = 16
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    log_every: int = 10
    eval_every: int = 1000
    save_every: int = 1000
    keep: int = 2
    evaluation_documents: int = 64
    report_to: list[str] = field(default_factory=list)
    collapse_threshold: float = 0.05


@dataclass
class Recipe:
    """A training run.

    Attributes:
        name: name of the run.
        seed: seed of weights, noise and, without `data.seed`, training documents.
        model: the base model.
        phi: the PHi layer; null for none. With neither this nor `mtd` the base model is trained alone.
        mtd: a shallow head, in a frozen base or trained together with one; given without `phi`, there is no
            PHi layer.
        phi_schedule: when the layer enters.
        data: what is read.
        optimizer: its options and schedule.
        train: how long, how fast, and what is kept.
    """

    name: str = "run"
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    phi: PHiConfig | None = field(default_factory=lambda: PHiConfig(layer=0))
    mtd: MTDConfig | None = None
    phi_schedule: PhiSchedule = field(default_factory=PhiSchedule)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    @property
    def instruments(self) -> list[PHiConfig | MTDConfig]:
        """What goes into the base."""
        return [one for one in (self.phi, self.mtd) if one is not None]

    @property
    def data_seed(self) -> int:
        """The seed that training documents are made or drawn by."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def keeps_base(self) -> bool:
        """Whether the base belongs to the run; one from elsewhere that nothing changes is not copied."""
        return self.model.base is None or not self.model.frozen


# These may differ between a run and its resumption: they do not change what is computed.
FREE_ON_RESUME = {
    "name",
    "data.workers",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep",
    "train.evaluation_documents",
    "train.report_to",
    "train.collapse_threshold",
}


def _section(kind: Any) -> type | None:
    """The dataclass that a field's type is, None being allowed beside it."""
    return next((option for option in (kind, *get_args(kind)) if is_dataclass(option)), None)  # pyright: ignore[reportReturnType]


def _sections(kind: Any) -> type | None:
    """The dataclass whose sections, by name, a field holds."""
    return _section(get_args(kind)[1]) if get_origin(kind) is dict else None


@cache
def recipe_keys(kind: type = Recipe, prefix: str = "") -> tuple[str, ...]:
    """Every key of a recipe, dotted, sections included; NAME stands for a name to be chosen."""
    keys = []
    for entry in fields(kind):
        key = prefix + entry.name
        keys.append(key)
        if named := _sections(entry.type):
            keys += [f"{key}.NAME", *recipe_keys(named, f"{key}.NAME.")]
        elif section := _section(entry.type):
            keys += recipe_keys(section, f"{key}.")
    return tuple(keys)


# Keys whose values are dicts, not sections; of the first, a name may follow the key.
_NAMED = ("data.mixture", "data.rendering.chat_options")
_DICTS = (*_NAMED, "data.document_lengths")


# An insertion point given on the command line takes the place of a recipe's.
_ALTERNATIVES = {"phi.module", "phi.layer", "phi.layers"}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one with dotted keys; values that are dicts themselves, and empty ones, stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in _DICTS:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def check_key(key: str, source: str, wrote: str | None = None) -> None:
    """Whether a recipe has a dotted key.

    Raises:
        RecipeError: it does not; `source` and, for a file of a run, `wrote` say who has it.
    """
    keys = recipe_keys()
    pattern = re.sub(r"^data\.parts\.[^.]+", "data.parts.NAME", key)
    if pattern not in keys and key.rpartition(".")[0] not in _NAMED:
        if wrote is not None:
            raise RecipeError(
                f"{source} has a key {key!r} that this philens {__version__} does not know; install philens "
                f"{wrote}, which wrote it, or a newer one."
            )
        near = nearest(pattern, keys)
        if pattern != key:
            near = near.replace("data.parts.NAME", ".".join(key.split(".")[:3]))
        raise RecipeError(f"{source} has an unknown key {key!r}; the nearest valid one is {near!r}.")


def find_recipe(name: str | Path) -> Path:
    """A recipe's path, or the path of one that comes with philens, by its name.

    Raises:
        RecipeError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.stem}.yaml"
    if str(path) in (path.stem, f"{path.stem}.yaml") and shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise RecipeError(f"There is no recipe {name}; give a YAML file or one of {names}.")


def load_recipe(
    path: str | Path | None = None, overrides: dict[str, Any] | None = None, wrote: str | None = None
) -> Recipe:
    """A recipe from a YAML file, by its path or name, with some keys replaced.

    Args:
        path: None takes the defaults.
        overrides: dotted keys to values, or to text that is read as YAML.
        wrote: version of philens that wrote the file; None for one that a person writes.

    Raises:
        RecipeError: the file cannot be read, or a key is unknown or ill-typed.
    """
    path = None if path is None else find_recipe(path)
    values = {} if path is None else read_keys(path)
    flat = flatten(values)
    for key in flat:
        check_key(key, str(path), wrote)
    given = overrides or {}
    for name, value in given.items():
        if isinstance(value, str):
            value = _read_yaml(name, value)
        if name == "data.parts" or not isinstance(value, dict):
            # All parts, or a whole section that becomes null, take the place of what was there.
            flat = {key: old for key, old in flat.items() if not key.startswith(f"{name}.")}
        for key, single in flatten({name: value}).items():
            check_key(key, "The command line")
            above, _, last = key.rpartition(".")
            if above in _NAMED and isinstance(named := flat.get(above, {}), dict):
                key, single = above, {**named, last: single}
            for section in ("phi", "mtd"):
                if flat.get(section, 0) is None and key.startswith(f"{section}."):
                    del flat[section]
            flat[key] = single
            if key in _ALTERNATIVES:
                flat |= dict.fromkeys(_ALTERNATIVES - {key} - given.keys())
    names = {key.split(".")[0] for key in flat}
    if "mtd" in names and "phi" not in names and flat.get("mtd", 0) is not None:
        flat["phi"] = None
    recipe: Recipe = _build(Recipe, Recipe(), _nested(flat))
    check_recipe(recipe)
    return recipe


def read_keys(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        RecipeError: it cannot be read, or holds something else.
    """
    try:
        values = yaml.load(read_text(path, _MAX_BYTES), _Loader) or {}
    except AdapterError as error:
        raise RecipeError(str(error)) from error
    except Exception as error:  # odd numbers and dates raise what they like
        raise RecipeError(f"{path} cannot be read as YAML ({reason(error)}); correct it.") from error
    if not isinstance(values, dict):
        raise RecipeError(f'{path} must hold keys and values, such as "seed: 1", not {shown(values)}.')
    return values


def _read_yaml(key: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # the same
        raise RecipeError(f"The value {shown(text)} of {key} cannot be read; quote it as YAML.") from error


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, by which a line can stand for any amount of memory, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias is not allowed: write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} is given twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = nested
        for depth, section in enumerate(sections):
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                name = ".".join(sections[: depth + 1])
                raise RecipeError(f"{name} must be a section of keys, not {shown(place)}.")
        place[last] = value
    return nested


def _build(kind: type, default: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """A dataclass, `default` or a fresh one, with some fields replaced by values of the right type."""
    if kind is PHiConfig and any(values.get(name) is not None for name in ("module", "layers")):
        values = {"layer": None, **values}  # another insertion point takes the default layer's place
    try:
        options = {
            entry.name: _value(
                entry.type, getattr(default, entry.name, None), values[entry.name], prefix + entry.name
            )
            for entry in fields(kind)
            if entry.name in values
        }
        return kind(**options) if default is None else replace(default, **options)
    except RecipeError:
        raise
    except ConfigError as error:
        message = str(error)
        raise RecipeError(message if message.startswith(prefix) else f"{prefix[:-1]}: {message}") from error


def _value(kind: Any, default: Any, value: Any, key: str) -> Any:
    section, named = _section(kind), _sections(kind)
    if not (section or named) or (value is None and kind is not section and not named):
        return convert(value, kind, key)
    if not isinstance(value, dict):
        raise RecipeError(f"{key} must be a section of keys, not {shown(value)}.")
    if named:
        return {name: _value(named, None, one, f"{key}.{name}") for name, one in value.items()}
    return _build(section, default, value, f"{key}.")  # pyright: ignore[reportArgumentType]


def check_recipe(recipe: Recipe) -> None:
    """Raise a RecipeError about the first value that cannot work."""
    positive = {
        "model": (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "rope_theta",
            "initializer_range",
        ),
        "data": ("length", "group"),
        "optimizer": ("learning_rate",),
        "train": ("steps", "batch_size", "accumulate", "log_every", "keep", "evaluation_documents"),
    }
    not_negative = {
        "data": ("workers",),
        "optimizer": ("warmup_steps", "weight_decay", "clip", "decay"),
        "phi_schedule": ("start_step", "warmup_steps"),
        "train": ("eval_every", "save_every", "collapse_threshold"),
    }
    for sections, least, word in ((positive, False, "above 0"), (not_negative, True, "at least 0")):
        for section, names in sections.items():
            for name in names:
                value = getattr(getattr(recipe, section), name)
                if not (value > 0 or (least and value == 0)) or value == math.inf:
                    raise RecipeError(f"{section}.{name} must be {word}, not {value}.")
    for key, seed in (("seed", recipe.seed), ("data.seed", recipe.data_seed)):
        if not 0 <= seed < 1 << 32:
            raise RecipeError(f"{key} must be at least 0 and below {1 << 32}, not {shown(seed)}.")
    depth = 1 if recipe.phi is None else recipe.phi.prior_depth
    blocks = 1 if recipe.mtd is None else recipe.mtd.depth
    for name, value, most in (
        ("model.layers", recipe.model.layers, 1000),
        ("phi.prior_depth", depth, 1000),
        ("mtd.depth", blocks, 1000),
        ("data.workers", recipe.data.workers, 256),
    ):
        if value > most:
            raise RecipeError(f"{name} must be at most {most}, not {shown(value)}.")
    for step, length in recipe.data.document_lengths.items():
        if step < 0 or length < 1:
            raise RecipeError(
                f"data.document_lengths maps steps to lengths of at least 1, not {step} to {length}."
            )
    if recipe.data.document_lengths and not recipe.data.packing:
        raise RecipeError("data.document_lengths needs data.packing.")
    for name, weight in recipe.data.mixture.items():
        try:
            task_index(name)
        except ConfigError as error:
            raise RecipeError(f"data.mixture has an unknown task: {error}") from error
        if weight < 0:
            raise RecipeError(f"data.mixture.{name} must be at least 0, not {weight}.")
    if not sum(recipe.data.mixture.values()) > 0:
        raise RecipeError("data.mixture needs at least one task with a weight above 0.")
    _check_model(recipe)
    optimizer, steps = recipe.optimizer, recipe.train.steps
    for name, value in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if not 0 <= value < 1:
            raise RecipeError(f"optimizer.{name} must be at least 0 and below 1, not {value}.")
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + round(optimizer.decay * steps) > steps:
        raise RecipeError(
            f"optimizer.warmup_steps {optimizer.warmup_steps} and optimizer.decay {optimizer.decay} "
            f"do not fit into train.steps {steps}; lower one of them."
        )
    if not recipe.data.parts:
        _check_documents_fit(recipe.data)


def _check_model(recipe: Recipe) -> None:
    model, parts = recipe.model, recipe.data.parts
    if recipe.mtd is not None and recipe.mtd.own:
        raise RecipeError("mtd.own measures a head of the base as it is, and trains none; leave it out.")
    if recipe.mtd is not None and recipe.phi is not None and recipe.phi.mode != "observe":
        raise RecipeError("A PHi layer beside a shallow head only observes; set phi.mode to observe.")
    if recipe.mtd is not None and recipe.phi is not None and (model.base is None or not model.frozen):
        raise RecipeError(
            "A shallow head beside a PHi layer learns in a trained base that stays as it is; give "
            "model.base, and leave model.frozen true."
        )
    if model.base is None:
        if any(part.source == SELF for part in parts.values()):
            raise RecipeError("A source self is text that a trained base writes; give model.base.")
        if model.architecture == "pretrained":
            raise RecipeError("model.base must be given: the model's id on the Hub, or its folder.")
        for name in ("revision", "quantization", "trust_remote_code", "dtype"):
            if getattr(model, name) != getattr(ModelRecipe(), name):
                raise RecipeError(f"model.{name} is for a trained base model; give model.base too.")
        if recipe.phi is not None and recipe.phi.pressure == "distill":
            raise RecipeError("phi.pressure distill needs a trained base; give model.base, or next_token.")
        if model.architecture == "transformer" and model.hidden_size % (2 * model.heads):
            raise RecipeError(
                f"model.hidden_size {model.hidden_size} must be a multiple of twice model.heads "
                f"{model.heads}."
            )
        if model.tokenizer != "characters" and not parts:
            raise RecipeError("model.tokenizer must be characters for formal languages, or give data.parts.")
        if model.tokenizer == "bpe" and model.vocab_size < 262:
            raise RecipeError(f"model.vocab_size must be at least 262 (all bytes), not {model.vocab_size}.")
    elif not recipe.instruments and model.frozen:
        raise RecipeError("Nothing would be trained: give phi, or set model.frozen to false.")
    elif model.frozen and recipe.phi_schedule.start_step:
        raise RecipeError(
            "Until phi_schedule.start_step nothing would be trained in a frozen base; set it to 0, or "
            "model.frozen to false."
        )
    elif model.quantization != "none" and not model.frozen:
        raise RecipeError("A quantized base cannot be trained; set model.frozen to true.")
    elif recipe.phi is not None and recipe.phi.pressure == "distill" and not model.frozen:
        raise RecipeError("phi.pressure distill keeps the base as it is; set model.frozen to true.")
    if recipe.phi is None and recipe.phi_schedule != PhiSchedule():
        raise RecipeError(
            "phi_schedule is for a PHi layer, and phi is null; set phi_schedule.start_step and "
            "phi_schedule.warmup_steps to 0."
        )
    if parts and not sum(part.weight for part in parts.values()) > 0:
        raise RecipeError("data.parts needs at least one part with a weight above 0.")
    if not parts and recipe.data.rendering.record():
        raise RecipeError("data.rendering is for text, and formal languages are none; give data.parts.")
    if parts and recipe.data.mixture != DataRecipe().mixture:
        raise RecipeError("Give data.mixture (formal languages) or data.parts (text), not both.")


def _check_documents_fit(data: DataRecipe) -> None:
    longest = data.tasks.strings[1] * (data.tasks.string_length[1] + 1) - 1
    longest = min(longest, data.tasks.max_length or longest)
    if data.packing and longest > data.group * data.length:
        raise RecipeError(
            f"A document may have {longest} tokens and does not fit into data.group {data.group} rows of "
            f"data.length {data.length}; raise one of them."
        )


def recipe_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML that loads to the same."""
    return yaml.safe_dump(plain(recipe), sort_keys=False)


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON has it."""
    return json.loads(json.dumps(asdict(recipe)))


def from_plain(values: dict[str, Any], source: Path, wrote: str) -> Recipe:
    """The recipe that `plain` gave in the version of philens that `wrote` it; keys that came later have their
    defaults.

    Raises:
        RecipeError: a key is unknown or ill-typed.
    """
    for key in flatten(values):
        check_key(key, str(source), wrote)
    return _build(Recipe, Recipe(), values)


def check_same_recipe(then: Recipe, recipe: Recipe, source: Path) -> None:
    """Raise a TrainingError if recipes differ in a key that decides what is computed."""
    before, now = flatten(plain(then)), flatten(plain(recipe))
    keys = sorted((before.keys() | now.keys()) - FREE_ON_RESUME)
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more keys differ)" if len(changed) > 1 else ""
        raise TrainingError(
            f"{source} belongs to another recipe: {key} was {before.get(key)!r} and is now "
            f"{now.get(key)!r}{more}; give the same recipe or choose another --output."
        )
