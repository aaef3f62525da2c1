"""Timing this machine: a few steps of each stage, built as configured, on real blocks; encoding
and indexing likewise. Weights are not kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import nn

from finetune.data import QuestionBatches
from finetune.questions import Question
from finetune.train_reader import untie_towers
from index.build import build_index, index_bytes
from index.encode import encode_passages, encoding_tower
from pretrain.data import MaskedSentence, SpanSampler
from pretrain.ict import IctBatches
from pretrain.search import embed_masked
from pretrain.stage import batch_maker
from realm.models.modules import Batch, DualEncoderModel, OpenQaModel, PairBatch, ReaderPretrainingModel, RealmModel
from realm.models.reader import build_reader
from realm.models.retriever import Retriever, build_retriever
from realm.run.folder import Run
from realm.runtime.telemetry import console, peak_memory
from realm.runtime.threads import cpu_threads
from realm.training.engine import Engine

AFFORDABLE_S = 60.0
"""Seconds that timing one batch size may take; where the configured one would take more, sizes
that do not tell it."""
_REPEATS = 4
SAMPLE_ROWS = 512
"""Passages encoded at most for the rate of encoding."""


@dataclass(frozen=True)
class StagePlan:
    """One training stage as it will run here."""

    steps: int
    seconds_per_step: float
    parameters: int
    activation_bytes: int
    """What a step needs beyond parameters, gradients and optimiser."""

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_per_step


def time_stage(run: Run, stage: str) -> StagePlan:
    """Time a few steps of a stage on random sentences and passages of the run's own corpora."""
    console.print(f"  timing {stage}")
    with cpu_threads(run.config.threads(stage)):
        return _time_stage(run, stage)


def _time_stage(run: Run, stage: str) -> StagePlan:
    torch.manual_seed(run.config.seed)
    module, make_batch = _STAGES[stage](run)
    config = getattr(run.config, stage)
    settings = replace(run.config.engine, threads=run.config.threads(stage))
    engine = Engine(module, config.optim, settings, 100, config.batch_size)
    number = 0

    def timed(batch_size: int, repeats: int) -> float:
        nonlocal number
        seconds = 0.0
        for _ in range(repeats):
            number += 1
            for _ in range(2):  # the first time at a shape its kernels are made, which a long run does not notice
                began = time.monotonic()
                engine.step(make_batch(number, batch_size).to(engine.device))
            seconds += time.monotonic() - began
        return seconds / repeats

    size = min(2, config.batch_size)
    timed(size, 1)  # the first call allocates and compiles
    resting = _memory()
    measured = [(size, timed(size, _REPEATS))]
    while size < config.batch_size and 2 * measured[-1][1] * 2 * _REPEATS <= AFFORDABLE_S:
        size = min(2 * size, config.batch_size)
        measured.append((size, timed(size, _REPEATS)))
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    activations = max(0, _memory() - resting) * config.batch_size / size
    return StagePlan(config.steps, extrapolate(measured, config.batch_size), parameters, int(activations))


def extrapolate(measured: Sequence[tuple[int, float]], batch_size: int) -> float:
    """Seconds a step at `batch_size`, from (size, seconds) of ascending sizes: those of the
    largest, and for each row beyond it what its rows took more than those of the size before;
    never less than half of what its own rows took, should the two have been disturbed."""
    size, seconds = measured[-1]
    a_row = seconds / size
    if len(measured) > 1:
        before, less = measured[-2]
        a_row = min(a_row, max(a_row / 2, (seconds - less) / (size - before)))
    return seconds + (batch_size - size) * a_row


def _memory() -> int:
    """Peak bytes so far, of the GPU where there is one."""
    peak = peak_memory()
    return int(peak.get("peak_gpu_gib", peak["peak_gib"]) * 2**30)


_Maker = tuple[nn.Module, Callable[[int, int], Batch]]


def _ict(run: Run) -> _Maker:
    @cache
    def batches(size: int) -> IctBatches:
        return IctBatches(run.passages, batch_maker(run), replace(run.config.ict, batch_size=size), run.config.seed)

    def make(step: int, size: int) -> Batch:
        return batches(size)(step)

    return DualEncoderModel(build_retriever(run.config.retriever, run.tokenizer)), make


class _Examples:
    """Masked sentences as a function of the step, and the generator that drew them."""

    def __init__(self, run: Run) -> None:
        self.seed = run.config.seed
        longest = run.config.retriever.max_query_tokens - 2
        self.sampler = SpanSampler(run.statements, run.config.pretrain.max_span_tokens, longest, max_rows=2000)

    def __call__(self, step: int, size: int) -> tuple[list[MaskedSentence], np.random.Generator]:
        rng = np.random.default_rng((self.seed, step))
        return [self.sampler.draw(int(row), rng) for row in rng.choice(self.sampler.rows, size)], rng


def _reader_pretraining(run: Run) -> _Maker:
    config, maker, draw = run.config.reader_pretraining, batch_maker(run), _Examples(run)
    # Sentences are read first, then whole passages: timed in the mixture in which the stage will
    # see them.
    sentence_share = config.sentence_steps / config.steps

    def make(step: int, size: int) -> Batch:
        examples, rng = draw(step, size)
        rows = rng.integers(len(run.passages), size=size)
        parts = [maker.reading(int(row)) for row in rows]
        if int((step + 1) * sentence_share) > int(
            step * sentence_share
        ):  # of so many steps in a row, their exact share
            parts = [
                (title[:0], text[: len(example.sentence_ids)])
                for (title, text), example in zip(parts, examples, strict=True)
            ]
        return maker.reader_pretraining(examples, parts, run.config.reader.max_span_tokens)

    return ReaderPretrainingModel(build_reader(run.config.reader, run.tokenizer)[0], config.span_loss), make


