"""What goes to a terminal or page: texts made safe to show, and data."""

import io
import sys
from typing import TextIO
from unicodedata import category


def visible(text: str) -> str:
    """`text` with what a reader would not see, or a browser or terminal would obey, made visible.

    Those are controls (line breaks and escapes too), joiners, directions and lone surrogates.
    """
    return "".join(map(_visible_character, text))


def visible_spaces(text: str) -> str:
    """`visible`, for a piece of text that may begin or end with a space, or have nothing in it."""
    return visible(text).replace(" ", "␣") or "∅"


def printable(text: str) -> str:
    """`text` for a terminal: lines and tabs as they are, what it would obey made visible."""
    return "".join(c if c in "\n\t" else _visible_character(c) for c in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "⇥"
    # Controls, formats (zero width, directions), lone surrogates, line and paragraph separators.
    if category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def utf8_output() -> TextIO:
    """Standard output for data: in UTF-8 whatever the terminal has, as JSON must be (RFC 8259)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    return sys.stdout
