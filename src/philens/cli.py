"""The command line: one typed function is one command."""

import argparse
import inspect
import logging
import os
import re
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
    """Train a model, or a layer in one, by a recipe. Any recipe key can be given as --key value.

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
    if resolved.phi is None:
        base = folder / "model"
        _say(f"Wrote {folder}; a PHi layer goes into it by: philens train text_phi --model.base {base}")
    else:
        _say(f"Wrote {folder}; read it with philens.load_run({str(folder)!r}).")
    return 0


def reproduce(
    finding: Literal["tasks", "complexity", "texts"],
    scale: Literal["smoke", "small", "paper"] = "small",
    architecture: Literal["transformer", "lstm"] = "transformer",
    output: Path | None = None,
    model: str | None = None,
    adapter: str | None = None,
    levels: Path | None = None,
    plain: bool = False,
    window: int | None = None,
    seeds: int = 1,
    documents: int | None = None,
    kl: Literal["exact", "official"] | None = None,
    **keys: Any,
) -> None:
    """Reproduce a finding of the paper, training the model first. Any recipe key can be given as --key value.

    Args:
        finding: tasks (interesting ones have high phi), complexity (phi follows the description length), or
            texts (code and prose have higher phi than boring text) on a language model that you have.
        scale: size of model and training.
        architecture: of the model.
        output: folder for runs and results; by default runs/reproduce-SCALE-ARCHITECTURE or -MODEL.
        model: a finished run to measure instead of training; of texts a run, or a base model.
        adapter: of texts, the PHi layer, a folder or Hub id; by default the run's.
        levels: of texts, a folder of them by level, or of your own; what is missing is built.
        plain: of texts, score them alone, not as the assistant's reply to a user.
        window: of texts, tokens read at once; by default the rows' length of the run.
        seeds: how many models to train and measure.
        documents: documents measured of each task or level; of texts by default all.
        kl: formula that phi is measured with; by default the one it was trained with.
    """
    from philens.report import terminal

    if finding == "texts":
        _leave_out(finding, {"scale": scale, "architecture": architecture, "seeds": seeds} | keys)
        return _reproduce_texts(model, adapter, levels, output, documents, kl, plain, window)
    _leave_out(finding, {"adapter": adapter, "levels": levels, "plain": plain, "window": window})
    from philens.findings.reproduce import reproduce

    folder = output or Path("runs") / f"reproduce-{scale}-{architecture}"
    run = None if model is None else Path(model)
    results = reproduce(finding, scale, folder, architecture, run, seeds, documents, kl, keys)
    table = terminal.tasks_table if finding == "tasks" else terminal.complexity_table
    for one in results.get("seeds", [results]):
        if "seeds" in results:
            _say(f"Seed {one['seed']}")
        _console().print(table(one))
    if "spread" in results:
        _console().print(terminal.spread_table(results["spread"]))
    _say(f"Wrote {folder / finding}.")


def _reproduce_texts(
    model: str | None, adapter: str | None, levels: Path | None, output: Path | None, *options: Any
) -> None:
    """Measure levels of text and show what was found."""
    from philens.report.terminal import text_pairs_table, texts_table

    if model is None:
        raise ConfigError("texts are measured in a language model; give --model, a run or a base model.")
    if levels is None:
        raise ConfigError("Which texts? Give --levels, a folder of texts of several levels, or of your own.")
    from philens.findings.reproduce import reproduce_texts

    folder = output or Path("runs") / f"reproduce-{Path(model).name}"
    results = reproduce_texts(model, levels, folder, adapter, *options)
    _console().print(texts_table(results))
    if any(pair["claim"] for pair in results["pairs"]):
        _console().print(text_pairs_table(results))
    _say(f"Wrote {folder / 'texts'}.")


def _leave_out(finding: str, options: dict[str, Any]) -> None:
    """Raise a ConfigError if one of these is given: is not as it is by default."""
    defaults = {name: parameter.default for name, parameter in _parameters(reproduce).items()}
    for name, value in options.items():
        if name not in defaults or value != defaults[name]:
            raise ConfigError(f"--{name} does not go with the finding {finding}; leave it out.")


def score(
    files: list[str],
    model: str | None = None,
    adapter: str | None = None,
    metrics: str = "phi,surprisal",
    field: str | None = None,
    by: Literal["file", "line"] = "file",
    split: str = "train",
    limit: int | None = None,
    format: Literal["terminal", "table", "jsonl", "parquet", "html"] = "terminal",
    output: Path | None = None,
    window: int | None = None,
    batch_tokens: int = 4096,
    shard_characters: int = 1_000_000,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
    generate: str | None = None,
    max_new_tokens: int = 100,
    sample: bool = False,
    temperature: float = 1.0,
) -> int:
    """Score texts token by token: show them coloured by phi, or write JSON Lines, Parquet or a page.

    Args:
        files: text files, .jsonl or .parquet, - for standard input, hub:owner/name for a data set of the Hub.
        model: base model, a folder or Hub id, or a run folder with its adapter; by default the shipped model.
        adapter: the PHi layer, a folder or Hub id.
        metrics: columns, separated by commas: phi, surprisal, surprisal_with_layer, entropy, ...
        field: field of records that holds the text or a chat's messages; by default text, else messages.
        by: what is a document in a text file.
        split: of data sets of the Hub.
        limit: stop after this many documents.
        format: of what is shown or written.
        output: the page; for jsonl and parquet a folder, where the same command goes on after a stop.
        window: tokens read at once in longer texts; by default the model's context.
        batch_tokens: tokens in a batch.
        shard_characters: characters of text in a file of the output folder, about.
        revision: branch, tag or commit of the model on the Hub.
        dtype: of the base model; auto is that of its files.
        trust_remote_code: run Python code that comes with the model.
        generate: go on writing after this prompt instead, each token coloured by phi as it comes.
        max_new_tokens: how many to generate.
        sample: draw the tokens, instead of taking the likeliest.
        temperature: of drawing.
    """
    from philens.scoring.corpus import Corpus
    from philens.scoring.run import load_lens, score_corpus

    source = (model or str(philens.SHIPPED), adapter, revision, dtype, trust_remote_code)
    if generate is not None:
        if files:
            raise ConfigError(f"--generate writes a text of its own; leave out {files[0]}.")
        _generate(load_lens(*source), generate, max_new_tokens, sample, temperature)
        return 0
    corpus = Corpus(files, field, by, split, limit)
    try:
        summary = score_corpus(
            corpus,
            lambda: load_lens(*source),
            format,
            output,
            metrics=[name.strip() for name in metrics.split(",") if name.strip()],
            batch_tokens=batch_tokens,
            window=window,
            shard_characters=shard_characters,
            options=dict(zip(("model", "adapter", "revision", "dtype"), source, strict=False)),
        )
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if format in ("jsonl", "parquet") and output else ""
        sys.stderr.write(f"philens: stopped{goes_on}.\n")
        return 130
    if output is None:
        sys.stderr.write(f"Scored {summary}.\n")
    else:
        _say(f"{'Wrote' if summary.new else 'Already finished:'} {output}: {summary}.")
    return 0


def _generate(loaded: Any, prompt: str, max_new_tokens: int, sample: bool, temperature: float) -> None:
    """Show a text as a model writes it."""
    from philens.generation import stream
    from philens.report.tokens import LiveTokens

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
    if sample:
        options["temperature"] = temperature
    lens, tokenizer = loaded
    view = LiveTokens(_console())
    stream(lens, tokenizer, prompt, view.write, **options)
    view.close()


def sweep(
    model: str,
    layers: str | None = None,
    recipe: str = "any_model",
    output: Path | None = None,
    **keys: Any,
) -> int:
    """Train a PHi layer after each of several blocks of a model, side by side. Recipe keys as --key value.

    Args:
        model: base model, a folder or Hub id; it stays frozen.
        layers: blocks, as 4,8,12 or 4:28:4 (from, to before, step).
        recipe: what the layers are trained by, a YAML file or name.
        output: folder of the run, the adapters and results; by default runs/sweep.
    """
    from philens.findings.sweep import parse_layers, sweep
    from philens.report.terminal import sweep_table

    folder = output or Path("runs") / "sweep"
    results = sweep(model, parse_layers(layers or ""), folder, recipe, keys)
    if results is None:
        _say("Stopped; the same command goes on.")
        return 130
    _console().print(sweep_table(results))
    _say(f"Wrote {folder}; each layer by itself is in {folder}/layer-N.")
    return 0


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
    "score": score,
    "reproduce": reproduce,
    "sweep": sweep,
    "env": env,
}


def _console() -> Any:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


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
        text = inspect.getdoc(function) or ""
        summary = text.partition("\n")[0]
        sub = commands.add_parser(name, description=summary, help=summary, allow_abbrev=False)
        # A description goes on in lines indented further.
        found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
        described = {option: " ".join(about.split()) for option, about in found}
        for option, parameter in _parameters(function).items():
            about = described.get(option, "")
            if parameter.annotation is bool:
                sub.add_argument(_option(option), action="store_true", help=about)
            elif get_origin(parameter.annotation) is list:
                sub.add_argument(option, nargs="*", metavar="FILE", help=about)
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
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
    except BrokenPipeError:  # `philens score ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
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
