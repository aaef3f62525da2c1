"""Batches of questions against an index."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from finetune.metrics import has_answer
from finetune.questions import Question
from index.search import PassageIndex
from realm.corpus.substitution import SpanPool, replace_span
from realm.models.modules import QuestionBatch
from realm.models.reader import pad_joint, span_targets
from realm.run.folder import Run
from realm.text.blocks import align_spans
from realm.text.inputs import IntArray, pad_batch
from realm.text.tokenizer import tokenize

Substitute: TypeAlias = tuple[IntArray, IntArray]
"""A span and what takes its place, as wordpieces."""


class QuestionBatches:
    """Batches of questions against an index."""

    def __init__(self, run: Run, index: PassageIndex) -> None:
        self.run, self.index, self.passages, self.words = run, index, run.passages, run.wordpieces
        self.width = run.config.reader.max_span_tokens

    def queries(self, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """The retriever's view of the questions."""
        limit = self.run.config.retriever.max_query_tokens
        return pad_batch([self.words.query(question.ids, limit) for question in questions], self.words.pad)

    def positions(self, question: Question, row: int) -> list[tuple[int, int]]:
        """Start and length in wordpieces of every occurrence of an accepted answer in the text
        of a passage."""
        if question.is_pattern:
            return self._matches(question, self.passages.text(row))
        return self._occurrences(question.answer_ids, self.passages.text_ids(row))

    def _occurrences(self, answers: Sequence[IntArray], within: IntArray) -> list[tuple[int, int]]:
        return [(start, len(ids)) for ids in answers if len(ids) for start in self.words.find(within, ids)]

    def _matches(self, question: Question, text: str) -> list[tuple[int, int]]:
        spans = [(match.start(), match.end(), "") for match in question.pattern.finditer(text) if match.group().strip()]
        if not spans:
            return []
        _, offset_L2 = tokenize(self.run.tokenizer, [text])[0]
        return [(first, last - first) for first, last, _ in align_spans(offset_L2, [], spans)]

    def substitutes(
        self, questions: Sequence[Question], rate: float, pool: SpanPool, rng: np.random.Generator
    ) -> list[Substitute | None]:
        """For a share `rate` of the questions another span of their answer's type, where the
        tagger found the answer in their passage."""
        chosen: list[Substitute | None] = []
        for question in questions:
            kinds = {} if question.passage is None or rng.random() >= rate else self._span_types(question.passage)
            old = next((ids for ids in question.answer_ids if ids.tobytes() in kinds), None)
            others = [] if old is None else pool[kinds[old.tobytes()]]
            chosen.append(None if old is None else (old, others[rng.integers(len(others))]))
        return chosen

    def _span_types(self, row: int) -> dict[bytes, int]:
        ids = self.passages.text_ids(row)
        return {ids[start:end].tobytes(): int(kind) for start, end, kind in zip(*self.passages.spans(row), strict=True)}

    def holds(self, question: Question, row: int) -> bool:
        """Whether an accepted answer stands in the passage, by whole tokens or by the question's
        pattern."""
        text = self.passages.text(row)
        return question.pattern.search(text) is not None if question.is_pattern else has_answer(text, question.answers)

    def batch(
        self,
        questions: Sequence[Question],
        query: tuple[torch.Tensor, torch.Tensor],
        retrieved: np.ndarray,
        read: np.ndarray,
        substitutes: Sequence[Substitute | None] | None = None,
    ) -> QuestionBatch:
        """`retrieved` (B, K) rows for the retriever's softmax, `read` (B, N) rows for the
        reader, what is read changed by `substitutes`; rows below 0 are no passages. To the
        reader an answer is right in the title as in the text, as it is when answers are counted."""
        read_slot_BN = np.array([self.run.contexts.share(rows) for rows in read.tolist()], dtype=np.int64)
        row_Q = np.flatnonzero(read_slot_BN == np.arange(read.shape[1]))
        joints, spots = [], []
        for place in row_Q.tolist():
            b, n = divmod(place, read.shape[1])
            ids, first, places = self._joint(
                questions[b], int(read[b, n]), None if substitutes is None else substitutes[b]
            )
            joints.append((ids, first))
            spots.append(places)
        ids_QL, mask_QL, type_QL = pad_joint([ids for ids, _ in joints], [first for _, first in joints], self.words.pad)
        is_answer_QLW, allowed_QLW = span_targets(spots, ids_QL, mask_QL, type_QL, self.words, self.width)
        return QuestionBatch(
            *query,
            self.embeddings(retrieved),
            torch.from_numpy(self.relevant(questions, retrieved)),
            torch.from_numpy(retrieved >= 0),
            self.embeddings(read),
            torch.from_numpy(read_slot_BN),
            torch.from_numpy(row_Q),
            ids_QL,
            mask_QL,
            type_QL,
            is_answer_QLW,
            allowed_QLW,
        )

    def _joint(
        self, question: Question, row: int, change: Substitute | None
    ) -> tuple[IntArray, int, list[tuple[int, int]]]:
        """What is read for a passage, the length of its first segment, and start and length of
        every answer in it."""
        words, config = self.words, self.run.config
        context = self.run.contexts.around(row)
        title_ids, text_ids = self.passages.title_ids(row), context.text_ids
        if change is not None:
            title_ids, text_ids = (replace_span(ids, *change, words) for ids in (title_ids, text_ids))
        query_ids = question.ids[: config.retriever.max_query_tokens - 2]
        ids, first, text_at = words.joint(query_ids, title_ids, text_ids, config.reader.max_tokens)
        if question.is_pattern:
            in_title = self._matches(question, self.passages.title(row))
            places = [(first + start, length) for start, length in in_title if first + start + length < text_at]
            for other, begin in zip(context.rows, context.starts, strict=True):
                places += [(text_at + begin + start, length) for start, length in self.positions(question, other)]
        else:
            answers = question.answer_ids if change is None else (change[1],)
            places = [(first + start, length) for start, length in self._occurrences(answers, ids[first:])]
        return ids, first, [(start, length) for start, length in places if start + length < len(ids)]

    def relevant(self, questions: Sequence[Question], rows: np.ndarray) -> np.ndarray:
        """Which retrieved passages the retriever should prefer, (B, K) bool: all that hold an
        answer (Lee et al. 2019, section 5), or, with `finetune.positives: document`, those of
        them in the question's own document, where that is known."""
        any_document = self.run.config.finetune.positives == "answer"
        relevant = np.zeros(rows.shape, dtype=bool)
        for b, (question, retrieved) in enumerate(zip(questions, rows, strict=True)):
            for k, row in enumerate(map(int, retrieved)):
                if row >= 0 and (
                    any_document or question.document is None or self.passages.document(row) == question.document
                ):
                    relevant[b, k] = bool(self.positions(question, row))
        return relevant

    def embeddings(self, rows: np.ndarray) -> torch.Tensor:
        """What the index holds for the given rows, (…, D); that of row 0 where nothing was
        retrieved."""
        return torch.from_numpy(self.index.embeddings(np.maximum(rows, 0).ravel())).view(*rows.shape, -1)
