"""What the checks share: commands of other programs, and what pyproject.toml declares."""

import os
import re
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """A check did not hold; the message says which."""


@dataclass(frozen=True)
class Requirement:
    """A direct dependency, `package>=least` in pyproject.toml, of an extra or of philens itself."""

    package: str
    least: str
    extra: str | None


def run(*command: str | Path, cwd: Path, live: bool = False) -> str:
    """Run a command to its end, without a PYTHONPATH that would bring the source tree with it.

    Args:
        command: program and arguments.
        cwd: where it runs.
        live: let its output through, instead of returning it.

    Raises:
        Failed: it exits with another code than 0.
    """
    words = [str(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=not live)
    if done.returncode:
        said = "" if live else "\n" + "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
        raise Failed(f"{' '.join(words)} exited with {done.returncode}{said}")
    return done.stdout or ""


def requirements() -> list[Requirement]:
    """The direct dependencies.

    Raises:
        Failed: one without a lower bound.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [(None, project["dependencies"]), *project["optional-dependencies"].items()]
    found = []
    for extra, lines in declared:
        for line in lines:
            parts = re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)(?:,<[\w.]+)?", line.replace(" ", ""))
            if parts is None:
                raise Failed(
                    f"{line!r} in pyproject.toml is not package>=version or package>=version,<version"
                )
            found.append(Requirement(parts[1].lower(), parts[2], extra))
    return found


def uv() -> Path:
    """The program uv.

    Raises:
        Failed: it is not installed.
    """
    try:
        from uv import find_uv_bin
    except ImportError:
        raise Failed("this needs uv: pip install 'philens[release]'") from None
    return Path(find_uv_bin())


def resolved(lines: str) -> dict[str, str]:
    """Versions by package of `package==version` lines, as uv writes them."""
    pairs = (line.split(";")[0].strip().partition("==") for line in lines.splitlines() if "==" in line)
    return {name.lower(): version for name, _, version in pairs}


def same_release(one: str, other: str) -> bool:
    """Whether two versions are the same but for zeros at the end and a local part."""
    releases = [re.sub(r"(\.0)+$", "", version.partition("+")[0]) for version in (one, other)]
    return releases[0] == releases[1]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
