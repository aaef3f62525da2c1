"""A small corpus of random words, and BM25 as a plain loop."""

import math
from collections import Counter

import numpy as np

from realm.text.terms import Terms


class WordCorpus:
    """Passages of random wordpieces; every seventh is empty, and some rows can be deleted."""

    def __init__(self, vocabulary: int, num_rows: int = 40, deleted: frozenset[int] = frozenset()) -> None:
        rng = np.random.default_rng(0)
        self.deleted, self.fingerprint = deleted, f"words-{num_rows}-{sorted(deleted)}"
        self._texts = [
            (rng.integers(5, vocabulary, rng.integers(0, 3)), rng.integers(5, vocabulary, row % 7 * 5))
            for row in range(num_rows)
        ]

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def rows(self) -> np.ndarray:
        return np.delete(np.arange(len(self)), sorted(self.deleted))

    def title_ids(self, row: int) -> np.ndarray:
        return self._texts[row][0]

    def text_ids(self, row: int) -> np.ndarray:
        return self._texts[row][1]


def plain_bm25(corpus: WordCorpus, terms: Terms, query: list[str], k1: float, b: float) -> np.ndarray:
    """Lucene's BM25 of every row that is not deleted, in double precision."""
    documents = {row: terms(corpus.title_ids(row)) + terms(corpus.text_ids(row)) for row in corpus.rows.tolist()}
    average = sum(map(len, documents.values())) / len(documents)
    scores = np.zeros(len(corpus))
    for row, words in documents.items():
        for term in query:
            frequency = Counter(words)[term]
            containing = sum(term in others for others in documents.values())
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            if frequency:
                scores[row] += idf * frequency / (frequency + k1 * (1 - b + b * len(words) / average))
    return scores
