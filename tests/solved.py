"""Tables of solutions as `philens.reasoning.solutions` makes them, with a known truth."""

import numpy as np
import pandas as pd


def solved(
    problems: int = 300, samples: int = 8, effect: float = 0.6, selection: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """Solutions whose phi is higher by `effect` (standard deviations) where they are right.

    Levels 1 to 5 are in equal numbers, and harder problems are less often solved. Phi and length grow with
    the level, whatever is right. Surprisal is lower where a solution is right; `selection` of it goes into
    phi. Entropy is noise.
    """
    random = np.random.default_rng(seed)
    level = np.repeat(np.arange(problems) % 5 + 1, samples)
    count = len(level)
    correct = random.random(count) < 0.95 - 0.13 * level
    surprisal = random.normal(size=count) - 0.4 * correct
    noise = random.normal(size=count)
    phi = 20 + 0.8 * level + effect * correct + selection * surprisal + noise
    tokens = random.poisson(20 * level) + 1
    return pd.DataFrame(
        {
            "problem_id": np.repeat([f"p{number}" for number in range(problems)], samples),
            "level": level,
            "steps": level + 1,
            "sample": np.tile(np.arange(samples), problems),
            "correct": correct,
            "parsed": correct | (random.random(count) < 0.9),
            "finished": True,
            "tokens": tokens,
            "phi_mean": phi,
            "phi_sum": phi * tokens,
            "phi_max": phi + random.exponential(3, size=count),
            "phi_last_fifth": phi + random.normal(size=count),
            "surprisal_mean": 1 + 0.1 * surprisal,
            "entropy_mean": random.normal(size=count),
        }
    )
