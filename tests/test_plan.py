"""`realm plan`: what it measures, what it warns of, what it refuses."""

from pathlib import Path

import pytest

from realm.app.cli import main
from realm.app.plan import Plan, plan, warnings
from realm.app.step_timing import StagePlan, extrapolate
from realm.run.config_file import load_config
from tests.tiny import write_config, write_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


def test_a_plan_is_made_from_a_sample_and_leaves_nothing_behind(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    said = capsys.readouterr().out
    assert "passages encoded per second" in said and "optimizer" in said and "warning" in said


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([(8, 4.0)], 8.0),
        ([(4, 3.0), (8, 5.0)], 9.0),  # one second a step and half a second a row
        ([(4, 3.9), (8, 4.0)], 6.0),  # half of what a row took at the least
        ([(4, 1.0), (8, 4.0)], 8.0),  # and not more than it took
        ([(8, 4.0), (16, 7.0)], 7.0),
    ],
)
def test_steps_too_large_to_be_tried_are_foreseen_by_their_rows(measured, expected) -> None:
    assert extrapolate(measured, 16) == pytest.approx(expected)


def test_no_warning_where_a_refresh_is_quick(folder: Path) -> None:
    config = load_config(write_config(folder))
    quick = Plan(100, {"pretrain": StagePlan(8, 1.0, 10, 0)}, encode_seconds=2.0, build_seconds=0.5, dim=4, index_bytes=1, prepared_bytes=1,
                 refresh_period_seconds=4.0)  # fmt: skip
    assert warnings(quick, config) == []


def test_without_a_prepared_corpus_its_size_must_be_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(write_config(folder))]) == 2
    assert "--passages N" in capsys.readouterr().err
