"""The index interface that training and evaluation use; step timing substitutes a random index."""

from typing import Protocol

import numpy as np


class Index(Protocol):
    """Passages by row, searched by maximum inner product; implemented by
    `index.search.PassageIndex`."""

    def __len__(self) -> int:
        """Number of passages."""

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the top k passages per query, (B, k), best first; -1: no result
        (see `realm.corpus.collate.filled`)."""

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the passages in `rows`, (len(rows), D) float32."""

    def close(self) -> None:
        """Release the index."""
