"""Retention: reader pins, checkpoint references, the grace period and leftovers of crashes."""

import subprocess
from pathlib import Path

import pytest

from index.retention import GarbageCollector, VersionPin, is_pinned, remove_leftovers
from realm.runtime.versions import Lineage, Version, start_attempt, versions_in


@pytest.fixture
def store(tmp_path: Path) -> Path:
    start_attempt(tmp_path)
    for step in (100, 200, 300, 400):
        (tmp_path / "indexes" / Version(1, step, 1).name).mkdir(parents=True)
    return tmp_path


def steps(store: Path) -> list[int]:
    return [version.step for version in versions_in(store / "indexes")]


def collect(store: Path, keep_last: int = 2, grace_s: float = 0.0) -> list[int]:
    return sorted(
        version.step for version in GarbageCollector(store, keep_last, grace_s).collect(Lineage.load(store), 1)
    )


def test_the_newest_versions_are_kept(store: Path) -> None:
    assert collect(store) == [100, 200]
    assert steps(store) == [300, 400]
    assert collect(store) == []


def test_a_pinned_version_is_kept_until_the_pin_is_released(store: Path) -> None:
    pin = VersionPin(store, Version(1, 100, 1))
    assert collect(store) == [200]
    pin.release()
    assert collect(store) == [100]
    assert steps(store) == [300, 400]


def test_a_pin_of_a_dead_process_is_ignored(store: Path) -> None:
    pin = VersionPin(store, Version(1, 100, 1))
    child = subprocess.Popen(["true"])
    child.wait()
    host, _, unique = pin._file.name.rsplit(".", 2)
    pin._file.rename(pin._file.with_name(f"{host}.{child.pid}.{unique}"))
    assert not is_pinned(store, Version(1, 100, 1))
    (store / "refresher" / "holds" / "a01-step-000100-e1" / f"elsewhere.example.{child.pid}.{unique}").touch()
    assert is_pinned(store, Version(1, 100, 1)), "processes of other hosts cannot be checked"


def test_a_version_referenced_by_a_checkpoint_is_kept(store: Path) -> None:
    checkpoint = store / "pretrain" / "checkpoints" / "step-000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index_version").write_text("a01-step-000100-e1\n")
    assert collect(store) == [200]


def test_versions_are_kept_during_the_grace_period(store: Path) -> None:
    collector = GarbageCollector(store, keep_last=2, grace_s=3600.0)
    assert collector.collect(Lineage.load(store), 1) == []
    assert collector.collect(Lineage.load(store), 1) == []
    assert steps(store) == [100, 200, 300, 400]


def test_abandoned_versions_do_not_count_among_the_newest(store: Path) -> None:
    attempt = start_attempt(store, parent=1, parent_step=200)
    removed = GarbageCollector(store, 2, 0.0).collect(Lineage.load(store), attempt)
    assert sorted(version.step for version in removed) == [300, 400]
    assert steps(store) == [100, 200]


def test_a_pin_taken_while_the_version_is_moved_aside_keeps_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def pin_before_rename(path: Path, target: Path) -> Path:
        if path.name == "a01-step-000100-e1":
            VersionPin(store, Version(1, 100, 1))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", pin_before_rename)
    assert collect(store) == [200]
    assert steps(store) == [100, 300, 400]


def test_leftovers_are_removed_and_versions_kept(store: Path) -> None:
    (store / "indexes" / ".tmp-a01-step-000500-e1-123").mkdir()
    (store / "indexes" / ".tmp-a01-step-000500-e1-123" / "passages.index").touch()
    (store / "refresher").mkdir()
    (store / "refresher" / ".tmp-log").touch()
    assert len(remove_leftovers(store)) == 2
    assert steps(store) == [100, 200, 300, 400]
    assert remove_leftovers(store) == []
