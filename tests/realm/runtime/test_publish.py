"""Atomic publishing, manifests and checksums."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from realm.runtime.publish import (
    PublishError,
    check_files,
    checksum,
    published,
    read_manifest,
    write_file_atomic,
    write_json_atomic,
    write_manifest,
)


def test_published_folder_appears_atomically(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "corpus"
    with published(final) as folder:
        (folder / "data").write_text("all of it")
        assert not final.exists()
        assert folder.stat().st_dev == final.parent.stat().st_dev
    assert (final / "data").read_text() == "all of it"
    assert [entry.name for entry in final.parent.iterdir()] == ["corpus"]


def test_a_full_disk_is_named_whatever_a_library_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_to_full_disk() -> None:
        with published(tmp_path / "model"):
            raise RuntimeError("unexpected pos 62336 vs 62224")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_to_full_disk()

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        write_to_full_disk()
    assert not list(tmp_path.iterdir())


def test_exception_removes_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), published(tmp_path / "corpus") as folder:
        (folder / "data").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_published_folder_is_never_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "corpus"
    with published(final) as folder:
        (folder / "data").write_text("first")
    with pytest.raises(PublishError, match="already exists"), published(final):
        pass
    assert (final / "data").read_text() == "first"


def test_concurrent_publishing_keeps_the_first(tmp_path: Path) -> None:
    final = tmp_path / "corpus"
    with pytest.raises(PublishError, match="another process"), published(final) as late:
        (late / "data").write_text("late")
        with published(final) as early:
            (early / "data").write_text("early")
    assert (final / "data").read_text() == "early"
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus"]


def test_kill_9_while_publishing_leaves_only_a_temporary_folder(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from realm.runtime.publish import published
        with published(Path(sys.argv[1])) as folder:
            (folder / "data").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    final = tmp_path / "corpus"
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(final)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not final.exists()
    assert [entry.name.startswith(".tmp-corpus") for entry in tmp_path.iterdir()] == [True]
    with published(final) as folder:
        (folder / "data").write_text("whole")
    assert (final / "data").read_text() == "whole"


def test_failed_atomic_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json_atomic(path, {"step": 1})

    def fail(file: object) -> None:
        file.write(b"ha")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file_atomic(path, fail)
    assert json.loads(path.read_text()) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    (folder / "part").mkdir(parents=True)
    (folder / "data").write_bytes(b"0123456789")
    (folder / "part" / "more").write_bytes(b"abc")
    write_manifest(folder, {"kind": "test"})
    return folder


def test_intact_folder_passes(artefact: Path) -> None:
    manifest = read_manifest(artefact)
    assert manifest["kind"] == "test"
    assert set(manifest["files"]) == {"data", "part/more"}
    check_files(artefact, manifest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "data").write_bytes(b"01234"), "has 5 bytes, but its manifest says 10"),
        (lambda folder: (folder / "part" / "more").write_bytes(b"abd"), "does not match the checksum"),
        (lambda folder: (folder / "data").unlink(), "data is missing"),
    ],
    ids=["truncated", "modified", "missing"],
)
def test_damaged_files_are_reported(artefact: Path, damage: object, message: str) -> None:
    damage(artefact)  # type: ignore[operator]
    with pytest.raises(PublishError, match=message):
        check_files(artefact, read_manifest(artefact))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"a"', "\ud83d".encode("utf-16", "surrogatepass").hex(), '{"kind": "test", "files": {}}']
)
def test_corrupt_manifest_is_refused(artefact: Path, text: str) -> None:
    (artefact / "manifest.json").write_text(text)
    with pytest.raises(PublishError, match=r"manifest\.json"):
        read_manifest(artefact)


def test_flipped_bits_of_a_manifest_are_detected_or_harmless(artefact: Path) -> None:
    path = artefact / "manifest.json"
    sound, manifest = path.read_bytes(), read_manifest(artefact)
    for position in range(len(sound)):
        broken = bytearray(sound)
        broken[position] ^= 1 << position % 8
        path.write_bytes(bytes(broken))
        with suppress(PublishError):
            assert read_manifest(artefact) == manifest


def test_checksum_of_a_folder_depends_only_on_names_and_contents(tmp_path: Path) -> None:
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        (tmp_path / name).mkdir()
        for file in order:
            (tmp_path / name / file).write_text(f"content of {file}")
    assert checksum(tmp_path / "a") == checksum(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "z")
    assert checksum(tmp_path / "a") != checksum(tmp_path / "b")
