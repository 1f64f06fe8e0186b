"""The commands: one typed function each. `cli.py` makes the command line of them."""

from collections.abc import Callable

from philens.commands import compare, lens, reasoning, reproduce

Command = Callable[..., int | None]

COMMANDS: dict[str, Command | dict[str, Command]] = {
    "demo": lens.demo,
    "train": lens.train,
    "score": lens.score,
    "explore": lens.explore,
    "reproduce": {
        "tasks": reproduce.reproduce_tasks,
        "complexity": reproduce.reproduce_complexity,
        "gain": reproduce.reproduce_gain,
        "knobs": reproduce.reproduce_knobs,
        "texts": reproduce.reproduce_texts,
        "results": reproduce.reproduce_results,
        "difficulty": reproduce.reproduce_difficulty,
        "correctness": reproduce.reproduce_correctness,
    },
    "compare": compare.compare,
    "solve": reasoning.solve,
    "grade": reasoning.grade,
    "rank": reasoning.rank,
    "sweep": lens.sweep,
    "env": lens.env,
}
