"""`philens reproduce`: each finding is a command.

torch and transformers are imported inside the functions, so that help and errors come at once.
"""

from pathlib import Path
from typing import Any

from philens.commands import option
from philens.commands.show import console, say
from philens.support.errors import ConfigError
from philens.support.typed import words


def reproduce_tasks(
    scale: option.Scale = "small",
    architecture: option.Architecture = "transformer",
    output: option.FormalOutput = None,
    model: option.Run = None,
    seeds: option.Seeds = 1,
    documents: int | None = None,
    kl: option.Kl = None,
    **keys: Any,
) -> None:
    """Interesting tasks have high phi, boring ones low; surprisal has no such order. Keys as --key value.

    Args:
        documents: documents measured of each task.
    """
    _reproduce_formal("tasks", **locals())


def reproduce_complexity(
    scale: option.Scale = "small",
    architecture: option.Architecture = "transformer",
    output: option.FormalOutput = None,
    model: option.Run = None,
    seeds: option.Seeds = 1,
    documents: option.Quarter = None,
    kl: option.Kl = None,
    controls: option.Controls = None,
    **keys: Any,
) -> None:
    """With surprisal held fixed, phi follows what there is to infer. Recipe keys as --key value."""
    _reproduce_formal("complexity", **locals())


def reproduce_gain(
    scale: option.Scale = "small",
    architecture: option.Architecture = "transformer",
    output: option.FormalOutput = None,
    model: option.Run = None,
    seeds: option.Seeds = 1,
    documents: option.Quarter = None,
    kl: option.Kl = None,
    controls: option.Controls = None,
    **keys: Any,
) -> None:
    """Phi against what an ideal learner learns from each letter; our own finding. Keys as --key value."""
    _reproduce_formal("gain", **locals())


def _reproduce_formal(
    finding: str, keys: dict[str, Any], controls: str | None = None, **options: Any
) -> None:
    from philens.findings.reproduce import reproduce

    folder = options.pop("output") or Path("runs/reproduce-{scale}-{architecture}".format_map(options))
    results = reproduce(finding, output=folder, overrides=keys, controls=words(controls), **options)
    _show(results, folder / finding)


def reproduce_knobs(
    model: str | None = None,
    grid: Path | None = None,
    recipe: str = "small_layer",
    output: Path | None = None,
    documents: int = 100,
    **keys: Any,
) -> None:
    """Findings 1 and 2 in layers of one base, trained with one knob at a time otherwise. Keys as --key value.

    Args:
        model: base of formal languages, a folder or Hub id, which stays frozen; by default one is trained.
        grid: a YAML file of knobs, each with settings by name, and the recipe keys of each; by default
            insertion point, weight, latent size, prior, formula, base, steps and seed, for a base of at least
            4 blocks that is 128 wide.
        recipe: what all layers are trained by but for their setting, a YAML file or name.
        output: folder for runs and results; by default runs/knobs.
        documents: documents measured of each boring task; four times as many of in-context language.
    """
    from philens.findings.knobs import GRID, reproduce_knobs

    folder = output or Path("runs") / "knobs"
    _show(reproduce_knobs(model, folder, grid or GRID, recipe, documents, keys), folder / "knobs")


def reproduce_texts(
    levels: Path | None = None,
    model: option.Model = "smollm2",
    adapter: str | None = None,
    checkpoints: bool = False,
    output: Path | None = None,
    documents: int | None = None,
    tokens: option.Tokens = 384,
    kl: option.Kl = None,
    plain: option.Plain = False,
    window: int | None = None,
) -> None:
    """Code and prose have higher phi than boring text, in a language model that you have.

    Args:
        levels: a folder of texts by level, or of your own; what is missing is built. By default texts that
            philens brings, finds and builds.
        adapter: PHi layers, folders or Hub ids separated by commas, or the folder of a sweep; by default the
            run's.
        checkpoints: measure the checkpoints of these runs too.
        output: folder for results; by default runs/reproduce-MODEL.
        documents: texts measured of each level; by default all.
        window: tokens read at once; by default the rows' length of the run.
    """
    from philens.findings.reproduce_texts import reproduce_texts

    folder = output or Path("runs") / f"reproduce-{Path(model).name}"
    adapters = words(adapter)
    results = reproduce_texts(
        model, levels, folder, adapters, checkpoints, documents, tokens, kl, plain, window
    )
    _show(results, folder / "texts")


