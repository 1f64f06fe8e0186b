"""A session kept as one page that works without a server: every view of the scores that were made."""

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from philens.explore import view
from philens.show.page import clean, head
from philens.support.errors import ConfigError
from philens.support.files import write_atomically


@dataclass
class Record:
    """The views of all tabs, in the order in which they were made.

    Args:
        path: the file, written after each view, whole or not at all.

    Raises:
        ConfigError: it is there already, or has no folder.
    """

    path: Path
    views: list[tuple[str, str]] = field(default_factory=list)  # what each is called, and its markup
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        if self.path.exists():
            raise ConfigError(f"{self.path} is there already; name another --record file.")
        if not self.path.parent.is_dir():
            raise ConfigError(f"There is no folder {self.path.parent} for --record; make it or name another.")

    def add(self, title: str, markup: str) -> None:
        """Keep a view, unless it is the one before.

        Raises:
            OutputError: the file cannot be written.
        """
        with self._lock:
            if self.views and self.views[-1][1] == markup:
                return
            self.views.append((f"{datetime.now():%H:%M:%S} {title}", markup))
            write_atomically(self.path, self._write)

    def _write(self, file: BinaryIO) -> None:
        script = _BEFORE + view.asset("page.js") + _AFTER
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        style = view.asset("record.css") + view.style()
        file.write(head("philens explore, recorded", style, f"script-src 'sha256-{digest}'").encode())
        file.write(
            b'<div class="ph-head"><h1>philens explore, recorded</h1><p>Every view of a session. Point at a '
            b"token, or walk through the text with the arrow keys, to read its values.</p></div>\n"
            b'<label class="ph-label" for="views">View</label>\n<select id="views">'
        )
        for number, (title, _) in enumerate(self.views):
            file.write(f'<option value="{number}">{number + 1}. {clean(title)}</option>'.encode())
        file.write(b'</select>\n<div id="result"></div>\n')
        for _, markup in self.views:
            file.write(f"<template>{markup}</template>\n".encode())
        file.write(f"<script>{script}</script>\n</body>\n</html>\n".encode())


# page.js runs in a component of Gradio, which gives it these three.
_BEFORE = """
const recorded = true;
const dark = matchMedia('(prefers-color-scheme: dark)');
const follow = () => document.documentElement.classList.toggle('dark', dark.matches);
dark.addEventListener('change', follow);
follow();
const element = document.querySelector('#result'), views = document.querySelector('#views');
const trigger = () => {};
let drawn = () => {};
const watch = (what, then) => { drawn = then; };
const draw = () => {
  element.replaceChildren(document.querySelectorAll('template')[views.value].content.cloneNode(true));
};
draw();
"""
_AFTER = """
views.addEventListener('change', () => { draw(); drawn(); });
"""
