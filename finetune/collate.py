"""Batches of questions with retrieved passages.

Shape legend: see `realm.models.batches.QuestionBatch`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from finetune.metrics import has_answer
from finetune.questions import Question
from index.fusion import Fusion
from index.interface import Index
from realm.corpus.collate import Collator
from realm.corpus.substitution import SpanPool, replace_span
from realm.models.batches import QuestionBatch
from realm.models.reader import pad_joint, span_targets
from realm.text.blocks import align_spans
from realm.text.inputs import IntArray
from realm.text.tokenizer import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Substitute: TypeAlias = tuple[IntArray, IntArray]
"""Wordpieces of a span and of its replacement."""
Positives: TypeAlias = Literal["answer", "document"]
"""Relevant passages: all that contain an answer, or only those of the question's own document."""


class QuestionCollator:
    """Builds batches from questions and passage rows."""

    def __init__(
        self,
        collator: Collator,
        tokenizer: "PreTrainedTokenizerBase",
        index: Index,
        max_span_tokens: int,
        positives: Positives = "answer",
        fusion: Fusion | None = None,
    ) -> None:
        """`max_span_tokens`: the reader's longest answer span W; `fusion`: default: none."""
        self.inputs, self.tokenizer, self.index = collator, tokenizer, index
        self.fusion = fusion or Fusion()
        self.passages, self.words = collator.passages, collator.wordpieces
        self.max_span_tokens, self.positives = max_span_tokens, positives

    def queries(self, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """Retriever inputs of questions: ids and padding mask, each (B, L)."""
        return self.inputs.queries(self.query_ids(questions))

    def query_ids(self, questions: Sequence[Question]) -> list[IntArray]:
        """Wordpieces of the questions, as far as the retriever reads them."""
        return [question.ids[: self.inputs.limits.query - 2] for question in questions]

    def retrieve(self, questions: Sequence[Question], query_emb_BD: np.ndarray, k: int) -> np.ndarray:
        """Rows of the `k` best passages per question, (B, k), best first, padded with EMPTY."""
        return self.fusion.retrieve(self.index, query_emb_BD, self.query_ids(questions), k)

    def answer_spans(self, question: Question, row: int) -> list[tuple[int, int]]:
        """Start and length in wordpieces of every accepted answer in a passage's text."""
        if question.is_pattern:
            return self._matches(question, self.passages.text(row))
        return self._occurrences(question.answer_ids, self.passages.text_ids(row))

    def _occurrences(self, answers: Sequence[IntArray], within: IntArray) -> list[tuple[int, int]]:
        return [(start, len(ids)) for ids in answers if len(ids) for start in self.words.find(within, ids)]

    def _matches(self, question: Question, text: str) -> list[tuple[int, int]]:
        """Matches of a question's pattern that are aligned with wordpieces."""
        spans = [(start, end, "") for start, end in question.pattern.spans(text)]
        if not spans:
            return []
        _, offset_L2 = tokenize(self.tokenizer, [text])[0]
        return [(first, last - first) for first, last, _ in align_spans(offset_L2, [], spans)]

    def contains_answer(self, question: Question, row: int) -> bool:
        """Whether a passage contains an answer, by whole tokens or by the question's pattern."""
        text = self.passages.text(row)
        return question.pattern.is_in(text) if question.is_pattern else has_answer(text, question.answers)

    def substitutes(
        self, questions: Sequence[Question], probability: float, pool: SpanPool, rng: np.random.Generator
    ) -> list[Substitute | None]:
        """A substitute for each question's answer with the given probability, otherwise None.

        It is a random span of the answer's type; None if the answer is not a salient span of the
        question's passage.
        """
        chosen: list[Substitute | None] = []
        for question in questions:
            kinds = (
                {} if question.passage is None or rng.random() >= probability else self._span_types(question.passage)
            )
            old = next((ids for ids in question.answer_ids if ids.tobytes() in kinds), None)
            others = [] if old is None else pool[kinds[old.tobytes()]]
            chosen.append(None if old is None else (old, others[rng.integers(len(others))]))
        return chosen

    def _span_types(self, row: int) -> dict[bytes, int]:
        """Types of a passage's salient spans, by their wordpieces."""
        ids = self.passages.text_ids(row)
        return {ids[start:end].tobytes(): int(kind) for start, end, kind in zip(*self.passages.spans(row), strict=True)}

    def batch(
        self,
        questions: Sequence[Question],
        query: tuple[torch.Tensor, torch.Tensor],
        retrieved: np.ndarray,
        read: np.ndarray,
        substitutes: Sequence[Substitute | None] | None = None,
    ) -> QuestionBatch:
        """Build a batch of questions.

        `retrieved`: (B, K) rows for the retriever's softmax; `read`: (B, N) rows for the reader;
        negative rows are empty slots. `substitutes` are applied to the reader's inputs. Answers in
        the title are targets of the reader too, as in evaluation.
        """
        read_slot_BN = np.array([self.inputs.contexts.read_slots(rows) for rows in read.tolist()], dtype=np.int64)
        row_Q = np.flatnonzero(read_slot_BN == np.arange(read.shape[1]))
        joints, places = [], []
        for place in row_Q.tolist():
            b, n = divmod(place, read.shape[1])
            change = None if substitutes is None else substitutes[b]
            ids, first, answers = self._joint(questions[b], int(read[b, n]), change)
            joints.append((ids, first))
            places.append(answers)
        ids_QL, mask_QL, type_QL = pad_joint([ids for ids, _ in joints], [first for _, first in joints], self.words.pad)
        targets = span_targets(places, ids_QL, mask_QL, type_QL, self.words, self.max_span_tokens)
        both = np.concatenate((retrieved, read), axis=1)
        lexical = torch.from_numpy(self.fusion.scores(self.index, self.query_ids(questions), both))
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
            *targets,
            lexical[:, : retrieved.shape[1]],
            lexical[:, retrieved.shape[1] :],
        )

    def _joint(
        self, question: Question, row: int, change: Substitute | None
    ) -> tuple[IntArray, int, list[tuple[int, int]]]:
        """The joint input of a passage, the length of its first segment, and the answers in it.

        Answers are pairs of start and length in wordpieces.
        """
        context = self.inputs.contexts.around(row)
        title_ids, text_ids = self.passages.title_ids(row), context.text_ids
        if change is not None:
            title_ids, text_ids = (replace_span(ids, *change, self.words) for ids in (title_ids, text_ids))
        (query_ids,) = self.query_ids([question])
        ids, first, text_at = self.inputs.joint(query_ids, (title_ids, text_ids))
        if question.is_pattern:
            in_title = self._matches(question, self.passages.title(row))
            places = [(first + start, length) for start, length in in_title if first + start + length < text_at]
            for other, begin in zip(context.rows, context.starts, strict=True):
                places += [(text_at + begin + start, length) for start, length in self.answer_spans(question, other)]
        else:
            answers = question.answer_ids if change is None else (change[1],)
            places = [(first + start, length) for start, length in self._occurrences(answers, ids[first:])]
        return ids, first, [(start, length) for start, length in places if start + length < len(ids)]

    def relevant(self, questions: Sequence[Question], rows: np.ndarray) -> np.ndarray:
        """Which retrieved passages the retriever should prefer, (B, K) bool.

        Those that contain an answer (Lee et al. 2019, section 5); with `positives` "document", only
        those of the question's own document, if it is known.
        """
        relevant = np.zeros(rows.shape, dtype=bool)
        for b, (question, retrieved) in enumerate(zip(questions, rows, strict=True)):
            anywhere = self.positives == "answer" or question.document is None
            for k, row in enumerate(map(int, retrieved)):
                if row >= 0 and (anywhere or self.passages.document(row) == question.document):
                    relevant[b, k] = bool(self.answer_spans(question, row))
        return relevant

    def embeddings(self, rows: np.ndarray) -> torch.Tensor:
        """Embeddings of the given rows in the index, (…, D); that of row 0 for negative rows."""
        return torch.from_numpy(self.index.embeddings(np.maximum(rows, 0).ravel())).view(*rows.shape, -1)
