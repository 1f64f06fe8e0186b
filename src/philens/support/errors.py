"""Errors that philens raises for bad input. Each message is one sentence: what was wrong and what to do."""


class PhilensError(ValueError):
    """Base of all philens errors; also a ValueError. The command line prints its message and exits with 2."""


class ConfigError(PhilensError):
    """A setting is unknown, ill-typed, out of range or contradicts another."""


class InsertionError(PhilensError):
    """The insertion point does not exist or its output is not a hidden state."""


class InputError(PhilensError):
    """Tokens, masks or documents that do not fit together, or are empty."""


class AdapterError(PhilensError):
    """A saved PHi layer or model that is missing, damaged, or belongs to something else."""


class RecipeError(ConfigError):
    """A recipe that cannot be read, or holds an unknown or ill-typed key."""


class TrainingError(PhilensError):
    """Training cannot start, resume or go on."""


class OutputError(PhilensError):
    """A result cannot be written."""
