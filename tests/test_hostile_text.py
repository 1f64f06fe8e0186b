"""Texts of every script, markup and control characters through scoring, the page and the terminal.

The checks are those of `python -m faults texts`, which tries 10,000 texts with each of two models.
"""

import io
import json
import os
import random
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from faults.generated import MARKUP, SIGNS, texts
from faults.texts import tiny_lens
from faults.written import wrong_page, wrong_scores, wrong_terminal

import philens
from philens import cli
from philens.reasoning.problems import read_rows
from philens.reasoning.ranking import CandidatesFile
from philens.scoring.corpus import Corpus
from philens.support.errors import InputError
from philens.tasks.levels import read_levels
from philens.tasks.sources import TextPart, open_source


@pytest.fixture(autouse=True)
def same_texts():
    random.seed(0)
    texts.cache_clear()


@pytest.fixture(scope="module", params=["bytes", "byte pairs", "unigram with bytes", "WordPiece"])
def lens_of(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("faults.texts.OTHERS", 200)
        return tiny_lens(request.param)


def test_every_text_comes_back_and_none_gets_out_of_its_place(lens_of, tmp_path):
    lens, tokenizer = lens_of
    found = [*texts(40), *MARKUP, *SIGNS, "<b>" * 300, "a" + "\u0301" * 500, "漢" * 300]
    refused = []

    def read(texts):
        try:
            return philens.score(lens, tokenizer, texts)
        except InputError as error:
            if len(texts) > 1:
                return read(texts[: len(texts) // 2]) + read(texts[len(texts) // 2 :])
            refused.append((texts[0], str(error)))
            return []

    scores = [item for start in range(0, len(found), 16) for item in read(found[start : start + 16])]
    assert len(scores) + len(refused) == len(found)
    assert all(("is empty" if text == "" else "only special tokens") in why for text, why in refused)
    # Special tokens apart, what has no sign of its own gives no token where it is dropped, as BERT does.
    left = " ".join(text for text, _ in refused)
    for token in tokenizer.all_special_tokens:
        left = left.replace(token, "")
    assert not any(map(str.isalnum, left))
    assert not left.split() or tokenizer.cls_token
    for item in scores:
        assert wrong_scores(item.text, item) is None, repr(item.text)
    for start in range(0, len(scores), 50):
        group = scores[start : start + 50]
        assert wrong_page(tmp_path / "page.html", group) is None
        assert wrong_terminal(group) is None


def test_half_a_character_is_refused():
    lens, tokenizer = tiny_lens("bytes")
    for text in [*texts(30, surrogates=True), "\ud800", "a\udcff"]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            with pytest.raises(InputError, match="half a character"):
                philens.score(lens, tokenizer, [text])
        elif text:
            assert wrong_scores(text, philens.score(lens, tokenizer, [text])[0]) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("<b>x</b>", None),
        ("raw", "an element that is not the page's"),
        ("link", "an element that is not the page's"),
        ("open", "is left open|a closing"),
        ("other", "the pieces on the page are others"),
    ],
)
def test_the_checks_see_what_they_look_for(monkeypatch, tmp_path, name, problem):
    from philens.show import page

    lens, tokenizer = tiny_lens("bytes")
    scores = philens.score(lens, tokenizer, ["one & two", "<b>"])
    whole = page.write_scores_page

    def write(path, scores):
        whole(path, scores)
        content = path.read_text(encoding="utf-8")
        spoiled = {
            "raw": content.replace(">&lt;<", "><svg></svg><", 1),
            "link": content.replace("</body>", "<script src='//example.org'></script></body>"),
            "open": content.replace("</figure>", "<p></figure>", 1),
            "other": content.replace(">&amp;<", ">x<", 1),
        }.get(name, content)
        assert (spoiled == content) == (problem is None)
        path.write_text(spoiled, encoding="utf-8")

    monkeypatch.setattr(page, "write_scores_page", write)
    found = wrong_page(tmp_path / "page.html", scores)
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert any(part in found for part in problem.split("|"))


LETTERS = "abc é 漢 😀 \x1b[31m <script>"


@pytest.fixture
def scored(monkeypatch, text_model):
    return partial(_scored, monkeypatch, text_model)


def _scored(monkeypatch, model, encoding, *words):
    """Exit code, bytes of standard output, text of standard error of `philens score`, both in an encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    code = cli.main(["score", *words, "--model", str(model)])
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams)
    return code, out, err.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminals_of_every_encoding(monkeypatch, tmp_path, scored, encoding):
    monkeypatch.chdir(tmp_path)
    Path("é漢.txt").write_text(LETTERS, encoding="utf-8")
    code, out, err = scored(encoding, "é漢.txt", "--format", "table")
    assert code == 0, err
    assert re.fullmatch(r"Scored 1 document with \d+ tokens\.\n", err)
    assert ("é漢.txt" if encoding == "utf-8" else "\\u6f22.txt: ") in out.decode(encoding)
    assert b"\x1b" not in out
    code, out, _ = scored(encoding, "é漢.txt", "--format", "jsonl")
    record = json.loads(out.decode())
    assert (code, record["id"], record["text"]) == (0, "é漢.txt", LETTERS)


def test_a_name_that_is_not_unicode(monkeypatch, tmp_path, scored):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"a\xff.txt")
    Path(name).write_text("some text")
    code, out, err = scored("utf-8", name, "--format", "jsonl")
    assert (code, json.loads(out)["id"]) == (0, "a\\udcff.txt"), err
    for form in ("jsonl", "parquet", "html"):
        output = os.fsdecode(b"b\xff." + form.encode())
        output = output if form == "html" else f"{output}.folder"
        code, out, err = scored("utf-8", name, "--format", form, "--output", output)
        assert (code, err) == (0, ""), err
        assert out.startswith("Wrote b⟨U+DCFF⟩.".encode())
        assert Path(output).exists()
    code, out, err = scored("ascii", name + ".no", "--format", "table")
    assert (code, out) == (2, b"")
    assert err == "philens: error: There is no file a\\u27e8U+DCFF\\u27e9.txt.no; check the path.\n"


def test_names_that_a_terminal_would_obey(monkeypatch, tmp_path, scored):
    monkeypatch.chdir(tmp_path)
    name = "a\x1b]0;title\x07\x1b[31m\u202e.txt"
    Path(name).write_text("some text")
    runs = [scored("utf-8", name, "--format", form) for form in ("table", "jsonl", "terminal")]
    runs.append(scored("utf-8", name, "--format", "html", "--output", f"{name}.html"))
    runs.append(scored("utf-8", f"{name}.no"))
    assert [code for code, _, _ in runs] == [0, 0, 0, 0, 2]
    for _, out, err in runs:
        said = out.decode() + err
        assert not set("\x1b\x07") & set(said)
        assert "title" in said


HUGE = "1" + "0" * 5000


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (f'{{"text": {HUGE}}}', lambda path: list(Corpus([str(path)]))),
        (f'{{"prompt": {HUGE}}}', CandidatesFile),
        (f'{{"text": {HUGE}}}', lambda path: read_levels(path.parent)),
        (f'{{"question": {HUGE}}}', read_rows),
        (f'{{"text": "a"}}\n{{"text": {HUGE}}}', lambda path: open_source(TextPart(source=str(path)))),
    ],
    ids=["corpus", "candidates", "levels", "problems", "training"],
)
def test_a_number_that_python_does_not_read(tmp_path, content, read):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError) as raised:
        read(path)
    assert "sys.set_int_max_str_digits" not in str(raised.value)
    assert re.search("[Ll]ine [12]", str(raised.value))
    assert len(str(raised.value)) < 400
