"""Random probabilistic finite automata, and the six tasks made from them (paper, section 3.1 and appendix).

A document is one task: strings of letters separated by spaces. Document i of a task is a pure function of
(seed, i); what the model is to memorise depends on `memorized_seed` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from philens.support.errors import ConfigError, InputError
from philens.tasks.random_streams import Keys, below, between, derive, uniform

TASKS = (
    "memorized_sequences",
    "memorized_programs",
    "new_vocabulary",
    "in_context_language",
    "random",
    "copy",
)
MEMORIZED_SEQUENCES, MEMORIZED_PROGRAMS, NEW_VOCABULARY, IN_CONTEXT_LANGUAGE, RANDOM, COPY = range(len(TASKS))

_FIRST_LETTER, _SPACE = ord("a"), ord(" ")
# Names of the independent streams below a document's key.
_CHOICE, _STRINGS, _ALPHABET, _COUNT, _NOISE, _AUTOMATON, _ORDER = range(7)


def task_label(name: str) -> str:
    """A task's name as people read it: `in_context_language` becomes `in-context language`."""
    return name.replace("in_context", "in-context").replace("_", " ")


@dataclass
class TaskConfig:
    """Sizes of the synthetic tasks; the defaults are the paper's.

    Attributes:
        letters: V, the number of letters a, b, c, ... there are.
        states: smallest and largest number of states, the start state not counted.
        edges: smallest and largest number of edges that leave a state.
        alphabet: smallest and largest number of letters an automaton may use.
        strings: smallest and largest number of strings in a document.
        string_length: smallest and largest number of letters in a string.
        noise_probability: how probably a string of an automaton is perturbed.
        noise_rate: how probably each letter of a perturbed string is redrawn.
        memorized_automata: how many automata are fixed.
        memorized_strings: how many strings of each are fixed.
        memorized_seed: what the fixed ones depend on.
        max_length: documents are cut to so many characters; None leaves them whole.
        shuffled: whether each document's letters are put in random order, which leaves its letters, how often
            each occurs and the strings' lengths: a control for what can be found out by counting.
    """

    letters: int = 18
    states: tuple[int, int] = (3, 11)
    edges: tuple[int, int] = (1, 3)
    alphabet: tuple[int, int] = (4, 17)
    strings: tuple[int, int] = (10, 19)
    string_length: tuple[int, int] = (10, 49)
    noise_probability: float = 0.5
    noise_rate: float = 0.2
    memorized_automata: int = 10
    memorized_strings: int = 10
    memorized_seed: int = 0
    max_length: int | None = None
    shuffled: bool = False

    def __post_init__(self) -> None:
        for name in ("states", "edges", "alphabet", "strings", "string_length"):
            value = getattr(self, name)
            if not (isinstance(value, list | tuple) and len(value) == 2 and 1 <= value[0] <= value[1]):
                raise ConfigError(f"{name} must be two numbers 1 <= first <= last, not {value}.")
            setattr(self, name, tuple(value))
        for name in ("noise_probability", "noise_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        for name in ("memorized_automata", "memorized_strings", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 1 <= self.letters <= 26:
            raise ConfigError(f"letters must lie between 1 and 26, not {self.letters}.")
        if self.alphabet[1] > self.letters:
            raise ConfigError(f"alphabet {self.alphabet} asks for more than the {self.letters} letters.")
        if self.edges[1] > min(self.states[0], self.alphabet[0]):
            raise ConfigError(
                f"{self.edges[1]} edges per state need as many states and letters: raise the lower bound of "
                f"states {self.states} and alphabet {self.alphabet}, or lower edges."
            )


class Automata(NamedTuple):
    """A batch of n automata; state 0 is the start. S states and E edges per state at most.

    Attributes:
        degree: (n, S) edges that leave each state, 0 where there is no such state.
        target: (n, S, E) state an edge leads to.
        letter: (n, S, E) letter an edge emits, 0 to V - 1.
        states: (n,) states, the start included.
        edges: (n,) edges.
        letters: (n,) different letters used.
        description_length: (n,) nats, ln C(V, v) + m (2 ln n + ln v) for n states, m edges, v letters.
    """

    degree: NDArray[np.int64]
    target: NDArray[np.int64]
    letter: NDArray[np.int64]
    states: NDArray[np.int64]
    edges: NDArray[np.int64]
    letters: NDArray[np.int64]
    description_length: NDArray[np.float64]


def draw_automata(config: TaskConfig, keys: Keys) -> Automata:
    """One automaton for each key."""
    count, most_states, most_edges = len(keys), config.states[1] + 1, config.edges[1]
    streams = derive(keys, np.arange(6)[:, None])
    state_key, degree_key, target_key, alphabet_key, letter_key, size_key = streams
    states = 1 + between(state_key, config.states)
    alphabet_size = between(size_key, config.alphabet)
    index = np.arange(most_states)
    degree = between(derive(degree_key[:, None], index), config.edges)
    degree[index >= states[:, None]] = 0

    # Sorting random numbers, those of what may not be chosen put last, draws without replacement.
    order = uniform(derive(target_key[:, None], np.arange(most_states**2)))
    order = order.reshape(count, most_states, most_states)
    order += 2 * ((index == 0) | (index >= states[:, None]))[:, None, :]
    target = np.argsort(order, axis=-1)[..., :most_edges]
    alphabet = np.argsort(uniform(derive(alphabet_key[:, None], np.arange(config.letters))), axis=-1)
    order = uniform(derive(letter_key[:, None], np.arange(most_states * config.letters)))
    order = order.reshape(count, most_states, config.letters)
    order += 2 * (np.arange(config.letters) >= alphabet_size[:, None])[:, None, :]
    letter = np.argsort(order, axis=-1)[..., :most_edges]
    letter = np.take_along_axis(alphabet[:, None, :], letter.reshape(count, 1, -1), -1).reshape(letter.shape)

    used = np.zeros((count, config.letters), bool)
    real = np.arange(most_edges) < degree[..., None]
    used[np.nonzero(real)[0], letter[real]] = True
    letters, edges = used.sum(-1), degree.sum(-1)
    choose = gammaln(config.letters + 1) - gammaln(letters + 1) - gammaln(config.letters - letters + 1)
    description_length = choose + edges * (2 * np.log(states) + np.log(letters))
    return Automata(degree, target, letter, states, edges, letters, description_length)


@dataclass(frozen=True)
class EndToEnd:
    """A batch of n documents with N tokens in all, one after the other.

    Attributes:
        tokens: (N,) ids.
        offsets: (n + 1,) where each document starts, and N.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    OF_TOKENS: ClassVar[tuple[str, ...]] = ("tokens",)  # what else has a value for each token; others have n

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens in each document."""
        return np.diff(self.offsets)

    def select(self, indices: ArrayLike) -> Self:
        """The documents at these places, in this order."""
        indices = np.atleast_1d(np.asarray(indices, np.int64))
        return self._beginnings(indices, self.lengths[indices])

    def cut(self, length: int) -> Self:
        """The same documents, those longer than `length` tokens cut to it."""
        return self._beginnings(np.arange(len(self)), np.minimum(self.lengths, length))

    def _beginnings(self, indices: NDArray[np.int64], lengths: NDArray[np.int64]) -> Self:
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        source = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "offsets"}
        chosen = {n: v[source if n in self.OF_TOKENS else indices] for n, v in values.items()}
        return type(self)(offsets=offsets, **chosen)


