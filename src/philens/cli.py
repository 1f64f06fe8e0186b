"""The command line, made from the typed functions in `commands`."""

import argparse
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from philens.commands import COMMANDS, Command
from philens.commands.show import tell
from philens.support.errors import ConfigError, PhilensError
from philens.support.output import printable
from philens.support.typed import convert, nearest, pairs
from philens.support.versions import __version__


def split_keys(command: Callable[..., Any], arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate a command's own arguments, first those without a name, from the recipe keys among them.

    Raises:
        ConfigError: an option that neither the command nor the recipe has.
    """
    parameters = {name: p for name, p in _parameters(command).items() if p.default is not p.empty}
    own_names = [_option(name) for name in parameters]
    flags = [_option(name) for name, parameter in parameters.items() if parameter.annotation is bool]
    places, own, keys = [], [], {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            places.append(word)
            continue
        option = name.replace("_", "-")
        if option in (*own_names, "--help"):
            # With its value, so that it can stand anywhere among several files.
            if not equals and option not in (*flags, "--help") and waiting and waiting[0][:2] != "--":
                equals, value = "=", waiting.pop(0)
            own.append(option + equals + value)
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
    return places + own, keys


def _takes_keys(command: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(command).parameters.values())


def _parameters(command: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A command's own parameters by name, with their types as they are without what `--help` says."""
    parameters, types = inspect.signature(command).parameters.items(), get_type_hints(command)
    return {name: p.replace(annotation=types[name]) for name, p in parameters if p.kind is not p.VAR_KEYWORD}


def _descriptions(command: Callable[..., Any]) -> dict[str, str]:
    """What is said of a command's options: in its docstring, or where several share one, with its type."""
    types = get_type_hints(command, include_extras=True)
    shared = {name: kind.__metadata__[0] for name, kind in types.items() if hasattr(kind, "__metadata__")}
    # A description goes on in lines indented further.
    own = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(command) or "", re.MULTILINE)
    return shared | {option: " ".join(about.split()) for option, about in own}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _find_command(arguments: Sequence[str]) -> tuple[list[str], Command | None]:
    """The words at the beginning that name a command, and the command; None where they name none."""
    found: Any = COMMANDS
    words = []
    for word in arguments:
        if not isinstance(found, dict) or word not in found:
            break
        words.append(word)
        found = found[word]
    return (words, None) if isinstance(found, dict) else (words, found)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, not printed with the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="philens", description="See where a sequence model is thinking hard.")
    parser.add_argument("--version", action="version", version=f"philens {__version__}")
    _add_commands(parser, COMMANDS, "COMMAND")
    return parser


def _add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, Any], metavar: str) -> None:
    """Commands, and commands that are several, one level down."""
    below = parser.add_subparsers(dest=metavar.lower(), required=True, metavar=metavar)
    for name, command in commands.items():
        if isinstance(command, dict):
            about = f"Reproduce a finding of the paper: {', '.join(command)}."
            sub = below.add_parser(name, description=about, help=about, allow_abbrev=False)
            _add_commands(sub, command, "FINDING")
        else:
            _add_command(below, name, command)


def _add_command(below: Any, name: str, command: Command) -> None:
    summary, described = (inspect.getdoc(command) or "").partition("\n")[0], _descriptions(command)
    sub = below.add_parser(name, description=summary, help=summary, allow_abbrev=False)
    sub.set_defaults(run=command)
    for option, parameter in _parameters(command).items():
        about = described.get(option, "")
        if parameter.annotation is bool:
            sub.add_argument(_option(option), action="store_true", help=about)
        elif get_origin(parameter.annotation) is list:
            sub.add_argument(option, nargs="*", metavar="FILE", help=about)
        elif _is_pairs(parameter):
            sub.add_argument(_option(option), action="append", metavar="KEY=VALUE", help=about)
        elif parameter.default is parameter.empty:
            sub.add_argument(option, help=about)
        else:
            shown = "" if parameter.default is None else f" Default: {parameter.default}."
            choices = "|".join(get_args(parameter.annotation)) if _is_choice(parameter) else "VALUE"
            sub.add_argument(_option(option), default=parameter.default, metavar=choices, help=about + shown)


def _is_choice(parameter: inspect.Parameter) -> bool:
    return get_origin(parameter.annotation) is Literal


def _is_pairs(parameter: inspect.Parameter) -> bool:
    return any(get_origin(kind) is dict for kind in get_args(parameter.annotation))


def _typed(command: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Texts from the command line as what the command takes."""
    typed = {}
    for name, parameter in _parameters(command).items():
        value: Any = options[name]
        kind = parameter.annotation
        if isinstance(value, str) and int in (kind, *get_args(kind)) and value.lstrip("-").isdecimal():
            value = int(value)
        shown = name if parameter.default is parameter.empty else _option(name)
        if value == parameter.default:  # which is what the command says it is
            typed[name] = value
        else:
            typed[name] = pairs(value, shown) if _is_pairs(parameter) else convert(value, kind, shown)
    return typed


def parse(arguments: Sequence[str]) -> tuple[Command, dict[str, Any]]:
    """A command line as a command and what it is called with, recipe keys among it as texts.

    Raises:
        ConfigError: no such command or option, or a value of the wrong kind.
    """
    words, command = _find_command(arguments)
    keys: dict[str, str] = {}
    if command is not None:
        own, keys = split_keys(command, arguments[len(words) :])
        arguments = [*words, *own]
    options = vars(_parser().parse_args(arguments))
    return options["run"], {**_typed(options["run"], options), **keys}


class _Plain(logging.Formatter):
    """Messages alone, of which a terminal obeys nothing."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 if the user stopped it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us; a file that is opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may have no letter for what is shown
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("philens").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if not arguments:
            _parser().print_help(sys.stderr)
            return 2
        command, options = parse(arguments)
        code = command(**options) or 0
        sys.stdout.flush()  # Python would do it too late to say that the disk is full
        return code
    except BrokenPipeError:  # `philens score ... | head`: nobody reads on
        _drop_output()
        return 141
    except (PhilensError, OSError) as error:
        tell(f"philens: error: {_sentence(error)}")
        _drop_output()
        return 2
    except KeyboardInterrupt:
        tell("philens: stopped; train goes on with --resume, solve, sweep and reproduce by the same command.")
        return 130
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)


def _drop_output() -> None:
    """Forget what standard output does not take; Python would complain of it at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; check the path and the space left there."
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
