"""Finetuning on questions: the query tower and the reader learn, the passage embeddings stay as
the index holds them."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from finetune.data import QuestionBatches
from finetune.questions import Question, load_questions
from index.frozen import frozen_index
from realm.corpus.substitution import span_pool
from realm.errors import UserError
from realm.models.modules import OpenQaModel, QuestionBatch
from realm.models.retriever import Retriever, embed_no_grad, load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_reader, initial_retriever
from realm.run.stage import save_models, train_stage
from realm.runtime.distributed import rank, world_size
from realm.runtime.telemetry import console
from realm.text.inputs import epoch_rows
from realm.training.engine import Engine

STAGE = "finetune"


def train_finetune(run: Run, resume: bool = False) -> None:
    """Train the stage and write `finetune/model`; its passages are searched in the index that the
    retriever came with.

    Raises UserError where no retriever and reader were trained yet, or no training questions are
    given.
    """
    config = run.config.finetune
    if not run.begin(STAGE, resume):
        return
    source = run.questions("train")
    if source is None:
        raise UserError("data.train names no questions to finetune on; set it in the config or pass --data.train FILE.")
    torch.manual_seed(run.config.seed + 3)
    retriever_path, reader = initial_retriever(run, STAGE, learned=True), initial_reader(run, STAGE, learned=True)
    retriever = untie_towers(load_retriever(retriever_path)[0])
    questions = load_questions(source, run)
    index = frozen_index(
        run.folder, retriever_path, run.passages, run.config.refresh, lambda line: console.print(f"  {line}")
    )
    if config.retrieve > len(index):
        raise UserError(f"finetune.retrieve ({config.retrieve}) exceeds the corpus of {len(index)} passages; lower it.")
    for parameter in retriever.passage_tower.parameters():
        parameter.requires_grad_(False)
    engine = Engine(
        OpenQaModel(retriever, reader),
        config.optim,
        run.config.engine,
        config.steps,
        config.batch_size,
        [retriever.query_tower],
    )
    batches = FinetuneBatches(
        run, lambda: engine.gathered_copy(retriever.query_tower), QuestionBatches(run, index), questions
    )
    seconds = train_stage(
        run,
        STAGE,
        engine,
        batches,
        lambda values: (
            f"loss {values['loss']:.2f}  span right {values['accuracy']:.2f}  retrieved {values['retriever_rows']:.2f}"
        ),
    )
    with engine.gathered(retriever, reader):
        save_models(run, STAGE, seconds, retriever=retriever, reader=reader)
    index.close()


def untie_towers(retriever: Retriever) -> Retriever:
    """The retriever with a query tower of its own, so that training it leaves the index true."""
    if not retriever.shared:
        return retriever
    return Retriever(copy.deepcopy(retriever.query_tower), retriever.passage_tower, retriever.temperature)


class FinetuneBatches:
    """Question batches as a function of the step and the query tower's weights."""

    def __init__(
        self, run: Run, query_tower: Callable[[], nn.Module], batches: QuestionBatches, questions: list[Question]
    ) -> None:
        """`query_tower()` is the tower with the weights of the moment."""
        self.run, self.query_tower, self.batches, self.questions, self.config = (
            run,
            query_tower,
            batches,
            questions,
            run.config.finetune,
        )
        self.pool = (
            span_pool([run.passages], run.config.reader.max_span_tokens) if self.config.substitution_prob else {}
        )

    def __call__(self, step: int) -> QuestionBatch:
        """Batch number `step` of this rank: retrieve with today's query tower, read the best,
        the gold passage among them."""
        rows = epoch_rows(len(self.questions), self.config.batch_size * world_size(), step, self.run.config.seed + 3)[
            rank() :: world_size()
        ]
        questions = [self.questions[int(row)] for row in rows]
        query = self.batches.queries(questions)
        embeddings = embed_no_grad(self.query_tower(), *query, self.run.config.engine.precision)
        _, retrieved = self.batches.index.search(embeddings, self.config.retrieve)
        read = retrieved[:, : self.config.read].copy()
        if self.config.read_gold:
            # ORQA's marginal counts what was retrieved; a document that must be preferred has to be
            # among the choices.
            for passages in (retrieved, read) if self.config.positives == "document" else (read,):
                for question, row in zip(questions, passages, strict=True):
                    if question.passage is not None and question.passage not in row:
                        row[-1] = question.passage
        rng = np.random.default_rng((self.run.config.seed, step, rank(), 6))
        return self.batches.batch(
            questions,
            query,
            retrieved,
            read,
            self.batches.substitutes(questions, self.config.substitution_prob, self.pool, rng),
        )
