"""Tables, figures and pages say what the results say, escape what they must and overlap nothing."""

import io
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table

from philens.findings.figures import TASK_STYLES, figure_complexity, figure_tasks
from philens.findings.language_tables import complexity_table, spread_table, tasks_table
from philens.scoring.scores import TokenScores
from philens.show import colours, page, tokens
from philens.show.page import PageDocument, write_page, write_scores_page
from philens.support.errors import InputError, OutputError
from philens.tasks.automata import TASKS
from philens.training.course import figure_training


def estimate(value: float | None, name: str = "value", half: float = 0.05) -> dict[str, Any]:
    return {name: value, "ci95": [None, None] if value is None else [value - half, value + half]}


def tasks_results(points: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Results with a surprisal and a phi for each task."""
    return {
        "tasks": {
            name: {
                "phi": estimate(phi, "mean"),
                "surprisal": estimate(surprisal, "mean"),
                "tokens": 1000,
                "documents": 10,
                "tokens_without_surprisal": 10,
            }
            for name, (surprisal, phi) in points.items()
        },
        "ratios": {"random": {**estimate(2.0, "ratio"), "separated": True}},
        "phi_order": [],
        "surprisal_order": [],
        "orders_differ": True,
        "holds": True,
        "known_false_positives": {"copy": {**estimate(1.5, "ratio"), "over": "random", "note": ""}},
    }


SPREAD_OUT = {name: (number * 0.5, 6.0 - number) for number, name in enumerate(TASKS)}
CROWDED = {name: (1.0 + 0.01 * number, 5.0 + 0.01 * (-1) ** number) for number, name in enumerate(TASKS)}


def complexity_results(value: float | None = 0.1) -> dict[str, Any]:
    names = (
        "spearman",
        "spearman_of_surprisal",
        "partial_given_surprisal",
        "partial_given_surprisal_and_square",
    )
    found = {**{name: estimate(value) for name in names}, "tokens": 100, "documents": 4}
    parts = {part: found for part in ("whole", "first_half", "second_half")}
    points = [
        {
            "surprisal": {"mean": step, "low": step - 0.5, "high": step + 0.5},
            "phi": estimate(5.0 + step, "mean") if step < 3 else {"mean": 9.0, "ci95": [None, None]},
            "tokens": 10,
            "documents": 2,
        }
        for step in range(4)
    ]
    curves = [
        {
            "description_length": {"mean": low + 20, "low": low, "high": low + 40},
            "tokens": 40,
            "documents": 2,
            "points": points,
        }
        for low in (25, 65)
    ]
    totals = {"task": "in_context_language", "tokens": 100, "documents": 4, "tokens_without_surprisal": 4}
    return {**totals, "curves": curves, "token_wise": parts, "document_means": parts, "holds": True}


def render(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tasks_table_fits_a_terminal() -> None:
    text = render(tasks_table(tasks_results(SPREAD_OUT)))
    assert "in-context language 3.00 [2.95, 3.05] 1.50 [1.45, 1.55]" in " ".join(text.split())
    assert "2.00 [1.95, 2.05]" in text
    assert "false positive" in text
    assert "stands above every boring task" in text
    assert "…" not in text


def test_tasks_table_says_what_does_not_hold() -> None:
    results = tasks_results(SPREAD_OUT) | {"holds": False, "orders_differ": False}
    assert "the same way" in render(tasks_table(results))
    results["ratios"]["random"]["separated"] = False
    assert "above 0 of 1" in render(tasks_table(results))
    assert "Nothing to compare" in render(tasks_table(results | {"ratios": {}}))


def test_complexity_table_fits_a_terminal() -> None:
    text = render(complexity_table(complexity_results()))
    assert text.count("0.100") == 24
    assert text.count("[0.050, 0.150]") == 24
    assert "above zero" in text
    assert "…" not in text
    assert "none" in render(complexity_table(complexity_results(None)))


def test_spread_tables() -> None:
    from philens.findings import combine_seeds

    text = render(spread_table(combine_seeds([tasks_results(SPREAD_OUT)] * 2)))
    assert "in-context language" in text
    assert "holds for 2 of 2 seeds" in text
    text = render(spread_table(combine_seeds([complexity_results()])))
    assert "tokens, second half" in text
    assert "none" in text  # one seed has no standard deviation


def drawn(figure: Figure) -> None:
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("points", [SPREAD_OUT, CROWDED], ids=["spread out", "crowded"])
def test_labels_of_tasks_do_not_overlap(points: dict[str, tuple[float, float]]) -> None:
    figure = figure_tasks(tasks_results(points))
    drawn(figure)
    axes = figure.axes[0]
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert set(boxes) == {name.replace("in_context", "in-context").replace("_", " ") for name in TASKS}
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one, other)
    frame = axes.get_window_extent()
    for name, box in boxes.items():
        assert frame.x0 <= box.x0, name
        assert box.x1 <= frame.x1, name
    assert "nats" in axes.get_xlabel()
    assert "nats" in axes.get_ylabel()


def test_every_task_has_its_colour_and_marker() -> None:
    assert set(TASK_STYLES) == set(TASKS)
    colours, markers = zip(*TASK_STYLES.values(), strict=True)
    assert len(set(colours)) == len(set(markers)) == len(TASKS)


def test_tasks_figure_takes_missing_intervals() -> None:
    results = tasks_results(SPREAD_OUT)
    results["tasks"]["copy"]["phi"]["ci95"] = [None, None]
    drawn(figure_tasks(results))


def test_complexity_figure() -> None:
    figure = figure_complexity(complexity_results())
    drawn(figure)
    assert [line.get_label() for line in figure.axes[0].lines] == ["25 to 65", "65 to 105"]
    assert len(figure.axes[1].patches) == 24
    drawn(figure_complexity(complexity_results(None)))


def test_training_figure_draws_what_was_logged() -> None:
    history: list[dict[str, Any]] = [
        {"step": step, "loss": 3.0 / step, "surprisal": 2.0, "phi": 1000.0 / step} for step in range(1, 100)
    ]
    history[49] |= {"eval/copy/phi": 3.0, "eval/copy/surprisal": 1.0}
    history.append({"step": 100, "eval/copy/phi": 2.0, "eval/copy/surprisal": 0.5, "loss": None})
    figure = figure_training(history)
    drawn(figure)
    losses, phi, task_surprisal, task_phi = figure.axes
    assert [len(line.get_xdata()) for line in losses.lines] == [99, 99]
    assert phi.get_yscale() == "log"
    assert list(task_phi.lines[0].get_ydata()) == [3.0, 2.0]
    assert list(task_surprisal.lines[0].get_xdata()) == [50, 100]
    drawn(figure_training([{"step": 1, "loss": 2.0}]))
    with pytest.raises(InputError, match="no training history"):
        figure_training([])


class Spans(HTMLParser):
    """Collects tags, and the class, title and text of each span within a text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "span":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def spans(self) -> list[tuple[str, str, str]]:
        found = [attributes for tag, attributes in self.tags if tag == "span"]
        joined = zip(found, self.texts, strict=True)
        return [
            (str(item.get("class")), str(item["title"]), text) for item, text in joined if "title" in item
        ]


def read_page(path: Path) -> Spans:
    parser = Spans()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


PIECES = [
    "def",
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "\n",
    "\t",
    "\x00\x1b",
    "\u202e",
    "é日😀",
    "\ud800",
    "",
    "&amp;",
]


def write_one(path: Path, pieces: Any, phi: Any, surprisal: Any, **options: Any) -> Spans:
    """A page of one document, read back."""
    document = PageDocument("n", "", pieces, {"phi": phi, "surprisal": surprisal})
    return read_page(write_page(path, "t", [document], **options))


def test_page_shows_every_piece_twice_with_its_values(tmp_path: Path) -> None:
    count = len(PIECES)
    phi = np.linspace(0, 10, count)
    surprisal = np.full(count, 1.0)
    surprisal[0] = np.nan
    columns = {"phi": phi, "surprisal": surprisal, "settling_depth": np.arange(count)}
    units = {"settling_depth": "blocks"}
    document = PageDocument("a <b> & c", "made of <i>pieces</i>", PIECES, columns, units=units)
    path = write_page(tmp_path / "page.html", "title </title><script>", [document])
    parser = read_page(path)
    tags = [tag for tag, _ in parser.tags]
    assert "script" not in tags
    assert not {"b", "i"} & {tag for tag in tags[tags.index("section") :]}
    assert all(not key.startswith("on") for _, attributes in parser.tags for key in attributes)
    spans = parser.spans()
    assert len(spans) == 2 * count
    assert spans[0][:2] == ("c0", "def: phi 0.000 nats, surprisal none, settling depth 0.000 blocks")
    assert spans[count][0] == "none"
    assert spans[count - 1][0] == f"c{colours.LEVELS - 1}"
    assert [text for _, _, text in spans[:10]] == [
        *PIECES[:3],
        "⏎\n",
        "⇥",
        "⟨U+0000⟩⟨U+001B⟩",
        "⟨U+202E⟩",
        "é日😀",
        "⟨U+D800⟩",
        "∅",
    ]
    assert spans[10][2].startswith("&amp;")
    levels = [int(kind[1:]) for kind, _, _ in spans[:count]]
    assert levels == sorted(levels)


def test_page_loads_nothing_and_knows_both_themes(tmp_path: Path) -> None:
    write_one(tmp_path / "page.html", "abc", [1, 2, 3], [1, 2, 3])
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|url\(|@import|<link|<script|src=", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "phi (PHi loss), nats" in text


def test_page_without_values_or_documents(tmp_path: Path) -> None:
    nothing = np.full(2, np.nan)
    found = write_one(tmp_path / "page.html", "ab", nothing, nothing)
    assert {kind for kind, _, _ in found.spans()} == {"none"}
    write_page(tmp_path / "empty.html", "t", [])
    assert "nothing to show" in (tmp_path / "empty.html").read_text()
    write_one(tmp_path / "empty.html", [], [], [])


def test_infinite_and_negative_values_have_the_end_colours(tmp_path: Path) -> None:
    spans = write_one(tmp_path / "page.html", "0abc", [0.0, -1.0, 1.0, np.inf], np.zeros(4)).spans()
    top = f"c{colours.LEVELS - 1}"
    assert [kind for kind, _, _ in spans[1:4]] == ["c0", top, top]


def test_the_first_token_does_not_stretch_the_scale(tmp_path: Path) -> None:
    spans = write_one(tmp_path / "page.html", "abc", [1e6, 0.0, 1.0], np.zeros(3)).spans()
    top = f"c{colours.LEVELS - 1}"
    assert [kind for kind, _, _ in spans[:3]] == [top, "c0", top]


def test_any_metrics_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    names = ["phi@model.layers.1", "phi@model.layers.2", "surprisal", "margin"]
    columns = {name: np.arange(3.0) + number for number, name in enumerate(names)}
    documents = [PageDocument(f"text {number}", "", "abc", columns) for number in range(2)]
    for metrics, shown in ((None, [names[0], "surprisal"]), (names[1:], names[1:])):
        parser = read_page(write_page(path, "t", documents, metrics))
        assert len(parser.spans()) == 2 * 3 * len(shown)
        captions = re.findall("<figcaption>(.*?)</figcaption>", path.read_text())
        assert captions == 2 * [f"{colours.plain_label(name)}, nats" for name in shown]
        # Every column is in the table of means and on hover, drawn or not.
        assert path.read_text().count(">1.000</td>") == 2
        assert ("td", {}) in parser.tags
        assert "phi at model.layers.2 1.000 nats" in parser.spans()[0][1]
    with pytest.raises(InputError, match=r"'text 0' has no metric entropy; it has phi@model\.layers\.1, "):
        write_page(path, "t", documents, ["entropy"])


def test_a_page_ends_somewhere_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_TOKENS", 5)
    documents = [PageDocument(name, "", "abc", {"phi": [1.0, 2.0, 6.0]}) for name in "abc"]
    path = tmp_path / "page.html"
    assert len(read_page(write_page(path, "t", documents)).spans()) == 5
    text = path.read_text()
    assert "This page ends after 5 tokens in 2 documents" in text
    assert text.count("<td>3.000</td>") == 2  # means of whole documents
    monkeypatch.setattr(page, "MAX_DOCUMENTS", 1)
    write_page(path, "t", documents)
    assert "This page ends after 3 tokens in 1 documents" in path.read_text()
    monkeypatch.undo()
    write_page(path, "t", documents)
    assert "This page ends" not in path.read_text()


def scores_of(text: str, spans: Any = (), name: str | None = None, **provenance: Any) -> TokenScores:
    """A text with one token a character, each with its number as phi."""
    count = len(text)
    offsets = np.stack([np.arange(count), np.arange(count) + 1], axis=1)
    columns = {"phi": np.arange(count, dtype=np.float32), "surprisal": np.ones(count, np.float32)}
    return TokenScores(text, np.arange(count), offsets, columns, spans, provenance, name=name)


def test_a_page_of_scores_marks_spans_and_says_where_they_come_from(tmp_path: Path) -> None:
    chat = scores_of(
        "<ab>cd!",
        [("user<", 1, 3), ("assistant", 4, 6)],
        name="chat",
        base="<base>",
        layers=[1, 2],
        seed=None,
    )
    plain = scores_of("xyz", name="plain", base="<base>", layers=[1, 3], seed=None)
    path = write_scores_page(tmp_path / "page.html", [chat, plain], title="Mine")
    text = path.read_text()
    body = re.sub(r' title="[^"]*"', "", text[text.index("<section") :])
    body = re.sub(r'<span class="c\d+">(.*?)</span>', r"\1", body)
    assert (
        body.count(
            '<span class="span"><b>user&lt;</b>ab</span>&gt;<span class="span"><b>assistant</b>cd</span>!'
        )
        == 2
    )
    assert "<dt>base</dt><dd>&lt;base&gt;</dd>" in text
    assert "<dt>layers</dt><dd>differs between texts</dd><dt>seed</dt><dd>none</dd>" in text
    assert re.findall("<h2>(.*?)</h2>", text) == ["chat", "plain", "Where this comes from"]
    assert '<a href="#d2">plain</a>' in text
    assert '<section id="d2">' in text
    assert "<h1>Mine</h1>" in text
    scores_of("abc").to_html(tmp_path / "one.html", ["surprisal"])
    one = (tmp_path / "one.html").read_text()
    assert "<h2>Text 1</h2>" in one
    assert len(read_page(tmp_path / "one.html").spans()) == 3
    write_scores_page(tmp_path / "none.html", [])


def test_page_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 pieces but phi of shape"):
        write_one(tmp_path / "page.html", "abc", [1.0], [1, 2, 3])
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="Cannot write"):
        write_page(tmp_path / "missing" / "page.html", "t", [])


HOSTILE = "a\x1b[31m\r[bold]\u202e\n\nb c"


def test_coloured_tokens_in_a_terminal(monkeypatch) -> None:
    # rich keeps the codes of a style, whatever colours the terminal had that first showed it.
    fresh = [Style(bgcolor=style.bgcolor, color=style.color) for style in tokens.STYLES]
    monkeypatch.setattr(tokens, "STYLES", fresh)
    Style._add.cache_clear()
    chat = scores_of(HOSTILE)
    plain = scores_of("xyz")
    plain.columns["phi"][:] = [0.0, np.nan, 7.0]
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=40)
    tokens.print_coloured(console, [("one\x1b", chat), ("two", plain)])
    text = file.getvalue()
    shown = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "\x1b" not in shown
    lines = shown.splitlines()
    assert lines[0].startswith("one⟨U+001B⟩ ")
    assert "a⟨U+001B⟩[31m⟨U+000D⟩[bold]⟨U+202E⟩⏎\n⏎\nb c\n" in shown
    assert lines[-1].startswith("phi 0 ")
    assert "nats and more" in lines[-1]
    cells = {letter: style for style, letter in re.findall(r"\x1b\[([\d;]*)m([xyz])\x1b\[0m", text)}
    # Background and text are both set; a token without value has neither.
    assert "48;2;43;26;74" in cells["x"]
    assert "38;2;255;255;255" in cells["x"]
    assert "48;2" not in cells["y"]
    assert cells["z"] != cells["x"]


