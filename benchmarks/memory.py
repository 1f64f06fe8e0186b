"""Peak memory of training by the Llama 3.2 3B recipe, on a model of that very shape with random weights.

    python -m benchmarks.memory [--steps 2] [--width 3072] [--folder FOLDER]

Weights take 6.4 GB on disk and in memory; on a CPU a step takes many minutes. On a GPU the figure is what
torch allocated there. On a CPU it is the largest resident set of the process, with Python, its libraries and
what they pack for themselves; with `--tensors`, the most bytes that tensors held at once, which is what a GPU
would hold but for its workspaces (slow: for smaller widths, from which activations go up in proportion).
"""

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def make_model(folder: Path, blocks: int, width: int) -> int:
    """Write a model of Llama 3.2 3B's shape with random weights; returns its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from philens.tokenizer import byte_tokenizer

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 384,
        head_dim=128,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for module in model.modules():  # what is no parameter is made again
        if hasattr(module, "inv_freq"):
            module.__init__(config)
    generator = torch.Generator().manual_seed(0)
    tile = (0.02 * torch.randn(2**20, generator=generator)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            repeats = -(-parameter.numel() // tile.numel())
            parameter.copy_(tile.repeat(repeats)[: parameter.numel()].view(parameter.shape))
            if parameter.ndim == 1:
                parameter.fill_(1.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def resident() -> float:
    """GB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


class Peak(threading.Thread):
    """Follows the resident set of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gigabytes = 0.0

    def run(self) -> None:
        while True:
            self.gigabytes = max(self.gigabytes, resident())
            time.sleep(0.02)


class LiveTensors(TorchDispatchMode):
    """Follows how many bytes tensors hold; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held or self.held[key][0].expired():
            self.total += storage.nbytes() - (self.held[key][1] if key in self.held else 0)
            self.held[key] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Arguments too: weights may be read from a file, not made by an operation.
        for tensor in tree_iter((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        if self.total > self.peak:
            self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.held.values())
            self.peak = max(self.peak, self.total)
        return result


def measure(model: Path, folder: Path, steps: int, layer: int, tensors: bool) -> dict[str, float]:
    """Train for some steps by the recipe, on text that is installed; returns gigabytes."""
    from philens.training.recipe import load_recipe
    from philens.training.trainer import train

    recipe = load_recipe(
        "llama_3_2_3b",
        {
            "model.base": str(model),
            "phi.layer": layer,
            "data.parts": {"text": {"source": "installed"}},
            "data.workers": 0,
            "train.steps": steps,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.save_every": 0,
            "train.evaluation_documents": 2,
        },
    )
    on_gpu = torch.cuda.is_available()
    before = resident()
    peak = Peak()
    peak.start()
    begin = time.monotonic()
    live = LiveTensors()
    with live if tensors else contextlib.nullcontext():
        train(recipe, folder)
    found = {"seconds": time.monotonic() - begin}
    if tensors:
        return found | {"peak_gb": live.peak / 1e9}
    if on_gpu:
        return found | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return found | {"peak_gb": peak.gigabytes, "of_it_python_and_libraries_gb": before}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--width", type=int, default=3072, help="a multiple of 384")
    parser.add_argument("--tensors", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model = Path(scratch) / "model"
        parameters = make_model(model, options.blocks, options.width)
        layer = 19 * options.blocks // 28
        found = measure(model, Path(scratch) / "run", options.steps, layer, options.tensors)
        records = (Path(scratch) / "run" / "metrics.jsonl").read_text()
    described = {"parameters": parameters, "width": options.width, "blocks": options.blocks}
    described |= {"layer": layer, "steps": options.steps}
    sys.stderr.write(records)
    sys.stdout.write(json.dumps(described | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
