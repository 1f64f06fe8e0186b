"""What is done to a file: cut, flipped, forged, or another thing put in its place."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from faults.subjects import Subject

_SPARSE = 10 << 30


@dataclass(frozen=True)
class Damage:
    """One file of a folder, changed."""

    file: str
    what: str
    change: Callable[[Path], None] = field(repr=False)
    reseal: bool = False  # whether checksums are made to fit again, as a forger would
    refused: bool = False  # whether nothing but a sentence will do, were the numbers the same


# Of these no byte may be missing.
_WEIGHTS = (".safetensors", ".pt")


def _cut(size: int, path: Path) -> None:
    os.truncate(path, size)


def _flip(place: int, bit: int, path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def truncations(subject: Subject, step: int, files: Iterable[str] | None = None) -> list[Damage]:
    return [
        Damage(file, f"cut at {size}", partial(_cut, size), refused=file.endswith(_WEIGHTS))
        for file in files or subject.files
        for size in range(0, (subject.folder / file).stat().st_size, step)
    ]


def flips(subject: Subject, count: int, files: Iterable[str] | None = None) -> list[Damage]:
    """Bits in files drawn alike, so that small ones are not left out."""
    names = list(files or subject.files)
    names = [name for name in names if (subject.folder / name).stat().st_size]
    found = []
    for _ in range(count):
        file = random.choice(names)
        place, bit = random.randrange((subject.folder / file).stat().st_size), random.randrange(8)
        sealed = subject.checked and file.endswith(_WEIGHTS)
        found.append(Damage(file, f"byte {place} bit {bit}", partial(_flip, place, bit), refused=sealed))
    return found


def header_flips(subject: Subject, file: str) -> list[Damage]:
    """Every bit of a safetensors header and of its length."""
    with (subject.folder / file).open("rb") as opened:
        end = 8 + struct.unpack("<Q", opened.read(8))[0]
    return [
        Damage(file, f"byte {place} bit {bit}", partial(_flip, place, bit), refused=True)
        for place in range(end)
        for bit in range(8)
    ]


MARK = "PHILENS_FAULTS_MARK"


class Payload:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> Any:
        return os.system, (f'touch "${MARK}"',)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Payload()}))


def _torch(path: Path) -> None:
    import torch

    with path.open("wb") as file:  # by its name, torch would refuse some
        torch.save({"state": Payload(), "param_groups": []}, file)


def _torch_legacy(path: Path) -> None:
    import torch

    torch.save({"state": Payload(), "param_groups": []}, path, _use_new_zipfile_serialization=False)


def _zip(path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    path.write_bytes(buffer.getvalue())


@cache
def _compressed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            for _ in range(1500):
                file.write(bytes(1 << 20))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _bomb(path: Path) -> None:
    """An archive as torch writes it, but compressed: 1.5 GB in 7 MB."""
    path.write_bytes(_compressed())


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere/at/all")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    os.truncate(path, _SPARSE)


def _sparse_json(path: Path) -> None:
    """A gigabyte of text that begins as JSON."""
    path.write_bytes(b'{"a": "')
    os.truncate(path, 1 << 30)


def _huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 63) + path.read_bytes()[8:])


def _sparse_tensor(path: Path) -> None:
    """A whole safetensors file with one tensor of 10 GB."""
    header = json.dumps(
        {"weight": {"dtype": "F32", "shape": [_SPARSE // 4], "data_offsets": [0, _SPARSE]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + _SPARSE)


def _deep(path: Path) -> None:
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def _lists(path: Path) -> None:
    path.write_text("[" * 200_000)


def _other_text(path: Path) -> None:
    path.write_bytes('{"größe": 1}'.encode("utf-16"))


def _latin(path: Path) -> None:
    path.write_bytes(b'{"name": "\xe4\xff\xfe"}')


def _gone(path: Path) -> None:
    path.unlink()


def _no_rights(path: Path) -> None:
    path.write_bytes(b"\x00" * 128)


def _laughs(path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    path.write_text("\n".join(lines))


def _yaml_code(path: Path) -> None:
    path.write_text(f"seed: !!python/object/apply:os.system ['touch \"${MARK}\"']\n")


THINGS: dict[str, Callable[[Path], None]] = {
    "missing": _gone,
    "a pickle": _pickle,
    "a torch file with a payload": _torch,
    "an old torch file with a payload": _torch_legacy,
    "a zip with a payload": _zip,
    "a compressed bomb": _bomb,
    "a folder": _folder,
    "a symlink loop": _loop,
    "a dangling symlink": _dangling,
    "a FIFO": _fifo,
    "a link to /dev/zero": _device,
    "a sparse file of 10 GB": _sparse,
    "a gigabyte of JSON": _sparse_json,
    "a safetensors header of 2^63 bytes": _huge_header,
    "a whole safetensors file with a tensor of 10 GB": _sparse_tensor,
    "JSON 100,000 deep": _deep,
    "lists 200,000 deep": _lists,
    "UTF-16": _other_text,
    "not UTF-8": _latin,
    "zeros": _no_rights,
    "YAML aliases that grow": _laughs,
    "YAML that calls": _yaml_code,
}


def things(subject: Subject, reseal: bool = False, files: Iterable[str] | None = None) -> list[Damage]:
    return [
        Damage(
            file,
            name,
            change,
            reseal and name not in ("a FIFO", "a sparse file of 10 GB"),
            refused=file.endswith(_WEIGHTS),
        )
        for file in files or subject.files
        for name, change in THINGS.items()
        if file.endswith(".yaml") or not name.startswith("YAML")
    ]


def tensors(file: str) -> list[Damage]:
    """Keys renamed, shapes and types changed, in a safetensors file that fits its checksums again."""

    def change(edit: Callable[[dict[str, Any], random.Random], None], number: int, path: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = {name: value.clone() for name, value in load_file(path).items()}
        edit(weights, random.Random(number))
        save_file({name: value.contiguous() for name, value in weights.items()}, path, {"format": "pt"})

    def rename(weights: dict[str, Any], chance: random.Random) -> None:
        name = chance.choice(sorted(weights))
        weights[name + chance.choice(["s", ".weight", "\x00", " "])] = weights.pop(name)

    def swap(weights: dict[str, Any], chance: random.Random) -> None:
        first, second = chance.sample([n for n in sorted(weights)], 2)
        if weights[first].shape == weights[second].shape:
            del weights[first]
        else:
            weights[first], weights[second] = weights[second], weights[first]

    def arrays(weights: dict[str, Any]) -> list[str]:
        """All but single numbers: layers of before attention sinks are read without `sink_norm`."""
        return sorted(name for name, value in weights.items() if value.dim())

    def reshape(weights: dict[str, Any], chance: random.Random) -> None:
        name = chance.choice(arrays(weights))
        weights[name] = chance.choice([weights[name][:-1], weights[name][None], weights[name].reshape(-1, 1)])

    def drop(weights: dict[str, Any], chance: random.Random) -> None:
        del weights[chance.choice(arrays(weights))]

    seed = random.randrange(1 << 30)
    edits = {"renamed": rename, "swapped": swap, "reshaped": reshape, "without": drop}
    return [
        Damage(file, f"{name} ({seed + k})", partial(change, edit, seed + k), reseal=True, refused=True)
        for name, edit in edits.items()
        for k in range(25)
    ]


def types_changed(file: str) -> list[Damage]:
    """Numbers of another type, with checksums as they were."""

    def change(dtype: str, path: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        weights = {name: value.to(getattr(torch, dtype)) for name, value in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})

    kinds = ("float64", "float16", "bfloat16", "int64", "int8", "bool", "complex64")
    return [Damage(file, dtype, partial(change, dtype), refused=True) for dtype in kinds]


_VALUES: list[Any] = [
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    0,
    0.5,
    10**6,
    10**9,
    10**12,
    2**63,
    10**400,
    -(10**30),
    True,
    None,
    "",
    "x",
    "../../etc/passwd",
    [],
    {},
    [[]],
    {"a": {"b": 1}},
]


def values(subject: Subject, file: str) -> list[Damage]:
    """Every value of a JSON file replaced by others, with checksums that fit."""

    def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if here:
            yield here
        if isinstance(value, dict):
            for key, below in value.items():
                yield from paths(below, (*here, key))

    def change(keys: tuple[Any, ...], new: Any, path: Path) -> None:
        whole = json.loads(path.read_text())
        place = whole
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = new
        path.write_text(json.dumps(whole))

    found = json.loads((subject.folder / file).read_text())
    return [
        Damage(file, f"{'.'.join(keys)} = {new!r:.30}", partial(change, keys, new), reseal=True)
        for keys in paths(found)
        for new in _VALUES
    ]


def optimizer_states(prefix: str) -> list[Damage]:
    """Optimiser and schedule of a checkpoint with other keys and kinds, and payloads anywhere."""

    def change(edit: Callable[[Any], Any], path: Path) -> None:
        import torch

        torch.save(edit(torch.load(path, weights_only=True)), path)

    def edited(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def edit(state: Any) -> Any:
            function(state)
            return state

        return edit

    import torch

    edits: dict[str, Callable[[Any], Any]] = {
        "a list": lambda state: [state],
        "a tensor": lambda state: torch.zeros(3),
        "nothing": lambda state: {},
        "a payload inside": lambda state: state | {"more": Payload()},
        "without groups": edited(lambda state: state.pop("param_groups")),
        "without state": edited(lambda state: state.pop("state")),
        "one group": edited(lambda state: state.__setitem__("param_groups", state["param_groups"][:1])),
    }
    found = [
        Damage(f"{prefix}/optimizer.pt", name, partial(change, edit), reseal=True, refused=True)
        for name, edit in edits.items()
    ]
    for name in ("a list", "a tensor", "a payload inside"):
        one = Damage(f"{prefix}/scheduler.pt", name, partial(change, edits[name]), reseal=True, refused=True)
        found.append(one)
    return found


def extra_pickles(subject: Subject) -> list[Damage]:
    """Pickles under every name that Trainer and transformers know, beside what philens wrote."""
    names = (
        "rng_state.pth",
        "scaler.pt",
        "training_args.bin",
        "pytorch_model.bin",
        "optimizer.bin",
        "adapter_model.bin",
    )

    def change(path: Path) -> None:
        _torch(path)

    return [
        Damage(f"{place}{name}", "a payload under that name", change)
        for place in ("", "checkpoint-2/", "checkpoint-2/model/", "checkpoint-2/adapter/")
        for name in names
        if (subject.folder / place).is_dir()
    ]
