"""`make dist-check`: what is built installs into empty environments and works there; the extras resolve."""

import os
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

from rich.console import Console

from releasing.steps import ROOT, Failed, columns, requirements, resolved, run, uv

CONSTRAINTS = ROOT / "constraints.txt"
DEMO_FILES = tuple(
    f"tasks/{name}" for name in ("results.json", "tasks.png", "tasks.svg", "tasks.csv", "page.html")
)


def check(console: Console) -> None:
    """All of it, in a temporary folder outside the repository.

    Raises:
        Failed: what does not hold.
    """
    with tempfile.TemporaryDirectory(prefix="philens-dist-") as temporary:
        folder = Path(temporary)
        wheel, sdist = build(folder / "dist")
        console.print(f"{wheel.name}: {_size(wheel)}, {check_wheel(wheel)} files")
        console.print(
            f"{sdist.name}: {_size(sdist)}, {check_sdist(sdist)} files; the wheel was built from it"
        )
        console.print(f"its tests, alone: {collect(sdist, folder / 'unpacked')}")
        for archive in (wheel, sdist):
            console.print(
                f"{archive.name} in an empty environment: {install(archive, folder / archive.suffix[1:])}"
            )
    console.print(columns(resolve_extras()))


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel, built from nothing but the source distribution, and that."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def check_wheel(wheel: Path) -> int:
    """The number of files in a wheel, which must be the package as it is in the repository and nothing else.

    Raises:
        Failed: a file is missing, or is no part of the package.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name.removeprefix("src/") for name in tracked() if name.startswith("src/philens/")}
    _compare(wheel.name, found, wanted)
    return len(found)


def check_sdist(sdist: Path) -> int:
    """The number of files in a source distribution, which must be the repository but for what is excluded.

    Raises:
        Failed: a file is missing, or is not in the repository.
    """
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "sdist"
    ]
    left_out = tuple(path.removeprefix("/") for path in settings["exclude"])
    wanted = {name for name in tracked() if name.partition("/")[0] not in left_out}
    _compare(sdist.name, found - {"PKG-INFO"}, wanted)
    return len(found)


def tracked() -> list[str]:
    """The files that git knows."""
    return run("git", "ls-files", cwd=ROOT).splitlines()


def _compare(name: str, found: set[str], wanted: set[str]) -> None:
    for what, files in (("misses", wanted - found), ("must not hold", found - wanted)):
        if files:
            raise Failed(f"{name} {what} {', '.join(sorted(files)[:10])} ({len(files)} files)")


def collect(sdist: Path, folder: Path) -> str:
    """What pytest finds in the unpacked source distribution, whose tests must at least import.

    Raises:
        Failed: a test cannot be imported.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return run(sys.executable, "-m", "pytest", "--collect-only", cwd=root).strip().splitlines()[-1]


def install(archive: Path, folder: Path) -> str:
    """Install what was built into an empty virtual environment and run the demo from an empty folder.

    Returns:
        What `philens env` says of the system.

    Raises:
        Failed: it does not install, or the demo does not write what it should.
    """
    venv.create(folder / "venv", with_pip=True)
    bin, empty = folder / "venv" / ("Scripts" if os.name == "nt" else "bin"), folder / "empty"
    empty.mkdir()
    run(bin / "python", "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, archive, cwd=empty)
    home = run(bin / "python", "-c", "import philens; print(philens.__file__)", cwd=empty).strip()
    if not Path(home).resolve().is_relative_to(folder.resolve()):
        raise Failed(f"philens was imported from {home}, not from the environment")
    run(bin / "philens", "demo", "--output", "demo", cwd=empty)
    missing = [name for name in DEMO_FILES if not (empty / "demo" / name).is_file()]
    if missing:
        raise Failed(f"philens demo wrote no {', '.join(missing)}")
    system = run(bin / "philens", "env", cwd=empty).partition("dependencies:")[0].splitlines()[1:]
    return "philens demo passes\n" + "\n".join(system)


def resolve_extras() -> list[tuple[str, str, str]]:
    """A row for each extra, and for all of them at once: its packages, torch and transformers as resolved.

    Raises:
        Failed: an extra that cannot be installed beside philens.
    """
    packages: dict[str, list[str]] = {}
    for requirement in requirements():
        if requirement.extra:
            packages.setdefault(requirement.extra, []).append(requirement.package)
    options = ("--quiet", "--no-header", "--no-annotate", "--python", sys.executable, "-c", CONSTRAINTS)
    rows = [("extra", "beside", "brings")]
    for extra in (*packages, None):
        chosen = ("--extra", extra) if extra else ("--all-extras",)
        lines = run(uv(), "pip", "compile", *options, *chosen, ROOT / "pyproject.toml", cwd=ROOT)
        versions = resolved(lines)
        brings = ", ".join(f"{name} {versions[name]}" for name in packages.get(extra or "", ()))
        beside = f"torch {versions['torch']}, transformers {versions['transformers']}"
        rows.append((extra or "all at once", beside, brings or f"{len(versions)} packages in all"))
    return rows


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
