"""The index of a retriever that stands still: built once, found again, lent to a trainer, held
while it is read."""

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


def test_built_once_found_again_and_held(run: Run) -> None:
    retriever = build_initial_retriever(run)
    assert build_initial_retriever(run) == retriever and checksum(retriever) == checksum(build_initial_retriever(run))
    lines: list[str] = []
    first = frozen_index(run.folder, retriever, run.passages, run.config.refresh, lines.append)
    assert len(first) == len(run.passages) and any("published" in line for line in lines)
    lines.clear()
    again = frozen_index(run.folder, retriever, run.passages, run.config.refresh, lines.append)
    assert again.version == first.version and lines == [], "nothing is built a second time"
    store = run.folder / "frozen" / checksum(retriever)[:12]
    assert is_pinned(store, first.version)
    first.close()
    again.close()
    assert not is_pinned(store, first.version)


def test_a_trainer_starts_with_it_and_no_other_is_lent(run: Run) -> None:
    retriever = build_initial_retriever(run)
    frozen = frozen_index(run.folder, retriever, run.passages, run.config.refresh)
    attempt = start_attempt(run.folder)
    encoder = Version(attempt, 0)
    assert publish_frozen(run.folder, retriever, run.passages, run.config.refresh, encoder)
    lent = PassageIndex.open(run.folder / "indexes" / encoder.with_epoch(0).name, run.passages.fingerprint)
    np.testing.assert_array_equal(lent.embeddings(np.arange(5)), frozen.embeddings(np.arange(5)))
    assert lent.manifest.encoder == encoder.name and lent.manifest.encoder_checksum == checksum(retriever)
    other = run.folder / "other"
    other.mkdir()
    (other / "retriever.json").write_text("{}")
    assert not publish_frozen(run.folder, other, run.passages, run.config.refresh, Version(attempt, 1)), (
        "another retriever's passages are embedded otherwise"
    )
