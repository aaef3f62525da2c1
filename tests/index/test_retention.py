"""Retention: reader pins, checkpoint references, the grace period and leftovers of crashes."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from index.replay import request_exports
from index.retention import GarbageCollector, VersionPin, is_pinned, process_name, remove_leftovers
from realm.runtime.versions import Version, start_attempt, versions_in


@pytest.fixture
def store(tmp_path: Path) -> Path:
    start_attempt(tmp_path)
    (tmp_path / "refresher").mkdir()
    for step in (100, 200, 300, 400):
        (tmp_path / "indexes" / Version(1, step, 1).name).mkdir(parents=True)
    return tmp_path


def steps(store: Path) -> list[int]:
    return [version.step for version in versions_in(store / "indexes")]


def collect(store: Path, keep_last: int = 2, grace_s: float = 0.0) -> list[int]:
    return sorted(version.step for version in GarbageCollector(store, keep_last, grace_s).collect())


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


def write_checkpoint(store: Path, step: int, content: bytes = b"a01-step-000100-e1\n") -> None:
    checkpoint = store / "pretrain" / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index_version").write_bytes(content)


def test_a_version_referenced_by_a_checkpoint_is_kept(store: Path) -> None:
    write_checkpoint(store, 150)
    assert collect(store) == [200]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a01-step-000100", b"nonsense\n"], ids=repr)
def test_a_damaged_reference_does_not_stop_the_collection(store: Path, content: bytes) -> None:
    write_checkpoint(store, 150, content)
    (store / "pretrain" / "checkpoints" / "step-x").mkdir()
    (store / "pretrain" / "checkpoints" / "step-x" / "index_version").mkdir()
    assert collect(store) == [100, 200]


def test_encoders_from_which_a_resume_may_need_an_index_are_kept(store: Path) -> None:
    for step in (50, 100, 150, 200, 250, 300, 350, 400, 450):
        (store / "encoders" / Version(1, step).name).mkdir(parents=True)
    write_checkpoint(store, 220)
    collect(store)
    kept = [version.step for version in versions_in(store / "encoders")]
    assert kept == [100, 150, 200, 300, 400, 450], "those from the checkpoint's index on; newer ones are exported again"


def test_shards_of_a_removed_encoder_are_removed(store: Path) -> None:
    for step, exists in ((300, True), (350, True), (450, False)):
        (store / "refresher" / Version(1, step).name).mkdir()
        if exists:
            (store / "encoders" / Version(1, step).name).mkdir(parents=True)
    assert collect(store, keep_last=4) == [350]
    assert [version.step for version in versions_in(store / "refresher")] == [300]


def test_a_removed_encoder_is_never_visible_in_part(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = store / "encoders" / "a01-step-000050"
    encoder.mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: pytest.fail(f"killed while removing {path}"))
    with pytest.raises(pytest.fail.Exception):
        collect(store, keep_last=4)
    monkeypatch.undo()
    assert not encoder.exists()
    assert len(remove_leftovers(store)) == 1 and not list(store.rglob(".tmp-*"))


def test_versions_are_kept_during_the_grace_period(store: Path) -> None:
    collector = GarbageCollector(store, keep_last=2, grace_s=3600.0)
    assert collector.collect() == []
    assert collector.collect() == []
    assert steps(store) == [100, 200, 300, 400]


def test_abandoned_versions_do_not_count_among_the_newest(store: Path) -> None:
    start_attempt(store, parent=1, parent_step=200)
    assert collect(store) == [300, 400]
    assert steps(store) == [100, 200]


@pytest.mark.parametrize(
    "need",
    [
        lambda store: VersionPin(store, Version(1, 100, 1)),
        lambda store: write_checkpoint(store, 150),
        lambda store: start_attempt(store, parent=1, parent_step=150),
        lambda store: request_exports(store, {7: 100}, 0),
    ],
    ids=["pin", "checkpoint", "resume", "replay"],
)
def test_a_version_needed_from_the_moment_it_is_moved_aside_is_kept(
    store: Path, monkeypatch: pytest.MonkeyPatch, need: Callable[[Path], object]
) -> None:
    rename = Path.rename

    def need_before_rename(path: Path, target: Path) -> Path:
        if path.name == "a01-step-000100-e1":
            need(store)
        return rename(path, target)

    (store / "indexes" / "a01-step-000200-e1").rmdir()
    monkeypatch.setattr(Path, "rename", need_before_rename)
    assert collect(store) == []
    assert steps(store) == [100, 300, 400]


def test_a_version_moved_aside_by_a_killed_collector_is_moved_back(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def kill_after_rename(path: Path, target: Path) -> Path:
        rename(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", kill_after_rename)
    with pytest.raises(KeyboardInterrupt):
        collect(store)
    monkeypatch.undo()
    assert steps(store) == [200, 300, 400]
    assert remove_leftovers(store) == []
    assert steps(store) == [100, 200, 300, 400]
    assert collect(store) == [100, 200], "the next collection decides again"


def test_the_target_of_a_symbolic_link_is_never_removed(store: Path) -> None:
    elsewhere = store / "elsewhere"
    for number, link in enumerate(("indexes/a01-step-000050-e1", "encoders/a01-step-000050", "indexes/.tmp-link")):
        target = elsewhere / str(number)
        target.mkdir(parents=True)
        (target / "file").touch()
        (store / link).parent.mkdir(exist_ok=True)
        (store / link).symlink_to(target)
    assert collect(store, keep_last=4) == [50, 50]
    assert len(remove_leftovers(store)) == 1
    assert len(list(elsewhere.glob("*/file"))) == 3


def test_files_that_are_not_pins_do_not_count(store: Path) -> None:
    holds = store / "refresher" / "holds" / "a01-step-000100-e1"
    holds.mkdir(parents=True)
    here = process_name()
    (holds / f"{here}.{'0' * 32}").mkdir()
    names = (b"notes.txt", b".nfs0001", b"a.b.c", b"\xff\xfe", b"x.99999999999999999999.short", here.encode())
    for name in names:
        (Path(os.fsdecode(bytes(holds) + b"/" + name))).touch()
    (holds / f"{here.rpartition('.')[0]}.{'9' * 20}.{'0' * 32}").write_bytes(b"\xff")
    assert not is_pinned(store, Version(1, 100, 1))
    assert collect(store) == [100, 200]


def test_a_pin_is_created_in_spite_of_a_collector_that_removes_its_folder(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch, holds = Path.touch, store / "refresher" / "holds" / "a01-step-000100-e1"

    def touch_after_collection(path: Path) -> None:
        monkeypatch.undo()
        shutil.rmtree(holds)
        touch(path)

    monkeypatch.setattr(Path, "touch", touch_after_collection)
    VersionPin(store, Version(1, 100, 1))
    assert is_pinned(store, Version(1, 100, 1))


def test_leftovers_are_removed_and_versions_kept(store: Path) -> None:
    (store / "indexes" / ".tmp-a01-step-000500-e1-123").mkdir()
    (store / "indexes" / ".tmp-a01-step-000500-e1-123" / "passages.index").touch()
    (store / "refresher" / ".tmp-log").touch()
    assert len(remove_leftovers(store)) == 2
    assert steps(store) == [100, 200, 300, 400]
    assert remove_leftovers(store) == []
