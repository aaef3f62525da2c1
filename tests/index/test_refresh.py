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

import faiss
import numpy as np
import pytest
from fake_refresher import CONFIG, FakeCorpus, direct_embeddings, export, load

from index.encode import Encoder, NonFiniteEmbeddings
from index.lease import LeaseLost
from index.refresh import TRAINING_ENDED, refresh, start_refresher
from index.search import PassageIndex
from realm.errors import UserError
from realm.runtime.versions import start_attempt, versions_in
from realm.training.sections import RefreshConfig

PROGRAM = Path(__file__).parent / "fake_refresher.py"


def start(run: Path, seconds_per_batch: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    command = [sys.executable, str(PROGRAM), str(run), str(seconds_per_batch)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "nothing happened in time"
        time.sleep(0.01)


def indexes(run: Path) -> list[str]:
    return [version.name for version in versions_in(run / "indexes")]


def refresh_once(run: Path, corpus: FakeCorpus, config: RefreshConfig = CONFIG, **more: object) -> list[str]:
    lines: list[str] = []
    refresh(run, config, corpus, **{"once": True, "log": lines.append, "load": load, **more})  # type: ignore[arg-type]
    return lines


def assert_equals_direct_encoding(run: Path, name: str, corpus: FakeCorpus) -> None:
    version = name.rsplit("-e", 1)[0]
    encoder = run / "encoders" / version
    PassageIndex.open(run / "indexes" / name, corpus.fingerprint, dim=8, encoder=encoder)
    index = faiss.read_index(str(run / "indexes" / name / "passages.index"))
    np.testing.assert_allclose(
        index.reconstruct_n(0, index.ntotal), direct_embeddings(encoder, corpus), rtol=1e-5, atol=1e-6
    )


def test_one_cycle(run: Path, corpus: FakeCorpus) -> None:
    lines = refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1"]
    assert_equals_direct_encoding(run, "a01-step-000500-e1", corpus)
    assert len(lines) == 1 and "a01-step-000500-e1 published: 60 passages" in lines[0]
    entry = json.loads((run / "refresher" / "log.jsonl").read_text())
    assert entry["version"] == "a01-step-000500-e1" and set(entry["seconds"]) == {
        "load",
        "encode",
        "build",
        "drift",
        "publish",
    }
    assert not (run / "refresher" / "a01-step-000500").exists()
    assert refresh_once(run, corpus) == [], "what has an index is not indexed again"


def test_bf16_is_close_to_fp32(run: Path, corpus: FakeCorpus) -> None:
    refresh_once(run, corpus, replace(CONFIG, precision="bf16"))
    index = faiss.read_index(str(run / "indexes" / "a01-step-000500-e1" / "passages.index"))
    direct_ND = direct_embeddings(run / "encoders" / "a01-step-000500", corpus)
    assert np.abs(index.reconstruct_n(0, index.ntotal) - direct_ND).max() < 0.05 * np.abs(direct_ND).max()


def test_another_corpus_is_indexed_anew(run: Path, corpus: FakeCorpus) -> None:
    refresh_once(run, corpus)
    refresh_once(run, FakeCorpus(seed=1))
    assert indexes(run) == ["a01-step-000500-e1", "a01-step-000500-e2"]


def test_the_newest_export_of_the_newest_attempt_wins(run: Path, corpus: FakeCorpus) -> None:
    export(run, 1, 1000)
    attempt = start_attempt(run, parent=1, parent_step=500)
    refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1"], "step 1000 is an abandoned future"
    export(run, attempt, 900)
    export(run, attempt, 700)
    refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1", "a02-step-000900-e2"]


def test_kill_9_costs_at_most_the_running_shard(run: Path, corpus: FakeCorpus) -> None:
    work = run / "refresher" / "a01-step-000500"
    killed = start(run, 0.15)
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


def test_sigterm_ends_it_cleanly_and_the_next_goes_on_at_once(run: Path, corpus: FakeCorpus) -> None:
    work = run / "refresher" / "a01-step-000500"
    stopped = start(run, 0.15)
    wait_until(lambda: len(list(work.glob("shard-*.npy"))) >= 1)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=10)
    assert stopped.returncode == 0 and "finished shards are kept" in output
    assert indexes(run) == [] and not list(run.rglob(".tmp-*"))
    lines = refresh_once(run, corpus)
    assert len(lines) == 1 and "shards kept" in lines[0], "the lease was given back: no waiting"
    assert_equals_direct_encoding(run, "a01-step-000500-e2", corpus)


def test_two_at_once_publish_every_version_once(run: Path, corpus: FakeCorpus) -> None:
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
        assert not thread.is_alive(), "it ends when training has ended and nothing is left to do"
    assert len({name.rsplit("-e", 1)[0] for name in indexes(run)}) == len(indexes(run))
    assert "a01-step-002000-e1" in indexes(run)


def test_one_that_lost_its_lease_stops_before_it_writes_anything(run: Path, corpus: FakeCorpus) -> None:
    def taken_over_while_loading(folder: Path) -> Encoder:
        (run / "refresher" / "lease" / "epoch-000002").mkdir()
        return load(folder)

    with pytest.raises(LeaseLost, match="epoch 1"):
        refresh_once(run, corpus, load=taken_over_while_loading)
    assert indexes(run) == [] and not list(run.rglob("shard-*"))


def test_training_that_has_ended_still_gets_its_last_index(run: Path, corpus: FakeCorpus) -> None:
    (run / TRAINING_ENDED).touch()
    refresh_once(run, corpus, once=False)
    assert indexes(run) == ["a01-step-000500-e1"]


class ExportingWhileEncoding:
    """Loads encoders, and exports the next step whenever one of the first `num_exports` is loaded."""

    def __init__(self, run: Path, num_exports: int) -> None:
        self.run, self.num_exports, self.loaded = run, num_exports, [""]

    def __call__(self, folder: Path) -> Encoder:
        self.loaded.append(folder.name)
        if len(self.loaded) - 1 <= self.num_exports:
            export(self.run, 1, 10_000 * (len(self.loaded) - 1))
        return load(folder)


def test_the_first_index_is_finished_and_later_work_gives_way_to_newer(run: Path, corpus: FakeCorpus) -> None:
    lines = refresh_once(run, corpus, replace(CONFIG, keep_last=100), load=ExportingWhileEncoding(run, 5))
    published = ["a01-step-000500-e1", "a01-step-020000-e1", "a01-step-040000-e1", "a01-step-050000-e1"]
    assert [line.split()[1] for line in lines if "published" in line] == published
    assert [line.split()[2] for line in lines if "dropped" in line] == ["a01-step-010000", "a01-step-030000"], (
        "never two in a row"
    )


def test_work_of_an_abandoned_attempt_is_dropped(run: Path, corpus: FakeCorpus) -> None:
    start_attempt(run, parent=1, parent_step=400)  # nothing of attempt 1 up to there was exported
    assert refresh_once(run, corpus) == []

    def resume_while_loading(folder: Path) -> Encoder:
        start_attempt(run, parent=2, parent_step=0)
        return load(folder)

    export(run, 2, 600)
    lines = refresh_once(run, corpus, load=resume_while_loading)
    assert indexes(run) == [] and "attempt 3 has abandoned it" in lines[0]


def test_old_versions_go_but_not_those_needed(run: Path, corpus: FakeCorpus) -> None:
    checkpoint = run / "pretrain" / "checkpoints" / "step-000500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index_version").write_text("a01-step-000500-e1")
    for step in (500, 1000, 1500, 2000):
        if step > 500:
            export(run, 1, step)
        refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1", "a01-step-001500-e3", "a01-step-002000-e4"]


