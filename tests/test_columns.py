"""Names of columns: what is written is read again."""

import pickle
from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from philens.support.columns import Column, column_name
from philens.training.evaluated import Evaluated, record_of, rows_of

STATISTICS = ("mean", "sum", "max", "last_fifth")
words = st.lists(st.text(ascii_lowercase, min_size=1), min_size=1).map("_".join)
metrics = words.filter(lambda name: not name.endswith(tuple(f"_{one}" for one in STATISTICS)))
points = st.none() | st.lists(words, min_size=1).map(".".join)


@given(metrics, points, st.sampled_from(STATISTICS))
def test_every_name_is_read_as_it_was_written(metric, point, statistic):
    column = Column(column_name(metric, point, statistic), STATISTICS)
    assert (column.metric, column.point, column.statistic) == (metric, point, statistic)
    copied = pickle.loads(pickle.dumps(column))
    assert (copied, copied.metric, copied.statistic) == (column, metric, statistic)


@given(metrics, points)
def test_a_tokens_own_value_has_no_statistic_whatever_its_point_is_called(metric, point):
    column = Column(column_name(metric, point))
    assert (column.metric, column.point, column.statistic) == (metric, point, None)


@pytest.mark.parametrize(
    ("name", "metric", "point", "statistic"),
    [
        ("phi", "phi", None, None),
        ("phi_standard_error@model.layers.8", "phi_standard_error", "model.layers.8", None),
        ("surprisal_with_layer_mean", "surprisal_with_layer", None, "mean"),
        ("phi@model.layers.8_last_fifth", "phi", "model.layers.8", "last_fifth"),
    ],
)
def test_names_on_disk_stay_what_they_are(name, metric, point, statistic):
    column = Column(name, STATISTICS)
    assert column == name == column_name(metric, point, statistic)
    assert (column.metric, column.point, column.statistic) == (metric, point, statistic)
    assert column.of("other") == column_name("other", point, statistic)


@given(
    st.lists(st.tuples(points, metrics, points, st.floats(allow_nan=False)), unique_by=lambda row: row[:3])
)
def test_rows_of_evaluation_come_back_from_a_record(drawn):
    rows = [Evaluated(7, *row) for row in drawn]
    assert rows_of({"step": 7, "loss": 1.0, "phi@a.b": 2.0} | record_of(rows)) == rows
