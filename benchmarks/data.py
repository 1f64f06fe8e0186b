"""Rows about data: documents of the synthetic tasks, and the rows packed of them."""

import os
import time
import warnings

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.harness import Bench, Comparison, Series, Target
from benchmarks.models import scratch_recipe
from philens.tasks.packing import Mixture
from philens.training.trainer import training_rows

# Characters a second of the paper's generator on a machine with 2 cores: quoted, not measured here.
OFFICIAL = 38_000
WANTED = 1_000_000
# Tokens of one step of the paper's recipe, and how long an H200-class GPU may wait for them.
STEP_TOKENS, STEP_SECONDS = 32_768, 0.05


def documents(bench: Bench) -> list[Comparison]:
    """Documents of the paper's mixture with all that is known of them (automaton, noise), on one core."""
    recipe = scratch_recipe(bench)
    mixture = Mixture(recipe.data.tasks, recipe.data.mixture, recipe.seed)
    count = bench.pick(16, 2000, 2000)
    characters = int(mixture.documents(np.arange(count)).offsets[-1])
    source = np.ones(bench.pick(2**16, 2**25, 2**25))
    target = np.empty_like(source)
    seconds = bench.alternate(
        {
            "documents": lambda: mixture.documents(np.arange(count)),
            "copy": lambda: np.copyto(target, source),
        }
    )
    ours = seconds["documents"].per_second(characters, "characters")
    copied = seconds["copy"].per_second(2 * source.nbytes, "B")
    note = f"{count:,} documents of {characters / count:.0f} characters, labels included; one core"
    quoted = Series("official generator (quoted)", [OFFICIAL], "characters/s")
    wanted = Target(WANTED / OFFICIAL, at_most=False, text=f"≥ {WANTED // 10**6} Mcharacters/s")
    memory = Series("memory bandwidth, as characters", copied.values, "B/s")
    return [
        Comparison(ours, quoted, wanted, note),
        Comparison(ours, memory, None, "numpy copy, bytes read and written; a character is one byte"),
    ]


def packing(bench: Bench) -> list[Comparison]:
    """Packed rows as training by the paper's recipe reads them, from data workers with nothing else on."""
    recipe = scratch_recipe(bench, train__batch_size=16)
    rows, batch_size = training_rows(recipe), recipe.train.batch_size
    steps = bench.pick(4, 40, 200)
    per_step = STEP_TOKENS / (batch_size * recipe.data.length)

    def read(workers: int) -> Series:
        values = []
        for repetition in range(bench.repetitions):
            bench.say(f"{workers} workers: {repetition + 1} of {bench.repetitions}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as many workers as the recipe has
                loader = iter(DataLoader(rows, batch_size, num_workers=workers))
            for _ in range(max(1, 2 * workers)):  # workers have started, and what they made ahead is used up
                next(loader)
            begin = time.perf_counter()
            for _ in range(steps):
                next(loader)
            values.append((time.perf_counter() - begin) / steps * per_step)
            del loader
        return Series(f"packed rows, {workers} workers" if workers else "packed rows, in the process", values)

    workers = recipe.data.workers
    ours, alone = read(workers), read(0)
    limit = Series("limit", [STEP_SECONDS])
    note = f"time for {STEP_TOKENS:,} tokens; {workers} workers on {os.cpu_count()} cores"
    return [
        Comparison(ours, limit, Target(1.0, text="≤ 50 ms"), note),
        Comparison(ours, alone, None, "what workers bring"),
    ]
