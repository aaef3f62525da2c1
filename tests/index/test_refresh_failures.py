"""The refresher under failures: kills, a second refresher, a lost lease, NaN, a full disk."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_refresher import CONFIG, FakeCorpus, assert_equals_direct_encoding, export, indexes, load, refresh_once

import index.encode
import index.refresh
from index.encode import Encoder, NonFiniteEmbeddings
from index.lease import LeaseLost
from index.refresh import TRAINING_ENDED
from index.refresher_process import stop_refresher
from index.retention import GarbageCollector
from index.stopping import GRACE_S
from realm.errors import UserError
from realm.runtime import publish
from realm.runtime.versions import Version

PROGRAM = Path(__file__).parent / "fake_refresher.py"


def start_program(run: Path, seconds_per_batch: float | str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    command = [sys.executable, str(PROGRAM), str(run), str(seconds_per_batch)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {timeout_s:g} s"
        time.sleep(0.01)


def test_kill_9_loses_at_most_the_running_shard(run: Path, corpus: FakeCorpus) -> None:
    work = run / "refresher" / "a01-step-000500"
    killed = start_program(run, 0.15)
    wait_until(lambda: len(list(work.glob("shard-*.npy"))) >= 3)
    killed.kill()
    killed.communicate()
    finished = len(list(work.glob("shard-*.npy")))
    assert 3 <= finished < 6 and indexes(run) == []
    (run / "indexes").mkdir(exist_ok=True)
    (run / "indexes" / ".tmp-a01-step-000500-e1-crashed").mkdir()
    lines = refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e2"], "a takeover raises the epoch"
    assert_equals_direct_encoding(run, "a01-step-000500-e2", corpus)
    assert json.loads((run / "refresher" / "log.jsonl").read_text())["shards_kept"] == finished
    assert "holds the lease" in lines[0] and "left over" in lines[1]
    assert not list(run.rglob(".tmp-*"))


def test_sigterm_stops_it_cleanly_and_the_next_one_resumes_at_once(run: Path, corpus: FakeCorpus) -> None:
    work = run / "refresher" / "a01-step-000500"
    stopped = start_program(run, 0.15)
    wait_until(lambda: len(list(work.glob("shard-*.npy"))) >= 1)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=10)
    assert stopped.returncode == 0 and "finished shards are kept" in output
    assert indexes(run) == [] and not list(run.rglob(".tmp-*"))
    lines = refresh_once(run, corpus)
    assert len(lines) == 1 and "shards kept" in lines[0], "the lease was released: no waiting"
    assert_equals_direct_encoding(run, "a01-step-000500-e2", corpus)


def lease_is_released(run: Path) -> bool:
    epochs = sorted((run / "refresher" / "lease").iterdir())
    return (epochs[-1] / "released").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_long_call_does_not_keep_a_refresher_from_stopping(run: Path, corpus: FakeCorpus, number: int) -> None:
    stopped = start_program(run, "blocked")
    wait_until((run / "blocked").exists)
    stopped.send_signal(number)
    stopped.communicate(timeout=GRACE_S + 2)
    assert stopped.returncode == 128 + number and lease_is_released(run)
    lines = refresh_once(run, corpus)
    assert "6 shards kept" in lines[-1] and not any("holds the lease" in line for line in lines)


TRAINER = """
import sys, time
from pathlib import Path
from index.refresher_process import start_refresher
sys.executable = sys.argv[2]
print(start_refresher(Path(sys.argv[1]), Path(sys.argv[1]) / "output.log").pid, flush=True)
time.sleep(600)
"""


def start_trainer(run: Path, pace: str) -> tuple[subprocess.Popen[str], int]:
    """A process that started a refresher as a trainer does, and the refresher's process id."""
    program = run / "program"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$5" {pace}\n')  # -m realm refresh --run RUN
    program.chmod(0o755)
    command = [sys.executable, "-c", TRAINER, str(run), str(program)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    trainer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    return trainer, int(trainer.stdout.readline())


def is_running(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("pace", [pytest.param("0.15", marks=pytest.mark.slow), "blocked"])
def test_a_refresher_ends_with_the_trainer_that_started_it(run: Path, corpus: FakeCorpus, pace: str) -> None:
    trainer, refresher = start_trainer(run, pace)
    shard = run / "refresher" / "a01-step-000500" / "shard-00000.npy"
    wait_until((run / "blocked").exists if pace == "blocked" else shard.exists)
    trainer.kill()
    trainer.communicate()
    wait_until(lambda: not is_running(refresher), GRACE_S + 2)
    assert lease_is_released(run), "another refresher continues at once"
    assert "shards kept" in refresh_once(run, corpus)[-1]


def test_a_suspended_refresher_is_killed(run: Path) -> None:
    refresher = start_program(run, 0.15)
    wait_until(lambda: list((run / "refresher").glob("lease/epoch-*/heartbeat")))
    refresher.send_signal(signal.SIGSTOP)
    stop_refresher(refresher, 0.2)  # type: ignore[arg-type]
    assert refresher.returncode == -signal.SIGKILL
    refresher.communicate()


def test_two_refreshers_publish_every_version_once(run: Path, corpus: FakeCorpus) -> None:
    stop = threading.Event()
    config = replace(CONFIG, keep_last=100)
    threads = [
        threading.Thread(target=refresh_once, args=(run, corpus, config), kwargs={"once": False, "stop": stop})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for step in (1000, 1500, 2000):
        export(run, 1, step)
        wait_until(lambda step=step: any(f"{step:06d}" in name for name in indexes(run)))
    (run / TRAINING_ENDED).touch()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive(), "it returns when training has ended and no work is left"
    assert len({name.rsplit("-e", 1)[0] for name in indexes(run)}) == len(indexes(run))
    assert "a01-step-002000-e1" in indexes(run)


def test_a_refresher_that_lost_its_lease_stops_before_writing(run: Path, corpus: FakeCorpus) -> None:
    def take_over_while_loading(folder: Path) -> Encoder:
        (run / "refresher" / "lease" / "epoch-000002").mkdir()
        return load(folder)

    with pytest.raises(LeaseLost, match="epoch 1"):
        refresh_once(run, corpus, load=take_over_while_loading)
    assert indexes(run) == [] and not list(run.rglob("shard-*"))


def test_a_lease_lost_while_the_index_is_flushed_prevents_its_publication(
    run: Path, corpus: FakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, taken_over = publish._sync, run / "refresher" / "lease" / "epoch-000002"

    def take_over_while_flushing(path: Path) -> None:
        flush(path)
        if path.parent.parent.name == "indexes" and not taken_over.exists():
            taken_over.mkdir()

    monkeypatch.setattr(publish, "_sync", take_over_while_flushing)
    with pytest.raises(LeaseLost, match="epoch 1"):
        refresh_once(run, corpus)
    assert taken_over.exists() and indexes(run) == [] and not list(run.rglob(".tmp-*"))


def test_an_error_while_collecting_is_retried(run: Path, corpus: FakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [OSError(5, "Input/output error")] * 2
    collect = GarbageCollector.collect

    def collect_if_readable(collector: GarbageCollector) -> list[Version]:
        if errors:
            raise errors.pop()
        return collect(collector)

    monkeypatch.setattr(GarbageCollector, "collect", collect_if_readable)
    monkeypatch.setattr(index.refresh, "_RETRY_S", 0.01)
    with pytest.raises(UserError, match=r"cannot read and clean the index store .*Input/output error"):
        refresh_once(run, corpus)
    (run / TRAINING_ENDED).touch()
    errors[:] = [OSError(5, "Input/output error")] * 2
    lines = refresh_once(run, corpus, once=False)
    assert sum("Input/output" in line for line in lines) == 1 and "published" in lines[-1]


@pytest.mark.parametrize(
    ("name", "content"),
    [("plan.json", b"{"), ("plan.json", b"\xff"), ("shard-00001.npy", b""), ("shard-00001.npy", None)],
)
def test_damaged_shards_are_encoded_again(run: Path, corpus: FakeCorpus, name: str, content: bytes | None) -> None:
    with pytest.raises(UserError):  # all shards are encoded before the index is built
        refresh_once(run, corpus, replace(CONFIG, factory="IVF5000,Flat"))
    file = run / "refresher" / "a01-step-000500" / name
    file.write_bytes(file.read_bytes()[:-7] if content is None else content)
    lines = refresh_once(run, corpus)
    assert ("5 shards kept" in lines[-1]) == name.startswith("shard")
    assert_equals_direct_encoding(run, indexes(run)[-1], corpus)


def test_a_diverged_encoder_is_skipped_and_reported_once(run: Path, corpus: FakeCorpus) -> None:
    export(run, 1, 1000)

    def load_with_nan(folder: Path) -> Encoder:
        encoder = load(folder)
        if folder.name.endswith("001000"):
            encoder.retriever.table.weight.data.fill_(float("nan"))  # type: ignore[union-attr,operator]
        return encoder

    with pytest.raises(NonFiniteEmbeddings):
        refresh_once(run, corpus, load=load_with_nan)
    (run / TRAINING_ENDED).touch()
    lines = refresh_once(run, corpus, load=load_with_nan, once=False)
    assert indexes(run) == ["a01-step-000500-e2"]
    assert sum("not finite" in line for line in lines) == 1


def test_a_full_disk_is_retried(run: Path, corpus: FakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    space, write = threading.Event(), index.encode.write_file_atomic

    def write_if_space(path: Path, content: Callable[..., object]) -> None:
        if not space.is_set():
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(index.encode, "write_file_atomic", write_if_space)
    monkeypatch.setattr(index.refresh, "_RETRY_S", 0.05)
    with pytest.raises(UserError, match="No space left"):
        refresh_once(run, corpus)
    (run / TRAINING_ENDED).touch()
    timer = threading.Timer(0.5, space.set)
    timer.start()
    lines = refresh_once(run, corpus, once=False)
    assert sum("No space left" in line for line in lines) == 1 and "published" in lines[-1], (
        "logged once, retried until it succeeded"
    )
    assert_equals_direct_encoding(run, indexes(run)[-1], corpus)
