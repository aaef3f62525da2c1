"""Inverse cloze task, the warm start of the retriever.

Lee et al. 2019, section 4; Guu et al. 2020, section 3.4.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from realm.corpus.collate import NULL, Collator
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
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
    """Retrieve, from the blocks of the batch, the block that a sentence was taken from."""

    name = "ict"
    config: IctConfig

    def __init__(self, retriever: Retriever, batches: "InverseClozeBatches", config: IctConfig) -> None:
        super().__init__(DualEncoderModel(retriever, config.chunk_size), config, retriever=retriever)
        self.batches = batches

    @classmethod
    def open(cls, run: Run) -> "InverseCloze":
        """Open the stage for training in `run`."""
        return cls._build(run, load_retriever(initial_retriever(run, cls.name))[0])

    @classmethod
    def open_for_timing(cls, run: Run) -> "InverseCloze":
        """Open the stage for timing."""
        return cls._build(run, build_retriever(run.config.retriever, run.tokenizer))

    @classmethod
    def _build(cls, run: Run, retriever: Retriever) -> "InverseCloze":
        config = run.config.ict
        return cls(retriever, InverseClozeBatches(run.passages, run.collator, config, run.config.seed), config)

    def draw(self, step: int, size: int) -> PairBatch:
        return self.batches(step, size)

    def progress_line(self, values: dict[str, Any]) -> str:
        return f"loss {values['loss']:.3f}  in-batch accuracy {values['accuracy']:.2f}"


class InverseClozeBatches:
    """Sentence-block pairs as a function of the step."""

    def __init__(self, passages: PreparedCorpus, collator: Collator, config: IctConfig, seed: int) -> None:
        """Raises UserError if fewer than two passages have two sentences or more."""
        self.passages, self.collator, self.config, self.seed = passages, collator, config, seed
        rows = [row for row in passages.rows.tolist() if len(passages.sentence_starts(row)) > 1]
        self.rows = np.array(rows, dtype=np.int64)
        if len(self.rows) < 2:
            raise UserError(
                "the inverse cloze task needs at least two passages with two sentences or more, but "
                f"{passages.path} contains {len(self.rows)} such passages, of {len(passages.rows):,}; "
                "use more passages, or longer ones."
            )

    def __call__(self, step: int, size: int) -> PairBatch:
        """The batch of step `step` on this rank, `size` pairs."""
        order_seed = run_seed(self.seed, RunStream.ICT)
        places = epoch_rows(len(self.rows), size * world_size(), step, order_seed)[rank() :: world_size()]
        rng = step_generator(self.seed, StepStream.ICT_EXAMPLES, step)
        queries, blocks = [], []
        for row in map(int, self.rows[places]):
            ids = self.passages.text_ids(row)
            starts = np.append(self.passages.sentence_starts(row), len(ids))
            at = rng.integers(len(starts) - 1)
            sentence = np.array(ids[starts[at] : starts[at + 1]])
            if rng.random() >= self.config.keep_sentence_prob:
                ids = np.concatenate((ids[: starts[at]], ids[starts[at + 1] :]))
            if rng.random() < self.config.mask_span_prob:
                self._mask_span(row, sentence, int(starts[at]), rng)
            queries.append(sentence)
            blocks.append((self.passages.title_ids(row), ids))
        withheld_B = torch.from_numpy(rng.random(size) < self.config.null_prob)
        if self.config.null_prob:  # the null passage is last; a withheld block is excluded for all queries
            blocks.append(self.collator.passage(NULL))
        target_B = torch.where(withheld_B, len(blocks) - 1, torch.arange(size))
        excluded_BC = F.pad(withheld_B, (0, len(blocks) - size)).expand(size, -1)
        return PairBatch(*self.collator.queries(queries), *self.collator.passage_inputs(blocks), target_B, excluded_BC)

    def _mask_span(self, row: int, sentence: np.ndarray, offset: int, rng: np.random.Generator) -> None:
        """Mask one salient span of the sentence in place, if it has one."""
        starts, ends, _ = self.passages.spans(row)
        inside = np.flatnonzero((starts >= offset) & (ends <= offset + len(sentence)))
        if len(inside):
            chosen = rng.choice(inside)
            sentence[starts[chosen] - offset : ends[chosen] - offset] = self.collator.wordpieces.mask
