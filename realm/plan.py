"""`realm plan`: what a run will take on this machine, from a short measured calibration, before anything is paid for.

Each stage is built as configured and a few of its steps are timed on real blocks; encoding and search likewise. Weights are never kept.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from finetune.data import QuestionBatches
from finetune.questions import Question
from finetune.train import untied
from index.build import build_index, index_bytes
from index.encode import encode_passages
from pretrain.data import MaskedSentence, SpanSampler
from pretrain.ict import IctBatches
from pretrain.search import embed_masked
from pretrain.stage import batch_maker
from realm.config import RealmConfig
from realm.engine import Engine
from realm.errors import UserError
from realm.model import Batch, IctModel, OpenQaModel, ReaderWarmupModel, RealmModel
from realm.pipeline import prepare
from realm.reader import build_reader
from realm.retriever import Retriever, build_retriever
from realm.run import STAGES, Run
from realm.telemetry import console, format_seconds, peak_memory, print_table

SAMPLE_DOCUMENTS = 1000
"""Documents of each source that are prepared to calibrate on where the corpus is not prepared yet."""
AFFORDABLE_S = 20.0
"""Seconds that timing one batch size may take; where the configured one would take more, the largest that does not is scaled up."""
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


@dataclass(frozen=True)
class Plan:
    """Times in seconds, sizes in bytes."""

    passages: int
    stages: dict[str, StagePlan]
    encode_seconds: float
    """All passages, by a refresher with `refresh.threads`."""
    build_seconds: float
    dim: int
    index_bytes: int
    prepared_bytes: int
    refresh_period_seconds: float
    """Seconds of training between two exports."""

    @property
    def refresh_seconds(self) -> float:
        return self.encode_seconds + self.build_seconds


def plan(config: RealmConfig, passages: int | None = None) -> Plan:
    """Calibrate and print; `passages` is the size of the corpus where only a sample of it is at hand.

    Raises UserError where nothing is prepared and `passages` is not given, and for everything that would stop the run itself.
    """
    with tempfile.TemporaryDirectory(prefix="realm-plan-") as folder:
        prepared = (Path(config.corpus.prepared) / "passages" / "manifest.json").exists()
        if not prepared:
            if passages is None:
                raise UserError("nothing is prepared yet, so the size of the corpus is not known; give it with --passages N, or run realm prepare.")
            console.print(f"calibrating on a sample of {SAMPLE_DOCUMENTS:,} documents of each source")
            sample = replace(config.corpus, prepared=folder, limit=SAMPLE_DOCUMENTS)
            config = replace(config, corpus=sample)
            prepare(config)
        run = Run(Path(folder), config)
        count = passages or len(run.passages)
        stages = {stage: _time_stage(run, stage) for stage in STAGES if getattr(config, stage).steps}
        rate, build_rate, dim, vector_bytes = _time_encoding(run)
        manifest = run.passages.manifest
        result = Plan(
            passages=count,
            stages=stages,
            encode_seconds=count / rate,
            build_seconds=count / build_rate,
            dim=dim,
            index_bytes=int(count * vector_bytes),
            prepared_bytes=int(count * manifest["bytes"] / manifest["blocks"]),
            refresh_period_seconds=stages["pretrain"].seconds_per_step * config.refresh.every_steps if "pretrain" in stages else float("inf"),
        )
    result = _with_refresher(result, config)
    print_plan(result, config)
    return result


def _with_refresher(result: Plan, config: RealmConfig) -> Plan:
    """On a CPU the refresher takes cores from the trainer for as long as it encodes; on a GPU of its own it takes nothing."""
    if "pretrain" not in result.stages or torch.cuda.is_available():
        return result
    cores = _num_cores()
    left = max(0.5, cores - config.refresh.threads) / cores
    stage = result.stages["pretrain"]
    busy = min(1.0, result.refresh_seconds / result.refresh_period_seconds)
    # While it encodes, the trainer's step takes 1/left as long, and the period with it.
    slower = stage.seconds_per_step * (1 - busy + busy / left)
    stages = result.stages | {"pretrain": replace(stage, seconds_per_step=slower)}
    return replace(result, stages=stages, refresh_period_seconds=slower * config.refresh.every_steps)


def _num_cores() -> int:
    return torch.get_num_threads()


def _time_stage(run: Run, stage: str) -> StagePlan:
    """Time a few steps of a stage on random sentences and passages of the run's own corpora."""
    console.print(f"  timing {stage}")
    torch.manual_seed(run.config.seed)
    module, make_batch = _STAGES[stage](run)
    config = getattr(run.config, stage)
    engine = Engine(module, config.optim, run.config.engine, 100, config.batch_size)
    number = 0

    def timed(batch_size: int, repeats: int) -> float:
        nonlocal number
        began = time.monotonic()
        for _ in range(repeats):
            number += 1
            engine.step(make_batch(number, batch_size).to(engine.device))
        return (time.monotonic() - began) / repeats

    size = min(2, config.batch_size)
    timed(size, 1)  # the first call allocates and compiles
    resting = _memory()
    seconds = timed(size, 1)
    while size < config.batch_size and 2 * seconds * (1 + _REPEATS) <= AFFORDABLE_S:
        size = min(2 * size, config.batch_size)
        timed(size, 1)
        seconds = timed(size, _REPEATS)
    scale = config.batch_size / size
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return StagePlan(config.steps, seconds * scale, parameters, int(max(0, _memory() - resting) * scale))


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

    return IctModel(build_retriever(run.config.retriever, run.tokenizer)), make


