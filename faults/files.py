"""Damaged, foreign and hostile files in the place of adapters, models, run folders and checkpoints."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from faults.damage import (
    MARK,
    Damage,
    extra_pickles,
    flips,
    header_flips,
    optimizer_states,
    tensors,
    things,
    truncations,
    types_changed,
    values,
)
from faults.probe import probe
from faults.subjects import Subject, adapter, base_model, run_folder, shipped, stopped, tiny_base
from faults.table import Case, Outcome

PAGE, STEP = 4096, 64


def damaged(subject: Subject, damages: list[Damage], folder: Path, seconds: float = 200.0) -> Outcome:
    """Read the subject with each damage: the right result or one sentence, and nothing executed.

    What is refused must be so for its damage: without any, it is read, also with checksums made anew.
    """
    from philens.support.errors import PhilensError

    def work(damage: Damage, place: Path) -> str | None:
        copy, mark = place / "copy", place / "executed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(subject.folder, copy)
        os.environ[MARK] = str(mark)
        damage.change(copy / damage.file)
        if damage.reseal:
            seal(copy)
        try:
            result = subject.read(copy)
        except PhilensError as error:
            if damage in whole:
                return f"refused: {error}"
            raise
        finally:
            if mark.exists():
                mark.unlink()
                return "code in the file was executed"  # noqa: B012
        if damage.refused:
            return "read, and not refused"
        if subject.checked and not same(result, subject.expected):
            return "read, with other numbers and without a word"
        return None

    whole = [Damage("", "nothing", lambda path: None, reseal) for reseal in (False, True)]
    control = probe(whole, work, folder, seconds=seconds)
    if control.notes:
        return Outcome(len(damages), 0, control.notes)
    return probe(damages, work, folder, seconds=seconds)


def same(found: Any, expected: Any) -> bool:
    import numpy as np

    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected, equal_nan=True)
    return found == expected


def seal(folder: Path) -> None:
    """Make the checksums of a folder and those below it fit what is there now."""
    from philens.lens.adapter import CONFIG_FILE, _hash_of
    from philens.support.files import SUMS_FILE, file_hash, write_sums

    for path in folder.rglob(CONFIG_FILE):
        description = json.loads(path.read_text())
        if (path.parent / "phi_layer.safetensors").is_file():
            description["weights_sha256"] = file_hash(path.parent / "phi_layer.safetensors")
        description["config_sha256"] = _hash_of(description)
        path.write_text(json.dumps(description))
    for path in sorted(folder.rglob(SUMS_FILE), key=lambda one: -len(one.parts)):
        path.unlink()
        write_sums(path.parent)


def _with(
    subject: Callable[[], Subject], damages: Callable[[Subject], list[Damage]], folder: Path
) -> Outcome:
    made = subject()
    return damaged(made, damages(made), folder)


def _another_base(folder: Path) -> Outcome:
    import philens

    bases = [tiny_base(seed) for seed in range(1, 20)]

    def work(number: int, place: Path) -> str | None:
        philens.load(bases[number], adapter().folder)
        return "an adapter went into another base"

    return probe(range(len(bases)), work, folder)


_WEIGHTS = "phi_layer.safetensors"


def cases() -> Iterable[Case]:
    def case(name: str, subject: Callable[[], Subject], damages: Callable[[Subject], list[Damage]]) -> Case:
        return Case("files", name, partial(_with, subject, damages))

    yield case("adapter cut at every 64 bytes", adapter, lambda one: truncations(one, STEP))
    yield case("adapter, every bit of its header", adapter, lambda one: header_flips(one, _WEIGHTS))
    yield case(
        "adapter, single bits", adapter, lambda one: flips(one, 4000, [_WEIGHTS, "adapter_config.json"])
    )
    yield case("adapter, other things in a file's place", adapter, things)
    yield case("adapter, keys and shapes", adapter, lambda one: tensors(_WEIGHTS) + types_changed(_WEIGHTS))
    yield Case("files", "adapter in another base", _another_base)
    yield case("shipped model cut at every 4 KiB", shipped, lambda one: truncations(one, PAGE))
    yield case("run folder cut at every 4 KiB", run_folder, lambda one: truncations(one, PAGE))
    yield case("run folder, single bits", run_folder, lambda one: flips(one, 600, _decisive(one)))
    yield case(
        "run folder, other things in a file's place",
        run_folder,
        lambda one: things(one, files=_decisive(one)),
    )
    yield case("base model cut at every 64 bytes", base_model, lambda one: truncations(one, STEP))
    yield case("base model, single bits", base_model, lambda one: flips(one, 400))
    yield case("base model, other things in a file's place", base_model, things)
    yield case("base model, keys and shapes", base_model, lambda one: tensors("model.safetensors"))
    yield case("base model, values", base_model, lambda one: random.sample(values(one, "config.json"), 300))
    yield case("checkpoint cut at every 4 KiB", stopped, lambda one: truncations(one, PAGE, _checkpoint(one)))
    yield case("checkpoint, single bits", stopped, lambda one: flips(one, 400, _checkpoint(one)))
    yield case(
        "checkpoint, other things in a file's place", stopped, lambda one: things(one, files=_checkpoint(one))
    )
    yield case(
        "checkpoint, pickles with payloads",
        stopped,
        lambda one: optimizer_states("checkpoint-2") + extra_pickles(one),
    )


def _decisive(subject: Subject) -> list[str]:
    return [name for name in subject.files if name != "training.png"]


def _checkpoint(subject: Subject) -> list[str]:
    return [name for name in subject.files if name.startswith("checkpoint-") or name == "metrics.jsonl"]
