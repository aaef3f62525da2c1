"""The fault benchmark at small scale: no violations here, and it detects an injected defect."""

import json
import shutil
from pathlib import Path

import pytest

from index import search
from index.bench.fault_processes import CONFIG, FaultSetup, export
from index.bench.fault_supervisor import Supervisor
from index.bench.faults import corrupt_files
from index.refresh import refresh
from realm.app.cli import main
from realm.runtime.versions import Version, start_attempt, versions_in


def test_faults_cause_no_violations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "faults.json"
    assert main(["bench", "faults", "--kills", "12", "--flips", "60", "--json", str(report)]) == 0, (
        capsys.readouterr().out
    )
    (content,) = json.loads(report.read_text())["runs"]
    assert content["violations"] == [] and sum(content["kills"].values()) == 14
    figures = content["figures"]
    assert figures["left over after collection"] == 0 and figures["versions committed"] > 0
    assert (
        figures["bit flips, refused"] + figures.get("bit flips, harmless", 0) == 54
        and figures["cut short, refused"] == 6
    )


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    """A supervisor of a run with three versions, of steps 1 to 3, of which two are kept."""
    setup = FaultSetup.build(tmp_path)
    setup.run.mkdir()
    start_attempt(setup.run)
    supervisor = Supervisor(setup, 0)
    for step in (1, 2, 3):
        export(setup, Version(1, step))
        build_newest(setup)
        supervisor.check_store()
    return supervisor


def build_newest(setup: FaultSetup) -> None:
    refresh(setup.run, CONFIG, setup.corpus, once=True, log=lambda line: None)


def write_checkpoint(setup: FaultSetup, step: int, index: Version) -> None:
    folder = setup.run / "pretrain" / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "index_version").write_text(index.name)


def test_a_resume_to_a_version_that_had_been_replaced_is_not_a_violation(supervisor: Supervisor) -> None:
    run = supervisor.setup.run
    assert [version.step for version in versions_in(run / "indexes")] == [2, 3]
    start_attempt(run, parent=1, parent_step=1)
    supervisor.check_store()
    assert supervisor.report.violations == []


def test_the_loss_of_the_newest_version_is_a_violation(supervisor: Supervisor) -> None:
    run = supervisor.setup.run
    shutil.rmtree(run / "indexes" / versions_in(run / "indexes")[-1].name)
    supervisor.check_store()
    assert "was published and is lost" in supervisor.report.violations[0]


def test_the_loss_of_a_version_that_a_checkpoint_references_is_a_violation(supervisor: Supervisor) -> None:
    setup = supervisor.setup
    used = versions_in(setup.run / "indexes")[0]
    write_checkpoint(setup, 2, used)
    export(setup, Version(1, 4))
    build_newest(setup)
    supervisor.check_store()
    assert supervisor.report.violations == [] and used in versions_in(setup.run / "indexes")
    start_attempt(setup.run, parent=1, parent_step=2)
    shutil.rmtree(setup.run / "indexes" / used.name)
    supervisor.check_store()
    assert "step 2 references, is lost" in supervisor.report.violations[0]


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
