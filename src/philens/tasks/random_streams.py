"""Random numbers as a pure function of their address, so that any document can be made alone or among others.

A counter-based generator in the manner of SplitMix64 (Steele, Lea, Flood 2014), vectorised over numpy arrays.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31, 32))


def derive(key: ArrayLike, index: ArrayLike) -> Keys:
    """The key at `index` below `key`; both broadcast. Distinct indices give independent keys."""
    # Arrays of at least one dimension wrap around silently, which is the arithmetic meant here.
    step = np.atleast_1d(np.asarray(index)).astype(np.uint64) + np.uint64(1)
    x = np.asarray(key, np.uint64) + step * _GOLDEN
    x ^= x >> _SHIFTS[0]
    x *= _MIX_1
    x ^= x >> _SHIFTS[1]
    x *= _MIX_2
    x ^= x >> _SHIFTS[2]
    return x


def below(keys: Keys, bound: ArrayLike) -> NDArray[np.int64]:
    """Integers uniform in [0, bound), one for each key."""
    return (((keys >> _SHIFTS[3]) * np.asarray(bound, np.uint64)) >> _SHIFTS[3]).astype(np.int64)


def between(keys: Keys, bounds: tuple[int, int]) -> NDArray[np.int64]:
    """Integers uniform in [first, last], both included, one for each key."""
    return bounds[0] + below(keys, bounds[1] - bounds[0] + 1)


def uniform(keys: Keys) -> NDArray[np.float64]:
    """Floats uniform in [0, 1), one for each key."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53
