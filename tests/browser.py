"""A real Chromium for tests of pages; they are skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WAIT = 60_000  # milliseconds: the machine may be busy
# Without a sandbox, which containers do not have, and without calls home, so that a request is the page's.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    """Path of PHILENS_CHROMIUM, or of chromium or google-chrome; skips the test if there is none."""
    for name in (os.environ.get("PHILENS_CHROMIUM"), "chromium", "google-chrome"):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip("There is no Chromium here; install it, or name one in PHILENS_CHROMIUM.")


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    path = chromium()
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed.")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
