"""The figures on held-out questions of a finished run, in its summary and its table."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from realm.app.held_out import figures_before_training, held_out_figures
from realm.run.folder import Run
from realm.run.report import print_held_out
from realm.training.held_out_section import HeldOutConfig
from realm.training.pseudo_question_section import PseudoQuestionConfig


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of a finished run, measured as if half of its documents had been held out."""
    monkeypatch.setattr("pretrain.held_out.MIN_QUESTIONS", 5)
    shutil.copytree(finished / "run", tmp_path / "run")
    config = Run.open(tmp_path / "run").config
    asked = PseudoQuestionConfig(min_words=2, min_frequent_share=0.0)
    return Run(tmp_path / "run", replace(config, held_out=HeldOutConfig(share=0.5, pseudo_questions=asked)))


def test_figures_of_retriever_and_reader(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = figures_before_training(run)
    assert set(before) == {"dense", "bm25", "fused"}
    held_out = {stage: held_out_figures(run, stage) for stage in ("ict", "pretrain")}
    assert held_out["ict"]["means"]["bm25"] == pytest.approx(before["bm25"])
    assert "reader" not in held_out["ict"]["means"]
    report = held_out["pretrain"]
    assert set(report["means"]) == {"dense", "bm25", "fused", "reader"}
    assert set(report["means"]["reader"]) == {"em", "f1"}, "statements have no source among the passages"
    for way, figures in report["means"].items():
        for name, value in figures.items():
            low, high = report["intervals"][way][name]
            assert 0 <= low <= value <= high <= 100, (way, name)
    recalls = [report["means"]["bm25"][f"supporting_recall@{k}"] for k in (1, 5, 20)]
    assert recalls == sorted(recalls) and recalls[-1] == 100, "there are twelve passages"
    assert report["counts"]["supporting"] <= report["counts"]["questions"]
    print_held_out(before, held_out)
    output = " ".join(capsys.readouterr().out.split())
    assert "held-out documents" in output and "BM25" in output and "REALM" in output
    assert "before training" in output


def test_nothing_is_printed_without_figures(capsys: pytest.CaptureFixture[str]) -> None:
    print_held_out({}, {"ict": {}})
    assert capsys.readouterr().out == ""


def test_a_finished_run_says_that_it_measured_nothing(finished: Path) -> None:
    assert (finished / "run" / "evaluations" / "held-out-pretrain.json").read_text().strip() == "{}"
    assert not (finished / "run" / "ict" / "model" / "verdict.json").exists()
