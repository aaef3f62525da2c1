"""Drift: its record in each index version, and exports triggered by it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_refresher import CONFIG, SPECIAL_IDS, FakeCorpus, direct_embeddings, export, load
from torch import nn

from index.build import IndexManifest
from index.drift import DRIFT_FILE, DriftReference, cosine_change, drift_rows, gather_rows, overlap
from index.refresh import refresh
from pretrain.exports import ExportSchedule, drift_reference
from realm.errors import UserError
from realm.run.config_file import load_config
from realm.runtime.telemetry import read_metrics
from realm.runtime.versions import versions_in
from realm.training.refresh_section import RefreshConfig
from tests.test_loop import realm
from tests.tiny import prepared_run, write_config, write_sources

KEEP = replace(CONFIG, keep_last=10, drift_passages=20)


def refresh_once(run: Path, corpus: FakeCorpus, config=KEEP) -> None:
    refresh(run, config, corpus, once=True, log=lambda line: None, load=load)  # type: ignore[arg-type]


def test_each_version_records_its_drift_from_the_previous_one(run: Path, corpus: FakeCorpus) -> None:
    refresh_once(run, corpus)
    export(run, 1, 600)
    (run / "encoders" / "a01-step-000600" / "seed").write_text(
        (run / "encoders" / "a01-step-000500" / "seed").read_text()
    )
    refresh_once(run, corpus)
    export(run, 1, 700)
    refresh_once(run, corpus)
    first, same, other = (
        IndexManifest.read(run / "indexes" / version.name)[0].drift for version in versions_in(run / "indexes")
    )
    assert first == {}
    assert (
        same["against"] == "a01-step-000500-e1"
        and same["cosine_change"] == pytest.approx(0, abs=1e-6)
        and same["overlap@8"] == 1.0
    )
    rows = drift_rows(60, 20)
    before, now = (
        direct_embeddings(run / "encoders" / f"a01-step-000{step}", corpus)[rows].astype(np.float64)
        for step in (600, 700)
    )
    change = 0.0
    for a, b in zip(before, now, strict=True):
        change += 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
            sum(x * x for x in a) * sum(y * y for y in b)
        )
    assert other["cosine_change"] == pytest.approx(change / 20, rel=1e-4)
    assert other["against"] == "a01-step-000600-e2" and 0 < other["overlap@8"] < 1
    log = [json.loads(line) for line in (run / "refresher" / "log.jsonl").read_text().splitlines()]
    assert [entry["drift"] for entry in log] == [first, same, other] and "drift" in log[0]["seconds"]


def test_reference_embeddings_are_exact_in_a_compressed_index_and_their_rows_deterministic(
    run: Path, corpus: FakeCorpus
) -> None:
    refresh_once(run, corpus, replace(KEEP, factory="SQ4"))
    folder = run / "indexes" / versions_in(run / "indexes")[0].name
    reference_PD = np.load(folder / DRIFT_FILE)
    direct = direct_embeddings(run / "encoders" / "a01-step-000500", corpus)
    np.testing.assert_allclose(reference_PD, direct[drift_rows(60, 20)], rtol=1e-5, atol=1e-6)
    assert len(drift_rows(10, 20)) == 10 and np.array_equal(drift_rows(1000, 20), drift_rows(1000, 20))


def test_overlap_and_rows_from_shards() -> None:
    assert overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]])) == pytest.approx(0.75)
    assert overlap(np.array([[1, -1], [-1, -1]]), np.array([[1, -1], [-1, -1]])) == 1.0, "empty slots are not results"
    assert math.isnan(overlap(np.array([[-1]]), np.array([[-1]])))
    matrix = np.arange(30, dtype=np.float32).reshape(10, 3)
    rows = np.array([0, 3, 4, 9])
    assert np.array_equal(gather_rows([matrix[:1], matrix[1:4], matrix[4:]], rows), matrix[rows])
    assert cosine_change(matrix[1:], 2 * matrix[1:]) == pytest.approx(0, abs=1e-6)


class RotatingTower(nn.Module):
    """Embeds every passage as the same direction, rotated by an angle."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.zeros(()))

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return torch.stack((self.angle.cos(), self.angle.sin())).expand(len(ids_BL), 2)


