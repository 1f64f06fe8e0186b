"""Optional packages: imported where they are used, and named by the extra that brings them."""

from importlib import import_module
from types import ModuleType

from philens.support.errors import ConfigError


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import a module that only an extra of philens installs.

    Args:
        module: as `import` takes it.
        extra: the extra of philens that installs it.
        what: the capability that needs it, the first words of the sentence that is said without it.

    Returns:
        The module.

    Raises:
        ConfigError: the package is not installed, or is and cannot be imported.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == package and isinstance(error, ModuleNotFoundError):
            raise ConfigError(
                f"{what} needs {package}: install it with `pip install 'philens[{extra}]'`."
            ) from error
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{what} needs {package}, which is installed but cannot be imported ({reason}); install it again "
            f"with `pip install --upgrade 'philens[{extra}]'`."
        ) from error
