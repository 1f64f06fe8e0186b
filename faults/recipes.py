"""Recipes with everything in them that a hand, a program or an enemy may write: accepted, or one sentence."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from faults.probe import probe
from faults.subjects import SIZES
from faults.table import Case, Outcome

MUTANTS = 200

# What a value becomes, as YAML.
_VALUES = (
    "null", "true", "-1", "0", "1", "3", "0.5", "-0.5", "1e9", "1000000000", "1e308", "1e400", ".nan",
    ".inf", "-.inf", "9" * 60, "9" * 5000, "0x1F", "0o17", "1:30", "2001-01-01", "2001-99-99", "abc", "''",
    '"\\0"', '"\\ud800"', "é", "[]", "{}", "[1]", "[1, 2]", "[2, 1]", "[1, 2, 3]", "[[[]]]", "{a: 1}",
    "{1: 2}", "{null: null}", "{a: {b: 1}}", "[null]", "[-1, 0]", "[0, 1000000000]",
    "!!python/object/apply:os.system ['touch executed']", "!!int abc", "!!python/name:os.system",
    "!!binary aGVsbG8=", "!!set {a, b}", "!!timestamp abc", "&a [*a]", "*b", "!x y", "? [a]", "|\n  a",
    "../../etc/passwd", "/dev/zero", "~", "<<", "=", "@", "%", "`",
)  # fmt: skip

# Sizes so small that two steps take a second. A mutant keeps those of its own mutated key.
_TINY: dict[str, Any] = SIZES | {
    "model.base": None,
    "model.revision": None,
    "model.dtype": "auto",
    "model.frozen": True,
    "model.quantization": "none",
    "model.architecture": "transformer",
    "model.tokenizer": "characters",
    "phi.latent_size": None,
    "data.parts": {},
    "data.mixture": {"memorized_sequences": 1, "copy": 1},
    "data.length": 64,
    "data.document_lengths": {},
    "data.workers": 0,
    "optimizer.decay": 0.1,
    "phi_schedule.start_step": 0,
    "phi_schedule.warmup_steps": 1,
    "train.steps": 2,
    "train.accumulate": 1,
    "train.compile": False,
    "train.save_every": 0,
    "train.report_to": [],
}


def _lines(text: str) -> list[str]:
    """A recipe with a key a line, so that single ones can be changed."""
    import yaml

    return yaml.safe_dump(yaml.safe_load(text), sort_keys=False).splitlines()


def _replaced(lines: list[str]) -> tuple[bytes, str]:
    number = random.choice([k for k, line in enumerate(lines) if not line.lstrip().startswith("-")])
    key, _, _ = lines[number].partition(":")
    value = random.choice(_VALUES)
    own = len(key) - len(key.lstrip())
    after = number + 1
    while after < len(lines) and (
        len(lines[after]) - len(lines[after].lstrip()) > own or lines[after].lstrip().startswith("-")
    ):
        after += 1  # what was below the key goes with its value
    changed = [*lines[:number], f"{key}: {value}", *lines[after:]]
    return "\n".join(changed).encode(), f"{key.strip()}: {value[:40]}"


def _any_key(lines: list[str]) -> tuple[bytes, str]:
    """A key that the recipe need not have."""
    from philens.training.recipe import recipe_keys

    key, value = random.choice(recipe_keys()).replace("NAME", "part"), random.choice(_VALUES)
    opening = "".join(f"{part}: {{" for part in key.split(".")[:-1])
    line = f"{opening}{key.split('.')[-1]}: {value}{'}' * opening.count('{')}"
    top = key.split(".")[0]
    kept, inside = [], False
    for one in lines:
        inside = one.startswith(f"{top}:") or (inside and one[:1] in " -")
        if not inside:
            kept.append(one)
    return "\n".join([*kept, line]).encode(), f"{key}: {value[:40]}"


def _renamed(lines: list[str]) -> tuple[bytes, str]:
    number = random.randrange(len(lines))
    changed = list(lines)
    changed[number] = changed[number].replace(
        ":", random.choice(["s:", "_:", ".x:", "", " :", "::", "\t:"]), 1
    )
    return "\n".join(changed).encode(), f"renamed {lines[number].strip()[:40]}"


def _twice(lines: list[str]) -> tuple[bytes, str]:
    number = random.randrange(len(lines))
    return "\n".join([*lines[: number + 1], *lines[number:]]).encode(), f"twice {lines[number].strip()[:40]}"


def _without(lines: list[str]) -> tuple[bytes, str]:
    number = random.randrange(len(lines))
    return "\n".join(lines[:number] + lines[number + 1 :]).encode(), f"without {lines[number].strip()[:40]}"


def _bytes(lines: list[str]) -> tuple[bytes, str]:
    content = bytearray("\n".join(lines).encode())
    for _ in range(random.randint(1, 3)):
        content[random.randrange(len(content))] = random.randrange(256)
    return bytes(content), "bytes changed"


def _cut(lines: list[str]) -> tuple[bytes, str]:
    content = "\n".join(lines).encode()
    size = random.randrange(len(content))
    return content[:size], f"cut at {size}"


def _tabs(lines: list[str]) -> tuple[bytes, str]:
    return "\n".join(lines).replace("  ", "\t").encode(), "tabs"


def _whole(lines: list[str]) -> tuple[bytes, str]:
    grows = "\n".join(
        [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" if k else "a0: &a0 [1]" for k in range(12)]
    )
    merged = "\n".join(
        [f"a{k}: &a{k} {{x{k}: 1, <<: [*a{k - 1}, *a{k - 1}]}}" if k else "a0: &a0 {x: 1}" for k in range(9)]
    )
    made: dict[str, bytes] = {
        "empty": b"",
        "zeros": b"\x00" * 1000,
        "random": random.randbytes(1000),
        "UTF-16": "\n".join(lines).encode("utf-16"),
        "a BOM": b"\xef\xbb\xbf" + "\n".join(lines).encode(),
        "several documents": b"a: 1\n---\nb: 2\n",
        "aliases that grow": grows.encode(),
        "merges that grow": merged.encode(),
        "an anchor in itself": b"model: &a {x: *a}",
        "lists 10,000 deep": b"[" * 10_000,
        "maps 10,000 deep": b"{a: " * 10_000,
        "sections 1,000 deep": "\n".join(" " * k + "a:" for k in range(1000)).encode(),
        "a list": b"- 1\n- 2\n",
        "a number": b"3",
        "code": b"!!python/object/apply:os.system ['touch executed']",
        "code in a key": b"? !!python/object/apply:os.system ['touch executed']\n: 1\n",
        "2 MB": b"name: " + b"a" * (2 << 20),
        "a long name": b"name: " + b"a" * 100_000,
        "many keys": b"".join(b"a%d: 1\n" % k for k in range(20_000)),
    }
    name = random.choice(sorted(made))
    return made[name], name


def _fitting(lines: list[str]) -> tuple[bytes, str]:
    """A value of the right kind, so that most such recipes are accepted and trained by."""
    kept, what = [*lines], []
    for _ in range(random.randint(1, 3)):
        number = random.randrange(len(kept))
        key, _, value = kept[number].partition(": ")
        for options in (_NUMBERS, _FLAGS, *_CHOICES):
            if value in options or (
                options is _NUMBERS and value.replace(".", "").replace("e-", "").isdecimal()
            ):
                kept[number] = f"{key}: {random.choice(options)}"
                what.append(kept[number].strip())
                break
    return "\n".join(kept).encode(), ", ".join(what) or "as it is"


_NUMBERS = ("0", "1", "2", "3", "5", "7", "16", "100", "0.5", "0.999", "1.0e-8", "10.0", "-1", "1.0e+30")
_FLAGS = ("true", "false")
_CHOICES = (
    ("transformer", "lstm", "pretrained"),
    ("characters", "bytes", "bpe"),
    ("adamw", "muon"),
    ("constant", "linear", "cosine", "wsd"),
    ("attention", "mlp", "unit"),
    ("exact", "official"),
    ("bottleneck", "observe"),
    ("near_identity", "random"),
)
_KINDS = (
    [_replaced] * 6
    + [_any_key] * 6
    + [_fitting] * 12
    + [_renamed, _twice, _without, _bytes, _cut, _tabs, _whole, _whole]
)


def mutants(count: int) -> list[tuple[str, bytes]]:
    from philens.training.recipe import RECIPES

    found = []
    recipes = sorted(RECIPES.glob("*.yaml"))
    for number in range(count):
        recipe = recipes[number % len(recipes)]
        content, what = random.choice(_KINDS)(_lines(recipe.read_text(encoding="utf-8")))
        found.append((f"{recipe.stem}: {what}", content))
    return found


def _run(item: tuple[str, bytes], place: Path) -> str | None:
    """Load a recipe, and where it is accepted, train two steps by it, small where it says nothing else."""
    import os
    import shutil

    from philens.training.recipe import RecipeError, flatten, load_recipe, plain
    from philens.training.trainer import train

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    path = place / "recipe.yaml"
    path.write_bytes(item[1])
    try:
        recipe = load_recipe(path)
    finally:
        if (place / "executed").exists():
            return "code in it was executed"  # noqa: B012
    # What the mutant changed is what differs from every recipe that comes with philens, and stays.
    found = flatten(plain(recipe))
    keys = {part.partition(":")[0] for part in item[0].partition(": ")[2].split(", ")}
    changed = {name for name in found if keys & {name, name.rsplit(".", 1)[-1], name.split(".")[0]}}
    small = {name: value for name, value in _TINY.items() if name not in changed}
    if recipe.phi is None:
        small = {name: value for name, value in small.items() if not name.startswith("phi")}
    try:
        load_recipe(path, small)
    except RecipeError:
        small = {name: value for name, value in _TINY.items() if name.startswith(("train.", "data.workers"))}
    train(load_recipe(path, small), place / "run", progress=False)
    return None


def _mutated(folder: Path) -> Outcome:
    import philens.training.trainer  # noqa: F401  (once, not in each process)

    return probe(mutants(MUTANTS), _run, folder, seconds=240, gigabytes=4.0, confined=True)


# Every number of a recipe, far too large.
_HUGE = ("1000000000", "1000000000000000", "[1, 1000000000]", "1e30", "{0: 1000000000}")


def _huge(folder: Path) -> Outcome:
    """Sizes that no machine has: one sentence before the memory is full."""
    from philens.training.recipe import load_recipe, recipe_keys

    items = []
    for key in recipe_keys():
        if "NAME" in key or key in ("train.steps", "train.accumulate"):
            continue  # much work is what those ask for
        for value in _HUGE:
            small = {name: one for name, one in _TINY.items() if name != key}
            try:
                load_recipe("smoke", small | {key: value})
            except ValueError:
                continue
            items.append((key, value))

    def work(item: tuple[str, str], place: Path) -> str | None:
        import shutil

        from philens.training.trainer import train

        shutil.rmtree(place / "run", ignore_errors=True)
        small = {name: one for name, one in _TINY.items() if name != item[0]}
        train(load_recipe("smoke", small | {item[0]: item[1]}), place / "run", progress=False)
        return None

    return probe(items, work, folder, seconds=240, gigabytes=4.0, confined=True)


def cases() -> Iterable[Case]:
    yield Case("recipes", f"{MUTANTS} mutants", _mutated)
    yield Case("recipes", "sizes of a billion", _huge)
