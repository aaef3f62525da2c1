import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.runtime.publish import (
    Lineage,
    PublishError,
    Version,
    check_files,
    checksum,
    newest,
    published,
    read_manifest,
    start_attempt,
    versions_in,
    write_file_atomic,
    write_json_atomic,
    write_manifest,
)

versions = st.builds(Version, st.integers(0, 200), st.integers(0, 10**7), st.none() | st.integers(0, 200))


def test_a_published_folder_appears_whole_and_under_its_name_only(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "corpus"
    with published(final) as folder:
        (folder / "data").write_text("all of it")
        assert not final.exists()
        assert folder.stat().st_dev == final.parent.stat().st_dev
    assert (final / "data").read_text() == "all of it"
    assert [entry.name for entry in final.parent.iterdir()] == ["corpus"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), published(tmp_path / "corpus") as folder:
        (folder / "data").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_is_published_is_never_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "corpus"
    with published(final) as folder:
        (folder / "data").write_text("first")
    with pytest.raises(PublishError, match="exists already"), published(final):
        pass
    assert (final / "data").read_text() == "first"


def test_of_two_who_publish_at_once_the_first_wins(tmp_path: Path) -> None:
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


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path: Path) -> None:
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


def test_a_sound_folder_passes(artefact: Path) -> None:
    manifest = read_manifest(artefact)
    assert manifest["kind"] == "test"
    assert set(manifest["files"]) == {"data", "part/more"}
    check_files(artefact, manifest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "data").write_bytes(b"01234"), "has 5 bytes where its manifest promises 10"),
        (lambda folder: (folder / "part" / "more").write_bytes(b"abd"), "does not match the checksum"),
        (lambda folder: (folder / "data").unlink(), "data is missing"),
    ],
    ids=["truncated", "altered", "missing"],
)
def test_damaged_files_are_named(artefact: Path, damage: object, message: str) -> None:
    damage(artefact)  # type: ignore[operator]
    with pytest.raises(PublishError, match=message):
        check_files(artefact, read_manifest(artefact))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"a"', "\ud83d".encode("utf-16", "surrogatepass").hex(), '{"kind": "test", "files": {}}']
)
def test_a_broken_manifest_is_refused(artefact: Path, text: str) -> None:
    (artefact / "manifest.json").write_text(text)
    with pytest.raises(PublishError, match=r"manifest\.json"):
        read_manifest(artefact)


def test_any_flipped_bit_of_a_manifest_is_refused_or_harmless(artefact: Path) -> None:
    path = artefact / "manifest.json"
    sound, manifest = path.read_bytes(), read_manifest(artefact)
    for position in range(len(sound)):
        broken = bytearray(sound)
        broken[position] ^= 1 << position % 8
        path.write_bytes(bytes(broken))
        with suppress(PublishError):
            assert read_manifest(artefact) == manifest


def test_a_folders_checksum_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        (tmp_path / name).mkdir()
        for file in order:
            (tmp_path / name / file).write_text(f"content of {file}")
    assert checksum(tmp_path / "a") == checksum(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "z")
    assert checksum(tmp_path / "a") != checksum(tmp_path / "b")


@given(versions)
def test_a_version_survives_its_name(version: Version) -> None:
    assert Version.parse(version.name) == version


@given(st.text() | st.from_regex(r"a[0-9]{1,3}-step-[0-9]{5,8}(-e[0-9]{1,3})?", fullmatch=True))
def test_a_name_is_read_as_what_it_says_or_not_at_all(name: str) -> None:
    try:
        version = Version.parse(name)
    except PublishError:
        return
    assert version.name == name


@pytest.mark.parametrize(
    "name",
    [
        "a1-step-000500",
        "a01-step-500",
        "a01-step-000500-e",
        "a01-step-000500-e03",
        "a01-step-000500\n",
        "a\u0660\u0661-step-000500",
    ],
)
def test_foreign_names_are_no_versions(name: str) -> None:
    with pytest.raises(PublishError, match="not the name of a version"):
        Version.parse(name)


def test_names() -> None:
    assert Version(1, 500).name == "a01-step-000500"
    assert Version(1, 500, 3).name == "a01-step-000500-e3"
    assert Version(1, 500, 3).encoder == Version(1, 500)


@given(versions, versions, versions)
def test_versions_are_totally_ordered(a: Version, b: Version, c: Version) -> None:
    assert (a < b) + (b < a) + (a == b) == 1
    assert not (a < b and b < c) or a < c


def test_a_higher_epoch_is_preferred_at_the_same_step_only() -> None:
    assert Version(1, 500, 2) < Version(1, 500, 10) < Version(1, 501, 1) < Version(2, 0, 0)
    assert Version(1, 500) < Version(1, 500, 0)


def test_attempts_are_numbered_and_kept(tmp_path: Path) -> None:
    assert Lineage.load(tmp_path).current is None
    assert start_attempt(tmp_path) == 1
    assert start_attempt(tmp_path, parent=1, parent_step=500) == 2
    assert start_attempt(tmp_path, parent=1, parent_step=200) == 3
    assert Lineage.load(tmp_path).current == 3
    with pytest.raises(PublishError, match="no attempt 9"):
        start_attempt(tmp_path, parent=9, parent_step=1)


def test_an_abandoned_future_is_never_served(tmp_path: Path) -> None:
    start_attempt(tmp_path)
    start_attempt(tmp_path, parent=1, parent_step=500)  # rolled back from beyond 500
    start_attempt(tmp_path, parent=2, parent_step=800)
    start_attempt(tmp_path, parent=2, parent_step=400)  # back beyond the point where attempt 2 itself began
    for name in (
        "a01-step-000300-e1",
        "a01-step-000500-e1",
        "a01-step-001000-e9",
        "a02-step-000700-e2",
        "a02-step-000900-e2",
        "a03-step-000900-e3",
    ):
        (tmp_path / "indexes" / name).mkdir(parents=True)
    (tmp_path / "indexes" / ".tmp-a03-step-001000-e3-0").mkdir()
    (tmp_path / "indexes" / "notes.txt").touch()
    lineage = Lineage.load(tmp_path)

    def names(attempt: int) -> list[str]:
        return [version.name for version in newest(tmp_path / "indexes", lineage, attempt)]

    assert names(1) == ["a01-step-001000-e9", "a01-step-000500-e1", "a01-step-000300-e1"]
    assert names(2) == ["a02-step-000900-e2", "a02-step-000700-e2", "a01-step-000500-e1", "a01-step-000300-e1"]
    assert names(3) == ["a03-step-000900-e3", "a02-step-000700-e2", "a01-step-000500-e1", "a01-step-000300-e1"]
    assert names(4) == ["a01-step-000300-e1"]
    assert len(versions_in(tmp_path / "indexes")) == 6
    assert versions_in(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["", "{}x", "[1]", '[{"attempt": 1, "mother": 2}]'])
def test_a_broken_lineage_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(PublishError, match=r"lineage\.json"):
        Lineage.load(tmp_path)
