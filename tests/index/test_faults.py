"""The fault benchmark at small scale: no violations here, and it detects an injected defect."""

import json
from pathlib import Path

import pytest

from index import search
from index.bench.fault_processes import CONFIG, FaultSetup, export
from index.bench.fault_supervisor import Supervisor
from index.bench.faults import corrupt_files
from index.refresh import refresh
from realm.app.cli import main
from realm.runtime.versions import Version, start_attempt


def test_faults_cause_no_violations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_missing_checksum_verification_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = FaultSetup.build(tmp_path)
    setup.run.mkdir()
    start_attempt(setup.run)
    export(setup, Version(1, 1))
    refresh(setup.run, CONFIG, setup.corpus, once=True, log=lambda line: None)
    supervisor = Supervisor(setup, 0)
    corrupt_files(supervisor, 40)
    assert supervisor.report.violations == []
    monkeypatch.setattr(search, "check_files", lambda folder, manifest: None)
    corrupt_files(supervisor, 200)
    assert supervisor.report.violations, "without checksums, an index with a flipped bit is served"
