"""Commands that train a PHi layer and look through it.

torch and transformers are imported inside the functions, so that help and errors come at once.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

from philens.commands import option
from philens.commands.show import console, say, tell
from philens.support.errors import AdapterError, ConfigError
from philens.support.output import utf8_output
from philens.support.typed import shown, words


def demo(output: Path = Path("philens-demo"), documents: int = 32) -> None:
    """Show what the models that philens brings see in texts and in formal languages: tables, figures, pages.

    The language model is fetched once. Where it cannot be had, only formal languages are shown.

    Args:
        output: folder for results, figures and pages.
        documents: documents measured of each formal task.
    """
    from philens.bases.hub import fetch_named
    from philens.findings.demo import MODEL, demo_tasks, demo_texts
    from philens.findings.language_tables import tasks_table, text_pairs_table, texts_table

    if documents < 2:
        raise ConfigError(f"documents must be at least 2, not {documents}.")
    try:
        fetch_named(MODEL)
    except (AdapterError, ConfigError) as error:
        say(f"Only formal languages are shown: {error}")
    else:
        results = demo_texts(output)
        console().print(texts_table(results))
        console().print(text_pairs_table(results))
    console().print(tasks_table(demo_tasks(output, documents)))
    for folder in ("texts", "tasks"):
        if (output / folder / "page.html").is_file():
            say(f"Wrote {output / folder}; open {output / folder / 'page.html'} in a browser.")


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
    from philens.training.recipe import load_recipe, recipe_yaml

    resolved = load_recipe(recipe, keys)
    if print_config:
        utf8_output().write(recipe_yaml(resolved))
        return 0
    from philens.support.processes import rank
    from philens.training.folder import RunFolder
    from philens.training.trainer import train

    if output is None and (resolved.name in ("", "..") or set("/\\\0") & set(resolved.name)):
        raise ConfigError(
            f"name must be that of a folder in runs, not {shown(resolved.name)}; change it or give --output."
        )
    folder = output or Path("runs") / resolved.name
    finished = train(resolved, folder, resume)
    if rank().number > 0:
        return 130 if finished is None else 0
    if finished is None:
        say(f"Stopped; go on with: philens train {recipe} --output {folder} --resume")
        return 130
    if not resolved.instruments:
        base = RunFolder(folder).model
        say(f"Wrote {folder}; a PHi layer goes into it by: philens train any_model --model.base {base}")
    else:
        say(f"Wrote {folder}; read it with philens.load_run({str(folder)!r}).")
    return 0


def score(
    files: list[str],
    model: option.Model = "smollm2",
    adapter: str | None = None,
    metrics: str | None = None,
    field: str | None = None,
    by: Literal["file", "line"] = "file",
    split: str = "train",
    limit: int | None = None,
    format: Literal["terminal", "table", "jsonl", "parquet", "html"] = "terminal",
    output: Path | None = None,
    window: option.Window = None,
    batch_tokens: option.BatchTokens = 4096,
    overflow: Literal["error", "nan"] = "error",
    alternatives: bool = False,
    steps: Literal["lines", "sentences", "equations"] | None = None,
    metric_option: option.MetricOption = None,
    chat_option: option.ChatOption = None,
    system: option.System = None,
    bos: option.Bos = False,
    shard_characters: int = 1_000_000,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    revision: option.Revision = None,
    dtype: option.Dtype = "auto",
    trust_remote_code: option.TrustRemoteCode = False,
    generate: str | None = None,
    max_new_tokens: int = 100,
    sample: bool = False,
    temperature: float = 1.0,
    steer: float = 0.0,
) -> int:
    """Score texts token by token: show them coloured by phi, or write JSON Lines, Parquet or a page.

    Started by accelerate launch -m philens score, or torchrun, several processes fill a folder together.

    Args:
        files: text files, .jsonl, .json, .csv, .tsv or .parquet, also .gz and .zst, also as
            s3://bucket/path (gs://, ...), there also folders; - for standard input, hub:owner/name for a
            data set of the Hub.
        adapter: the PHi layer or shallow head, a folder or Hub id; own is the multi-token head that the model
            brings along.
        metrics: columns, separated by commas: phi, mtd, surprisal, surprisal_with_layer, entropy, ...; by
            default what the adapter measures, and surprisal.
        field: field of records that holds the text or a chat's messages; by default text, else messages.
        by: what is a document in a text file.
        split: split of data sets of the Hub.
        limit: stop after this many documents.
        format: form of what is shown or written.
        output: the page; for jsonl and parquet a folder, where the same command goes on after a stop.
        overflow: what becomes of tokens whose numbers overflow: an error, or nan, which is counted.
        alternatives: also the likeliest tokens in each token's place, and the rank of its own.
        steps: also the means of each of these in thoughts and answers, in what the assistant says, or in the
            text: lines, sentences or equations.
        shard_characters: characters of text in a file of the output folder, about.
        engine: where scoring runs: in this process, or on the Ray cluster at RAY_ADDRESS (else a local one).
        workers: models at work at once with --engine ray; by default one for each GPU, or one without.
        generate: go on writing after this prompt instead, each token coloured by phi as it comes.
        max_new_tokens: how many to generate.
        sample: draw the tokens, instead of taking the likeliest.
        temperature: temperature of drawing.
        steer: with a shallow head, write more of what it foretells (up to 1) or less (down to -1).
    """
    from philens.lens.config import MetricOptions
    from philens.scoring.corpus import Corpus
    from philens.scoring.run import Scorer, score_corpus
    from philens.support.processes import rank
    from philens.tasks.rendering import Rendering
    from philens.training.opening import open_lens
    from philens.training.source import ModelSource

    process = rank()
    source = ModelSource(model, adapter, revision, dtype, trust_remote_code)
    rendering, measured_by = Rendering(chat_option or {}, system, bos), MetricOptions.of(metric_option or {})
    if generate is not None:
        if files:
            raise ConfigError(f"--generate writes a text of its own; leave out {files[0]}.")
        if process.of > 1:
            raise ConfigError("--generate writes one text; start it as one process.")
        if metrics is not None:
            raise ConfigError("--generate shows phi, or mtd, and surprisal; leave out --metrics.")
        if max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be at least 1, not {max_new_tokens}.")
        if sample and not 0 < temperature < math.inf:
            raise ConfigError(f"--temperature must be above 0, not {temperature:g}.")
        if chat_option or system is not None:
            raise ConfigError("--generate goes on from plain text; leave out --chat-option and --system.")
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
        options |= {"temperature": temperature} if sample else {}
        _generate(open_lens(source, rendering), generate, options | {"overflow": overflow, "steer": steer})
        return 0
    if steer:
        raise ConfigError("--steer is for a text that the model writes; give --generate, or leave it out.")
    schedule = None
    if engine == "ray":
        from philens.scoring.ray import RaySchedule

        if process.of > 1:
            raise ConfigError("--engine ray starts its own workers; start it as one process.")
        schedule = RaySchedule(workers)
    elif workers is not None:
        raise ConfigError("--workers needs --engine ray; processes are started by accelerate launch.")
    corpus = Corpus(files, field, by, split, limit)
    try:
        summary = score_corpus(
            corpus,
            Scorer(
                partial(open_lens, source, rendering, measured_by),
                None if metrics is None else words(metrics),
                batch_tokens,
                window,
                overflow,
                alternatives,
                steps,
            ),
            format,
            output,
            shard_characters=shard_characters,
            options={
                "model": model,
                "adapter": adapter,
                "revision": revision,
                "dtype": dtype,
                **rendering.record(),
                **({"metric_option": metric_option} if metric_option else {}),
            },
            rank=process,
            schedule=schedule,
        )
    except KeyboardInterrupt:
        if process.number == 0:
            goes_on = "; the same command goes on" if format in ("jsonl", "parquet") and output else ""
            tell(f"philens: stopped{goes_on}.")
        return 130
    if output is None:
        tell(f"Scored {summary}.")
    elif summary.finished and (summary.new or process.of == 1):  # of several processes the last one, once
        say(f"{'Wrote' if summary.new else 'Already finished:'} {output}: {summary}.")
    return 0


def _generate(loaded: Any, prompt: str, options: dict[str, Any]) -> None:
    """Show a text as a model writes it."""
    from philens.scoring.streaming import stream
    from philens.show.tokens import LiveTokens

    lens, tokenizer = loaded
    view = LiveTokens(console(), lens.config.kind)
    stream(lens, tokenizer, prompt, view.write, **options)
    view.close()


def explore(
    model: str | None = None,
    adapter: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_characters: int = 10_000,
    record: Path | None = None,
    metric_option: option.MetricOption = None,
    bos: option.Bos = False,
    revision: option.Revision = None,
    dtype: option.Dtype = "auto",
    trust_remote_code: option.TrustRemoteCode = False,
) -> None:
    """Open a page on this machine that reads texts as they are pasted, written or chosen, until Ctrl+C.

    Args:
        model: base model, a folder, GGUF file or Hub id, or a run folder with its adapters; by default the
            shipped ones.
        adapter: PHi layers, folders or Hub ids separated by commas, or the folder of a sweep.
        host: address to listen on; any but that of this machine lets others use the model.
        port: port to listen on; 0 takes any that is free.
        max_characters: that a text may have.
        record: file that keeps every view of the session, a page that works without philens.
    """
    from philens.explore.server import explore
    from philens.lens.config import MetricOptions
    from philens.tasks.rendering import Rendering
    from philens.training.source import ModelSource

    source = None if model is None else ModelSource(model, None, revision, dtype, trust_remote_code)
    measured_by = MetricOptions.of(metric_option or {})
    explore(source, words(adapter), host, port, max_characters, say, record, Rendering(bos=bos), measured_by)


def sweep(
    model: str,
    layers: str | None = None,
    recipe: str = "any_model",
    output: Path | None = None,
    **keys: Any,
) -> int:
    """Train a PHi layer after each of several blocks of a model, side by side. Recipe keys as --key value.

    Args:
        model: base model, a folder, GGUF file or Hub id; it stays frozen.
        layers: blocks, as 4,8,12 or 4:28:4 (from, to before, step).
        recipe: what the layers are trained by, a YAML file or name.
        output: folder of the run, the adapters and results; by default runs/sweep.
    """
    from philens.findings.language_tables import sweep_table
    from philens.findings.sweep import parse_layers, sweep

    folder = output or Path("runs") / "sweep"
    results = sweep(model, parse_layers(layers or ""), folder, recipe, keys)
    if results is None:
        say("Stopped; the same command goes on.")
        return 130
    console().print(sweep_table(results))
    say(f"Wrote {folder}; each layer by itself is in {folder}/layer-N.")
    return 0


def env() -> None:
    """Print versions, extras and devices, for a bug report; no paths and no names."""
    from philens.commands.environment import environment

    for section, rows in environment().items():
        say(f"{section}:")
        for name, value in rows.items():
            say(f"  {name:18}{value}")
