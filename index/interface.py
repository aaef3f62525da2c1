"""The index interface that training and evaluation use; step timing substitutes a random index."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Lexical(Protocol):
    """BM25 over the passages of an index; implemented by `index.lexical.LexicalIndex`."""

    def scores(self, query_terms: Sequence[str]) -> np.ndarray:
        """Scores of all rows for one query, (N,) float32."""


class Index(Protocol):
    """Passages by row, searched by maximum inner product; implemented by
    `index.search.PassageIndex`."""

    @property
    def lexical(self) -> Lexical | None:
        """BM25 over the same passages; None if it was not asked for."""

    def __len__(self) -> int:
        """Number of passages."""

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the top k passages per query, (B, k), best first; -1: no result
        (see `realm.corpus.collate.filled`)."""

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the passages in `rows`, (len(rows), D) float32."""

    def close(self) -> None:
        """Release the index."""
