"""What a user chooses of how texts and chats are put; a copy of the tokenizer keeps it."""

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from philens.support.errors import ConfigError
from philens.support.typed import listed

_KEPT = "philens_rendering"  # an attribute of tokenizers
# What templates are given by transformers and by philens, and nobody else.
_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}


@dataclass(frozen=True)
class Rendering:
    """What is chosen of how texts and chats are put.

    Attributes:
        chat_options: values for variables of the chat template, by name.
        system: what the system says at the beginning of chats in which it says nothing; None for nothing.
        bos: put the tokenizer's BOS before texts and chats that would begin without it; else they begin as
            tokenizer and template have it.
    """

    chat_options: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    bos: bool = False

    def record(self) -> dict[str, Any]:
        """What is chosen, as JSON; empty where nothing is."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False, {})}


AS_IS = Rendering()
"""As tokenizer and template have it."""


def with_rendering(tokenizer: Any, rendering: Rendering) -> Any:
    """A copy of a tokenizer by which texts and chats are put like this; itself where nothing is chosen.

    Raises:
        ConfigError: a variable that the chat template does not have, no chat template, or no BOS.
    """
    if not rendering.record():
        return tokenizer
    if rendering.chat_options:
        _check_options(tokenizer, rendering.chat_options)
    if rendering.bos and tokenizer.bos_token_id is None:
        raise ConfigError("The tokenizer has no BOS to put before texts; leave bos out.")
    copied = copy.copy(tokenizer)
    set_rendering(copied, rendering)
    return copied


def set_rendering(tokenizer: Any, rendering: Rendering) -> None:
    """Let a tokenizer remember what `rendering_of` says."""
    setattr(tokenizer, _KEPT, rendering)


def rendering_of(tokenizer: Any) -> Rendering:
    """How texts and chats are put by this tokenizer."""
    return getattr(tokenizer, _KEPT, AS_IS)


def _check_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "The tokenizer has no chat template, whose variables chat options are; leave them out or take a "
            "tokenizer that has one."
        )
    variables = _variables(tokenizer.get_chat_template()) - {*tokenizer.special_tokens_map}
    for name in options:
        if name not in variables:
            raise ConfigError(
                f"The chat template has no variable {name!r}; those that it has are: "
                f"{listed(sorted(variables)) or 'none'}."
            )


def _variables(template: str) -> set[str]:
    from jinja2 import Environment, TemplateError, meta
    from jinja2.ext import loopcontrols

    # A tag of transformers, which Jinja does not know.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = Environment(extensions=[loopcontrols])
    try:
        found = meta.find_undeclared_variables(environment.parse(plain))
    except TemplateError:  # rendering says what is wrong with it
        return set()
    return found - _GIVEN - environment.globals.keys()
