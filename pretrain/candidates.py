"""Masked sentences and questions with their candidates, retrieved one step ahead of training."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from torch import nn

from index.fusion import Fusion
from index.interface import Index
from pretrain.collate import MaskedCollator
from pretrain.masking import MaskedSentence
from pretrain.pseudo_questions import ExampleSampler
from pretrain.search import embed_masked, own_rows
from pretrain.selection import choose_candidates
from realm.corpus.substitution import span_pool
from realm.models.batches import RealmBatch
from realm.models.precision import Precision
from realm.runtime.distributed import rank, world_size
from realm.text.inputs import epoch_rows
from realm.training.sections import PretrainConfig
from realm.training.streams import RunStream, StepStream, run_seed, step_generator

Found: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Passage rows, and their scores of fused retrieval (see `Fusion.scores`)."""


class IndexSource(Protocol):
    """Source of the index of each step, such as `index.live.LiveIndex`."""

    @property
    def index(self) -> Index:
        """The index in use."""

    def swap(self, step: int) -> None:
        """Swap in a newer index before step `step`, if one is ready."""


class Candidates:
    """The batches of REALM pretraining.

    While step t trains, the candidates of step t + 1 are searched on a thread; their queries are
    embedded before that, on the main thread, with the weights of step t. Pending candidates are
    part of a checkpoint.
    """

    def __init__(
        self,
        config: PretrainConfig,
        seed: int,
        collator: MaskedCollator,
        sampler: ExampleSampler,
        precision: Precision,
        source: IndexSource,
        query_tower: Callable[[], nn.Module],
        fusion: Fusion,
    ) -> None:
        """`query_tower()` returns the tower with its current weights."""
        self.config, self.seed, self.collator = config, seed, collator
        self.sampler, self.statements = sampler, sampler.corpus
        self.precision, self.source, self.query_tower = precision, source, query_tower
        self.fusion = fusion
        corpora = [self.statements, collator.inputs.passages]
        self.pool = span_pool(corpora, config.max_span_tokens) if config.substitution_prob else None
        self.timing: dict[str, float] = {}
        """Seconds by phase and reader tokens of the newest batch."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="candidates")
        self._pending: tuple[int, list[MaskedSentence], Future[Found]] | None = None

    def examples(self, step: int, size: int) -> list[MaskedSentence]:
        """Masked sentences and questions of a step on this rank."""
        order_seed = run_seed(self.seed, RunStream.PRETRAIN)
        places = epoch_rows(len(self.sampler.rows), size * world_size(), step, order_seed)[rank() :: world_size()]
        rng = step_generator(self.seed, StepStream.MASKED_SENTENCES, step)
        return [self.sampler.draw(int(self.sampler.rows[place]), rng) for place in places]

    def batch(self, step: int, size: int) -> RealmBatch:
        """The batch of `step`; starts the search for the next one."""
        began = time.monotonic()
        if self._pending is not None:
            self._pending[2].result()  # a swap closes the index that is being searched
        self.source.swap(step)
        if self._pending is None or (self._pending[0], len(self._pending[1])) != (step, size):
            self._search_ahead(step, size)
        assert self._pending is not None
        _, examples, future = self._pending
        candidates, lexical = future.result()
        found = time.monotonic()
        self._search_ahead(step + 1, size)
        embedded = time.monotonic()
        rng = step_generator(self.seed, StepStream.PRETRAIN_SUBSTITUTION, step)
        batch = self.collator.realm(examples, candidates, self.pool, self.config.substitution_prob, rng, lexical)
        tokens = sum(int(joint.mask_RL.sum()) for joint in batch.masked.joint)
        self.timing = {
            "seconds/wait_search": found - began,
            "seconds/embed_queries": embedded - found,
            "seconds/collate": time.monotonic() - embedded,
            "reader_tokens": float(tokens),
        }
        return batch

    def search(self, index: Index, examples: list[MaskedSentence], query_emb_BD: np.ndarray) -> Found:
        """Candidates that are not trivial, (B, candidates − 1) passage rows, padded with EMPTY, and
        their scores of fused retrieval."""
        count, inputs = self.config.candidates - 1, self.collator.inputs
        query_ids, own = self.collator.query_ids(examples), own_rows(examples, self.statements, inputs.passages)
        k = min(count + self.config.extra_retrieved, len(index))
        retrieved = self.fusion.retrieve(index, query_emb_BD, query_ids, k, own)
        chosen = [
            choose_candidates(rows, example, count, inputs.contexts, self.statements, inputs.wordpieces)
            for example, rows in zip(examples, retrieved, strict=True)
        ]
        candidates = np.array(chosen, dtype=np.int64)
        return candidates, self.fusion.scores(index, query_ids, candidates, own)

    def _search_ahead(self, step: int, size: int) -> None:
        examples = self.examples(step, size)
        query_emb_BD = embed_masked(self.query_tower(), examples, self.collator, self.precision)
        future = self._thread.submit(self.search, self.source.index, examples, query_emb_BD)
        self._pending = (step, examples, future)

    def save(self, checkpoint: Path) -> None:
        """Add this rank's pending candidates to a checkpoint."""
        assert self._pending is not None
        for name, array in zip(("candidates", "lexical"), self._pending[2].result(), strict=True):
            np.save(self._file(checkpoint, name), array)

    def restore(self, checkpoint: Path, step: int) -> None:
        """Restore the pending candidates of this rank."""
        done: Future[Found] = Future()
        candidates, lexical = np.load(self._file(checkpoint, "candidates")), self._file(checkpoint, "lexical")
        # Checkpoints of earlier versions have no scores of fused retrieval.
        scores = np.load(lexical) if lexical.exists() else np.zeros(candidates.shape, np.float32)
        done.set_result((candidates, scores))
        self._pending = (step, self.examples(step, self.config.batch_size), done)

    @staticmethod
    def _file(checkpoint: Path, name: str) -> Path:
        return checkpoint / f"{name}-{rank():03d}.npy"

    def close(self) -> None:
        """Stop the search thread."""
        self._thread.shutdown()
