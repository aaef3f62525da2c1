"""Reader warm-up: predict masked salient spans from retrieved passages that hold them.

No answer of any question is used: the spans come from the tagger, the passages from the retriever.
Entity substitution keeps the reader from memorising facts, so that what it learns is to copy.
"""

import numpy as np
import torch

from pretrain.data import EMPTY, NULL, BatchMaker, MaskedSentence, SpanSampler, choose_candidates, substitute
from pretrain.search import FrozenSearch
from pretrain.stage import batch_maker
from realm.corpus.substitution import span_pool
from realm.errors import UserError
from realm.models.modules import ReaderPretrainingBatch, ReaderPretrainingModel
from realm.run.folder import Run
from realm.run.initial import initial_reader, initial_retriever
from realm.run.stage import save_models, train_stage
from realm.runtime.distributed import rank, world_size
from realm.text.inputs import IntArray, epoch_rows
from realm.training.engine import Engine

STAGE = "reader_pretraining"
_STEPS_AT_ONCE = 50


def train_reader_pretraining(run: Run, resume: bool = False) -> None:
    """Train the stage and write `reader_pretraining/model/reader`."""
    config = run.config.reader_pretraining
    if not run.begin(STAGE, resume):
        return
    torch.manual_seed(run.config.seed + 1)
    reader = initial_reader(run, STAGE)
    engine = Engine(
        ReaderPretrainingModel(reader, config.span_loss),
        config.optim,
        run.config.engine,
        config.steps,
        config.batch_size,
    )
    batches = ReaderPretrainingBatches(run)
    seconds = train_stage(
        run,
        STAGE,
        engine,
        batches,
        lambda values: (
            f"loss {values['loss']:.2f}  span right {values['accuracy']:.2f}  found {values['span_accuracy']:.2f}"
        ),
    )
    with engine.gathered(reader):
        save_models(run, STAGE, seconds, reader=reader)


class ReaderPretrainingBatches:
    """Masked sentences, each with a passage that holds its span, as a function of the step.

    Passages for fifty steps are retrieved at once. A sentence for which none of the retrieved
    passages holds the span is left out and the next one takes its place, so batches stay full.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.maker = run, run.config.reader_pretraining, batch_maker(run)
        self.sampler = SpanSampler(run.statements, run.config.pretrain.max_span_tokens, self.maker.max_query - 2)
        self.pool = span_pool([run.statements, run.passages], run.config.pretrain.max_span_tokens)
        self.search = FrozenSearch(run, initial_retriever(run, STAGE))
        self._block = -1
        self._found: list[tuple[MaskedSentence, int]] = []

    def __call__(self, step: int) -> ReaderPretrainingBatch:
        """Batch number `step` of this rank."""
        size = self.config.batch_size
        if step // _STEPS_AT_ONCE != self._block:
            self._block = step // _STEPS_AT_ONCE
            self._found = self._retrieve(self._block)
        at = step % _STEPS_AT_ONCE * size
        rng = np.random.default_rng((self.run.config.seed, step, rank(), 2))
        examples, passages = [], []
        for i in range(at, at + size):
            example, row = self._found[i % len(self._found)]
            title, text = (
                self._holding_sentence(row, example) if step < self.config.sentence_steps else self.maker.reading(row)
            )
            if rng.random() < self.config.null_prob:
                title, text = self.maker.passage(NULL)
            if rng.random() < self.config.substitution_prob:
                example, (title, text) = substitute(example, (title, text), self.pool, self.maker.wordpieces, rng)
            examples.append(example)
            passages.append((title, text))
        return self.maker.reader_pretraining(examples, passages, self.run.config.reader.max_span_tokens)

    def _holding_sentence(self, row: int, example: MaskedSentence) -> tuple[IntArray, IntArray]:
        """The first sentence read for the passage that holds the span, without a title; the
        title in its place where only that holds it."""
        title, ids = self.maker.reading(row)
        places = self.maker.wordpieces.find(ids, example.span_ids)
        if not places:
            return ids[:0], title
        context = self.run.contexts.around(row)
        block_starts = [
            self.run.passages.sentence_starts(other) + start
            for other, start in zip(context.rows, context.starts, strict=True)
        ]
        starts = np.append(np.concatenate(block_starts), len(ids))
        number = np.searchsorted(starts, places[0], side="right")
        return ids[:0], ids[starts[number - 1] : starts[number]]

    def _retrieve(self, block: int) -> list[tuple[MaskedSentence, int]]:
        """Masked sentences with a passage each for fifty steps; as many are drawn as needed, up
        to three times, since not all find one."""
        seed, needed = self.run.config.seed, _STEPS_AT_ONCE * self.config.batch_size
        rng = np.random.default_rng((seed, block, rank(), 3))
        rows = self.sampler.rows[epoch_rows(len(self.sampler.rows), 3 * needed * world_size(), block, seed + 1)][
            rank() :: world_size()
        ]
        found: list[tuple[MaskedSentence, int]] = []
        for start in range(0, len(rows), needed):
            if len(found) >= needed:
                break
            examples = [self.sampler.draw(int(row), rng) for row in rows[start : start + needed]]
            for example, retrieved in zip(examples, self.search(examples, self.config.retrieve), strict=True):
                row = find_supporting_passage(retrieved, example, self.run, self.maker)
                if row is None:
                    continue
                if rng.random() < self.config.title_span_prob or not self.maker.wordpieces.find(
                    self.run.passages.title_ids(row), example.span_ids
                ):
                    found.append((example, row))
        if not found:
            raise UserError(
                "no retrieved passage holds any masked span, so the reader has nothing to learn from; train the retriever (realm ict) first."
            )
        return found[:needed]


def find_supporting_passage(retrieved: np.ndarray, example: MaskedSentence, run: Run, maker: BatchMaker) -> int | None:
    """The first retrieved passage that is not trivial and holds the span together with another
    salient span of the sentence, or None.

    A year or a city stands in many passages; one that holds what else the sentence speaks of is
    likely to state the same. A sentence without other spans takes the first passage that holds its
    one.
    """
    for row in map(int, retrieved):
        parts = maker.reading(row)
        if maker.holds(parts, example.span_ids) and (
            not example.others or any(maker.holds(parts, other) for other in example.others)
        ):
            (kept,) = choose_candidates([row], example, 1, run.contexts, run.statements, run.wordpieces)
            if kept != EMPTY:
                return kept
    return None
