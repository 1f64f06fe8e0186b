"""What scoring does not do: nothing twice, nothing for padding, no tensor that need not be, no waiting."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import make_llama
from philens.bases.tokenizer import character_tokenizer
from philens.scoring import score as module
from philens.scoring.documents import score_documents
from philens.scoring.score import iter_scores, score
from philens.scoring.texts import tokenize_all
from test_architectures import ARCHITECTURES, make, shaken_lens
from test_packing import documents_of
from test_score import BYTES, close, lens_of, same
from tiny import OF_A_LAYER

CHARACTERS = character_tokenizer()
# Operations for which a processor waits for its device.
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero"}


class Watch(TorchDispatchMode):
    """The shapes of all results, and how often something was waited for."""

    def __init__(self):
        super().__init__()
        self.shapes, self.waits = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.waits += func.overloadpacket.__name__ in WAITS
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(result) if torch.is_tensor(leaf)}
        return result


def watched(function):
    with Watch() as watch:
        function()
    return watch


def texts_of(lengths):
    rng = np.random.default_rng(0)
    letters = list("abcdefghij ")
    return ["".join(rng.choice(letters, length)) for length in lengths]


@pytest.fixture
def lens():
    # A vocabulary of its own size, so that no other dimension is taken for it.
    lens = lens_of(make_llama(vocab_size=1013, max_position_embeddings=2048))
    score(lens, CHARACTERS, "warm")
    return lens


@pytest.mark.parametrize("metrics", [["phi"], ["phi", "surprisal"], OF_A_LAYER])
def test_no_mask_and_no_whole_logits(lens, metrics):
    lengths = [611, 607, 599, 523]
    shapes = watched(lambda: score(lens, CHARACTERS, texts_of(lengths), metrics=metrics)).shapes
    assert (4, 611, 32) in shapes
    # No tensor of all pairs of tokens, float or bool, for any number of rows and heads.
    assert not [shape for shape in shapes if shape[-2:] == (611, 611)]
    vocabulary = [shape for shape in shapes if shape[-1:] == (1013,)]
    assert any(vocabulary) == (metrics != ["phi"])
    # The weight itself, of 32 columns, and parts.
    rows = 2**21 // 1013
    assert all(np.prod(shape[:-1]) <= rows for shape in vocabulary)
    assert sum(lengths) > rows


def test_logits_are_made_of_scored_tokens_only(lens):
    """Not of padding, nor of what a later window reads again."""
    text, short = texts_of([900, 70])
    head, made = lens.base.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda *call: made.append(call[1][0].shape[:-1].numel()))
    found = score(lens, CHARACTERS, [text, short], metrics=["phi", "surprisal"], window=200)
    handle.remove()
    # The base itself reads the first token of each of 9 windows with it, besides.
    assert sum(made) == 970 + 9
    assert np.isfinite(found[0].surprisal[1:]).all()


def test_one_pass_for_phi_and_surprisal():
    lens, twice = lens_of(make_llama()), []
    score(lens, CHARACTERS, "warm")
    for block in lens.base.model.layers:
        block.mlp.register_forward_hook(lambda *_: twice.append(1))
    texts = texts_of([40, 40, 40])
    for metrics, passes in (
        (["phi"], 2),
        (["phi", "surprisal", "entropy", "margin", "step_length"], 3),
        (["surprisal_with_layer", "phi"], 3),
        (["phi", "surprisal", "surprisal_with_layer"], 4),
    ):
        twice.clear()
        score(lens, CHARACTERS, texts, metrics=metrics)
        assert len(twice) == passes, metrics


@pytest.mark.parametrize("metrics", [["phi"], ["phi", "surprisal"], ["phi", "surprisal", "margin"]])
def test_nothing_is_waited_for_but_the_result(lens, metrics, monkeypatch):
    texts = texts_of([100] * 9 + [60] * 5)
    score(lens, CHARACTERS, "a", metrics=metrics)  # what the weights are is found out once
    copies = []
    own = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or own(self))
    few = watched(lambda: score(lens, CHARACTERS, texts, metrics=metrics, batch_tokens=300))
    # All batches that were looked ahead in one copy.
    assert copies == [(len(metrics) + 1, 1200)]  # and which are attention sinks
    with torch.no_grad(), lens.observing():
        ids = torch.zeros((3, 100), dtype=torch.long)
        base = watched(lambda: lens.base(ids, use_cache=False))
    # In 4 batches what transformers itself waits for in a forward pass, and no more.
    assert few.waits == 4 * base.waits


def test_padding_is_a_small_share():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(120), 1.0, 400)), 4, 2000).astype(int)
    lens = lens_of(make_llama(num_hidden_layers=2, max_position_embeddings=2048), layer=0)
    sizes = []
    own = lens.forward
    lens.forward = lambda ids, **options: sizes.append(ids.numel()) or own(ids, **options)
    score(lens, CHARACTERS, texts_of(lengths), metrics=["phi"], batch_tokens=4096)
    assert lengths.sum() <= sum(sizes) <= 1.1 * lengths.sum()
    in_order = sum(16 * max(lengths[i : i + 16]) for i in range(0, 400, 16))
    assert in_order > 3 * sum(sizes)
    assert len(sizes) < 1.3 * lengths.sum() / 4096 + 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_right_padding_needs_no_mask_in_any_architecture(name):
    lens = shaken_lens(make(name)).eval()
    rng = np.random.default_rng(1)
    lengths = [14, 3, 1, 9, 11]
    docs = documents_of(lengths, rng.integers(3, 96, sum(lengths)))
    together, alone = score_documents(lens, docs), score_documents(lens, docs, batch_size=1)
    close(together.phi, alone.phi)
    close(together.surprisal, alone.surprisal)
    assert np.isnan(together.surprisal).sum() == len(lengths)
    assert together.phi.std() > 0.01


def test_documents_need_no_whole_logits(lens):
    docs = documents_of([1100, 1103])
    found = watched(lambda: score_documents(lens, docs))
    assert not [shape for shape in found.shapes if shape[-2:] == (1103, 1103)]
    assert max(np.prod(shape) for shape in found.shapes if shape[-1:] == (1013,)) <= 2**21


def test_texts_are_tokenized_together():
    calls = []
    tokenizer = character_tokenizer()
    own = tokenizer._encode_plus

    def counted(text, *args, **options):
        calls.append(len(text))
        return own(text, *args, **options)

    tokenizer._encode_plus = counted
    texts = texts_of(range(1, 101))
    found = list(iter_scores(lens_of(make_llama()), tokenizer, iter(texts), metrics=["phi"]))
    assert [item.text for item in found] == texts
    assert calls == [64, 36]
    chat = [{"role": "user", "content": "the cat"}]
    BYTES.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    mixed = tokenize_all(BYTES, ["the cat", chat, "x", chat], list("abcd"))
    BYTES.chat_template = None
    assert [item.text for item in mixed] == ["the cat", "<user>the cat", "x", "<user>the cat"]
    assert [item.leading for item in mixed] == [1, 0, 1, 0]
    assert [len(item.spans) for item in mixed] == [0, 1, 0, 1]


def test_what_was_looked_ahead_changes_nothing(lens, monkeypatch):
    texts = texts_of([5, 300, 17, 64, 1, 120, 40, 8])
    whole = score(lens, CHARACTERS, texts, batch_tokens=64)
    monkeypatch.setattr(module, "_LOOK_AHEAD", 1)
    monkeypatch.setattr(module, "_TOKENIZED_AT_ONCE", 3)
    same(score(lens, CHARACTERS, texts, batch_tokens=64), whole)
