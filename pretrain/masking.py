"""Masked sentences: sentences with one salient span to predict (Guu et al. 2020, section 3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from realm.corpus.prepared import PreparedCorpus
from realm.corpus.substitution import SpanPool, replace_span
from realm.errors import UserError
from realm.text.inputs import IntArray, Wordpieces


@dataclass(frozen=True)
class MaskedSentence:
    """One sentence with one salient span to predict."""

    row: int
    """Row of the sentence's block in its corpus; -1 if it is not from a corpus."""
    sentence_ids: IntArray
    """The sentence, unmasked."""
    start: int
    """First wordpiece of the span."""
    end: int
    """One past the last wordpiece of the span."""
    kind: int
    """Span type, an index into SPAN_TYPES, or PHRASE."""
    others: tuple[IntArray, ...] = ()
    """The sentence's other salient spans, if they are known."""
    question: IntArray | None = None
    """A question whose answer is the span, as the query instead of the masked sentence."""

    @property
    def span_ids(self) -> IntArray:
        """The span's wordpieces."""
        return self.sentence_ids[self.start : self.end]

    def query_ids(self, mask_id: int) -> IntArray:
        """The question, or the masked sentence if there is none."""
        return self.masked_ids(mask_id) if self.question is None else self.question

    def masked_ids(self, mask_id: int) -> IntArray:
        """The sentence with a mask for each wordpiece of the span."""
        masked = self.sentence_ids.copy()
        masked[self.start : self.end] = mask_id
        return masked

    def with_span(self, span_ids: IntArray) -> "MaskedSentence":
        """The sentence with its span replaced."""
        ids = np.concatenate((self.sentence_ids[: self.start], span_ids, self.sentence_ids[self.end :]))
        return replace(self, sentence_ids=ids, end=self.start + len(span_ids))


class SpanSampler:
    """Draws masked sentences from a prepared corpus."""

    def __init__(
        self,
        corpus: PreparedCorpus,
        max_span_tokens: int,
        max_sentence_tokens: int,
        rows: np.ndarray | None = None,
    ) -> None:
        """`rows`: blocks to draw from; default: all that are not held out, and a UserError if they
        have no eligible span."""
        self.corpus, self.max_span_tokens, self.max_sentence_tokens = corpus, max_span_tokens, max_sentence_tokens
        allowed = corpus.training_rows if rows is None else rows
        self.rows = np.array([row for row in allowed.tolist() if len(self._eligible(row)[0])], dtype=np.int64)
        """Blocks with an eligible span."""
        if rows is None and not len(self.rows):
            raise UserError(
                "the statements contain no salient span that fits a query; check the span pipeline and "
                "retriever.max_query_tokens."
            )

    def _eligible(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Starts, ends and types of eligible spans, and starts and ends of their sentences.

        A span is eligible if it is short enough and fits a query.
        """
        starts, ends, kinds = self.corpus.spans(row)
        sentence_starts = self.corpus.sentence_starts(row)
        sentence_ends = np.append(sentence_starts[1:], len(self.corpus.text_ids(row)))
        sentence = np.searchsorted(sentence_starts, starts, side="right") - 1
        first, last = sentence_starts[sentence], sentence_ends[sentence]
        short = ends - starts <= self.max_span_tokens
        fits = short & (ends <= last) & (ends - first <= self.max_sentence_tokens)
        return starts[fits], ends[fits], kinds[fits], first[fits], last[fits]

    def draw(self, row: int, rng: np.random.Generator) -> MaskedSentence:
        """Draw a sentence of the block that has an eligible span, and one of its spans."""
        starts, ends, kinds, first, last = self._eligible(row)
        sentence = rng.choice(np.unique(first))
        inside = np.flatnonzero(first == sentence)
        chosen = rng.choice(inside)
        text = self.corpus.text_ids(row)
        ids = text[sentence : min(last[chosen], sentence + self.max_sentence_tokens)]
        others = tuple(np.array(text[starts[i] : ends[i]]) for i in inside if i != chosen)
        start, end = int(starts[chosen] - sentence), int(ends[chosen] - sentence)
        return MaskedSentence(row, np.array(ids), start, end, int(kinds[chosen]), others)


def substitute(
    example: MaskedSentence, texts: Sequence[IntArray], pool: SpanPool, wordpieces: Wordpieces, rng: np.random.Generator
) -> tuple[MaskedSentence, list[IntArray]]:
    """Replace the masked span, in the target and in `texts`, with a random span of its type.

    The query contains only masks or is a question without the span, so the new span can only be
    predicted by copying it from the passage. A question does not change. Not replaced are spans of
    types that the pool does not have, such as phrases, and spans by one that the question contains.
    """
    if (others := pool.get(example.kind)) is None:
        return example, list(texts)
    other = others[rng.integers(len(others))]
    if example.question is not None and wordpieces.find(example.question, other):
        return example, list(texts)
    return example.with_span(other), [replace_span(text, example.span_ids, other, wordpieces) for text in texts]
