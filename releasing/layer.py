"""`python -m releasing layer RUN`: the PHi layer of a finished run, as it comes with philens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import philens
from philens.bases.wheels import SHIPPED
from philens.findings.texts import cut_texts, score_texts
from philens.lens.adapter import save_adapter
from philens.lens.model import PHiModel
from philens.scoring.scores import TokenScores
from philens.tasks.levels import load_levels
from philens.training.folder import RunFolder, is_checkpoint, step_of
from philens.training.recipe import Recipe, recipe_yaml
from releasing.steps import Failed

# What rounding may do to phi, and how large the layer may be.
MOST, BYTES = 0.01, 12e6
# Of each level, and from the beginning of each: what rounding is measured on.
TEXTS, TOKENS = 4, 192


def ship(console: Console, run: Path, name: str) -> None:
    """Write `shipped/NAME` anew: the layer with its matrices in bfloat16, and the run's records.

    Nothing of the machine that trained it goes with it: the base is known by its name, and parts of the data
    that were read from files here by their own.

    Args:
        console: what was seen goes there.
        run: a run folder, or a checkpoint in one.
        name: of the base model, in `philens.bases.wheels`.

    Raises:
        Failed: phi is no longer the same within `MOST`, or the layer is larger than `BYTES`.
    """
    chosen = run = RunFolder(run)
    if is_checkpoint(chosen.path):
        run = RunFolder(chosen.path.parent)
    recipe = without_places(run.recipe(), name)
    base, tokenizer = philens.load_pretrained(name)
    lens = philens.load(base, chosen.adapter)
    texts = cut_texts(tokenizer, load_levels(documents=TEXTS), TOKENS)
    before = list(score_texts(lens, tokenizer, texts, metrics=["phi"]))
    round_matrices(lens)
    after = list(score_texts(lens, tokenizer, texts, metrics=["phi"]))
    mean, most = difference(before, after)
    console.print(
        f"In bfloat16, phi of tokens differs by {mean:.2%} of its mean on average, and that of a text by "
        f"at most {most:.2%} ({len(texts)} texts of {TOKENS} tokens)"
    )
    if most > MOST:
        raise Failed(f"phi of a text may differ by {MOST:.0%}")

    folder, shipped = SHIPPED / name, RunFolder(SHIPPED / name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    steps = step_of(chosen.path) if is_checkpoint(chosen.path) else recipe.train.steps
    records = [json.dumps(record) + "\n" for record in run.metrics() if record["step"] <= steps]
    shipped.metrics_file.write_text("".join(records), encoding="utf-8")
    shipped.recipe_file.write_text(recipe_yaml(recipe), encoding="utf-8")
    shutil.copyfile(run.versions_file, shipped.versions_file)
    for parameter in matrices(lens):
        parameter.data = parameter.data.bfloat16()
    save_adapter(lens, shipped.adapter, training=shipped.record(recipe))
    philens.load(lens.detach(), shipped.adapter)  # strict
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"{folder.name}: {size / 1e6:.1f} MB, after step {steps}")
    if size > BYTES:
        raise Failed(f"it may have {BYTES / 1e6:g} MB")


def without_places(recipe: Recipe, base: str) -> Recipe:
    """A recipe without the folders and files of the machine that it was run on."""
    parts = {
        name: replace(part, source=name) if Path(part.source).exists() else part
        for name, part in recipe.data.parts.items()
    }
    return replace(recipe, model=replace(recipe.model, base=base), data=replace(recipe.data, parts=parts))


def matrices(lens: PHiModel) -> list[torch.nn.Parameter]:
    """What nearly all of a layer's numbers are in; vectors, which weigh little, keep their precision."""
    return [parameter for parameter in lens.phi.parameters() if parameter.ndim > 1]


@torch.no_grad()
def round_matrices(lens: PHiModel) -> None:
    """Let a layer's matrices hold numbers that bfloat16 has."""
    for parameter in matrices(lens):
        parameter.copy_(parameter.bfloat16())


def difference(before: list[TokenScores], after: list[TokenScores]) -> tuple[float, float]:
    """How much phi of tokens differs on average, and mean phi of a text at most; relative to mean phi.

    Attention sinks are left out.
    """
    pairs = [
        (one.without_sinks()["phi"], two.without_sinks()["phi"])
        for one, two in zip(before, after, strict=True)
    ]
    ones, twos = (np.concatenate(side) for side in zip(*pairs, strict=True))
    texts = [abs(np.nanmean(two) / np.nanmean(one) - 1) for one, two in pairs]
    return float(np.nanmean(np.abs(twos - ones)) / np.nanmean(ones)), float(max(texts))
