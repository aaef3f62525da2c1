"""Timing of this machine for `realm plan`: some steps of each training stage, and encoding and indexing.

The stages are those that train (`Stage.sample_batch`), on real blocks, with untrained models of the configured
sizes and a random index. Nothing is kept.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from index.build import build_index, index_bytes
from index.encode import encode_passages, encoding_tower
from realm.app.stages import STAGE_PROGRAMS
from realm.models.retriever import build_retriever
from realm.run.folder import Run
from realm.runtime.telemetry import log_line, peak_memory
from realm.runtime.threads import cpu_threads
from realm.training.engine import Engine
from realm.training.stage import Stage

AFFORDABLE_S = 60.0
"""Seconds that timing one batch size may take; if the configured size would take longer, its time is extrapolated
from smaller ones."""
MIN_STEPS, MAX_STEPS = 4, 32
"""Steps timed per batch size."""
ENOUGH_S = 8.0
"""Timing ends when it has taken this long and `MIN_STEPS` steps."""
WARMUP_STEPS = 3
SAMPLE_ROWS = 512
"""Passages encoded at most to measure the rate of encoding."""
MAX_RANDOM_ROWS = 200_000
"""Vectors of the random index at most."""


@dataclass(frozen=True)
class StagePlan:
    """Forecast of one training stage."""

    steps: int
    seconds_per_step: float
    parameters: int
    """Number of trained parameters."""
    activation_bytes: int
    """Memory of a step in addition to parameters, gradients and optimizer."""

    @property
    def seconds(self) -> float:
        """Seconds of training in all."""
        return self.steps * self.seconds_per_step


class RandomIndex:
    """Random vectors, searched for real, and random passages as the result."""

    def __init__(self, num_vectors: int, dim: int, rows: np.ndarray, seed: int) -> None:
        """`rows`: the passages that may be found."""
        self.rows, self.dim, self.rng = rows, dim, np.random.default_rng(seed)
        vectors = self.rng.standard_normal((min(num_vectors, MAX_RANDOM_ROWS), dim), dtype=np.float32)
        self.index = build_index(vectors, "Flat")

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and distinct random rows, each (B, k)."""
        scores, _ = self.index.search(query_emb_BD, min(k, self.index.ntotal))
        found = [self.rng.choice(len(self.rows), k, replace=False, shuffle=False) for _ in query_emb_BD]
        return scores, self.rows[np.array(found)]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Zeros, (len(rows), dim)."""
        return np.zeros((len(rows), self.dim), np.float32)

    def close(self) -> None:
        """Nothing to release."""


def random_index(run: Run, num_passages: int) -> RandomIndex:
    """A random index of `num_passages` vectors as wide as the run's embeddings."""
    config = run.config.retriever
    dim = config.projection_dim if config.projection == "linear" else build_retriever(config, run.tokenizer).dim
    return RandomIndex(num_passages, dim, run.passages.rows, run.config.seed)


def time_stage(run: Run, name: str, index: RandomIndex) -> StagePlan:
    """Time some steps of a stage."""
    log_line(f"timing {name}")
    with _sample_stage(run, name, index) as (stage, engine):
        size = min(2, stage.config.batch_size)
        _time_steps(stage, engine, size, count=1)  # the first step allocates and compiles
        baseline = _peak_bytes()
        measured = [(size, _time_steps(stage, engine, size, MIN_STEPS))]
        while size < stage.config.batch_size and 2 * measured[-1][1] * (MIN_STEPS + WARMUP_STEPS) <= AFFORDABLE_S:
            size = min(2 * size, stage.config.batch_size)
            last = size == stage.config.batch_size
            _time_steps(stage, engine, size, WARMUP_STEPS if last else 1)
            measured.append((size, _time_steps(stage, engine, size, MAX_STEPS if last else MIN_STEPS)))
        parameters = sum(parameter.numel() for parameter in stage.module.parameters() if parameter.requires_grad)
        activations = max(0, _peak_bytes() - baseline) * stage.config.batch_size / size
        seconds = extrapolate(measured, stage.config.batch_size)
        return StagePlan(stage.config.steps, seconds, parameters, int(activations))


@contextmanager
def _sample_stage(run: Run, name: str, index: RandomIndex) -> Iterator[tuple[Stage, Engine]]:
    """A stage opened to be timed, under DeepSpeed."""
    threads = run.config.threads(name)
    torch.manual_seed(run.config.seed)
    with cpu_threads(threads), STAGE_PROGRAMS[name].open_sample(run, index) as stage:
        config = replace(run.config.engine, threads=threads)
        engine = Engine(stage.module, stage.config, config, stage.called_between_steps())
        stage.begin(engine)
        yield stage, engine


def _time_steps(stage: Stage, engine: Engine, size: int, count: int) -> float:
    """Seconds per step with batches of `size`, over up to `count` steps spread over the whole stage.

    Each step has a batch of its own: batches of new shapes take longer, in training too.
    """
    began = time.monotonic()
    done = 0
    for number in range(count):
        step = int((number + 0.5) * stage.config.steps / count)
        engine.step(stage.sample_batch(step, size).to(engine.device))
        stage.after_step(step + 1)
        done += 1
        if done >= MIN_STEPS and time.monotonic() - began > ENOUGH_S:
            break
    return (time.monotonic() - began) / done


