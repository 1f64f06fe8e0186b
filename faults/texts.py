"""Texts of every kind through scoring, pages, terminals and files, and corpora that are not what they say."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from faults.probe import attempt, probe
from faults.table import Case, Outcome

TEXTS, OTHERS, PER_PAGE = 10_000, 1_500, 50

# First and last character of blocks, a few of each kind of writing, and what no writing has.
_BLOCKS = (
    (0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x700, 0x74F), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F),
    (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F),
    (0x13A0, 0x13FF), (0x1780, 0x17FF), (0x1800, 0x18AF), (0x2000, 0x206F), (0x20A0, 0x20CF),
    (0x20D0, 0x20FF), (0x2200, 0x22FF), (0x2500, 0x257F), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFB1D, 0xFDFF), (0xFE00, 0xFE0F), (0xFE70, 0xFEFF),
    (0xFF00, 0xFFEF), (0xFFF0, 0xFFFF), (0x10330, 0x1034F), (0x12000, 0x123FF), (0x13000, 0x1342F),
    (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F),
    (0x10FF00, 0x10FFFF),
)  # fmt: skip
_MARKUP = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "</style><script>alert(1)", "</title><b>", "</textarea>", "]]>", "<![CDATA[", "<!--", "-->", "<!-->",
    "--!>", '" onmouseover="alert(1)', "' x='", "<iframe src=//example.org>",
    "<link rel=stylesheet href=//example.org/x.css>", "javascript:alert(1)", "&lt;b&gt;", "&amp;",
    "&#x3c;script&#x3e;", "&", "<", ">", '"', "'", "`", "</span></div></figure>",
    "<base href=//example.org>", "<meta http-equiv=refresh content=0;url=//example.org>", "<plaintext>",
    "<math><mi//xlink:href=x>", "</script>", "@import url(//example.org)", "expression(alert(1))",
    "{{7*7}}", "${7*7}", "[bold red]", "[/]", "[link=x]", "$x^2$", "\\", "%s", "%n", "=1+1",
    "<a href='data:text/html,x'>", "<object data=x>", "<style>*{display:none}</style>",
)  # fmt: skip
_SIGNS = (
    "\x00", "\x07", "\x08", "\x0b", "\x0c", "\x1a", "\x7f", "\x85", "\x9b31m", "\x1b[31m",
    "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x1b[2J", "\x1b", "\r", "\r\n", "\n", "\n\n", "\t", " ",
    "   ", "\u00a0", "\u1680", "\u2028", "\u2029", "\u200b", "\u200c", "\u200d", "\u200e", "\u200f",
    "\u202a", "\u202e", "\u202c", "\u2066", "\u2069", "\ufeff", "\ufffe", "\uffff", "\ufffd", "\u00ad",
    "\u034f", "\u0301" * 40, "e\u0301", "\u0e33", "ﬁ", "İ", "ß", "ǰ", "ΐ", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷",
    "1️⃣", "\U000e0001", "שלום", "مرحبا", "नमस्ते", "한국어", "日本語", "﷽", "\uff28", "①", "²", "⏎",
    "⇥", "␣", "∅",
    "⟨U+200B⟩", "▁", "##", "Ġ", "Ċ", "<unk>", "<s>", "</s>", "<0x0A>", "<|begin|>", "<|end|>", "<|pad|>",
    "[CLS]", "[UNK]", "\x03",
)  # fmt: skip


@cache
def texts(count: int, surrogates: bool = False) -> list[str]:
    """Texts that hypothesis composes of writing, signs and markup; the same in one run of faults."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    writing = st.sampled_from(_BLOCKS).flatmap(
        lambda block: st.text(
            st.characters(min_codepoint=block[0], max_codepoint=block[1], exclude_categories=["Cs"]),
            max_size=8,
        )
    )
    pieces = [
        writing,
        writing,
        st.sampled_from(_MARKUP),
        st.sampled_from(_SIGNS),
        st.text("ab \n", max_size=12),
    ]
    if surrogates:
        pieces.append(st.characters(categories=["Cs"]))
    long = st.tuples(st.sampled_from(_MARKUP + _SIGNS), st.integers(1, 60)).map(
        lambda pair: pair[0] * pair[1]
    )
    made = st.lists(st.one_of(*pieces, long), min_size=1, max_size=8).map("".join)
    found: list[str] = []

    @seed(random.getrandbits(64))
    @settings(
        max_examples=count + count // 10,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(made)
    def collect(text: str) -> None:
        if len(found) < count:
            found.append(text)

    collect()
    found += [found[k % len(found)] for k in range(count - len(found))]
    return found


# Models to score with: those that come with philens, and tiny ones with tokenizers of other kinds.


@cache
def _shipped(name: str) -> tuple[Any, Any]:
    import torch

    import philens
    from philens.scoring.run import load_lens

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_lens(str(getattr(philens, name)))


@cache
def _tiny(kind: str) -> tuple[Any, Any]:
    """A fresh lens that reads the tokens of a tokenizer of a kind, trained on a part of the texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import philens

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _TOKENIZERS[kind]()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    return philens.attach(LlamaForCausalLM(config).eval(), philens.PHiConfig(layer=0, prior="mlp")), tokenizer


def _fast(tokenizer: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _unigram() -> Any:
    """As SentencePiece makes them for Llama and T5: spaces as a sign, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    words += [
        (piece, -5.0) for piece in ["▁", *map(chr, range(0x21, 0x7F)), "▁the", "script", "<", "alert", "ab"]
    ]
    tokenizer = Tokenizer(models.Unigram(list(dict(words).items()), unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # pyright: ignore[reportAttributeAccessIssue]
    return _fast(tokenizer, unk_token="<unk>")


def _wordpiece() -> Any:
    """As BERT's: lower case, no accents, unknown words, tokens around the text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts(OTHERS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return _fast(tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def _bytes() -> Any:
    from philens.tokenizer import byte_tokenizer

    return byte_tokenizer()


def _pairs() -> Any:
    from philens.tokenizer import train_bpe

    return train_bpe(texts(OTHERS), 600)


def _characters() -> Any:
    from philens.tokenizer import character_tokenizer

    return character_tokenizer()


_TOKENIZERS = {
    "characters": _characters,
    "bytes": _bytes,
    "byte pairs": _pairs,
    "unigram with bytes": _unigram,
    "WordPiece": _wordpiece,
}


# What must hold of every text.


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


_TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "caption", "tr",
    "th", "td", "a", "section", "figure", "figcaption", "span", "b", "i", "footer", "dl", "dt", "dd",
}  # fmt: skip
_ATTRIBUTES = {"class", "title", "id", "href", "lang", "charset", "name", "content", "http-equiv"}
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
        if tag not in _TAGS or not names <= _ATTRIBUTES or len(names) < len(attrs):
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
    from philens.report.colours import visible
    from philens.report.page import write_scores_page

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

    from philens.report.tokens import print_coloured, print_rows

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
        if item.text.isascii() and item.text.isalnum() and item.text not in shown:
            return "a text is not shown"
    return None


# What a text is rightly refused for.
_REFUSED = ("half a character", "is empty", "gives only special tokens", "gives no token")


def _score(lens_of: Callable[[], tuple[Any, Any]], group: list[str], place: Path) -> str | None:
    """Score some texts and look at all that is made of them; lone surrogates and nothing are refused."""
    import philens
    from philens.errors import InputError
    from philens.scoring.texts import tokenize

    lens, tokenizer = lens_of()
    good = []
    for text in group:
        try:
            tokenize(tokenizer, text, "A text")
            good.append(text)
        except InputError as error:
            if not any(word in str(error) for word in _REFUSED):
                return f"{text!r:.200}: refused: {error}"
    scores = philens.score(lens, tokenizer, good) if good else []
    for text, item in zip(good, scores, strict=True):
        if problem := attempt(partial(wrong_scores, text, item)):
            return f"{text!r:.200}: {problem}"
    if not scores:
        return None
    return wrong_page(place / "page.html", scores) or wrong_terminal(scores)


def _through(lens_of: Callable[[], tuple[Any, Any]], count: int, folder: Path) -> Outcome:
    """Texts in groups as large as a page; where a group is not survived, each text of it counts as lost."""
    lens_of()
    found = texts(count)
    groups = [found[k : k + PER_PAGE] for k in range(0, len(found), PER_PAGE)]
    outcome = probe(groups, partial(_in_group, lens_of), folder, seconds=300)
    return Outcome(len(found), len(found) - PER_PAGE * (outcome.tried - outcome.survived), outcome.notes)


def _in_group(lens_of: Callable[[], tuple[Any, Any]], group: list[str], place: Path) -> str | None:
    return _score(lens_of, group, place)


def _surrogates(folder: Path) -> Outcome:
    lens_of = partial(_tiny, "bytes")
    lens_of()
    found = texts(400, surrogates=True)
    found = [*found, "\ud800", "\udfff\ud800", "a\udcff", "\ud83d\ude00"]
    return probe([[text] for text in found], partial(_in_group, lens_of), folder, seconds=60)


def _odd(folder: Path) -> Outcome:
    """What generators seldom make: nothing, only spaces, lines and words of a megabyte."""
    long = 1 << 20
    made = {
        "empty": "",
        "a space": " ",
        "spaces": " " * 5000,
        "line breaks": "\n" * 3000 + "\r\n" * 1000,
        "zero width": "\u200b" * 3000,
        "NUL": "\x00" * 3000,
        "combining": "a" + "\u0301" * 20_000,
        "a word of 100,000": "a" * 100_000,
        "a line of a megabyte": "ab " * (long // 3),
        "a word of a megabyte": "ab" * (long // 2),
        "markup of a megabyte": "<script>alert(1)</script>" * (long // 25),
        "a BOM": "\ufeffa",
        "emoji": "👩‍👩‍👧‍👦" * 2000,
        "Han": "漢" * 30_000,
    }
    kinds = list(_TOKENIZERS)
    for kind in kinds:
        _tiny(kind)
    items = [(kind, name) for kind in kinds for name in made]

    def work(item: tuple[str, str], place: Path) -> str | None:
        import philens

        lens, tokenizer = _tiny(item[0])
        text = made[item[1]]
        scores = philens.score(lens, tokenizer, [text], batch_tokens=16_384)[0]
        problem = wrong_scores(text, scores)
        if problem or len(scores) > 50_000:
            scores.to_html(place / "page.html")
            return problem
        return wrong_page(place / "page.html", [scores]) or wrong_terminal([scores])

    return probe(items, work, folder, seconds=400, gigabytes=4.0)


def _figures(folder: Path) -> Outcome:
    lens, tokenizer = _tiny("bytes")
    found = [text[:40] for text in texts(TEXTS) if text[:40]][:60]

    def work(text: str, place: Path) -> str | None:
        import philens

        figure = philens.score(lens, tokenizer, [text])[0].plot()
        figure.suptitle("texts", parse_math=False)
        figure.savefig(place / "figure.png", dpi=40)
        return None

    return probe(found, work, folder)


# A browser, which parses HTML as HTML is defined.


def chromium() -> str | None:
    names = (os.environ.get("PHILENS_CHROMIUM"), "chromium", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _browser(folder: Path) -> Outcome:
    """Pages opened in Chromium: no dialog, no script, no request, and no element beyond the page's own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return Outcome(notes=["not tried: playwright is not installed"])
    path = chromium()
    if path is None:
        return Outcome(notes=["not tried: there is no Chromium"])
    import philens
    from philens.report.page import write_scores_page

    lens, tokenizer = _tiny("bytes")
    outcome, found = Outcome(), texts(TEXTS)
    hostile = [text for text in found if "<" in text][:200]
    groups = [list(_MARKUP), list(_SIGNS), *(hostile[k : k + 40] for k in range(0, len(hostile), 40))]
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, headless=True, args=arguments)
        for number, group in enumerate(groups):
            page_path, events = folder / f"{number}.html", []
            scores = philens.score(lens, tokenizer, group, names=[text[:30] or "x" for text in group])
            write_scores_page(page_path, scores, title="</title><script>alert(1)</script>")
            page = browser.new_page()
            page.on("dialog", lambda dialog, seen=events: (seen.append("a dialog"), dialog.dismiss()))
            page.on(
                "request",
                lambda one, seen=events, own=page_path: (
                    one.url != own.as_uri() and seen.append(f"asks for {one.url}")
                ),
            )
            page.goto(page_path.as_uri())
            page.mouse.move(300, 500)
            tags = set(page.evaluate("[...document.querySelectorAll('*')].map(e => e.tagName.toLowerCase())"))
            names = set(
                page.evaluate("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
            )
            pieces = page.evaluate("document.querySelectorAll('span[title]').length")
            events += [f"<{tag}> in the page" for tag in sorted(tags - _TAGS - {"tbody"})]
            events += [f"an attribute {name}" for name in sorted(names - _ATTRIBUTES)]
            if pieces != 2 * sum(map(len, scores)):
                events.append(f"{pieces} pieces instead of {2 * sum(map(len, scores))}")
            page.close()
            for k in range(len(group)):
                outcome.record(f"page {number}: {'; '.join(events)}"[:300] if events and k == 0 else None)
        browser.close()
    return outcome


# Files with texts.


def _corpora(folder: Path) -> Outcome:
    """Text files and JSON Lines: all of the text comes back, or one sentence."""
    from philens.scoring.corpus import Corpus

    found = texts(TEXTS)
    items: list[tuple[str, bytes, str | None]] = []
    for k in range(0, 1200, 3):
        joined = "\n".join(found[k : k + 3])
        items.append(("text", joined.encode(), joined))
        records = "".join(
            json.dumps({"text": text}, ensure_ascii=k % 2 == 0) + "\n" for text in found[k : k + 3]
        )
        items.append(("jsonl", records.encode(), "".join(found[k : k + 3])))
        damaged = bytearray(records.encode())
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        items.append(("jsonl", bytes(damaged), None))
        items.append(("text", bytes(damaged), None))
    odd = [
        b"\xff\xfea\x00b\x00",
        b"\xef\xbb\xbfabc",
        b"\x80abc",
        b"abc\xc3",
        b"\x00" * 100,
        b"\xed\xa0\x80",
        b"\xc0\xaf",
    ]
    odd += [
        b'{"text": "\\ud800"}',
        b'{"text": 1e999}',
        b'{"text": ' + b"[" * 100_000,
        b'{"text": "' + b"a" * (1 << 26),
    ]
    odd += [
        b'{"text": ' + b"9" * 100_000 + b"}",
        b"null",
        b"[]",
        b'{"text": null}',
        b'{"text": {"a": "b"}}',
        b"{}",
    ]
    odd += [
        b'{"messages": []}',
        b'{"messages": [{"role": 1, "content": "a"}]}',
        b'{"text": ["a"]}',
        b"a" * (3 << 20),
    ]
    items += [(kind, content, None) for content in odd for kind in ("text", "jsonl", "parquet")]

    def work(item: tuple[str, bytes, str | None], place: Path) -> str | None:
        kind, content, expected = item
        path = place / {"text": "a.txt", "jsonl": "a.jsonl", "parquet": "a.parquet"}[kind]
        path.write_bytes(content)
        documents = list(Corpus([str(path)]))
        if expected is not None and expected.strip():
            joined = "".join(str(document.content) for document in documents)
            kept = expected if kind == "text" else "".join(one for one in [expected] if one)
            # Only texts of white space are left out, and the mark at a file's beginning.
            if re.sub(r"\s", "", joined) != re.sub(
                r"\s", "", kept.removeprefix("\ufeff") if kind == "text" else kept
            ):
                return "another text came back"
        return None

    return probe(items, work, folder)


def _parquet(folder: Path) -> Outcome:
    import pandas as pd

    from philens.scoring.corpus import Corpus

    whole = folder / "whole.parquet"
    pd.DataFrame({"text": [text for text in texts(TEXTS)[:50]]}).to_parquet(whole)
    content = whole.read_bytes()
    items: list[bytes] = [content[:size] for size in range(0, len(content), max(1, len(content) // 100))]
    for _ in range(300):
        damaged = bytearray(content)
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        items.append(bytes(damaged))

    def work(item: bytes, place: Path) -> str | None:
        path = place / "a.parquet"
        path.write_bytes(item)
        list(Corpus([str(path)]))
        return None

    return probe(items, work, folder)


def _commands(folder: Path) -> Outcome:
    """`philens score` as it is called: odd names, odd encodings of the terminal, odd files."""
    text = folder / "a.txt"
    text.write_text("abc é 漢 😀 \x1b[31m <script>\n" * 3, encoding="utf-8")
    names = [b"\xff.txt", "é漢<b>\x1b[31m.txt".encode(), b"a\nb.txt", b"-x.txt", b"$x.txt"]
    for name in names:
        shutil.copy(text, os.path.join(os.fsencode(folder), name))
    os.mkfifo(folder / "fifo.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "nowhere.txt").symlink_to("nothing")
    sparse = folder / "sparse.jsonl"
    sparse.write_bytes(b'{"text": "')
    os.truncate(sparse, 10 << 30)
    environments = [
        {},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ]
    runs: list[tuple[list[bytes], dict[str, str]]] = []
    for form in ("terminal", "table", "jsonl"):
        runs += [([b"a.txt", b"--format", form.encode()], one) for one in environments]
    for name in names:
        target = b"--output=./" + name.replace(b"\n", b"").replace(b"-", b"")
        runs.append(([b"./" + name, b"--format", b"jsonl"], {}))
        runs.append(([b"./" + name, b"--format", b"table"], {"PYTHONIOENCODING": "ascii"}))
        runs.append(([b"./" + name, b"--format", b"html", target + b".html"], {}))
        runs.append(([b"./" + name, b"--format", b"parquet", target + b".folder"], {}))
    runs += [
        ([name, b"--format", b"table"], {})
        for name in (b"loop.txt", b"nowhere.txt", b"sparse.jsonl", b"nul\xff")
    ]

    def work(run: tuple[list[bytes], dict[str, str]], place: Path) -> str | None:
        import philens

        arguments, environment = run
        command = [os.fsencode(sys.executable), b"-m", b"philens", b"score", *arguments]
        command += [b"--model", os.fsencode(philens.SHIPPED)]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | environment, capture_output=True, timeout=250
        )
        errors = done.stderr.decode("utf-8", "replace")
        if done.returncode not in (0, 2) or "Traceback" in errors:
            return f"exit code {done.returncode}: {errors.strip()[-300:]}"
        if done.returncode == 2 and not re.search(r"philens: error: .*[.?]\s*$", errors):
            return f"not one sentence: {errors[-300:]}"
        if b"jsonl" in arguments and done.returncode == 0:
            for line in done.stdout.decode("utf-8").splitlines():
                json.loads(line)
        if b"\x1b[31m" in done.stdout or b"\x1b[31m" in done.stderr:
            return "an escape got through"
        return None

    return probe(runs, work, folder, seconds=300, gigabytes=None)


def cases() -> Iterable[Case]:
    import philens

    yield Case("texts", "model for letters", partial(_through, partial(_shipped, "SHIPPED"), TEXTS))
    if hasattr(philens, "SHIPPED_TEXT"):
        yield Case(
            "texts", "model for text, byte pairs", partial(_through, partial(_shipped, "SHIPPED_TEXT"), TEXTS)
        )
    for kind in ("bytes", "unigram with bytes", "WordPiece"):
        yield Case("texts", f"{kind}", partial(_through, partial(_tiny, kind), OTHERS))
    yield Case("texts", "lone surrogates", _surrogates)
    yield Case("texts", "empty, spaces, megabytes", _odd)
    yield Case("texts", "figures", _figures)
    yield Case("texts", "pages in a browser", _browser)
    yield Case("texts", "corpora as text and JSON Lines", _corpora)
    yield Case("texts", "corpora as Parquet", _parquet)
    yield Case("texts", "philens score", _commands)