@dataclass(frozen=True)
class Documents(EndToEnd):
    """A batch of n documents with N tokens in all, end to end; a token is a character, its id its ASCII code.

    Attributes:
        task: (n,) index in `TASKS`.
        states: (n,) states of its automaton, the start included; 0 where there is none.
        edges: (n,) edges of its automaton.
        letters: (n,) different letters its automaton uses.
        description_length: (n,) of its automaton, in nats; NaN where there is none.
        perturbed: (N,) whether the letter was redrawn by noise.
    """

    task: NDArray[np.int64]
    states: NDArray[np.int64]
    edges: NDArray[np.int64]
    letters: NDArray[np.int64]
    description_length: NDArray[np.float64]
    perturbed: NDArray[np.bool_]
    OF_TOKENS = ("tokens", "perturbed")

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(N,) whether a token counts in the loss: all do."""
        return np.ones(len(self.tokens), bool)

    def text(self, index: int) -> str:
        """The text of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].tobytes().decode("ascii")


def concatenate(batches: Sequence[Documents]) -> Documents:
    """Several batches as one."""
    joined = {f.name: np.concatenate([getattr(b, f.name) for b in batches]) for f in fields(Documents)}
    joined["offsets"] = np.concatenate(([0], np.cumsum(np.concatenate([b.lengths for b in batches]))))
    return Documents(**joined)


