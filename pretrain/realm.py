"""REALM pretraining: masked salient spans, candidates from a live index, marginal likelihood
(Guu et al. 2020, sections 3.2 to 3.4)."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import torch
from torch import nn

from index.drift import DRIFT_FILE, DriftReference
from index.frozen import publish_frozen
from index.live import LiveIndex
from index.replay import read_replay
from index.search import PassageIndex
from pretrain.data import NULL, MaskedSentence, SpanSampler, choose_candidates
from pretrain.masked_span_eval import masked_accuracy
from pretrain.reader_pretraining import find_supporting_passage
from pretrain.search import embed_masked
from pretrain.stage import batch_maker
from realm.corpus.substitution import span_pool
from realm.errors import UserError
from realm.models.modules import RealmBatch, RealmModel
from realm.models.reader import Reader
from realm.models.retriever import Retriever, load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_reader, initial_retriever
from realm.run.stage import export_retriever, save_models
from realm.runtime.distributed import is_rank_zero, local_device, on_rank_zero, rank, world_size
from realm.runtime.publish import Version
from realm.runtime.telemetry import Metrics, console
from realm.runtime.threads import cpu_threads
from realm.text.inputs import epoch_rows
from realm.training.engine import Engine, Loop, newest_checkpoint, read_state

STAGE = "pretrain"


def train_realm(run: Run, resume: bool = False, with_refresher: bool = False, replay: Path | None = None) -> None:
    """Train the stage beside a refresher and write `pretrain/model`.

    `replay`: a run folder, this one or another, whose log says which index each step searches;
    where it ends, the newest counts again. Raises UserError where no index appears within
    `refresh.wait_timeout_s`, or the staleness policy says stop.
    """
    config = run.config.pretrain
    if not run.begin(STAGE, resume):
        return
    if config.candidates - 1 > len(run.passages):
        raise UserError(
            f"pretrain.candidates ({config.candidates}) exceeds the corpus of {len(run.passages)} passages and the null passage; lower it."
        )
    torch.manual_seed(run.config.seed + 2)
    source = initial_retriever(run, STAGE)
    retriever, reader = load_retriever(source)[0], initial_reader(run, STAGE)
    checkpoint = newest_checkpoint(run.stage(STAGE))
    state = {} if checkpoint is None else read_state(checkpoint)
    start = state.get("step", 0)
    log = None if replay is None else on_rank_zero(lambda: read_replay(replay))
    metrics = Metrics(run.folder, STAGE, is_rank_zero())
    engine_config = replace(run.config.engine, threads=run.config.threads(STAGE))
    starting = LiveIndex.begin(
        run.folder,
        run.config.refresh,
        run.passages,
        run.tokenizer,
        retriever.dim,
        state.get("attempt"),
        start,
        log,
        engine_config.threads,
    )
    with cpu_threads(engine_config.threads), starting as live:
        if live.needs_export():
            if start:
                raise UserError(
                    f"{run.folder}/encoders has no export from before step {start}; restore it from a copy of the run."
                )
            live.export(0, lambda folder: copytree(source, folder, dirs_exist_ok=True))
            if on_rank_zero(
                lambda: publish_frozen(run.folder, source, run.passages, run.config.refresh, Version(live.attempt, 0))
            ):
                console.print("  the first index is the one that the reader was warmed up with")
        if with_refresher:
            live.start_refresher()
        live.wait_for_first(start)
        if checkpoint is None and config.reader_check:
            check_reader(
                run, retriever.to(local_device()), reader.to(local_device()), live
            )  # before DeepSpeed takes the parameters apart
        model = RealmModel(retriever, reader, config.marginal)
        towers = [retriever.query_tower] if retriever.shared else [retriever.query_tower, retriever.passage_tower]
        engine = Engine(model, config.optim, engine_config, config.steps, config.batch_size, towers)
        loop = Loop(
            engine, run.stage(STAGE), STAGE, config.steps, config.checkpoint_every, engine_config, run.config.seed
        )
        loop.resume()
        candidates = Candidates(run, lambda: engine.gathered_copy(retriever.query_tower), live)
        exports = Exports(run, lambda: engine.gathered_copy(retriever.passage_tower))
        if checkpoint is not None:
            candidates.restore(checkpoint, start)
            exports.restore(checkpoint)

        def after_step(step: int) -> dict[str, float | str]:
            drift = exports.drift(step)
            if exports.due(step, drift):
                with engine.gathered(retriever):
                    live.export(step, lambda folder: export_retriever(run, retriever, folder))
                exports.snapshot()
            return candidates.timing | live.telemetry(step) | ({} if drift is None else {"drift": drift})

        def save(folder: Path) -> None:
            candidates.save(folder)
            exports.save(folder)

        seconds = loop.run(
            start,
            lambda step: candidates.batch(step).to(engine.device),
            metrics,
            lambda values: (
                f"loss {values['loss']:.2f}  utility {values['utility']:+.2f}  null {values['null_mass']:.2f}  "
                f"hits {values['candidate_hit_rate']:.2f}  index {values['index']} ({values['steps_behind']:.0f} behind)"
            ),
            after_step,
            lambda: {"attempt": live.attempt},
            save,
            state.get("seconds", 0.0),
        )
        candidates.close()
        with engine.gathered(retriever, reader):
            save_models(run, STAGE, seconds, retriever=retriever, reader=reader)
        live.training_ended()
    metrics.close()


class Exports:
    """When the retriever is exported: by period, by drift, or both, and at the end."""

    def __init__(self, run: Run, passage_tower: Callable[[], nn.Module]) -> None:
        """`passage_tower()` is the tower with the weights of the moment; all ranks must call
        this and the methods together."""
        self.config, self.steps, self.passage_tower = run.config.refresh, run.config.pretrain.steps, passage_tower
        self.reference: DriftReference | None = None
        if self.config.max_drift is not None:
            longest, precision = run.config.retriever.max_passage_tokens, run.config.engine.precision
            self.reference = DriftReference(
                run.passages, run.wordpieces, self.config.drift_passages, longest, precision
            )
        self.snapshot()

    def drift(self, step: int) -> float | None:
        """How far the passage embeddings have moved since the last export, where it is time to
        look."""
        if self.reference is None or step % self.config.drift_every:
            return None
        reference, tower = self.reference, self.passage_tower()
        return on_rank_zero(lambda: reference.moved(tower))

    def due(self, step: int, drift: float | None) -> bool:
        """Whether to export after this step."""
        by_period = self.config.period > 0 and step % self.config.period == 0
        by_drift = drift is not None and self.config.max_drift is not None and drift >= self.config.max_drift
        return by_period or by_drift or step == self.steps

    def snapshot(self) -> None:
        """Drift is measured from these weights on."""
        if self.reference is not None:
            reference, tower = self.reference, self.passage_tower()
            on_rank_zero(lambda: reference.snapshot(tower))

    def save(self, checkpoint: Path) -> None:
        """Add to a checkpoint what drift is measured from."""
        if self.reference is not None and is_rank_zero():
            np.save(checkpoint / DRIFT_FILE, self.reference.snapshot_PD)

    def restore(self, checkpoint: Path) -> None:
        """Measure from where the checkpoint's run did; from here where it measured nothing."""
        if self.reference is not None and is_rank_zero() and (checkpoint / DRIFT_FILE).exists():
            self.reference.snapshot_PD = np.load(checkpoint / DRIFT_FILE)


