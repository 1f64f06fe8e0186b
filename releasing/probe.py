"""What `python -m releasing same` runs in two checkouts: digests of what philens computes and writes.

Only names that are promised to users occur here, so that it runs on any checkout.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import philens

TEXT = "abcd abcd abdc\nA model reads a text: at which tokens does it do new work? 23 + 45 = 68."
SETS: list[dict[str, Any]] = [
    {},
    {"kl": "official", "inference": "sample", "samples": 2},
    {"bottleneck": False, "prior": "mlp"},
    {"prior": "unit", "latent_size": 16, "init": "random", "reduction": "sum"},
    {"prior_depth": 2, "detach_input": True, "detach_targets": True},
    {"mode": "observe", "pressure": "next_token"},
    {"mode": "observe", "pressure": "reconstruction"},
    {"mode": "observe", "pressure": "distill", "pressure_share": 0.5},
    {"pressure": "distill"},
    {"layer": None, "layers": [0, 2], "mode": "observe", "pressure": "distill", "pressure_share": 0.25},
    {"layer": None, "layers": [1, 2], "mode": "observe", "pressure": "next_token"},
]


def digest(*values: Any) -> str:
    """Of tensors, arrays, bytes and text, bit by bit."""
    whole = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous().numpy()
        if isinstance(value, np.ndarray):
            value = repr((value.shape, value.dtype)).encode() + np.ascontiguousarray(value).tobytes()
        whole.update(value if isinstance(value, bytes) else repr(value).encode())
    return whole.hexdigest()


def base() -> LlamaForCausalLM:
    """A small model of fixed random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )


def forward_passes() -> Iterator[tuple[str, str]]:
    """Outputs, losses and gradients for each set of options."""
    tokens = torch.randint(1, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, -5:] = 0
    positions = torch.cat((torch.arange(10), torch.arange(14))).expand(4, 24)
    for options in SETS:
        lens = philens.attach(base(), philens.PHiConfig(**({"layer": 1} | options)))
        name = json.dumps(options)
        with torch.no_grad():
            lens.eval()
            found = lens(tokens, attention_mask=mask)
            yield f"forward {name}", digest(found.logits, found.phi)
            yield f"phi alone {name}", digest(lens(tokens, returns="phi").phi)
        lens.train()
        for returns in ("logits", "states"):
            for extra in ({"attention_mask": mask}, {"position_ids": positions}):
                lens.zero_grad()
                torch.manual_seed(2)
                found = lens(tokens, labels=tokens, returns=returns, **extra)
                found.loss.backward()
                grads = [p.grad for p in lens.parameters() if p.grad is not None]
                losses = sorted((key, float(value)) for key, value in found.losses.items())
                yield f"losses {returns} {list(extra)} {name}", digest(found.loss, losses, *grads)


def calibrated() -> Iterator[tuple[str, str]]:
    """A calibrated layer: its buffers, scores by every metric, generation, and its files."""
    tokenizer = philens.character_tokenizer()
    lens = philens.attach(base(), philens.PHiConfig(layer=1, mode="observe")).eval()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    lens.calibrate([{"input_ids": ids[:, :48]}])
    yield "calibrated", digest(*[value for _, value in sorted(lens.phi.state_dict().items())])
    metrics = ["phi", "surprisal", "entropy", "settling_depth", "step_length", "state_norm"]
    for scores in philens.score(lens, tokenizer, [TEXT, TEXT[:30], "a"], metrics=metrics):
        yield f"scores {len(scores)}", digest(*[v for _, v in sorted(scores.columns.items())], scores.offsets)
    torch.manual_seed(3)
    made = lens.generate(ids[:, :12], max_new_tokens=8, do_sample=True)
    yield "generate", digest(made.sequences, made.phi)
    with tempfile.TemporaryDirectory() as folder:
        lens.save_pretrained(folder)
        yield "adapter", digest((Path(folder) / "phi_layer.safetensors").read_bytes())


def shipped() -> Iterator[tuple[str, str]]:
    """The shipped models' scores."""
    lens, _ = philens.load_run(philens.SHIPPED)
    tokenizer = philens.character_tokenizer()
    for scores in philens.score(lens, tokenizer, [TEXT, "abc abc abc"]):
        yield f"small {len(scores)}", digest(*[v for _, v in sorted(scores.columns.items())])
    try:
        lens, tokenizer = philens.load_lens()[:2]
    except philens.PhilensError as error:
        yield "smollm2", f"not here: {error}"
        return
    for scores in philens.score(lens, tokenizer, [TEXT, [{"role": "user", "content": TEXT}]]):
        yield f"smollm2 {len(scores)}", digest(*[v for _, v in sorted(scores.columns.items())])


def commands() -> Iterator[tuple[str, str]]:
    """Files that commands write, those without times or versions in them."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(TEXT)
        calls = {
            "train": ["train", "smoke", "--output", f"{folder}/run"],
            "train_lstm": ["train", "smoke_lstm", "--output", f"{folder}/lstm", "--train.steps", "12"],
            "score": [
                "score",
                str(text),
                "--model",
                f"{folder}/run",
                "--format",
                "jsonl",
                "--output",
                f"{folder}/scores",
            ],
            "tasks": ["reproduce", "tasks", "--scale", "smoke", "--output", f"{folder}/tasks"],
        }
        for name, call in calls.items():
            done = subprocess.run(
                [sys.executable, "-m", "philens", *call], capture_output=True, text=True, cwd=folder
            )
            yield f"exit {name}", str(done.returncode) + (done.stderr[-500:] if done.returncode else "")
        for path in sorted(Path(folder).rglob("*")):
            relative = path.relative_to(folder)
            if path.suffix in (".safetensors", ".csv"):
                yield str(relative), digest(path.read_bytes())
            if path.name == "metrics.jsonl":
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                kept = [
                    {k: v for k, v in row.items() if "second" not in k and "time" not in k} for row in rows
                ]
                yield str(relative), digest(kept)


def main() -> None:
    """Print the digests as JSON."""
    parts: list[Callable[[], Iterator[tuple[str, str]]]] = [forward_passes, calibrated, shipped, commands]
    found = dict(one for part in parts for one in part())
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
