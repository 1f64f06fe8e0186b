"""The command line: one typed function is one command."""

import difflib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from philens.errors import PhilensError

# torch and transformers are imported inside the commands, so that help and errors come at once.


def demo(output: Path = Path("philens-demo"), documents: int = 64) -> None:
    """Show what the model that comes with philens sees: a table, a figure and a page.

    Args:
        output: folder for results.json, the figure and the page.
        documents: documents measured of each task.
    """
    from philens.demo import demo
    from philens.errors import ConfigError
    from philens.report.terminal import tasks_table

    if documents < 2:
        raise ConfigError(f"documents must be at least 2, not {documents}.")
    results = demo(output, documents)
    _console().print(tasks_table(results))
    _say(f"Wrote {output / 'results.json'}, {output / 'tasks.png'} and {output / 'page.html'}; open the page in a browser.")


def train(
    recipe: str, output: Path | None = None, resume: bool = False, print_config: bool = False, **keys: Any
) -> int:
    """Train a model from nothing by a recipe. Any recipe key can be given as --key value.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with philens (small, smoke, transformer_pfa, ...).
        output: run folder; by default runs/NAME.
        resume: go on from the last checkpoint in the run folder.
        print_config: print the whole recipe and stop.
    """
    from philens.training.recipe import load_recipe

    resolved = load_recipe(recipe, keys)
    if print_config:
        from philens.training.run import recipe_yaml

        sys.stdout.write(recipe_yaml(resolved))
        return 0
    from philens.training.trainer import train

    folder = output or Path("runs") / resolved.name
    if train(resolved, folder, resume) is None:
        _say(f"Stopped; go on with: philens train {recipe} --output {folder} --resume")
        return 130
    _say(f"Wrote {folder}; read it with philens.load_run({str(folder)!r}).")
    return 0


def reproduce(
    finding: Literal["tasks", "complexity"],
    scale: Literal["smoke", "small", "paper"] = "small",
    architecture: Literal["transformer", "lstm"] = "transformer",
    output: Path | None = None,
    model: Path | None = None,
    seeds: int = 1,
    documents: int | None = None,
    **keys: Any,
) -> None:
    """Reproduce a finding of the paper, training the model first if that is not done. Any recipe key can be given.

    Args:
        finding: tasks (interesting ones have high phi) or complexity (phi follows the description length).
        scale: size of model and training.
        architecture: of the model.
        output: folder for runs and results; by default runs/reproduce-SCALE-ARCHITECTURE.
        model: a finished run to measure instead of training.
        seeds: how many models to train and measure.
        documents: documents measured of each task.
    """
    from philens.findings.reproduce import reproduce
    from philens.report import terminal

    folder = output or Path("runs") / f"reproduce-{scale}-{architecture}"
    results = reproduce(finding, scale, folder, architecture, model, seeds, documents, keys)
    table = terminal.tasks_table if finding == "tasks" else terminal.complexity_table
    for one in results.get("seeds", [results]):
        if "seeds" in results:
            _say(f"Seed {one['seed']}")
        _console().print(table(one))
    if "spread" in results:
        _console().print(terminal.spread_table(results["spread"]))
    _say(f"Wrote {folder / finding}.")


def env() -> None:
    """Print versions and devices, for a bug report."""
    import importlib.metadata
    import platform

    import torch

    names = ["philens", "torch", "transformers", "accelerate", "safetensors", "numpy", "scipy", "pandas"]
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    for name in names:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("threads", str(torch.get_num_threads())))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("cuda", ", ".join(devices) or "no device"))
    for name, value in rows:
        _say(f"{name:14}{value}")


COMMANDS: dict[str, Callable[..., int | None]] = {"demo": demo, "train": train, "reproduce": reproduce, "env": env}


def _console() -> Any:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _takes_keys(command: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(command).parameters.values())


def split_keys(command: Callable[..., Any], arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate a command's own arguments from the recipe keys among them.

    Raises:
        ConfigError: an option that neither the command nor the recipe has.
    """
    from philens.errors import ConfigError

    own_names = {name.replace("_", "-"): name for name, p in inspect.signature(command).parameters.items()}
    own, keys = [], {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.replace("_", "-") in own_names or name == "help":
            own.append(word.replace("_", "-", word.count("_") if not equals else 0) if word.startswith("--") else word)
            continue
        valid = sorted(own_names)
        if _takes_keys(command):
            from philens.training.recipe import recipe_keys

            leaves = recipe_keys()
            valid += leaves
            if name in leaves or "." in name:
                if not equals:
                    if not waiting:
                        raise ConfigError(f"--{name} needs a value.")
                    value = waiting.pop(0)
                keys[name] = value
                continue
        near = [key for key in valid if key.rsplit(".", 1)[-1] == name] or difflib.get_close_matches(name, valid, 1, 0.0)
        raise ConfigError(f"There is no option --{name}; the nearest valid one is --{near[0]}.")
    return own, keys


def _parser() -> Any:
    import jsonargparse

    import philens

    parser = jsonargparse.ArgumentParser(
        prog="philens", description="See where a sequence model is thinking hard.", exit_on_error=False
    )
    parser.add_argument("--version", action="version", version=f"philens {philens.__version__}")
    commands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        lines = (inspect.getdoc(function) or "").splitlines()
        sub = jsonargparse.ArgumentParser(description=lines[0], exit_on_error=False)
        _add_arguments(sub, function)
        commands.add_subcommand(name, sub, help=lines[0])
    return parser


def _add_arguments(parser: Any, function: Callable[..., Any]) -> None:
    """A function's parameters as arguments, described by its docstring."""
    described = dict(
        line.strip().split(": ", 1) for line in (inspect.getdoc(function) or "").splitlines() if line.startswith("    ")
    )
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        options: dict[str, Any] = {"help": described.get(name)}
        if parameter.annotation is bool:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", **options)
        elif parameter.default is parameter.empty:
            parser.add_argument(name, type=parameter.annotation, **options)
        else:
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=parameter.annotation, default=parameter.default, **options
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 if the user stopped it."""
    import jsonargparse

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("philens").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        keys: dict[str, str] = {}
        if arguments and arguments[0] in COMMANDS:
            own, keys = split_keys(COMMANDS[arguments[0]], arguments[1:])
            arguments = [arguments[0], *own]
        parser = _parser()
        if not arguments:
            parser.print_help()
            return 2
        config = parser.parse_args(arguments)
        name = config.command
        options = vars(getattr(config, name))
        return COMMANDS[name](**{k: v for k, v in options.items() if k != "config"}, **keys) or 0
    except (PhilensError, jsonargparse.ArgumentError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"philens: error: {message}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("philens: stopped; the same command goes on from the last checkpoint.\n")
        return 130
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