class Candidates:
    """Examples and candidates of each step, found one step ahead.

    While step t trains, the candidates of step t + 1 are searched on a thread; their queries are
    embedded on the main thread before, with the weights of step t. What is pending when a
    checkpoint is written belongs to it.
    """

    def __init__(self, run: Run, query_tower: Callable[[], nn.Module], live: LiveIndex) -> None:
        """`query_tower()` is the tower with the weights of the moment."""
        self.run, self.config, self.query_tower, self.live = run, run.config.pretrain, query_tower, live
        self.maker = batch_maker(run)
        self.sampler = SpanSampler(run.statements, self.config.max_span_tokens, self.maker.max_query - 2)
        self.pool = (
            span_pool([run.statements, run.passages], self.config.max_span_tokens)
            if self.config.substitution_prob
            else None
        )
        self.timing: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="candidates")
        self._pending: tuple[int, list[MaskedSentence], Future[np.ndarray]] | None = None

    def examples(self, step: int) -> list[MaskedSentence]:
        """Masked sentences of a step, a function of seed and step."""
        rows = epoch_rows(
            len(self.sampler.rows), self.config.batch_size * world_size(), step, self.run.config.seed + 2
        )[rank() :: world_size()]
        rng = np.random.default_rng((self.run.config.seed, step, rank(), 4))
        return [self.sampler.draw(int(self.sampler.rows[row]), rng) for row in rows]

    def batch(self, step: int) -> RealmBatch:
        """The batch of `step`; starts the search for the next one."""
        began = time.monotonic()
        if self._pending is not None:
            self._pending[2].result()  # a swap closes the index that this searches
        self.live.swap(step)
        if self._pending is None:
            self._search_ahead(step)
        assert self._pending is not None and self._pending[0] == step
        _, examples, future = self._pending
        candidates = future.result()
        found = time.monotonic()
        self._search_ahead(step + 1)
        embedded = time.monotonic()
        rng = np.random.default_rng((self.run.config.seed, step, rank(), 5))
        batch = self.maker.realm(examples, candidates, self.pool, self.config.substitution_prob, rng)
        tokens = sum(int(joint.mask_RL.sum()) for joint in batch.masked.joint)
        self.timing = {
            "seconds/wait_search": found - began,
            "seconds/embed_queries": embedded - found,
            "seconds/collate": time.monotonic() - embedded,
            "reader_tokens": float(tokens),
        }
        return batch

    def search(
        self, index: PassageIndex, examples: list[MaskedSentence], query_emb_BD: np.ndarray, count: int
    ) -> np.ndarray:
        """Non-trivial candidates, (B, count) passage rows, EMPTY where there are too few."""
        wanted = min(count + self.config.extra_retrieved, len(index))
        _, retrieved = index.search(query_emb_BD, wanted)
        chosen = [
            choose_candidates(
                rows[rows >= 0], example, count, self.run.contexts, self.run.statements, self.run.wordpieces
            )
            for example, rows in zip(examples, retrieved, strict=True)
        ]
        return np.array(chosen, dtype=np.int64)

    def _search_ahead(self, step: int) -> None:
        examples = self.examples(step)
        query_emb_BD = embed_masked(self.query_tower(), examples, self.maker, self.run.config.engine.precision)
        self._pending = (
            step,
            examples,
            self._thread.submit(self.search, self.live.index, examples, query_emb_BD, self.config.candidates - 1),
        )

    def save(self, checkpoint: Path) -> None:
        """Add this rank's pending candidates, and the index version, to a checkpoint."""
        assert self._pending is not None
        np.save(checkpoint / f"candidates-{rank():03d}.npy", self._pending[2].result())
        if is_rank_zero():
            (checkpoint / "index_version").write_text(self.live.index.version.name + "\n")

    def restore(self, checkpoint: Path, step: int) -> None:
        """Take up the candidates that were pending on this rank."""
        done: Future[np.ndarray] = Future()
        done.set_result(np.load(checkpoint / f"candidates-{rank():03d}.npy"))
        self._pending = (step, self.examples(step), done)

    def close(self) -> None:
        """End the search thread."""
        self._thread.shutdown()


