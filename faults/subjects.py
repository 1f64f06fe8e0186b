"""Folders that philens reads: made once in a run, in a folder that goes with the process."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Subject:
    """A folder that philens reads.

    Attributes:
        folder: as philens wrote it.
        read: reads it (or a copy), and gives what must not differ without a sentence.
        expected: what `read` gives of `folder`.
        checked: whether another result is a fault. Not where nobody can tell: the model of somebody else.
    """

    folder: Path
    read: Read
    expected: Any = field(repr=False)
    checked: bool = True

    @property
    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())


@cache
def workshop() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="philens-faults-files-")
    workshop.keep = folder  # pyright: ignore[reportFunctionMemberAccess]
    return Path(folder.name)


@cache
def _tokens() -> Any:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    return torch.arange(24)[None] * 5 % 90 + 32


def _phi(lens: Any) -> Any:
    import torch

    with torch.no_grad():
        output = lens(_tokens())
    return {"phi": output.phi.numpy().copy(), "logits": output.logits.numpy().copy()}


def tiny_base(seed: int = 0) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _tokens()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **sizes)).eval()


@cache
def adapter() -> Subject:
    import philens

    base, folder = tiny_base(), workshop() / "adapter"
    lens = philens.attach(base, philens.PHiConfig(layer=0, prior="mlp"))
    lens.save_pretrained(folder)
    lens.detach()

    def read(place: Path) -> Any:
        lens = philens.load(base, place)
        try:
            return _phi(lens)
        finally:
            lens.detach()

    return Subject(folder, read, read(folder))


SIZES: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.intermediate_size": 16,
    "model.layers": 2,
    "model.heads": 2,
    "phi.layer": 0,
    "phi.prior_heads": 2,
    "data.mixture": {"memorized_sequences": 1, "random": 1},
    "data.tasks.strings": [2, 3],
    "data.tasks.string_length": [8, 12],
    "data.length": 32,
    "data.group": 2,
    "optimizer.warmup_steps": 1,
    "train.steps": 3,
    "train.batch_size": 2,
    "train.precision": "fp32",
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.save_every": 2,
    "train.evaluation_documents": 2,
}


def _train(folder: Path, resume: bool) -> Any:
    from philens.training.recipe import load_recipe
    from philens.training.trainer import train

    lens = train(load_recipe(None, SIZES), folder, resume=resume)
    assert lens is not None
    return {name: value.numpy().copy() for name, value in lens.state_dict().items()}


@cache
def stopped() -> Subject:
    """A run that was stopped after a checkpoint, and is resumed from it to its end."""
    _tokens()
    folder = workshop() / "stopped"
    weights = _train(folder, False)
    for name in ("model", "adapter", "training.png", "checkpoint-3"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return Subject(folder, partial(_train, resume=True), weights)


@cache
def run_folder() -> Subject:
    from philens.training.opening import load_lens, load_run

    _tokens()
    folder = workshop() / "run"
    _train(folder, False)
    for checkpoint in folder.glob("checkpoint-*"):  # nobody reads them any more
        shutil.rmtree(checkpoint)

    def read(place: Path) -> Any:
        lens, tokenizer = load_lens(str(place))
        load_run(place)
        return _phi(lens) | {"tokens": tokenizer("az 09").input_ids}

    return Subject(folder, read, read(folder))


@cache
def base_model() -> Subject:
    """A model of somebody else: no checksums."""
    from philens.bases.hub import load_pretrained
    from philens.support.files import SUMS_FILE

    folder = workshop() / "base"
    shutil.copytree(run_folder().folder / "model", folder)
    (folder / SUMS_FILE).unlink()

    def read(place: Path) -> Any:
        import torch

        model, tokenizer = load_pretrained(place)
        tokenizer("az 09")
        with torch.no_grad():
            return model(_tokens()).logits.numpy().copy()

    return Subject(folder, read, read(folder), checked=False)


@cache
def shipped() -> Subject:
    import philens
    from philens.training.opening import load_lens

    _tokens()
    read = lambda place: _phi(load_lens(str(place))[0])  # noqa: E731
    return Subject(philens.SHIPPED, read, read(philens.SHIPPED))
