"""Pseudo-questions: a sentence becomes a question whose answer is a span of the sentence.

Lewis et al. 2019 (cloze translation, section 2) and Fabbri et al. 2020 (templates, section 3). No
parser and no labels are needed: the clause around the answer is found by punctuation, and the
question word by the type of the answer.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pretrain.masking import MaskedSentence, SpanSampler
from pretrain.words import Word, Words
from realm.corpus.prepared import PreparedCorpus
from realm.run.folder import Run
from realm.text.inputs import IntArray
from realm.text.tokenizer import tokenize
from realm.training.pseudo_question_section import ANSWER_TYPES, PHRASE, SHAPES, PseudoQuestionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ORDINAL = re.compile(r"\d+[^\W\d_]+")
_NO_IDS = np.zeros(0, np.int32)
_MAX_DRAWS = 4
"""Maximum number of sentences of a block that are tried for a question."""


class PseudoQuestions:
    """Makes questions from masked sentences."""

    def __init__(
        self,
        config: PseudoQuestionConfig,
        tokenizer: "PreTrainedTokenizerBase",
        corpus: PreparedCorpus,
        max_tokens: int,
        max_answer_tokens: int,
    ) -> None:
        """`corpus`: the sentences' corpus; `max_tokens`: longest question; `max_answer_tokens`:
        longest phrase, both in wordpieces."""
        self.config, self.corpus = config, corpus
        self.max_tokens, self.max_answer_tokens = max_tokens, max_answer_tokens
        self.words = Words(tokenizer)
        self.words.count_frequent(corpus, config.frequent_words)
        self._unknown = tokenizer.unk_token_id
        weights = np.array(list(config.forms.values()), float)
        self._forms, self._weights = list(config.forms), weights / weights.sum()

        def encode(text: str) -> IntArray:
            (ids, _), *_ = tokenize(tokenizer, [text])
            return ids[ids != self._unknown]

        self._question_mark, self._comma = encode("?"), encode(",")
        self._question_words = {
            kind: [encode(text) for text in texts] for kind, texts in config.question_words.items() if texts
        }

    @classmethod
    def open(cls, run: Run) -> "PseudoQuestions":
        """Questions from the statements of a run."""
        longest = run.config.retriever.max_query_tokens - 2
        answer_tokens = min(run.config.pretrain.max_span_tokens, run.config.reader.max_span_tokens)
        return cls(run.config.pseudo_questions, run.tokenizer, run.statements, longest, answer_tokens)

    def __call__(self, example: MaskedSentence, rng: np.random.Generator) -> MaskedSentence | None:
        """The example with a question as its query; its answer is the span or a phrase.

        `others` of the result are names in the question: a passage that contains one of them and
        the answer can support it, one with a number or a name from elsewhere in the sentence not.
        None if the sentence does not make a question: it has too few words or too few frequent
        ones, its question would contain the answer, or the answer has unknown characters.
        """
        if rng.random() < self.config.phrase_prob:
            example = self._with_phrase(example, rng)
        form = str(rng.choice(self._forms, p=self._weights))
        return self._ask(example, form, 1.0, rng)

    def with_noise(self, example: MaskedSentence, rng: np.random.Generator) -> MaskedSentence | None:
        """The example with a noisy question for the same answer, by `source_noise` noisier."""
        return self._ask(example, "noisy", self.config.source_noise, rng)

    def _ask(self, example: MaskedSentence, form: str, noise: float, rng: np.random.Generator) -> MaskedSentence | None:
        config, ids = self.config, example.sentence_ids
        clause = self._clause(example)
        if clause is None or (example.span_ids == self._unknown).any():
            return None
        others = self._names(example, [*clause[0], *clause[1]])
        before, after = ([ids[word.start : word.end] for word in side] for side in clause)
        if rng.random() < config.title_prob and (title := self._missing_title(example)):
            before = title + before
            if self._has_letter(example.span_ids):
                others = (*others, self.corpus.title_ids(example.row))
        choices = self._question_words_for(example)
        word = choices[rng.integers(len(choices))]
        if form == "noisy":
            before, after = self._disturbed(before + after, noise, rng), []
        if len(before) + len(after) < config.min_words:
            return None
        if form == "identity":
            parts = [*before, word, *after]
        elif form == "template":
            parts = [word, *after, *([self._comma] if before and after else []), *before]
        else:
            parts = [word, *before, *after]
        question = np.concatenate(parts).astype(np.int32)[: self.max_tokens - len(self._question_mark)]
        if self.words.wordpieces.find(question, example.span_ids):
            return None
        return replace(example, question=np.concatenate((question, self._question_mark)), others=others)

    def _clause(self, example: MaskedSentence) -> tuple[list[Word], list[Word]] | None:
        """Words before and after the answer, within the shortest clause that has enough of them.

        None if no clause has enough frequent words.
        """
        config, ids, words = self.config, example.sentence_ids, self.words
        kept = words.without_brackets(ids, words.split(ids), example.start, example.end)
        if kept is None:
            return None
        before = [word for word in kept if word.end <= example.start]
        after = [word for word in kept if word.start >= example.end]
        firsts = [0, *(place + 1 for place, word in enumerate(before) if words.ends_clause(ids, word))]
        lasts = [*(place for place, word in enumerate(after) if words.ends_clause(ids, word)), len(after)]
        clauses = []
        for first in firsts:
            for last in lasts:
                left = [word for word in before[first:] if not word.is_mark][-config.max_side_words :]
                right = [word for word in after[:last] if not word.is_mark][: config.max_side_words]
                size, frequent = len(left) + len(right), sum(word.is_frequent for word in (*left, *right))
                if size >= config.min_words and frequent >= config.min_frequent_share * size:
                    clauses.append((min(size, config.clause_words) * -1, size, left, right))
        if not clauses:
            return None
        _, _, left, right = min(clauses, key=lambda clause: clause[:2])
        return left, right

    def _question_words_for(self, example: MaskedSentence) -> list[IntArray]:
        text, kind = self.words.text(example.span_ids), ANSWER_TYPES[example.kind]
        shape = "year" if text.isdecimal() and len(text) == 4 else "ordinal" if _ORDINAL.fullmatch(text) else ""
        names = (shape, kind) if SHAPES.get(shape) == kind else (kind,)
        return next((self._question_words[name] for name in names if name in self._question_words), [_NO_IDS])

    def _with_phrase(self, example: MaskedSentence, rng: np.random.Generator) -> MaskedSentence:
        """The example with a phrase as its answer, if the sentence has one."""
        find, ids = self.words.wordpieces.find, example.sentence_ids
        salient = [(example.start, example.end)]
        salient += [(start, start + len(other)) for other in example.others for start in find(ids, other)]
        phrases = [
            (start, end) for start, end in self.words.phrases(ids, salient) if end - start <= self.max_answer_tokens
        ]
        if not phrases:
            return example
        start, end = phrases[rng.integers(len(phrases))]
        return replace(example, start=start, end=end, kind=PHRASE, others=(*example.others, example.span_ids))

    def _names(self, example: MaskedSentence, clause: list[Word]) -> tuple[IntArray, ...]:
        """The sentence's other salient spans that have a letter and are in the clause.

        None if the answer has no letter: a number or a year and one name are in many passages that
        state something else.
        """
        if not self._has_letter(example.span_ids):
            return ()
        inside = np.concatenate([np.arange(word.start, word.end) for word in clause])
        return tuple(
            other
            for other in example.others
            if self._has_letter(other)
            and np.isin(self.words.wordpieces.find(example.sentence_ids, other), inside).any()
        )

    def _has_letter(self, ids: IntArray) -> bool:
        return any(map(str.isalpha, self.words.text(ids)))

    def _missing_title(self, example: MaskedSentence) -> list[IntArray]:
        """The words of the title, outside of brackets, if none of its content words is in the
        sentence."""
        ids = self.corpus.title_ids(example.row) if example.row >= 0 else example.sentence_ids[:0]
        kept = self.words.without_brackets(ids, self.words.split(ids), 0, 0) or []
        words = [word for word in kept if not word.is_mark]
        naming = [word for word in words if word.is_content] or words
        find = self.words.wordpieces.find
        if any(find(example.sentence_ids, ids[word.start : word.end]) for word in naming):
            return []
        return [ids[word.start : word.end] for word in words]

    def _disturbed(self, words: list[IntArray], noise: float, rng: np.random.Generator) -> list[IntArray]:
        """Words without some of them, sorted by their place plus a random number."""
        shift = rng.uniform(0, self.config.shuffle * noise, len(words))
        order = np.argsort(np.arange(len(words)) + shift, kind="stable")
        return [words[place] for place in order if rng.random() >= self.config.drop_prob * noise]


class ExampleSampler:
    """Draws the examples of a stage: masked sentences, and questions made from them."""

    def __init__(self, sampler: SpanSampler, questions: PseudoQuestions | None, question_prob: float) -> None:
        """`question_prob`: share of questions; `questions` is not needed if it is 0."""
        self.sampler, self.questions, self.question_prob = sampler, questions, question_prob
        self.corpus, self.rows = sampler.corpus, sampler.rows

    @classmethod
    def open(cls, run: Run, question_prob: float) -> "ExampleSampler":
        """Examples from the statements of a run."""
        config, longest = run.config.pretrain, run.config.retriever.max_query_tokens - 2
        sampler = SpanSampler(run.statements, config.max_span_tokens, longest)
        return cls(sampler, PseudoQuestions.open(run) if question_prob else None, question_prob)

    def draw(self, row: int, rng: np.random.Generator) -> MaskedSentence:
        """Draw an example from a block: with probability `question_prob` a question.

        A block of whose sentences none makes a question gives a masked sentence.
        """
        if self.question_prob and rng.random() < self.question_prob:
            assert self.questions is not None
            for _ in range(_MAX_DRAWS):
                if (example := self.questions(self.sampler.draw(row, rng), rng)) is not None:
                    return example
        return self.sampler.draw(row, rng)
