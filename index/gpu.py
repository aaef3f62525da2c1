"""Cluster and search on a GPU with FAISS's GPU build; without that build, exact search in torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import torch

from index.exact import Searcher, TiledExactSearch, copy_to_device, flat_vectors
from realm.errors import UserError
from realm.runtime.distributed import local_device


@contextmanager
def clustering_on_gpu(index: faiss.Index) -> Iterator[None]:
    """Run the clustering of inverted lists, most of an index's training time, on this process's GPU
    if FAISS sees one."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None or not _num_gpus():
        yield
        return
    resources = faiss.StandardGpuResources()
    centroid_index = faiss.index_cpu_to_gpu(
        resources, local_device().index, faiss.IndexFlat(inverted.d, inverted.metric_type)
    )
    inverted.clustering_index = centroid_index  # FAISS does not keep its own reference
    try:
        yield
    finally:
        inverted.clustering_index = None  # type: ignore[assignment]


def _num_gpus() -> int:
    """GPUs visible to FAISS; its CPU build has no such function."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def move_to_gpu(index: faiss.Index) -> Searcher:
    """Copy an index to this process's GPU for searching.

    The device is `local_device()`, not torch's current device, which is per thread. Raises
    UserError if there is no GPU, or if this kind of index cannot be searched on one.
    """
    if not torch.cuda.is_available():
        raise UserError("refresh.search_on is gpu, but this machine has no GPU; set it to cpu.")
    if _num_gpus():
        resources = faiss.StandardGpuResources()
        try:
            moved = faiss.index_cpu_to_gpu(resources, local_device().index, index)
        except RuntimeError as error:
            raise UserError(
                f"FAISS cannot search this kind of index on a GPU ({error}); set refresh.search_on to cpu."
            ) from error
        moved.realm_resources = resources  # type: ignore[attr-defined]  # must live as long as the index
        return moved
    return TiledExactSearch(copy_to_device(flat_vectors(index), local_device()))
