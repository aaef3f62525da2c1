"""Masked salient spans: which sentence, which span, which candidates, and the batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from realm.corpus.context import Contexts
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.substitution import SpanPool, replace_span
from realm.errors import UserError
from realm.models.modules import JointBatch, MaskedBatch, ReaderPretrainingBatch, RealmBatch, SpanTargets
from realm.models.reader import pad_joint, span_targets
from realm.text.inputs import IntArray, Wordpieces, pad_batch

NULL = -1
"""Row number that stands for the null passage."""
EMPTY = -2
"""Row number of a candidate slot that holds nothing."""
_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class MaskedSentence:
    """One sentence with one salient span to predict."""

    row: int
    """Row of the sentence's block in its corpus."""
    sentence_ids: IntArray
    """The sentence, nothing masked."""
    start: int
    """First wordpiece of the span."""
    end: int
    """One past its last."""
    kind: int
    """Span type, an index into SPAN_TYPES."""
    others: tuple[IntArray, ...] = ()
    """The sentence's other salient spans, where they are known."""

    @property
    def span_ids(self) -> IntArray:
        return self.sentence_ids[self.start : self.end]

    def masked_ids(self, mask_id: int) -> IntArray:
        """The sentence with a mask for each wordpiece of the span."""
        masked = self.sentence_ids.copy()
        masked[self.start : self.end] = mask_id
        return masked

    def with_span(self, span_ids: IntArray) -> "MaskedSentence":
        """The same sentence about another span."""
        ids = np.concatenate((self.sentence_ids[: self.start], span_ids, self.sentence_ids[self.end :]))
        return replace(self, sentence_ids=ids, end=self.start + len(span_ids))


