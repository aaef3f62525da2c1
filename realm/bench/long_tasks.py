"""Tasks made up on the spot that ask what a reader of long texts can do, in a small vocabulary of
their own.

Each is put as the reader is asked: `[CLS] x [SEP] text [SEP]`, x with masks whose wordpieces the
text decides.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

PAD, CLS, SEP, MASK = range(4)
_FIRST = 4
"""The first id that means something to a task."""


class Example(NamedTuple):
    """One joint input."""

    ids: np.ndarray
    first: int
    """Length of `[CLS] x [SEP]`."""
    answer: tuple[int, ...]
    """What stands behind the masks, in their order."""


def joint(x: list[int], text: list[int], answer: tuple[int, ...]) -> Example:
    """`[CLS] x [SEP] text [SEP]`."""
    return Example(np.array([CLS, *x, SEP, *text, SEP], dtype=np.int32), len(x) + 2, answer)


@dataclass(frozen=True)
class Task(ABC):
    """What is asked; `tokens` below are those of the whole joint input."""

    train_tokens: int = 64
    test_tokens: tuple[int, ...] = (64,)
    steps: int = 1500
    batch_size: int = 64

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Ids in use."""

    @abstractmethod
    def example(self, tokens: int, rng: np.random.Generator) -> Example:
        """A text of at most `tokens` with its question."""

    def guess(self, rng: np.random.Generator, count: int = 2000) -> float:
        """Share right without an idea of the question: here of always giving the commonest answer."""
        answers = [self.example(self.train_tokens, rng).answer for _ in range(count)]
        return max(answers.count(answer) for answer in set(answers)) / count


@dataclass(frozen=True)
class Kinds(Task):
    """Texts of words that each belong to a kind, strewn over words that mean nothing; x asks for
    a word by its kind, a mask behind it."""

    kinds: int = 8
    words: int = 16
    """Of each kind."""
    noise: int = 32

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.kinds * (1 + self.words) + self.noise

    def word(self, kind: np.ndarray | int, number: np.ndarray) -> np.ndarray:
        """Ids of words by kind and number."""
        return _FIRST + self.kinds + kind * self.words + number

    def ask(self, kind: int, answer: int, strewn: np.ndarray, tokens: int, rng: np.random.Generator) -> Example:
        """For the word `answer` of a kind, in a text of noise with the words `strewn`."""
        room = tokens - len((CLS, kind, MASK, SEP, SEP))
        text = self.word(self.kinds, rng.integers(self.noise, size=room))
        text[rng.choice(room, len(strewn), replace=False)] = strewn
        return joint([_FIRST + kind, MASK], text.tolist(), (answer,))


@dataclass(frozen=True)
class Passkey(Kinds):
    """Several keys stand in noise, each a word of a kind of its own; x names a kind, and the key of
    that kind is to be returned.

    After Mohtashami & Jaggi (2023, section 4.2), with more than one key. A guess is one of the keys
    in the text.
    """

    test_tokens: tuple[int, ...] = (64, 256, 1024)
    keys: int = 4

    def guess(self, rng: np.random.Generator, count: int = 2000) -> float:
        return 1 / self.keys

    def example(self, tokens: int, rng: np.random.Generator) -> Example:
        kinds = rng.choice(self.kinds, self.keys, replace=False)
        keys = self.word(kinds, rng.integers(self.words, size=self.keys))
        return self.ask(int(kinds[0]), int(keys[0]), keys, tokens, rng)


@dataclass(frozen=True)
class MaskedSpan(Kinds):
    """A document about one entity of every kind, which names others too, less often; x is a
    sentence with the entity of one kind masked.

    What is to be filled in is what the whole document speaks of most, so that the evidence is
    spread over all of it and grows with it: of every kind one word stands in the text three times
    for each training length, and two others once. A guess is a mention of the kind.
    """

    train_tokens: int = 128
    test_tokens: tuple[int, ...] = (128, 512, 2048)
    mentions: tuple[int, ...] = (3, 1, 1)
    """Of the entity and of the others, for each training length."""

    def guess(self, rng: np.random.Generator, count: int = 2000) -> float:
        return self.mentions[0] / sum(self.mentions)

    def example(self, tokens: int, rng: np.random.Generator) -> Example:
        kinds = np.arange(self.kinds)[:, None]
        named = self.word(kinds, rng.random((self.kinds, self.words)).argsort(1)[:, : len(self.mentions)])
        strewn = named.repeat(np.array(self.mentions) * max(1, tokens // self.train_tokens), axis=1).ravel()
        asked = int(rng.integers(self.kinds))
        return self.ask(asked, int(named[asked, 0]), strewn, tokens, rng)


@dataclass(frozen=True)
class ListOps(Task):
    """Nested lists of digits under MAX, MIN, MED and SM (sum modulo 10), by the published grammar
    (Nangia & Bowman 2018, section 3).

    A node is an operator with probability ¼ and a digit otherwise, with two to `max_arguments`
    arguments and at most `max_depth` levels; as in Long Range Arena (Tay et al. 2021, section
    2.2.1), only lists of a certain length are kept: here more than half of the tokens there are.
    """

    train_tokens: int = 128
    test_tokens: tuple[int, ...] = (128,)
    max_depth: int = 10
    max_arguments: int = 10

    @property
    def vocabulary(self) -> int:
        return _FIRST + 10 + len(OPERATORS) + 1

    def example(self, tokens: int, rng: np.random.Generator) -> Example:
        room = tokens - len((CLS, MASK, SEP, SEP))
        draws = random.Random(
            int(rng.integers(2**63))
        )  # one number at a time is what Python's own generator is fast at
        while True:
            text: list[int] = []
            value = self._append(text, 1, draws, room)
            if room // 2 < len(text) <= room:
                return joint([MASK], text, (_FIRST + value,))

    def _append(self, text: list[int], depth: int, draws: random.Random, room: int) -> int:
        """Append an operator with its arguments to `text` and return its value; the root is always
        one.

        A text beyond `room` is thrown away whatever follows, so that its making stops there, with
        no value.
        """
        operator = draws.randrange(len(OPERATORS))
        text.append(_FIRST + 10 + operator)
        values: list[int] = []
        for _ in range(draws.randint(2, self.max_arguments)):
            if len(text) > room:
                return 0
            if depth < self.max_depth and draws.random() < 0.25:
                value = self._append(text, depth + 1, draws, room)
            else:
                value = draws.randrange(10)
                text.append(_FIRST + value)
            values.append(value)
        text.append(_FIRST + 10 + len(OPERATORS))
        return list(OPERATORS.values())[operator](values)


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: int(median(values)),
    "SM": lambda values: sum(values) % 10,
}

TASKS: dict[str, Task] = {"passkey": Passkey(), "masked span": MaskedSpan(), "listops": ListOps()}
