"""`philens explore` used in a real browser: typed into, clicked, read, dark, small, and by keyboard alone.

The language model is a small one that has learned nothing. With PHILENS_SCREENSHOTS=docs/images it is
SmolLM2, and the pictures of docs/explore.md are taken on the way.
"""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from browser import WAIT, chromium, open_browser
from philens.explore.examples import examples
from philens.explore.models import TEXT
from philens.scoring.alternatives import percent

pytestmark = pytest.mark.docs

MOST = 10_000  # by default
HOSTILE = (
    '<img src=x onerror="window.hit=1"><script>window.hit=1</script></div></span>'
    """&lt;b&gt; ${1+1} {{value}} "'"""
)
# The command, where another folder stands for SmolLM2.
EXPLORE = """
import os, sys
from philens.cli import main
from philens.explore import models

if not os.environ.get("PHILENS_SCREENSHOTS"):
    models.SHIPPED[models.TEXT] = sys.argv[1]
sys.exit(main(sys.argv[2:]))
"""

# The first stream of answers seems open to the page until something was clicked in vain.
LATE_CLOSE = """
window.closing = false;
const direct = window.fetch;
window.fetch = async (resource, options) => {
  const answer = await direct(resource, options);
  if (window.closing || !String(resource.url ?? resource).includes('/queue/data')) return answer;
  const late = new TransformStream({
    async transform(chunk, out) {
      const said = new TextDecoder().decode(chunk), at = said.indexOf('data: {"msg":"close_stream"');
      if (at < 0) return out.enqueue(chunk);
      out.enqueue(new TextEncoder().encode(said.slice(0, at)));
      const clicked = new Promise((go) => document.addEventListener('click', go, {once: true}));
      window.closing = true;
      await clicked;
      await new Promise((go) => setTimeout(go, 2500));
      out.enqueue(new TextEncoder().encode(said.slice(at)));
    },
  });
  return new Response(answer.body.pipeThrough(late), answer);
};
"""


@pytest.fixture(scope="module")
def server(text_model: Path) -> Iterator[str]:
    """The address of a real server."""
    with serving(text_model) as (address, process):
        yield address
        process.terminate()