def test_a_diverged_encoder_is_passed_over_and_reported_once(run: Path, corpus: FakeCorpus) -> None:
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


@pytest.mark.parametrize(("factory", "words"), [("Flut", "Flut"), ("IVF5000,Flat", "clusters")])
def test_a_factory_that_does_not_suit_ends_it_with_the_reason(
    run: Path, corpus: FakeCorpus, factory: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        refresh_once(run, corpus, replace(CONFIG, factory=factory))
    assert indexes(run) == [] and not list(run.rglob(".tmp-*"))
    refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e2"], "the lease was given back"


def test_an_encoder_with_another_tokenizer_is_refused(run: Path, corpus: FakeCorpus) -> None:
    with pytest.raises(UserError, match="another tokenizer"):
        refresh_once(run, corpus, load=lambda folder: load(folder)._replace(tokenizer_fingerprint="other"))


def test_the_started_process_inherits_nothing_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@"\nenv\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "GROUP_RANK",
    )
    for name in launcher:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "7")
    process = start_refresher(tmp_path / "run", tmp_path / "logs" / "refresher.log")
    assert process.wait(timeout=10) == 0
    lines = (tmp_path / "logs" / "refresher.log").read_text().splitlines()
    assert lines[0] == f"-m realm refresh --run {tmp_path / 'run'}"
    assert "KEPT=7" in lines
    assert not [line for line in lines if line.split("=")[0] in launcher]


def test_a_full_disk_is_waited_out(run: Path, corpus: FakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    import index.encode
    import index.refresh

    room, write = threading.Event(), index.encode.write_file_atomic

    def write_where_there_is_room(path: Path, content: Callable[..., object]) -> None:
        if not room.is_set():
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(index.encode, "write_file_atomic", write_where_there_is_room)
    monkeypatch.setattr(index.refresh, "_TRY_AGAIN_S", 0.05)
    with pytest.raises(UserError, match="No space left"):
        refresh_once(run, corpus)
    (run / TRAINING_ENDED).touch()
    timer = threading.Timer(0.5, room.set)
    timer.start()
    lines = refresh_once(run, corpus, once=False)
    assert sum("No space left" in line for line in lines) == 1 and "published" in lines[-1], (
        "said once, tried again until it worked"
    )
    assert_equals_direct_encoding(run, indexes(run)[-1], corpus)


def test_an_index_is_searched_as_its_refresher_was_told(run: Path, corpus: FakeCorpus) -> None:
    queries = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    exact = direct_embeddings(run / "encoders" / "a01-step-000500", corpus)
    wanted = np.argsort(-(queries @ exact.T), axis=1)[:, :5]
    shares = []
    for parameters in ("", "nprobe=6"):
        refresh_once(run, corpus, replace(CONFIG, factory="IVF6,Flat", search_parameters=parameters, keep_last=10))
        index = PassageIndex.open(run / "indexes" / indexes(run)[-1], corpus.fingerprint)
        shares.append(float((index.search(queries, 5)[1] == wanted).mean()))
        np.testing.assert_allclose(index.embeddings(np.arange(60)), exact, rtol=1e-5, atol=1e-6)
    assert len(indexes(run)) == 2 and shares[0] < shares[1] == 1.0, "other parameters are another index"
