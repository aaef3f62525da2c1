"""Tiled exact search equals FAISS's; an index that cannot be searched on a GPU is refused."""

import faiss
import numpy as np
import pytest
import torch

from index.build import build_index
from index.exact import TiledExactSearch, copy_to_device, flat_vectors
from index.gpu import move_to_gpu
from realm.errors import UserError

RNG = np.random.default_rng(0)
EMBEDDINGS_ND = RNG.standard_normal((1000, 12)).astype(np.float32)
QUERIES_BD = RNG.standard_normal((7, 12)).astype(np.float32)


@pytest.mark.parametrize("tile_rows", [1, 13, 500, 1000, 5000])
@pytest.mark.parametrize("k", [1, 5, 40, 1000])
def test_tiled_search_equals_a_flat_index(tile_rows: int, k: int) -> None:
    if tile_rows == 1 and k > 40:
        pytest.skip("slow, and covered by smaller k")
    embeddings_ND = copy_to_device(EMBEDDINGS_ND, torch.device("cpu"), tile_rows)
    scores, rows = TiledExactSearch(embeddings_ND, tile_rows).search(QUERIES_BD, k)
    exact_scores, exact_rows = build_index(EMBEDDINGS_ND).search(QUERIES_BD, k)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, exact_rows)
    np.testing.assert_allclose(scores, exact_scores, rtol=1e-5, atol=1e-5)


def test_the_vectors_of_a_flat_index_are_not_copied() -> None:
    index = build_index(EMBEDDINGS_ND)
    view = flat_vectors(index)
    np.testing.assert_array_equal(view, EMBEDDINGS_ND)
    assert view.ctypes.data == int(faiss.downcast_index(index).get_xb())
    with pytest.raises(UserError, match="search_on to cpu"):
        flat_vectors(build_index(EMBEDDINGS_ND, "SQ8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_search_on_gpu_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="this machine has no GPU"):
        move_to_gpu(build_index(EMBEDDINGS_ND))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_gpu_search_equals_cpu_search() -> None:
    index = build_index(EMBEDDINGS_ND)
    rows = move_to_gpu(index).search(QUERIES_BD, 5)[1]
    np.testing.assert_array_equal(rows, index.search(QUERIES_BD, 5)[1])


@pytest.mark.parametrize("factory", ["IVF8,Flat", "OPQ4_8,IVF8,PQ4x4"])
def test_gpu_clustering_equals_cpu_clustering(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU index of the same kind stands in for the GPU; the reference to it is cleared after
    training."""
    cpu_index, moved = build_index(EMBEDDINGS_ND, factory), []

    def to_gpu(resources: object, device: int, index: faiss.Index) -> faiss.Index:
        moved.append(index)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    index = build_index(EMBEDDINGS_ND, factory)
    assert len(moved) == 1 and moved[0].ntotal == 8, "the centroids were trained on it"
    assert faiss.extract_index_ivf(index).clustering_index is None
    for ours, theirs in zip(index.search(QUERIES_BD, 5), cpu_index.search(QUERIES_BD, 5), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
