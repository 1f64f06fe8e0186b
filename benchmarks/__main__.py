"""philens beside what it is compared with, in one run: a table, `results.json` and a figure.

python -m benchmarks [--rows NAME ...] [--scale smoke|full] [--output FOLDER]
python -m benchmarks.growth      # how cost grows with T, B, D, blocks, depth and layers
"""

import argparse
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# Before anything reads them: rows need no network, and warnings are not what is measured.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from rich.console import Console

from benchmarks import data, layer, reference, report, scoring, startup, training
from benchmarks.harness import Bench, Comparison, Unavailable, describe_machine
from philens.support.errors import ConfigError, OutputError, PhilensError
from philens.support.typed import nearest

ROWS: dict[str, Callable[[Bench], list[Comparison]]] = {
    "documents": data.documents,
    "packing": data.packing,
    "training": training.training,
    "frozen": training.frozen,
    "real-training": training.real,
    "layer": layer.layer_alone,
    "contrastive": layer.contrastive,
    "phi-only": scoring.phi_only,
    "phi-and-surprisal": scoring.phi_and_surprisal,
    "real-scoring": scoring.real,
    "lengths": scoring.lengths,
    "generation": scoring.generation,
    "memory": startup.memory,
    "startup": startup.startup,
    "reference": reference.reference,
}
MEANINGS = "\n".join(f"  {name:18} {(row.__doc__ or '').split(chr(10))[0]}" for name, row in ROWS.items())


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """What every command here takes."""
    parser.add_argument("--scale", choices=("smoke", "full"), default="full", help="smoke: tiny, meaningless")
    parser.add_argument(
        "--repetitions", type=int, help="of every work after a warm-up; 5, or 2 at smoke scale"
    )
    parser.add_argument("--output", type=Path, default=Path(output), metavar="FOLDER")
    parser.add_argument("--threads", type=int, help="torch's own number if not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")


def make_bench(options: argparse.Namespace, say: Callable[[str], object]) -> Bench:
    """The bench that options ask for, and its folder.

    Raises:
        PhilensError: options that are out of range, or a folder that cannot be made.
    """
    for name in ("repetitions", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device here; leave out --device.")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot write {options.output}: {error.strerror}; choose another --output."
        ) from error
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    repetitions = options.repetitions or (2 if options.scale == "smoke" else 5)
    return Bench(device, options.scale, repetitions, getattr(options, "reference", None), say)


def run_row(name: str, bench: Bench) -> report.Row:
    """One row; whatever goes wrong in it is told and the others go on."""
    begin = time.monotonic()
    torch.manual_seed(0)
    try:
        found = report.Row(name, "measured", ROWS[name](bench), seconds=time.monotonic() - begin)
    except Unavailable as reason:
        found = report.Row(name, "unavailable", reason=str(reason))
    except PhilensError as error:
        found = report.Row(name, "failed", reason=str(error))
    except Exception as error:  # a row of any kind must not take the others with it
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first}"
        found = report.Row(name, "failed", reason=reason, trace=traceback.format_exc())
    bench.tidy()
    return found


def run(names: Sequence[str], bench: Bench, folder: Path, console: Console) -> list[report.Row]:
    """Rows in order; results so far are written after each."""
    machine, rows = describe_machine(bench.device), []
    for number, name in enumerate(names, 1):
        with console.status("") as status:
            bench.say = lambda text, name=name: status.update(f"{name}: {text}")
            rows.append(run_row(name, bench))
        last = rows[-1]
        told = last.reason if last.status != "measured" else f"{last.seconds:.0f} s"
        console.print(f"{number}/{len(names)} {name}: {last.status}, {told}", highlight=False, markup=False)
        content = report.as_json(rows, machine, bench.scale, bench.repetitions)
        report.write_json(folder, "results.json", content)
    if any(row.comparisons for row in rows):
        report.write_figure(folder, "benchmarks", report.figure(rows, machine, bench.scale))
    out = Console(width=None if sys.stdout.isatty() else 120)
    out.print(report.table(rows, machine, bench.scale, bench.repetitions))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rows; returns the exit code: 0, 1 if a row failed to run, 2 for bad input, 130 if stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"rows:\n{MEANINGS}\n\n--reference PATH:\n{inspect.getdoc(reference.load)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", default=list(ROWS), help="some rows only")
    parser.add_argument("--reference", type=Path, metavar="PATH", help="another implementation, see below")
    add_options(parser, "runs/benchmarks")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        for name in options.rows:
            if name not in ROWS:
                close = nearest(name, list(ROWS))
                raise ConfigError(f"There is no row {name!r}; did you mean {close!r} ({', '.join(ROWS)})?")
        rows = run(options.rows, make_bench(options, lambda text: None), options.output, console)
    except PhilensError as error:
        console.print(f"benchmarks: error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("benchmarks: stopped; rows that were finished are in results.json.", highlight=False)
        return 130
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
