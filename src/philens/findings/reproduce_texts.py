"""Levels of text measured in a language model, from adapters to results, figures and a page."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from philens.bases.facts import text_config
from philens.findings import Results, write_finding
from philens.findings.language_tables import all_texts_tables
from philens.findings.reproduce import lenses, prepare
from philens.findings.texts import (
    compare_points,
    cut_texts,
    measure_texts,
    score_texts,
    surprisal_rows,
    text_rows,
    token_rows,
)
from philens.lens.metrics import CONTROLS
from philens.lens.model import PHiModel
from philens.scoring.scores import TokenScores
from philens.support.errors import ConfigError
from philens.support.progress import shown
from philens.support.versions import versions
from philens.tasks.levels import LevelText, load_levels, without_users
from philens.training.folder import RunFolder, adapters_in, is_checkpoint, place_of, step_of
from philens.training.opening import load_lens

# Tokens of each text that are read, so that no level has longer texts than another.
TOKENS = 384


def reproduce_texts(
    model: str | Path,
    levels: Path | None,
    output: Path,
    adapters: Sequence[str | Path] = (),
    checkpoints: bool = False,
    documents: int | None = None,
    tokens: int = TOKENS,
    kl: Literal["exact", "official"] | None = None,
    plain: bool = False,
    window: int | None = None,
    seed: int = 0,
) -> Results:
    """Measure phi and surprisal of texts of several levels in a language model, and write `output/texts`.

    Of several adapters or insertion points, results are those of the last, and `points` has those of each.

    What else is given are the options of `philens reproduce texts`.

    Args:
        levels: folder of texts; `philens.tasks.levels.read_levels` says in which form. Trivial and shuffled
            texts are built where it has none. None takes the texts that philens has (`own_levels`).
        window: tokens read at once; None means the length of the rows that a run was trained on, else the
            model's context.
        seed: seed of what is built, drawn and resampled.

    Raises:
        PhilensError: texts, model or layer are missing, damaged or do not fit.
    """
    check_reading(documents, tokens)
    found = [path for one in adapters for path in (adapters_in(one, checkpoints) or [str(one)])]
    if checkpoints and not adapters:
        found = adapters_in(model, checkpoints)
    texts = load_levels(levels, documents, seed)
    if plain:
        texts = without_users(texts)
    first, tokenizer = load_lens(str(model), found[0] if found else None)
    own = RunFolder(model)
    recipe = own.recipe() if not adapters and own.exists else None
    if window is None and recipe is not None:
        limit = getattr(text_config(first.base), "max_position_embeddings", None)
        window = min(recipe.data.length, limit or recipe.data.length)
    if tokens:
        texts = cut_texts(tokenizer, texts, tokens)
    points: list[dict[str, Any]] = []
    scores: list[TokenScores] = []
    here: list[TokenScores] = []
    for adapter, lens in lenses(first, found):
        if points and _is_last(points[-1], adapter, lens):
            continue
        prepare(lens, kl)
        scores = _scored(lens, tokenizer, texts, window, scores)
        for path, point in zip(lens.module_paths, lens.column_points, strict=False):
            here = [one.at_point(point) for one in scores]
            where = {"adapter": adapter, "insertion_point": path, "step": _step(lens, adapter)}
            points.append({**where, **measure_texts(texts, here, seed=seed)})
    for point, label in zip(points, _labels(points), strict=True):
        point["label"] = label
    results = {key: value for key, value in points[-1].items() if key not in ("label", "step")}
    if len(points) > 1:
        short = [{key: point[key] for key in point if key not in ("tokens", "texts")} for point in points]
        results |= {"points": short, "course": compare_points(points, _along(points))}
    run = {
        "finding": "texts",
        "model": str(model),
        "adapter": results["adapter"],
        "form": "chat" if any(span.name == "assistant" for span in scores[0].spans) else "text",
        "seed": seed,
        "kl": kl or first.config.kl,
        "levels_from": None if levels is None else str(levels),
        "tokens_read": tokens or None,
        "versions": versions(),
        "provenance": scores[0].provenance,
        "recipe": None if recipe is None else asdict(recipe),
    }
    from philens.findings.figures import figure_levels_by_surprisal, figure_levels_course, figure_texts
    from philens.findings.text_page import write_text_page

    tables = {"texts": text_rows(results), "documents": results["texts"]}
    tables |= {"tokens": token_rows(results), "surprisal": surprisal_rows(results)}
    figures = {"texts": figure_texts(results), "surprisal": figure_levels_by_surprisal(results)}
    figures |= {"course": figure_levels_course(results)} if "points" in results else {}
    write_finding(output / "texts", results, tables, figures, run)
    scored = list(zip(texts, here, strict=True))
    write_text_page(output / "texts" / "page.html", results, scored, run["provenance"])
    return Results(run | results, all_texts_tables)


def check_reading(documents: int | None, tokens: int) -> None:
    """Raise a ConfigError unless so many texts of a level, and tokens of a text, can be read."""
    if documents is not None and documents < 2:
        raise ConfigError(f"documents must be at least 2, not {documents}.")
    if tokens < 0:
        raise ConfigError(f"tokens must be at least 1, or 0 for whole texts, not {tokens}.")


def _scored(
    lens: PHiModel,
    tokenizer: Any,
    texts: Sequence[LevelText],
    window: int | None,
    before: Sequence[TokenScores],
) -> list[TokenScores]:
    """The scores of a lens; what the base alone gives is taken from those of the lens before."""
    metrics = ["phi", *CONTROLS]
    metrics += [] if lens.config.mode == "observe" else ["surprisal_with_layer"]
    metrics += [] if before else ["surprisal"]
    found = score_texts(lens, tokenizer, texts, window, metrics)
    scores = list(shown(found, "scoring", len(texts)))
    for one, earlier in zip(scores, before, strict=False):
        one.columns["surprisal"] = earlier.columns["surprisal"]
    return scores


def _run(adapter: str) -> Path:
    """The run folder that an adapter lies in, or its own."""
    place = place_of(adapter)
    return place.parent if is_checkpoint(place) else place


def _step(lens: PHiModel, adapter: str | None) -> int | None:
    """The training step that a layer is of, as far as its folder or its record says."""
    if adapter is not None and is_checkpoint(place := place_of(adapter)):
        return step_of(place)
    steps = ((lens.record or {}).get("recipe") or {}).get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def _is_last(point: dict[str, Any], adapter: str | None, lens: PHiModel) -> bool:
    """Whether a finished run's adapter is that of the checkpoint measured before."""
    if adapter is None or point["adapter"] is None or _step(lens, adapter) != point["step"]:
        return False
    return _run(point["adapter"]) == _run(adapter)


def _along(points: Sequence[dict[str, Any]]) -> bool:
    """Whether these are steps of one training, in order."""
    steps = [point["step"] for point in points]
    return (
        len({(_run(point["adapter"] or ""), point["insertion_point"]) for point in points}) == 1
        and None not in steps
        and all(before < after for before, after in pairwise(steps))
    )


def _labels(points: Sequence[dict[str, Any]]) -> list[str]:
    """A short name for each point that no other has."""
    adapters, places = ([point[key] for point in points] for key in ("adapter", "insertion_point"))
    if len(points) > 1 and _along(points):
        return [f"step {point['step']}" for point in points]
    if len(set(adapters)) == 1:
        return places
    names = [place_of(adapter).name for adapter in adapters]
    if len(set(names)) < len(set(adapters)):
        names = adapters
    if len(set(places)) == 1:
        return names
    return [f"{name} after {place}" for name, place in zip(names, places, strict=True)]