@contextmanager
def serving(text_model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, which is to be stopped, and its address."""
    chromium()
    pytest.importorskip("gradio", reason="Gradio is not installed.")
    command = [sys.executable, "-c", EXPLORE, str(text_model), "explore", "--port", "0", *options]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found is None:
            process.kill()
            pytest.fail(f"{line} {process.communicate()[1]}")
        try:
            yield found[0], process
        except BaseException:
            process.kill()
            raise
        _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Any]:
    with visiting(browser, server) as open_tab:
        yield open_tab


@contextmanager
def visiting(browser: Any, server: str) -> Iterator[Any]:
    """Opens the page in a tab of its own; at the end, nothing went wrong there or elsewhere."""
    contexts, wrong, leaving = [], [], set()

    def open_tab(fragment: str = "", script: str = "", **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        # A page that is left breaks off what the server was sending it, which Gradio calls an error.
        page.on("request", lambda request: leaving.add(page) if request.is_navigation_request() else None)
        page.on("load", lambda page: leaving.discard(page))
        page.on(
            "console",
            lambda said: wrong.append(said.text) if said.type == "error" and page not in leaving else None,
        )
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: _from(server, request.url) or wrong.append(request.url))
        page.add_init_script(script)
        page.goto(server + fragment)
        page.wait_for_selector("#result .reading, #status .error")
        return page

    yield open_tab
    # So does closing a tab.
    so_far = list(wrong)
    for context in contexts:
        context.close()
    assert not so_far


def _from(server: str, url: str) -> bool:
    return url.startswith((server, "data:", f"blob:{server}"))


def shown(page: Any, section: int = 0, pane: int = 0) -> str:
    """The text in a pane, without the sign for a token before it."""
    return page.evaluate(
        """([section, pane]) => {
          const found = document.querySelectorAll('.reading')[section]?.querySelectorAll('.text')[pane];
          return found ? found.textContent.replaceAll('⏎\\n', '\\n').replace(/^∅/, '') : '';
        }""",
        [section, pane],
    )


def wait_shown(page: Any, text: str, section: int = 0) -> None:
    page.wait_for_function(
        """([text, section]) => document.querySelectorAll('.reading')[section]
          ?.querySelector('.text').textContent.replaceAll('⏎\\n', '\\n').replace(/^∅/, '') === text""",
        arg=[text, section],
    )


def read(page: Any, text: str) -> None:
    """Type a text and press Read."""
    page.locator("#text-a textarea").fill(text)
    page.get_by_role("button", name="Read", exact=True).click()


def formal(page: Any, name: str = "random") -> str:
    """Choose an example of the formal-language model, whose tokens are characters."""
    page.get_by_role("button", name=name, exact=True).click()
    text = examples()[name].text
    wait_shown(page, text)
    return text


def choose(page: Any, label: str, option: str) -> None:
    """An option of one of Gradio's lists."""
    from playwright.sync_api import TimeoutError

    wanted = page.locator("ul[role=listbox]").get_by_role("option", name=option).first
    for _ in range(5):  # an answer that comes meanwhile closes the list, and a person opens it again
        page.get_by_label(label, exact=True).click()
        try:
            wanted.click(timeout=WAIT / 6)
            return
        except TimeoutError:
            page.get_by_label(label, exact=True).blur()
    pytest.fail(f"{label} does not stay open to choose {option}.")


def wait_status(page: Any, pattern: str) -> str:
    page.wait_for_function(
        "(pattern) => new RegExp(pattern).test(document.querySelector('#status')?.textContent ?? '')",
        arg=pattern,
    )
    return page.locator("#status").inner_text()


def classes(page: Any, section: int = 0, pane: int = 0) -> list[str]:
    return page.evaluate(
        """([section, pane]) => [...document.querySelectorAll('.reading')[section]
          .querySelectorAll('.text')[pane].children].map((token) => token.classList[0])""",
        [section, pane],
    )


def kept(page: Any, name: str) -> bytes:
    """What a link of the panel Keep downloads."""
    with page.expect_download() as download:
        page.get_by_role("link", name=name).click()
    return Path(download.value.path()).read_bytes()


def table(page: Any) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(kept(page, "CSV")), keep_default_na=True)


def photograph(page: Any, name: str, height: int | None = None) -> None:
    """A picture of what is in view, or of so many pixels from the top."""
    if folder := os.environ.get("PHILENS_SCREENSHOTS"):
        size = page.viewport_size
        if height is not None:
            page.set_viewport_size(size | {"height": height})
        page.screenshot(path=Path(folder) / f"{name}.png")
        page.set_viewport_size(size)


