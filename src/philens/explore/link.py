"""Links to what the page shows: texts, model and settings are in the fragment, which no browser sends."""

import base64
import json
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any

from philens.explore.view import PALETTES, RANGES, Look
from philens.support.errors import InputError

# What a fragment begins with; another one means another form.
START = "v1."
# Of what a fragment may unpack to, in bytes.
_MOST = 4_000_000


@dataclass(frozen=True)
class Shown:
    """What a page shows."""

    model: str  # by its name on the page, like its insertion point
    point: str
    texts: dict[str, str]  # by name
    look: Look

    def to_fragment(self) -> str:
        """The part of an address after `#`."""
        packed = zlib.compress(
            json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "surrogatepass"), 9
        )
        return START + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def from_fragment(cls, fragment: str) -> "Shown":
        """What `to_fragment` gave.

        Raises:
            InputError: something else, which anybody may have written.
        """
        try:
            if not fragment.startswith(START):
                raise ValueError
            packed = fragment[len(START) :]
            unpacked = zlib.decompressobj().decompress(
                base64.b64decode(packed + "=" * (-len(packed) % 4), b"-_", validate=True), _MOST
            )
            value = json.loads(unpacked.decode("utf-8", "surrogatepass"))
            look = _look(value["look"])
            texts = {_text(name): _text(text) for name, text in value["texts"].items()}
            return cls(_text(value["model"]), _text(value["point"]), texts, look)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
            raise InputError(
                "This link is damaged, or another version of philens made it; copy it once more, whole."
            ) from error


def _look(value: dict[str, Any]) -> Look:
    """A look whose every field is of its type and known."""
    if value.keys() != {field.name for field in fields(Look)}:
        raise ValueError
    left, right = map(_text, value["metrics"])
    look = Look((left, right), value["range"], float(value["low"]), float(value["high"]), value["palette"])
    if look.range not in RANGES.values() or look.palette not in PALETTES:
        raise ValueError
    return look


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
