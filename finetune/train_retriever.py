"""Finetuning of the retriever on questions with hard negatives (Karpukhin et al. 2020, section 3):
both towers learn, before the reader does.

The passages are encoded again afterwards; in `finetune.train_reader` their embeddings then stand
still.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from finetune.data import QuestionBatches
from finetune.questions import Question, load_questions
from index.frozen import frozen_index
from realm.errors import UserError
from realm.models.modules import DualEncoderModel, PairBatch
from realm.models.retriever import Retriever, embed_no_grad, load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_retriever
from realm.run.stage import save_models, train_stage
from realm.runtime.distributed import local_device, rank, world_size
from realm.runtime.telemetry import console, progress
from realm.text.inputs import epoch_rows, pad_batch
from realm.training.engine import Engine

STAGE = "finetune_retriever"


def train_finetune_retriever(run: Run, resume: bool = False) -> None:
    """Train the stage and write `finetune_retriever/model/retriever`.

    Raises UserError where finetuning has ended already, no retriever was trained yet, no training
    questions are given, or none of them has a passage to find.
    """
    config = run.config.finetune_retriever
    if not run.begin(STAGE, resume):
        return
    if run.finished("finetune"):
        raise UserError(
            f"run {run.folder} is finetuned already, with the retriever as it was; remove {run.stage('finetune')} or copy the run."
        )
    source = run.questions("train")
    if source is None:
        raise UserError("data.train names no questions to finetune on; set it in the config or pass --data.train FILE.")
    if config.steps == 0:
        raise UserError(
            "finetune_retriever.steps is 0; give a number of steps, such as --finetune_retriever.steps 100."
        )
    torch.manual_seed(run.config.seed + 4)
    path = initial_retriever(run, STAGE, learned=True)
    questions = load_questions(source, run)
    index = frozen_index(run.folder, path, run.passages, run.config.refresh, lambda line: console.print(f"  {line}"))
    batches = RetrieverBatches(QuestionBatches(run, index), load_retriever(path)[0], questions)
    retriever, _ = load_retriever(path)
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
    index.close()


class RetrieverBatches:
    """Questions with the passage to find and hard negatives, as a function of the step."""

    def __init__(self, batches: QuestionBatches, retriever: Retriever, questions: Sequence[Question]) -> None:
        """Hard negatives are what `retriever`, the one the batches' index was built from, finds
        before this stage.

        Raises UserError where no question has a passage to find.
        """
        self.batches, self.run, self.config = batches, batches.run, batches.run.config.finetune_retriever
        depth = min(self.config.retrieve, len(batches.index))
        retrieved = self._retrieve(retriever, questions, depth)
        # A question of an unknown passage is tied to the best one found that holds an answer
        # (Karpukhin et al. 2020, section 4.1).
        tied = [self._tied(question, rows) for question, rows in zip(questions, retrieved, strict=True)]
        kept = [number for number, question in enumerate(tied) if question is not None]
        if not kept:
            raise UserError(
                f"no passage with an answer was found for any of {len(questions):,} questions; raise finetune_retriever.retrieve."
            )
        if len(kept) < len(questions):
            console.print(
                f"  {len(questions) - len(kept):,} questions left out: no answer in the {depth} passages retrieved"
            )
        self.questions = [question for question in tied if question is not None]
        self.retrieved = retrieved[kept]

    def _retrieve(self, retriever: Retriever, questions: Sequence[Question], depth: int) -> np.ndarray:
        found, size = [], 256
        retriever.to(local_device())
        with progress(
            "retrieve", len(questions), unit="question", every_s=self.run.config.engine.log_every_s
        ) as ticker:
            for start in range(0, len(questions), size):
                query = self.batches.queries(questions[start : start + size])
                embeddings = embed_no_grad(retriever.query_tower, *query, self.run.config.engine.precision)
                found.append(self.batches.index.search(embeddings, depth)[1])
                ticker.update(min(start + size, len(questions)))
        return np.concatenate(found)

    def _tied(self, question: Question, retrieved: np.ndarray) -> Question | None:
        if question.passage is not None:
            return question
        row = next((int(row) for row in retrieved if row >= 0 and self.batches.holds(question, int(row))), None)
        return None if row is None else replace(question, passage=row, document=self.run.passages.document(row))

    def __call__(self, step: int) -> PairBatch:
        """Batch number `step` of this rank: B questions, their B passages, then the hard negatives."""
        config, words, passages = self.config, self.batches.words, self.run.passages
        rows = epoch_rows(len(self.questions), config.batch_size * world_size(), step, self.run.config.seed + 4)[
            rank() :: world_size()
        ]
        questions = [self.questions[int(row)] for row in rows]
        rng = np.random.default_rng((self.run.config.seed, step, rank(), 7))
        chosen = [int(question.passage) for question in questions]  # type: ignore[arg-type]
        for question, row in zip(questions, rows, strict=True):
            wrong = [
                int(found) for found in self.retrieved[int(row)] if found >= 0 and self._is_wrong(question, int(found))
            ]
            chosen += rng.choice(wrong, min(config.negatives, len(wrong)), replace=False).tolist() if wrong else []
        limit = self.run.config.retriever.max_passage_tokens
        inputs = [words.passage(passages.title_ids(row), passages.text_ids(row), limit) for row in chosen]
        excluded_BC = np.array([[not self._is_wrong(question, row) for row in chosen] for question in questions])
        np.fill_diagonal(excluded_BC, False)
        target_B = torch.arange(len(questions))
        return PairBatch(
            *self.batches.queries(questions), *pad_batch(inputs, words.pad), target_B, torch.from_numpy(excluded_BC)
        )

    def _is_wrong(self, question: Question, row: int) -> bool:
        """Whether a passage may serve as a negative: it is of another document, and with
        `positives: answer` holds no answer."""
        if self.run.passages.document(row) == question.document:
            return False
        return self.config.positives == "document" or not self.batches.positions(question, row)
