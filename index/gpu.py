"""Clustering and searching on a GPU by FAISS where its GPU build is at hand; without it, exact search by tiled products and top-k through torch.

Shape legend: B queries, K results a query, T rows of a tile, N passages, D dimension of the embeddings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import faiss
import numpy as np
import torch

from realm.errors import UserError

_TILE_ROWS = 262_144


class Searcher(Protocol):
    """What finds the rows with the largest inner products."""

    def search(self, query_emb_BD: np.ndarray, k: int, /) -> tuple[np.ndarray, np.ndarray]:
        """`scores_BK` float32 and `rows_BK` int64, best first."""


class TiledExact:
    """Exact inner-product search; the embeddings lie on `device` as float32."""

    def __init__(self, embeddings_ND: np.ndarray, device: torch.device, tile_rows: int = _TILE_ROWS) -> None:
        self.embeddings_ND = torch.empty(embeddings_ND.shape, dtype=torch.float32, device=device)
        for start in range(0, len(embeddings_ND), tile_rows):  # never a second copy of the whole
            tile = np.array(embeddings_ND[start : start + tile_rows], dtype=np.float32)
            self.embeddings_ND[start : start + len(tile)] = torch.from_numpy(tile).to(device)
        self.tile_rows = tile_rows

    def search(self, query_emb_BD: np.ndarray, k: int, /) -> tuple[np.ndarray, np.ndarray]:
        """The best k of each tile, then the best of those; of equal scores any may come first."""
        with torch.inference_mode():
            query_BD = torch.from_numpy(query_emb_BD).to(self.embeddings_ND.device)
            score_BK = query_BD.new_empty(len(query_BD), 0)
            row_BK = torch.empty(len(query_BD), 0, dtype=torch.int64, device=query_BD.device)
            for start in range(0, len(self.embeddings_ND), self.tile_rows):
                tile_BT = query_BD @ self.embeddings_ND[start : start + self.tile_rows].T
                best_BK, at_BK = tile_BT.topk(min(k, tile_BT.shape[1]), dim=1)
                score_BK, row_BK = torch.cat((score_BK, best_BK), 1), torch.cat((row_BK, at_BK + start), 1)
                score_BK, order_BK = score_BK.topk(min(k, score_BK.shape[1]), dim=1)
                row_BK = row_BK.gather(1, order_BK)
        return score_BK.cpu().numpy(), row_BK.cpu().numpy()


@contextmanager
def clustering_on_gpu(index: faiss.Index) -> Iterator[None]:
    """Within it the clustering of inverted lists, most of what training takes, runs on the current GPU where FAISS sees one."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None or not _num_gpus():
        yield
        return
    resources = faiss.StandardGpuResources()
    assign = faiss.index_cpu_to_gpu(resources, torch.cuda.current_device(), faiss.IndexFlat(inverted.d, inverted.metric_type))
    inverted.clustering_index = assign  # FAISS keeps no reference of its own
    try:
        yield
    finally:
        inverted.clustering_index = None  # type: ignore[assignment]


def _num_gpus() -> int:
    """GPUs that FAISS can use; its CPU build does not know the question."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def on_gpu(index: faiss.Index) -> Searcher:
    """The same vectors, searched on the current GPU.

    Raises UserError where there is no GPU, or none that this kind of index can be searched on.
    """
    if not torch.cuda.is_available():
        raise UserError("refresh.search_on is gpu, and this machine has none; set it to cpu.")
    if _num_gpus():
        resources = faiss.StandardGpuResources()
        try:
            moved = faiss.index_cpu_to_gpu(resources, torch.cuda.current_device(), index)
        except RuntimeError as error:
            raise UserError(f"this kind of index cannot be searched on a GPU ({error}); set refresh.search_on to cpu.") from error
        moved.realm_resources = resources  # type: ignore[attr-defined]  # they must live as long as the index
        return moved
    return TiledExact(vectors(index), torch.device("cuda"))


def vectors(index: faiss.Index) -> np.ndarray:
    """The vectors of a flat index, (N, D), without copying. Raises UserError for any other."""
    flat = faiss.downcast_index(index)
    if not isinstance(flat, faiss.IndexFlat):
        raise UserError('without the GPU build of FAISS only factory "Flat" is searched on a GPU; install it, or set refresh.search_on to cpu.')
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
