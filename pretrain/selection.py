"""Selection of retrieved passages: candidates without trivial ones, and supporting passages."""

from collections.abc import Sequence

import numpy as np

from pretrain.masking import MaskedSentence
from realm.corpus.collate import EMPTY, Collator, filled
from realm.corpus.context import Contexts
from realm.corpus.prepared import PreparedCorpus
from realm.text.inputs import Wordpieces


def choose_candidates(
    retrieved_rows: Sequence[int] | np.ndarray,
    example: MaskedSentence,
    count: int,
    contexts: Contexts,
    statements: PreparedCorpus,
    wordpieces: Wordpieces,
) -> list[int]:
    """The first `count` retrieved passages that are not trivial, padded with EMPTY.

    Trivial passages are the block of the sentence, copies of its text, passages whose context
    contains the whole sentence, and duplicates of a chosen passage (Guu et al. 2020, section 3.4);
    with contexts larger than a block, also all blocks of the sentence's document. They are not used
    even if there are fewer than `count` other passages.
    """
    passages = contexts.corpus
    same_corpus = passages.fingerprint == statements.fingerprint
    own_document = statements.document(example.row) if same_corpus and contexts.context_tokens else None
    chosen: list[int] = []
    seen = {statements.text_hash(example.row)}
    for row in filled(retrieved_rows):
        text_hash = passages.text_hash(row)
        own_block = same_corpus and row == example.row
        own = own_block or (own_document is not None and passages.document(row) == own_document)
        # A sentence longer than a query is truncated, possibly inside a word.
        context_ids = contexts.around(row).text_ids
        if not (own or text_hash in seen or wordpieces.find(context_ids, example.sentence_ids, whole_words=False)):
            seen.add(text_hash)
            chosen.append(row)
        if len(chosen) == count:
            break
    return chosen + [EMPTY] * (count - len(chosen))


def find_supporting_passage(
    retrieved: np.ndarray, example: MaskedSentence, statements: PreparedCorpus, collator: Collator
) -> int | None:
    """The first non-trivial retrieved passage that contains the span and another one, or None.

    The other one must be a salient span of the same sentence: a year or a city appears in many
    passages, but a passage that contains both spans probably states the same fact. For a sentence
    without other spans, the first passage that contains the span; none if it is a question.
    """
    for row in filled(retrieved):
        parts = collator.in_context(row)
        if not collator.contains(parts, example.span_ids):
            continue
        alone = not example.others and example.question is None
        if not alone and not any(collator.contains(parts, other) for other in example.others):
            continue
        (kept,) = choose_candidates([row], example, 1, collator.contexts, statements, collator.wordpieces)
        if kept != EMPTY:
            return kept
    return None
