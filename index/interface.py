"""What training and evaluation ask of an index, so that a random one can replace it when steps are timed."""

from typing import Protocol

import numpy as np


class Index(Protocol):
    """Passages by row, searched by maximum inner product. `index.search.PassageIndex` is the real one."""

    def __len__(self) -> int:
        """Number of passages."""

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the `k` best passages per query, each (B, k), best first; row -1: none."""

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the passages in `rows`, (len(rows), D) float32."""

    def close(self) -> None:
        """Release the index."""