class _Examples:
    """Masked sentences as a function of the step, and the generator that drew them."""

    def __init__(self, run: Run) -> None:
        self.seed = run.config.seed
        longest = run.config.retriever.max_query_tokens - 2
        self.sampler = SpanSampler(run.statements, run.config.pretrain.max_span_tokens, longest, max_rows=2000)

    def __call__(self, step: int, size: int) -> tuple[list[MaskedSentence], np.random.Generator]:
        rng = np.random.default_rng((self.seed, step))
        return [self.sampler.draw(int(row), rng) for row in rng.choice(self.sampler.rows, size)], rng


def _reader_warmup(run: Run) -> _Maker:
    config, maker, draw = run.config.reader_warmup, batch_maker(run), _Examples(run)
    # Sentences are read first, then whole passages: timed in the mixture in which the stage will see them.
    sentence_share = config.sentence_steps / config.steps

    def make(step: int, size: int) -> Batch:
        examples, rng = draw(step, size)
        rows = rng.integers(len(run.passages), size=size)
        parts = [maker.passage(int(row)) for row in rows]
        if rng.random() < sentence_share:
            parts = [(title[:0], text[: len(example.sentence_ids)]) for (title, text), example in zip(parts, examples, strict=True)]
        return maker.warmup(examples, parts, run.config.reader.max_span_tokens)

    return ReaderWarmupModel(build_reader(run.config.reader, run.tokenizer)[0], config.span_loss), make


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


def _finetune(run: Run) -> _Maker:
    config = run.config.finetune
    retriever: Retriever = untied(build_retriever(run.config.retriever, run.tokenizer))
    for parameter in retriever.passage_tower.parameters():
        parameter.requires_grad_(False)
    draw = _Examples(run)
    batches = QuestionBatches(run, _NoIndex(retriever.dim))  # type: ignore[arg-type]

    def make(step: int, size: int) -> Batch:
        examples, rng = draw(step, size)
        questions = [Question(str(step), "", ("",), example.sentence_ids[:24], (example.span_ids,)) for example in examples]
        rows = rng.integers(len(run.passages), size=(size, config.retrieve))
        return batches.batch(questions, batches.queries(questions), rows, rows[:, : config.read])

    return OpenQaModel(retriever, build_reader(run.config.reader, run.tokenizer)[0]), make


_STAGES: dict[str, Callable[[Run], _Maker]] = {"ict": _ict, "reader_warmup": _reader_warmup, "pretrain": _pretrain, "finetune": _finetune}


