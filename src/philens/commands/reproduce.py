"""`philens reproduce`: each finding is a command.

torch and transformers are imported inside the functions, so that help and errors come at once.
"""

from pathlib import Path
from typing import Any, Literal

from philens.commands.show import console, say
from philens.support.errors import ConfigError
from philens.support.typed import words


def reproduce_tasks(
    scale: Literal["smoke", "small", "paper"] = "small",
    architecture: Literal["transformer", "lstm"] = "transformer",
    output: Path | None = None,
    model: Path | None = None,
    seeds: int = 1,
    documents: int | None = None,
    kl: Literal["exact", "official"] | None = None,
    **keys: Any,
) -> None:
    """Interesting tasks have high phi, boring ones low; surprisal has no such order. Keys as --key value.

    Args:
        scale: size of model and training.
        architecture: architecture of the model.
        output: folder for runs and results; by default runs/reproduce-SCALE-ARCHITECTURE.
        model: a finished run to measure instead of training.
        seeds: how many models to train and measure.
        documents: documents measured of each task.
        kl: formula that phi is measured with; by default the one it was trained with.
    """
    _reproduce_formal("tasks", scale, architecture, output, model, seeds, documents, kl, keys)


def reproduce_complexity(
    scale: Literal["smoke", "small", "paper"] = "small",
    architecture: Literal["transformer", "lstm"] = "transformer",
    output: Path | None = None,
    model: Path | None = None,
    seeds: int = 1,
    documents: int | None = None,
    kl: Literal["exact", "official"] | None = None,
    controls: str | None = None,
    **keys: Any,
) -> None:
    """With surprisal held fixed, phi follows what there is to infer. Recipe keys as --key value.

    Args:
        scale: size of model and training.
        architecture: architecture of the model.
        output: folder for runs and results; by default runs/reproduce-SCALE-ARCHITECTURE.
        model: a finished run to measure instead of training.
        seeds: how many models to train and measure.
        documents: a quarter of the documents measured.
        kl: formula that phi is measured with; by default the one it was trained with.
        controls: finished runs, separated by commas, whose phi stands beside that of untrained ones.
    """
    runs = [run.strip() for run in (controls or "").split(",") if run.strip()]
    _reproduce_formal("complexity", scale, architecture, output, model, seeds, documents, kl, keys, runs)


def reproduce_gain(
    scale: Literal["smoke", "small", "paper"] = "small",
    architecture: Literal["transformer", "lstm"] = "transformer",
    output: Path | None = None,
    model: Path | None = None,
    seeds: int = 1,
    documents: int | None = None,
    kl: Literal["exact", "official"] | None = None,
    controls: str | None = None,
    **keys: Any,
) -> None:
    """Phi against what an ideal learner learns from each letter; our own finding. Recipe keys as --key value.

    Args:
        scale: size of model and training.
        architecture: architecture of the model.
        output: folder for runs and results; by default runs/reproduce-SCALE-ARCHITECTURE.
        model: a finished run to measure instead of training.
        seeds: how many models to train and measure.
        documents: a quarter of the documents measured.
        kl: formula that phi is measured with; by default the one it was trained with.
        controls: finished runs, separated by commas, whose phi stands beside that of untrained ones.
    """
    runs = [run.strip() for run in (controls or "").split(",") if run.strip()]
    _reproduce_formal("gain", scale, architecture, output, model, seeds, documents, kl, keys, runs)


def _reproduce_formal(
    finding: str, scale: str, architecture: str, output: Path | None, model: Path | None, *options: Any
) -> None:
    """Reproduce a finding on formal languages and show what was found."""
    from philens.findings.reproduce import reproduce

    folder = output or Path("runs") / f"reproduce-{scale}-{architecture}"
    for table in reproduce(finding, scale, folder, architecture, model, *options).tables():
        console().print(table)
    say(f"Wrote {folder / finding}.")


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
    for table in reproduce_knobs(model, folder, grid or GRID, recipe, documents, keys).tables():
        console().print(table)
    say(f"Wrote {folder / 'knobs'}.")


