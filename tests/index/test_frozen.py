"""The index of a frozen retriever: built once, reused, published for a trainer, pinned in use."""

import numpy as np
import pytest

from index.frozen import frozen_index, publish_frozen
from index.retention import is_pinned
from index.search import PassageIndex
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever
from realm.runtime.publish import checksum
from realm.runtime.versions import Version, start_attempt
from tests.tiny import prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("frozen"))


def test_it_is_built_once_reused_and_pinned(run: Run) -> None:
    retriever = build_initial_retriever(run)
    assert build_initial_retriever(run) == retriever and checksum(retriever) == checksum(build_initial_retriever(run))
    lines: list[str] = []
    first = frozen_index(run.folder, retriever, run.passages, run.config.refresh, lines.append)
    assert len(first) == len(run.passages) and any("published" in line for line in lines)
    lines.clear()
    again = frozen_index(run.folder, retriever, run.passages, run.config.refresh, lines.append)
    assert again.version == first.version and lines == [], "it is not built a second time"
    store = run.folder / "frozen" / checksum(retriever)[:12]
    assert is_pinned(store, first.version)
    first.close()
    again.close()
    assert not is_pinned(store, first.version)


def test_it_is_published_for_a_trainer_with_the_same_retriever_only(run: Run) -> None:
    retriever = build_initial_retriever(run)
    frozen = frozen_index(run.folder, retriever, run.passages, run.config.refresh)
    attempt = start_attempt(run.folder)
    encoder = Version(attempt, 0)
    assert publish_frozen(run.folder, retriever, run.passages, run.config.refresh, encoder)
    first = PassageIndex.open(run.folder / "indexes" / encoder.with_epoch(0).name, run.passages.fingerprint)
    np.testing.assert_array_equal(first.embeddings(np.arange(5)), frozen.embeddings(np.arange(5)))
    assert first.manifest.encoder == encoder.name and first.manifest.encoder_checksum == checksum(retriever)
    other = run.folder / "other"
    other.mkdir()
    (other / "retriever.json").write_text("{}")
    assert not publish_frozen(run.folder, other, run.passages, run.config.refresh, Version(attempt, 1)), (
        "another retriever has other embeddings"
    )