def _pretrain(run: Run) -> _Maker:
    config, maker, draw = run.config.pretrain, batch_maker(run), _Examples(run)
    retriever = build_retriever(run.config.retriever, run.tokenizer)

    def make(step: int, size: int) -> Batch:
        examples, rng = draw(step, size)
        embed_masked(retriever.query_tower, examples, maker, run.config.engine.precision)
        rows = rng.integers(len(run.passages), size=(size, config.candidates - 1))
        return maker.realm(examples, rows, None, 0.0, rng)

    return RealmModel(retriever, build_reader(run.config.reader, run.tokenizer)[0], config.marginal), make


class _NoIndex:
    """Stands for an index where only the shape of its embeddings counts."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), self.dim), np.float32)


def _finetune_retriever(run: Run) -> _Maker:
    config, maker, draw = run.config.finetune_retriever, batch_maker(run), _Examples(run)

    def make(step: int, size: int) -> Batch:
        examples, rng = draw(step, size)
        rows = rng.integers(len(run.passages), size=size * (1 + config.negatives))
        passages = maker.passage_inputs([maker.passage(int(row)) for row in rows])
        return PairBatch(
            *maker.queries(examples), *passages, torch.arange(size), torch.zeros(size, len(rows), dtype=torch.bool)
        )

    return DualEncoderModel(build_retriever(run.config.retriever, run.tokenizer)), make


def _finetune(run: Run) -> _Maker:
    config = run.config.finetune
    retriever: Retriever = untie_towers(build_retriever(run.config.retriever, run.tokenizer))
    for parameter in retriever.passage_tower.parameters():
        parameter.requires_grad_(False)
    draw = _Examples(run)
    batches = QuestionBatches(run, _NoIndex(retriever.dim))  # type: ignore[arg-type]

    def make(step: int, size: int) -> Batch:
        examples, rng = draw(step, size)
        questions = [
            Question(str(step), "", ("",), example.sentence_ids[:24], (example.span_ids,)) for example in examples
        ]
        rows = rng.integers(len(run.passages), size=(size, config.retrieve))
        return batches.batch(questions, batches.queries(questions), rows, rows[:, : config.read])

    return OpenQaModel(retriever, build_reader(run.config.reader, run.tokenizer)[0]), make


_STAGES: dict[str, Callable[[Run], _Maker]] = {
    "ict": _ict,
    "reader_pretraining": _reader_pretraining,
    "pretrain": _pretrain,
    "finetune_retriever": _finetune_retriever,
    "finetune": _finetune,
}


@dataclass(frozen=True)
class EncodingRate:
    """How fast passages are encoded and indexed here, and how large the index grows."""

    start_s: float
    """Seconds before the first passage: compiling, where the config says so."""
    encoded_per_s: float
    """Passages, with the refresher's threads."""
    added_per_s: float
    dim: int
    fixed_bytes: int
    """What the index takes however many vectors it holds: centroids, codebooks."""
    vector_bytes: float


def time_encoding(run: Run) -> EncodingRate:
    """Encode some passages with random weights of the configured shape and index them."""
    console.print("  timing encoding and indexing")
    retriever = build_retriever(run.config.retriever, run.tokenizer).eval()
    if torch.cuda.is_available():
        retriever.to("cuda")
    rows = np.random.default_rng(run.config.seed).permutation(len(run.passages))[:SAMPLE_ROWS]
    refresh = run.config.refresh

    def encode(count: int) -> tuple[np.ndarray, float]:
        began = time.monotonic()
        limit = run.config.retriever.max_passage_tokens
        embeddings = encode_passages(tower, run.passages, rows[:count], run.wordpieces, limit, refresh.token_budget)
        return embeddings, time.monotonic() - began

    with cpu_threads(refresh.threads):
        began = time.monotonic()
        tower = encoding_tower(retriever, refresh.precision, refresh.compile)
        start_s = time.monotonic() - began
        count = min(8, len(rows))
        encode(count)
        embeddings_ND, seconds = encode(count)
        while seconds < 2.0 and count < len(rows):  # twice as many each time, until the time says something
            count = min(2 * count, len(rows))
            encode(count)
            embeddings_ND, seconds = encode(count)
    if (
        refresh.factory != "Flat"
    ):  # what needs training needs enough vectors; their values do not matter for size and hardly for time
        embeddings_ND = np.repeat(embeddings_ND, -(-20_000 // len(embeddings_ND)), 0)
        embeddings_ND += np.random.default_rng(0).normal(0, 1e-2, embeddings_ND.shape).astype(np.float32)
    began = time.monotonic()
    index = build_index(embeddings_ND, refresh.factory)
    added_per_s = len(embeddings_ND) / max(time.monotonic() - began, 1e-6)
    once = index_bytes(index)
    index.add(embeddings_ND)
    vector_bytes = (index_bytes(index) - once) / len(embeddings_ND)
    fixed_bytes = int(once - vector_bytes * len(embeddings_ND))
    return EncodingRate(start_s, count / max(seconds, 1e-6), added_per_s, retriever.dim, fixed_bytes, vector_bytes)