def extrapolate(measured: Sequence[tuple[int, float]], batch_size: int) -> float:
    """Seconds per step at `batch_size` from (size, seconds) of ascending sizes.

    The seconds of the largest size, and for each additional row what its rows took more than those of the size
    before; at least half of the time per row of the largest size, in case a measurement was disturbed.
    """
    size, seconds = measured[-1]
    per_row = seconds / size
    if len(measured) > 1:
        smaller, less = measured[-2]
        per_row = min(per_row, max(per_row / 2, (seconds - less) / (size - smaller)))
    return seconds + (batch_size - size) * per_row


def _peak_bytes() -> int:
    """Peak memory so far in bytes, of the GPU if there is one."""
    peak = peak_memory()
    return int(peak.get("peak_gpu_gib", peak["peak_gib"]) * 2**30)


@dataclass(frozen=True)
class EncodingRate:
    """How fast passages are encoded and indexed, and how large the index grows."""

    start_s: float
    """Seconds before the first passage, for compiling if it is configured."""
    encoded_per_s: float
    """Passages per second with the refresher's threads."""
    added_per_s: float
    """Passages per second that are added to the index."""
    dim: int
    fixed_bytes: int
    """Size of the index without vectors: centroids, codebooks."""
    vector_bytes: float
    """Size per vector."""


def time_encoding(run: Run) -> EncodingRate:
    """Encode some passages with an untrained encoder and index them."""
    log_line("timing encoding and indexing")
    refresh = run.config.refresh
    with cpu_threads(refresh.threads):
        began = time.monotonic()
        encode, dim = _encoder(run)
        start_s = time.monotonic() - began
        count = min(8, len(run.passages))
        encode(count)
        embeddings_ND, seconds = encode(count)
        while seconds < 2.0 and count < min(SAMPLE_ROWS, len(run.passages)):  # double until the time is meaningful
            count = min(2 * count, SAMPLE_ROWS, len(run.passages))
            encode(count)
            embeddings_ND, seconds = encode(count)
    if refresh.factory != "Flat":  # training needs enough vectors; their values hardly matter for size and time
        embeddings_ND = np.repeat(embeddings_ND, -(-20_000 // len(embeddings_ND)), 0)
        embeddings_ND += np.random.default_rng(0).normal(0, 1e-2, embeddings_ND.shape).astype(np.float32)
    began = time.monotonic()
    index = build_index(embeddings_ND, refresh.factory)
    added_per_s = len(embeddings_ND) / max(time.monotonic() - began, 1e-6)
    once = index_bytes(index)
    index.add(embeddings_ND)
    vector_bytes = (index_bytes(index) - once) / len(embeddings_ND)
    fixed_bytes = int(once - vector_bytes * len(embeddings_ND))
    return EncodingRate(start_s, count / max(seconds, 1e-6), added_per_s, dim, fixed_bytes, vector_bytes)


def _encoder(run: Run) -> tuple[Callable[[int], tuple[np.ndarray, float]], int]:
    """A function that encodes a number of random passages and returns their embeddings and the seconds it took;
    and the embeddings' dimension."""
    retriever = build_retriever(run.config.retriever, run.tokenizer).eval()
    if torch.cuda.is_available():
        retriever.to("cuda")
    refresh, limit = run.config.refresh, run.config.retriever.max_passage_tokens
    tower = encoding_tower(retriever, refresh.precision, refresh.compile)
    rows = np.random.default_rng(run.config.seed).permutation(len(run.passages))[:SAMPLE_ROWS]

    def encode(count: int) -> tuple[np.ndarray, float]:
        began = time.monotonic()
        embeddings = encode_passages(tower, run.passages, rows[:count], run.wordpieces, limit, refresh.token_budget)
        return embeddings, time.monotonic() - began

    return encode, retriever.dim


@dataclass(frozen=True)
class Contention:
    """Trainer and refresher at work on the same cores, relative to each alone."""

    step_factor: float
    """Time of a REALM step while the refresher encodes."""
    encoding_factor: float
    """Time of encoding while the trainer trains."""


def time_contention(run: Run, index: RandomIndex, encoded_per_s: float) -> Contention:
    """Time REALM steps alone and beside a process that encodes, with half of the configured batch."""
    log_line("timing REALM beside a refresher")
    with _sample_stage(run, "pretrain", index) as (stage, engine):
        size = max(1, min(stage.config.batch_size // 2, 8))
        _time_steps(stage, engine, size, WARMUP_STEPS)
        alone = _time_steps(stage, engine, size, 2 * MIN_STEPS)
        context: Any = multiprocessing.get_context("spawn")
        encoded, stop = context.Value("q", -1), context.Event()
        process = context.Process(target=_encode_until, args=(Run(run.folder, run.config), encoded, stop), daemon=True)
        process.start()
        try:
            while encoded.value < 0 and process.is_alive():
                time.sleep(0.05)
            began, before = time.monotonic(), encoded.value
            beside = _time_steps(stage, engine, size, 2 * MIN_STEPS)
            beside = (beside + _time_steps(stage, engine, size, 2 * MIN_STEPS)) / 2
            rate = (encoded.value - before) / (time.monotonic() - began)
        finally:
            stop.set()
            process.join(30)
            process.kill()
    slower = encoded_per_s / rate if rate > 0 else 1.0
    return Contention(max(1.0, beside / alone), max(1.0, slower))


def _encode_until(run: Run, encoded: Any, stop: Any) -> None:
    """Encode passages until told to stop; counts them."""
    with cpu_threads(run.config.refresh.threads):
        encode, _ = _encoder(run)
        encode(min(8, len(run.passages)))
        encoded.value = 0
        while not stop.is_set():
            embeddings, _ = encode(min(64, len(run.passages)))
            encoded.value += len(embeddings)
