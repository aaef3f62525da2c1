"""The `data` section of the configuration: questions and annotated statements."""

from dataclasses import dataclass, field
from typing import ClassVar

from realm.errors import UserError
from realm.runtime.section import PathText

QUESTION_FIELDS = ("id", "question", "answers", "context", "passage")
"""Fields of a question record."""


@dataclass(frozen=True)
class QuestionSource:
    """Questions with answers. In YAML, a path alone is short for `{path: …}`."""

    SHORTHAND: ClassVar[str] = "path"

    path: PathText
    """File, `builtin:NAME` for a file of the built-in corpus, or (format `datasets`) a saved
    dataset or a name on the Hugging Face hub."""
    format: str = "auto"
    """`squad` (1.1, 2.0), `jsonl` (NQ-open), `qas` (DPR), `webq`, `trec` (CuratedTREC), `timeqa` or
    `datasets`; `auto`: detected from file name and content."""
    articles: tuple[str, ...] = ()
    """Use only questions about these SQuAD articles; default: all."""
    exclude_articles: tuple[str, ...] = ()
    """Skip questions about these SQuAD articles."""
    num_folds: int = 1
    """Number of folds into which the questions are split by the name of their document, so that
    training and test questions have no document in common. The document is the article in SQuAD and
    TimeQA, otherwise `passage` or `context`."""
    use_folds: tuple[int, ...] = ()
    """Use only the questions of these folds, counted from 0; default: all."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names of `id`, `question`, `answers`, `context` and `passage` in `jsonl` and `datasets`, if
    they are different."""
    name: str | None = None
    """Configuration of a dataset on the hub."""
    split: str | None = None
    """Split of a dataset on the hub or in a folder of splits; default: the only one."""
    limit: int | None = None
    """Use at most this many questions."""
    skip_bad: bool = False
    """Skip and count records that cannot be used, instead of failing."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.fields) - set(QUESTION_FIELDS)):
            raise UserError(
                f"`fields` of {self.path} maps {unknown[0]!r}; the fields of a question are "
                f"{', '.join(QUESTION_FIELDS)}."
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"`limit` of {self.path} must be at least 1, got {self.limit}.")
        if self.num_folds < 1 or not all(0 <= fold < self.num_folds for fold in self.use_folds):
            raise UserError(
                f"`use_folds` of {self.path} must be between 0 and `num_folds` - 1, "
                f"got {list(self.use_folds)} with {self.num_folds} folds."
            )
        if self.num_folds > 1 and not self.use_folds:
            raise UserError(
                f"`num_folds` of {self.path} is {self.num_folds}, but `use_folds` is empty; "
                "add for example use_folds: [0]."
            )


@dataclass(frozen=True)
class DataConfig:
    """Questions (a path, or a mapping with path and format) and annotated statements (JSONL).

    `builtin:NAME` is a file of the built-in corpus.
    """

    train: QuestionSource | None = None
    """Questions to finetune on."""
    validation: QuestionSource | None = None
    """Questions for choosing settings."""
    test: QuestionSource | None = None
    """Questions for reported results."""
    masked_spans: PathText | None = None
    """Statements with a known answer and passage, for masked-span evaluation; default: a sample of
    the run's statements."""
    closed_book: PathText | None = None
    """The facts of the test questions as statements with a known answer, for the closed-book cloze
    test."""
    unsupported: PathText | None = None
    """Statements whose fact does not appear in any passage, to measure the probability of the null
    passage."""
