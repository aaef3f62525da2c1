"""Finetuning of both towers of the retriever on questions with hard negatives.

Karpukhin et al. 2020, section 3. All passages are encoded again afterwards; their embeddings are
frozen while the reader is finetuned.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finetune.collate import QuestionCollator
from finetune.questions import Question, load_questions, timing_questions, training_source
from index.frozen import frozen_index
from index.fusion import Fusion
from index.interface import Index
from realm.corpus.collate import filled
from realm.errors import UserError
from realm.models.batches import PairBatch
from realm.models.modules import DualEncoderModel
from realm.models.precision import Precision
from realm.models.retriever import Retriever, build_retriever, embed_no_grad
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_retriever
from realm.runtime.distributed import local_device, rank, world_size
from realm.runtime.telemetry import console, log_line, progress
from realm.text.inputs import epoch_rows
from realm.training.sections import FinetuneRetrieverConfig
from realm.training.stage import Stage
from realm.training.streams import RunStream, StepStream, run_seed, step_generator


class RetrieverFinetuning(Stage):
    """Retrieve each question's passage among those of the other questions and hard negatives."""

    name = "finetune_retriever"
    config: FinetuneRetrieverConfig

    def __init__(self, retriever: Retriever, batches: "RetrieverBatches", config: FinetuneRetrieverConfig) -> None:
        super().__init__(DualEncoderModel(retriever, config.chunk_size), config, retriever=retriever)
        self.batches = batches

    @classmethod
    def open(cls, run: Run) -> "RetrieverFinetuning":
        """Open the stage for training in `run`.

        Raises UserError if the run is already finetuned, has no trained retriever, or has no
        training questions with a passage to find.
        """
        config = run.config.finetune_retriever
        if run.finished("finetune"):
            raise UserError(
                f"run {run.folder} is already finetuned with its current retriever; remove {run.stage('finetune')} "
                "or copy the run."
            )
        if config.steps == 0:
            raise UserError("finetune_retriever.steps is 0; set it, for example with --finetune_retriever.steps 100.")
        source = training_source(run)
        path = initial_retriever(run, cls.name, learned=True)
        questions = load_questions(source, run.passages, run.tokenizer, run.config.retriever.max_query_tokens)
        index = frozen_index(run.folder, path, run.passages, run.config.refresh, log_line, Fusion.of(run))
        miner, _ = load_retriever(path)
        return cls._build(run, index, load_retriever(path)[0], miner, questions)

    @classmethod
    def open_for_timing(cls, run: Run, index: Index) -> "RetrieverFinetuning":
        """Open the stage for timing."""
        retriever = build_retriever(run.config.retriever, run.tokenizer)
        return cls._build(run, index, retriever, retriever, timing_questions(run))

    @classmethod
    def _build(
        cls, run: Run, index: Index, retriever: Retriever, miner: Retriever, questions: Sequence[Question]
    ) -> "RetrieverFinetuning":
        config = run.config.finetune_retriever
        max_span_tokens, fusion = run.config.reader.max_span_tokens, Fusion.of(run, run.starting_retriever(cls.name))
        collator = QuestionCollator(run.collator, run.tokenizer, index, max_span_tokens, fusion=fusion)
        engine = run.config.engine
        batches = RetrieverBatches(
            collator, miner, questions, config, run.config.seed, engine.precision, engine.log_every_s
        )
        return cls(retriever, batches, config)

    def draw(self, step: int, size: int) -> PairBatch:
        return self.batches(step, size)

    def progress_line(self, values: dict[str, Any]) -> str:
        return f"loss {values['loss']:.3f}  in-batch accuracy {values['accuracy']:.2f}"

    def close(self) -> None:
        self.batches.collator.index.close()