def test_two_panes_hover_highest_plot_and_files(visit: Any) -> None:
    page = visit()
    text = formal(page, "in context language")
    assert shown(page, 0, 0) == shown(page, 0, 1) == text
    assert page.locator("#status").inner_text().startswith("A new automaton")
    scores = table(page)
    assert "".join(scores["token"]) == text
    columns = ["phi", "surprisal_with_layer", "rank", "alternatives", "probabilities", "text"]
    assert list(scores.columns[4:]) == columns
    phi = scores["phi"].to_numpy()
    # Colours follow the values; the first token has no surprisal.
    left, right = ([int(c[1:]) if c != "none" else -1 for c in classes(page, 0, pane)] for pane in (0, 1))
    assert all(np.diff(np.array(left)[np.argsort(phi)]) >= 0)
    assert right[0] == -1
    assert min(right[1:]) >= 0
    # Hover.
    page.locator(".text").first.locator("span").nth(12).hover()
    said = page.locator(".ph-tip").inner_text()
    assert said.startswith(f"token 12  {text[12]}")
    assert f"{phi[12]:.3f}" in said
    assert f"{scores['surprisal_with_layer'][12]:.3f}" in said
    page.mouse.move(5, 5)
    page.wait_for_selector(".ph-tip", state="hidden")
    # The highest tokens, the first one left out.
    highest = [int(n) for n in page.locator(".highest [data-go]").all_inner_texts()]
    assert highest == (np.argsort(-phi[1:], kind="stable")[:10] + 1).tolist()
    page.locator(".highest [data-go]").first.click()
    assert page.evaluate("document.activeElement.active") == highest[0]
    # A step for each token, and the values at the pointer.
    assert page.locator("svg.p0 path").get_attribute("d").count("H") == len(text)
    page.locator("svg.p0").scroll_into_view_if_needed()
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box = page.locator("svg.p0").bounding_box()
    across = int(box["x"] + box["width"] / 2)  # browsers round to pixels
    page.mouse.move(across, box["y"] + 5)
    token = int((across - box["x"]) / box["width"] * len(text))
    assert page.locator(".ph-tip").inner_text().startswith(f"token {token} ")
    # Means, the page by itself, and the figure.
    assert f"{phi.mean():.3f}" in page.locator(".means").inner_text()
    markup = kept(page, "Stand-alone page").decode()
    HTMLParser().feed(markup)
    assert "<script" not in markup
    assert markup.count('<span class="c') + markup.count('<span class="none') >= 2 * len(text)
    assert kept(page, "Figure (PNG)").startswith(b"\x89PNG\r\n")


def test_alternatives_on_hover_are_those_of_the_scores(visit: Any) -> None:
    page = visit()
    formal(page)
    scores = table(page)
    for number in (0, 1, 12):
        page.locator(".text").first.locator("span").nth(number).hover()
        said = page.locator(".ph-tip").inner_text()
        names, shares = (json.loads(scores[c][number]) for c in ("alternatives", "probabilities"))
        listed = page.locator(".ph-tip .other").all_inner_texts()
        assert [line.split("\n")[0] for line in listed] == [name.replace(" ", "␣") for name in names]
        assert (number == 0) == (not listed)
        if number:
            rank = int(scores["rank"][number])
            assert f"rank {rank:,} by surprisal with layer; likeliest:" in said
            assert listed[0].split()[-2] == percent(shares[0]).split()[0]
            assert page.locator(".ph-tip .stands").count() == (rank <= len(names))
    assert page.locator(".ph-tip button").count() == 0  # only of a token that was clicked