def test_a_terminal_without_colours_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert tokens.has_colour(Console(force_terminal=True, color_system="standard"))
    assert not tokens.has_colour(Console(file=io.StringIO()))
    assert not tokens.has_colour(Console(force_terminal=True, color_system=None))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not tokens.has_colour(Console(force_terminal=True, color_system="standard"))


def test_rows_of_tokens() -> None:
    scores = scores_of(HOSTILE)
    scores.columns["surprisal"][0] = np.nan
    file = io.StringIO()
    tokens.print_rows(file, [("name", scores), ("two", scores_of("é日"))])
    lines = file.getvalue().split("\n")
    assert lines[0] == f"name: {len(HOSTILE)} tokens, phi {(len(HOSTILE) - 1) / 2:.3f}, surprisal 1.000"
    assert lines[1].split() == ["token", "phi", "surprisal"]
    assert lines[2].split() == ["0", "a", "0.000", "none"]
    assert lines[3].split() == ["1", "⟨U+001B⟩", "1.000", "1.000"]
    assert lines[len(HOSTILE)].split()[1] == "␣"
    assert {len(line) for line in lines[1 : len(HOSTILE) + 2]} == {len(lines[1])}
    wide = lines[-4:-2]
    assert [cell_len(line) for line in wide] == [len(lines[1])] * 2


