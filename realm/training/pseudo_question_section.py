"""Config section of the questions made from sentences."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from realm.runtime.section import Section
from realm.spans.rules import SPAN_TYPES

FORMS = ("noisy", "clause", "identity", "template")
"""Forms of questions."""
PHRASE = len(SPAN_TYPES)
"""Type of an answer that is not a salient span; it follows the indices into SPAN_TYPES."""
ANSWER_TYPES = (*SPAN_TYPES, "phrase")
"""Types of answers; the order is that of SPAN_TYPES."""
SHAPES = {"year": "date", "ordinal": "number"}
"""Types of answers that have question words of their own, and the types that they belong to. A year
is a date of four digits, an ordinal a number of digits and letters (`18th`)."""


def _english_question_words() -> dict[str, tuple[str, ...]]:
    return {
        "person": ("who",),
        "place": ("where", "what place"),
        "organisation": ("what", "who", "which organization"),
        "date": ("when",),
        "year": ("when", "what year", "in what year"),
        "number": ("how many", "how much", "what number"),
        "ordinal": ("which", "what"),
        "other": ("what", "which"),
        "phrase": ("what", "which"),
    }


@dataclass(frozen=True)
class PseudoQuestionConfig(Section):
    """Questions made from sentences (Lewis et al. 2019, section 2.2; Fabbri et al. 2020, section
    3.2): the answer is a salient span or a phrase of the sentence, the question is the clause
    around it."""

    forms: dict[str, float] = field(default_factory=lambda: {"noisy": 1.0})
    """Forms of questions with their weights, where B stands before the answer and A after it.
    `noisy`: question word, then the words of B and A in disturbed order, some dropped; `clause`:
    question word, B, A; `identity`: B, question word, A; `template`: question word, A, comma, B."""
    question_words: dict[str, tuple[str, ...]] = field(default_factory=_english_question_words)
    """Question words by type of the answer, one of which is drawn; none for types without an entry.
    Types: those of salient spans, `phrase` (not a salient span), `year` (a date of four digits;
    without an entry as other dates), `ordinal` (`18th`; without an entry as other numbers).
    Default: English."""
    phrase_prob: float = 0.0
    """Probability that the answer is a phrase, a run of words that are not frequent, instead of a
    salient span. Phrases are not substituted."""
    title_prob: float = 0.0
    """Probability that the title of the document is added to a question that contains no word of
    it."""
    clause_words: int = 10
    """The shortest clause around the answer with at least this number of other words is used; 0:
    the shortest clause."""
    max_side_words: int = 20
    """Maximum number of words on each side of the answer."""
    min_words: int = 5
    """Minimum number of words besides the question word. A sentence with fewer does not become a
    question."""
    min_frequent_share: float = 0.25
    """Minimum share of frequent words in the clause; lists of names and numbers have few."""
    frequent_words: int = 200
    """Number of words that count as frequent: the most frequent ones of the corpus, at most a tenth
    of its distinct words."""
    drop_prob: float = 0.1
    """Probability that a word of a noisy question is dropped."""
    shuffle: float = 3.0
    """Words of a noisy question are sorted by place plus a random number of at most this size."""
    source_prob: float = 1.0
    """Reader pretraining: probability that a question for which no other passage is found is read
    with the block that its sentence is from, without the sentence if the rest contains the answer,
    too; otherwise it is skipped."""
    source_noise: float = 2.0
    """`drop_prob` and `shuffle` are multiplied by this number if that block is read with the
    sentence; the question is then noisy in any case."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(0, "clause_words", "shuffle")
        yield from self.at_least(1, "max_side_words", "min_words", "frequent_words", "source_noise")
        yield from self.at_most(1000, "shuffle", "source_noise")
        yield from self.probabilities("phrase_prob", "title_prob", "drop_prob", "source_prob", "min_frequent_share")
        for name, weight in self.forms.items():
            if name not in FORMS:
                yield f"forms: {name!r} is not a form of questions; use {', '.join(FORMS)}"
            elif not 0 <= weight < float("inf"):
                yield f"forms: the weight of {name} must be a finite number of at least 0, got {weight}"
        if not any(weight > 0 for weight in self.forms.values()):
            yield "forms must have a form with a weight greater than 0"
        for kind in self.question_words:
            if kind not in (*ANSWER_TYPES, *SHAPES):
                yield f"question_words: {kind!r} is not a type of answers; use {', '.join((*ANSWER_TYPES, *SHAPES))}"
