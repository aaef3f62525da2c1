"""Pseudo-questions: a sentence with a salient span becomes a question whose answer is the span.

Lewis et al. 2019 (cloze translation, section 2) and Fabbri et al. 2020 (templates, section 3). No
parser and no labels are needed: the clause around the span is found by punctuation, and the
question word by the type of the span.
"""

import unicodedata
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pretrain.masking import MaskedSentence
from realm.spans.rules import SPAN_TYPES
from realm.text.inputs import IntArray, Wordpieces
from realm.text.tokenizer import tokenize
from realm.training.sections import PseudoQuestionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLAUSE_ENDS = frozenset(',;:–—…،؛、，；："')
"""Characters between clauses, besides brackets and quotation marks in pairs."""


class PseudoQuestions:
    """Makes questions from masked sentences."""

    def __init__(self, config: PseudoQuestionConfig, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        """`max_tokens`: longest question in wordpieces."""
        self.max_tokens = max_tokens
        self.config, self.words = config, Wordpieces.from_tokenizer(tokenizer)
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._ends_clause = np.array([_ends_clause(name) for name in names])
        self._ends_sentence = np.array([len(name) == 1 and unicodedata.category(name)[0] == "P" for name in names])

        def encode(text: str) -> IntArray:
            (ids, _), *_ = tokenize(tokenizer, [text])
            return ids

        self._mark = encode("?")
        self._question_words = [
            [encode(text) for text in config.question_words.get(kind, ())] or [np.zeros(0, np.int32)]
            for kind in SPAN_TYPES
        ]

    def __call__(self, example: MaskedSentence, rng: np.random.Generator) -> MaskedSentence:
        """The example with a question as its query.

        Wordpieces of a question never contain the span as whole words.
        """
        choices = self._question_words[example.kind]
        word = choices[rng.integers(len(choices))]
        before, after = self._clause(example)
        if self.config.form == "identity":
            parts = [*before, word, *after]
        elif self.config.form == "template":
            parts = [word, *after, *before]
        else:
            parts = [word, *self._disturbed(before + after, rng)]
        question = self._without(np.concatenate(parts).astype(np.int32), example.span_ids)
        question = np.concatenate((question[: self.max_tokens - len(self._mark)], self._mark))
        return replace(example, question=question)

    def _clause(self, example: MaskedSentence) -> tuple[list[IntArray], list[IntArray]]:
        """Words before and after the span, within the shortest clause that has enough of them."""
        ids = example.sentence_ids
        starts = np.flatnonzero(~self.words.continuation[ids])
        bounds = list(zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True))
        before = [(start, end) for start, end in bounds if end <= example.start]
        after = [(start, end) for start, end in bounds if start >= example.end]
        while after and after[-1][1] - after[-1][0] == 1 and self._ends_sentence[ids[after[-1][0]]]:
            after.pop()
        firsts = [0, *(place + 1 for place, (start, _) in enumerate(before) if self._ends_clause[ids[start]])]
        lasts = [*(place for place, (start, _) in enumerate(after) if self._ends_clause[ids[start]]), len(after)]
        sizes = [(len(before) - first + last, first, last) for first in firsts for last in lasts]
        _, first, last = min((size for size in sizes if size[0] >= self.config.clause_words), default=max(sizes))
        kept_before, kept_after = before[first:][-self.config.max_side_words :], after[:last]
        kept_after = kept_after[: self.config.max_side_words]
        return tuple(  # type: ignore[return-value]
            [np.array(ids[start:end]) for start, end in side if not self._ends_clause[ids[start]]]
            for side in (kept_before, kept_after)
        )

    def _disturbed(self, words: list[IntArray], rng: np.random.Generator) -> list[IntArray]:
        """Words without some of them, sorted by their place plus a random number."""
        order = np.argsort(np.arange(len(words)) + rng.uniform(0, self.config.shuffle, len(words)), kind="stable")
        return [words[place] for place in order if rng.random() >= self.config.drop_prob]

    def _without(self, question: IntArray, span: IntArray) -> IntArray:
        """The question without further occurrences of the span."""
        keep = np.ones(len(question), dtype=bool)
        for start in self.words.find(question, span):
            keep[start : start + len(span)] = False
        return question[keep]


def _ends_clause(name: str) -> bool:
    """Whether a wordpiece is a punctuation mark between clauses."""
    return len(name) == 1 and (
        name in _CLAUSE_ENDS or unicodedata.category(name) in ("Ps", "Pe", "Pi", "Pf") or name == '"'
    )
