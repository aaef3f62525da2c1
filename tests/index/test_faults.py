"""The fault benchmark, small: it finds nothing wrong here, and it does find what is wrong."""

import json
from pathlib import Path

import pytest

from index import search
from index.bench.fault_processes import CONFIG, Scene, export
from index.bench.faults import Supervisor
from index.refresh import refresh
from realm.app.cli import main
from realm.runtime.versions import Version, start_attempt


def test_nothing_is_broken_by_kills_flips_freezes_rivals_and_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "faults.json"
    assert main(["bench", "faults", "--kills", "12", "--flips", "60", "--json", str(report)]) == 0, (
        capsys.readouterr().out
    )
    content = json.loads(report.read_text())
    assert content["violations"] == [] and sum(content["kills"].values()) == 14
    figures = content["figures"]
    assert figures["left over after collection"] == 0 and figures["versions committed"] > 0
    assert (
        figures["bit flips, refused"] + figures.get("bit flips, harmless", 0) == 54
        and figures["cut short, refused"] == 6
    )


def test_a_store_that_does_not_check_its_files_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene.build(tmp_path)
    scene.run.mkdir()
    start_attempt(scene.run)
    export(scene, Version(1, 1))
    refresh(scene.run, CONFIG, scene.corpus, once=True, log=lambda line: None)
    supervisor = Supervisor(scene, 0)
    supervisor.damage(40)
    assert supervisor.report.violations == []
    monkeypatch.setattr(search, "check_files", lambda folder, manifest: None)
    supervisor.damage(200)
    assert supervisor.report.violations, "without checksums a flipped bit is served"
