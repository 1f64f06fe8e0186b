"""The synthetic tasks: purity, what each task is, distributions, labels, errors."""

import itertools
import math
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from philens.support.errors import ConfigError, InputError
from philens.tasks.automata import (
    TASKS,
    Documents,
    TaskConfig,
    automaton_keys,
    concatenate,
    document_keys,
    draw_automata,
    generate,
    task_index,
)
from philens.tasks.random_streams import below, between, derive, uniform

PAPER = TaskConfig()
CLEAN = replace(PAPER, noise_probability=0.0)
WITH_AUTOMATON = TASKS[:4]


def assert_same(actual, expected):
    for field in fields(Documents):
        np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name), field.name)


def strings(documents):
    """The strings of each document."""
    return [documents.text(i).split(" ") for i in range(len(documents))]


def all_strings(documents):
    return [word for words in strings(documents) for word in words]


# Purity


@pytest.mark.parametrize(
    "config", [PAPER, replace(PAPER, max_length=100), replace(PAPER, shuffled=True, max_length=100)]
)
def test_a_document_alone_is_the_document_among_others(config):
    tasks = np.arange(24) % len(TASKS)
    indices = np.arange(24) * 37 % 50
    batch = generate(config, 3, tasks, indices)
    for i in range(24):
        assert_same(generate(config, 3, TASKS[tasks[i]], indices[i]), batch.select(i))
    order = np.random.default_rng(0).permutation(24)
    assert_same(generate(config, 3, tasks[order], indices[order]), batch.select(order))


@pytest.mark.parametrize("task", TASKS)
def test_seed_and_index_change_a_document(task):
    batch = generate(PAPER, 3, task, np.arange(50))
    texts = [batch.text(i) for i in range(50)]
    assert len(set(texts)) == 50
    other = generate(PAPER, 4, task, np.arange(50))
    assert not set(texts) & {other.text(i) for i in range(50)}
    assert_same(generate(PAPER, 3, task, np.arange(50)), batch)


def test_tasks_share_no_strings():
    random, copies = (all_strings(generate(PAPER, 3, task, np.arange(20))) for task in ("random", "copy"))
    assert not set(random) & set(copies)


def test_documents_far_along_the_stream():
    batch = generate(PAPER, 2**40, "in_context_language", [2**50, 2**62])
    assert len(set(strings(batch)[0]) & set(strings(batch)[1])) == 0


def test_streams_are_fixed():
    """What a seed means may never change: trained models and their findings rest on it."""
    batch = generate(PAPER, 7, np.arange(6), np.arange(6))
    assert [batch.text(i)[:20] for i in range(6)] == [
        "akemkjmgkggekgekgrep",
        "gcaecaahdelepihhaaec",
        "phhhhhgbhhgpggbjgpjg",
        "ginbodaaaaaaaaaaaaaa",
        "iihdpbcqklrjbipd qil",
        "qahliifacekpqcdqbmld",
    ]
    assert batch.lengths.tolist() == [349, 379, 335, 244, 357, 459]


# What each task is


def memorized(config):
    """Every string of each memorized automaton, by its labels, as noise-free documents show them."""
    batch = generate(replace(config, noise_probability=0.0), 0, "memorized_sequences", np.arange(300))
    known = {}
    for i, words in enumerate(strings(batch)):
        known.setdefault((batch.edges[i], batch.description_length[i]), set()).update(words)
    return known


def test_memorized_sequences_are_ten_strings_of_ten_automata():
    known = memorized(PAPER)
    assert len(known) == 10
    # An automaton with hardly a choice may write the same string twice.
    sizes = [len(words) for words in known.values()]
    assert max(sizes) == 10
    assert sum(sizes) > 90
    few = memorized(replace(PAPER, memorized_automata=2, memorized_strings=3))
    assert [len(words) for words in few.values()] == [3, 3]
    batch = generate(CLEAN, 99, "memorized_sequences", np.arange(50))  # another stream, the same strings
    for i, words in enumerate(strings(batch)):
        assert set(words) <= known[batch.edges[i], batch.description_length[i]]
    # Each about equally often.
    counts = Counter(all_strings(generate(CLEAN, 5, "memorized_sequences", np.arange(1000))))
    assert len(counts) == sum(sizes)
    assert min(counts.values()) > 80  # of 145 on average


