"""Rows of a fixed length out of documents of any length."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from philens.support.errors import ConfigError, InputError
from philens.tasks.automata import Documents, EndToEnd, TaskConfig, generate, task_index
from philens.tasks.random_streams import derive, uniform


@dataclass(frozen=True)
class TokenDocuments(EndToEnd):
    """A batch of n documents of text with N tokens in all, end to end.

    Attributes:
        counted: (N,) whether a token counts in the loss; those of a user's message do not.
    """

    counted: NDArray[np.bool_]
    OF_TOKENS = ("tokens", "counted")

    @classmethod
    def join(cls, documents: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]]) -> "TokenDocuments":
        """Documents, each given by its tokens and which of them count, as one batch."""
        lengths = [len(tokens) for tokens, _ in documents]
        tokens = np.concatenate([np.zeros(0, np.int64), *(tokens for tokens, _ in documents)])
        counted = np.concatenate([np.zeros(0, bool), *(counted for _, counted in documents)])
        return cls(tokens, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))), counted)


AnyDocuments: TypeAlias = Documents | TokenDocuments


@dataclass(frozen=True)
class Mixture:
    """An endless stream of documents of several tasks; document i is set by (config, weights, seed, i) alone.

    Attributes:
        config: sizes of the tasks.
        weights: share of each task among the documents; they need not add up to 1.
        seed: seed of the stream.

    Raises:
        ConfigError: an unknown task, a negative weight, or none above 0.
    """

    config: TaskConfig
    weights: dict[str, float]
    seed: int

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            task_index(name)
            if not (weight >= 0 and np.isfinite(weight)):
                raise ConfigError(f"The weight of {name} must be finite and at least 0, not {weight}.")
        if not sum(self.weights.values()) > 0:
            raise ConfigError("At least one task needs a weight above 0.")

    def documents(self, indices: NDArray[np.int64]) -> Documents:
        """Documents `indices` of the stream."""
        tasks = np.array([task_index(name) for name in self.weights])
        edges = np.cumsum(list(self.weights.values()))
        draw = uniform(derive(derive(2, self.seed), indices)) * edges[-1]
        return generate(self.config, self.seed, tasks[np.searchsorted(edges, draw, side="right")], indices)


def pack(lengths: NDArray[np.int64], rows: int, capacity: int) -> NDArray[np.int64] | None:
    """Row of each piece by best fit, longest first; None if `rows` of `capacity` tokens do not hold them."""
    free = np.full(rows, capacity)
    placed = np.empty(len(lengths), np.int64)
    for piece in np.argsort(-lengths, kind="stable"):
        left = free - lengths[piece]
        left[left < 0] = capacity + 1
        row = int(left.argmin())
        if left[row] > capacity:
            return None
        placed[piece], free[row] = row, left[row]
    return placed


class _GroupedRows(Dataset[dict[str, Tensor]], ABC):
    """Rows that are made a group at a time; the last group is kept."""

    def __init__(
        self, documents: Callable[[NDArray[np.int64]], AnyDocuments], length: int, rows: int, group: int = 16
    ) -> None:
        if min(length, rows, group) < 1:
            raise ConfigError("length, rows and group must be at least 1.")
        self.documents, self.length, self.rows, self.group = documents, length, rows, group
        self._cache: tuple[int, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        number, place = divmod(int(row), self.group)
        if self._cache is None or self._cache[0] != number:
            self._cache = (number, self._make(number))
        return {name: value[place] for name, value in self._cache[1].items()}

    @abstractmethod
    def _make(self, number: int) -> dict[str, Tensor]:
        """The rows of a group, each value (group, length)."""


class PackedRows(_GroupedRows):
    """A training set of rows of `length` tokens, any of which can be made by itself.

    Rows come in groups of `group`. Group g is filled with the documents g * group * length + 0, 1, 2, ...:
    as many as best-fit packing places whole (those longer than a row are cut into rows). So no token of a
    document is lost, none is seen twice, and row r depends on nothing but r: workers, ranks and resumed runs
    read exactly the rows they should.

    A row has, each (length,): `input_ids`, `labels` (-100 on padding and on what does not count),
    `position_ids` (0 at each document's start, and at the padding's), `attention_mask` (0 on padding).

    Args:
        documents: maps indices to documents, such as `Mixture.documents`.
        group: rows packed together; more waste less padding and take longer to make one.
    """

    def __init__(
        self,
        documents: Callable[[NDArray[np.int64]], AnyDocuments],
        length: int,
        rows: int,
        group: int = 16,
        limits: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(documents, length, rows, group)
        self.limits = dict(sorted((limits or {}).items()))
        self._guess = group

    def limit(self, number: int) -> int | None:
        """Tokens that documents of a group are cut to, if any."""
        reached = [length for row, length in self.limits.items() if row <= number * self.group]
        return reached[-1] if reached else None

    def group_documents(
        self, number: int
    ) -> tuple[AnyDocuments, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Documents drawn for a group; length, start in the tokens, and row of each piece that is placed.

        Raises:
            InputError: a document is longer than a whole group.
        """
        capacity = self.group * self.length
        first, count, limit = number * capacity, self._guess, self.limit(number)
        while True:
            batch = self.documents(first + np.arange(count))
            batch = batch if limit is None else batch.cut(limit)
            if batch.offsets[-1] > capacity:
                break
            count *= 2
        fitting = int(np.searchsorted(batch.offsets, capacity, side="right")) - 1
        self._guess = fitting + 2  # what the next group will most likely need; never changes what is placed
        while fitting > 0:
            starts, lengths = _pieces(batch.offsets[: fitting + 1], self.length)
            placed = pack(lengths, self.group, self.length)
            if placed is not None:
                return batch, lengths, starts, placed
            fitting -= 1
        raise InputError(
            f"A document of {batch.lengths[0]} tokens does not fit into {self.group} rows of {self.length}; "
            "raise the length of rows or the number packed together."
        )

    def _make(self, number: int) -> dict[str, Tensor]:
        batch, lengths, starts, placed = self.group_documents(number)
        order = np.argsort(placed, kind="stable")
        lengths, starts, placed = lengths[order], starts[order], placed[order]
        ends = np.cumsum(lengths)
        before = ends - lengths
        row_begin = np.searchsorted(placed, placed, side="left")
        column = before - before[row_begin]
        within = np.arange(ends[-1]) - np.repeat(before, lengths)
        target = np.repeat(placed * self.length + column, lengths) + within
        size = self.group * self.length
        input_ids, mask = np.zeros(size, np.int64), np.zeros(size, np.int64)
        source = np.repeat(starts, lengths) + within
        input_ids[target] = batch.tokens[source]
        mask[target] = 1
        used = np.bincount(placed, lengths, self.group).astype(np.int64)
        positions = (np.arange(self.length) - used[:, None]).ravel()
        positions[target] = within
        labels = np.full(size, -100)
        labels[target] = np.where(batch.counted[source], input_ids[target], -100)
        arrays = {"input_ids": input_ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
        return {name: torch.from_numpy(a.reshape(self.group, self.length)) for name, a in arrays.items()}


class SingleRows(_GroupedRows):
    """A training set with one document in each row, cut or padded to `length`; row r is document r.

    A causal model needs no mask then: faster than packing where documents are about as long as a row.
    A row has, each (length,): `input_ids`, `labels` (-100 on padding).
    """

    def _make(self, number: int) -> dict[str, Tensor]:
        rows = pad(self.documents(number * self.group + np.arange(self.group)), self.length)
        return {name: rows[name] for name in ("input_ids", "labels")}


def pad(documents: AnyDocuments, length: int | None = None) -> dict[str, Tensor]:
    """Documents as rows padded on the right to `length`, by default the longest's; longer ones are cut.

    Returns:
        `input_ids`, `labels` (-100 on padding) and `attention_mask`, each (n, length).
    """
    length = length or int(documents.lengths.max())
    place = np.arange(length)
    mask = place < documents.lengths[:, None]
    source = np.minimum(documents.offsets[:-1, None] + place, len(documents.tokens) - 1)
    input_ids = np.where(mask, documents.tokens[source], 0).astype(np.int64)
    labels = np.where(mask & documents.counted[source], input_ids, -100)
    arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": mask.astype(np.int64)}
    return {name: torch.from_numpy(a) for name, a in arrays.items()}


def _pieces(offsets: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and lengths of the documents between offsets, those longer than a row cut into rows."""
    sizes = np.diff(offsets)
    count = -(-sizes // length)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    starts = np.repeat(offsets[:-1], count) + number * length
    return starts, np.minimum(length, np.repeat(offsets[1:], count) - starts)