def task_index(name: str) -> int:
    """Index of a task in `TASKS`.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS.index(name)


def document_keys(seed: int, tasks: NDArray[np.int64], indices: NDArray[np.int64]) -> Keys:
    """The key of each document: one stream for each task, so that two never share their random strings."""
    return derive(derive(derive(0, seed), tasks), indices)


def automaton_keys(config: TaskConfig, tasks: NDArray[np.int64], documents: Keys) -> Keys:
    """What `draw_automata` makes each document's automaton from; 0 where there is none."""
    memorized = below(derive(documents, _CHOICE), config.memorized_automata)
    fixed = derive(derive(1, config.memorized_seed), memorized)
    new = np.where(tasks == IN_CONTEXT_LANGUAGE, derive(documents, _AUTOMATON), 0)
    return np.where(tasks <= NEW_VOCABULARY, fixed, new)


def generate(config: TaskConfig, seed: int, task: str | ArrayLike, indices: ArrayLike) -> Documents:
    """Documents `indices` of the stream `seed`, each a pure function of (config, seed, its task, its index).

    Args:
        task: a task's name, or for each document an index in `TASKS`.
        indices: (n,) integers of at least 0.

    Raises:
        ConfigError: there is no such task.
        InputError: no index is given, or a negative one.
    """
    indices = np.atleast_1d(np.asarray(indices, np.int64))
    if not len(indices):
        raise InputError("There is no document to make: give at least one index.")
    if indices.min() < 0:
        raise InputError(f"Documents are counted from 0; there is none at {indices.min()}.")
    tasks = np.broadcast_to(task_index(task) if isinstance(task, str) else np.asarray(task), indices.shape)
    if not ((tasks >= 0) & (tasks < len(TASKS))).all():
        raise ConfigError(f"Tasks are numbered 0 to {len(TASKS) - 1}, not {tasks.min()} to {tasks.max()}.")
    document = document_keys(seed, tasks, indices)
    has_automaton = tasks <= IN_CONTEXT_LANGUAGE
    automaton_key = automaton_keys(config, tasks, document)
    unique, which = np.unique(automaton_key, return_inverse=True)
    automata = draw_automata(config, unique)

    string_count = between(derive(document, _COUNT), config.strings)
    owner = np.repeat(np.arange(len(indices)), string_count)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(string_count) - string_count, string_count)
    owner_task = tasks[owner]
    # A copy document says everything twice.
    key = derive(derive(document, _STRINGS)[owner], np.where(owner_task == COPY, number // 2, number))
    fixed_string = derive(derive(automaton_key, _STRINGS)[owner], below(key, config.memorized_strings))
    key = np.where(owner_task == MEMORIZED_SEQUENCES, fixed_string, key)
    length = between(derive(key, 0), config.string_length)

    letters = _emit(config, automata, which[owner], has_automaton[owner], derive(key, 1), length)
    if (tasks == NEW_VOCABULARY).any():
        order = uniform(derive(derive(document, _ALPHABET)[:, None], np.arange(config.letters)))
        new = np.argsort(order, axis=-1)
        rows = owner_task == NEW_VOCABULARY
        letters[rows] = np.take_along_axis(new[owner[rows]], letters[rows], -1)
    noise_key = derive(derive(document, _NOISE)[owner], number)
    perturbed = _perturb(config, letters, noise_key, has_automaton[owner])

    # Each string and the space after it, then all but the last space of each document.
    place = np.arange(letters.shape[1] + 1)
    real = place <= length[:, None]
    tokens = np.full(real.shape, _SPACE, np.uint8)
    tokens[:, :-1] = np.where(place[:-1] < length[:, None], letters + _FIRST_LETTER, _SPACE)
    noisy = np.zeros(real.shape, bool)
    noisy[:, :-1] = perturbed & (place[:-1] < length[:, None])
    if config.shuffled:
        _shuffle(tokens, noisy, owner, document)
    full = np.bincount(owner, length + 1, len(indices)).astype(np.int64)
    lengths = np.minimum(full - 1, config.max_length or full.max())
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    keep = within < np.repeat(lengths, full)
    return Documents(
        tokens=tokens[real][keep],
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        task=tasks.astype(np.int64),
        states=np.where(has_automaton, automata.states[which], 0),
        edges=np.where(has_automaton, automata.edges[which], 0),
        letters=np.where(has_automaton, automata.letters[which], 0),
        description_length=np.where(has_automaton, automata.description_length[which], np.nan),
        perturbed=noisy[real][keep],
    )


def _emit(
    config: TaskConfig,
    automata: Automata,
    which: NDArray[np.int64],
    has_automaton: NDArray[np.bool_],
    keys: Keys,
    length: NDArray[np.int64],
) -> NDArray[np.int64]:
    """(strings, longest) letters: walks through the strings' automata, random where there is none."""
    longest = int(length.max())
    noise = derive(keys[:, None], np.arange(longest))
    letters = below(noise, config.letters)
    # Longest first: the strings still being written are then a leading slice.
    order = np.argsort(-length, kind="stable")
    order = order[has_automaton[order]]
    alive = np.searchsorted(-length[order], -np.arange(longest), side="left")
    state_count, edge_count = automata.target.shape[1:]
    degree, target = automata.degree.ravel(), automata.target.ravel()
    letter = automata.letter.ravel()
    base, noise = which[order] * state_count, noise[order]
    state = np.zeros(len(order), np.int64)
    written = np.zeros((len(order), longest), np.int64)
    for place in range(longest):
        rows = int(alive[place])
        if not rows:
            break
        here = base[:rows] + state[:rows]
        edge = here * edge_count + below(noise[:rows, place], degree[here])
        written[:rows, place] = letter[edge]
        state[:rows] = target[edge]
    letters[order] = written
    return letters


def _shuffle(
    tokens: NDArray[np.uint8], noisy: NDArray[np.bool_], owner: NDArray[np.int64], documents: Keys
) -> None:
    """Put the letters of each document's strings in random order, in place; noise goes with its letter."""
    rows, columns = np.nonzero(tokens != _SPACE)
    place = np.arange(len(rows)) - np.searchsorted(owner[rows], owner[rows])
    order = np.lexsort((uniform(derive(derive(documents, _ORDER)[owner[rows]], place)), owner[rows]))
    for values in (tokens, noisy):
        values[rows, columns] = values[rows, columns][order]


def _perturb(
    config: TaskConfig, letters: NDArray[np.int64], keys: Keys, may: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Redraw letters in place in those of the strings that noise hits; returns which were redrawn."""
    perturbed = np.zeros(letters.shape, bool)
    hit = np.flatnonzero(may & (uniform(derive(keys, 0)) < config.noise_probability))
    if len(hit) and config.noise_rate > 0:
        place = np.arange(letters.shape[1])
        redraw = uniform(derive(derive(keys[hit], 1)[:, None], place)) < config.noise_rate
        rows, columns = np.nonzero(redraw)
        letters[hit[rows], columns] = below(derive(derive(keys[hit], 2)[rows], columns), config.letters)
        perturbed[hit[rows], columns] = True
    return perturbed
