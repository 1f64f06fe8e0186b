"""What notebooks show: escaped, readable on light and dark ground, and of use where styles are dropped."""

import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.font_manager import FontProperties, fontManager

import philens
from browser import WAIT, chromium, open_browser
from conftest import make_llama
from philens.bases.tokenizer import character_tokenizer
from philens.findings import Results
from philens.show import fonts, notebook
from philens.show.colours import LEVELS, luminance
from philens.show.fonts import NONE, drawable
from test_score import lens_of
from test_scores import plain

CHARACTERS = character_tokenizer()
HOSTILE = "</pre><script>x</script>\"'><img onerror=x>\x00\u202e &amp; {{x}} ${y} $z$\n\t"


class Parser(HTMLParser):
    """The elements, attributes, texts in `pre` and cells of some markup."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles: list[str] = []
        self.titles: list[str] = []
        self.texts: dict[str, list[str]] = {"pre": [], "td": [], "th": []}
        self.open: list[str] = []
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += [value for name, value in attrs if name == "style"]
        self.titles += [value for name, value in attrs if name == "title"]
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in ("pre", "td", "th"):
            if tag in self.open:
                self.texts[tag][-1] += data


def test_a_text_shows_itself() -> None:
    text = "abc abd <b>"
    (one,) = philens.score(lens_of(make_llama()), CHARACTERS, text, alternatives=True, names=["a & b"])
    found = Parser(one._repr_html_())
    assert found.texts["pre"] == [text, text]  # by phi and by surprisal
    assert found.texts["td"] == ["a & b", str(len(text)), *(f"{mean:.3f}" for mean in one.means().values())]
    assert found.tags == {"div", "b", "span", "pre", "table", "thead", "tbody", "tr", "th", "td"}
    assert found.attributes == {"style", "title"}  # no class, that a style sheet would be needed for
    assert one.alternatives is not None
    for number, note in enumerate(one.alternatives.notes()):
        assert f"phi {one.phi[number]:.3f} nats" in found.titles[number]
        assert found.titles[number].endswith(note)
    # A higher value has a stronger colour.
    shades = [
        float(re.search(r"rgba\(.*,([\d.]+)\)$", style)[1]) for style in found.styles if "rgba" in style
    ]
    phi = shades[12 : 12 + len(text)]
    assert all(np.diff(np.array(phi)[np.argsort(one.phi)]) >= 0)


def test_every_shade_can_be_read_on_light_and_dark() -> None:
    def contrast(ground: Any, ink: int) -> float:
        lights = sorted([luminance(np.array(ground)), luminance(np.array([ink] * 3))])
        return (lights[1] + 0.05) / (lights[0] + 0.05)

    for level in range(LEVELS):
        red, green, blue, alpha = map(float, re.findall(r"[\d.]+", notebook._shade(level)))
        for page, ink in ((255, 0), (255, 33), (17, 255), (30, 212), (13, 230)):  # Jupyter, VS Code, GitHub
            ground = [alpha * one + (1 - alpha) * page for one in (red, green, blue)]
            assert contrast(ground, ink) >= 4.5, (level, page)


def test_a_list_shows_all_on_one_scale() -> None:
    scores = philens.score(lens_of(make_llama()), CHARACTERS, ["abc abd", HOSTILE])
    assert isinstance(scores, list)
    found, alike = Parser(scores._repr_html_()), Parser(scores[0]._repr_html_())
    assert found.tags == alike.tags
    assert found.attributes == alike.attributes
    assert found.texts["td"][0] == "Text 1"
    assert len(found.texts["pre"]) == 4
    assert found.texts["pre"][2].startswith("</pre><script>x</script>")
    assert "\x00" not in found.texts["pre"][2]
    assert "⟨U+202E⟩" in found.texts["pre"][2]


def test_what_is_long_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "MOST_TOKENS", 10)
    scores = philens.score(lens_of(make_llama()), CHARACTERS, ["abcdefg", "abcdefg", "abc"])
    markup = scores._repr_html_()
    assert Parser(markup).texts["pre"] == ["abcdefg", "abcdefg", "abc", "abc"]
    assert "There is more; to_html() writes it as a page." in markup
    assert f"{scores[1].means()['phi']:.3f}" in markup  # of the whole text
    assert "There is more" not in scores[0]._repr_html_()
    assert philens.score(lens_of(make_llama()), CHARACTERS, ["a"])._repr_html_()


def test_ranked_answers() -> None:
    lens, hostile = lens_of(make_llama()), "<script>x</script>" + "y" * 300
    table = philens.rank(lens, CHARACTERS, ["ab", "cd"], [["one", hostile, "three"], ["b", "cc"]])
    table.insert(1, "right", ["✓", "", "", "✓", ""])
    found = Parser(table._repr_html_())
    names = [*dict.fromkeys(found.texts["th"])]
    assert names[:3] == ["rank", "right", "score"]
    assert names[-1] == "text"
    assert "phi_mean" in names
    rows = np.array(found.texts["td"]).reshape(5, len(names))
    assert rows[:, 0].tolist() == [str(rank) for rank in table["rank"]]
    assert rows[3:, -1].tolist() == table["text"][3:].tolist()
    long = next(text for text in rows[:, -1] if text.startswith("<"))
    assert long == hostile[:200] + " …"
    assert "script" not in found.tags
    assert type(table[["rank", "text"]]) is pd.DataFrame


def test_results_show_the_tables_of_the_terminal() -> None:
    made = Results({"a": 0.5}, lambda results: [table_of(results["a"])])
    assert made == {"a": 0.5}
    parsed = Parser(made._repr_html_())
    assert parsed.texts["th"] == ["task", "phi"]
    assert parsed.texts["td"] == ["<b>random</b>", "0.5"]
    assert "<b>A title</b>" in made._repr_html_()
    assert "<small>Nats [per] token</small>" in made._repr_html_()


def table_of(value: float) -> Any:
    from philens.show.terminal import new_table

    table = new_table("A title", "Nats [per] token")
    table.add_column("task")
    table.add_column("phi", justify="right")
    table.add_row("<b>random</b>", str(value))
    return table


@pytest.fixture
def own_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A font of this machine with two Chinese characters and no other letter."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 0))
    pen.lineTo((500, 700))
    pen.closePath()
    box = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "one", "two"])
    builder.setupCharacterMap({ord("日"): "one", ord("本"): "two"})
    builder.setupGlyf({".notdef": box, "one": box, "two": box})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", "one", "two"], (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Philens Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path / "own.ttf"
    builder.save(path)
    known = [one for one in fontManager.ttflist if one.name.startswith("DejaVu")]
    monkeypatch.setattr(fontManager, "ttflist", known)
    fontManager.addfont(path)
    return FontProperties(fname=str(path)).get_name()


def test_figures_have_fonts_for_the_script_of_their_text(own_font: str) -> None:
    texts, families = drawable(["日本", "abc", "ไทย"])
    assert texts == ["日本", "abc", NONE * 3]
    assert own_font in families
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plain("日本 ไ 😀 \n naïve").plot()
        figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert labels[:4] == ["日", "本", "␣", NONE]
    assert own_font in figure.axes[-1].get_xticklabels()[0].get_fontfamily()


def test_usual_texts_look_for_no_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_others", lambda: pytest.fail("looked"))
    assert drawable(["naïve → é"])[0] == ["naïve → é"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_real_browser(theme: str, tmp_path: Path) -> None:
    """As nbconvert has it; with styles dropped, as some programs do, all there is to read remains."""
    nbconvert = pytest.importorskip("nbconvert", reason="nbconvert is not installed.")
    chromium()
    pictures = os.environ.get("PHILENS_SCREENSHOTS")
    lens, tokenizer = philens.load_lens() if pictures else (lens_of(make_llama()), CHARACTERS)
    texts = ["The capital of France is Paris, and 12 + 9 = 21.", "</pre><img src=x onerror='hit = 1'>"]
    scores = philens.score(lens, tokenizer, texts[: 1 if pictures else 2], alternatives=True)
    ranked = philens.rank(lens, tokenizer, "12 + 9 = ", ["21.", "22.", "twenty-one."])
    shown = {"philens.score(lens, tokenizer, text, alternatives=True)": scores._repr_html_()}
    shown["philens.rank(lens, tokenizer, prompt, answers)"] = ranked._repr_html_()
    cells = [
        nbformat.v4.new_code_cell(
            source,
            outputs=[nbformat.v4.new_output("execute_result", {"text/html": markup}, execution_count=1)],
        )
        for source, markup in shown.items()
    ]
    exporter = nbconvert.HTMLExporter(theme=theme)
    body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    path = tmp_path / "notebook.html"
    path.write_text(body, encoding="utf-8")
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 620}, color_scheme=theme)
        page.set_default_timeout(WAIT)
        page.route(re.compile("^http"), lambda route: route.abort())  # MathJax
        page.goto(path.as_uri())
        texts_shown = page.locator(".jp-OutputArea pre").all_text_contents()
        assert texts_shown[0] == texts[0] == texts_shown[1]
        assert page.evaluate("typeof hit") == "undefined"
        grounds = page.evaluate(
            """[...document.querySelectorAll('.jp-OutputArea pre span')]
              .map((span) => getComputedStyle(span).backgroundColor)"""
        )
        assert len(set(grounds)) > 5
        if pictures and theme == "light":
            page.screenshot(path=Path(pictures) / "notebook.png")
        if pictures and theme == "dark":
            page.screenshot(path=Path(pictures) / "notebook_dark.png")
        page.evaluate("document.querySelectorAll('[style]').forEach((e) => e.removeAttribute('style'))")
        assert page.locator(".jp-OutputArea pre").all_inner_texts()[0] == texts[0]
        assert page.locator(".jp-OutputArea td").first.inner_text() == "Text 1"
