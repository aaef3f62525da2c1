"""The index watcher: opening newer versions once, skipping refused ones, pins, failures."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from published_index import DAMAGES, DIM, QUERIES_BD, brute_force_search, publish

from index.retention import is_pinned
from index.search import PassageIndex
from index.watcher import IndexWatcher
from realm.runtime.versions import Version, start_attempt


@pytest.fixture
def run(tmp_path: Path) -> Path:
    start_attempt(tmp_path)
    return tmp_path


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def watcher(run: Path, logged: list[str]) -> Iterator[IndexWatcher]:
    with IndexWatcher(run, 1, "corpus", dim=DIM, poll_s=0.02, log=logged.append) as watcher:
        yield watcher


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met within 10 s"
        time.sleep(0.01)


def test_take_returns_each_newer_version_once(run: Path, watcher: IndexWatcher) -> None:
    assert watcher.take() is None
    publish(run / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(min_step=500, timeout_s=10)
    assert watcher.ready == Version(1, 500, 1)
    first = watcher.take()
    assert first is not None and first.step == 500
    assert watcher.take() is None and watcher.ready is None
    assert watcher.wait_for(min_step=500, timeout_s=0), "taken versions count"
    publish(run / "indexes", Version(1, 400, 1))
    publish(run / "indexes", Version(1, 1000, 1))
    assert watcher.wait_for(min_step=1000, timeout_s=10)
    second = watcher.take()
    assert second is not None and second.step == 1000
    np.testing.assert_array_equal(second.search(QUERIES_BD, 3)[1], brute_force_search(3)[1])


def test_wait_for_times_out(watcher: IndexWatcher) -> None:
    started_at = time.monotonic()
    assert not watcher.wait_for(min_step=1, timeout_s=0.2)
    assert 0.2 <= time.monotonic() - started_at < 5


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_the_last_valid_version_is_kept_and_a_refusal_is_logged_once(
    run: Path, watcher: IndexWatcher, logged: list[str], damage: Callable[[Path], None], reason: str
) -> None:
    publish(run / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(500, 10)
    valid = watcher.take()
    broken = publish(run / "elsewhere", Version(1, 1000, 1))
    damage(broken)
    broken.rename(run / "indexes" / broken.name)
    publish(run / "elsewhere", Version(1, 900, 1), corpus="other").rename(run / "indexes" / "a01-step-000900-e1")
    wait_until(lambda: len(watcher.refused) == 2)
    time.sleep(0.1)
    assert reason in watcher.refused["a01-step-001000-e1"] and "another corpus" in watcher.refused["a01-step-000900-e1"]
    assert [sum(version in line for line in logged) for version in ("a01-step-001000", "a01-step-000900")] == [1, 1]
    assert watcher.take() is None
    assert valid is not None and valid.search(QUERIES_BD, 3)[1].shape == (7, 3)
    publish(run / "indexes", Version(1, 950, 2))
    assert watcher.wait_for(950, 10), "a valid version is opened even if it is older than the refused one"


def test_a_version_abandoned_by_a_resume_is_not_taken(run: Path, logged: list[str]) -> None:
    publish(run / "indexes", Version(1, 500, 1))
    publish(run / "indexes", Version(1, 1000, 1))
    attempt = start_attempt(run, parent=1, parent_step=500)
    with IndexWatcher(run, attempt, "corpus", poll_s=0.02, log=logged.append) as watcher:
        assert not watcher.wait_for(min_step=501, timeout_s=0.3)
        taken = watcher.take()
        assert taken is not None and taken.version == Version(1, 500, 1)


def test_a_taken_version_is_pinned_until_it_is_closed(run: Path, watcher: IndexWatcher) -> None:
    publish(run / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(500, 10)
    index = watcher.take()
    assert index is not None and is_pinned(run, index.version)
    index.close()
    assert not is_pinned(run, index.version)


def test_a_version_not_taken_is_replaced_by_a_newer_one(run: Path, watcher: IndexWatcher) -> None:
    publish(run / "indexes", Version(1, 500, 1))
    assert watcher.wait_for(500, 10)
    publish(run / "indexes", Version(1, 600, 1))
    assert watcher.wait_for(600, 10)
    assert not is_pinned(run, Version(1, 500, 1)) and is_pinned(run, Version(1, 600, 1))
    taken = watcher.take()
    assert taken is not None and taken.step == 600


def test_an_unexpected_error_in_the_thread_is_raised_in_the_trainer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(PassageIndex, "open", broken)
    with IndexWatcher(run, 1, "corpus", poll_s=0.02) as watcher:
        publish(run / "indexes", Version(1, 500, 1))
        with pytest.raises(RuntimeError, match="a bug"):
            watcher.wait_for(500, 10)
        with pytest.raises(RuntimeError, match="a bug"):
            watcher.take()


def test_stop_ends_the_thread(watcher: IndexWatcher) -> None:
    watcher.stop()
    assert "index-watcher" not in {thread.name for thread in threading.enumerate()}
