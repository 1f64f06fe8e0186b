"""What philens finds on a machine, for a bug report: versions and devices; no path and no name of a user."""

import platform
import re
from collections.abc import Iterator
from importlib import metadata, resources

from philens.support.versions import __version__


def environment() -> dict[str, dict[str, str]]:
    """What a bug report should say.

    Returns:
        By section (`system`, `dependencies`, `extras`) what was found for each name. Packages that are not
        installed, and a torch that cannot be imported, are said to be so.
    """
    dependencies, extras = {}, {}
    for package, extra in _requirements():
        if extra is None:
            dependencies[package] = _version(package)
        else:
            extras[extra] = [*extras.get(extra, []), f"{package} {_version(package)}"]
    system = {"philens": __version__, "python": platform.python_version()}
    system |= {"platform": platform.platform(), "models": "; ".join(_shipped()) or "none"} | _devices()
    return {
        "system": system,
        "dependencies": dependencies,
        "extras": {extra: ", ".join(found) for extra, found in sorted(extras.items())},
    }


def _requirements() -> Iterator[tuple[str, str | None]]:
    """Packages that philens depends on, with the extra that asks for each."""
    try:
        lines = metadata.requires("philens") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        lines = []
    for line in lines:
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if package:
            yield package[0], extra[1] if extra else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _shipped() -> Iterator[str]:
    """The models that come with philens, and the insertion points of each."""
    from philens.bases.wheels import WHEELS, kept

    for model in sorted(resources.files("philens").joinpath("shipped").iterdir(), key=lambda path: path.name):
        layers = [part.name for part in model.iterdir() if part.joinpath("phi_layer.safetensors").is_file()]
        base = ""
        if model.name in WHEELS:  # its base does not come with philens
            fetched = (kept(model.name) / "config.json").is_file()
            base = ", base fetched" if fetched else ", base not fetched yet"
        if layers:
            yield f"{model.name} ({', '.join(sorted(layers))}{base})"


def _devices() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # a torch that does not fit its machine may be what the report is about
        reason = re.sub(r"\S*/", "", " ".join(str(error).split()))
        return {"devices": f"torch cannot be imported ({type(error).__name__}: {reason})"}
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    build = ", ".join(f"{name} {version}" for name, version in builds.items() if version) or "CPU alone"
    found = torch.accelerator.current_accelerator(check_available=True)
    devices = [found.type] * torch.accelerator.device_count() if found else []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(number) for number in range(len(devices))]
    return {
        "devices": f"{', '.join(devices) or 'no accelerator'}; torch is built for {build}",
        "threads": str(torch.get_num_threads()),
    }
