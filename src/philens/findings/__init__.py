"""The findings of the paper, one module each, and what they share: seeds combined, results written."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from philens.show.notebook import terminal_markup
from philens.support.errors import InputError, OutputError
from philens.support.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

    from philens.lens.model import PHiModel

__all__ = ["Results", "combine_seeds", "use_formula", "write_finding"]


class Results(dict[str, Any]):
    """What was found, as `results.json` has it; a notebook shows the tables of the terminal.

    Args:
        values: the results.
        tables: makes the tables of them.
    """

    def __init__(
        self, values: Mapping[str, Any], tables: "Callable[[Mapping[str, Any]], Iterable[Table]]"
    ) -> None:
        super().__init__(values)
        self._tables = tables

    def tables(self) -> "list[Table]":
        """To print with a `rich.console.Console`."""
        return [*self._tables(self)]

    def _repr_html_(self) -> str:
        return terminal_markup(self.tables())


def use_formula(lens: "PHiModel", kl: Literal["exact", "official"] | None) -> None:
    """Measure phi with this formula, whatever it was trained with; None changes nothing.

    Raises:
        ConfigError: there is no PHi layer.
    """
    lens.need_layers("philens reproduce")
    if kl is not None:
        lens.config = replace(lens.config, kl=kl)
        for layer in lens.layers:
            layer.config = lens.config


def combine_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spread over seeds of every number in `results`, one finding's results per seed.

    Keeps the nesting of the results; a number becomes `{"mean", "min", "max", "sd", "seeds"}` (sd is None for
    one seed; seeds without the number are not counted) and a boolean `{"true", "seeds"}`. Lists (intervals,
    curves, orders) and texts are per seed and have no spread: they are left out.
    """
    if not results:
        raise InputError("There are no results to combine; give those of at least one seed.")
    combined: dict[str, Any] = {}
    for key in dict.fromkeys(key for result in results for key in result):
        values = [result[key] for result in results if result.get(key) is not None]
        if not values:
            continue
        if all(isinstance(value, Mapping) for value in values):
            combined[key] = combine_seeds(values)
        elif all(isinstance(value, bool) for value in values):
            combined[key] = {"true": sum(values), "seeds": len(values)}
        elif all(isinstance(value, int | float) for value in values):
            numbers = [float(value) for value in values]
            spread = {"mean": fmean(numbers), "min": min(numbers), "max": max(numbers)}
            sd = stdev(numbers) if len(numbers) > 1 else None
            combined[key] = spread | {"sd": sd, "seeds": len(numbers)}
    return {key: value for key, value in combined.items() if value}


def write_finding(
    folder: str | os.PathLike[str],
    results: Mapping[str, Any],
    tables: "Mapping[str, Sequence[Mapping[str, Any]] | pd.DataFrame]",
    figures: "Mapping[str, Figure]",
    run: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write a finding's folder: `results.json`, `NAME.csv` per table, `NAME.png` and `NAME.svg` per figure.

    `run` holds what the run was (finding, scale, seed, versions, recipe) and comes first in `results.json`.
    NaN becomes null there. Each file is written whole or not at all, the JSON last, so that a folder with a
    `results.json` is complete. Returns the paths by file name; raises OutputError where that is impossible.
    """
    import pandas as pd
    from matplotlib import rc_context

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"Cannot make the folder {folder}: {reason}; give another folder.") from error

    paths: dict[str, Path] = {}

    def write(name: str, content: Callable[[BinaryIO], object]) -> None:
        paths[name] = write_atomically(folder / name, content)

    for name, rows in tables.items():
        frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
        text = frame.to_csv(index=False, lineterminator="\n")
        write(f"{name}.csv", lambda file, text=text: file.write(text.encode()))
    for name, figure in figures.items():
        write(f"{name}.png", lambda file, figure=figure: figure.savefig(file, format="png"))
        # Without salt and date the same figure gives the same bytes.
        with rc_context({"svg.hashsalt": "philens"}):
            write(
                f"{name}.svg",
                lambda file, figure=figure: figure.savefig(file, format="svg", metadata={"Date": None}),
            )
    text = json.dumps(_plain({**(run or {}), **results}), indent=2, ensure_ascii=False, allow_nan=False)
    write("results.json", lambda file: file.write(f"{text}\n".encode()))
    return paths


def _plain(value: Any) -> Any:
    """`value` with numpy scalars and arrays, paths, tuples and NaN turned into what JSON knows."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
