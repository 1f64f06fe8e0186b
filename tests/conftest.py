"""Shared by all tests: no network, one thread, fixed seeds, small models."""

import gc
import os
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["PIP_NO_INDEX"] = "1"

# Of several processes the one that only hands out tests has no use for torch: it is imported where used.
import pytest

# Files of few and long tests; `make test` begins with them, so that none is left for last.
LONG = {
    "benchmarks",
    "distributed",
    "explore_browser",
    "explore_servers",
    "held",
    "notebooks",
    "reasoning",
    "scale",
    "training",
}


def pytest_collection():
    # What is imported stays: to look through it for garbage takes half a second, and trainings ask for it.
    gc.disable()
    from hypothesis import settings

    settings.register_profile("philens", deadline=None)  # the machine may be busy
    settings.load_profile("philens")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_collection_finish():
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quick():
    """Without what takes longer than a tiny training: the picture of a run is blank (test_training.py draws
    one, test_report.py looks at it), nothing waits for the disk (test_hostile_output.py sees it would), and
    tokenizers are learned from 100,000 characters in place of 8 million.
    """
    from matplotlib.figure import Figure

    from philens.training import build, course

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(build, "SAMPLE", 100_000)
        patch.setattr(course, "figure_training", lambda records: Figure(figsize=(1, 1)))
        yield


@contextmanager
def quickly_found():
    """For tests of the way to a finding: few resamples (intervals are tested on data with a known answer),
    and figures drawn once, as PNG (test_findings.py has both files)."""
    from matplotlib.figure import Figure

    from philens.findings import statistics

    resample, save = statistics._bootstrap_sums, Figure.savefig

    def few(sums, resamples, seed):
        return resample(sums, min(resamples, 100), seed)

    def save_once(figure, file, *args, format=None, **kwargs):
        if format == "svg":
            figure.clear()
        return save(figure, file, *args, format=format, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_bootstrap_sums", few)
        patch.setattr(Figure, "savefig", save_once)
        yield


@pytest.fixture
def quick_findings():
    with quickly_found():
        yield


def make_llama(**options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # Weights ten times the usual: differences between tokens then stand far above rounding.
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | options))).eval()


def make_gpt2(**options):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": 128,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 128,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(sizes | options))).eval()


def make_text_model(folder: Path, points: dict[str, int]) -> Path:
    """A run folder of a model that has learned nothing and reads any text, byte by byte.

    Args:
        points: blocks by the names of the layers after them.
    """
    import philens
    from philens.bases.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    base = make_llama(vocab_size=len(tokenizer), max_position_embeddings=2048)
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, block in points.items():
        lens = philens.attach(base, philens.PHiConfig(layer=block, prior_heads=2))
        lens.save_pretrained(folder / name)
        lens.detach()
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """A run folder of a small model that reads any text, with layers at three insertion points."""
    points = {"adapter": 1, "layer-0": 0, "layer-2": 2}
    return make_text_model(tmp_path_factory.mktemp("text_model"), points)


def _smollm2_is_here() -> bool:
    from philens.bases import wheels

    return (wheels.kept("smollm2") / "config.json").is_file()


_ABSENT = "SmolLM2 is not in the cache; `philens demo` fetches it."
needs_smollm2 = pytest.mark.skipif(not _smollm2_is_here(), reason=_ABSENT)


def skip_without_smollm2() -> None:
    if not _smollm2_is_here():
        pytest.skip(_ABSENT)


@pytest.fixture
def without_smollm2(tmp_path, monkeypatch) -> None:
    """A machine where SmolLM2 is neither kept nor to be had."""
    monkeypatch.setenv("PHILENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr("philens.bases.wheels._installed", lambda wheel: None)


MODELS = {"llama": make_llama, "gpt2": make_gpt2}


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture(params=sorted(MODELS))
def base(request):
    """A small Transformer of either architecture, evaluation mode."""
    return MODELS[request.param]()