def test_memorized_parts_depend_on_their_own_seed():
    for task in ("memorized_sequences", "memorized_programs", "new_vocabulary"):
        lengths = {
            (seed, fixed): set(
                generate(replace(PAPER, memorized_seed=fixed), seed, task, np.arange(200)).description_length
            )
            for seed in (1, 2)
            for fixed in (0, 1)
        }
        assert len(lengths[1, 0]) == 10
        assert lengths[1, 0] == lengths[2, 0]
        assert not lengths[1, 0] & lengths[1, 1]
    one, other = (memorized(replace(PAPER, memorized_seed=seed)) for seed in (0, 1))
    assert not set().union(*one.values()) & set().union(*other.values())


def test_memorized_seed_leaves_the_other_tasks_alone():
    for task in ("in_context_language", "random", "copy"):
        a, b = (generate(replace(PAPER, memorized_seed=seed), 3, task, np.arange(5)) for seed in (0, 1))
        assert_same(a, b)


def automaton_of(config, seed, task, index):
    """The automaton behind a document, as plain Python: {state: {letter: target}}."""
    number = np.array([task_index(task)])
    keys = automaton_keys(config, number, document_keys(seed, number, np.array([index])))
    drawn = draw_automata(config, keys)
    return {
        state: {
            chr(97 + drawn.letter[0, state, edge]): int(drawn.target[0, state, edge])
            for edge in range(drawn.degree[0, state])
        }
        for state in range(drawn.states[0])
    }


def accepts(automaton, word):
    state = 0
    for letter in word:
        if letter not in automaton[state]:
            return False
        state = automaton[state][letter]
    return True


@pytest.mark.parametrize("task", ["memorized_sequences", "memorized_programs", "in_context_language"])
def test_strings_are_walks_through_the_automaton(task):
    batch = generate(CLEAN, 11, task, np.arange(40))
    for i, words in enumerate(strings(batch)):
        automaton = automaton_of(CLEAN, 11, task, i)
        assert all(accepts(automaton, word) for word in words)
        assert len(automaton) == batch.states[i]
        assert sum(map(len, automaton.values())) == batch.edges[i]
        assert len(set().union(*automaton.values())) == batch.letters[i]
    strangers = automaton_of(CLEAN, 12, "in_context_language", 0)
    assert not any(accepts(strangers, word) for words in strings(batch) for word in words)


def test_memorized_programs_write_new_strings():
    known = set().union(*memorized(PAPER).values())
    programs = all_strings(generate(CLEAN, 11, "memorized_programs", np.arange(40)))
    assert np.mean([word in known for word in programs]) < 0.1
    assert len(set(programs)) > 0.85 * len(programs)
    labels = {
        task: set(generate(PAPER, 1, task, np.arange(200)).description_length) for task in WITH_AUTOMATON[:3]
    }
    assert labels["memorized_programs"] == labels["memorized_sequences"] == labels["new_vocabulary"]


def renaming(automaton, words):
    """A one-to-one renaming of letters under which the automaton accepts the words, or None: by search."""
    text = "".join(f"{word} " for word in words)

    def search(place, state, names):
        while place < len(text):
            letter = text[place]
            if letter == " ":
                place, state = place + 1, 0
            elif letter in names:
                if names[letter] not in automaton[state]:
                    return None
                place, state = place + 1, automaton[state][names[letter]]
            else:
                for original in automaton[state].keys() - set(names.values()):
                    found = search(place, state, names | {letter: original})
                    if found is not None:
                        return found
                return None
        return names

    return search(0, 0, {})


def test_new_vocabulary_renames_the_letters_of_a_fixed_structure():
    batch = generate(CLEAN, 11, "new_vocabulary", np.arange(30))
    renamed = 0
    for i, words in enumerate(strings(batch)):
        names = renaming(automaton_of(CLEAN, 11, "new_vocabulary", i), words)
        assert names is not None
        renamed += any(new != old for new, old in names.items())
    assert renamed > 25
    others = automaton_of(CLEAN, 12, "in_context_language", 0)
    assert np.mean([renaming(others, words) is None for words in strings(batch)]) > 0.8
    # The same structure has other letters in another document.
    same = [i for i in range(30) if batch.description_length[i] == batch.description_length[0]]
    assert len(same) > 1
    assert len({frozenset("".join(strings(batch)[i])) for i in same}) > 1


