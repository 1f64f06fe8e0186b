"""Fonts for figures with texts of any script in them."""

import logging
from collections.abc import Sequence
from functools import cache

from matplotlib import rcParams
from matplotlib.font_manager import FontEntry, FontProperties, fontManager
from matplotlib.ft2font import FT2Font

logger = logging.getLogger(__name__)

# Drawn in the place of a character that no font here has; matplotlib's own font has it.
NONE = "\N{WHITE SQUARE}"


def drawable(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts that matplotlib can draw without a warning, and the families to draw them in.

    Beside the usual family those of this machine that have what it lacks, the one with the most of it first;
    what none has is drawn as a square.
    """
    families = [*rcParams["font.family"]]
    needed = {character for text in texts for character in text if character.isprintable()}
    missing = {ord(character) for character in needed} - _characters(fontManager.findfont(FontProperties()))
    others = _others() if missing else []
    while others and missing:
        best = max(others, key=lambda one: len(missing & _characters(one.fname)))
        if not missing & _characters(best.fname):
            break
        families.append(best.name)
        missing -= _characters(best.fname)
    squares = dict.fromkeys(missing, NONE)
    return [text.translate(squares) for text in texts], families


def _others() -> list[FontEntry]:
    """Upright fonts of usual weight, a family once, in order of their names."""
    plain = (one for one in fontManager.ttflist if one.style == "normal" and str(one.weight) in _WEIGHTS)
    return sorted({one.name: one for one in plain}.values(), key=lambda one: one.name)


_WEIGHTS = ("400", "normal", "regular", "book")


@cache
def _characters(path: str) -> frozenset[int]:
    """What a font can draw; nothing if it has no outlines, as fonts of coloured emoji, or cannot be read."""
    try:
        font = FT2Font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError) as error:
        logger.debug("Font %s is passed over: %s", path, error)
        return frozenset()
