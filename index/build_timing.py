"""Time to build an index of many passages, from the times of the parts of a small one."""

import time
from dataclasses import dataclass

import faiss
import numpy as np

from index.build import TRAINING_ROWS, add_rows, empty_index, index_bytes
from index.gpu import clustering_on_gpu

LIST_ROWS, CODE_ROWS = 20_000, 10_000
"""Rows to measure the clustering of inverted lists (at least one per list), and all else."""
MAX_CODE_ROWS = 65_536
"""Rows on which FAISS trains rotations and codebooks at most: 256 per entry of a codebook."""


@dataclass(frozen=True)
class BuildRate:
    """Time and size of an index as functions of the number of passages."""

    cluster_s: float
    """Seconds per training row to cluster the inverted lists, over all iterations."""
    max_cluster_rows: int
    """Rows on which FAISS clusters the lists at most: 256 per list."""
    codes_s: float
    """Seconds per training row of all other training: rotations, codebooks, ranges."""
    add_s: float
    """Seconds per passage to add it."""
    fixed_bytes: int
    """Size of the index without vectors: centroids, codebooks."""
    vector_bytes: float
    """Size per vector."""

    def seconds(self, passages: int) -> float:
        """Seconds to build an index: it is trained on a sample of limited size (`build_index`)."""
        rows = min(passages, TRAINING_ROWS)
        cluster = self.cluster_s * min(rows, self.max_cluster_rows)
        return cluster + self.codes_s * min(rows, MAX_CODE_ROWS) + self.add_s * passages

    def size(self, passages: int) -> int:
        """Size of the index in bytes."""
        return int(self.fixed_bytes + passages * self.vector_bytes)


def time_build(embeddings_ND: np.ndarray, factory: str) -> BuildRate:
    """Train and fill a small index with the embeddings, repeated with noise.

    Raises UserError if FAISS cannot create the index.
    """
    index = empty_index(embeddings_ND.shape[1], factory)
    inverted = faiss.try_extract_index_ivf(index)
    cluster_s = codes_s = 0.0
    max_cluster_rows = 0
    if inverted is not None:
        # One iteration; their number and the rows are those of FAISS's own call.
        clustering, rows = inverted.cp, max(LIST_ROWS, inverted.nlist)
        iterations, clustering.niter = clustering.niter, 1
        clustering.min_points_per_centroid = 1  # no warning
        max_cluster_rows = clustering.max_points_per_centroid * inverted.nlist
        vectors_ND = _vectors(embeddings_ND, rows)[:, : inverted.d]
        with clustering_on_gpu(index):
            began = time.monotonic()
            inverted.train_q1(  # type: ignore[attr-defined]  # absent from the stubs
                rows, faiss.swig_ptr(np.ascontiguousarray(vectors_ND)), False, inverted.metric_type
            )
            cluster_s = (time.monotonic() - began) * iterations / min(rows, max_cluster_rows)
    vectors_ND = _vectors(embeddings_ND, CODE_ROWS)
    if not index.is_trained:
        began = time.monotonic()
        index.train(vectors_ND)  # type: ignore[call-arg]  # FAISS's stubs describe the C++ class
        codes_s = (time.monotonic() - began) / len(vectors_ND)
    empty_bytes = index_bytes(index)
    began = time.monotonic()
    add_rows(index, [vectors_ND])
    add_s = (time.monotonic() - began) / len(vectors_ND)
    vector_bytes = (index_bytes(index) - empty_bytes) / len(vectors_ND)
    return BuildRate(cluster_s, max_cluster_rows, codes_s, add_s, empty_bytes, vector_bytes)


def _vectors(embeddings_ND: np.ndarray, rows: int) -> np.ndarray:
    """`rows` vectors of the embeddings' kind; their values hardly affect time and size."""
    noise_ND = np.random.default_rng(0).normal(0, 1e-2, (rows, embeddings_ND.shape[1]))
    return (np.resize(embeddings_ND, noise_ND.shape) + noise_ND).astype(np.float32)
