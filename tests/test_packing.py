"""Mixtures of tasks and rows of fixed length: nothing lost, nothing twice, any row by itself."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from philens.lens.attention import document_ids
from philens.support.errors import ConfigError, InputError
from philens.tasks.automata import TASKS, Documents, TaskConfig, generate
from philens.tasks.packing import Mixture, PackedRows, SingleRows, TokenDocuments, pack, pad
from philens.tasks.random_streams import between, derive

NAMES = ("input_ids", "labels", "position_ids", "attention_mask")


def documents_of(lengths, tokens=None):
    lengths = np.asarray(lengths, np.int64)
    empty = np.zeros(len(lengths), np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    if tokens is None:
        tokens = np.arange(offsets[-1]) % 251
    no = np.zeros(len(tokens), bool)
    return Documents(tokens.astype(np.uint8), offsets, empty, empty, empty, empty, empty.astype(float), no)


@dataclass
class RandomLengths:
    """Documents of random lengths and tokens, each a function of its index."""

    shortest: int
    longest: int
    seed: int = 0

    def __call__(self, indices):
        lengths = between(derive(self.seed, indices), (self.shortest, self.longest))
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return documents_of(
            lengths, derive(derive(self.seed + 1, np.repeat(indices, lengths)), within) % 127 + 1
        )


def documents_in(row):
    """The documents in one row, cut out by their positions, padding left out."""
    real = row["attention_mask"] == 1
    numbers = document_ids(row["position_ids"][None])[0]
    return [
        tuple(row["input_ids"][numbers == number].tolist())
        for number in numbers.unique()
        if real[numbers == number].all()
    ]


def pieces_of(tokens, length):
    return [tuple(tokens[start : start + length].tolist()) for start in range(0, len(tokens), length)]


@settings(max_examples=60, deadline=None)
@given(
    bounds=st.tuples(st.integers(1, 60), st.integers(1, 60)).map(sorted),
    length=st.integers(1, 40),
    group=st.integers(1, 5),
    number=st.integers(0, 3),
)
def test_a_group_holds_its_documents_whole_and_once(bounds, length, group, number):
    source = RandomLengths(*bounds)
    rows = PackedRows(source, length, rows=4 * group, group=group)
    first = number * group * length
    if source(np.array([first])).lengths[0] > group * length:
        with pytest.raises(InputError, match="does not fit into"):
            rows[number * group]
        return
    found = [piece for r in range(number * group, (number + 1) * group) for piece in documents_in(rows[r])]
    # The pieces found are those of the documents first, first + 1, ..., up to some last one.
    expected, last = [], first
    while len(expected) < len(found):
        expected += pieces_of(source(np.array([last])).tokens, length)
        last += 1
    assert sorted(found) == sorted(expected)
    assert last <= first + group * length  # where the next group's documents begin

    for r in range(number * group, (number + 1) * group):
        row = rows[r]
        assert all(row[name].shape == (length,) for name in NAMES)
        real = row["attention_mask"] == 1
        used = int(real.sum())
        assert real[:used].all()  # padding stands at the end
        assert torch.equal(row["labels"], torch.where(real, row["input_ids"], -100))
        assert (row["input_ids"][used:] == 0).all()
        # Positions go up by one, from 0 at the start, at each document's start and at the padding's.
        positions = row["position_ids"]
        starts = [0, *np.cumsum([len(piece) for piece in documents_in(row)]).tolist()]
        ends = [*starts[1:], length]
        expected = torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)])
        assert torch.equal(positions, expected)


def test_nothing_is_left_out_while_it_fits():
    """Documents go on being drawn until the next one does not fit."""
    rows = PackedRows(RandomLengths(4, 4), length=10, rows=8, group=2)
    assert [len(documents_in(rows[r])) for r in range(8)] == [2] * 8
    rows = PackedRows(RandomLengths(10, 10), length=10, rows=8, group=2)
    assert [len(documents_in(rows[r])) for r in range(8)] == [1] * 8
    assert all((rows[r]["attention_mask"] == 1).all() for r in range(8))


def test_no_document_is_drawn_in_two_groups():
    rows = PackedRows(Mixture(TaskConfig(), {"random": 1}, 1).documents, length=500, rows=40, group=4)
    found = [piece for r in range(40) for piece in documents_in(rows[r])]
    assert len(found) == len(set(found)) > 30


def same_row(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


MIXTURE = Mixture(TaskConfig(), dict.fromkeys(TASKS, 1.0), seed=3)
SETS = {"packed": PackedRows, "single": SingleRows}


@pytest.mark.parametrize("kind", sorted(SETS))
def test_a_row_depends_on_its_number_alone(kind):
    def fresh():
        return SETS[kind](MIXTURE.documents, 600, 24, 4)

    in_order = fresh()
    rows = [in_order[r] for r in range(24)]
    assert len({tuple(row["input_ids"].tolist()) for row in rows}) == 24
    shuffled = fresh()
    for r in np.random.default_rng(0).permutation(24):
        assert same_row(shuffled[int(r)], rows[r])
    assert same_row(fresh()[np.int64(23)], rows[23])  # as a resumed run reads it
    longer = SETS[kind](MIXTURE.documents, 600, 1000, 4)
    assert same_row(longer[17], rows[17])


@pytest.mark.parametrize("kind", sorted(SETS))
def test_workers_read_the_same_rows(kind):
    rows = SETS[kind](MIXTURE.documents, 600, 12, 4)
    alone = list(DataLoader(rows, batch_size=3))
    workers = list(DataLoader(rows, batch_size=3, num_workers=2))
    assert len(alone) == len(workers) == 4
    assert all(same_row(a, b) for a, b in zip(alone, workers, strict=True))


def test_little_padding_at_the_setting_of_the_paper():
    rows = PackedRows(MIXTURE.documents, length=2048, rows=16 * 8)
    masks = torch.stack([rows[r]["attention_mask"] for r in range(len(rows))])
    shares = 1 - masks.float().mean(1).reshape(8, 16).mean(1)
    assert shares.mean() < 0.04
    assert shares.max() < 0.08


def test_packing_does_not_prefer_short_documents():
    rows = PackedRows(MIXTURE.documents, length=2048, rows=16 * 8)
    found = [len(piece) for r in range(len(rows)) for piece in documents_in(rows[r])]
    assert np.mean(found) == pytest.approx(445, rel=0.03)


def test_documents_may_grow_longer_as_training_goes_on():
    limits = {12: 200, 0: 50}
    rows = PackedRows(MIXTURE.documents, 600, 24, 4, limits)
    for r in (0, 13, 5, 23, 11, 12):
        lengths = [len(piece) for piece in documents_in(rows[r])]
        assert max(lengths) <= (50 if r < 12 else 200)
        assert sum(lengths) > 400
    assert max(len(piece) for r in range(12, 24) for piece in documents_in(rows[r])) == 200
    whole = PackedRows(MIXTURE.documents, 600, 24, 4)
    assert same_row(PackedRows(MIXTURE.documents, 600, 24, 4, {8: 50})[3], whole[3])


@pytest.mark.parametrize("kind", sorted(SETS))
def test_rows_end(kind):
    rows = SETS[kind](MIXTURE.documents, 600, 5, 4)
    assert len(rows) == 5
    for outside in (5, -1):
        with pytest.raises(IndexError):
            rows[outside]
    assert len(list(DataLoader(rows, batch_size=None))) == 5


def test_best_fit():
    assert pack(np.array([3, 5, 2]), 2, 5).tolist() == [1, 0, 1]
    assert pack(np.array([3, 3, 3]), 2, 5) is None
    # First fit would put 4 into the row of 5, and leave no room for the second 5.
    placed = pack(np.array([6, 5, 5, 4]), 2, 10)
    assert np.bincount(placed, [6, 5, 5, 4]).tolist() == [10, 10]


# Single rows and padding


def test_single_rows_are_documents():
    rows = SingleRows(MIXTURE.documents, 300, 20, 8)
    for r in range(20):
        text = MIXTURE.documents(np.array([r])).tokens[:300]
        assert rows[r]["input_ids"].tolist() == [*text, *[0] * (300 - len(text))]
        assert rows[r]["labels"].tolist() == [*text, *[-100] * (300 - len(text))]


def test_pad():
    documents = documents_of([2, 4, 1], np.array([1, 2, 3, 4, 5, 6, 7]))
    rows = pad(documents)
    assert rows["input_ids"].tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]
    assert rows["labels"].tolist() == [[1, 2, -100, -100], [3, 4, 5, 6], [7, -100, -100, -100]]
    assert rows["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert pad(documents, 3)["input_ids"].tolist() == [[1, 2, 0], [3, 4, 5], [7, 0, 0]]
    assert pad(documents, 6)["attention_mask"].sum(1).tolist() == [2, 4, 1]


# Mixtures


def test_mixture_has_the_shares_it_says():
    mixture = Mixture(TaskConfig(), {"in_context_language": 3, "random": 0, "copy": 1}, seed=1)
    tasks = mixture.documents(np.arange(3000)).task
    shares = np.bincount(tasks, minlength=6) / 3000
    np.testing.assert_allclose(shares, [0, 0, 0, 0.75, 0, 0.25], atol=0.025)
    # No run of one task: neighbours are independent.
    assert (tasks[1:] == tasks[:-1]).mean() == pytest.approx(0.75**2 + 0.25**2, abs=0.03)


def test_mixture_is_pure():
    batch = MIXTURE.documents(np.arange(30))
    for i in range(30):
        alone = MIXTURE.documents(np.array([i]))
        assert alone.text(0) == batch.text(i)
        assert alone.task[0] == batch.task[i]
        assert generate(TaskConfig(), 3, TASKS[batch.task[i]], i).text(0) == batch.text(i)
    other = Mixture(TaskConfig(), MIXTURE.weights, seed=4).documents(np.arange(30))
    assert not {other.text(i) for i in range(30)} & {batch.text(i) for i in range(30)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"poetry": 1}, "There is no task 'poetry'"),
        ({"copy": -1}, "The weight of copy must be finite and at least 0, not -1"),
        ({"copy": float("nan")}, "The weight of copy"),
        ({"copy": float("inf")}, "The weight of copy"),
        ({"copy": 0, "random": 0}, "At least one task"),
        ({}, "At least one task"),
    ],
)
def test_bad_mixtures(weights, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(TaskConfig(), weights, 0)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
@pytest.mark.parametrize("kind", sorted(SETS))
def test_bad_sizes(kind, sizes):
    with pytest.raises(ConfigError, match="must be at least 1"):
        SETS[kind](MIXTURE.documents, *sizes)


def test_documents_longer_than_a_row_are_cut_into_rows():
    rows = PackedRows(RandomLengths(25, 25), length=10, rows=3, group=3)
    whole = RandomLengths(25, 25)(np.array([0])).tokens
    found = [piece for r in range(3) for piece in documents_in(rows[r])]
    assert sorted(found) == sorted(pieces_of(whole, 10))


def test_neighbouring_documents_are_told_apart():
    rows = PackedRows(RandomLengths(1, 1), length=7, rows=2, group=2)
    assert rows[0]["position_ids"].tolist() == [0] * 7
    numbers = document_ids(rows[0]["position_ids"][None])[0].tolist()
    assert all(later == earlier + 1 for earlier, later in pairwise(numbers))


def token_documents(*documents):
    return TokenDocuments.join(
        [(np.array(ids, np.int64), np.array(counted, bool)) for ids, counted in documents]
    )


def test_batches_of_tokens():
    batch = token_documents(([300, 7, 8], [0, 1, 1]), ([], []), ([9], [1]), ([5, 6], [0, 0]))
    assert len(batch) == 4
    assert batch.tokens.dtype == np.int64
    assert batch.lengths.tolist() == [3, 0, 1, 2]
    chosen = batch.select([3, 0])
    assert chosen.tokens.tolist() == [5, 6, 300, 7, 8]
    assert chosen.counted.tolist() == [False, False, False, True, True]
    cut = batch.cut(2)
    assert cut.tokens.tolist() == [300, 7, 9, 5, 6]
    assert cut.offsets.tolist() == [0, 2, 2, 3, 5]
    assert len(TokenDocuments.join([])) == 0
    assert TokenDocuments.join([]).offsets.tolist() == [0]


def test_what_does_not_count_has_no_label():
    batch = token_documents(([300, 7, 8], [0, 1, 1]), ([9], [1]), ([5, 6], [0, 0]))
    rows = pad(batch)
    assert rows["labels"].tolist() == [[-100, 7, 8], [9, -100, -100], [-100, -100, -100]]
    assert rows["input_ids"][0].tolist() == [300, 7, 8]
    packed = PackedRows(lambda indices: batch.select(indices % 3), length=4, rows=2, group=2)
    found = {}
    for r in range(2):
        row = packed[r]
        for token, label in zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True):
            found[token] = label
    assert found == {300: -100, 7: 7, 8: 8, 9: 9, 5: -100, 6: -100, 0: -100}
    single = SingleRows(lambda indices: batch.select(indices % 3), length=2, rows=3, group=2)
    assert [single[r]["labels"].tolist() for r in range(3)] == [[-100, 7], [9, -100], [-100, -100]]
