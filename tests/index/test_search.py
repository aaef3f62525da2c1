"""Searching a published index, and refusing broken and foreign ones."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from published_index import COUNT, DAMAGES, DIM, EMBEDDINGS_ND, QUERIES_BD, RNG, brute_force_search, publish

from index.search import IndexRefused, PassageIndex
from realm.errors import UserError
from realm.runtime.publish import checksum
from realm.runtime.versions import Version


@pytest.mark.parametrize("k", [1, 8, COUNT])
def test_flat_search_equals_brute_force_search(tmp_path: Path, k: int) -> None:
    index = PassageIndex.open(
        publish(tmp_path, Version(1, 500, 1)), "corpus", dim=DIM, tokenizer_fingerprint="tokenizer", threads=1
    )
    scores_BK, rows_BK = index.search(QUERIES_BD, k)
    expected_scores_BK, expected_rows_BK = brute_force_search(k)
    np.testing.assert_array_equal(rows_BK, expected_rows_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=1e-4, atol=1e-4)
    assert (index.version, index.step, len(index)) == (Version(1, 500, 1), 500, COUNT)


def test_search_maximizes_the_inner_product(tmp_path: Path) -> None:
    ones_D = np.ones(DIM, dtype=np.float32)
    folder = publish(tmp_path, Version(1, 0, 1), np.stack([ones_D, 2 * ones_D]))
    _, rows_BK = PassageIndex.open(folder, "corpus").search(np.stack([ones_D, -ones_D]), 1)
    assert rows_BK.tolist() == [[1], [0]]


@pytest.mark.parametrize("factory", ["SQ8", "IVF4,Flat", "HNSW16", "PCA12,Flat"])
def test_other_factories_are_searched_memory_mapped(tmp_path: Path, factory: str) -> None:
    index = PassageIndex.open(publish(tmp_path, Version(1, 500, 1), factory=factory), "corpus")
    _, rows_BK = index.search(EMBEDDINGS_ND[:50] * 4, 5)
    _, exact_BK = PassageIndex.open(publish(tmp_path, Version(1, 500, 2)), "corpus").search(EMBEDDINGS_ND[:50] * 4, 5)
    found = np.mean([np.isin(exact, rows).mean() for exact, rows in zip(exact_BK, rows_BK, strict=True)])
    assert found > 0.3


def test_k_larger_than_the_corpus_is_refused(tmp_path: Path) -> None:
    index = PassageIndex.open(publish(tmp_path, Version(1, 500, 1)), "corpus")
    with pytest.raises(UserError, match=r"k = 501 .* only 500"):
        index.search(QUERIES_BD, 501)


def test_a_flat_index_is_mapped_not_copied(tmp_path: Path) -> None:
    folder = publish(tmp_path, Version(1, 500, 1), np.ones((500_000, DIM), dtype=np.float32))
    before = _anonymous_memory()
    index = PassageIndex.open(folder, "corpus")
    index.search(QUERIES_BD[:1], 1)
    assert _anonymous_memory() - before < 8_000_000, "the 32 MB of vectors must not be copied"


def _anonymous_memory() -> int:
    """Bytes of this process that are not backed by a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_broken_index_is_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    folder = publish(tmp_path, Version(1, 500, 1))
    damage(folder)
    with pytest.raises(IndexRefused, match=reason):
        PassageIndex.open(folder, "corpus")


def test_any_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    folder = publish(tmp_path, Version(1, 500, 1), EMBEDDINGS_ND[:20])
    expected = PassageIndex.open(folder, "corpus").search(QUERIES_BD, 5)[1]
    for path in (folder / "passages.index", folder / "manifest.json"):
        data = path.read_bytes()
        for _ in range(60):
            damaged, position = bytearray(data), int(RNG.integers(len(data)))
            damaged[position] ^= 1 << int(RNG.integers(8))
            path.unlink()  # a mapped file must not change under its reader
            path.write_bytes(bytes(damaged))
            with suppress(IndexRefused):
                np.testing.assert_array_equal(PassageIndex.open(folder, "corpus").search(QUERIES_BD, 5)[1], expected)
        path.unlink()
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ({"corpus_fingerprint": "other"}, r"another corpus \(corpus, expected other\)"),
        ({"corpus_fingerprint": "corpus", "dim": 32}, "16 dimensions, expected 32"),
        ({"corpus_fingerprint": "corpus", "tokenizer_fingerprint": "other"}, "another tokenizer"),
    ],
)
def test_an_index_of_another_corpus_or_encoder_is_refused(tmp_path: Path, expected: dict, reason: str) -> None:
    with pytest.raises(IndexRefused, match=reason):
        PassageIndex.open(publish(tmp_path, Version(1, 500, 1)), **expected)


def test_an_index_of_another_runs_encoder_is_refused(tmp_path: Path) -> None:
    encoder = tmp_path / "a01-step-000500"
    encoder.mkdir()
    (encoder / "weights").write_text("ours")
    folder = publish(tmp_path / "indexes", Version(1, 500, 1), encoder_checksum=checksum(encoder))
    PassageIndex.open(folder, "corpus", encoder=encoder)
    (encoder / "weights").write_text("theirs")
    with pytest.raises(IndexRefused, match="another encoder"):
        PassageIndex.open(folder, "corpus", encoder=encoder)
