"""The query-block pairs of inverse cloze: a sentence, a question made from it, or a title, each
with the block that it was taken from."""

from dataclasses import dataclass

import numpy as np

from pretrain.masking import SpanSampler
from pretrain.pseudo_questions import PseudoQuestions
from realm.corpus.collate import Parts
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.run.folder import Run
from realm.text.inputs import IntArray
from realm.training.sections import IctConfig

_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class ClozePair:
    """A query and the block to retrieve for it."""

    row: int
    query_ids: IntArray
    parts: Parts
    """The block as the retriever reads it: possibly without the query's sentence or title."""
    answer_ids: IntArray
    """What the query asks for: the span of a question, the sentence of a sentence. A passage that
    contains it is not a negative."""
    is_title: bool = False
    """Whether the query is the title of the document; its other blocks are then not negatives."""


class ClozePairs:
    """Draws a pair from each of `rows`."""

    def __init__(
        self,
        passages: PreparedCorpus,
        config: IctConfig,
        mask_id: int,
        sampler: SpanSampler | None = None,
        questions: PseudoQuestions | None = None,
    ) -> None:
        """`sampler`, `questions`: required unless `question_prob` is 0.

        Raises UserError if fewer than two passages have two sentences or more.
        """
        self.passages, self.config, self.mask_id = passages, config, mask_id
        self.sampler, self.questions = sampler, questions
        self._with_span = frozenset() if sampler is None else frozenset(sampler.rows.tolist())
        rows = [row for row in passages.training_rows.tolist() if len(passages.sentence_starts(row)) > 1]
        self.rows = np.array(rows, dtype=np.int64)
        """Blocks with two sentences or more that are not held out."""
        if len(self.rows) < 2:
            raise UserError(
                "the inverse cloze task needs at least two passages with two sentences or more, but "
                f"{passages.path} contains {len(self.rows)} such passages, of {len(passages.rows):,}; "
                "use more passages, or longer ones."
            )

    @classmethod
    def open(cls, run: Run) -> "ClozePairs":
        """The pairs of a run's passages."""
        config, passages = run.config.ict, run.passages
        if not config.question_prob:
            return cls(passages, config, run.wordpieces.mask)
        longest, span_tokens = run.config.retriever.max_query_tokens - 2, run.config.pretrain.max_span_tokens
        sampler = SpanSampler(passages, span_tokens, longest)
        questions = PseudoQuestions(run.config.pseudo_questions, run.tokenizer, passages, longest, span_tokens)
        return cls(passages, config, run.wordpieces.mask, sampler, questions)

    def draw(self, row: int, rng: np.random.Generator) -> ClozePair:
        """Draw a query from a block.

        A block that makes no question, or whose document has no title, gives a sentence.
        """
        config = self.config
        form = rng.random() if config.question_prob or config.title_prob else 1.0
        if form < config.question_prob:
            pair = self._question(row, rng)
        elif form < config.question_prob + config.title_prob:
            pair = self._title(row, rng)
        else:
            pair = None
        return pair or self._sentence(row, rng)

    def _question(self, row: int, rng: np.random.Generator) -> ClozePair | None:
        assert self.sampler is not None and self.questions is not None
        example = self.questions(self.sampler.draw(row, rng), rng) if row in self._with_span else None
        if example is None or example.question is None:
            return None
        sentence = example.sentence_ids
        ids, starts = self.passages.text_ids(row), self.passages.sentence_starts(row).tolist()
        number = next(n for n, at in enumerate(starts) if np.array_equal(ids[at : at + len(sentence)], sentence))
        return ClozePair(row, example.question, self._block(row, number, rng), example.span_ids)

    def _title(self, row: int, rng: np.random.Generator) -> ClozePair | None:
        title, text = self.passages.title_ids(row), self.passages.text_ids(row)
        if not len(title):
            return None
        kept = title if rng.random() < self.config.keep_sentence_prob else _NO_IDS
        return ClozePair(row, title, (kept, text), text, is_title=True)

    def _sentence(self, row: int, rng: np.random.Generator) -> ClozePair:
        ids = self.passages.text_ids(row)
        starts = np.append(self.passages.sentence_starts(row), len(ids))
        number = int(rng.integers(len(starts) - 1))
        sentence = np.array(ids[starts[number] : starts[number + 1]])
        query, parts = sentence.copy(), self._block(row, number, rng)
        if rng.random() < self.config.mask_span_prob:
            self._mask_span(row, query, int(starts[number]), rng)
        return ClozePair(row, query, parts, sentence)

    def _block(self, row: int, number: int, rng: np.random.Generator) -> Parts:
        """Title and text of a block, usually without its sentence `number`."""
        title, ids = self.passages.title_ids(row), self.passages.text_ids(row)
        if rng.random() < self.config.keep_sentence_prob:
            return title, ids
        starts = np.append(self.passages.sentence_starts(row), len(ids))
        return title, np.concatenate((ids[: starts[number]], ids[starts[number + 1] :]))

    def _mask_span(self, row: int, sentence: np.ndarray, offset: int, rng: np.random.Generator) -> None:
        """Mask one salient span of the sentence in place, if it has one."""
        starts, ends, _ = self.passages.spans(row)
        inside = np.flatnonzero((starts >= offset) & (ends <= offset + len(sentence)))
        if len(inside):
            chosen = rng.choice(inside)
            sentence[starts[chosen] - offset : ends[chosen] - offset] = self.mask_id
