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

from index.encode import Encoder, NonFiniteEmbeddings
from index.lease import LeaseLost
from index.refresh import TRAINING_ENDED
from realm.errors import UserError

PROGRAM = Path(__file__).parent / "fake_refresher.py"


def start_program(run: Path, seconds_per_batch: float) -> subprocess.Popen[str]:
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
    import index.encode
    import index.refresh

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
