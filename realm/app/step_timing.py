"""Measurements for `realm plan`: steps of each training stage, encoding and indexing.

The stages are those of training, on real blocks (`Stage.sample_batch`), with untrained models of
the configured sizes and a random index. No results are saved.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from index.build import build_index
from index.build_timing import BuildRate, time_build
from index.encode import encode_passages, encoding_tower
from realm.app.stages import STAGE_FACTORIES
from realm.errors import UserError
from realm.models.retriever import build_retriever
from realm.run.folder import Run
from realm.runtime.signals import without_interrupts
from realm.runtime.telemetry import log_line, peak_memory
from realm.runtime.threads import cpu_threads
from realm.training.engine import Engine
from realm.training.stage import Stage

AFFORDABLE_S = 60.0
"""Maximum seconds to time one batch size; the time of larger batches is extrapolated."""
MIN_STEPS, MAX_STEPS = 4, 32
"""Steps timed per batch size."""
ENOUGH_S = 8.0
"""Timing ends after this many seconds, but not before `MIN_STEPS` steps."""
WARMUP_STEPS = 3
"""Untimed steps before the timed ones."""
SAMPLE_ROWS = 512
"""Maximum number of passages encoded to measure the rate of encoding."""
_GOLDEN_RATIO = (5**0.5 - 1) / 2
MAX_RANDOM_ROWS = 200_000
"""Maximum number of vectors in the random index."""


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
        """Seconds of the whole stage."""
        return self.steps * self.seconds_per_step


class RandomIndex:
    """An index of random vectors: searches are executed, but return random passages."""

    def __init__(self, num_vectors: int, dim: int, rows: np.ndarray, seed: int) -> None:
        """`rows`: the passages that searches can return, ascending."""
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

    @property
    def lexical(self) -> "RandomIndex":
        """Random scores in the place of BM25."""
        return self

    def scores(self, query_terms: Sequence[str]) -> np.ndarray:
        """Random scores of all rows."""
        return self.rng.random(int(self.rows[-1]) + 1, dtype=np.float32)

    def close(self) -> None:
        """Do nothing."""


def random_index(run: Run, num_passages: int) -> RandomIndex:
    """A random index of `num_passages` vectors with the dimension of the run's embeddings."""
    config = run.config.retriever
    dim = config.projection_dim if config.projection == "linear" else build_retriever(config, run.tokenizer).dim
    return RandomIndex(num_passages, dim, run.passages.rows, run.config.seed)


def time_stage(run: Run, name: str, index: RandomIndex) -> StagePlan:
    """Forecast a stage from the time of some steps."""
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
    """Open a stage for timing, under DeepSpeed."""
    threads = run.config.threads(name)
    torch.manual_seed(run.config.seed)
    with cpu_threads(threads), STAGE_FACTORIES[name].open_for_timing(run, index) as stage:
        config = replace(run.config.engine, threads=threads)
        engine = Engine(stage.module, stage.config, config, stage.modules_called_between_steps())
        stage.begin(engine)
        yield stage, engine


def _time_steps(stage: Stage, engine: Engine, size: int, count: int) -> float:
    """Seconds per step with batches of `size`, over up to `count` steps across the whole stage.

    Batches are not reused, because batches of new shapes take longer, in training too.
    """
    began = time.monotonic()
    done = 0
    for number in range(count):
        step = int((0.5 + number * _GOLDEN_RATIO) % 1 * stage.config.steps)
        engine.step(stage.sample_batch(step, size).to(engine.device))
        stage.after_step(step + 1)
        done += 1
        if done >= MIN_STEPS and time.monotonic() - began > ENOUGH_S:
            break
    return (time.monotonic() - began) / done


def extrapolate(measured: Sequence[tuple[int, float]], batch_size: int) -> float:
    """Seconds per step at `batch_size`, from (size, seconds) of ascending sizes.

    Extrapolates linearly from the two largest sizes. The time per additional row is limited to
    between 50 and 100 % of the time per row of the largest size, in case a measurement was
    disturbed.
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
    """How fast passages are encoded and indexed."""

    start_s: float
    """Seconds before the first passage, for compiling if it is configured."""
    encoded_per_s: float
    """Passages per second with the refresher's threads."""
    build: BuildRate
    dim: int


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
        build = time_build(embeddings_ND, refresh.factory)
    return EncodingRate(start_s, count / max(seconds, 1e-6), build, dim)


def _encoder(run: Run) -> tuple[Callable[[int], tuple[np.ndarray, float]], int]:
    """A function that encodes a number of random passages, and the dimension of the embeddings.

    The function returns the embeddings and the seconds it took.
    """
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
    """Slowdown of trainer and refresher when they share the cores, relative to each alone."""

    step_factor: float
    """Factor on the time of a REALM step while the refresher encodes."""
    encoding_factor: float
    """Factor on the time of encoding while the trainer trains."""


def time_contention(run: Run, index: RandomIndex, encoded_per_s: float) -> Contention:
    """Time REALM steps alone and while another process encodes, with half the batch size.

    Raises UserError if that process fails.
    """
    log_line("timing REALM with a refresher")
    with _sample_stage(run, "pretrain", index) as (stage, engine):
        size = max(1, min(stage.config.batch_size // 2, 8))
        _time_steps(stage, engine, size, WARMUP_STEPS)
        alone = _time_steps(stage, engine, size, 2 * MIN_STEPS)
        context: Any = multiprocessing.get_context("spawn")
        encoded = context.Value("q", -1)
        process = context.Process(target=_keep_encoding, args=(Run(run.folder, run.config), encoded), daemon=True)
        with without_interrupts():
            process.start()
        try:
            while encoded.value < 0 and process.is_alive():
                time.sleep(0.05)
            if encoded.value < 0:
                raise UserError(
                    f"the process that encodes for the plan ended with status {process.exitcode}; see its output above."
                )
            began, before = time.monotonic(), encoded.value
            shared = _time_steps(stage, engine, size, 2 * MIN_STEPS)
            shared = (shared + _time_steps(stage, engine, size, 2 * MIN_STEPS)) / 2
            rate = (encoded.value - before) / (time.monotonic() - began)
        finally:
            process.kill()
            process.join()
    slower = encoded_per_s / rate if rate > 0 else 1.0
    return Contention(max(1.0, shared / alone), max(1.0, slower))


def _keep_encoding(run: Run, encoded: Any) -> None:
    """Encode passages until the parent process ends; count them in `encoded`."""
    parent = multiprocessing.parent_process()
    with cpu_threads(run.config.refresh.threads):
        encode, _ = _encoder(run)
        encode(min(8, len(run.passages)))
        encoded.value = 0
        while parent is None or parent.is_alive():
            embeddings, _ = encode(min(64, len(run.passages)))
            encoded.value += len(embeddings)
