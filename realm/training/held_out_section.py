"""Config section of the held-out documents."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from realm.runtime.section import Section
from realm.training.pseudo_question_section import PseudoQuestionConfig


@dataclass(frozen=True)
class HeldOutConfig(Section):
    """Documents that no stage draws sentences or queries from; they are retrieved and read like all
    others. Questions made from their sentences measure each stage without labels
    (`pretrain/held_out.py`)."""

    share: float = 0.02
    """Share of the documents, chosen by a hash of their text: a document stays held out when the
    corpus grows. 0: none, so that nothing is measured."""
    questions: int = 2000
    """Maximum number of questions made from their sentences."""
    passages: int | None = 20_000
    """Number of passages among which the questions' passages are searched: those of the questions,
    then random ones. They are encoded with the retriever of each stage. null: all passages."""

    pseudo_questions: PseudoQuestionConfig = field(default_factory=PseudoQuestionConfig)
    """How the questions are made; apart from the stages' `pseudo_questions`, so that retrievers
    which are trained with different ones are measured with the same questions."""

    def problems(self) -> Iterator[str]:
        yield from self.below_one("share")
        yield from self.at_least(1, "questions", "passages")
