"""The command line: one typed function is one command."""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import philens
from philens.errors import ConfigError, PhilensError
from philens.typed import convert, nearest

# torch and transformers are imported inside the commands, so that help and errors come at once.


def demo(output: Path = Path("philens-demo"), documents: int = 32) -> None:
    """Show what the model that comes with philens sees: a table, a figure and a page.

    Args:
        output: folder for results.json, the figure and the page.
        documents: documents measured of each task.
    """
    from philens.demo import demo
    from philens.report.terminal import tasks_table

    if documents < 2:
        raise ConfigError(f"documents must be at least 2, not {documents}.")
    results = demo(output, documents)
    _console().print(tasks_table(results))
    _say(f"Wrote {output / 'results.json'} and {output / 'tasks.png'}.")
    _say(f"Open {output / 'page.html'} in a browser.")


def train(
    recipe: str, output: Path | None = None, resume: bool = False, print_config: bool = False, **keys: Any
) -> int:
    """Train a model from nothing by a recipe. Any recipe key can be given as --key value.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with philens (small, smoke, ...).
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
    kl: Literal["exact", "official"] | None = None,
    **keys: Any,
) -> None:
    """Reproduce a finding of the paper, training the model first. Any recipe key can be given as --key value.

    Args:
        finding: tasks (interesting ones have high phi) or complexity (phi follows the description length).
        scale: size of model and training.
        architecture: of the model.
        output: folder for runs and results; by default runs/reproduce-SCALE-ARCHITECTURE.
        model: a finished run to measure instead of training.
        seeds: how many models to train and measure.
        documents: documents measured of each task.
        kl: formula that phi is measured with; by default the one it was trained with.
    """
    from philens.findings.reproduce import reproduce
    from philens.report import terminal

    folder = output or Path("runs") / f"reproduce-{scale}-{architecture}"
    results = reproduce(finding, scale, folder, architecture, model, seeds, documents, kl, keys)
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


COMMANDS: dict[str, Callable[..., int | None]] = {
    "demo": demo,
    "train": train,
    "reproduce": reproduce,
    "env": env,
}


def _console() -> Any:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def split_keys(command: Callable[..., Any], arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate a command's own arguments from the recipe keys among them.

    Raises:
        ConfigError: an option that neither the command nor the recipe has.
    """
    own_names = [_option(name) for name in _parameters(command)]
    own, keys = [], {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--") or name.replace("_", "-") in (*own_names, "--help"):
            own.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
            continue
        key, valid = name.removeprefix("--"), [option.removeprefix("--") for option in own_names]
        if _takes_keys(command):
            from philens.training.recipe import recipe_keys

            valid += recipe_keys()
            if key in valid or "." in key:
                if not equals:
                    if not waiting or waiting[0].startswith("--"):
                        raise ConfigError(f"{name} needs a value.")
                    value = waiting.pop(0)
                keys[key] = value
                continue
        raise ConfigError(
            f"There is no option {name}; the nearest valid one is --{nearest(key, [*valid, 'help'])}."
        )
    return own, keys


def _takes_keys(command: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(command).parameters.values())


def _parameters(command: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A command's own parameters by name."""
    parameters = inspect.signature(command).parameters.items()
    return {name: p for name, p in parameters if p.kind is not p.VAR_KEYWORD}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, not printed with the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="philens", description="See where a sequence model is thinking hard.")
    parser.add_argument("--version", action="version", version=f"philens {philens.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        lines = (inspect.getdoc(function) or "").splitlines()
        sub = commands.add_parser(name, description=lines[0], help=lines[0], allow_abbrev=False)
        described = dict(line.strip().split(": ", 1) for line in lines if line.startswith("    "))
        for option, parameter in _parameters(function).items():
            about = described.get(option, "")
            if parameter.annotation is bool:
                sub.add_argument(_option(option), action="store_true", help=about)
            elif parameter.default is parameter.empty:
                sub.add_argument(option, help=about)
            else:
                shown = "" if parameter.default is None else f" Default: {parameter.default}."
                choices = "|".join(get_args(parameter.annotation)) if _is_choice(parameter) else "VALUE"
                sub.add_argument(
                    _option(option), default=parameter.default, metavar=choices, help=about + shown
                )
    return parser


def _is_choice(parameter: inspect.Parameter) -> bool:
    return get_origin(parameter.annotation) is Literal


def _typed(command: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Texts from the command line as what the command takes."""
    typed = {}
    for name, parameter in _parameters(command).items():
        value, kind = options[name], parameter.annotation
        if isinstance(value, str) and int in (kind, *get_args(kind)) and value.lstrip("-").isdecimal():
            value = int(value)
        shown = name if parameter.default is parameter.empty else _option(name)
        # A default is what the command says it is.
        typed[name] = value if value == parameter.default else convert(value, kind, shown)
    return typed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 if the user stopped it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("philens").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        parser = _parser()
        if not arguments:
            parser.print_help(sys.stderr)
            return 2
        command, keys = COMMANDS.get(arguments[0]), {}
        if command is not None:
            own, keys = split_keys(command, arguments[1:])
            arguments = [arguments[0], *own]
        options = vars(parser.parse_args(arguments))
        command = COMMANDS[options["command"]]
        return command(**_typed(command, options), **keys) or 0
    except (PhilensError, OSError) as error:
        sys.stderr.write(f"philens: error: {_sentence(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("philens: stopped; the same command goes on from the last checkpoint.\n")
        return 130
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; check the path and the space left there."
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
