"""What of `philens explore` needs servers of its own, in a real browser: a record and Ctrl+C, longer texts.

Beside test_explore_browser.py, in another process.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import WAIT, open_browser
from philens.explore.examples import examples
from test_explore_browser import (
    HOSTILE,
    choose,
    formal,
    photograph,
    read,
    serving,
    shown,
    visiting,
    wait_shown,
    wait_status,
)

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


def test_ctrl_c_leaves_a_record_that_works_without_a_server(
    browser: Any, text_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "record.html"
    with serving(text_model, "--record", str(path), "--max-characters", "40000") as (address, process):
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.wait_for_selector("#result .reading")
        read(page, HOSTILE)
        wait_shown(page, HOSTILE)
        choose(page, "Right pane", "margin")
        page.wait_for_selector(".pane[data-metric=margin]")
        page.locator(".text").first.locator("span").nth(5).hover()
        expected = page.locator(".ph-tip").inner_text()
        scores = [shown(page, 0, pane) for pane in (0, 1)]
        # Ctrl+C while a tab is open and reads.
        read(page, "abcde " * 6_400)
        page.wait_for_selector("#status progress")
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert process.stdout.read() == f"Wrote {path}: 3 views.\n"
        page.close()
    context, asked, wrong = browser.new_context(viewport={"width": 1280, "height": 1000}), [], []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(path.as_uri())
    options = page.locator("#views option").all_inner_texts()
    assert len(options) == 3
    assert "phi and margin" in options[2]
    assert shown(page) == (examples()["prose"].text)
    page.get_by_label("View").select_option(index=2)
    assert [shown(page, 0, pane) for pane in (0, 1)] == scores
    page.locator(".text").first.locator("span").nth(5).hover()
    assert page.locator(".ph-tip").inner_text() == expected
    page.locator(".text").first.locator("span").nth(5).click()
    assert page.locator(".ph-tip button").count() == 0  # there is no model to ask
    page.keyboard.press("ArrowRight")
    assert page.locator(".ph-tip").inner_text().startswith("token 6")
    assert page.evaluate("window.hit") is None
    page.get_by_label("View").select_option(index=0)
    page.locator(".text").first.locator("span").nth(75).hover()
    photograph(page, "explore_recorded")
    assert asked == [path.as_uri()]
    assert not wrong
    dark = browser.new_context(color_scheme="dark").new_page()
    dark.goto(path.as_uri())
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 26)"
    dark.context.close()
    context.close()


def test_a_slow_reading_shows_progress_and_can_be_cancelled(browser: Any, text_model: Path) -> None:
    with serving(text_model, "--max-characters", "40000") as (address, process):
        with visiting(browser, address) as visit:
            read_slowly(visit())
        process.terminate()


def read_slowly(page: Any) -> None:
    text = formal(page)
    read(page, "abcde " * 6_666)
    page.wait_for_selector("#status progress")
    page.wait_for_function("+document.querySelector('#status progress')?.value > 0")
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    assert cancel.is_enabled()
    cancel.click()
    assert wait_status(page, "Cancelled") == "Cancelled."
    assert shown(page) == text  # what was read before is still there
    assert not cancel.is_enabled()
    began = time.monotonic()
    read(page, "abc abc")  # and the model is free
    wait_shown(page, "abc abc")
    assert time.monotonic() - began < 60
    # Another metric meanwhile: the text is read with it, and nothing said before comes back.
    long = "cdefab " * 2_000
    read(page, long)
    page.wait_for_selector("#status progress")
    choose(page, "Right pane", "entropy")
    wait_shown(page, long)
    page.wait_for_selector(".pane[data-metric=entropy]")
    page.wait_for_timeout(1_000)
    assert wait_status(page, "Text A: ").startswith("Text A: 14,000 tokens read (")
    assert not cancel.is_enabled()
