"""What an ideal learner learns from each letter of a formal language, by exact Bayes.

The learner knows how the task is made, not which automaton is behind a document. Its hypotheses are *trees of
contexts*, not automata: which letter comes depends on up to `depth` letters before it in the same string, or
fewer, and every such context allows one to three letters (`TaskConfig.edges`), each as likely as the others.
With probability 1/2 a context is not divided by the letter before it. Context tree weighting (Willems,
Shtarkov and Tjalkens 1995) sums over all trees, and over all sets of letters in each leaf, exactly.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from philens.support.errors import ConfigError
from philens.tasks.automata import Documents, TaskConfig

# What the numbers of letters that no automaton has get together, so that a context that several states share,
# and which therefore allows more, is improbable and not impossible.
_OTHERWISE = 0.02
_HALF = math.log(0.5)


class _Contexts:
    """What is known of each context: the text before a letter, the space before its string included."""

    def __init__(self, config: TaskConfig, depth: int) -> None:
        letters, (fewest, most) = config.letters, config.edges
        self.depth = depth
        size = np.arange(1, letters + 1)
        usual = (fewest <= size) & (size <= most)
        rare = _OTHERWISE if not usual.all() else 0.0
        prior = np.where(usual, (1 - rare) / usual.sum(), rare / max(1, (~usual).sum()))

        @cache
        def leaf(count: int, seen: int) -> tuple[float, float]:
            """Log-probability of `count` letters, `seen` different ones, and the posterior's mean of the
            log-probability of any that was seen."""
            with np.errstate(divide="ignore"):
                log = np.log(prior) - count * np.log(size)
            log = np.where(size < seen, -np.inf, log + _choose(letters - seen, size - seen))
            log -= _choose(letters, size)
            total = float(np.logaddexp.reduce(log))
            return total, float(-(np.exp(log - total) * np.log(size)).sum())

        self.leaf = leaf

    def read(self, text: str) -> tuple[list[float], list[float]]:
        """Surprisal and gain of each character; NaN of spaces."""
        # Of each context: which letters followed and how many, and their log-probability if it is divided
        # and in all.
        followed: dict[str, set[str]] = {}
        count: dict[str, int] = {}
        below: dict[str, float] = {}
        weighted: dict[str, float] = {}
        surprisal, gain = [math.nan] * len(text), [math.nan] * len(text)
        before = " "
        for place, letter in enumerate(text):
            if letter == " ":
                before = " "
                continue
            longest = min(self.depth, len(before))
            change, stops = 0.0, []
            for length in range(longest, -1, -1):
                context = before[len(before) - length :]
                followed.setdefault(context, set()).add(letter)
                count[context] = count.get(context, 0) + 1
                alone, expected = self.leaf(count[context], len(followed[context]))
                if length == longest:
                    total = alone
                else:
                    below[context] = below.get(context, 0.0) + change
                    total = _HALF + float(np.logaddexp(alone, below[context]))
                # This context is a leaf with the first probability, given that no shorter one is.
                stops.append((math.exp(alone - total + (_HALF if length < longest else 0.0)), expected))
                change = total - weighted.get(context, 0.0)
                weighted[context] = total
            surprisal[place], reached, expectation = -change, 1.0, 0.0
            for stop, expected in reversed(stops):
                expectation += reached * stop * expected
                reached *= 1 - stop
            # KL(posterior ‖ prior) = E_posterior[ln p(letter | hypothesis)] - ln p(letter).
            gain[place] = max(0.0, surprisal[place] + expectation)
            before += letter
        return surprisal, gain


def read_ideally(
    docs: Documents, config: TaskConfig, depth: int = 3
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Surprisal and information gain, (N,) each in nats, of an ideal learner that reads documents one by one.

    The gain of a letter is KL(posterior with it ‖ posterior without it) over the learner's hypotheses: how
    much the letter says about the language. Spaces, which no automaton writes, have NaN.

    Args:
        docs: documents of in-context language.
        config: how they were made.
        depth: letters before a letter that it may depend on.

    Raises:
        ConfigError: documents with noise or with shuffled letters, which these hypotheses do not have.
    """
    if config.noise_probability * config.noise_rate > 0:
        raise ConfigError(
            "The ideal learner knows no noise; measure a model of documents without it "
            "(data.tasks.noise_probability 0)."
        )
    if config.shuffled:
        raise ConfigError(
            "The ideal learner knows no shuffled letters; measure a model of documents in order "
            "(data.tasks.shuffled false)."
        )
    learners = _Contexts(config, depth)
    found = [learners.read(docs.text(number)) for number in range(len(docs))]
    surprisal, gain = (np.array([value for one in found for value in one[part]]) for part in (0, 1))
    return surprisal, gain


def _choose(total: int | NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """ln C(total, chosen); 0 where nothing of that kind can be chosen."""
    chosen = np.clip(chosen, 0, total)
    return gammaln(np.add(total, 1)) - gammaln(chosen + 1) - gammaln(total - chosen + 1)
