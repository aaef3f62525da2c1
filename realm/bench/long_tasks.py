"""Synthetic long-text tasks for a reader, generated on the fly, each with its own small vocabulary.

Examples have the reader's joint input format, `[CLS] x [SEP] text [SEP]`; x contains masks whose
wordpieces follow from the text.
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
"""First id available to a task."""


class Example(NamedTuple):
    """One joint input."""

    ids: np.ndarray
    first: int
    """Length of `[CLS] x [SEP]`."""
    answer: tuple[int, ...]
    """Target ids of the masks, in order."""


def joint(x: list[int], text: list[int], answer: tuple[int, ...]) -> Example:
    """`[CLS] x [SEP] text [SEP]`."""
    return Example(np.array([CLS, *x, SEP, *text, SEP], dtype=np.int32), len(x) + 2, answer)


@dataclass(frozen=True)
class Task(ABC):
    """A task; numbers of tokens refer to the whole joint input."""

    train_tokens: int = 64
    test_tokens: tuple[int, ...] = (64,)
    steps: int = 1500
    batch_size: int = 64

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Vocabulary size."""

    @abstractmethod
    def example(self, tokens: int, rng: np.random.Generator) -> Example:
        """A text of at most `tokens` tokens with its question."""

    def guess(self, rng: np.random.Generator, count: int = 2000) -> float:
        """Accuracy of a baseline that ignores the question; default: the most frequent answer."""
        answers = [self.example(self.train_tokens, rng).answer for _ in range(count)]
        return max(answers.count(answer) for answer in set(answers)) / count


@dataclass(frozen=True)
class Kinds(Task):
    """Texts of noise words with inserted words, each of which belongs to a kind; x is a kind
    followed by a mask, and asks for a word of that kind."""

    kinds: int = 8
    words: int = 16
    """Words per kind."""
    noise: int = 32

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.kinds * (1 + self.words) + self.noise

    def word(self, kind: np.ndarray | int, number: np.ndarray) -> np.ndarray:
        """Ids of words, by kind and number within the kind."""
        return _FIRST + self.kinds + kind * self.words + number

    def ask(self, kind: int, answer: int, inserted: np.ndarray, tokens: int, rng: np.random.Generator) -> Example:
        """Ask for the word `answer` of `kind` in noise with the words `inserted` at random
        positions."""
        room = tokens - len((CLS, kind, MASK, SEP, SEP))
        text = self.word(self.kinds, rng.integers(self.noise, size=room))
        text[rng.choice(room, len(inserted), replace=False)] = inserted
        return joint([_FIRST + kind, MASK], text.tolist(), (answer,))


@dataclass(frozen=True)
class Passkey(Kinds):
    """Several keys in noise, each a word of a different kind; x asks for the key of one kind.

    After Mohtashami & Jaggi (2023, section 4.2), with more than one key. The guess baseline returns
    one of the keys in the text.
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
    """A document about one entity of each kind that also mentions others, less often; x is a
    sentence with the entity of one kind masked.

    The target is the entity that the whole document mentions most, so the evidence is spread over
    the document and grows with it: of each kind, one word appears three times per training length,
    and two others once. The guess baseline returns a random mention of the kind.
    """

    train_tokens: int = 128
    test_tokens: tuple[int, ...] = (128, 512, 2048)
    mentions: tuple[int, ...] = (3, 1, 1)
    """Mentions of the entity and of each other one, per training length."""

    def guess(self, rng: np.random.Generator, count: int = 2000) -> float:
        return self.mentions[0] / sum(self.mentions)

    def example(self, tokens: int, rng: np.random.Generator) -> Example:
        kinds = np.arange(self.kinds)[:, None]
        named = self.word(kinds, rng.random((self.kinds, self.words)).argsort(1)[:, : len(self.mentions)])
        inserted = named.repeat(np.array(self.mentions) * max(1, tokens // self.train_tokens), axis=1).ravel()
        asked = int(rng.integers(self.kinds))
        return self.ask(asked, int(named[asked, 0]), inserted, tokens, rng)


@dataclass(frozen=True)
class ListOps(Task):
    """Nested lists of digits with the operators MAX, MIN, MED and SM (sum modulo 10), by the
    published grammar (Nangia & Bowman 2018, section 3).

    A node is an operator with probability 0.25 and a digit otherwise; operators have two to
    `max_arguments` arguments, lists at most `max_depth` levels. As in Long Range Arena (Tay et al.
    2021, section 2.2.1), only lists in a range of lengths are kept, here those that fill more than
    half of the available tokens.
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
        draws = random.Random(int(rng.integers(2**63)))  # faster than numpy for single numbers
        while True:
            text: list[int] = []
            value = self._append(text, 1, draws, room)
            if room // 2 < len(text) <= room:
                return joint([MASK], text, (_FIRST + value,))

    def _append(self, text: list[int], depth: int, draws: random.Random, room: int) -> int:
        """Append an operator and its arguments to `text` and return its value; the root is always
        an operator.

        Texts longer than `room` are discarded, so generation stops there and the value is
        meaningless.
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
