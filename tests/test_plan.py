"""`realm plan`: measurements, warnings and errors."""

import os
import time
from pathlib import Path

import faiss
import numpy as np
import pytest

from index.build import TRAINING_ROWS, build_index
from index.build_timing import BuildRate, time_build
from realm.app import step_timing
from realm.app.cli import main
from realm.app.plan import Plan, plan, warnings
from realm.app.step_timing import StagePlan, extrapolate
from realm.errors import UserError
from realm.run.config_file import load_config
from tests.tiny import write_config, write_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


def test_a_plan_measures_a_sample_and_leaves_no_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in folder.iterdir())
    config = load_config(write_config(folder, refresh={"export_every": 1, "max_stale_steps": 3}))
    result = plan(config, passages=50_000_000)
    assert sorted(path.name for path in folder.iterdir() if path.name != "config.yaml") == [
        name for name in before if name != "config.yaml"
    ]
    assert set(result.stages) == {"ict", "reader_pretraining", "pretrain", "finetune_retriever", "finetune"}
    assert all(stage.seconds_per_step > 0 and stage.parameters > 10_000 for stage in result.stages.values())
    assert result.stages["ict"].steps == 6 and result.passages == 50_000_000
    assert result.index_bytes == pytest.approx(50_000_000 * 32 * 4, rel=0.2), "a flat index of 32 dimensions"
    assert result.refresh_seconds > result.refresh_period_seconds
    first, second = warnings(result, config)
    assert "refresh.export_every" in first and "refresh.max_stale_steps = 3" in second
    output = capsys.readouterr().out
    assert "passages encoded per second" in output and "optimizer" in output and "warning" in output


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([(8, 4.0)], 8.0),
        ([(4, 3.0), (8, 5.0)], 9.0),  # one second per step, and half a second per row
        ([(4, 3.9), (8, 4.0)], 6.0),  # at least half of the time per row
        ([(4, 1.0), (8, 4.0)], 8.0),  # at most the time per row
        ([(8, 4.0), (16, 7.0)], 7.0),
    ],
)
def test_times_of_larger_batches_are_extrapolated(measured, expected) -> None:
    assert extrapolate(measured, 16) == pytest.approx(expected)


def test_the_time_of_training_an_index_does_not_grow_with_the_corpus() -> None:
    rate = BuildRate(1e-3, 256 * 1000, 2e-3, 1e-6, fixed_bytes=1000, vector_bytes=64.0)
    assert rate.seconds(10_000) == pytest.approx(10 + 20 + 0.01)
    assert rate.seconds(13_000_000) == pytest.approx(256 + 2e-3 * 65_536 + 13)
    assert rate.size(10) == 1640
    many_lists = BuildRate(1e-3, 256 * 16_384, 0.0, 1e-6, 0, 0.0)
    assert many_lists.seconds(13_000_000) == pytest.approx(1e-3 * TRAINING_ROWS + 13)


def test_the_time_of_a_larger_index_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", time.process_time)  # other processes do not count
    faiss.omp_set_num_threads(1)
    vectors_ND = np.random.default_rng(0).standard_normal((300_000, 32), dtype=np.float32)
    forecast_s = time_build(vectors_ND[:100], "IVF256,Flat").seconds(len(vectors_ND))
    began = time.monotonic()
    build_index(vectors_ND, "IVF256,Flat")
    took_s = time.monotonic() - began
    assert 0.4 < forecast_s / took_s < 2.4, f"forecast {forecast_s:.2f} s, took {took_s:.2f} s"


def test_no_warning_if_a_refresh_is_fast(folder: Path) -> None:
    config = load_config(write_config(folder))
    fast = Plan(
        100,
        {"pretrain": StagePlan(8, 1.0, 10, 0)},
        encode_seconds=2.0,
        build_seconds=0.5,
        dim=4,
        index_bytes=1,
        prepared_bytes=1,
        refresh_period_seconds=4.0,
    )
    assert warnings(fast, config) == []


def test_without_a_prepared_corpus_its_size_is_required(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(write_config(folder))]) == 2
    assert "--passages N" in capsys.readouterr().err


def test_a_plan_does_not_go_on_without_the_process_that_encodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timing, "_keep_encoding", os._exit)  # fails in the process: too many arguments
    with pytest.raises(UserError, match="ended with status 1"):
        plan(load_config(write_config(folder)), passages=100)
