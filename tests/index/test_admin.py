"""Listing, verifying and garbage-collecting the versions of an index store."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_refresher import CONFIG, FakeCorpus, export, load

from index.admin import collect_garbage, find_version, list_versions, verify
from index.lease import Lease
from index.refresh import refresh
from index.retention import VersionPin
from index.search import PassageIndex
from realm.app.cli import main
from realm.errors import UserError
from realm.runtime.versions import Version, start_attempt, versions_in
from tests.tiny import write_config, write_sources

KEEP_ALL = replace(CONFIG, keep_last=10)


def build(run: Path, corpus: FakeCorpus, *steps: int, attempt: int = 1) -> None:
    for step in steps:
        export(run, attempt, step)
        refresh(run, KEEP_ALL, corpus, once=True, log=lambda line: None, load=load)  # type: ignore[arg-type]


@pytest.fixture
def store(run: Path, corpus: FakeCorpus) -> Path:
    """A run with an index of each of the steps 600, 700 and 800."""
    build(run, corpus, 600, 700, 800)
    refresh(run, KEEP_ALL, corpus, once=True, log=lambda line: None, load=load)  # type: ignore[arg-type]
    return run


def steps(run: Path, folder: str = "indexes") -> list[int]:
    return [version.step for version in versions_in(run / folder)]


def test_versions_are_listed_with_their_pins_and_references(store: Path) -> None:
    checkpoint = store / "pretrain" / "checkpoints" / "step-000600"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index_version").write_text(list_versions(store)[0].version.name)
    pin = VersionPin(store, list_versions(store)[1].version)
    start_attempt(store, parent=1, parent_step=700)
    states = {info.version.step: info.state for info in list_versions(store)}
    assert states == {
        600: "referenced by a checkpoint",
        700: "newest, pinned by 1",
        800: "abandoned by a resume",
    }
    pin.release()
    assert all(
        info.bytes > 60 * 8 * 4 and info.manifest is not None and info.manifest.count == 60
        for info in list_versions(store)
    )


def test_versions_are_found_by_name_or_the_candidates_are_listed(store: Path) -> None:
    first = list_versions(store)[0]
    assert find_version(store, first.version.name) == first == find_version(store, f"indexes/{first.version.name}")
    with pytest.raises(UserError, match=first.version.name):
        find_version(store, "a01-step-000001-e1")
    with pytest.raises(UserError, match="no index yet"):
        list_versions(store / "missing")


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "missing", "encoder"])
def test_verify_reports_what_a_reader_would_refuse(store: Path, damage: str) -> None:
    info = list_versions(store)[0]
    lines: list[str] = []
    assert verify(info, lines.append) is None and "valid, 60 passages" in lines[0]
    file = info.path / ("manifest.json" if damage == "manifest" else "passages.index")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "encoder":
        (store / "encoders" / info.version.encoder.name / "seed").write_text("7")
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(content[:-1] if damage == "truncate" else content))
    assert verify(info, lines.append) is not None and "REFUSED" in lines[1]


def test_gc_removes_unneeded_versions_and_their_encoders(store: Path) -> None:
    pin = VersionPin(store, list_versions(store)[0].version)
    lines: list[str] = []
    would_remove = collect_garbage(store, CONFIG, 0.0, True, lines.append)
    assert [path.name[:15] for path in would_remove] == []
    pin.release()
    would_remove = collect_garbage(store, CONFIG, 0.0, True, lines.append)
    assert [path.name[:15] for path in would_remove] == ["a01-step-000600"] and steps(store) == [600, 700, 800]
    removed = collect_garbage(store, CONFIG, 0.0, False, lines.append)
    assert sorted(f"{path.parent.name}/{path.name[:15]}" for path in removed) == [
        "encoders/a01-step-000600",
        "indexes/a01-step-000600",
    ]
    assert steps(store) == [700, 800] and steps(store, "encoders") == [700, 800]
    assert collect_garbage(store, CONFIG, 0.0, False, lines.append) == []


def test_a_version_pinned_during_the_grace_period_is_kept(store: Path) -> None:
    version = list_versions(store)[0].version
    timer = threading.Timer(0.2, lambda: VersionPin(store, version))
    timer.start()
    assert collect_garbage(store, CONFIG, 0.6, False, lambda line: None) == []
    assert steps(store) == steps(store, "encoders") == [600, 700, 800]


def test_gc_refuses_while_a_refresher_runs_and_takes_over_from_a_dead_one(store: Path) -> None:
    with Lease(store / "refresher" / "lease", "other.1", CONFIG.lease_expiry_s) as lease:
        assert lease.try_acquire()
        with pytest.raises(UserError, match=r"other\.1 is running"):
            collect_garbage(store, CONFIG, 0.0, False, lambda line: None)
        assert steps(store) == [600, 700, 800]
        lease._stop.set()  # no more heartbeats
        collect_garbage(store, CONFIG, 0.0, False, lambda line: None)
    assert steps(store) == [700, 800]


def test_an_encoder_that_may_still_be_indexed_is_kept(store: Path, corpus: FakeCorpus) -> None:
    export(store, 1, 900)
    refresh(store, replace(CONFIG, keep_last=1), corpus, once=True, log=lambda line: None, load=load)  # type: ignore[arg-type]
    assert steps(store, "encoders") == [900]
    export(store, 1, 950)
    start_attempt(store, parent=1, parent_step=920)
    export(store, 2, 930)
    collect_garbage(store, CONFIG, 0.0, False, lambda line: None)
    assert [version.name for version in versions_in(store / "encoders")] == ["a01-step-000900", "a02-step-000930"], (
        "step 950 was abandoned by the resume"
    )


def test_a_file_that_the_manifest_does_not_list_is_ignored_and_reported(store: Path, corpus: FakeCorpus) -> None:
    info = list_versions(store)[0]
    np.save(info.path / "deleted.npy", np.arange(60))
    lines: list[str] = []
    assert verify(info, lines.append) is None
    assert "deleted.npy: not in the manifest, ignored" in lines[0]
    index = PassageIndex.open(info.path, corpus.fingerprint)
    assert (index.search(np.ones((1, 8), np.float32), 5)[1] >= 0).all()


def test_gc_removes_a_symbolic_link_and_keeps_its_target(store: Path) -> None:
    version = list_versions(store)[0].version.name
    target = (store / "indexes" / version).rename(store / "elsewhere")
    (store / "indexes" / version).symlink_to(target)
    removed = collect_garbage(store, CONFIG, 0.0, False, lambda line: None)
    assert store / "indexes" / version in removed and (target / "passages.index").exists()
    assert steps(store) == [700, 800]


def test_gc_that_loses_the_lease_says_who_took_it(store: Path) -> None:
    def take_over(line: str) -> None:
        (store / "refresher" / "lease" / "epoch-000099").mkdir()
        (store / "refresher" / "lease" / "epoch-000099" / "holder").write_text("other.7")

    with pytest.raises(UserError, match=r"taken over by other\.7.*rerun the command"):
        collect_garbage(store, CONFIG, 0.01, False, take_over)
    assert steps(store) == [600, 700, 800]


def test_commands(tmp_path: Path, corpus: FakeCorpus, capsys: pytest.CaptureFixture[str]) -> None:
    write_sources(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(write_config(tmp_path).read_text())
    start_attempt(run)
    assert main(["index", "ls", "--run", str(run)]) == 2 and "no index yet" in capsys.readouterr().err
    build(run, corpus, 100, 200, 300, 400)
    assert main(["index", "ls", "--run", str(run)]) == 0
    assert "newest" in capsys.readouterr().out
    name = versions_in(run / "indexes")[-1].name
    assert main(["index", "show", "--run", str(run), name]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["count"] == 60 and shown["state"] == "newest" and shown["encoder"] == Version.parse(name).encoder.name
    assert main(["index", "verify", "--run", str(run)]) == 0
    file = run / "indexes" / name / "passages.index"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["index", "verify", "--run", str(run)]) == 2
    output = capsys.readouterr()
    assert "1 of 4 index versions are broken and would be refused" in output.err
    assert "REFUSED" in output.out and "Traceback" not in output.err
    assert main(["index", "gc", "--run", str(run), "--dry-run"]) == 0 and "would remove" in capsys.readouterr().out
    assert main(["index", "gc", "--run", str(run), "--grace", "0"]) == 0 and "removed" in capsys.readouterr().out
    assert steps(run) == [200, 300, 400]
