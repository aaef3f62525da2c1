"""Replay: a run that follows the log of another has bit-identical losses and weights."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from index.replay import read_replay
from realm.errors import UserError
from realm.run.config_file import load_config
from realm.run.folder import Run
from realm.runtime.publish import checksum
from realm.runtime.telemetry import read_metrics
from tests.tiny import realm, write_config, write_sources

CHANGES = {
    "pretrain": {"steps": 60, "checkpoint_every": 7, "reader_check": 0},
    "refresh": {
        "export_every": 5,
        "poll_s": 0.02,
        "grace_s": 0.0,
        "keep_last": 2,
        "lease_expiry_s": 1.0,
        "max_stale_steps": 10,
        "stale_policy": "wait",
    },
}


def losses(run: Path) -> list[tuple[float, int]]:
    """Loss of each step, and the step of the export whose index it searched."""
    return [(row["loss"], int(row["index"].split("-")[2])) for row in read_metrics(run / "metrics.jsonl")["pretrain"]]


def begin(folder: Path, source: Path | None = None) -> Path:
    """Write sources and a config to a new folder, and train the first stages; returns the config.

    With `source`, the prepared corpus and these stages are copied from there.
    """
    folder.mkdir()
    write_sources(folder)
    config = write_config(folder, **CHANGES)
    if source is None:
        for command in ("prepare", "ict", "reader-pretraining"):
            assert realm(command, "--config", config).returncode == 0
    else:
        shutil.copytree(source / "prepared", folder / "prepared")
        Run.create(load_config(config))
        for part in ("ict", "reader_pretraining", "frozen"):
            shutil.copytree(source / "run" / part, folder / "run" / part)
    return config


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    folder = tmp_path_factory.mktemp("replay") / "original"
    result = realm("pretrain", "--config", begin(folder), "--with-refresher")
    assert result.returncode == 0, result.stderr
    assert len({export for _, export in losses(folder / "run")}) >= 3, "several versions were swapped in"
    return folder


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_replay_with_random_kills_is_bit_identical(original: Path, tmp_path: Path, kills: int) -> None:
    folder = tmp_path / "again"
    command = [
        sys.executable,
        "-m",
        "realm",
        "pretrain",
        "--config",
        str(begin(folder, original)),
        "--with-refresher",
        "--resume",
    ]
    command += ["--replay", str(original / "run")]
    metrics, rng = folder / "run" / "metrics.jsonl", random.Random(kills)
    for _ in range(kills):
        done = len(losses(folder / "run")) if metrics.exists() and "pretrain" in metrics.read_text() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        target, deadline = done + rng.randint(1, max(2, 60 // kills)), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count('"pretrain"') >= target:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(folder / "run") == losses(original / "run")
    for part in ("retriever", "reader"):
        assert checksum(folder / "run" / "pretrain" / "model" / part) == checksum(
            original / "run" / "pretrain" / "model" / part
        )


def test_a_resumed_run_replays_its_own_log_and_then_uses_the_newest_index(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    config = begin(folder, original)
    command = [sys.executable, "-m", "realm", "pretrain", "--config", str(config), "--with-refresher"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"pretrain"') >= 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = losses(folder / "run")
    assert 20 <= len(before) < 60
    result = realm("pretrain", "--config", config, "--with-refresher", "--resume", "--replay", folder / "run")
    assert result.returncode == 0, result.stderr
    after = losses(folder / "run")
    assert after[: len(before)] == before and len(after) == 60
    assert f"replayed the log up to step {len(before)}" in result.stdout
    assert not (folder / "run" / "refresher" / "wanted.json").exists()


def test_a_log_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pretraining step to replay"):
        read_replay(tmp_path)