def test_copy_says_everything_twice():
    for words in strings(generate(PAPER, 3, "copy", np.arange(50))):
        assert words[0:-1:2] == words[1::2]
        assert len(set(words)) == (len(words) + 1) // 2
    for words in strings(generate(PAPER, 3, "random", np.arange(50))):
        assert len(set(words)) == len(words)


def test_in_context_language_is_new_each_time():
    automata = [automaton_of(PAPER, 3, "in_context_language", i) for i in range(200)]
    assert all(one != other for i, one in enumerate(automata) for other in automata[:i])
    assert {len(automaton) for automaton in automata} == set(range(4, 13))


# Distributions


def bounds(values):
    return int(np.min(values)), int(np.max(values))


def test_automata_have_the_sizes_of_the_paper():
    drawn = draw_automata(PAPER, derive(1234, np.arange(20_000)))
    real = np.arange(3) < drawn.degree[..., None]
    assert bounds(drawn.states) == (4, 12)  # 3 to 11 and the start
    shares = np.bincount(drawn.states)[4:] / 20_000
    np.testing.assert_allclose(shares, 1 / 9, atol=0.01)
    there = np.arange(12) < drawn.states[:, None]
    assert (drawn.degree[~there] == 0).all()
    np.testing.assert_allclose(np.bincount(drawn.degree[there])[1:] / there.sum(), 1 / 3, atol=0.01)
    assert bounds(drawn.letters)[1] == 17
    assert (drawn.edges == real.sum((1, 2))).all()

    # Targets: any state but the start, distinct and equally likely; letters: distinct.
    n, s, e = np.nonzero(real)
    assert (drawn.target[n, s, e] >= 1).all()
    assert (drawn.target[n, s, e] < drawn.states[n]).all()
    for value in (drawn.target, drawn.letter):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            both = real[..., one] & real[..., other]
            assert (value[..., one] != value[..., other])[both].all()
    largest = drawn.states[n] == 12
    shares = np.bincount(drawn.target[n, s, e][largest])[1:] / largest.sum()
    np.testing.assert_allclose(shares, 1 / 11, atol=0.01)
    np.testing.assert_allclose(np.bincount(drawn.letter[n, s, e]) / len(n), 1 / 18, atol=0.005)


def test_alphabet_sizes():
    """With many states every letter of the alphabet is used, so its size can be seen."""
    config = replace(PAPER, states=(60, 60), edges=(3, 3))
    letters = draw_automata(config, derive(1, np.arange(600))).letters
    assert bounds(letters) == (4, 17)
    np.testing.assert_allclose(np.bincount(letters)[4:] / 600, 1 / 14, atol=0.05)


def test_description_length_is_that_of_the_design():
    drawn = draw_automata(PAPER, derive(99, np.arange(20_000)))
    for i in range(50):
        edges = [
            (state, int(drawn.target[i, state, edge]), int(drawn.letter[i, state, edge]))
            for state in range(drawn.states[i])
            for edge in range(drawn.degree[i, state])
        ]
        n, m, v = int(drawn.states[i]), len(edges), len({letter for *_, letter in edges})
        expected = math.log(math.comb(18, v)) + m * (2 * math.log(n) + math.log(v))
        assert drawn.description_length[i] == pytest.approx(expected, abs=1e-9)
    assert drawn.description_length.mean() == pytest.approx(109, rel=0.02)
    # The extremes of some hundreds of automata.
    extremes = np.quantile(drawn.description_length, [1 / 500, 1 - 1 / 500])
    np.testing.assert_allclose(extremes, [25, 219], rtol=0.05)
    labels = generate(PAPER, 1, "in_context_language", np.arange(3000)).description_length
    assert labels.mean() == pytest.approx(109, rel=0.02)


def test_shuffled_documents_keep_their_letters_and_the_lengths_of_their_strings():
    plain = generate(PAPER, 3, "in_context_language", np.arange(50))
    mixed = generate(replace(PAPER, shuffled=True), 3, "in_context_language", np.arange(50))
    for before, after in zip(strings(plain), strings(mixed), strict=True):
        assert [len(word) for word in before] == [len(word) for word in after]
        assert Counter("".join(before)) == Counter("".join(after))
        assert before != after
    np.testing.assert_array_equal(plain.description_length, mixed.description_length)
    for i in range(50):  # noise goes with its letter
        one, other = plain.select(i), mixed.select(i)
        assert Counter(one.tokens[one.perturbed]) == Counter(other.tokens[other.perturbed])
    assert (plain.perturbed != mixed.perturbed).any()


