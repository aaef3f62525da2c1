from pathlib import Path

import faiss
import numpy as np
import pytest

from index.build import IndexManifest, build_index, empty_index, write_version
from realm.errors import UserError
from realm.runtime.publish import PublishError
from realm.runtime.versions import Version

RNG = np.random.default_rng(0)
EMBEDDINGS_ND = RNG.standard_normal((600, 16)).astype(np.float32)


def manifest(index: faiss.Index, **changes: object) -> IndexManifest:
    fields = {
        "encoder": "a01-step-000500",
        "encoder_checksum": "e",
        "corpus": "corpus",
        "tokenizer": "tokenizer",
        "dim": index.d,
        "count": index.ntotal,
        "factory": "Flat",
        "seconds": {"build": 0.1},
        "created_at": "2020-01-01T00:00:00+00:00",
    }
    return IndexManifest(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF4,Flat", "PCA8,IVF4,PQ2x4"])
def test_the_index_does_not_depend_on_how_rows_are_split_into_shards(factory: str) -> None:
    whole = build_index(EMBEDDINGS_ND, factory, seed=3)
    shards = build_index([EMBEDDINGS_ND[:1], EMBEDDINGS_ND[1:401], EMBEDDINGS_ND[401:]], factory, seed=3)
    assert whole.ntotal == shards.ntotal == len(EMBEDDINGS_ND)
    assert whole.metric_type == faiss.METRIC_INNER_PRODUCT
    np.testing.assert_array_equal(whole.search(EMBEDDINGS_ND[:20], 5)[1], shards.search(EMBEDDINGS_ND[:20], 5)[1])


def test_the_training_sample_depends_only_on_the_seed() -> None:
    def centroids(seed: int) -> np.ndarray:
        index = build_index([EMBEDDINGS_ND[:77], EMBEDDINGS_ND[77:]], "IVF2,Flat", seed, training_rows=100)
        return faiss.downcast_index(index.quantizer).reconstruct_n(0, 2)

    np.testing.assert_array_equal(centroids(1), centroids(1))
    assert not np.array_equal(centroids(1), centroids(2))


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Flut", ['"Flut"', "could not parse"]),
        ("PQ7", ['"PQ7"', "16 dimensions", "multiple"]),
        ("IVF5000,Flat", ['"IVF5000,Flat"', "600 passages", "clusters"]),
        ("IDMap,Flat", ['"IDMap,Flat"']),
    ],
)
def test_an_invalid_factory_is_refused_in_one_sentence(factory: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_index(EMBEDDINGS_ND, factory)
    assert all(word in str(caught.value) for word in [*words, 'try "Flat"'])
    assert "\n" not in str(caught.value) and "faiss::" not in str(caught.value)


def test_a_version_reads_back(tmp_path: Path) -> None:
    index = build_index(EMBEDDINGS_ND)
    written = manifest(index)
    folder = write_version(tmp_path, Version(1, 500, 1), index, written)
    read, everything = IndexManifest.read(folder)
    assert read == written
    assert set(everything["files"]) == {"passages.index"}


def test_nothing_appears_when_the_lease_is_lost_at_the_last_moment(tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("lost")

    index = build_index(EMBEDDINGS_ND)
    with pytest.raises(RuntimeError, match="lost"):
        write_version(tmp_path, Version(1, 500, 1), index, manifest(index), lost)
    assert list(tmp_path.iterdir()) == []


def test_a_published_version_is_not_replaced(tmp_path: Path) -> None:
    index = build_index(EMBEDDINGS_ND)
    write_version(tmp_path, Version(1, 500, 1), index, manifest(index))
    with pytest.raises(PublishError, match="never change"):
        write_version(tmp_path, Version(1, 500, 1), index, manifest(index))


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "HNSW8", "IVF4,Flat", "IVF4,SQ8", "PCA8,IVF4,SQ8", "IVF4,PQ4x4fs,RFlat"]
)
def test_embeddings_are_read_back_by_row_from_the_mapped_file(factory: str, tmp_path: Path) -> None:
    index = build_index(EMBEDDINGS_ND, factory)
    faiss.write_index(index, str(tmp_path / "index"))
    mapped = faiss.read_index(str(tmp_path / "index"), faiss.IO_FLAG_MMAP_IFC)
    rows = np.array([599, 0, 77])
    back = mapped.reconstruct_batch(rows)
    if factory in ("Flat", "HNSW8", "IVF4,Flat", "IVF4,PQ4x4fs,RFlat"):
        np.testing.assert_array_equal(back, EMBEDDINGS_ND[rows])
    elif not factory.startswith("PCA"):
        assert np.abs(back - EMBEDDINGS_ND[rows]).max() < 0.05


def test_a_factory_that_cannot_reconstruct_vectors_is_refused() -> None:
    for factory in ("IVF4,PQ4x4fs", "PQ4x4fs", "PCA8,IVF4,PQ4x4fs"):
        with pytest.raises(UserError, match="RFlat"):
            empty_index(16, factory)


def test_search_parameters_are_set_and_invalid_ones_refused() -> None:
    def found(parameters: str) -> float:
        index = build_index(EMBEDDINGS_ND, "IVF20,Flat", parameters=parameters)
        exact = build_index(EMBEDDINGS_ND).search(EMBEDDINGS_ND[:50], 5)[1]
        return float((index.search(EMBEDDINGS_ND[:50], 5)[1] == exact).mean())

    assert found("nprobe=20") == 1.0 > found("nprobe=3") > found("")
    with pytest.raises(UserError, match="search parameters"):
        build_index(EMBEDDINGS_ND, "Flat", parameters="nprobe=3")