def test_drift_of_a_rotating_tower_is_one_minus_the_cosine_of_its_angle(corpus: FakeCorpus) -> None:
    reference, tower = DriftReference(corpus, SPECIAL_IDS, 20, 16, "fp32"), RotatingTower()  # type: ignore[arg-type]
    reference.snapshot(tower)
    assert reference.drift(tower) == pytest.approx(0)
    tower.angle.data.fill_(0.5)
    assert reference.drift(tower) == pytest.approx(1 - math.cos(0.5), rel=1e-5)
    reference.snapshot(tower)
    assert reference.drift(tower) == pytest.approx(0)


def test_exports_are_triggered_by_drift_and_at_the_end(tmp_path: Path) -> None:
    write_sources(tmp_path)
    refresh_ = {"export_every": 0, "drift_every": 2, "max_drift": 1e-9, "keep_last": 20}
    config = write_config(tmp_path, pretrain={"steps": 7, "reader_check": 0}, refresh=refresh_)
    for command in ("prepare", "ict", "reader-pretraining", "pretrain"):
        result = realm(command, "--config", config)
        assert result.returncode == 0, result.stderr
    exported = [version.step for version in versions_in(tmp_path / "run" / "encoders")]
    assert exported == [0, 2, 4, 6, 7], "every measurement finds some drift"
    drifts = {
        row["step"]: row["drift"]
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")["pretrain"]
        if "drift" in row
    }
    assert list(drifts) == [2, 4, 6] and all(0 < drift < 1 for drift in drifts.values())


def test_exports_by_period_by_drift_or_both(tmp_path: Path) -> None:
    run, tower = prepared_run(tmp_path), RotatingTower()

    def schedule(config: RefreshConfig) -> ExportSchedule:
        return ExportSchedule(config, 12, drift_reference(config, run.collator, "fp32"), lambda: tower)

    def steps(rotate_at: int = 0, **changes: object) -> list[int]:
        tower.angle.data.zero_()
        exports = schedule(replace(run.config.refresh, **changes))
        found = []
        for step in range(1, 13):
            if step == rotate_at:
                tower.angle.data += 1.0
            if exports.due(step, exports.drift(step)):
                found.append(step)
                exports.snapshot()
        return found

    assert steps(export_every=5) == [5, 10, 12]
    assert steps(export_every=2, staleness_multiplier=4) == [8, 12]
    assert steps(export_every=0, max_drift=0.2, drift_every=3) == [12], "no drift"
    assert steps(export_every=0, max_drift=0.2, drift_every=3, rotate_at=4) == [6, 12], (
        "found at the next measurement, and only once"
    )
    assert steps(export_every=5, max_drift=0.2, drift_every=3, rotate_at=4) == [5, 10, 12], (
        "drift is measured from the periodic export"
    )
    assert steps(export_every=5, max_drift=0.2, drift_every=3, rotate_at=8) == [5, 9, 10, 12]


def test_the_drift_snapshot_is_saved_in_the_checkpoint(tmp_path: Path) -> None:
    run, tower = prepared_run(tmp_path, refresh={"max_drift": 0.5}), RotatingTower()

    def schedule() -> ExportSchedule:
        reference = drift_reference(run.config.refresh, run.collator, "fp32")
        return ExportSchedule(run.config.refresh, 12, reference, lambda: tower)

    exports = schedule()
    tower.angle.data += 1.0
    exports.save(tmp_path)
    resumed = schedule()
    assert resumed.drift(50) == pytest.approx(0)
    resumed.restore(tmp_path)
    assert resumed.drift(50) == exports.drift(50) == pytest.approx(1 - math.cos(1.0), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"export_every": 0}, "never exported"), ({"staleness_multiplier": 0}, "at least 1")],
)
def test_settings_that_would_export_nothing_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write_sources(tmp_path)
    with pytest.raises(UserError, match=message):
        load_config(write_config(tmp_path, refresh=changes))