def reproduce_texts(
    levels: Path | None = None,
    model: str = "smollm2",
    adapter: str | None = None,
    checkpoints: bool = False,
    output: Path | None = None,
    documents: int | None = None,
    tokens: int = 384,
    kl: Literal["exact", "official"] | None = None,
    plain: bool = False,
    window: int | None = None,
) -> None:
    """Code and prose have higher phi than boring text, in a language model that you have.

    Args:
        levels: a folder of texts by level, or of your own; what is missing is built. By default texts that
            philens brings, finds and builds.
        model: a finished run, or a base model, a folder, GGUF file or Hub id; or smollm2, for which philens
            brings a layer.
        adapter: PHi layers, folders or Hub ids separated by commas, or the folder of a sweep; by default the
            run's.
        checkpoints: measure the checkpoints of these runs too.
        output: folder for results; by default runs/reproduce-MODEL.
        documents: texts measured of each level; by default all.
        tokens: tokens of each text that are read, from its beginning; 0 means all.
        kl: formula that phi is measured with; by default the one it was trained with.
        plain: score texts alone, not as the assistant's reply to a user.
        window: tokens read at once; by default the rows' length of the run.
    """
    from philens.findings.reproduce_texts import reproduce_texts

    folder = output or Path("runs") / f"reproduce-{Path(model).name}"
    adapters = words(adapter)
    results = reproduce_texts(
        model, levels, folder, adapters, checkpoints, documents, tokens, kl, plain, window
    )
    for table in results.tables():
        console().print(table)
    say(f"Wrote {folder / 'texts'}.")


