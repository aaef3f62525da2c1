"""Clustering and searching on a GPU by FAISS where its GPU build is at hand; without it, exact
search through torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import torch

from index.exact import Searcher, TiledExact, to_device, vectors
from realm.errors import UserError
from realm.runtime.distributed import local_device


@contextmanager
def clustering_on_gpu(index: faiss.Index) -> Iterator[None]:
    """Within it the clustering of inverted lists, most of what training takes, runs on this
    process's GPU where FAISS sees one."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None or not _num_gpus():
        yield
        return
    resources = faiss.StandardGpuResources()
    assign = faiss.index_cpu_to_gpu(resources, local_device().index, faiss.IndexFlat(inverted.d, inverted.metric_type))
    inverted.clustering_index = assign  # FAISS keeps no reference of its own
    try:
        yield
    finally:
        inverted.clustering_index = None  # type: ignore[assignment]


def _num_gpus() -> int:
    """GPUs that FAISS can use; its CPU build does not know the question."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def on_gpu(index: faiss.Index) -> Searcher:
    """The same vectors, searched on this process's GPU: not on the current one, which each thread
    has of its own.

    Raises UserError where there is no GPU, or none that this kind of index can be searched on.
    """
    if not torch.cuda.is_available():
        raise UserError("refresh.search_on is gpu, and this machine has none; set it to cpu.")
    if _num_gpus():
        resources = faiss.StandardGpuResources()
        try:
            moved = faiss.index_cpu_to_gpu(resources, local_device().index, index)
        except RuntimeError as error:
            raise UserError(
                f"this kind of index cannot be searched on a GPU ({error}); set refresh.search_on to cpu."
            ) from error
        moved.realm_resources = resources  # type: ignore[attr-defined]  # they must live as long as the index
        return moved
    return TiledExact(to_device(vectors(index), local_device()))
