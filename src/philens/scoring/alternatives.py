"""What else could have stood in a token's place: the likeliest tokens, and the rank of the one that does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from philens.support.errors import InputError
from philens.support.output import visible_spaces

# As many of the likeliest tokens as have this probability together, and no more than so many.
COVERED, MOST = 0.95, 10
_IN_A_LINE = 4


class Alternative(NamedTuple):
    """A token that could have stood there, and with which probability."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Alternatives(Sequence[list[Alternative]]):
    """For each of T tokens the likeliest ones in its place, the likeliest first; none where nothing foretells
    it, as the first. There are N of them in all.

    Attributes:
        of: the column whose distribution it is: `surprisal`, the base's own, or `surprisal_with_layer`.
        ranks: (T,) int64, of the token that stands there: 1 for the likeliest of the vocabulary; 0 where
            nothing foretells it.
        counts: (T,) int64, how many of the N each token has, in order.
        token_ids: (N,) int64.
        probabilities: (N,) float32.
        texts: by token id, what the token adds to a text.

    Raises:
        InputError: shapes that do not fit together.
    """

    of: str
    ranks: NDArray[np.int64]
    counts: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    texts: Mapping[int, str]

    def __post_init__(self) -> None:
        total = int(self.counts.sum())
        if self.ranks.shape != self.counts.shape:
            raise InputError(
                f"ranks must have shape {self.counts.shape} like counts, not {self.ranks.shape}."
            )
        for name in ("token_ids", "probabilities"):
            if getattr(self, name).shape != (total,):
                raise InputError(f"{name} must have shape ({total},), not {getattr(self, name).shape}.")

    @classmethod
    def of_likeliest(
        cls,
        of: str,
        ranks: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        probabilities: NDArray[np.float32],
        texts: Mapping[int, str],
    ) -> "Alternatives":
        """From the `MOST` likeliest tokens (T, k) those that are needed: the fewest that are `COVERED` likely
        together. There is none where the rank is 0."""
        before = np.cumsum(probabilities, axis=1, dtype=np.float64) - probabilities
        kept = (before < COVERED) & (ranks != 0)[:, None]
        return cls(of, ranks, kept.sum(1), token_ids[kept], probabilities[kept], texts)

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> list[Alternative]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Alternative]]: ...
    def __getitem__(self, index: int | slice) -> list[Alternative] | list[list[Alternative]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        end = int(self.counts[: index % len(self) + 1].sum())
        return [self._one(number) for number in range(end - int(self.counts[index]), end)]

    def __iter__(self) -> Iterator[list[Alternative]]:
        ends = np.cumsum(self.counts).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            yield [self._one(number) for number in range(start, end)]

    def _one(self, number: int) -> Alternative:
        token = int(self.token_ids[number])
        return Alternative(token, self.texts.get(token, ""), float(self.probabilities[number]))

    def __repr__(self) -> str:
        return f"Alternatives(of {self.of}, {len(self)} tokens, {len(self.token_ids)} alternatives)"

    def notes(self) -> list[str]:
        """(T,) each token's rank and alternatives in words, a line each; empty where there are none."""
        return [
            "\n".join([f"rank {rank}", *lines]) if lines else ""
            for rank, some in zip(self.ranks.tolist(), self, strict=True)
            for lines in [[f"{percent(one.probability):>6} {visible_spaces(one.text)}" for one in some]]
        ]

    def lines(self) -> list[tuple[str, str]]:
        """(T,) each token's rank, and the likeliest ones as far as a line goes."""
        return [
            (
                str(rank or ""),
                ", ".join(
                    f"{visible_spaces(one.text)} {percent(one.probability)}" for one in some[:_IN_A_LINE]
                ),
            )
            for rank, some in zip(self.ranks.tolist(), self, strict=True)
        ]

    def to_lists(self) -> dict[str, list[Any]]:
        """As lists with an entry for each token: `ranks`, and lists of ids, texts, probabilities."""
        edges = np.cumsum(self.counts)[:-1]
        ids = [part.tolist() for part in np.split(self.token_ids, edges)]
        # The shortest decimals that give the same float32.
        shortest = self.probabilities.astype(str).astype(np.float64)
        return {
            "ranks": [rank or None for rank in self.ranks.tolist()],
            "token_ids": ids,
            "texts": [[self.texts.get(token, "") for token in some] for some in ids],
            "probabilities": [part.tolist() for part in np.split(shortest, edges)],
        }

    @classmethod
    def from_lists(cls, of: str, lists: Mapping[str, Sequence[Any]]) -> "Alternatives":
        """What `to_lists` gave."""
        ids, texts, probabilities = (lists[name] for name in ("token_ids", "texts", "probabilities"))
        flat = np.array([token for some in ids for token in some], np.int64)
        return cls(
            of,
            np.array([rank or 0 for rank in lists["ranks"]], np.int64),
            np.array([len(some) for some in ids], np.int64),
            flat,
            np.array([one for some in probabilities for one in some], np.float32),
            dict(zip(flat.tolist(), (text for some in texts for text in some), strict=True)),
        )


class TokenTexts(dict[int, str]):
    """What each token adds to a text, by its id, as far as it was asked for; by a fast tokenizer.

    Many vocabularies leave out the space before a text's first token, so each is decoded after another.
    Bytes that are no whole character become U+FFFD.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._backend = tokenizer.backend_tokenizer
        self._before = self._backend.encode("a", add_special_tokens=False).ids
        self._start = self._backend.decode(self._before, skip_special_tokens=False)

    def learn(self, token_ids: NDArray[np.int64]) -> None:
        """Have the texts of these tokens."""
        new = sorted(set(token_ids.tolist()) - self.keys())
        decoded = self._backend.decode_batch([[*self._before, one] for one in new], skip_special_tokens=False)
        for token, text in zip(new, decoded, strict=True):
            if text.startswith(self._start):
                self[token] = text[len(self._start) :]
            else:
                self[token] = self._backend.decode([token], skip_special_tokens=False)


def percent(probability: float) -> str:
    """A probability in words: `42 %`, `0.3 %`."""
    share = 100 * probability
    return "<0.1 %" if share < 0.1 else f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %"