def reproduce_results(
    model: str = "smollm2",
    adapter: str | None = None,
    sentences: int = 40,
    problems: str | None = None,
    split: str = "test",
    limit: int = 40,
    kl: Literal["exact", "official"] | None = None,
    seed: int = 0,
    quick: bool = False,
    output: Path | None = None,
) -> None:
    """Phi is high where a result is worked out, though surprisal is not; our own finding.

    Args:
        model: a finished run, or a base model, a folder, GGUF file or Hub id; or smollm2, for which philens
            brings a layer.
        adapter: the PHi layer, a folder or Hub id, or several, as A,B,C; by default the run's.
        sentences: sentences of each kind, made by philens.
        problems: gsm8k, or a file or folder like it, whose solutions are measured as well.
        split: split of the problems.
        limit: how many of them.
        kl: formula that phi is measured with; by default the one it was trained with.
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
    for table in reproduce_results(model, folder, adapters, *measured).tables():
        console().print(table)
    say(f"Wrote {folder / 'results'}.")


def reproduce_difficulty(
    scale: Literal["smoke", "small", "paper"] | None = None,
    model: str | None = None,
    adapter: str | None = None,
    layers: str | None = None,
    recipe: str | None = None,
    problems: str | None = None,
    split: str = "test",
    limit: int | None = None,
    levels: str | None = None,
    solutions: Path | None = None,
    prompt: str | None = None,
    shots: int = 0,
    by: Literal["level", "steps"] | None = None,
    kl: Literal["exact", "official"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    metrics: str | None = None,
    metric_option: dict[str, Any] | None = None,
    seeds: int = 1,
    output: Path | None = None,
    **keys: Any,
) -> None:
    """Phi of solutions grows with the difficulty of the problem. Keys of the layers' recipe as --key value.

    Args:
        scale: smoke and small train a model on arithmetic, paper takes Llama 3.2 3B and MATH; by default
            small, and with a model paper.
        model: a base model, a folder or Hub id, or a finished run, instead.
        adapter: the PHi layer, a folder or Hub id, or the folder of a sweep; else the run's, or layers
            are trained.
        layers: where layers to be trained go in, as 4,8,12 or 4:28:4 (from, to before, step).
        recipe: what they are trained by, a YAML file or name.
        problems: gsm8k, math, arithmetic, sums, a file or folder, or a data set on the Hub.
        split: split of the problems.
        limit: how many of them.
        levels: levels of problems, and of solved ones in the prompt, as 1,2 or 2:7 (from, to before); where
            problems have none, how many steps. By default all.
        solutions: solutions to measure instead of the problems' own, a file, or a folder of philens solve.
        prompt: how problems are put: gsm8k, math, arithmetic or sums (the problem alone), boxed, or a text
            file with the instruction; by default that of the data set, else boxed.
        shots: solved training problems in the prompt.
        by: what difficulty is; by default level where the problems have it.
        kl: formula that phi is measured with; by default the one it was trained with.
        dtype: precision of the base model; auto is that of its files.
        metrics: others beside phi, surprisal, entropy and the controls, separated by commas: confidence,
            deep_thinking, ...
        metric_option: what metrics leave open, as KEY=VALUE: settled_at (0.5 bits), deep_from (0.85 of the
            blocks), group (32 tokens); may be given several times.
        seeds: how many models to train and measure.
        output: folder for runs and results; by default runs/reasoning-SCALE or -MODEL.
    """
    from philens.reasoning.problems import parse_levels

    chosen = {"solutions": solutions, "by": by, "kl": kl, "prompt": prompt, "shots": shots}
    chosen |= {"dtype": dtype, "levels": parse_levels(levels), "metrics": words(metrics)}
    chosen |= {"metric_options": metric_option}
    chosen |= {"problems": problems, "split": split, "limit": limit}
    _reproduce_reasoning(
        "difficulty",
        scale,
        output,
        seeds,
        layers,
        model=model,
        adapter=adapter,
        recipe=recipe,
        overrides=keys,
        **chosen,
    )


def reproduce_correctness(
    scale: Literal["smoke", "small", "paper"] | None = None,
    model: str | None = None,
    adapter: str | None = None,
    layers: str | None = None,
    recipe: str | None = None,
    problems: str | None = None,
    split: str = "test",
    limit: int | None = None,
    levels: str | None = None,
    solutions: Path | None = None,
    prompt: str | None = None,
    shots: int = 0,
    samples: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    by: Literal["level", "steps"] | None = None,
    kl: Literal["exact", "official"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    metrics: str | None = None,
    metric_option: dict[str, Any] | None = None,
    prefix: int = 50,
    seeds: int = 1,
    output: Path | None = None,
    **keys: Any,
) -> None:
    """Of a model's own solutions, right ones have the higher phi. Keys of the layers' recipe as --key value.

    Args:
        scale: smoke and small train a model on arithmetic, paper takes Llama 3.2 3B and MATH; by default
            small, and with a model paper.
        model: a base model, a folder or Hub id, or a finished run, instead.
        adapter: the PHi layer, a folder or Hub id, or the folder of a sweep; else the run's, or layers
            are trained.
        layers: where layers to be trained go in, as 4,8,12 or 4:28:4 (from, to before, step).
        recipe: what they are trained by, a YAML file or name.
        problems: gsm8k, math, arithmetic, sums, a file or folder, or a data set on the Hub.
        split: split of the problems.
        limit: how many of them.
        levels: levels of problems, and of solved ones in the prompt, as 1,2 or 2:7 (from, to before); where
            problems have none, how many steps. By default all.
        solutions: existing ones, a file, or a folder of philens solve; else they are sampled.
        prompt: how problems are put: gsm8k, math, arithmetic or sums (the problem alone), boxed, or a text
            file with the instruction; by default that of the data set, else boxed.
        shots: solved training problems in the prompt.
        samples: solutions sampled of each problem.
        temperature: temperature of sampling.
        max_new_tokens: most tokens of a solution.
        by: what difficulty is; by default level where the problems have it.
        kl: formula that phi is measured with; by default the one it was trained with.
        dtype: precision of the base model; auto is that of its files.
        metrics: others beside phi, surprisal, entropy and the controls, separated by commas: confidence,
            deep_thinking, ...
        metric_option: what metrics leave open, as KEY=VALUE: settled_at (0.5 bits), deep_from (0.85 of the
            blocks), group (32 tokens); may be given several times.
        prefix: choose early, too: by so many first tokens the better half of a problem's solutions is kept.
        seeds: how many models to train and measure.
        output: folder for runs and results; by default runs/reasoning-SCALE or -MODEL.
    """
    from philens.reasoning.problems import parse_levels

    chosen = {"solutions": solutions, "by": by, "kl": kl, "prompt": prompt, "shots": shots}
    chosen |= {"dtype": dtype, "levels": parse_levels(levels), "metrics": words(metrics)}
    chosen |= {"metric_options": metric_option, "prefix": prefix}
    chosen |= {"problems": problems, "split": split, "limit": limit, "samples": samples}
    chosen |= {"temperature": temperature, "max_new_tokens": max_new_tokens}
    _reproduce_reasoning(
        "correctness",
        scale,
        output,
        seeds,
        layers,
        model=model,
        adapter=adapter,
        recipe=recipe,
        overrides=keys,
        **chosen,
    )


def _reproduce_reasoning(
    finding: Any, scale: str | None, output: Path | None, seeds: int, layers: str | None, **choices: Any
) -> None:
    """Reproduce a finding on reasoning and show what was found."""
    from philens.findings.reasoning import Choices, reproduce_reasoning
    from philens.findings.sweep import parse_layers

    points = None if layers is None else parse_layers(layers)
    name = (scale or "small") if choices["model"] is None else Path(choices["model"]).name
    folder = output or Path("runs") / f"reasoning-{name}"
    chosen = Choices(layers=points, **choices)
    for table in reproduce_reasoning(finding, folder, scale, chosen, seeds).tables():
        console().print(table)
    say(f"Wrote {folder / finding}.")
