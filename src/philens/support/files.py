"""Files that are written whole or not at all, and read with one clear sentence when they are damaged.

Nothing here, or anywhere in philens, unpickles.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from philens.support.errors import AdapterError, OutputError

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of philens itself, with `recipes` and `shipped` in it."""
# Far above any description or record, far below what would fill the memory.
MAX_BYTES = 256 << 20
_LOCK_FILE = ".lock"
# The checksums of a folder's files, as `sha256sum -c` reads them.
SUMS_FILE = "SHA256SUMS"
_SUM = "# {}\n{}  {}\n"


@contextlib.contextmanager
def locked(folder: Path, record: str, part: str = "") -> Iterator[None]:
    """Keep other processes out of a folder that one command fills; the lock goes with the process, however it
    ends.

    Args:
        folder: is made if need be, and goes again if nothing comes into it.
        record: the file that tells such a folder from one with other files.
        part: what is locked of it, where the processes of one command share a folder.

    Raises:
        OutputError: it holds other files, is locked, or cannot be written.
    """
    from filelock import FileLock, Timeout

    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{record}.")}
        others = set() if record in names else {name for name in names if not name.startswith(_LOCK_FILE)}
        if others:
            raise OutputError(f"{folder} holds other files ({min(others)}); choose another --output.")
        lock = FileLock(folder / f"{_LOCK_FILE}{part}", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"Another process is writing into {folder}; wait for it or choose another --output."
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"Cannot write {folder}: {reason}; choose another --output.") from error
    try:
        yield
    finally:
        # Where nothing was begun, nothing stays. Others cannot take the lock before its file is gone.
        with contextlib.suppress(OSError):
            if made and all(path.name.startswith(_LOCK_FILE) for path in folder.iterdir()):
                Path(lock.lock_file).unlink()
                folder.rmdir()
        lock.release()


def write_atomically(path: str | os.PathLike[str], content: Callable[[BinaryIO], object]) -> Path:
    """Let `content` write to a temporary file beside `path`, then move it there: all of it or nothing.

    Links are followed. A device or a pipe, such as /dev/stdout, is written into: nothing takes its place.
    Raises OutputError where the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"Cannot write {path}: it is a folder; name a file.")
    into = path.exists() and not path.is_file()
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if into:
            with path.open("wb") as file:
                content(file)
            return path
        with temporary.open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"Cannot write {path}: {reason}; free some space or choose another.") from error
    finally:
        with contextlib.suppress(OSError):  # after the move it is gone
            temporary.unlink()
    return path


def same_file(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether both are there and are one file, whatever they are called."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when everything in it is written, or is removed.

    Raises:
        OutputError: it cannot be written.
    """
    folder = Path(folder)
    target = Path(os.path.realpath(folder))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}; choose another folder.") from error
    try:
        yield staging
        staging.chmod(0o755)
        for path in staging.rglob("*"):
            if path.is_file():  # on the disk before it has its name: what it replaces may go then
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            _check_replaceable(folder, staging)
            old = staging.with_name(staging.name + ".old")
            target.rename(old)
            try:
                staging.rename(target)
            except BaseException:  # Ctrl-C too
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"Cannot write {folder}: {reason}; free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(folder: Path, staging: Path) -> None:
    """Only what an earlier save left may be replaced: nothing else of the user's is ever deleted."""
    if not folder.is_dir():
        raise OutputError(f"Cannot write {folder}: it is a file; choose another folder.")
    others = {path.name for path in folder.iterdir()} - {path.name for path in staging.iterdir()}
    if others:
        raise OutputError(
            f"Cannot write {folder}: it holds other files ({min(others)}); choose another folder."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{path} is not readable as JSON ({error}); it is damaged or something else."
        ) from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} does not hold a JSON object; it is damaged or something else.")
    return value


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file in UTF-8 of at most `limit` bytes.

    Raises:
        AdapterError: there is no such file, or it is larger or something else.
    """
    check_file(path)
    if path.stat().st_size > limit:
        raise AdapterError(
            f"{path} is larger than {limit} bytes; it is damaged or something else than a configuration."
        )
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path} is not readable as text ({error}); it is damaged or something else."
        ) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        AdapterError: there is no such file, or it cannot be read.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"Cannot read {path}: {error.strerror}; check the path.") from error


def write_sums(folder: Path) -> None:
    """Write the checksums of all files in a folder and those below it into the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Sizes, which are a comment to sha256sum, tell at once what would take long to read.
    lines = [
        _SUM.format(path.stat().st_size, file_hash(path), path.relative_to(folder).as_posix())
        for path in files
    ]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare a folder's files with the checksums in it, if there are any.

    Raises:
        AdapterError: a file is missing or not as it was written.
    """
    path = folder / SUMS_FILE
    if not os.path.lexists(path):
        return
    text = read_text(path)
    found = re.findall(r"# (\d+)\n([0-9a-f]{64})  ([^/\0\n][^\0\n]*)\n", text)
    whole = text == "".join(_SUM.format(*line) for line in found)
    if not found or not whole or any(".." in Path(name).parts for _, _, name in found):
        raise AdapterError(f"{path} does not hold checksums; it is damaged.")
    for size, digest, name in found:
        check_file(folder / name)
        if str((folder / name).stat().st_size) != size or file_hash(folder / name) != digest:
            raise AdapterError(
                f"{folder / name} is not as it was written; fetch or write it again, or remove "
                f"{SUMS_FILE} beside it if it was changed on purpose."
            )


def check_file(path: Path) -> None:
    """Raise an AdapterError unless `path` is a regular file: no folder, pipe, or link that leads nowhere."""
    try:
        found, regular = os.path.lexists(path), path.is_file()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"Cannot read {path}: {reason}; check the path.") from error
    if not found:
        raise AdapterError(f"There is no file {path}; check the path.")
    if not regular:
        raise AdapterError(f"{path} is not a regular file; it is damaged or something else.")


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AdapterError: there is no such file, or it is not a whole safetensors file.
    """
    check_file(Path(path))
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _not_whole(path, error) from error


def check_safetensors(path: str | Path) -> None:
    """Raise an AdapterError unless `path` is a whole safetensors file; reads no more than its header."""
    check_file(Path(path))
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_whole(path, error) from error


def _not_whole(path: str | Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{path} is not a whole safetensors file ({error}); it is damaged or something else: "
        "fetch or save it again."
    )


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict strictly.

    Raises:
        AdapterError: as `check_weights`.
    """
    check_weights(module, weights, source)
    module.load_state_dict(weights)


def not_finite(module: nn.Module) -> str | None:
    """The name of a parameter that holds NaN or an infinity, None if there is none."""
    for name, parameter in module.named_parameters():
        # Numbers in 8 bits are those of quantization, and torch does not look at them.
        if parameter.is_floating_point() and parameter.element_size() > 1 and not parameter.isfinite().all():
            return name
    return None


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise an AdapterError about a missing or extra key of a state dict for `module`, or another shape, or
    no numbers with a point where there must be some."""
    expected = module.state_dict()
    problems = [f"misses {key}" for key in expected.keys() - weights.keys()]
    problems += [f"has an unknown {key}" for key in weights.keys() - expected.keys()]
    problems += [
        f"has {key} of shape {tuple(weights[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    ]
    problems += [
        f"has {key} of type {str(weights[key].dtype).removeprefix('torch.')}, not "
        f"{str(expected[key].dtype).removeprefix('torch.')}"
        for key in expected.keys() & weights.keys()
        if weights[key].is_floating_point() != expected[key].is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise AdapterError(
            f"{source} does not fit this model: it {min(problems)}{more}; load what was saved for it."
        )
