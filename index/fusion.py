"""Fused retrieval: passages found by the retriever's inner products and by BM25.

Shape legend: B queries, K rows per query, N passages, D embedding dimension.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.build import LEXICAL_FOLDER
from index.interface import Index
from index.lexical import LexicalIndex, best_rows, lexical_of_run, prepare_lexical
from index.measurements import tuned_weight
from realm.corpus.collate import EMPTY, filled
from realm.run.folder import Run
from realm.runtime.distributed import on_rank_zero
from realm.text.inputs import IntArray
from realm.text.terms import Terms
from realm.training.fusion_section import FusionConfig

DEFAULT_WEIGHT = 0.5
"""Weight of BM25 if `fusion.weight` is not set and no weight was tuned."""
MIN_DEPTH = 100
"""Each of the two lists has at least this many passages: the best by the sum of both scores may be
among the first in neither of them."""


class Fusion:
    """Retrieval as `fusion` in the config describes it, for all stages, evaluation and asking."""

    def __init__(self, config: FusionConfig | None = None, terms: Terms | None = None) -> None:
        """`terms`: required unless the method is `none`, the default."""
        self.config, self.terms = config or FusionConfig(), terms
        self.weight = DEFAULT_WEIGHT if self.config.weight is None else self.config.weight
        """Weight of BM25 relative to the inner product, for the method `weighted`."""

    @classmethod
    def of(cls, run: Run, retriever: Path | None = None) -> "Fusion":
        """The fusion of a run, with the weight tuned for the retriever saved in `retriever` if
        `fusion.weight` is not set and it was measured."""
        config = run.config.fusion
        fusion = cls(config, run.terms if config.lexical else None)
        if config.tunes_weight and retriever is not None:
            tuned = tuned_weight(run.folder, retriever)
            fusion.weight = DEFAULT_WEIGHT if tuned is None else tuned
        return fusion

    @property
    def lexical(self) -> dict[str, Any]:
        """Settings of the BM25 that an index must contain; empty if it needs none."""
        return self.config.lexical

    def accepts(self, lexical: Mapping[str, Any]) -> bool:
        """Whether an index with these settings of BM25 can be searched."""
        return not self.lexical or self.lexical == lexical

    def retrieve(
        self,
        index: Index,
        query_emb_BD: np.ndarray,
        query_ids: Sequence[IntArray],
        k: int,
        own_row_B: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Rows of the k best passages per query, (B, k) int64, best first, padded with EMPTY.

        `query_ids`: wordpieces of each query without `[CLS]` and `[SEP]`. `own_row_B`: the row that
        each query was taken from, or a negative number; BM25 ignores it, because it would be found
        by every word. With `weighted` the passages of both lists are ranked by ⟨q, p⟩ + `scores`,
        with `ranks` by Σ 1 / (rank_constant + rank) (Cormack et al. 2009). Equal scores are in the
        order of the rows. Raises UserError if k exceeds the corpus.
        """
        if self.config.method == "none":
            return index.search(query_emb_BD, k)[1]
        depth = max(k, min(MIN_DEPTH, len(index)))
        _, dense_BK = index.search(query_emb_BD, depth)
        fused_BK = np.full((len(query_emb_BD), k), EMPTY, np.int64)
        for b, score_N in enumerate(self._lexical_scores(index, query_ids, own_row_B)):
            lists = np.array(filled(dense_BK[b]), np.int64), best_rows(score_N, depth)
            row_R = np.unique(np.concatenate(lists))
            if self.config.method == "ranks":
                fused_R = reciprocal_ranks(row_R, lists, self.config.rank_constant)
            else:
                fused_R = index.embeddings(row_R) @ query_emb_BD[b] + self.weight * score_N[row_R]
            best = row_R[np.argsort(-fused_R, kind="stable")][:k]
            fused_BK[b, : len(best)] = best
        return fused_BK

    def scores(
        self,
        index: Index,
        query_ids: Sequence[IntArray],
        row_BK: np.ndarray,
        own_row_B: Sequence[int] | None = None,
    ) -> np.ndarray:
        """What is added to the inner products of given rows, (B, K) float32.

        p(z|x) is the softmax of (⟨q, p⟩ + score) / τ. With `weighted` the score is `weight` times
        the BM25 score divided by the query's largest one; 0 with the other methods, for queries
        without a term of the corpus, and for negative rows. `own_row_B`: as in `retrieve`.
        """
        score_BK = np.zeros(row_BK.shape, np.float32)
        if self.config.method == "weighted":
            for b, score_N in enumerate(self._lexical_scores(index, query_ids, own_row_B)):
                score_BK[b] = np.where(row_BK[b] >= 0, self.weight * score_N[row_BK[b]], 0.0)
        return score_BK

    def _lexical_scores(
        self, index: Index, query_ids: Sequence[IntArray], own_row_B: Sequence[int] | None
    ) -> Iterator[np.ndarray]:
        """BM25 scores of all rows, (N,), for each query, divided by the largest one."""
        assert self.terms is not None and index.lexical is not None
        for b, ids in enumerate(query_ids):
            score_N = index.lexical.scores(self.terms(ids))
            if own_row_B is not None and own_row_B[b] >= 0:
                score_N[own_row_B[b]] = 0.0
            largest = score_N.max(initial=0.0)
            yield score_N / largest if largest > 0 else score_N


def reciprocal_ranks(row_R: np.ndarray, lists: Sequence[np.ndarray], constant: int) -> np.ndarray:
    """Σ 1 / (constant + rank) of each row over the lists that contain it, (R,); the first rank is
    1, `row_R` is ascending (Cormack et al. 2009)."""
    score_R = np.zeros(len(row_R))
    for rows in lists:
        score_R[np.searchsorted(row_R, rows)] += 1.0 / (constant + 1.0 + np.arange(len(rows)))
    return score_R


def open_lexical(run: Run) -> LexicalIndex:
    """BM25 over the run's passages, whether its retrieval is fused or not; built once, in
    `frozen/lexical`, with the settings of `fusion`."""
    return LexicalIndex.open(on_rank_zero(lambda: lexical_files(run)))


def lexical_files(run: Run) -> Path:
    """The folder of `open_lexical`, for a single rank."""
    folder = lexical_of_run(run.folder)
    prepare_lexical(folder, run.folder, run.passages, run.terms, run.config.fusion.bm25)
    return folder / LEXICAL_FOLDER