class SpanSampler:
    """Draws masked sentences from a prepared corpus."""

    def __init__(
        self, corpus: PreparedCorpus, max_span_tokens: int, max_sentence_tokens: int, max_rows: int | None = None
    ) -> None:
        """Of the first `max_rows` blocks of the corpus if given."""
        self.corpus, self.max_span_tokens, self.max_sentence_tokens = corpus, max_span_tokens, max_sentence_tokens
        self.rows = np.array(
            [row for row in corpus.rows[:max_rows].tolist() if len(self._eligible(row)[0])], dtype=np.int64
        )
        if not len(self.rows):
            raise UserError(
                "the statements hold no salient span that fits a query; check the span pipeline and retriever.max_query_tokens."
            )

    def _sentences(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.corpus.sentence_starts(row)
        return starts, np.append(starts[1:], len(self.corpus.text_ids(row)))

    def _eligible(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Span starts, ends, types, and the start and end of their sentences, for spans that are
        short enough and fit the query."""
        starts, ends, kinds = self.corpus.spans(row)
        sentence_starts, sentence_ends = self._sentences(row)
        sentence = np.searchsorted(sentence_starts, starts, side="right") - 1
        begin, finish = sentence_starts[sentence], sentence_ends[sentence]
        fits = (ends - starts <= self.max_span_tokens) & (ends <= finish) & (ends - begin <= self.max_sentence_tokens)
        return starts[fits], ends[fits], kinds[fits], begin[fits], finish[fits]

    def draw(self, row: int, rng: np.random.Generator) -> MaskedSentence:
        """One sentence of the block that has an eligible span, at random, and one of its spans
        (Guu et al. 2020, section 3.4)."""
        starts, ends, kinds, begin, finish = self._eligible(row)
        sentence = rng.choice(np.unique(begin))
        inside = np.flatnonzero(begin == sentence)
        chosen = rng.choice(inside)
        text = self.corpus.text_ids(row)
        ids = text[sentence : min(finish[chosen], sentence + self.max_sentence_tokens)]
        others = tuple(np.array(text[starts[i] : ends[i]]) for i in inside if i != chosen)
        return MaskedSentence(
            row, np.array(ids), int(starts[chosen] - sentence), int(ends[chosen] - sentence), int(kinds[chosen]), others
        )


def substitute(
    example: MaskedSentence, texts: Sequence[IntArray], pool: SpanPool, wordpieces: Wordpieces, rng: np.random.Generator
) -> tuple[MaskedSentence, list[IntArray]]:
    """Another span of the same type in place of the masked one, in the target and wherever it
    stands in `texts`.

    The query shows only masks, so the one way to predict the new span is to copy it from the
    passage.
    """
    others = pool[example.kind]
    other = others[rng.integers(len(others))]
    return example.with_span(other), [replace_span(text, example.span_ids, other, wordpieces) for text in texts]


def choose_candidates(
    retrieved_rows: Sequence[int] | np.ndarray,
    example: MaskedSentence,
    count: int,
    contexts: Contexts,
    statements: PreparedCorpus,
    wordpieces: Wordpieces,
) -> list[int]:
    """The first `count` retrieved passages that are not trivial, filled up with EMPTY.

    Trivial is the block the sentence comes from, any copy of that block's text, any passage with
    which the whole sentence would be read, and a second copy of a passage already chosen (Guu et
    al. 2020, section 3.4); where more than the block is read, its whole document. What was dropped
    is never put back.
    """
    passages = contexts.corpus
    same_corpus = passages.fingerprint == statements.fingerprint
    own_document = statements.document(example.row) if same_corpus and contexts.context_tokens else None
    source_hash = statements.text_hash(example.row)
    chosen: list[int] = []
    seen = {source_hash}
    for row in map(int, retrieved_rows):
        text_hash = passages.text_hash(row)
        own = (same_corpus and row == example.row) or (
            own_document is not None and passages.document(row) == own_document
        )
        # A sentence longer than a query is cut, perhaps within a word.
        if not (
            own
            or text_hash in seen
            or wordpieces.find(contexts.around(row).text_ids, example.sentence_ids, whole_words=False)
        ):
            seen.add(text_hash)
            chosen.append(row)
        if len(chosen) == count:
            break
    return chosen + [EMPTY] * (count - len(chosen))


class BatchMaker:
    """Turns masked sentences and passage rows into padded batches."""

    def __init__(
        self,
        contexts: Contexts,
        wordpieces: Wordpieces,
        max_query: int,
        max_passage: int,
        max_joint: int,
        num_buckets: int,
    ) -> None:
        self.contexts, self.passages, self.wordpieces = contexts, contexts.corpus, wordpieces
        self.max_query, self.max_passage, self.max_joint, self.num_buckets = (
            max_query,
            max_passage,
            max_joint,
            num_buckets,
        )

    def passage(self, row: int) -> tuple[IntArray, IntArray]:
        """Title and text of a passage; both empty for the null passage and for an empty slot."""
        if row < 0:
            return _NO_IDS, _NO_IDS
        return self.passages.title_ids(row), self.passages.text_ids(row)

    def reading(self, row: int) -> tuple[IntArray, IntArray]:
        """What is read for a passage: its title, and its text with what stands around it."""
        title, text = self.passage(row)
        return title, text if row < 0 else self.contexts.around(row).text_ids

    def queries(self, examples: Sequence[MaskedSentence]) -> tuple[torch.Tensor, torch.Tensor]:
        """The retriever's view of the masked sentences: ids and mask, (B, L)."""
        words = self.wordpieces
        return pad_batch([words.query(e.masked_ids(words.mask), self.max_query) for e in examples], words.pad)

    def holds(self, parts: tuple[IntArray, IntArray], span_ids: IntArray) -> bool:
        """Whether the span stands in the title or the text of a passage (`passage`) or of what
        is read for it (`reading`)."""
        return any(self.wordpieces.find(part, span_ids) for part in parts)

    def passage_inputs(self, parts: Sequence[tuple[IntArray, IntArray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The retriever's view of passages given as (title, text)."""
        words = self.wordpieces
        return pad_batch([words.passage(title, text, self.max_passage) for title, text in parts], words.pad)

    def masked(
        self,
        examples: Sequence[MaskedSentence],
        passages: Sequence[Sequence[tuple[IntArray, IntArray]]],
        read_slot_BN: np.ndarray | None = None,
    ) -> MaskedBatch:
        """The reader's view: every example with each of its passages, sorted by length into a
        number of buckets that depends on how many examples there are alone, so that it is the same
        on every rank.

        `read_slot_BN` names for each passage the one it is read with; without it each is read on
        its own.
        """
        words, count = self.wordpieces, len(passages[0])
        read_slot_BN = np.tile(np.arange(count), (len(examples), 1)) if read_slot_BN is None else read_slot_BN
        joints = {
            b * count + n: words.joint(example.masked_ids(words.mask), title, text, self.max_joint)
            for b, (example, parts) in enumerate(zip(examples, passages, strict=True))
            for n, (title, text) in enumerate(parts)
            if read_slot_BN[b, n] == n
        }
        order = np.array(sorted(joints, key=lambda row: -len(joints[row][0])), dtype=np.int64)
        buckets = []
        for rows in np.array_split(order, min(self.num_buckets, len(examples))):
            tensors = pad_joint([joints[i][0] for i in rows], [joints[i][1] for i in rows], words.pad)
            buckets.append(JointBatch(*tensors, torch.from_numpy(rows)))
        positions = [np.arange(example.start, example.end) + 1 for example in examples]
        position_BM, token_BM = pad_batch(positions, 0)
        target_BM, _ = pad_batch([example.span_ids for example in examples], 0)
        return MaskedBatch(buckets, position_BM, target_BM, token_BM.bool(), torch.from_numpy(read_slot_BN))

    def reader_pretraining(
        self, examples: Sequence[MaskedSentence], passages: Sequence[tuple[IntArray, IntArray]], max_span_tokens: int
    ) -> ReaderPretrainingBatch:
        """The reader's view of examples with one passage each, and where the span stands in its
        title and text."""
        words = self.wordpieces
        masked, spans = self.masked(examples, [[parts] for parts in passages]), []
        for joint in masked.joint:
            places = []
            for ids, mask, kind, row in zip(
                joint.ids_RL.numpy(), joint.mask_RL.numpy(), joint.type_RL.numpy(), joint.row_R.tolist(), strict=True
            ):
                first, length = int((kind == 0).sum() - (mask == 0).sum()), int(mask.sum())
                span_ids = examples[row].span_ids
                places.append([(first + start, len(span_ids)) for start in words.find(ids[first:length], span_ids)])
            targets = span_targets(places, joint.ids_RL, joint.mask_RL, joint.type_RL, words, max_span_tokens)
            spans.append(SpanTargets(*targets))
        return ReaderPretrainingBatch(masked, spans)

    def realm(
        self,
        examples: Sequence[MaskedSentence],
        candidates: np.ndarray,
        pool: SpanPool | None,
        rate: float,
        rng: np.random.Generator,
    ) -> RealmBatch:
        """A pretraining batch; `candidates` (B, N − 1) are passage rows or EMPTY. A share `rate`
        of examples is substituted."""
        parts, read_examples, holds = [], [], []
        reading = np.zeros((len(examples), candidates.shape[1] + 1), dtype=np.int64)
        for b, (example, rows) in enumerate(zip(examples, candidates, strict=True)):
            reading[b, 1:] = 1 + np.array(
                self.contexts.share(rows)
            )  # what holds nothing (-1) is read with the null passage
            chosen = [self.reading(NULL), *(self.reading(int(row)) for row in rows)]
            holds.append([self.holds(parts, example.span_ids) for parts in chosen])
            if pool is not None and rng.random() < rate:
                example, texts = substitute(
                    example, [part for both in chosen for part in both], pool, self.wordpieces, rng
                )
                chosen = list(zip(texts[0::2], texts[1::2], strict=True))
            read_examples.append(example)
            parts.append(chosen)
        distinct, inverse = np.unique(candidates, return_inverse=True)
        # Row 0 is the null passage, which also stands in for empty slots; they are masked out of
        # the softmax.
        unique_parts = [self.passage(NULL), *(self.passage(int(row)) for row in distinct)]
        passage_ids, passage_mask = self.passage_inputs(unique_parts)
        index_BN = torch.zeros(len(examples), candidates.shape[1] + 1, dtype=torch.long)
        index_BN[:, 1:] = torch.from_numpy(inverse.reshape(candidates.shape)) + 1
        valid_BN = torch.ones_like(index_BN, dtype=torch.bool)
        valid_BN[:, 1:] = torch.from_numpy(candidates >= 0)
        query_ids, query_mask = self.queries(examples)
        masked = self.masked(read_examples, parts, reading)
        return RealmBatch(
            query_ids, query_mask, passage_ids, passage_mask, index_BN, valid_BN, torch.tensor(holds), masked
        )
