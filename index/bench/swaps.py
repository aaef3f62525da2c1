"""`realm bench swaps`: does swapping the index slow down training steps?

A scripted trainer (matrix products, with a search of the index in use on a background thread, as in
a REALM step) alternates between rounds with and without a scripted refresher. The refresher uses no
cores: its versions are prepared in advance and renamed into place. The difference is the cost on
the trainer's side: polling, reading and verifying a version on a thread, and the swap.
"""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from index.build import INDEX_FILE, IndexManifest, build_index, write_version
from index.search import PassageIndex
from index.watcher import IndexWatcher
from realm.runtime.publish import write_json_atomic, write_manifest
from realm.runtime.telemetry import console, print_table, progress
from realm.runtime.versions import Version, start_attempt

CORPUS = "scripted"
_QUERIES, _RESULTS, _ROUNDS = 12, 16, 3
_WIDTH = 1024


def bench_swaps(count: int, dim: int, steps: int, every: int, json_file: Path | None) -> dict[str, Any]:
    """Alternate between rounds with a swap every `every` steps and rounds without, `steps` each.

    Prints and returns step times in milliseconds.
    """
    times: dict[str, list[float]] = {"without swaps": [], "with swaps": []}
    calls: list[float] = []
    swaps = 0
    with tempfile.TemporaryDirectory(prefix="realm-swaps-") as folder:
        run = Path(folder)
        start_attempt(run)
        console.print(f"building {1 + _ROUNDS * (steps // _ROUNDS // every)} versions of {count:,} x {dim}")
        ready = prepare_versions(run, count, dim, _ROUNDS * (steps // _ROUNDS // every))
        trainer = ScriptedTrainer(dim)
        with IndexWatcher(run, 1, CORPUS, dim, poll_s=0.5, log=lambda line: None) as watcher:
            assert watcher.wait_for(0, 600.0)
            index = watcher.take()
            assert index is not None
            with progress("steps", 2 * steps, every_s=10.0) as ticker:
                for _ in range(_ROUNDS):
                    for kind in times:
                        for step in range(steps // _ROUNDS):
                            if kind == "with swaps" and step % every == 0 and ready:
                                path = ready.pop(0)
                                path.rename(run / "indexes" / path.name)
                            start = time.perf_counter()
                            newer = watcher.take()
                            if newer is not None:
                                index.close()
                                index, swaps = newer, swaps + 1
                            calls.append(time.perf_counter() - start)
                            trainer.step(index)
                            times[kind].append(time.perf_counter() - start)
                            ticker.update(sum(map(len, times.values())))
                        drain(watcher)
            index.close()
        trainer.close()
    result: dict[str, Any] = {"rows": count, "dim": dim, "swaps": swaps, "slowest swap call, ms": 1000 * max(calls)}
    rows = []
    for kind, values in times.items():
        percentiles = {f"p{q}": 1000 * float(np.percentile(values, q)) for q in (50, 90, 99)}
        result[kind] = percentiles | {"steps": len(values)}
        rows.append([kind, len(values), *percentiles.values()])
    result["p99 with / without"] = result["with swaps"]["p99"] / result["without swaps"]["p99"]
    print_table(
        f"Step times in ms, {swaps} swaps of an index of {count:,} x {dim}", ["", "steps", "p50", "p90", "p99"], rows
    )
    console.print(
        f"  p99 with swaps / without: {result['p99 with / without']:.3f}; "
        f"slowest swap call: {result['slowest swap call, ms']:.2f} ms"
    )
    if json_file is not None:
        write_json_atomic(json_file, result)
    return result


def prepare_versions(run: Path, count: int, dim: int, number: int) -> list[Path]:
    """Publish the first version, and prepare `number` others outside the store; their index files
    are hard links to the first."""
    vectors = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    index = build_index(vectors)
    manifest = IndexManifest(Version(1, 0).name, "", CORPUS, "", dim, count, "Flat", {}, "")
    first = write_version(run / "indexes", Version(1, 0, 1), index, manifest)
    paths = []
    for step in range(1, number + 1):
        path = run / "ready" / Version(1, step, 1).name
        path.mkdir(parents=True)
        os.link(first / INDEX_FILE, path / INDEX_FILE)
        write_manifest(path, {"format": 1, **vars(manifest), "encoder": Version(1, step).name})
        paths.append(path)
    return paths


def drain(watcher: IndexWatcher) -> None:
    """Wait until the watcher has opened pending versions, so that this does not slow down steps of
    the other kind."""
    time.sleep(2.0)
    left = watcher.take()
    if left is not None:
        left.close()


class ScriptedTrainer:
    """Runs steps of constant work: matrix products with gradient, and a background search whose
    result the next step waits for."""

    def __init__(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5)
        self.inputs = torch.randn(_WIDTH, _WIDTH, generator=generator)
        self.queries = np.random.default_rng(1).standard_normal((_QUERIES, dim), dtype=np.float32)
        self.thread = ThreadPoolExecutor(1, initializer=lambda: faiss.omp_set_num_threads(1))
        self.pending = None

    def step(self, index: PassageIndex) -> None:
        """Run one update, and start the search for the next one."""
        if self.pending is not None:
            self.pending.result()
        self.pending = self.thread.submit(index.search, self.queries, _RESULTS)  # type: ignore[assignment]
        hidden = self.inputs
        for _ in range(4):
            hidden = torch.tanh(hidden @ self.weight)
        hidden.square().mean().backward()
        self.weight.grad = None

    def close(self) -> None:
        self.thread.shutdown()
