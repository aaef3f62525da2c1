"""Exact search by tiled products and top-k through torch, on any device: on a CPU several times as
fast as FAISS's flat index.

Shape legend: B queries, K results a query, T rows of a tile, N passages, D dimension of the
embeddings.
"""

from typing import Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from realm.errors import UserError

_TILE_ROWS = 262_144


class Searcher(Protocol):
    """What finds the rows with the largest inner products."""

    def search(self, query_emb_BD: np.ndarray, k: int, /) -> tuple[np.ndarray, np.ndarray]:
        """`scores_BK` float32 and `rows_BK` int64, best first."""


class TiledExact:
    """Exact inner-product search among embeddings where they lie."""

    def __init__(self, embeddings_ND: Tensor, tile_rows: int = _TILE_ROWS) -> None:
        self.embeddings_ND, self.tile_rows = embeddings_ND, tile_rows

    def search(self, query_emb_BD: np.ndarray, k: int, /) -> tuple[np.ndarray, np.ndarray]:
        """The best k of each tile, then the best of those; of equal scores any may come first."""
        device = self.embeddings_ND.device
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            query_BD = torch.from_numpy(query_emb_BD).to(device)
            score_BK = query_BD.new_empty(len(query_BD), 0)
            row_BK = torch.empty(len(query_BD), 0, dtype=torch.int64, device=device)
            for start in range(0, len(self.embeddings_ND), self.tile_rows):
                tile_BT = query_BD @ self.embeddings_ND[start : start + self.tile_rows].T
                best_BK, at_BK = tile_BT.topk(min(k, tile_BT.shape[1]), dim=1)
                score_BK, row_BK = torch.cat((score_BK, best_BK), 1), torch.cat((row_BK, at_BK + start), 1)
                score_BK, order_BK = score_BK.topk(min(k, score_BK.shape[1]), dim=1)
                row_BK = row_BK.gather(1, order_BK)
        return score_BK.cpu().numpy(), row_BK.cpu().numpy()


def is_flat(index: faiss.Index) -> bool:
    """Whether the index holds its vectors as they are, and no more."""
    return isinstance(faiss.downcast_index(index), faiss.IndexFlat)


def vectors(index: faiss.Index) -> np.ndarray:
    """The vectors of a flat index, (N, D), without copying: they end with the index. Raises
    UserError for any other."""
    flat = faiss.downcast_index(index)
    if not isinstance(flat, faiss.IndexFlat):
        raise UserError(
            'without the GPU build of FAISS only factory "Flat" is searched on a GPU; install it, or set refresh.search_on to cpu.'
        )
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)


def to_device(embeddings_ND: np.ndarray, device: torch.device, tile_rows: int = _TILE_ROWS) -> Tensor:
    """A float32 copy on `device`, tile by tile: never a second copy of the whole on this side."""
    copy_ND = torch.empty(embeddings_ND.shape, dtype=torch.float32, device=device)
    for start in range(0, len(embeddings_ND), tile_rows):
        tile = np.array(embeddings_ND[start : start + tile_rows], dtype=np.float32)
        copy_ND[start : start + len(tile)] = torch.from_numpy(tile).to(device)
    return copy_ND
