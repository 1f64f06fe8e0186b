"""Where in a wrong solution of an arithmetic problem is phi higher than in a right one?

    python examples/first_mistake.py runs/reasoning-small/seed-0

reads a seed's folder of `philens reproduce correctness --scale small`. Each wrong solution is compared with
the right ones to the same problem in the same style, over three stretches: before the first equation that
differs from the reference, that equation, and what follows. Differences are means over problems, nats per
token, with 1.96 standard errors. Beneath: how often the higher phi is right among pairs of one style.
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import philens
from philens.reasoning.problems import load_problems
from philens.reasoning.sampling import read_solutions
from philens.reasoning.solutions import Solution
from philens.tasks.problem import Problem
from philens.training.opening import load_lens

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
STRETCHES = ("before", "in", "after")


@dataclass
class Read:
    """A solution and its columns: (T,) over its own tokens, and the equation that each token belongs to."""

    solution: Solution
    columns: dict[str, np.ndarray]
    equation: np.ndarray
    mistake: int | None  # the first equation that is not the reference's

    @property
    def key(self) -> tuple[str, bool]:
        return self.solution.problem_id, "has" in self.solution.solution  # whole sentences say who has

    def mean(self, column: str, stretch: str, mistake: int) -> float:
        side = np.sign(self.equation - mistake)
        values = self.columns[column][side == STRETCHES.index(stretch) - 1]
        return float(values.mean()) if len(values) else float("nan")


def read(folder: Path) -> tuple[list[Read], list[str]]:
    """The solutions of problems with both right and wrong ones, and the names of their columns."""
    record = json.loads((folder / "solutions" / "solve.json").read_text())
    count, seed = int(record["settings"]["problems"].split()[0]), record["settings"]["seed"]
    problems = {problem.id: problem for problem in load_problems("arithmetic", limit=count, seed=seed)}
    by_problem: dict[str, list[Solution]] = defaultdict(list)
    for solution in read_solutions(folder / "solutions", [*problems.values()]):
        by_problem[solution.problem_id].append(solution)
    mixed = [many for many in by_problem.values() if len({one.correct for one in many}) == 2]
    solutions = [solution for many in mixed for solution in many]
    lens, tokenizer = load_lens(str(folder / "base" / "model"), str(folder / "sweep" / "run" / "adapter"))
    chats = [
        [{"role": "user", "content": one.problem}, {"role": "assistant", "content": one.solution}]
        for one in solutions
    ]
    scores = philens.score(lens, tokenizer, chats, metrics=["phi", "surprisal"])
    names = list(scores[0].columns)
    return [
        _read(one, found, problems[one.problem_id]) for one, found in zip(solutions, scores, strict=True)
    ], names


def _read(solution: Solution, scores: philens.TokenScores, problem: Problem) -> Read:
    reply = scores.spans[-1]
    starts, ends = scores.offsets.T
    own = (ends > reply.start) & (starts < reply.end)
    written = list(EQUATION.finditer(solution.solution))
    reference = EQUATION.findall(problem.solution or "")
    # A token belongs to the first equation that ends after it begins.
    equation = np.searchsorted([match.end() for match in written], starts[own] - reply.start)
    wrong = (k for k, (m, right) in enumerate(zip(written, reference, strict=False)) if m.groups() != right)
    columns = {name: values[own] for name, values in scores.columns.items()}
    return Read(solution, columns, equation, next(wrong, None))


def compare(reads: list[Read], column: str, stretch: str) -> tuple[float, float, float, int]:
    """Means over problems in wrong and right solutions, 1.96 standard errors of the difference, problems."""
    right: dict[tuple[str, bool], list[Read]] = defaultdict(list)
    for one in reads:
        if one.solution.correct and one.mistake is None:
            right[one.key].append(one)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in reads:
        others = right[one.key]
        if not one.solution.correct and one.mistake is not None and others:
            same = np.mean([other.mean(column, stretch, one.mistake) for other in others])
            pair = (one.mean(column, stretch, one.mistake), float(same))
            if np.isfinite(pair).all():
                found[one.solution.problem_id].append(pair)
    if len(found) < 2:
        return float("nan"), float("nan"), float("nan"), len(found)
    means = np.array([np.mean(pairs, axis=0) for pairs in found.values()])
    difference = means[:, 0] - means[:, 1]
    error = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    return float(means[:, 0].mean()), float(means[:, 1].mean()), float(error), len(means)


def same_style(reads: list[Read], column: str) -> tuple[float, float, int]:
    """How often the higher mean is right among pairs of one style, each problem once; error and problems."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in reads:
        for other in reads if one.solution.correct else []:
            if not other.solution.correct and one.key == other.key:
                higher = np.sign(one.columns[column].mean() - other.columns[column].mean())
                found[one.solution.problem_id].append((1 + higher) / 2)
    if len(found) < 2:
        return float("nan"), float("nan"), len(found)
    shares = np.array([np.mean(values) for values in found.values()])
    return float(shares.mean()), float(1.96 * shares.std(ddof=1) / np.sqrt(len(shares))), len(shares)


def main(folder: Path) -> None:
    reads, names = read(folder)
    table = Table("", "equation", "wrong", "right", "difference", "problems", title=str(folder))
    for name in names:
        for stretch in STRETCHES:
            wrong, right, error, problems = compare(reads, name, stretch)
            row = (f"{wrong:.3f}", f"{right:.3f}", f"{wrong - right:+.3f} ± {error:.3f}", str(problems))
            table.add_row(name, stretch, *row)
    console = Console()
    console.print(table)
    for name in names:
        share, error, problems = same_style(reads, name)
        console.print(
            f"{name}, same style: the higher is right in {share:.1%} ± {error:.1%} ({problems} problems)"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
