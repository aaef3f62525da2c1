import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from index.build import IndexManifest, build_index, write_version
from index.retention import is_pinned
from index.search import IndexRefused, IndexWatcher, PassageIndex
from realm.errors import UserError
from realm.runtime.publish import checksum
from realm.runtime.versions import Version, start_attempt

RNG = np.random.default_rng(0)
COUNT, DIM = 500, 16
EMBEDDINGS_ND = RNG.standard_normal((COUNT, DIM)).astype(np.float32)
QUERIES_BD = RNG.standard_normal((7, DIM)).astype(np.float32)


def publish(
    folder: Path, version: Version, emb_ND: np.ndarray = EMBEDDINGS_ND, factory: str = "Flat", **changes: object
) -> Path:
    index = build_index(emb_ND, factory)
    fields = {
        "encoder": version.encoder.name,
        "encoder_checksum": "unknown",
        "corpus": "corpus",
        "tokenizer": "tokenizer",
        "dim": index.d,
        "count": index.ntotal,
        "factory": factory,
        "seconds": {},
        "created_at": "2020-01-01T00:00:00+00:00",
    }
    return write_version(folder, version, index, IndexManifest(**{**fields, **changes}))  # type: ignore[arg-type]


def brute_force(k: int) -> tuple[np.ndarray, np.ndarray]:
    scores_BN = QUERIES_BD @ EMBEDDINGS_ND.T
    rows_BK = np.argsort(-scores_BN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_BN, rows_BK, 1), rows_BK


@pytest.mark.parametrize("k", [1, 8, COUNT])
def test_flat_search_is_brute_force(tmp_path: Path, k: int) -> None:
    index = PassageIndex.open(
        publish(tmp_path, Version(1, 500, 1)), "corpus", dim=DIM, tokenizer_fingerprint="tokenizer", threads=1
    )
    scores_BK, rows_BK = index.search(QUERIES_BD, k)
    expected_scores_BK, expected_rows_BK = brute_force(k)
    np.testing.assert_array_equal(rows_BK, expected_rows_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=1e-4, atol=1e-4)
    assert (index.version, index.step, len(index)) == (Version(1, 500, 1), 500, COUNT)


def test_inner_product_not_distance(tmp_path: Path) -> None:
    ones_D = np.ones(DIM, dtype=np.float32)
    folder = publish(tmp_path, Version(1, 0, 1), np.stack([ones_D, 2 * ones_D]))
    _, rows_BK = PassageIndex.open(folder, "corpus").search(np.stack([ones_D, -ones_D]), 1)
    assert rows_BK.tolist() == [[1], [0]]


@pytest.mark.parametrize("factory", ["SQ8", "IVF4,Flat", "HNSW16", "PCA12,Flat"])
def test_other_factories_search_mapped(tmp_path: Path, factory: str) -> None:
    index = PassageIndex.open(publish(tmp_path, Version(1, 500, 1), factory=factory), "corpus")
    _, rows_BK = index.search(EMBEDDINGS_ND[:50] * 4, 5)
    _, exact_BK = PassageIndex.open(publish(tmp_path, Version(1, 500, 2)), "corpus").search(EMBEDDINGS_ND[:50] * 4, 5)
    found = np.mean([np.isin(exact, rows).mean() for exact, rows in zip(exact_BK, rows_BK, strict=True)])
    assert found > 0.3


def test_k_beyond_the_corpus_names_both(tmp_path: Path) -> None:
    index = PassageIndex.open(publish(tmp_path, Version(1, 500, 1)), "corpus")
    with pytest.raises(UserError, match=r"k = 501 .* only 500"):
        index.search(QUERIES_BD, 501)


def test_a_flat_index_is_mapped_not_copied(tmp_path: Path) -> None:
    folder = publish(tmp_path, Version(1, 500, 1), np.ones((500_000, DIM), dtype=np.float32))
    before = _own_memory()
    index = PassageIndex.open(folder, "corpus")
    index.search(QUERIES_BD[:1], 1)
    assert _own_memory() - before < 8_000_000, "32 MB of vectors must not be copied"


def _own_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def _truncate(folder: Path) -> None:
    path = folder / "passages.index"
    path.write_bytes(path.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    path = folder / "passages.index"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "corpus": "corpus", "count": 499}))


DAMAGES = [(_truncate, "bytes"), (_flip, "checksum"), (_remove_manifest, "missing"), (_edit_manifest, "altered")]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_broken_index_is_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    folder = publish(tmp_path, Version(1, 500, 1))
    damage(folder)
    with pytest.raises(IndexRefused, match=reason):
        PassageIndex.open(folder, "corpus")


