"""Passages of a corpus as padded inputs of the retriever and the reader.

Shape legend: B queries or passages, L wordpieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from realm.corpus.context import Contexts
from realm.text.inputs import IntArray, Wordpieces, pad_batch

NULL = -1
"""Row number of the null passage."""
EMPTY = -2
"""Row number of an empty candidate slot."""
_NO_IDS = np.zeros(0, np.int32)

Parts: TypeAlias = tuple[IntArray, IntArray]
"""Wordpieces of a title and of a text."""


def filled(rows: Sequence[int] | np.ndarray) -> list[int]:
    """The rows that hold a passage, in order.

    A search that finds fewer passages than it was asked for fills up with negative rows: after
    documents were deleted, or with inverted lists.
    """
    return [row for row in map(int, rows) if row >= 0]


@dataclass(frozen=True)
class InputLimits:
    """Longest inputs in wordpieces, special tokens included, and longest answers."""

    query: int
    passage: int
    joint: int
    answer: int
    """Maximum length W of the answer spans that the reader's span head predicts."""


class Collator:
    """Builds inputs from wordpieces and from the passages of a corpus."""

    def __init__(self, contexts: Contexts, wordpieces: Wordpieces, limits: InputLimits) -> None:
        self.contexts, self.passages, self.wordpieces, self.limits = contexts, contexts.corpus, wordpieces, limits

    def passage(self, row: int) -> Parts:
        """Title and text of a passage; both empty for NULL and EMPTY."""
        if row < 0:
            return _NO_IDS, _NO_IDS
        return self.passages.title_ids(row), self.passages.text_ids(row)

    def in_context(self, row: int) -> Parts:
        """Title of a passage, and its text together with the blocks around it."""
        title, text = self.passage(row)
        return title, text if row < 0 else self.contexts.around(row).text_ids

    def contains(self, parts: Parts, span_ids: IntArray) -> bool:
        """Whether a span appears in a title or text, as whole words."""
        return any(self.wordpieces.find(part, span_ids) for part in parts)

    def queries(self, texts: Sequence[IntArray]) -> tuple[Tensor, Tensor]:
        """Retriever inputs of query texts: ids and padding mask, each (B, L)."""
        words = self.wordpieces
        return pad_batch([words.query(text, self.limits.query) for text in texts], words.pad)

    def passage_inputs(self, passages: Sequence[Parts]) -> tuple[Tensor, Tensor]:
        """Retriever inputs of passages: ids and padding mask, each (B, L)."""
        words = self.wordpieces
        return pad_batch([words.passage(*parts, self.limits.passage) for parts in passages], words.pad)

    def joint(self, query_ids: IntArray, parts: Parts) -> tuple[IntArray, int, int]:
        """Reader input of a query and a passage (see `Wordpieces.joint`)."""
        return self.wordpieces.joint(query_ids, *parts, self.limits.joint)
