"""Version names and order, and the lineage of attempts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.runtime.publish import PublishError
from realm.runtime.versions import Lineage, Version, newest, start_attempt, versions_in

versions = st.builds(Version, st.integers(0, 200), st.integers(0, 10**7), st.none() | st.integers(0, 200))


@given(versions)
def test_parse_is_the_inverse_of_name(version: Version) -> None:
    assert Version.parse(version.name) == version


@given(st.text() | st.from_regex(r"a[0-9]{1,3}-step-[0-9]{5,8}(-e[0-9]{1,3})?", fullmatch=True))
def test_parsed_names_are_canonical(name: str) -> None:
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
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(PublishError, match="is not a version name"):
        Version.parse(name)


def test_names() -> None:
    assert Version(1, 500).name == "a01-step-000500"
    assert Version(1, 500, 3).name == "a01-step-000500-e3"
    assert Version(1, 500, 3).encoder == Version(1, 500)


@given(versions, versions, versions)
def test_versions_are_totally_ordered(a: Version, b: Version, c: Version) -> None:
    assert (a < b) + (b < a) + (a == b) == 1
    assert not (a < b and b < c) or a < c


def test_order_is_by_attempt_then_step_then_epoch() -> None:
    assert Version(1, 500, 2) < Version(1, 500, 10) < Version(1, 501, 1) < Version(2, 0, 0)
    assert Version(1, 500) < Version(1, 500, 0)


def test_attempts_are_numbered_and_saved(tmp_path: Path) -> None:
    assert Lineage.load(tmp_path).current is None
    assert start_attempt(tmp_path) == 1
    assert start_attempt(tmp_path, parent=1, parent_step=500) == 2
    assert start_attempt(tmp_path, parent=1, parent_step=200) == 3
    assert Lineage.load(tmp_path).current == 3
    with pytest.raises(PublishError, match="no attempt 9"):
        start_attempt(tmp_path, parent=9, parent_step=1)


def test_versions_of_abandoned_steps_are_excluded(tmp_path: Path) -> None:
    start_attempt(tmp_path)
    start_attempt(tmp_path, parent=1, parent_step=500)  # resumed at 500 after attempt 1 had gone further
    start_attempt(tmp_path, parent=2, parent_step=800)
    start_attempt(tmp_path, parent=2, parent_step=400)  # resumed before the step at which attempt 2 began
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}x",
        "[1]",
        "7",
        "\xff",
        '[{"attempt": 1, "mother": 2}]',
        '[{"attempt": "1"}]',
        '[{"attempt": 2}]',
        '[{"attempt": 1}, {"attempt": 2, "parent": 2, "parent_step": 5}]',
        '[{"attempt": 1}, {"attempt": 2, "parent": 1}]',
        '[{"attempt": 1}, {"attempt": 2, "parent": 1, "parent_step": "5"}]',
    ],
)
def test_corrupt_lineage_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "lineage.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PublishError, match=r"lineage\.json"):
        Lineage.load(tmp_path)


def test_a_folder_in_place_of_the_lineage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lineage.json").mkdir()
    with pytest.raises(PublishError, match=r"lineage\.json"):
        Lineage.load(tmp_path)
