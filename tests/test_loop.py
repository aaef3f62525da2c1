"""All stages on a tiny corpus, with a refresher process, kills and resumes, and evaluation."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from socket import gethostname

import numpy as np
import pytest

from finetune.evaluate import _labels
from realm.app.cli import main
from realm.run.config_file import load_config
from realm.run.folder import Run
from realm.runtime.publish import checksum
from realm.runtime.telemetry import read_metrics
from tests.tiny import FOUNDERS, TOWNS, realm, write_config, write_sources


def test_a_run_writes_metrics_of_every_stage_a_summary_and_curves(finished: Path) -> None:
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    for name in (
        "em",
        "recall@1",
        "recall@5",
        "random_passage_em",
        "oracle_em",
        "masked_span_recall@5_ict",
        "masked_span_recall@5_realm",
        "train_seconds",
    ):
        assert name in summary
    assert (run / "curves.png").stat().st_size > 10_000
    metrics = read_metrics(run / "metrics.jsonl")
    steps = {"ict": 6, "reader_pretraining": 6, "pretrain": 8, "finetune_retriever": 6, "finetune": 6}
    assert {stage: len(rows) for stage, rows in metrics.items()} == steps
    row = metrics["pretrain"][-1]
    for name in (
        "loss",
        "utility",
        "null_mass",
        "entropy",
        "candidate_hit_rate",
        "index",
        "steps_behind",
        "seconds/update",
        "reader_tokens",
    ):
        assert name in row


def test_the_refresher_builds_an_index_of_the_last_export(finished: Path) -> None:
    run = finished / "run"
    log = (run / "refresher" / "output.log").read_text()
    assert "published" in log
    assert (run / "encoders" / "a01-step-000008").exists()
    assert any(path.name.startswith("a01-step-000008-e") for path in (run / "indexes").iterdir())


def test_an_existing_run_is_refused_without_resume(finished: Path) -> None:
    result = realm("run", "--config", finished / "config.yaml")
    assert result.returncode == 2
    assert "exists" in result.stderr and "--resume" in result.stderr and "Traceback" not in result.stderr


def test_finetuning_a_finetuned_run_on_other_questions_is_refused(finished: Path) -> None:
    result = realm("finetune", "--run", finished / "run", "--questions", finished / "other.json", "--resume")
    assert result.returncode == 2 and "already finetuned" in result.stderr and "Traceback" not in result.stderr


def test_finetuning_the_retriever_of_a_finetuned_run_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run", ignore=shutil.ignore_patterns("finetune_retriever"))
    result = realm("finetune-retriever", "--run", tmp_path / "run")
    assert result.returncode == 2 and "already finetuned" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "finetune_retriever").exists()


def test_evaluation_writes_predictions_from_the_passages(finished: Path) -> None:
    result = realm("evaluate", "--run", finished / "run", "--questions", finished / "questions.json")
    assert result.returncode == 0, result.stderr
    assert "recall@5" in result.stdout
    rows = [
        json.loads(line)
        for line in (finished / "run" / "evaluations" / "questions.finetune.predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 12
    texts = {
        record["id"]: record["text"]
        for record in map(json.loads, (finished / "passages.jsonl").read_text().splitlines())
    }
    titles = {
        record["id"]: record["title"]
        for record in map(json.loads, (finished / "passages.jsonl").read_text().splitlines())
    }
    assert all(
        row["prediction"] and row["prediction"] in texts[row["passage"]] + titles[row["passage"]] for row in rows
    )


def test_retrievers_are_compared_on_questions_of_another_format(finished: Path) -> None:
    lines = [
        {"question": f"Who founded {town}?", "answer": [founder], "id": town}
        for town, founder in zip(TOWNS, FOUNDERS, strict=True)
    ]
    lines.append({"question": "Who founded Atlantis?", "answer": ["Poseidon"], "id": "nowhere"})
    (finished / "open.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = finished / "run"
    result = realm(
        "evaluate",
        "--run",
        run,
        "--questions",
        finished / "open.jsonl",
        "--compare",
        "initial",
        "ict",
        "pretrain",
        "bm25",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "evaluations" / "open.json").read_text())
    assert set(report["figures"]) == {"finetune", "initial", "ict", "pretrain", "bm25"}
    for label, figures in report["figures"].items():
        low, high = report["intervals"][label]["recall@5"]
        assert low <= figures["recall@5"] <= high and figures["count"] == 13
        assert figures["recall@20"] <= figures["ceiling"] == pytest.approx(100 * 12 / 13)
        assert "exact_recall@5" not in figures, "no question has a known document"
        assert ("em" in figures) == (label not in ("initial", "ict")), (
            "stages without a reader have retrieval figures only"
        )
    assert report["figures"]["bm25"]["recall@1"] > 85, "the name in the question is in its passage"
    (finished / "elsewhere").mkdir(exist_ok=True)
    shutil.copy(finished / "open.jsonl", finished / "elsewhere" / "open.jsonl")
    refused = realm("evaluate", "--run", run, "--questions", finished / "elsewhere" / "open.jsonl")
    assert refused.returncode == 2 and "contains the figures of" in refused.stderr and "--name" in refused.stderr
    refused = realm("evaluate", "--run", run, "--compare", "bm42")
    assert (
        refused.returncode == 2 and "'bm42' is not a retriever" in refused.stderr and "Traceback" not in refused.stderr
    )


def test_a_sentence_transformers_model_is_compared_and_its_embeddings_are_cached(finished: Path) -> None:
    run = finished / "run"
    model = run / "pretrain" / "model" / "retriever"
    result = realm("evaluate", "--run", run, "--stage", "pretrain", "--compare", model, "--name", "compared")
    assert result.returncode == 0, result.stderr
    figures = json.loads((run / "evaluations" / "compared.json").read_text())["figures"]
    assert set(figures) == {"pretrain", "retriever"}
    assert (run / "evaluations" / "compared.retriever.predictions.jsonl").exists()
    embeddings = list((run / "frozen").glob("retriever-*/embeddings.npy"))
    assert len(embeddings) == 1 and np.load(embeddings[0]).shape == (12, 32)


def test_retrievers_with_the_same_name_get_different_labels() -> None:
    assert _labels(("finetune", "a/x/model", "b/x/model")) == {
        "finetune": "finetune",
        "a/x/model": "a-x-model",
        "b/x/model": "b-x-model",
    }
    assert _labels(("finetune", "org/model")) == {"finetune": "finetune", "org/model": "model"}


def test_an_evaluation_is_written_by_one_process(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = finished / "run" / "locks" / "evaluation-test"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["evaluate", "--run", str(finished / "run")]) == 2
    assert "is already writing evaluation test of run" in capsys.readouterr().err


def test_ask_shows_answer_and_passage(finished: Path) -> None:
    result = realm("ask", "--run", finished / "run", "Who founded Alda?")
    assert result.returncode == 0, result.stderr
    assert "p(z|x)" in result.stdout and "town-" in result.stdout


def test_evaluation_is_deterministic(finished: Path) -> None:
    path = finished / "run" / "evaluations" / "test.finetune.predictions.jsonl"
    first = path.read_text()
    assert realm("evaluate", "--run", finished / "run").returncode == 0
    assert path.read_text() == first


def losses(folder: Path, stage: str) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")[stage]]


@pytest.mark.parametrize("stage", ["ict", pytest.param("reader-pretraining", marks=pytest.mark.slow)])
def test_a_stage_is_trained_by_one_process_and_resumes_after_a_kill(
    finished: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = stage.replace("-", "_")
    write_sources(tmp_path)
    changes = {"corpus": {"prepared": str(finished / "prepared")}, name: {"steps": 200, "checkpoint_every": 2}}
    config = write_config(tmp_path, **changes)
    if stage == "reader-pretraining":
        assert realm("ict", "--config", config).returncode == 0
    command = [sys.executable, "-m", "realm", stage, "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count(f'"{name}"') > 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # as it could be between two of its steps
    capsys.readouterr()
    assert main([stage, "--config", str(config), "--resume"]) == 2
    assert f"process {process.pid} on {gethostname()} is already training run" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.wait()
    refused = realm(stage, "--config", config)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    before = losses(tmp_path / "run", name)
    # Fewer steps would be another config, so the resumed run is ended by an interrupt.
    process = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while (
        time.monotonic() < deadline and len(losses(tmp_path / "run", name)) < len(before) + 5 and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), errors
    after = losses(tmp_path / "run", name)
    assert len(after) > len(before)
    np.testing.assert_allclose(
        after[: len(before)], before, rtol=1e-4, err_msg="steps repeated after the kill have the same losses"
    )


@pytest.mark.parametrize("stage", [pytest.param("finetune-retriever", marks=pytest.mark.slow), "finetune"])
def test_a_killed_finetuning_resumes_from_its_checkpoint(finished: Path, tmp_path: Path, stage: str) -> None:
    run, name = tmp_path / "run", stage.replace("-", "_")
    later = ("finetune", "finetune_retriever") if stage == "finetune-retriever" else ("finetune",)
    shutil.copytree(finished / "run", run, ignore=shutil.ignore_patterns(*later, "metrics.jsonl"))
    longer = ["--run", str(run), f"--{name}.steps", "60", f"--{name}.checkpoint_every", "5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "realm", stage, *longer], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (
        time.monotonic() < deadline and not list((run / name / "checkpoints").glob("step-*")) and process.poll() is None
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = losses(run, name)
    assert 5 <= len(before) < 60
    assert realm(stage, *longer, "--resume").returncode == 0
    after = losses(run, name)
    assert len(after) == 60 and (run / name / "model" / "retriever").exists()
    np.testing.assert_allclose(
        after[: len(before)], before, rtol=1e-4, err_msg="steps repeated after the kill have the same losses"
    )


def test_finetuning_uses_passages_encoded_by_the_finetuned_retriever(finished: Path) -> None:
    run = finished / "run"
    wanted = checksum(run / "finetune_retriever" / "model" / "retriever")
    assert (run / "frozen" / wanted[:12] / "indexes").exists()


def test_a_killed_trainer_resumes_in_a_new_attempt_with_its_pending_candidates(finished: Path, tmp_path: Path) -> None:
    write_sources(tmp_path)
    config = write_config(
        tmp_path, corpus={"prepared": str(finished / "prepared")}, pretrain={"steps": 60, "checkpoint_every": 5}
    )
    for stage in ("ict", "reader-pretraining"):
        assert realm(stage, "--config", config).returncode == 0
    run = tmp_path / "run"
    command = [sys.executable, "-m", "realm", "pretrain", "--config", str(config), "--with-refresher"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not list((run / "pretrain" / "checkpoints").glob("step-*")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    checkpoint = sorted((run / "pretrain" / "checkpoints").glob("step-*"))[-1]
    assert np.load(checkpoint / "candidates-000.npy").shape == (3, 2)
    assert (run / "indexes" / (checkpoint / "index_version").read_text().strip()).exists(), (
        "the version that a checkpoint references is kept"
    )
    result = realm("pretrain", "--config", config, "--with-refresher", "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage[-1]["attempt"] == 2 and lineage[-1]["parent"] == 1
    assert lineage[-1]["parent_step"] == int(checkpoint.name.removeprefix("step-"))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")["pretrain"]] == list(range(1, 61))


def test_training_without_a_refresher_stops_with_an_error(finished: Path, tmp_path: Path) -> None:
    write_sources(tmp_path)
    refresh = {"wait_timeout_s": 1.0, "max_stale_steps": 4, "stale_policy": "wait"}
    config = write_config(tmp_path, corpus={"prepared": str(finished / "prepared")}, refresh=refresh)
    for stage in ("ict", "reader-pretraining"):
        assert realm(stage, "--config", config).returncode == 0
    result = realm("pretrain", "--config", config)
    assert result.returncode == 2
    assert "realm refresh --run" in result.stderr and "Traceback" not in result.stderr


def test_an_index_of_another_corpus_is_refused(finished: Path) -> None:
    from index.search import IndexRefused, PassageIndex

    run = Run(finished / "run", load_config(finished / "config.yaml"))
    folder = sorted((run.folder / "indexes").glob("a*"))[-1]
    with pytest.raises(IndexRefused, match="another corpus"):
        PassageIndex.open(folder, run.statements.fingerprint)
