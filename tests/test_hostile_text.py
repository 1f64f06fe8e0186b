"""Texts of every script, markup and control characters through scoring, the page and the terminal.

The checks are those of `python -m faults texts`, which tries 10,000 texts with each of two models.
"""

import random

import pytest
from faults.generated import MARKUP, SIGNS, texts
from faults.texts import tiny_lens
from faults.written import wrong_page, wrong_scores, wrong_terminal

import philens
from philens.errors import InputError


@pytest.fixture(autouse=True)
def same_texts():
    random.seed(0)
    texts.cache_clear()


@pytest.fixture(scope="module", params=["bytes", "byte pairs", "unigram with bytes", "WordPiece"])
def lens_of(request):
    return tiny_lens(request.param)


def test_every_text_comes_back_and_none_gets_out_of_its_place(lens_of, tmp_path):
    lens, tokenizer = lens_of
    found = [*texts(150), *MARKUP, *SIGNS, "<b>" * 300, "a" + "\u0301" * 500, "漢" * 300]
    scores, refused = [], []
    for text in found:
        try:
            scores += philens.score(lens, tokenizer, [text])
        except InputError as error:
            refused.append((text, str(error)))
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
    for text in [*texts(60, surrogates=True), "\ud800", "a\udcff"]:
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
    from philens.report import page

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
