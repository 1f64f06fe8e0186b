"""Divergence steering: what a model writes towards its shallow head, and away from it.

    python examples/steering.py MODEL ADAPTER

MODEL is a folder or Hub id of a chat model, ADAPTER a shallow head trained in it (docs/instruments.md).
Prints a table in Markdown, with the standard error over texts, and a text of each end and of the middle.
"""

import sys

import numpy as np
import torch

import philens

PROMPTS = [
    "Why is the sky blue?",
    "A farmer has 17 sheep, buys 8 and sells 5. How many are left? Explain each step.",
    "Write the beginning of a story about a lighthouse.",
    "Write a Python function that says whether a number is prime.",
]
ALPHAS = [-0.5, -0.25, 0.0, 0.25, 0.5]
EACH, LENGTH = 4, 80


def repeated(ids: list[int]) -> float:
    """The share of 4-grams that were there before."""
    grams = list(zip(*(ids[k:] for k in range(4)), strict=False))
    return 1 - len({*grams}) / len(grams) if grams else 0.0


def main(model: str, adapter: str) -> None:
    lens, tokenizer = philens.load_lens(model, adapter)
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    inputs = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
    options = {"do_sample": True, "max_new_tokens": LENGTH, "num_return_sequences": EACH}
    sys.stdout.write(
        "| alpha | surprisal, nats | repeated 4-grams | MTD, nats | tokens |\n|---|---|---|---|---|\n"
    )
    texts = {}
    for alpha in ALPHAS:
        torch.manual_seed(0)
        found = lens.generate(inputs["input_ids"], inputs["attention_mask"], steer=alpha, **options)
        rows = []
        for row, ids in enumerate(found.sequences):
            new = slice(found.prompt_length, None)
            written = ~found.surprisal[row, new].isnan()
            mtd, surprisal = (values[row, new][written].mean() for values in (found.mtd, found.surprisal))
            rows.append(
                [float(surprisal), repeated(ids[new][written].tolist()), float(mtd), int(written.sum())]
            )
            if row % EACH == 0:
                texts[alpha, row // EACH] = tokenizer.decode(ids[new][written], skip_special_tokens=True)
        mean, error = np.mean(rows, 0), np.std(rows, 0, ddof=1) / np.sqrt(len(rows))
        cells = [f"{mean[k]:.3f} ± {error[k]:.3f}" for k in range(3)]
        sys.stdout.write(f"| {alpha:g} | {' | '.join(cells)} | {round(mean[3] * len(rows))} |\n")
    for alpha in (-0.5, 0.0, 0.5):
        sys.stdout.write(f"\n{alpha:g}: {texts[alpha, 2]}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
