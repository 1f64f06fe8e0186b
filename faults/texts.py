"""Texts of every kind through scoring, pages, terminals and files, and corpora that are not what they say."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

from faults.generated import MARKUP, SIGNS, texts
from faults.probe import probe
from faults.table import Case, Outcome
from faults.written import ATTRIBUTES, TAGS, wrong_page, wrong_scores, wrong_terminal

# Of each kind of tokenizer, of which there are five; and to train some of them.
TEXTS, OTHERS, PER_PAGE = 2_500, 1_000, 50


# Models to score with: those that come with philens, and tiny ones with tokenizers of other kinds.


@cache
def _shipped() -> tuple[Any, Any]:
    import torch

    import philens
    from philens.training.opening import load_lens

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_lens(str(philens.SHIPPED))


@cache
def tiny_lens(kind: str) -> tuple[Any, Any]:
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
    from philens.bases.tokenizer import byte_tokenizer

    return byte_tokenizer()


def _pairs() -> Any:
    from philens.bases.tokenizer import train_bpe

    return train_bpe(texts(OTHERS), 600)


def _characters() -> Any:
    from philens.bases.tokenizer import character_tokenizer

    return character_tokenizer()


_TOKENIZERS = {
    "characters": _characters,
    "bytes": _bytes,
    "byte pairs": _pairs,
    "unigram with bytes": _unigram,
    "WordPiece": _wordpiece,
}


def _rightly_refused(tokenizer: Any, text: str, why: str) -> bool:
    """Whether a text is refused for what it is."""
    if "half a character" in why:
        return any("\ud800" <= character <= "\udfff" for character in text)
    if "is empty" in why:
        return not text
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    nothing = "gives only special tokens" in why or "gives no token" in why
    return nothing and not any(character.isascii() and character.isalnum() for character in text)


def _readable(tokenizer: Any, group: list[str]) -> tuple[list[str], str | None]:
    """The texts that are not refused, and what is wrong if one is refused without a reason."""
    from philens.scoring.texts import tokenize
    from philens.support.errors import InputError

    good = []
    for text in group:
        try:
            tokenize(tokenizer, text, "A text")
            good.append(text)
        except InputError as error:
            if not _rightly_refused(tokenizer, text, str(error)):
                return [], f"{text!r:.200}: refused: {error}"
    return good, None


def _score(lens_of: Callable[[], tuple[Any, Any]], group: list[str], place: Path) -> str | None:
    """Score some texts and look at all that is made of them; lone surrogates and nothing are refused."""
    import philens
    from philens.support.errors import PhilensError

    lens, tokenizer = lens_of()
    good, problem = _readable(tokenizer, group)
    if problem:
        return problem
    try:  # a sentence is no answer to what can be read
        scores = philens.score(lens, tokenizer, good) if good else []
        for text, item in zip(good, scores, strict=True):
            if problem := wrong_scores(text, item):
                return f"{text!r:.200}: {problem}"
        if not scores:
            return None
        return wrong_page(place / "page.html", scores) or wrong_terminal(scores)
    except PhilensError as error:
        return f"refused: {error}"


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
    lens_of = partial(tiny_lens, "bytes")
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
    # A megabyte takes a minute; what is made of it afterwards is the same for every tokenizer.
    slow = [name for name, text in made.items() if len(text) > 200_000]
    for kind in _TOKENIZERS:
        tiny_lens(kind)
    items = [(kind, name) for kind in _TOKENIZERS for name in made if name not in slow]
    items += [("byte pairs", name) for name in slow] + [("characters", slow[0])]

    def work(item: tuple[str, str], place: Path) -> str | None:
        import philens

        lens, tokenizer = tiny_lens(item[0])
        text = made[item[1]]
        scores = philens.score(lens, tokenizer, [text], batch_tokens=16_384)[0]
        problem = wrong_scores(text, scores)
        if problem or len(scores) > 50_000:
            scores.to_html(place / "page.html")
            return problem
        return wrong_page(place / "page.html", [scores]) or wrong_terminal([scores])

    return probe(items, work, folder, seconds=400, gigabytes=4.0)


def _figures(folder: Path) -> Outcome:
    lens, tokenizer = tiny_lens("bytes")
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
    from philens.show.page import write_scores_page

    lens, tokenizer = tiny_lens("bytes")
    outcome, found = Outcome(), texts(TEXTS)
    hostile = [text for text in found if "<" in text][:200]
    groups = [list(MARKUP), list(SIGNS), *(hostile[k : k + 40] for k in range(0, len(hostile), 40))]
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, headless=True, args=arguments)
        for number, group in enumerate(groups):
            group, _ = _readable(tokenizer, group)
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
            events += [f"<{tag}> in the page" for tag in sorted(tags - TAGS - {"tbody"})]
            events += [f"an attribute {name}" for name in sorted(names - ATTRIBUTES)]
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
    yield Case("texts", "model for letters", partial(_through, _shipped, TEXTS))
    for kind in ("bytes", "byte pairs", "unigram with bytes", "WordPiece"):
        yield Case("texts", f"{kind}", partial(_through, partial(tiny_lens, kind), TEXTS))
    yield Case("texts", "lone surrogates", _surrogates)
    yield Case("texts", "empty, spaces, megabytes", _odd)
    yield Case("texts", "figures", _figures)
    yield Case("texts", "pages in a browser", _browser)
    yield Case("texts", "corpora as text and JSON Lines", _corpora)
    yield Case("texts", "corpora as Parquet", _parquet)
    yield Case("texts", "philens score", _commands)