def test_another_token_in_its_place_side_by_side(visit: Any) -> None:
    page = visit()
    text = "The capital of France is Paris, and the capital of Spain is Madrid."
    read(page, text)
    wait_shown(page, text)
    pieces = [piece.strip("∅") for piece in page.locator(".text").first.locator("span").all_text_contents()]
    token = next(n for n in range(len(pieces)) if "".join(pieces[: n + 1]).endswith((" Paris", "is P")))
    page.locator(".text").first.locator("span").nth(token).click()
    page.wait_for_selector(".ph-tip.pinned button.other")
    page.locator(".text").first.locator("span").nth(token + 2).hover()
    assert page.locator(".ph-tip b").inner_text().startswith(f"token {token} ")  # it stays
    photograph(page, "explore_alternatives")
    letters = re.compile("^[^⟨\ufffd⏎⇥]+$")
    chosen = page.locator(".ph-tip button.other:enabled").filter(has_text=letters).first
    instead = chosen.locator("span").first.text_content().replace("␣", " ")
    chosen.click()
    page.wait_for_function("document.querySelectorAll('.reading').length === 2")
    start = "".join(pieces[:token])
    changed = start + instead + text[len(start) + len(pieces[token]) :]
    wait_shown(page, changed, 1)
    assert shown(page) == text
    assert page.locator("#text-b textarea").input_value() == changed
    assert page.locator(".ph-tip").is_hidden()
    assert f"in place of “{pieces[token]}” at token {token}." in wait_status(page, "in place of")
    boxes = [page.locator(".reading").nth(n).bounding_box() for n in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    for section in (0, 1):
        marks = page.locator(".reading").nth(section).locator(".text .parts")
        assert marks.all_text_contents()[0] == (pieces[token] if section == 0 else instead)
        assert marks.count() == 2  # in either pane
    phi = table(page).groupby("text")["phi"].apply(list)
    np.testing.assert_allclose(phi["Text A"][:token], phi["Text B"][:token], atol=2e-3)
    assert phi["Text A"][token:] != phi["Text B"][token:]
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(5, 5)
    photograph(page, "explore_branch", 1500)


def test_a_step_is_marked_by_its_number(visit: Any) -> None:
    page = visit()
    text = "There are 12 eggs in a box. A cook takes 3 boxes.\nSo 12 * 3 = 36 eggs.\nThe answer is 36."
    read(page, text)
    wait_shown(page, text)
    assert page.locator(".steps summary").all_inner_texts() == ["3 lines", "4 sentences"]
    page.locator(".steps summary").nth(1).click()
    page.get_by_role("button", name="Mark sentence 3").click()
    page.wait_for_selector(".marking")
    pane = page.locator(".text").first
    assert "".join(pane.locator(".marked").all_text_contents()).strip("⏎\n ") == "So 12 * 3 = 36 eggs."
    row = page.locator(".steps details").nth(1).locator("tr").nth(3).locator("td").all_inner_texts()
    means = page.locator(".marking dd b").all_inner_texts()
    assert row[3:] == means[:2]
    assert f"({row[2]})" in page.locator(".marking").inner_text()
    page.mouse.move(5, 5)
    photograph(page, "explore_steps", 1500)


def test_writing_on_from_a_token(visit: Any) -> None:
    page = visit()
    text = formal(page)
    page.get_by_role("button", name="How the model writes on").click()
    page.get_by_label("Tokens at most").fill("9")
    page.locator(".text").first.locator("span").nth(20).click()
    page.get_by_role("button", name="Write on after this token").click()
    page.wait_for_function(
        "document.querySelectorAll('.reading')[1]?.querySelector('.text').children.length === 30"
    )
    assert shown(page) == text == page.locator("#text-a textarea").input_value()
    written = shown(page, 1)
    assert written[:21] == text[:21]
    assert written == page.locator("#text-b textarea").input_value()
    # From the second text: it becomes the first.
    page.locator(".reading").nth(1).locator(".text").first.locator("span").nth(4).click()
    page.get_by_role("button", name="Write on after this token").click()
    wait_shown(page, written)
    page.wait_for_function(
        "document.querySelectorAll('.reading')[1]?.querySelector('.text').children.length === 14"
    )
    assert shown(page, 1)[:5] == text[:5]


def test_branches_by_keyboard(visit: Any) -> None:
    page = visit()
    text = formal(page)
    page.locator(".text").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.closest('.ph-tip.pinned') !== null")
    assert page.locator("[role=dialog]").get_attribute("aria-label") == "token 3: what else"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.active") == 3
    assert page.locator(".ph-tip.pinned").count() == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    instead = page.evaluate("document.activeElement.querySelector('span').textContent").replace("␣", " ")
    page.keyboard.press("Enter")
    wait_shown(page, text[:4] + instead + text[5:], 1)


def test_a_link_brings_everything_back(visit: Any, server: str) -> None:
    page = visit()
    formal(page)
    page.get_by_role("button", name="Compare with a second text").click()
    texts = ["abcab abcab <b>", "naïve → 日本語 abd"]
    page.locator("#text-b textarea").fill(texts[1])
    read(page, texts[0])
    wait_shown(page, texts[1], 1)
    choose(page, "Right pane", "entropy")
    page.wait_for_selector(".pane[data-metric=entropy]")
    choose(page, "Palette", "grey")
    page.wait_for_selector(".ph.grey")
    choose(page, "Colour scale", "from … to …")
    page.get_by_label("to", exact=True).fill("4")
    page.wait_for_function("document.querySelectorAll('.ticks')[0].textContent === '024 and more'")
    link = page.get_by_role("link", name="Copy link").get_attribute("href")
    assert page.url == f"{server}/{link}"  # it stands in the address, too
    again = visit(fragment=f"/{link}")
    for number, text in enumerate(texts):
        wait_shown(again, text, number)
        assert again.locator(f"#text-{'ab'[number]} textarea").input_value() == text
    assert again.locator(".ph.grey .pane[data-metric=entropy]").count() == 2
    assert again.locator(".ticks").first.inner_text().split() == ["0", "2", "4", "and", "more"]
    assert again.get_by_label("to", exact=True).input_value() == "4"
    assert again.get_by_label("formal-language model").is_checked()
    assert again.get_by_label("Right pane", exact=True).input_value() == "entropy"
    for damaged in (link[:-9], "#v1.x", "#v1.eJyrVgIAAK0AVQ"):
        assert "damaged" in wait_status(visit(fragment=f"/{damaged}"), "This link is damaged")
    # In another link put into the same tab.
    page.evaluate("(other) => { location.hash = other; }", "#v1.x")
    wait_status(page, "This link is damaged")


def test_text_is_only_text(visit: Any) -> None:
    page = visit()
    formal(page)
    read(page, HOSTILE)
    wait_shown(page, HOSTILE)
    assert page.evaluate("window.hit") is None
    assert (
        page.evaluate("document.querySelectorAll('#result img, #result script, #result iframe').length") == 0
    )
    assert page.evaluate("[...document.querySelectorAll('.text *')].every((e) => e.tagName === 'SPAN')")
    assert "".join(table(page)["token"]) == HOSTILE
    page.locator(".text").first.locator("span").first.click()
    page.keyboard.press("Shift+End")
    page.wait_for_function("document.querySelector('#marked q')?.textContent.startsWith('<img src=x')")
    assert page.locator("#marked q *").count() == 0
    assert page.evaluate("window.hit") is None


def test_what_cannot_be_read_is_said(visit: Any) -> None:
    page = visit()
    formal(page)
    read(page, "")
    assert "Text A is empty; paste a text" in wait_status(page, "is empty")
    assert page.locator("#status [role=alert]").count() == 1
    read(page, "a" * (MOST + 1))
    said = wait_status(page, "characters and this page")
    assert f"Text A has {MOST + 1:,} characters and this page reads {MOST:,} at most" in said
    assert page.locator("#ph-count.over").inner_text() == f"{MOST + 1:,} of {MOST:,} characters"
    read(page, "abc → dé")
    said = wait_status(page, "does not know")
    assert said.endswith("reads as one and the same: → é")
    wait_shown(page, "abc → dé")
    page.get_by_role("button", name="Write on").click()  # that is read, too: nothing is wrong with it
    page.wait_for_function("document.querySelector('.text').children.length > 8")
    wait_status(page, "tokens read")


def test_by_keyboard_alone(visit: Any) -> None:
    page = visit()

    def tab_to(script: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate(f"(() => {{ const e = document.activeElement; return {script}; }})()"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
                return
        pytest.fail(f"The Tab key does not lead to {script}")

    tab_to("e.textContent.trim() === 'random'")
    page.keyboard.press("Enter")
    wait_shown(page, examples()["random"].text)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.get_by_role("heading", level=1).click()
    tab_to("e.closest('#text-a') && e.tagName === 'TEXTAREA'")
    page.keyboard.press("Control+a")
    page.keyboard.type("abc abc abd dba cab")
    tab_to("e.id === 'read'")
    page.keyboard.press("Enter")
    wait_shown(page, "abc abc abd dba cab")
    tab_to("e.classList.contains('text')")
    assert page.evaluate("document.activeElement.active") == 0
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.locator(".ph-tip").inner_text().startswith("token 4")
    assert "phi" in page.evaluate("document.querySelector('#ph-active').getAttribute('aria-label')")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_selector("#marked .marking[data-first='4'][data-last='6']")
    assert page.locator(".text").first.locator("[aria-selected=true]").count() == 3
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.active") == 18
    page.keyboard.press("Home")
    page.keyboard.press("Escape")
    assert page.locator("[aria-selected=true].marked").count() == 0
    # One stop for each pane, not for each token.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.pane')?.dataset.metric") == "surprisal_with_layer"
    tab_to("e.dataset.go")
    tab_to("e.classList.contains('export')")
    tab_to("e.closest('#mark-from')")
    # Every control has a name.
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, textarea, button, select')].filter((e) => e.offsetParent
          && !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim() || e.title)).length"""
    )
    assert nameless == 0


def test_a_span_is_marked_by_mouse_and_by_number(visit: Any) -> None:
    page = visit()
    text = formal(page)
    scores = table(page)
    tokens = page.locator(".text").first.locator("span")
    # Hovering waits until the page has come to rest.
    tokens.nth(2).hover(position={"x": 1, "y": 5})
    page.mouse.down()
    end = tokens.nth(9).bounding_box()
    page.mouse.move(end["x"] + end["width"] - 1, end["y"] + end["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_selector("#marked .marking[data-first='2'][data-last='9']")
    said = page.locator("#marked").inner_text()
    assert "Text A, tokens 2 to 9 (8)" in said
    assert text[2:10] in said
    for column in ("phi", "surprisal_with_layer"):
        assert f"{scores[column][2:10].mean():.3f}" in said
        assert f"{scores[column].mean():.3f}" in said
    assert page.locator("#mark-from input").input_value() == "2"
    page.locator("#mark-from input").fill("20")
    page.locator("#mark-to input").fill("29")
    page.wait_for_selector("#marked .marking[data-first='20'][data-last='29']")
    page.wait_for_function("document.querySelectorAll('.text')[1].children[25].classList.contains('marked')")
    assert f"{scores['phi'][20:30].mean():.3f}" in page.locator("#marked").inner_text()
    page.locator("#mark-to input").fill("99999")
    page.wait_for_selector("#marked [role=alert]")
    assert f"Text A has tokens 0 to {len(text) - 1}" in page.locator("#marked").inner_text()


def test_metrics_scales_palettes_and_two_texts(visit: Any) -> None:
    page = visit()
    text = formal(page)
    choose(page, "Right pane", "entropy")
    page.wait_for_selector(".pane[data-metric=entropy]")
    assert {"phi", "entropy"} <= set(table(page).columns)
    choose(page, "Left pane", "settling depth")
    page.wait_for_selector(".pane[data-metric=settling_depth]")
    choose(page, "Left pane", "phi")
    page.wait_for_selector(".pane[data-metric=phi]")
    choose(page, "Right pane", "surprisal with layer")
    page.wait_for_selector(".pane[data-metric=surprisal_with_layer]")
    ground = "getComputedStyle(document.querySelectorAll('.text > .c0')[0]).backgroundColor"
    coloured = page.evaluate(ground)
    choose(page, "Palette", "grey")
    page.wait_for_selector(".ph.grey")
    assert page.evaluate(ground) != coloured
    choose(page, "Palette", "colour")
    page.wait_for_selector(".ph.colour")
    # A second text: one scale for both, then each its own, then a fixed one.
    page.get_by_role("button", name="Compare with a second text").click()
    second = examples()["in context language"].text
    page.locator("#text-b textarea").fill(second)
    page.get_by_role("button", name="Read", exact=True).click()
    wait_shown(page, second, 1)
    assert shown(page, 0) == text
    scores = table(page)
    means = scores.groupby("text")["phi"].mean()
    assert means["Text B"] > means["Text A"]
    rows = page.locator(".means tr").all_inner_texts()
    assert f"{means['Text A']:.3f}" in rows[1]
    assert f"{means['Text B']:.3f}" in rows[2]
    shared, own = [page.locator(".ticks").nth(n).inner_text() for n in (0, 2)], classes(page, 0)
    assert shared[0] == shared[1]
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(5, 5)  # off the text, whose values would cover it
    page.wait_for_selector(".ph-tip", state="hidden")
    photograph(page, "explore_compare", 1840)
    choose(page, "Colour scale", "each text's own")
    page.wait_for_function(
        "new Set([0, 2].map((n) => document.querySelectorAll('.ticks')[n].textContent)).size === 2"
    )
    assert classes(page, 0) != own
    choose(page, "Colour scale", "from … to …")
    page.wait_for_function("document.querySelectorAll('.ticks')[0].textContent === '0510 and more'")
    page.get_by_label("to", exact=True).fill("4")
    page.wait_for_function("document.querySelectorAll('.ticks')[3].textContent === '024 and more'")
    page.get_by_label("from", exact=True).fill("5")
    wait_status(page, "cannot go from 5 to 4")


def test_each_insertion_point_and_each_example(visit: Any) -> None:
    page = visit()
    assert page.get_by_label(TEXT).is_checked()
    means = {}
    for layer in ("adapter", "layer-0", "layer-2"):
        choose(page, "Insertion point", layer)
        page.wait_for_function(
            "(layer) => document.querySelector('.reading h3').textContent.includes(layer)",
            arg=f"{layer} (after",
        )
        scores = table(page)
        means[layer] = (scores["phi"].mean(), scores["surprisal"].mean())
    assert len({phi for phi, _ in means.values()}) == 3
    assert len({surprisal for _, surprisal in means.values()}) == 1  # the base's own
    for name, example in examples().items():
        page.get_by_role("button", name=name, exact=True).click()
        wait_status(page, re.escape(example.about))
        assert page.locator("#text-a textarea").input_value() == example.text
        assert shown(page) == example.text
        assert page.get_by_label("formal-language model").is_checked() == example.formal
    page.get_by_label(TEXT, exact=True).check()
    wait_status(page, re.escape(f"({TEXT})"))


def test_writing_on(visit: Any) -> None:
    page = visit()
    formal(page)
    page.get_by_role("button", name="How the model writes on").click()
    page.get_by_label("Tokens at most").fill("12")
    page.locator("#text-a textarea").fill("abcab abcab abc")
    page.get_by_role("button", name="Write on", exact=True).click()
    page.wait_for_function("document.querySelector('.text').children.length === 27")
    assert shown(page).startswith("abcab abcab abc")
    assert page.locator("#text-a textarea").input_value() == shown(page)
    page.locator("#text-a textarea").fill("")
    page.get_by_role("button", name="Write on", exact=True).click()
    wait_status(page, "Text A is empty")


def test_hurried_clicks_leave_a_page_that_fits_together(visit: Any) -> None:
    page = visit()
    # The last one once only, and the page begins with another: what is waited for must be its own answer.
    for name in ("trivial", "random", "copy", "prose", "random", "code"):
        page.get_by_role("button", name=name, exact=True).click()
    wait_status(page, re.escape(examples()["code"].about) + r" Text A: .* \(" + re.escape(TEXT))
    page.wait_for_timeout(1_000)
    assert page.locator("#status").inner_text().startswith(examples()["code"].about)
    assert page.locator("#text-a textarea").input_value() == examples()["code"].text
    assert page.get_by_label(TEXT).is_checked()
    assert page.get_by_label("Insertion point", exact=True).input_value() == "adapter (after model.layers.1)"
    assert page.get_by_label("Right pane", exact=True).input_value() == "surprisal"
    read(page, "and it goes on")
    wait_shown(page, "and it goes on")


def test_what_is_asked_as_the_stream_of_answers_closes_is_answered(visit: Any) -> None:
    page = visit(script=LATE_CLOSE)
    page.wait_for_function("window.closing")
    page.get_by_role("button", name="random", exact=True).click()
    wait_shown(page, examples()["random"].text)


def test_numbers_out_of_range_are_a_sentence(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="How the model writes on").click()
    for number in ("0", "-3", "5000"):
        page.get_by_label("Tokens at most").fill(number)
        page.get_by_role("button", name="Write on", exact=True).click()
        wait_status(page, f"writes 1 to 1,000 tokens at a time, not {int(number):,}")
    page.locator("#mark-from input").fill("-1")
    page.wait_for_selector("#marked [role=alert]")
    assert "no span from -1 to 0" in page.locator("#marked").inner_text()


def test_two_tabs_do_not_mix(visit: Any) -> None:
    one, two = visit(), visit()
    for page in (one, two):
        formal(page)
    texts = ["aaaa bbbb aaaa bbbb", "cdef cdef"]
    for page, text in zip((one, two), texts, strict=True):
        page.locator("#text-a textarea").fill(text)
    for page in (one, two):
        page.get_by_role("button", name="Read", exact=True).click()
    for page, text in zip((one, two), texts, strict=True):
        wait_shown(page, text)
        assert "".join(table(page)["token"]) == text
    links = [page.locator(".export").first.get_attribute("href") for page in (one, two)]
    assert links[0] != links[1]
    choose(one, "Palette", "grey")
    one.wait_for_selector(".ph.grey")
    assert two.locator(".ph.colour").count()


def test_dark_and_light_follow_the_system(visit: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        ink, ground = page.evaluate(
            """['color', 'backgroundColor'].map((name) => getComputedStyle(name === 'color' ?
              document.querySelector('.ph h3') : document.body)[name].match(/[\\d.]+/g).slice(0, 3)
              .reduce((sum, part) => sum + +part, 0))"""
        )
        grounds.append(ground)
        assert abs(ink - ground) > 380  # of 765
        page.evaluate("window.scrollTo(0, 0)")
        page.mouse.move(
            *[page.locator(".text").first.locator("span").nth(75).bounding_box()[k] + 4 for k in "xy"]
        )
        photograph(page, "explore" if scheme == "light" else "explore_dark", 1150)
    assert grounds[0] > 700
    assert grounds[1] < 150


def test_on_a_phone_nothing_is_wider_than_the_page(visit: Any) -> None:
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="random", exact=True).tap()
    wait_shown(page, examples()["random"].text)
    page.get_by_role("button", name="Compare with a second text").tap()
    page.locator("#text-b textarea").fill("abcdefgh" * 40)
    page.locator("#text-a textarea").fill("abcdefgh" * 60)
    page.get_by_role("button", name="Read", exact=True).tap()
    wait_shown(page, "abcdefgh" * 60)
    wait_shown(page, "abcdefgh" * 40, 1)
    assert page.evaluate("document.querySelector('#result').getBoundingClientRect().top") < 844  # in view
    for part in (".means", ".highest"):  # nothing cut off
        assert page.evaluate(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{part}'))")
    lists = """[...document.querySelectorAll('input[role=combobox]')].filter((e) => e.offsetParent)
      .every((e) => e.getBoundingClientRect().right
        <= e.parentElement.querySelector('svg').getBoundingClientRect().left)"""
    assert page.evaluate(lists)
    read(page, "")
    wait_status(page, "is empty")
    page.mouse.wheel(0, 600)
    page.wait_for_timeout(500)
    place = "(({top, bottom}) => [top, bottom])(document.querySelector('#status p').getBoundingClientRect())"
    top, bottom = page.evaluate(place)
    assert 0 <= top < bottom <= 844  # wherever the page is scrolled to
    read(page, "abcdefgh" * 60)
    wait_status(page, "Text A: 480 tokens")
    page.locator(".text").first.locator("span").nth(30).tap()
    page.wait_for_selector(".ph-tip.pinned")
    assert page.locator(".ph-tip").inner_text().startswith("token 30")
    page.locator("#mark-from input").fill("3")
    page.locator("#mark-to input").fill("9")
    page.wait_for_selector("#marked .marking")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('.ph-tip').getBoundingClientRect().right") <= 390
    page.get_by_role("button", name="prose", exact=True).tap()
    wait_shown(page, examples()["prose"].text)
    page.evaluate("document.querySelector('#result').scrollIntoView()")
    photograph(page, "explore_phone")
