"""Questions, and the batches made of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from index.search import PassageIndex
from realm.blocks import text_hash
from realm.errors import UserError
from realm.inputs import IntArray, pad_batch, query_input
from realm.model import QuestionBatch
from realm.reader import joint_input, pad_joint, span_targets
from realm.run import Run
from realm.substitution import SpanPool, replace_span
from realm.tokenizer import encode_plain

Substitute: TypeAlias = tuple[IntArray, IntArray]
"""A span and what takes its place, as wordpieces."""


@dataclass(frozen=True)
class Question:
    """One question with its accepted answers."""

    id: str
    text: str
    answers: tuple[str, ...]
    ids: IntArray = field(repr=False)
    """Wordpieces of the question."""
    answer_ids: tuple[IntArray, ...] = field(repr=False)
    """Wordpieces of each answer."""
    passage: int | None
    """Row of the passage the question was asked about, where known."""


def load_questions(path: Path, run: Run) -> list[Question]:
    """Questions of a SQuAD v1.1 file; each one's passage is the row of the paragraph's `passage` id, or the block with the paragraph's text.

    Raises UserError naming the file and the place of a missing or wrong field.
    """
    try:
        squad = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"question file {path} cannot be read ({error.strerror}); check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"question file {path} is no JSON ({error}).") from error
    if not isinstance(squad, dict) or not isinstance(squad.get("data"), list):
        raise UserError(f'question file {path} is not in SQuAD format: it must be an object with a list under "data".')
    found: list[tuple[str, str, tuple[str, ...], int | None]] = []
    row: int | None
    row_of_hash: dict[int, int] = {}
    place = "data"
    try:
        for a, article in enumerate(squad["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{a}].paragraphs[{p}]"
                if "passage" in paragraph:
                    row = run.passages.row_of_id(paragraph["passage"])
                else:
                    row_of_hash = row_of_hash or {run.passages.text_hash(row): row for row in reversed(range(len(run.passages)))}
                    row = row_of_hash.get(text_hash(paragraph["context"]))
                for q, entry in enumerate(paragraph["qas"]):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    answers = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"] if answer["text"].strip()))
                    if not entry["question"].strip() or not answers:
                        raise UserError(f"question file {path}, {place}: an empty question or no answer; leave it out.")
                    found.append((str(entry["id"]), entry["question"], answers, row))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"question file {path}, {place}: not as SQuAD v1.1 has it, or of another corpus ({error!r}).") from error
    if not found:
        raise UserError(f"question file {path} holds no question.")
    question_ids = [ids for ids, _ in encode_plain(run.tokenizer, [text for _, text, _, _ in found])]
    answer_ids = [tuple(ids for ids, _ in encode_plain(run.tokenizer, list(answers))) for _, _, answers, _ in found]
    return [
        Question(name, text, answers, ids, spans, row) for (name, text, answers, row), ids, spans in zip(found, question_ids, answer_ids, strict=True)
    ]


class QuestionBatches:
    """Batches of questions against an index."""

    def __init__(self, run: Run, index: PassageIndex) -> None:
        self.run, self.index, self.passages, self.words = run, index, run.passages, run.wordpieces
        self.width = run.config.reader.max_span_tokens

    def queries(self, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """The retriever's view of the questions."""
        limit = self.run.config.retriever.max_query_tokens
        return pad_batch([query_input(question.ids, self.words.cls, self.words.sep, limit) for question in questions], self.words.pad)

    def positions(self, answers: Sequence[IntArray], text_ids: IntArray) -> list[tuple[int, int]]:
        """Start and length in wordpieces of every occurrence of an accepted answer in a text."""
        return [(start, len(ids)) for ids in answers if len(ids) for start in self.words.find(text_ids, ids)]

    def substitutes(self, questions: Sequence[Question], rate: float, pool: SpanPool, rng: np.random.Generator) -> list[Substitute | None]:
        """For a share `rate` of the questions another span of their answer's type, where the tagger found the answer in their passage."""
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

    def batch(
        self,
        questions: Sequence[Question],
        query: tuple[torch.Tensor, torch.Tensor],
        retrieved: np.ndarray,
        read: np.ndarray,
        substitutes: Sequence[Substitute | None] | None = None,
    ) -> QuestionBatch:
        """`retrieved` (B, K) rows for the retriever's softmax, `read` (B, N) rows for the reader, their texts changed by `substitutes`."""
        limit = self.run.config.reader.max_tokens
        joints, spots = [], []
        for question, rows, change in zip(questions, read, substitutes or [None] * len(questions), strict=True):
            for row in map(int, rows):
                text_ids, answers = self.passages.text_ids(row), question.answer_ids
                if change is not None:
                    text_ids, answers = replace_span(text_ids, *change, self.words), (change[1],)
                query_ids = question.ids[: self.run.config.retriever.max_query_tokens - 2]
                ids, first, text_at = joint_input(query_ids, self.passages.title_ids(row), text_ids, self.words.cls, self.words.sep, limit)
                joints.append((ids, first))
                places = self.positions(answers, text_ids)
                spots.append([(text_at + start, length) for start, length in places if text_at + start + length < len(ids)])
        ids_QL, mask_QL, type_QL = pad_joint([ids for ids, _ in joints], [first for _, first in joints], self.words.pad)
        is_answer_QLW, allowed_QLW = span_targets(spots, ids_QL, mask_QL, type_QL, (self.words.cls, self.words.sep), self.width)
        has_answer = [
            [bool(self.positions(question.answer_ids, self.passages.text_ids(int(row)))) for row in rows]
            for question, rows in zip(questions, retrieved, strict=True)
        ]
        return QuestionBatch(
            *query,
            self.embeddings(retrieved),
            torch.tensor(has_answer),
            torch.ones(retrieved.shape, dtype=torch.bool),
            self.embeddings(read),
            ids_QL,
            mask_QL,
            type_QL,
            is_answer_QLW,
            allowed_QLW,
        )

    def embeddings(self, rows: np.ndarray) -> torch.Tensor:
        """What the index holds for the given rows, (…, D)."""
        return torch.from_numpy(self.index.embeddings(rows.ravel())).view(*rows.shape, -1)
