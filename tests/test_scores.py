"""TokenScores: the text comes back from its pieces, and no token is lost or counted twice on any way out."""

import copy
import json
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from philens.bases.tokenizer import character_tokenizer
from philens.scoring.scores import Span, TokenScores
from philens.scoring.texts import tokenize
from philens.support.errors import InputError, OutputError

LINES = ["the cat sat on the mat", "hello world, hello cat", "naïve café 日本語 tests"]


def byte_level(prefix_space=False):
    """A byte-level BPE tokenizer with a BOS token, as of GPT-2 and Llama 3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def unigram():
    """A Metaspace Unigram tokenizer with BOS and EOS and a normaliser, as of T5 and XLNet."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>"
    )
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, prefix space": byte_level(prefix_space=True),
    "unigram": unigram(),
    "character": character_tokenizer(),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def scores_of(tokenizer, text, spans=(), **columns):
    """Made-up scores: by default phi of token i is i + 1, surprisal one half, with none on the first."""
    found = tokenize(tokenizer, text, "the text")
    count = len(found.token_ids)
    surprisal = np.full(count, 0.5, np.float32)
    surprisal[0] = np.nan
    columns = columns or {"phi": np.arange(1, count + 1, dtype=np.float32), "surprisal": surprisal}
    return TokenScores(text, found.token_ids, found.offsets, columns, spans, {"base": "none"})


def plain(text, spans=(), **columns):
    return scores_of(TOKENIZERS["character"], text, spans, **columns)


@each_tokenizer
@pytest.mark.parametrize(
    "text",
    [
        "the cat",
        " the  cat \n",
        "\n\n\t",
        "😀👩‍👩‍👧 family",
        "e\u0301 nai\u0308ve",
        "日本語のテスト",
        "שלום עולם مرحبا",
        "ﬁ ½ ㎏",
        "<s>the</s>",
        "a\x00\u200b\u2028b",
    ],
)
def test_pieces_give_the_text_back(tokenizer, text):
    scores = scores_of(tokenizer, text)
    pieces = scores.pieces()
    assert "".join(pieces) == text
    assert len(pieces) == len(scores) == len(scores.token_ids)
    # Tokens without text have none here either, wherever they stand.
    empty = scores.offsets[:, 0] == scores.offsets[:, 1]
    assert not any(piece for piece, none in zip(pieces, empty, strict=True) if none)


