"""Several refresher processes under torchrun: they build one index, and restart when one dies."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
from fake_refresher import FakeCorpus, direct_embeddings

from index.refresh import TRAINING_ENDED
from realm.runtime.versions import versions_in

PROGRAM = Path(__file__).parent / "fake_refresher.py"


def launch(run: Path, seconds_per_batch: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        "--monitor-interval",
        "0.2",
    ]
    return subprocess.Popen(
        [*command, str(PROGRAM), str(run), str(seconds_per_batch)], env=environment, stdout=subprocess.PIPE, text=True
    )


def embeddings(run: Path) -> np.ndarray:
    (version,) = versions_in(run / "indexes")
    index = faiss.read_index(str(run / "indexes" / version.name / "passages.index"))
    return index.reconstruct_n(0, index.ntotal)


def test_two_workers_encode_the_shards_of_one_index(run: Path, corpus: FakeCorpus) -> None:
    (run / TRAINING_ENDED).touch()
    workers = launch(run, 0.0)
    output, _ = workers.communicate(timeout=120)
    assert workers.returncode == 0 and output.count("published") == 1
    np.testing.assert_allclose(
        embeddings(run), direct_embeddings(run / "encoders" / "a01-step-000500", corpus), rtol=1e-5, atol=1e-6
    )
    batches = [int((run / f"batches-{rank}").read_text()) for rank in range(2)]
    assert min(batches) > 5, "the two workers share six shards"


def test_when_one_worker_dies_all_restart_and_keep_the_finished_shards(run: Path, corpus: FakeCorpus) -> None:
    (run / TRAINING_ENDED).touch()
    workers, work = launch(run, 0.15), run / "refresher" / "a01-step-000500"
    until = time.monotonic() + 60
    while len(list(work.glob("shard-*.npy"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    pids = [
        int(pid)
        for pid in subprocess.run(["pgrep", "-P", str(workers.pid)], capture_output=True, text=True).stdout.split()
    ]
    assert len(pids) == 2
    os.kill(max(pids), signal.SIGKILL)
    output, _ = workers.communicate(timeout=120)
    assert workers.returncode == 0 and output.count("published") == 1
    kept = re.search(r"\((\d) shards kept", output)
    assert kept is not None and int(kept[1]) >= 2
    np.testing.assert_allclose(
        embeddings(run), direct_embeddings(run / "encoders" / "a01-step-000500", corpus), rtol=1e-5, atol=1e-6
    )
