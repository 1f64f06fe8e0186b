"""The character tokenizer: ids are ASCII codes, text comes back whole, files load without the network."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from philens.bases.tokenizer import character_tokenizer

ASCII = "".join(map(chr, range(128)))


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_vocabulary(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == tokenizer.vocab_size == 128
    assert tokenizer.get_vocab() == {character: ord(character) for character in ASCII}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 3, 26)


@given(text=st.text(st.sampled_from(ASCII)) | st.text(st.sampled_from(string.ascii_lowercase + " \n.'")))
def test_round_trip(tokenizer, reloaded, text):
    for either in (tokenizer, reloaded):
        encoded = either(text, return_offsets_mapping=True)
        assert encoded["input_ids"] == [ord(character) for character in text]
        assert encoded["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
        assert either.decode(encoded["input_ids"]) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_characters_outside_ascii_are_unknown_one_by_one(tokenizer, text):
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == [ord(c) if ord(c) < 128 else 26 for c in text]
    assert encoded["offset_mapping"] == [(i, i + 1) for i in range(len(text))]


def test_punctuation_keeps_its_spaces(reloaded):
    text = "  do n't , you ?  yes !"
    assert reloaded.decode(reloaded(text).input_ids) == text


def test_batch_is_padded_with_nul_and_masked(reloaded):
    batch = reloaded(["abc", "a"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"] == [[97, 98, 99], [97, 0, 0]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


def test_skipping_special_tokens_keeps_the_text(tokenizer):
    assert tokenizer.decode([0, 0, 97, 32, 98, 3], skip_special_tokens=True) == "a b"


def test_loads_beside_an_lstm(tmp_path):
    from philens.bases.lstm import LSTMConfig, LSTMForCausalLM

    LSTMForCausalLM(LSTMConfig(hidden_size=8, intermediate_size=8)).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer("ab c").input_ids == [97, 98, 32, 99]