@each_tokenizer
@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1))
def test_any_text_comes_back_and_every_token_counts_once(tokenizer, text):
    try:
        scores = scores_of(tokenizer, text)
    except InputError:  # a normaliser may leave nothing
        return
    assert "".join(scores.pieces()) == text
    with_text = scores.offsets[:, 1] > scores.offsets[:, 0]
    ranges = [text[start:end] for start, end in scores.offsets[with_text]]
    assert scores.spans([("all", 0, len(text))])["tokens"].item() == with_text.sum()
    words = scores.words()
    assert words["tokens"].sum() == sum(bool(part.strip()) for part in ranges)
    assert words["word"].tolist() == text.split()
    halves = scores.spans([("left", 0, len(text) // 2), ("right", len(text) // 2, len(text))])
    assert halves["tokens"].sum() == with_text.sum()
    assert halves["phi_sum"].sum() == scores.phi[with_text].sum()


def test_pieces_of_a_known_text():
    scores = scores_of(TOKENIZERS["byte-level"], "the 😀é")
    assert scores.pieces()[0] == ""  # BOS
    assert [piece for piece in scores.pieces() if piece] == ["the", " ", "😀", "é"]
    assert len(scores) == 1 + 1 + 1 + 4 + 2  # the emoji is four tokens, of which the first has the text
    # What a tokenizer drops goes to the token after it, and at the end to the last.
    offsets = np.array([[0, 0], [1, 2], [4, 5], [7, 7]])
    scores = TokenScores("-a--b--", np.arange(4), offsets, {})
    assert scores.pieces() == ["", "-a", "--b--", ""]
    assert TokenScores("ab", np.arange(1), np.array([[0, 0]]), {}).pieces() == ["ab"]


def test_words_and_their_numbers():
    scores = plain("ab  c\nd é")
    words = scores.words()
    assert list(words.columns) == [
        "word", "start", "end", "tokens", "phi_sum", "phi_mean", "surprisal_sum", "surprisal_mean",
    ]  # fmt: skip
    assert words[["word", "start", "end", "tokens"]].values.tolist() == [
        ["ab", 0, 2, 2],
        ["c", 4, 5, 1],
        ["d", 6, 7, 1],
        ["é", 8, 9, 1],
    ]
    assert words["phi_sum"].tolist() == [1 + 2, 5, 7, 9]
    assert words["phi_mean"].tolist() == [1.5, 5, 7, 9]
    # The first token has no surprisal: it is missing, not 0.
    assert words["surprisal_sum"].tolist() == [0.5, 0.5, 0.5, 0.5]
    assert words["surprisal_mean"].tolist() == [0.5, 0.5, 0.5, 0.5]
    alone = plain("a b").words()
    assert np.isnan(alone["surprisal_sum"][0])
    assert np.isnan(alone["surprisal_mean"][0])


def test_a_token_belongs_to_the_word_it_is_mostly_in():
    # " the" begins in the space; "  x" two before its word.
    scores = TokenScores(
        "on the   x",
        np.arange(4),
        np.array([[0, 0], [0, 2], [2, 6], [6, 10]]),
        {"phi": np.array([100, 1, 2, 4], np.float32)},
    )
    assert scores.words()["phi_sum"].tolist() == [1, 2, 4]
    assert scores.words()["tokens"].tolist() == [1, 1, 1]
    # Several tokens in one character are all the word's.
    emoji = scores_of(TOKENIZERS["byte-level"], "the 😀")
    assert emoji.words()["tokens"].tolist() == [1, 4]


def test_spans_of_every_form():
    scores = plain("one two one")
    table = scores.spans(
        [Span("first", 0, 3), ("all", 0, 11), ("none", 5, 5), ("space", 3, 4), ("far", 50, 60)]
    )
    assert table["name"].tolist() == ["first", "all", "none", "space", "far"]
    assert table["tokens"].tolist() == [3, 11, 0, 1, 0]
    assert table["phi_sum"][:2].tolist() == [6, 66]
    assert np.isnan(table["phi_sum"][2])
    assert table["phi_mean"][3] == 4
    found = scores.spans(re.finditer(r"one", scores.text))
    assert found[["name", "start", "end"]].values.tolist() == [["one", 0, 3], ["one", 8, 11]]
    named = scores.spans(re.finditer(r"(?P<number>two)", scores.text))
    assert named["name"].tolist() == ["number"]
    assert scores.spans([]).empty
    assert list(scores.spans([]).columns) == list(table.columns)
    for wrong in (5, "abc", ("x", 1), ("x", "1", "2"), (1, 2, 3)):
        with pytest.raises(InputError, match="A span is"):
            scores.spans([wrong])


def test_own_spans_are_a_list_and_a_table_and_cut_words():
    scores = plain("<u>hi yo</u>", [("user", 3, 8)])
    assert scores.spans == [Span("user", 3, 8)]
    assert scores.spans[0].name == "user"
    assert scores.spans()["tokens"].tolist() == [5]
    words = scores.words()
    assert words["word"].tolist() == ["<u>", "hi", "yo", "</u>"]
    assert words["span"].fillna("").tolist() == ["", "user", "user", ""]
    assert words["tokens"].tolist() == [3, 2, 2, 4]
    assert "span" not in plain("hi").words()


def test_infinite_values_stay_where_they_are():
    values = np.array([1, np.inf, 2, 3, 4], np.float32)
    words = plain("ab cd", phi=values).words()
    assert words["phi_sum"].tolist() == [np.inf, 7]


def test_means_leave_out_missing_values():
    scores = plain(
        "abcd", phi=np.array([1, 2, np.nan, 5], np.float32), surprisal=np.full(4, np.nan, np.float32)
    )
    assert scores.means()["phi"] == pytest.approx(8 / 3)
    assert np.isnan(scores.means()["surprisal"])


def test_table_of_tokens():
    scores = scores_of(TOKENIZERS["byte-level"], "the cat")
    table = scores.to_pandas()
    assert list(table.columns) == ["token", "token_id", "start", "end", "phi", "surprisal"]
    assert "".join(table["token"]) == "the cat"
    assert table["token_id"].tolist() == scores.token_ids.tolist()
    assert table["phi"].dtype == np.float32
    assert np.isnan(table["surprisal"][0])


def test_json_brings_back_every_bit(tmp_path):
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32)
    numbers = numbers[:3000].copy()
    numbers[:3] = np.nan, np.inf, -np.inf
    text = "é" * 3000
    scores = plain(text, [("user", 1, 2)], phi=numbers, other=np.zeros(3000, np.float32))
    written = scores.to_json(tmp_path / "scores.json")
    assert json.loads(written)["columns"]["phi"][:3] == [None, "inf", "-inf"]
    assert "NaN" not in written
    for source in (written, tmp_path / "scores.json", str(tmp_path / "scores.json")):
        back = TokenScores.from_json(source)
        missing = np.isnan(numbers)
        assert (np.isnan(back.phi) == missing).all()
        assert (back.phi.view(np.uint32)[~missing] == numbers.view(np.uint32)[~missing]).all()
        assert back.text == text
        assert (back.token_ids == scores.token_ids).all()
        assert (back.offsets == scores.offsets).all()
        assert back.spans == scores.spans
        assert back.provenance == {"base": "none"}
        assert back.to_json() == written


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not readable as JSON"),
        ('{"format": 99}', "format 99"),
        ("{}", "does not hold scores"),
        ('{"format": 1, "text": "a"}', "does not hold scores"),
        (
            '{"format": 1, "text": "a", "token_ids": [1], "offsets": [[0, 1]], "columns": {"phi": []},'
            ' "spans": [], "provenance": {}}',
            r"phi must have shape \(1,\)",
        ),
    ],
)
def test_damaged_json_is_one_sentence(content, sentence, tmp_path):
    (tmp_path / "x.json").write_text(content)
    for source in (content, tmp_path / "x.json"):
        with pytest.raises(InputError, match=sentence):
            TokenScores.from_json(source)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(InputError, match="Cannot read"):
        TokenScores.from_json(tmp_path / "none.json")
    with pytest.raises(OutputError, match="Cannot write"):
        plain("a").to_json(tmp_path / "none" / "x.json")