def check_reader(run: Run, retriever: Retriever, reader: Reader, live: LiveIndex) -> None:
    """Say whether the reader can read: its accuracy on passages known to hold the span, against
    the null passage."""
    maker = batch_maker(run)
    sampler = SpanSampler(run.statements, run.config.pretrain.max_span_tokens, maker.max_query - 2)
    rng = np.random.default_rng(run.config.seed + 5)
    examples = [sampler.draw(int(row), rng) for row in rng.choice(sampler.rows, run.config.pretrain.reader_check)]
    _, retrieved = live.index.search(
        embed_masked(retriever.query_tower, examples, maker, run.config.engine.precision), min(20, len(live.index))
    )
    found = [
        find_supporting_passage(rows, example, run, maker) for example, rows in zip(examples, retrieved, strict=True)
    ]
    pairs = [(example, row) for example, row in zip(examples, found, strict=True) if row is not None]
    if not pairs:
        console.print(
            "  reader check: no retrieved passage holds a masked span; the retriever needs a warm start (realm ict) first"
        )
        return
    chosen = [example for example, _ in pairs]
    read, null = (
        masked_accuracy(reader, run, chosen, [row for _, row in pairs]),
        masked_accuracy(reader, run, chosen, [NULL] * len(pairs)),
    )
    console.print(
        f"  reader check: masked span right from a passage that holds it {read:.0f} %, from the null passage {null:.0f} % ({len(pairs)} spans)"
    )
    if read < null + 10:
        console.print(
            "  warning: the reader cannot read yet, so it will teach the retriever little; train reader_pretraining longer"
        )
