"""What must hold of the scores of any text, and of what is written of them."""

import io
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


def wrong_scores(text: str, scores: Any) -> str | None:
    """What is wrong with the scores of a text, and with what is written of them."""
    import numpy as np

    from philens.scoring.corpus import Document
    from philens.scoring.scores import TokenScores
    from philens.scoring.shards import json_line

    if scores.text != text or "".join(scores.pieces()) != text:
        return "the pieces are not the text"
    if (
        (scores.offsets < 0).any()
        or (scores.offsets > len(text)).any()
        or (np.diff(scores.offsets, axis=1) < 0).any()
    ):
        return "offsets outside the text"
    for name, values in scores.columns.items():
        if not np.isfinite(values[1:]).all():
            return f"{name} is not finite"
    line = json_line(Document("a", text, 0), scores)
    if "\n" in line or json.loads(line.encode("utf-8"))["text"] != text:
        return "the JSON line is another text"
    again = TokenScores.from_json(scores.to_json())
    if again.text != text or not np.array_equal(again.phi, scores.phi, equal_nan=True):
        return "JSON does not come back"
    if zlib.crc32(text.encode()) % 5:  # tables take longer than all the rest
        return None
    table, words = scores.to_pandas(), scores.words()
    if "".join(table["token"]) != text or not set("".join(words["word"])) <= set(text):
        return "the tables hold another text"
    return None


TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "caption", "tr",
    "th", "td", "a", "section", "figure", "figcaption", "span", "b", "i", "footer", "dl", "dt", "dd",
}  # fmt: skip
ATTRIBUTES = {"class", "title", "id", "href", "lang", "charset", "name", "content", "http-equiv"}
_VOID = {"meta"}


class _Page(HTMLParser):
    """Elements and attributes of a page, and the text of its pieces."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.problem: str | None = None
        self.open: list[str] = []
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        if tag not in TAGS or not names <= ATTRIBUTES or len(names) < len(attrs):
            self.problem = f"an element that is not the page's: <{tag} {attrs!r:.80}>"
        href = dict(attrs).get("href")
        if href is not None and not re.fullmatch(r"#d\d+", href):
            self.problem = f"a link to {href!r:.80}"
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "span" and "title" in names:
            self.pieces.append("")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problem = f"a closing {tag} that is not the page's"

    def handle_data(self, data: str) -> None:
        if self.pieces and self.open and self.open[-1] == "span":
            self.pieces[-1] += data

    def handle_comment(self, data: str) -> None:
        self.problem = "a comment"

    def unknown_decl(self, data: str) -> None:
        self.problem = "a declaration"


def wrong_page(path: Path, scores: list[Any]) -> str | None:
    """What is wrong with a page of scored texts."""
    from philens.show.page import write_scores_page
    from philens.support.output import visible

    write_scores_page(path, scores)
    page = _Page()
    page.feed(path.read_bytes().decode("utf-8"))
    page.close()
    if page.problem or page.open:
        return page.problem or f"{page.open[-1]} is left open"
    columns = [name for name in ("phi", "surprisal") if name in scores[0].columns]
    expected = [visible(piece) or "∅" for item in scores for _ in columns for piece in item.pieces()]
    if [piece.replace("⏎\n", "⏎") for piece in page.pieces] != expected:
        return "the pieces on the page are others"
    return None


def wrong_terminal(scores: list[Any]) -> str | None:
    """What a text gets through to a terminal."""
    from rich.console import Console

    from philens.show.tokens import print_coloured, print_rows

    coloured, rows = io.StringIO(), io.StringIO()
    console = Console(file=coloured, force_terminal=True, color_system="truecolor", width=100)
    print_coloured(console, (("a\x1b[31m", item) for item in scores))
    print_rows(rows, (("a\x1b[31m", item) for item in scores))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", coloured.getvalue()) + rows.getvalue()
    controls = sorted(
        set(re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown))
    )
    if controls:
        return f"a terminal gets {controls!r}"
    for item in scores:
        # A token without a piece of the text is shown by a sign.
        if item.text.isascii() and item.text.isalnum() and item.text not in shown.replace("∅", ""):
            return "a text is not shown"
    return None
