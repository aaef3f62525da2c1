"""Inverse cloze task: the retriever's warm start (Lee et al. 2019, section 4; Guu et al. 2020,
section 3.4)."""

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.data import NULL, BatchMaker
from pretrain.stage import batch_maker
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.models.modules import DualEncoderModel, PairBatch
from realm.models.retriever import load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_retriever
from realm.run.stage import save_models, train_stage
from realm.runtime.distributed import rank, world_size
from realm.text.inputs import epoch_rows, pad_batch
from realm.training.engine import Engine
from realm.training.sections import IctConfig

STAGE = "ict"


def train_ict(run: Run, resume: bool = False) -> None:
    """Train the stage and write `ict/model/retriever`."""
    config = run.config.ict
    if not run.begin(STAGE, resume):
        return
    torch.manual_seed(run.config.seed)
    retriever, _ = load_retriever(initial_retriever(run, STAGE))
    batches = IctBatches(run.passages, batch_maker(run), config, run.config.seed)
    engine = Engine(DualEncoderModel(retriever), config.optim, run.config.engine, config.steps, config.batch_size)
    seconds = train_stage(
        run,
        STAGE,
        engine,
        batches,
        lambda values: f"loss {values['loss']:.3f}  in-batch accuracy {values['accuracy']:.2f}",
    )
    with engine.gathered(retriever):
        save_models(run, STAGE, seconds, retriever=retriever)


class IctBatches:
    """Sentence-block pairs as a function of the step."""

    def __init__(self, passages: PreparedCorpus, maker: BatchMaker, config: IctConfig, seed: int) -> None:
        self.passages, self.maker, self.config, self.seed = passages, maker, config, seed
        self.rows = np.array(
            [row for row in passages.rows.tolist() if len(passages.sentence_starts(row)) > 1], dtype=np.int64
        )
        if len(self.rows) < 2:
            raise UserError(
                "the inverse cloze task needs passages of two sentences or more, and there are none; give longer passages."
            )

    def __call__(self, step: int) -> PairBatch:
        """Batch number `step` of this rank."""
        words, global_batch = self.maker.wordpieces, self.config.batch_size * world_size()
        rows = self.rows[epoch_rows(len(self.rows), global_batch, step, self.seed)][rank() :: world_size()]
        rng = np.random.default_rng((self.seed, step, rank(), 1))
        queries, blocks = [], []
        for row in map(int, rows):
            ids = self.passages.text_ids(row)
            starts = np.append(self.passages.sentence_starts(row), len(ids))
            at = rng.integers(len(starts) - 1)
            sentence = np.array(ids[starts[at] : starts[at + 1]])
            if rng.random() >= self.config.keep_sentence_prob:
                ids = np.concatenate((ids[: starts[at]], ids[starts[at + 1] :]))
            if rng.random() < self.config.mask_span_prob:
                self._mask_span(row, sentence, int(starts[at]), rng)
            queries.append(words.query(sentence, self.maker.max_query))
            blocks.append((self.passages.title_ids(row), ids))
        withheld_B = torch.from_numpy(rng.random(len(rows)) < self.config.null_prob)
        if self.config.null_prob:  # the null passage comes last; a block withheld is nobody's candidate
            blocks.append(self.maker.passage(NULL))
        target_B = torch.where(withheld_B, len(blocks) - 1, torch.arange(len(rows)))
        excluded_BC = F.pad(withheld_B, (0, len(blocks) - len(rows))).expand(len(rows), -1)
        return PairBatch(*pad_batch(queries, words.pad), *self.maker.passage_inputs(blocks), target_B, excluded_BC)

    def _mask_span(self, row: int, sentence: np.ndarray, offset: int, rng: np.random.Generator) -> None:
        """Mask one salient span of the sentence in place, if it has any."""
        starts, ends, _ = self.passages.spans(row)
        inside = np.flatnonzero((starts >= offset) & (ends <= offset + len(sentence)))
        if len(inside):
            chosen = rng.choice(inside)
            sentence[starts[chosen] - offset : ends[chosen] - offset] = self.maker.wordpieces.mask
