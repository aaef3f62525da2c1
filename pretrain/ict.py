"""Inverse cloze task, the warm start of the retriever.

Lee et al. 2019, section 4; Guu et al. 2020, section 3.4. Queries can also be questions made from
the sentences, and titles; negatives can also be hard ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from index.fusion import open_lexical
from pretrain.cloze_pairs import ClozePair, ClozePairs
from pretrain.hard_negatives import HardNegatives
from pretrain.verdict import give_verdict
from realm.corpus.collate import NULL, Collator
from realm.corpus.prepared import PreparedCorpus
from realm.models.batches import PairBatch
from realm.models.modules import DualEncoderModel
from realm.models.retriever import Retriever, build_retriever
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_retriever
from realm.runtime.distributed import rank, world_size
from realm.text.inputs import epoch_rows
from realm.training.sections import IctConfig
from realm.training.stage import Stage
from realm.training.streams import RunStream, StepStream, run_seed, step_generator


class InverseCloze(Stage):
    """Retrieve, from the blocks of the batch, the block that a query was taken from."""

    name = "ict"
    config: IctConfig

    def __init__(self, run: Run, retriever: Retriever, start: Path | None) -> None:
        """`start`: folder of the retriever that the stage starts from; None for timing."""
        config = run.config.ict
        super().__init__(DualEncoderModel(retriever, config.chunk_size), config, retriever=retriever)
        self.run, self.start = run, start
        self.checkpoint_at_end = config.keep == "better" and bool(run.config.held_out.share)
        lexical = open_lexical(run) if config.negatives.lexical else None
        negatives = HardNegatives(run.collator, config.negatives, lexical, run.terms)
        self.batches = InverseClozeBatches(run.collator, ClozePairs.open(run), negatives, config, run.config.seed)

    @classmethod
    def open(cls, run: Run) -> "InverseCloze":
        """Open the stage for training in `run`."""
        start = initial_retriever(run, cls.name)
        return cls(run, load_retriever(start)[0], start)

    @classmethod
    def open_for_timing(cls, run: Run) -> "InverseCloze":
        """Open the stage for timing."""
        return cls(run, build_retriever(run.config.retriever, run.tokenizer), None)

    def draw(self, step: int, size: int) -> PairBatch:
        return self.batches(step, size)

    def progress_line(self, values: dict[str, Any]) -> str:
        return f"loss {values['loss']:.3f}  in-batch accuracy {values['accuracy']:.2f}"

    def before_saving(self) -> None:
        if self.config.average:
            assert self.retriever is not None and self.start is not None
            average_weights(self.retriever, load_retriever(self.start)[0], self.config.average)

    def after_saving(self, folder: Path) -> None:
        if self.config.keep == "better":
            assert self.start is not None
            give_verdict(self.run, self.name, folder, self.start)


def average_weights(trained: Retriever, start: Retriever, share: float) -> None:
    """Set each weight of `trained` to (1 − share) · trained + share · start (Wortsman et al.
    2022)."""
    with torch.no_grad():
        for weight, before in zip(trained.parameters(), start.parameters(), strict=True):
            weight.lerp_(before.to(weight), share)


class InverseClozeBatches:
    """Query-block pairs and hard negatives as a function of the step."""

    def __init__(
        self, collator: Collator, pairs: ClozePairs, negatives: HardNegatives, config: IctConfig, seed: int
    ) -> None:
        self.collator, self.pairs, self.negatives = collator, pairs, negatives
        self.config, self.seed = config, seed

    def __call__(self, step: int, size: int) -> PairBatch:
        """The batch of step `step` on this rank: `size` pairs, then their hard negatives, then the
        null passage if `null_prob` is not 0."""
        rows, passages = self.pairs.rows, self.collator.passages
        order_seed = run_seed(self.seed, RunStream.ICT)
        places = epoch_rows(len(rows), size * world_size(), step, order_seed)[rank() :: world_size()]
        rng = step_generator(self.seed, StepStream.ICT_EXAMPLES, step)
        pairs = [self.pairs.draw(int(row), rng) for row in rows[places]]
        withheld_B = torch.from_numpy(rng.random(size) < self.config.null_prob)
        rng = step_generator(self.seed, StepStream.ICT_NEGATIVES, step)
        negatives = [row for pair in pairs for row in self.negatives.draw(pair, rng)]

        blocks = [pair.parts for pair in pairs] + [self.collator.passage(row) for row in negatives]
        target_B = torch.arange(size)
        excluded_BC = torch.from_numpy(_same_block(passages, pairs, negatives))
        excluded_BC |= F.pad(withheld_B, (0, len(negatives)))  # a withheld block is excluded for all queries
        if self.config.null_prob:
            target_B = torch.where(withheld_B, len(blocks), target_B)
            blocks.append(self.collator.passage(NULL))
            excluded_BC = F.pad(excluded_BC, (0, 1))
        queries = [pair.query_ids for pair in pairs]
        return PairBatch(*self.collator.queries(queries), *self.collator.passage_inputs(blocks), target_B, excluded_BC)


def _same_block(passages: PreparedCorpus, pairs: Sequence[ClozePair], negatives: Sequence[int]) -> np.ndarray:
    """Whether a passage of the batch is the block of a query, or a copy of it, without being its
    target, (B, C); for queries that are titles, whether it is of the same document."""
    rows = [pair.row for pair in pairs] + list(negatives)
    hash_C = np.array([passages.text_hash(row) for row in rows], np.uint64)
    document_C = np.array([passages.document(row) for row in rows])
    size = len(pairs)
    is_title_B1 = np.array([pair.is_title for pair in pairs])[:, None]
    same_BC = hash_C[:size, None] == hash_C
    same_BC |= is_title_B1 & (document_C[:size, None] == document_C)
    np.fill_diagonal(same_BC, False)
    return same_BC