@pytest.mark.parametrize("colour", ["truecolor", None])
def test_tokens_one_by_one(colour: Any) -> None:
    file = io.StringIO()
    live = tokens.LiveTokens(Console(file=file, force_terminal=True, color_system=colour, width=20))
    for number, piece in enumerate(["The", " cat\n", "", "\x1b[2J"] * 10):
        live.write(piece, float(number), 1.0)
    live.close()
    text = file.getvalue()
    shown = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "\x1b" not in shown
    if colour:
        assert shown.startswith("The cat⏎\n∅⟨U+001B⟩[2JThe cat⏎\n")
        assert shown.rstrip().endswith("nats and more")
    else:
        assert len(shown.splitlines()) == 41
        assert shown.splitlines()[2].split() == ["1", "␣cat⏎", "1.000", "1.000"]


@pytest.mark.parametrize("anchors", [colours.LIGHT, colours.DARK], ids=["light", "dark"])
def test_colours_have_contrast_and_steady_lightness(anchors: tuple[str, ...]) -> None:
    found = colours.palette(anchors)
    assert len(found) == colours.LEVELS
    lightness = []
    for background, text in found:
        ground = colours.luminance(np.array(list(bytes.fromhex(background[1:]))))
        lightness.append(ground)
        ink = {"#ffffff": 1.0, "#000000": 0.0}[text]
        low, high = sorted((ground, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    steps = np.diff(lightness)
    assert (steps < 0).all() or (steps > 0).all()
