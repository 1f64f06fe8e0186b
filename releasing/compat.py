"""`make compat`: the tests with the oldest and with the newest dependencies, each in its own environment."""

import os
from collections.abc import Sequence

from rich.console import Console

from releasing.steps import ROOT, Failed, Requirement, columns, requirements, resolved, run, same_release, uv

FOLDER = ROOT / ".compat"
# How uv chooses among the versions that pyproject.toml allows.
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
EXTRAS = "test"


def check(console: Console, names: Sequence[str], python: str) -> None:
    """Make each environment anew, print what is in it, and run the tests in it.

    Args:
        console: what was seen goes there.
        names: of `RESOLUTIONS`.
        python: of the environments.

    Raises:
        Failed: after all of them, if the tests of one failed or a lower bound is not what was tested.
    """
    failures = []
    for name in names:
        installed = install(name, python)
        console.print(f"\n{name}\n{columns(table(installed))}")
        if name == "oldest":
            failures += [f"oldest: {sentence}" for sentence in untested(installed)]
        failures += run_tests(name)
    if failures:
        raise Failed("; ".join(failures))


def install(name: str, python: str) -> dict[str, str]:
    """Make the environment `.compat/NAME` and install philens and what its tests need.

    Returns:
        The versions installed, by package.
    """
    folder = FOLDER / name
    run(uv(), "venv", "--quiet", "--clear", "--python", python, folder, cwd=ROOT)
    options = ("--quiet", "--python", folder, "--resolution", RESOLUTIONS[name])
    run(uv(), "pip", "install", *options, "-e", f"{ROOT}[{EXTRAS}]", cwd=ROOT)
    return resolved(run(uv(), "pip", "freeze", "--python", folder, cwd=ROOT))


def _tested() -> list[Requirement]:
    return [one for one in requirements() if one.extra in (None, EXTRAS)]


def table(installed: dict[str, str]) -> list[tuple[str, str, str]]:
    """Rows of what was installed beside what pyproject.toml asks for."""
    rows = [(one.package, f">={one.least}", installed.get(one.package, "missing")) for one in _tested()]
    return [("package", "declared", "installed"), *rows]


def untested(installed: dict[str, str]) -> list[str]:
    """Lower bounds that are promised but not installed, because others exclude them."""
    return [
        f"{one.package}>={one.least} is declared but {installed.get(one.package)} is the oldest that resolves"
        for one in _tested()
        if not same_release(installed.get(one.package, ""), one.least)
    ]


def run_tests(name: str) -> list[str]:
    """Run the test suite in an environment, its output let through; what went wrong, if anything did."""
    python = FOLDER / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        run(python, "-m", "pytest", "-m", "not slow", "-n", "2", "--dist", "loadfile", cwd=ROOT, live=True)
    except Failed as failure:
        return [f"{name}: {failure}"]
    return []