def reproduce_results(
    model: option.Model = "smollm2",
    adapter: str | None = None,
    sentences: int = 40,
    problems: str | None = None,
    split: option.Split = "test",
    limit: int = 40,
    kl: option.Kl = None,
    seed: int = 0,
    quick: bool = False,
    output: Path | None = None,
) -> None:
    """Phi is high where a result is worked out, though surprisal is not; our own finding.

    Args:
        adapter: the PHi layer, a folder or Hub id, or several, as A,B,C; by default the run's.
        sentences: sentences of each kind, made by philens.
        problems: gsm8k, or a file or folder like it, whose solutions are measured as well.
        limit: how many of them.
        seed: seed of the sentences.
        quick: leave out the two baselines of the logit lens, which take most of the time.
        output: folder for results; by default runs/reproduce-MODEL.
    """
    adapters = [] if adapter is None else [name.strip() for name in adapter.split(",")]
    if "" in adapters:
        raise ConfigError("An --adapter is empty; give folders or Hub ids as A,B,C.")
    from philens.findings.reproduce import reproduce_results

    folder = output or Path("runs") / f"reproduce-{Path(model).name}"
    measured = (sentences, problems, split, limit, kl, seed, quick)
    _show(reproduce_results(model, folder, adapters, *measured), folder / "results")


def reproduce_difficulty(
    scale: option.ReasoningScale = None,
    model: option.ReasoningModel = None,
    adapter: option.ReasoningAdapter = None,
    layers: option.Layers = None,
    recipe: option.LayersRecipe = None,
    problems: option.Problems = None,
    split: option.Split = "test",
    limit: option.Limit = None,
    levels: option.Levels = None,
    solutions: Path | None = None,
    prompt: option.PromptName = None,
    shots: option.Shots = 0,
    by: option.By = None,
    kl: option.Kl = None,
    dtype: option.Dtype = "auto",
    metrics: option.MoreMetrics = None,
    metric_option: option.MetricOption = None,
    seeds: option.Seeds = 1,
    output: option.ReasoningOutput = None,
    **keys: Any,
) -> None:
    """Phi of solutions grows with the difficulty of the problem. Keys of the layers' recipe as --key value.

    Args:
        solutions: solutions to measure instead of the problems' own, a file, or a folder of philens solve.
    """
    _reproduce_reasoning("difficulty", **locals())


def reproduce_correctness(
    scale: option.ReasoningScale = None,
    model: option.ReasoningModel = None,
    adapter: option.ReasoningAdapter = None,
    layers: option.Layers = None,
    recipe: option.LayersRecipe = None,
    problems: option.Problems = None,
    split: option.Split = "test",
    limit: option.Limit = None,
    levels: option.Levels = None,
    solutions: Path | None = None,
    prompt: option.PromptName = None,
    shots: option.Shots = 0,
    samples: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    by: option.By = None,
    kl: option.Kl = None,
    dtype: option.Dtype = "auto",
    metrics: option.MoreMetrics = None,
    metric_option: option.MetricOption = None,
    prefix: int = 50,
    seeds: option.Seeds = 1,
    output: option.ReasoningOutput = None,
    **keys: Any,
) -> None:
    """Of a model's own solutions, right ones have the higher phi. Keys of the layers' recipe as --key value.

    Args:
        solutions: existing ones, a file, or a folder of philens solve; else they are sampled.
        samples: solutions sampled of each problem.
        temperature: temperature of sampling.
        max_new_tokens: most tokens of a solution.
        prefix: choose early, too: by so many first tokens the better half of a problem's solutions is kept.
    """
    _reproduce_reasoning("correctness", **locals())


def _reproduce_reasoning(
    finding: Any,
    scale: str | None,
    output: Path | None,
    seeds: int,
    layers: str | None,
    levels: str | None,
    metrics: str | None,
    metric_option: dict[str, Any] | None,
    keys: dict[str, Any],
    **choices: Any,
) -> None:
    from philens.findings.reasoning import Choices, reproduce_reasoning
    from philens.findings.sweep import parse_layers
    from philens.reasoning.problems import parse_levels

    choices |= {"layers": None if layers is None else parse_layers(layers), "levels": parse_levels(levels)}
    choices |= {"metrics": words(metrics), "metric_options": metric_option, "overrides": keys}
    chosen = Choices(**choices)
    name = (scale or "small") if chosen.model is None else Path(chosen.model).name
    folder = output or Path("runs") / f"reasoning-{name}"
    _show(reproduce_reasoning(finding, folder, scale, chosen, seeds), folder / finding)


def _show(results: Any, folder: Path) -> None:
    for table in results.tables():
        console().print(table)
    say(f"Wrote {folder}.")
