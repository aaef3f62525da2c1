"""Questions made from the sentences of held-out documents, with the passages that they ask for.

They do not depend on the seed of the run or on the settings of training, so that retrievers of
different recipes are measured with the same questions.
"""

from dataclasses import dataclass

import numpy as np

from index.lexical import LexicalIndex, best_rows
from pretrain.masking import MaskedSentence, SpanSampler
from pretrain.pseudo_questions import PseudoQuestions
from pretrain.search import own_rows
from realm.corpus.collate import Collator
from realm.run.folder import Run

_SEED = 20_177
_ROUNDS = 4
"""Maximum number of questions from one block."""
_SUPPORT_DEPTH = 100
"""Number of passages, the best ones of BM25 for an answer and a second entity, that are searched
for both."""


@dataclass(frozen=True)
class HeldOutQuestions:
    """Questions, each with its source and its supporting passages."""

    examples: list[MaskedSentence]
    source: list[int]
    """Row of the passage that the question was made from; -1 if sentences are not from the
    passages."""
    supporting: list[list[int]]
    """Rows of other passages that hold the answer and a second salient span of the sentence, not a
    number, that is also in the question, but not the sentence itself; most questions have none."""
    pool: np.ndarray
    """Rows of the passages among which they are searched, ascending."""

    def __len__(self) -> int:
        return len(self.examples)


def held_out_questions(run: Run, lexical: LexicalIndex) -> HeldOutQuestions:
    """The held-out questions of a run; none if no held-out document makes a question."""
    config, rng = run.config.held_out, np.random.default_rng(_SEED)
    examples = _draw(run, config.questions, rng)
    source = own_rows(examples, run.statements, run.passages)
    supporting = [_supporting_rows(example, row, run, lexical) for example, row in zip(examples, source, strict=True)]
    targets = {row for row in source if row >= 0}.union(*supporting)
    return HeldOutQuestions(examples, source, supporting, _pool(run.passages.rows, targets, config.passages, rng))


def _draw(run: Run, count: int, rng: np.random.Generator) -> list[MaskedSentence]:
    """At most `count` questions: one of each held-out block, then a second one, and so on."""
    longest, span_tokens = run.config.retriever.max_query_tokens - 2, run.config.pretrain.max_span_tokens
    statements = run.statements
    sampler = SpanSampler(statements, span_tokens, longest, statements.held_out_rows)
    ask = PseudoQuestions(run.config.held_out.pseudo_questions, run.tokenizer, statements, longest, span_tokens)
    drawn: dict[tuple[int, bytes, int], MaskedSentence] = {}
    for _ in range(_ROUNDS):
        for row in rng.permutation(sampler.rows).tolist():
            example = ask(sampler.draw(row, rng), rng)
            if example is not None and len(drawn) < count:
                drawn.setdefault((row, example.sentence_ids.tobytes(), example.start), example)
    return list(drawn.values())


def _supporting_rows(example: MaskedSentence, source: int, run: Run, lexical: LexicalIndex) -> list[int]:
    collator, terms, asked = run.collator, run.terms, set(example.query_ids(0).tolist())
    found: set[int] = set()
    for other in example.others:
        if asked.issuperset(other.tolist()) and not all(term.isdigit() for term in terms(other)):
            rows = best_rows(lexical.scores([*terms(example.span_ids), *terms(other)]), _SUPPORT_DEPTH)
            found.update(row for row in rows.tolist() if _supports(collator, row, example, other))
    copies = {source, *(row for row in found if source >= 0 and _is_copy(run, row, source))}
    return sorted(found - copies)


def _supports(collator: Collator, row: int, example: MaskedSentence, other: np.ndarray) -> bool:
    parts = collator.passage(row)
    if not (collator.contains(parts, example.span_ids) and collator.contains(parts, other)):
        return False
    return not collator.wordpieces.find(parts[1], example.sentence_ids, whole_words=False)


def _is_copy(run: Run, row: int, source: int) -> bool:
    return run.passages.text_hash(row) == run.passages.text_hash(source)


def _pool(rows: np.ndarray, targets: set[int], count: int | None, rng: np.random.Generator) -> np.ndarray:
    """The targets, and random other passages up to `count`; None: all passages."""
    if count is None:
        return rows
    others = rng.permutation(rows[~np.isin(rows, sorted(targets))])
    return np.sort(np.concatenate((np.array(sorted(targets), np.int64), others[: max(0, count - len(targets))])))
