"""An ideal learner against all its hypotheses written out, and phi against what it learns."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from philens.findings.gain import gain_cell_rows, gain_rows, measure_gain
from philens.findings.language_tables import GAIN_LABELS
from philens.scoring.documents import TokenTable
from philens.support.errors import ConfigError, InputError
from philens.tasks.automata import Documents, TaskConfig, generate
from philens.tasks.learner import _OTHERWISE, read_ideally

CONFIG = TaskConfig(
    letters=3, states=(2, 3), edges=(1, 2), alphabet=(2, 3), strings=(3, 5), string_length=(3, 9),
    noise_probability=0.0,
)  # fmt: skip


def documents(number: int = 30, config: TaskConfig = CONFIG) -> Documents:
    return generate(config, 5, "in_context_language", np.arange(number))


def all_hypotheses() -> list[tuple[float, dict[str, frozenset[str]]]]:
    """Prior and letters of each context, for contexts of at most one letter of three."""
    sets = [frozenset(chosen) for size in (1, 2, 3) for chosen in itertools.combinations("abc", size)]
    prior = {1: (1 - _OTHERWISE) / 2 / 3, 2: (1 - _OTHERWISE) / 2 / 3, 3: _OTHERWISE}
    undivided = [(0.5 * prior[len(one)], dict.fromkeys(" abc", one)) for one in sets]
    divided = [
        (0.5 * math.prod(prior[len(one)] for one in four), dict(zip(" abc", four, strict=True)))
        for four in itertools.product(sets, repeat=4)
    ]
    return undivided + divided


def test_the_learner_is_bayes_over_all_hypotheses_written_out():
    docs = documents(3)
    surprisal, gain = read_ideally(docs, CONFIG, depth=1)
    for number in range(len(docs)):
        hypotheses = all_hypotheses()
        belief = np.array([prior for prior, _ in hypotheses])
        assert belief.sum() == pytest.approx(1)
        text, before = docs.text(number), " "
        for place, letter in enumerate(text, docs.offsets[number]):
            if letter == " ":
                assert math.isnan(surprisal[place])
                assert math.isnan(gain[place])
            else:
                likely = np.array([(letter in one[before]) / len(one[before]) for _, one in hypotheses])
                after = belief * likely
                assert surprisal[place] == pytest.approx(-math.log(after.sum()), abs=1e-9)
                after /= after.sum()
                held = after > 0
                expected = (after[held] * np.log(after[held] / belief[held])).sum()
                assert gain[place] == pytest.approx(expected, abs=1e-9)
                belief = after
            before = letter


def test_documents_are_read_by_themselves_and_longer_contexts_predict_better():
    docs = documents()
    surprisal, gain = read_ideally(docs, CONFIG)
    alone = read_ideally(docs.select([7]), CONFIG)
    part = slice(docs.offsets[7], docs.offsets[8])
    np.testing.assert_array_equal(surprisal[part], alone[0])
    np.testing.assert_array_equal(gain[part], alone[1])
    assert np.nanmin(gain) >= 0
    whole = generate(TaskConfig(noise_probability=0.0), 5, "in_context_language", np.arange(10))
    none, some = (np.nanmean(read_ideally(whole, TaskConfig(noise_probability=0.0), d)[0]) for d in (0, 2))
    assert some < 0.8 * none


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"noise_probability": 0.5}, "knows no noise"), ({"shuffled": True}, "shuffled letters")],
)
def test_documents_that_no_hypothesis_makes_are_refused(changes, said):
    config = replace(CONFIG, **changes)
    with pytest.raises(ConfigError, match=said):
        read_ideally(documents(2, config), config)


def table_of(kind: str, number: int = 60) -> TokenTable:
    """Phi that follows the learner's gain, its surprisal, or description length."""
    docs = documents(number)
    surprisal, gain = read_ideally(docs, CONFIG)
    document = np.repeat(np.arange(number), docs.lengths)
    random = np.random.default_rng(0)
    noise = 0.05 * random.normal(size=len(gain))
    length = docs.description_length[document] / 20
    # The model's surprisal is not the learner's.
    surprisal = surprisal + 0.05 * random.normal(size=len(gain))
    values = {"gain": gain, "surprisal": surprisal, "length": length}[kind]
    surprisal[docs.offsets[:-1]] = np.nan
    return TokenTable(docs, (values + noise).astype(np.float32), surprisal.astype(np.float32), document)


def test_phi_that_follows_gain_is_found():
    results = measure_gain(table_of("gain"), CONFIG)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert list(results["correlations"]) == list(GAIN_LABELS)
    assert results["holds"]
    for name in ("given_surprisal_and_position", "given_neighbours"):
        assert results["correlations"][name]["ci95"][0] > 0.3
    assert results["tokens"] == sum(cell["tokens"] for cell in results["cells"])
    for cell in results["cells"]:
        assert cell["phi"]["mean"] == pytest.approx(cell["gain"], abs=0.03)
    assert len(gain_rows(results)) == len(GAIN_LABELS)
    assert len(gain_cell_rows(results)) == len(results["cells"])


@pytest.mark.parametrize("kind", ["surprisal", "length"])
def test_phi_that_follows_something_else_is_not_taken_for_it(kind):
    results = measure_gain(table_of(kind), CONFIG)
    assert abs(results["correlations"]["given_neighbours"]["value"]) < 0.1
    length = results["correlations"]["description_length_given_gain"]
    assert (length["ci95"][0] > 0.5) == (kind == "length")


def test_too_few_documents():
    table = table_of("gain", 2)
    one = TokenTable(table.docs.select([0]), *(v[: table.docs.offsets[1]] for v in (
        table.phi, table.surprisal, table.document)))  # fmt: skip
    with pytest.raises(InputError, match="at least two"):
        measure_gain(one, CONFIG)
