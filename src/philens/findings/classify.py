"""A logistic regression, which says how well a few columns tell two groups apart on other data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from philens.findings.statistics import Floats, fit_logistic
from philens.support.errors import InputError

PENALTY = 1e-3


@dataclass(frozen=True)
class Classifier:
    """Log-odds of the second group, linear in the columns."""

    weights: Floats  # (F,) per standard deviation of a column
    bias: float
    centre: Floats  # (F,)
    scale: Floats  # (F,)

    def __call__(self, columns: Sequence[ArrayLike]) -> Floats:
        """(N,) of `columns`, (N,) each; NaN where one is missing."""
        data = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
        return (data - self.centre) / self.scale @ self.weights + self.bias


def fit_classifier(columns: Sequence[ArrayLike], positive: ArrayLike) -> Classifier:
    """Fit one to `columns`, (N,) each; rows with a missing value are left out.

    Minimised is the mean negative log-likelihood, in which both groups weigh the same, plus half `PENALTY`
    times the squared weights of the standardised columns.

    Args:
        positive: (N,) which rows are in the second group.

    Raises:
        InputError: one of the groups is empty.
    """
    data = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
    labels = np.asarray(positive, dtype=bool)
    present = np.isfinite(data).all(1)
    data, labels = data[present], labels[present]
    if not 0 < labels.sum() < len(labels):
        raise InputError("A classifier is fitted on rows of two groups; give at least one of each.")
    centre, scale = data.mean(0), data.std(0)
    scale[scale <= 1e-12 * np.abs(data).max(0)] = 1.0
    scaled = np.concatenate([(data - centre) / scale, np.ones((len(data), 1))], axis=1)
    sign = np.where(labels, 1.0, -1.0)
    weight = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    shrunk = np.append(np.full(data.shape[1], PENALTY), 0.0)
    found = fit_logistic(sign[:, None] * scaled, weight, shrunk)
    return Classifier(found[:-1], float(found[-1]), centre, scale)