def test_any_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    folder = publish(tmp_path, Version(1, 500, 1), EMBEDDINGS_ND[:20])
    sound = PassageIndex.open(folder, "corpus").search(QUERIES_BD, 5)[1]
    for path in (folder / "passages.index", folder / "manifest.json"):
        data = path.read_bytes()
        for _ in range(60):
            broken, position = bytearray(data), int(RNG.integers(len(data)))
            broken[position] ^= 1 << int(RNG.integers(8))
            path.unlink()  # a mapped file must not change under its reader
            path.write_bytes(bytes(broken))
            with suppress(IndexRefused):
                np.testing.assert_array_equal(PassageIndex.open(folder, "corpus").search(QUERIES_BD, 5)[1], sound)
        path.unlink()
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ({"corpus_fingerprint": "other"}, r"another corpus \(corpus, expected other\)"),
        ({"corpus_fingerprint": "corpus", "dim": 32}, "16 dimensions where the encoder gives 32"),
        ({"corpus_fingerprint": "corpus", "tokenizer_fingerprint": "other"}, "another tokenizer"),
    ],
)
def test_a_foreign_index_is_refused(tmp_path: Path, expected: dict, reason: str) -> None:
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


@pytest.fixture
def started(tmp_path: Path) -> Path:
    start_attempt(tmp_path)
    return tmp_path


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def watcher(started: Path, logged: list[str]) -> Iterator[IndexWatcher]:
    with IndexWatcher(started, 1, "corpus", dim=DIM, poll_s=0.02, log=logged.append) as watcher:
        yield watcher


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "nothing happened within ten seconds"
        time.sleep(0.01)


def test_the_watcher_hands_out_each_newer_version_once(started: Path, watcher: IndexWatcher) -> None:
    assert watcher.take() is None
    publish(started / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(min_step=500, timeout_s=10)
    assert watcher.ready == Version(1, 500, 1)
    first = watcher.take()
    assert first is not None and first.step == 500
    assert watcher.take() is None and watcher.ready is None
    assert watcher.wait_for(min_step=500, timeout_s=0), "what was taken counts"
    publish(started / "indexes", Version(1, 400, 1))
    publish(started / "indexes", Version(1, 1000, 1))
    assert watcher.wait_for(min_step=1000, timeout_s=10)
    second = watcher.take()
    assert second is not None and second.step == 1000
    np.testing.assert_array_equal(second.search(QUERIES_BD, 3)[1], brute_force(3)[1])


def test_waiting_is_bounded(watcher: IndexWatcher) -> None:
    started_at = time.monotonic()
    assert not watcher.wait_for(min_step=1, timeout_s=0.2)
    assert 0.2 <= time.monotonic() - started_at < 5


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_the_last_good_version_stays_and_a_refusal_is_logged_once(
    started: Path, watcher: IndexWatcher, logged: list[str], damage: Callable[[Path], None], reason: str
) -> None:
    publish(started / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(500, 10)
    good = watcher.take()
    broken = publish(started / "elsewhere", Version(1, 1000, 1))
    damage(broken)
    broken.rename(started / "indexes" / broken.name)
    publish(started / "elsewhere", Version(1, 900, 1), corpus="other").rename(
        started / "indexes" / "a01-step-000900-e1"
    )
    wait_until(lambda: len(watcher.refused) == 2)
    time.sleep(0.1)
    assert reason in watcher.refused["a01-step-001000-e1"] and "another corpus" in watcher.refused["a01-step-000900-e1"]
    assert [sum(version in line for line in logged) for version in ("a01-step-001000", "a01-step-000900")] == [1, 1]
    assert watcher.take() is None
    assert good is not None and good.search(QUERIES_BD, 3)[1].shape == (7, 3)
    publish(started / "indexes", Version(1, 950, 2))
    assert watcher.wait_for(950, 10), "an older sound one than the refused is still news"


def test_a_version_of_an_abandoned_future_is_not_taken(started: Path, logged: list[str]) -> None:
    publish(started / "indexes", Version(1, 500, 1))
    publish(started / "indexes", Version(1, 1000, 1))
    attempt = start_attempt(started, parent=1, parent_step=500)
    with IndexWatcher(started, attempt, "corpus", poll_s=0.02, log=logged.append) as watcher:
        assert not watcher.wait_for(min_step=501, timeout_s=0.3)
        taken = watcher.take()
        assert taken is not None and taken.version == Version(1, 500, 1)


def test_a_taken_version_is_held_until_it_is_closed(started: Path, watcher: IndexWatcher) -> None:
    publish(started / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(500, 10)
    index = watcher.take()
    assert index is not None and is_pinned(started, index.version)
    index.close()
    assert not is_pinned(started, index.version)


def test_an_untaken_version_gives_way_to_a_newer_one(started: Path, watcher: IndexWatcher) -> None:
    publish(started / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(500, 10)
    publish(started / "indexes", Version(1, 600, 1))
    assert watcher.wait_for(600, 10)
    assert not is_pinned(started, Version(1, 500, 1)) and is_pinned(started, Version(1, 600, 1))
    taken = watcher.take()
    assert taken is not None and taken.step == 600


def test_an_unexpected_failure_of_the_thread_reaches_the_trainer(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(PassageIndex, "open", broken)
    with IndexWatcher(started, 1, "corpus", poll_s=0.02) as watcher:
        publish(started / "indexes", Version(1, 500, 1))
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            watcher.wait_for(500, 10)
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            watcher.take()


def test_the_thread_ends(watcher: IndexWatcher) -> None:
    watcher.stop()
    assert "index-watcher" not in {thread.name for thread in threading.enumerate()}