def _time_encoding(run: Run) -> tuple[float, float, int, float]:
    """Passages encoded a second with the refresher's threads, added to an index a second, dimension, bytes a vector takes in the index."""
    console.print("  timing encoding and indexing")
    retriever = build_retriever(run.config.retriever, run.tokenizer).eval()
    if torch.cuda.is_available():
        retriever.to("cuda")
    rows = np.random.default_rng(run.config.seed).permutation(len(run.passages))[:SAMPLE_ROWS]
    refresh, threads = run.config.refresh, torch.get_num_threads()
    autocast = torch.bfloat16 if refresh.precision == "bf16" else None

    def encode(rows: np.ndarray) -> np.ndarray:
        limit = run.config.retriever.max_passage_tokens
        return encode_passages(retriever, run.passages, rows, run.wordpieces, limit, refresh.token_budget, autocast)

    torch.set_num_threads(refresh.threads)
    count, seconds = 8, 0.0
    encode(rows[:count])
    while seconds < 2.0 and count < len(rows):  # twice as many each time, until the time says something
        count = min(2 * count, len(rows))
        began = time.monotonic()
        embeddings_ND = encode(rows[:count])
        seconds = time.monotonic() - began
    rate = count / seconds
    torch.set_num_threads(threads)
    if refresh.factory != "Flat":  # what needs training needs enough vectors; their values do not matter for size and hardly for time
        copies = -(-20_000 // len(embeddings_ND))
        embeddings_ND = np.repeat(embeddings_ND, copies, 0)
        embeddings_ND += np.random.default_rng(0).normal(0, 1e-2, embeddings_ND.shape).astype(np.float32)
    began = time.monotonic()
    index = build_index(embeddings_ND, refresh.factory)
    build_rate = len(embeddings_ND) / max(time.monotonic() - began, 1e-6)
    return rate, build_rate, retriever.dim, index_bytes(index) / len(embeddings_ND)


def print_plan(result: Plan, config: RealmConfig) -> None:
    """Tables of times and sizes, and a warning for each thing that will not go well."""
    rows: list[list[object]] = [
        [stage, f"{entry.steps:,}", f"{1 / entry.seconds_per_step:.2f}" if entry.seconds_per_step < 1 else f"1 / {entry.seconds_per_step:.1f} s",
         format_seconds(entry.seconds)] for stage, entry in result.stages.items()
    ]  # fmt: skip
    rows.append(["all stages", "", "", format_seconds(sum(entry.seconds for entry in result.stages.values()))])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_num_cores()} CPU threads"
    print_table(f"Training on one process, {device}", ["stage", "steps", "steps a second", "time"], rows)
    lag = result.refresh_seconds / result.refresh_period_seconds * config.refresh.every_steps
    print_table(
        f"Refreshing an index of {result.passages:,} passages, {result.dim} dimensions, {config.refresh.threads} threads",
        ["what", "value"],
        [
            ["passages encoded a second", f"{result.passages / result.encode_seconds:,.0f}"],
            ["one refresh", format_seconds(result.refresh_seconds)],
            ["training between two exports", format_seconds(result.refresh_period_seconds)],
            ["the index is behind by", f"{lag:,.0f} to {lag + max(lag, config.refresh.every_steps):,.0f} steps"],
        ],
    )
    biggest = max(result.stages.values(), key=lambda entry: entry.parameters * 16 + entry.activation_bytes, default=None)
    if biggest is not None:
        model = biggest.parameters * 4
        checkpoints = config.engine.keep_checkpoints * model * 3
        exports = config.pretrain.steps // config.refresh.every_steps * model // 2
        sizes: list[tuple[str, int, int]] = [
            ("parameters", model, 0),
            ("gradients", model, 0),
            ("optimiser", 2 * model, 0),
            ("activations", biggest.activation_bytes, 0),
            ("index", result.index_bytes, (config.refresh.keep_last + 1) * result.index_bytes),
            ("embeddings being built", 0, result.passages * result.dim * 4),
            ("prepared corpus", 0, result.prepared_bytes),
            ("checkpoints of a stage", 0, checkpoints),
            ("exported encoders", 0, exports),
        ]
        total = ("in all", sum(size[1] for size in sizes), sum(size[2] for size in sizes))
        table: list[list[object]] = [[name, _size(memory), _size(disk)] for name, memory, disk in (*sizes, total)]
        print_table("Memory of the largest stage, and disk", ["part", "memory", "disk"], table)
    for line in warnings(result, config):
        console.print(f"[bold]warning:[/bold] {line}")


def warnings(result: Plan, config: RealmConfig) -> list[str]:
    """What will not go well, each with a remedy."""
    found = []
    if result.refresh_seconds > result.refresh_period_seconds:
        enough = int(np.ceil(config.refresh.every_steps * result.refresh_seconds / result.refresh_period_seconds / 10) * 10)
        found.append(
            f"a refresh takes {format_seconds(result.refresh_seconds)}, longer than the {format_seconds(result.refresh_period_seconds)} between two "
            f"exports: some exports get no index; set refresh.every_steps to {enough} or more, or give the refresher more threads or a GPU."
        )
    limit = config.refresh.max_stale_steps
    lag = config.refresh.every_steps * result.refresh_seconds / result.refresh_period_seconds
    if limit is not None and lag > limit:
        found.append(f"the index will be more than refresh.max_stale_steps = {limit} steps behind; policy: {config.refresh.stale_policy}.")
    return found


def _size(number: int) -> str:
    if not number:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:.1f} TiB"