def test_in_shuffled_documents_any_letter_follows_any():
    def pairs(documents):
        """How many different pairs of neighbours documents have, on average."""
        return np.mean([len({p for w in d for p in itertools.pairwise(w)}) for d in documents])

    plain = strings(generate(CLEAN, 3, "in_context_language", np.arange(200)))
    mixed = strings(generate(replace(CLEAN, shuffled=True), 3, "in_context_language", np.arange(200)))
    chance = np.random.default_rng(0)
    expected = []
    for words in plain:
        letters = iter(chance.permutation([*"".join(words)]))
        expected.append(["".join(next(letters) for _ in word) for word in words])
    assert pairs(mixed) == pytest.approx(pairs(expected), rel=0.02)
    assert pairs(mixed) > 1.5 * pairs(plain)


def test_edges_are_taken_equally_often():
    config = replace(CLEAN, edges=(3, 3), strings=(40, 40))
    taken = np.zeros(3)
    for i, words in enumerate(strings(generate(config, 5, "in_context_language", np.arange(20)))):
        automaton = automaton_of(config, 5, "in_context_language", i)
        for word in words:
            state = 0
            for letter in word:
                taken[list(automaton[state]).index(letter)] += 1
                state = automaton[state][letter]
    np.testing.assert_allclose(taken / taken.sum(), 1 / 3, atol=0.015)


@pytest.mark.parametrize("task", TASKS)
def test_documents_have_the_form_of_the_paper(task):
    batch = generate(PAPER, 21, task, np.arange(2500))
    fixed = task == "memorized_sequences"  # of which there are but a hundred strings
    assert batch.lengths.mean() == pytest.approx(445, rel=0.05 if fixed else 0.015)
    words = strings(batch)
    counts = np.array([len(w) for w in words])
    lengths = np.array([len(word) for w in words for word in w])
    assert bounds(counts) == (10, 19)
    assert bounds(lengths) == (10, 49)
    np.testing.assert_allclose(np.bincount(counts)[10:] / 2500, 0.1, atol=0.025)
    if not fixed:
        np.testing.assert_allclose(np.bincount(lengths)[10:] / len(lengths), 1 / 40, atol=0.006)
    assert set(np.unique(batch.tokens)) == set(b" abcdefghijklmnopqr")


def test_random_letters_are_uniform_and_independent():
    tokens = generate(PAPER, 1, "random", np.arange(1000)).tokens
    letters = tokens[tokens != 32] - 97
    np.testing.assert_allclose(np.bincount(letters) / len(letters), 1 / 18, atol=0.002)
    pair = tokens[:-1] != 32
    pair &= tokens[1:] != 32
    pairs = (tokens[:-1][pair].astype(int) - 97) * 18 + tokens[1:][pair] - 97
    np.testing.assert_allclose(np.bincount(pairs) / len(pairs), 1 / 324, atol=0.0008)


# Noise


@pytest.mark.parametrize("task", WITH_AUTOMATON)
def test_noise_redraws_as_many_letters_as_it_says(task):
    noisy, clean = (generate(config, 8, task, np.arange(1500)) for config in (PAPER, CLEAN))
    assert not clean.perturbed.any()
    np.testing.assert_array_equal(noisy.offsets, clean.offsets)
    np.testing.assert_array_equal(noisy.tokens[~noisy.perturbed], clean.tokens[~noisy.perturbed])
    letters = noisy.tokens != 32
    assert not noisy.perturbed[~letters].any()
    assert noisy.perturbed[letters].mean() == pytest.approx(0.5 * 0.2, rel=0.03)
    # Redrawn from all letters, the old one among them.
    redrawn = noisy.tokens[noisy.perturbed]
    assert (redrawn == clean.tokens[noisy.perturbed]).mean() == pytest.approx(1 / 18, abs=0.006)
    np.testing.assert_allclose(np.bincount(redrawn)[97:] / len(redrawn), 1 / 18, atol=0.004)
    # Whole strings are spared or hit.
    string = np.cumsum(noisy.tokens == 32) + np.repeat(np.arange(1500), noisy.lengths)
    hit = np.bincount(string, noisy.perturbed) > 0
    lengths = np.bincount(string, letters)
    assert hit.mean() == pytest.approx(0.5 * (1 - 0.8**lengths).mean(), rel=0.03)