class RetrieverBatches:
    """Questions with the passage to find and hard negatives, as a function of the step."""

    def __init__(
        self,
        collator: QuestionCollator,
        retriever: Retriever,
        questions: Sequence[Question],
        config: FinetuneRetrieverConfig,
        seed: int,
        precision: Precision = "fp32",
        log_every_s: float = 10.0,
    ) -> None:
        """Hard negatives are retrieved by `retriever`, from which the collator's index was built.

        A question without a known passage is paired with the best retrieved passage that contains
        an answer (Karpukhin et al. 2020, section 4.1). Raises UserError if no question has a
        passage to find.
        """
        self.collator, self.config, self.seed = collator, config, seed
        depth = min(config.retrieve, len(collator.index))
        retrieved = self._retrieve(retriever, questions, depth, precision, log_every_s)
        paired = [self._paired(question, rows) for question, rows in zip(questions, retrieved, strict=True)]
        kept = [number for number, question in enumerate(paired) if question is not None]
        if not kept:
            raise UserError(
                f"no passage with an answer was found for any of {len(questions):,} questions; "
                "raise finetune_retriever.retrieve."
            )
        if len(kept) < len(questions):
            skipped = len(questions) - len(kept)
            console.print(f"  {skipped:,} questions skipped: no answer in the {depth} passages retrieved")
        self.questions = [question for question in paired if question is not None]
        self.retrieved = retrieved[kept]

    def _retrieve(
        self, retriever: Retriever, questions: Sequence[Question], depth: int, precision: Precision, log_every_s: float
    ) -> np.ndarray:
        found, size = [], 256
        retriever.to(local_device())
        with progress("retrieve", len(questions), unit="question", every_s=log_every_s) as ticker:
            for start in range(0, len(questions), size):
                part = questions[start : start + size]
                embeddings = embed_no_grad(retriever.query_tower, *self.collator.queries(part), precision)
                found.append(self.collator.retrieve(part, embeddings, depth))
                ticker.update(min(start + size, len(questions)))
        return np.concatenate(found)

    def _paired(self, question: Question, retrieved: np.ndarray) -> Question | None:
        """The question with a passage to find, or None."""
        if question.passage is not None:
            return question
        row = next((row for row in filled(retrieved) if self.collator.contains_answer(question, row)), None)
        return None if row is None else replace(question, passage=row, document=self.collator.passages.document(row))

    def __call__(self, step: int, size: int) -> PairBatch:
        """The batch of step `step` on this rank: questions, their passages, then hard negatives.

        Missing negatives are replaced by an excluded passage, so that all ranks have the same
        number of passages.
        """
        order_seed = run_seed(self.seed, RunStream.FINETUNE_RETRIEVER)
        places = epoch_rows(len(self.questions), size * world_size(), step, order_seed)[rank() :: world_size()]
        questions = [self.questions[int(place)] for place in places]
        rng = step_generator(self.seed, StepStream.HARD_NEGATIVES, step)
        rows = [int(question.passage) for question in questions]  # type: ignore[arg-type]
        for question, place in zip(questions, places, strict=True):
            negatives = [row for row in filled(self.retrieved[int(place)]) if self._is_negative(question, row)]
            if negatives:
                count = min(self.config.negatives, len(negatives))
                rows += rng.choice(negatives, count, replace=False).tolist()
        missing = len(questions) * (1 + self.config.negatives) - len(rows)
        excluded_BC = np.array([[not self._is_negative(question, row) for row in rows] for question in questions])
        excluded_BC = np.pad(excluded_BC, ((0, 0), (0, missing)), constant_values=True)
        np.fill_diagonal(excluded_BC, False)
        rows += rows[:1] * missing
        inputs = self.collator.inputs
        return PairBatch(
            *self.collator.queries(questions),
            *inputs.passage_inputs([inputs.passage(row) for row in rows]),
            torch.arange(len(questions)),
            torch.from_numpy(excluded_BC),
        )

    def _is_negative(self, question: Question, row: int) -> bool:
        """Whether a passage may be a negative.

        It must be from another document and, with `positives: answer`, must not contain an answer.
        """
        if self.collator.passages.document(row) == question.document:
            return False
        return self.config.positives == "document" or not self.collator.answer_spans(question, row)
