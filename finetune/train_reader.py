"""Finetuning of query tower and reader on questions, with frozen passage embeddings.

Lee et al. 2019, section 5; Guu et al. 2020, section 4.3.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from finetune.collate import QuestionCollator
from finetune.questions import Question, load_questions, timing_questions, training_source
from index.frozen import frozen_index
from index.fusion import Fusion
from index.interface import Index
from realm.corpus.substitution import SpanPool, span_pool
from realm.errors import UserError
from realm.models.batches import QuestionBatch
from realm.models.modules import OpenQaModel
from realm.models.precision import Precision
from realm.models.reader import Reader, build_reader
from realm.models.retriever import Retriever, build_retriever, embed_no_grad
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_reader, initial_retriever
from realm.runtime.distributed import rank, world_size
from realm.runtime.telemetry import log_line
from realm.text.inputs import epoch_rows
from realm.training.sections import FinetuneConfig
from realm.training.stage import Stage
from realm.training.streams import RunStream, StepStream, run_seed, step_generator


def check_retrieve(run: Run) -> None:
    """Raise UserError if a step retrieves more passages than there are."""
    retrieve, count = run.config.finetune.retrieve, len(run.passages)
    if retrieve > count:
        raise UserError(f"finetune.retrieve ({retrieve}) exceeds the corpus of {count} passages; lower it.")


class Finetuning(Stage):
    """Answer questions with spans of retrieved passages."""

    name = "finetune"
    config: FinetuneConfig
    retriever: Retriever
    reader: Reader

    def __init__(
        self, run: Run, retriever: Retriever, reader: Reader, index: Index, questions: Sequence[Question]
    ) -> None:
        """Unties the retriever's towers and freezes the passage tower.

        Raises UserError if the corpus is smaller than `finetune.retrieve`.
        """
        config = run.config.finetune
        check_retrieve(run)
        retriever = untie_towers(retriever)
        for parameter in retriever.passage_tower.parameters():
            parameter.requires_grad_(False)
        super().__init__(OpenQaModel(retriever, reader), config, retriever, reader)
        reader.span_softmax = "passages"
        max_span_tokens = run.config.reader.max_span_tokens
        pool: SpanPool = span_pool([run.passages], max_span_tokens) if config.substitution_prob else {}
        fusion = Fusion.of(run, run.starting_retriever(self.name))
        collator = QuestionCollator(run.collator, run.tokenizer, index, max_span_tokens, config.positives, fusion)
        self.batches = FinetuningBatches(
            collator,
            questions,
            config,
            pool,
            run.config.seed,
            run.config.engine.precision,
            lambda: self.current(retriever.query_tower),
        )

    @classmethod
    def open(cls, run: Run) -> "Finetuning":
        """Open the stage for training in `run`, with the index of its initial retriever.

        Raises UserError if the run has no trained retriever, no trained reader, or no training
        questions.
        """
        source = training_source(run)
        path, reader = initial_retriever(run, cls.name, learned=True), initial_reader(run, cls.name, learned=True)
        questions = load_questions(source, run.passages, run.tokenizer, run.config.retriever.max_query_tokens)
        index = frozen_index(run.folder, path, run.passages, run.config.refresh, log_line, Fusion.of(run))
        return cls(run, load_retriever(path)[0], reader, index, questions)

    @classmethod
    def open_for_timing(cls, run: Run, index: Index) -> "Finetuning":
        """Open the stage for timing."""
        retriever = build_retriever(run.config.retriever, run.tokenizer)
        reader, _ = build_reader(run.config.reader, run.tokenizer)
        return cls(run, retriever, reader, index, timing_questions(run))

    def modules_called_between_steps(self) -> Sequence[nn.Module]:
        return [self.retriever.query_tower]

    def draw(self, step: int, size: int) -> QuestionBatch:
        return self.batches(step, size)

    def progress_line(self, values: dict[str, Any]) -> str:
        return (
            f"loss {values['loss']:.2f}  accuracy {values['accuracy']:.2f}  "
            f"answer retrieved {values['retriever_rows']:.2f}"
        )

    def close(self) -> None:
        self.batches.collator.index.close()


def untie_towers(retriever: Retriever) -> Retriever:
    """Separate a shared query tower from the passage tower, so that the index stays valid."""
    if not retriever.shared:
        return retriever
    return Retriever(copy.deepcopy(retriever.query_tower), retriever.passage_tower, retriever.temperature)


class FinetuningBatches:
    """Question batches as a function of the step and of the query tower's weights."""

    def __init__(
        self,
        collator: QuestionCollator,
        questions: Sequence[Question],
        config: FinetuneConfig,
        pool: SpanPool,
        seed: int,
        precision: Precision,
        query_tower: Callable[[], nn.Module],
    ) -> None:
        """`pool`: spans that can replace answers; `query_tower()` returns the current tower."""
        self.collator, self.questions, self.config, self.pool = collator, questions, config, pool
        self.seed, self.precision, self.query_tower = seed, precision, query_tower

    def __call__(self, step: int, size: int) -> QuestionBatch:
        """The batch of step `step` on this rank, retrieved with the current query tower.

        With `read_gold`, the question's own passage is among those read.
        """
        config, collator = self.config, self.collator
        order_seed = run_seed(self.seed, RunStream.FINETUNE)
        places = epoch_rows(len(self.questions), size * world_size(), step, order_seed)[rank() :: world_size()]
        questions = [self.questions[int(place)] for place in places]
        query = collator.queries(questions)
        embeddings = embed_no_grad(self.query_tower(), *query, self.precision)
        retrieved = collator.retrieve(questions, embeddings, config.retrieve)
        read = retrieved[:, : config.read].copy()
        if config.read_gold:
            # ORQA's marginal is over the retrieved passages, so these must include the preferred
            # document.
            for passages in (retrieved, read) if config.positives == "document" else (read,):
                for question, row in zip(questions, passages, strict=True):
                    if question.passage is not None and question.passage not in row:
                        row[-1] = question.passage
        rng = step_generator(self.seed, StepStream.FINETUNE_SUBSTITUTION, step)
        substitutes = collator.substitutes(questions, config.substitution_prob, self.pool, rng)
        return collator.batch(questions, query, retrieved, read, substitutes)