@pytest.mark.parametrize("task", ["random", "copy"])
def test_no_noise_without_an_automaton(task):
    loud = replace(PAPER, noise_probability=1.0, noise_rate=1.0)
    assert_same(generate(loud, 8, task, np.arange(20)), generate(CLEAN, 8, task, np.arange(20)))


# Labels and batches


def test_labels():
    batch = generate(PAPER, 3, np.arange(6), np.zeros(6))
    assert batch.task.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.tokens.dtype == np.uint8
    assert batch.offsets.tolist() == [0, *np.cumsum(batch.lengths)]
    assert np.isnan(batch.description_length).tolist() == [False] * 4 + [True] * 2
    for label in (batch.states, batch.edges, batch.letters):
        assert (label[:4] > 0).all()
        assert (label[4:] == 0).all()
    assert len(batch.tokens) == len(batch.perturbed) == batch.lengths.sum()


def test_select_cut_and_concatenate():
    batch = generate(PAPER, 3, np.arange(6), np.arange(6))
    assert_same(concatenate([batch.select([0, 1, 2]), batch.select([3, 4, 5])]), batch)
    chosen = batch.select([4, 1, 1])
    assert [chosen.text(i) for i in range(3)] == [batch.text(i) for i in (4, 1, 1)]
    assert_same(batch.cut(100), generate(replace(PAPER, max_length=100), 3, np.arange(6), np.arange(6)))
    assert_same(batch.cut(10_000), batch)


@pytest.mark.parametrize("length", [1, 50, 300, 5000])
def test_max_length_cuts(length):
    whole = generate(PAPER, 3, np.arange(6), np.arange(6))
    cut = generate(replace(PAPER, max_length=length), 3, np.arange(6), np.arange(6))
    for i in range(6):
        assert cut.text(i) == whole.text(i)[:length]


def test_other_sizes():
    config = TaskConfig(
        letters=5, states=(2, 2), edges=(2, 2), alphabet=(5, 5), strings=(3, 3), string_length=(4, 4)
    )
    batch = generate(config, 1, np.arange(6), np.arange(6))
    assert (batch.lengths == 3 * 4 + 2).all()
    assert set(batch.tokens.tobytes().decode()) <= set("abcde ")
    assert batch.edges[:4].tolist() == [6] * 4
    assert batch.states[:4].tolist() == [3] * 4


def test_random_streams():
    keys = derive(5, np.arange(50_000))
    assert len(set(keys.tolist())) == 50_000
    assert not set(keys.tolist()) & set(derive(6, np.arange(50_000)).tolist())
    np.testing.assert_allclose(np.bincount(below(keys, 7)) / 50_000, 1 / 7, atol=0.006)
    assert bounds(between(keys, (3, 5))) == (3, 5)
    assert uniform(keys).min() >= 0
    assert uniform(keys).max() < 1
    assert uniform(keys).mean() == pytest.approx(0.5, abs=0.005)
    assert np.corrcoef(uniform(keys)[:-1], uniform(keys)[1:])[0, 1] == pytest.approx(0, abs=0.015)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": (5, 3)}, "states must be two numbers 1 <= first <= last, not (5, 3)"),
        ({"strings": (0, 3)}, "strings must be two numbers"),
        ({"string_length": (0, 0)}, "string_length must be two numbers"),
        ({"edges": 3}, "edges must be two numbers"),
        ({"alphabet": (4, 5, 6)}, "alphabet must be two numbers"),
        ({"noise_probability": 1.5}, "noise_probability must lie between 0 and 1"),
        ({"noise_rate": math.nan}, "noise_rate must lie between 0 and 1"),
        ({"memorized_automata": 0}, "memorized_automata must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"letters": 27}, "letters must lie between 1 and 26"),
        ({"alphabet": (4, 19)}, "asks for more than the 18 letters"),
        ({"edges": (1, 4)}, "4 edges per state need as many states and letters"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ConfigError) as caught:
        TaskConfig(**options)
    assert message in str(caught.value)


def test_bad_documents():
    with pytest.raises(ConfigError, match="There is no task 'poetry'; the tasks are memorized_sequences"):
        generate(PAPER, 0, "poetry", [0])
    with pytest.raises(ConfigError, match="numbered 0 to 5"):
        generate(PAPER, 0, [0, 6], [0, 1])
    with pytest.raises(InputError, match="at least one index"):
        generate(PAPER, 0, "random", [])
    with pytest.raises(InputError, match="none at -1"):
        generate(PAPER, 0, "random", [3, -1])