def test_columns_by_name():
    scores = plain("ab", **{"phi@model.layers.1": np.ones(2, np.float32)})
    with pytest.raises(InputError, match=r"did you mean 'phi@model.layers.1'"):
        _ = scores.phi
    with pytest.raises(InputError, match="no column 'surprisal'"):
        _ = plain("ab", phi=np.ones(2, np.float32)).surprisal
    with pytest.raises(InputError, match="nor any other"):
        _ = TokenScores("a", np.zeros(1, np.int64), np.zeros((1, 2), np.int64), {}).phi
    with pytest.raises(InputError, match="offsets must have shape"):
        TokenScores("a", np.zeros(2, np.int64), np.zeros((1, 2), np.int64), {})


def test_copies_and_pickles_are_whole():
    scores = plain("<u>hi yo</u>", [("user", 3, 8)])
    for twin in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert twin.spans == scores.spans
        assert twin.spans().equals(scores.spans())
        assert twin.to_json() == scores.to_json()


def test_short_in_print():
    shown = repr(plain("word " * 100))
    assert len(shown) < 120
    assert "500 tokens" in shown
    assert "phi" in shown


def labels_of(figure):
    return [axes.get_ylabel().split("\n")[0] for axes in figure.axes]


def test_figure(tmp_path):
    names = ("phi", "phi_standard_error", "surprisal", "settling_depth")
    scores = plain("a $x$\n", **{name: np.arange(6, dtype=np.float32) for name in names})
    figure = scores.plot()
    assert labels_of(figure) == ["phi", "surprisal"]
    assert "(nats)" in figure.axes[0].get_ylabel()
    assert [tick.get_text() for tick in figure.axes[-1].get_xticklabels()] == ["a", "␣", "$", "x", "$", "⏎"]
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert figure.axes[0].containers  # error bars of phi
    assert labels_of(scores.plot("settling_depth")) == ["settling depth"]
    assert labels_of(scores.plot(["surprisal", "phi"])) == ["surprisal", "phi"]
    assert labels_of(plain("ab", entropy=np.ones(2, np.float32)).plot()) == ["entropy"]
    several = {"phi@model.layers.1": np.ones(99, np.float32), "phi@model.layers.2": np.ones(99, np.float32)}
    figure = plain("x" * 99, **several).plot()
    assert labels_of(figure) == ["phi at model.layers.1", "phi at model.layers.2"]
    figure.savefig(tmp_path / "long.png")
    with pytest.raises(InputError, match="did you mean 'surprisal'"):
        scores.plot("suprisal")
    with pytest.raises(InputError, match="no column"):
        scores.plot([])


def test_page(tmp_path):
    scores = plain("<b>&</b>", [("user", 3, 4)])
    path = scores.to_html(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert "&lt;" in page
    assert "<b>&" not in page
    assert "surprisal" in page
    with pytest.raises(InputError, match="no column 'entropy'"):
        scores.to_html(tmp_path / "other.html", metrics=["entropy"])
    assert not (tmp_path / "other.html").exists()
