"""The configuration tree of a run: modules own the classes of what they build, `stage_config`
those of the stages, and this file joins them."""

import math
from dataclasses import dataclass, field, is_dataclass
from typing import ClassVar

from realm.corpus.sources import CorpusConfig
from realm.errors import UserError
from realm.models.reader import ReaderConfig
from realm.models.retriever import RetrieverConfig
from realm.spans.tagger import SpanConfig
from realm.text.tokenizer import TokenizerConfig
from realm.training.sections import (
    EngineConfig,
    EvaluateConfig,
    FinetuneConfig,
    FinetuneRetrieverConfig,
    IctConfig,
    PretrainConfig,
    ReaderPretrainingConfig,
    RefreshConfig,
)

QUESTION_FIELDS = ("id", "question", "answers", "context", "passage")
"""What a record of questions may have."""


@dataclass(frozen=True)
class QuestionSource:
    """Questions with answers; in YAML the path alone may stand for it."""

    SHORTHAND: ClassVar[str] = "path"

    path: str
    """File, `builtin:NAME` for a file of the built-in corpus, or (format `datasets`) a saved
    data set or a name on the Hugging Face hub."""
    format: str = "auto"
    """`squad` (1.1, 2.0), `jsonl` (NQ-open), `qas` (DPR), `webq`, `trec` (CuratedTREC), `timeqa`
    or `datasets`; `auto`: by name and content."""
    articles: tuple[str, ...] = ()
    """Of SQuAD, only the questions of these articles; none: of all."""
    exclude_articles: tuple[str, ...] = ()
    """Of SQuAD, not the questions of these articles."""
    num_folds: int = 1
    """Deal the documents asked about (articles of SQuAD and TimeQA, else what `passage` or
    `context` names) into so many folds, by their names, so that no document serves training and
    test alike."""
    use_folds: tuple[int, ...] = ()
    """Only the questions of these folds, the first being 0; none: of all."""
    fields: dict[str, str] = field(default_factory=dict)
    """Where `id`, `question`, `answers`, `context` and `passage` stand in `jsonl` and
    `datasets`, if not under these names."""
    name: str | None = None
    """Configuration of a data set on the hub."""
    split: str | None = None
    """Split of a data set on the hub or in a folder of splits; none: the only one there is."""
    limit: int | None = None
    """Take no more than this many questions."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and say how many, instead of refusing the file."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.fields) - set(QUESTION_FIELDS)):
            raise UserError(
                f"`fields` of {self.path} maps {unknown[0]!r}; a question has {', '.join(QUESTION_FIELDS)}."
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"`limit` of {self.path} must be at least 1, got {self.limit}.")
        if self.num_folds < 1 or not all(0 <= fold < self.num_folds for fold in self.use_folds):
            raise UserError(
                f"`use_folds` of {self.path} must be between 0 and `num_folds` - 1, got {list(self.use_folds)} with {self.num_folds} folds."
            )
        if self.num_folds > 1 and not self.use_folds:
            raise UserError(
                f"`num_folds` of {self.path} is {self.num_folds}, but `use_folds` names none of them; add for example use_folds: [0]."
            )


@dataclass(frozen=True)
class DataConfig:
    """Questions (a path, or a mapping with path and format) and annotated statements;
    `builtin:NAME` is a file of the built-in corpus."""

    train: QuestionSource | None = None
    """Questions to finetune on."""
    validation: QuestionSource | None = None
    """Questions to choose recipes by."""
    test: QuestionSource | None = None
    """Questions to report."""
    masked_spans: str | None = None
    """Statements with a known answer and passage, to measure masked spans on; none: drawn from
    the statements."""
    closed_book: str | None = None
    """The test questions' facts as statements with a known answer, for the cloze closed book."""
    unsupported: str | None = None
    """Statements whose fact stands in no passage, to see the null passage take mass."""


@dataclass(frozen=True)
class InitFromConfig:
    """Models that another run trained, to start from: what they were built with counts instead
    of `bert`, `pooling` and the like."""

    retriever: str | None = None
    """Folder of a saved retriever, such as `RUN/pretrain/model/retriever`; none: as `retriever`
    says."""
    reader: str | None = None
    """Folder of a saved reader, such as `RUN/pretrain/model/reader`; none: as `reader` says."""


@dataclass(frozen=True)
class RealmConfig:
    """Everything a run needs to know."""

    run: str
    """Run folder."""
    corpus: CorpusConfig
    """Passages and statements."""
    seed: int = 0
    """Seed of weights, batches, masks and dropout."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """WordPiece tokenizer."""
    spans: SpanConfig = field(default_factory=SpanConfig)
    """Salient span tagger."""
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    """Retriever."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """Reader."""
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    """Models of another run to start from."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Machine and DeepSpeed."""
    ict: IctConfig = field(default_factory=IctConfig)
    """Inverse cloze stage."""
    reader_pretraining: ReaderPretrainingConfig = field(default_factory=ReaderPretrainingConfig)
    """Reader warm-up stage."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """REALM stage."""
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """Asynchronous index."""
    finetune_retriever: FinetuneRetrieverConfig = field(default_factory=FinetuneRetrieverConfig)
    """Retriever finetuning stage."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Finetuning stage."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""
    data: DataConfig = field(default_factory=DataConfig)
    """Questions and annotated statements."""

    def threads(self, stage: str) -> int:
        """CPU threads of the trainer in a stage; 0: torch's choice."""
        return (self.pretrain.threads if stage == "pretrain" else 0) or self.engine.threads

    def __post_init__(self) -> None:
        query, joint = self.retriever.max_query_tokens, self.reader.max_tokens
        if joint < query + 16:
            raise UserError(
                f"reader.max_tokens ({joint}) leaves no room for a passage beside retriever.max_query_tokens ({query}); raise it."
            )
        context, block = self.corpus.context_tokens, self.corpus.block_tokens
        if context and not block <= context <= joint - query:
            raise UserError(
                f"corpus.context_tokens ({context}) must be 0 or lie between corpus.block_tokens ({block}) and reader.max_tokens less "
                f"retriever.max_query_tokens ({joint - query}); change it, or raise reader.max_tokens."
            )
        for name, section in vars(self).items():
            _check_ranges(name, section)
        for name, threads in (("pretrain", self.pretrain.threads), ("engine", self.engine.threads)):
            if threads < 0:
                raise UserError(f"{name}.threads must be 0 (torch's choice) or more, got {threads}.")
        if self.refresh.threads < 1:
            raise UserError(f"refresh.threads must be at least 1, got {self.refresh.threads}.")
        if self.pretrain.candidates < 2:
            raise UserError(
                f"pretrain.candidates must be at least 2, the null passage and one other, got {self.pretrain.candidates}."
            )
        if self.refresh.export_every == 0 and self.refresh.max_drift is None:
            raise UserError(
                "refresh.export_every is 0 and refresh.max_drift is not set, so that nothing would be exported; set one of them."
            )
        if self.refresh.staleness_multiplier < 1:
            raise UserError(
                f"refresh.staleness_multiplier must be at least 1, got {self.refresh.staleness_multiplier}."
            )
        stale, period = self.refresh.max_stale_steps, self.refresh.period
        if stale is not None and self.refresh.stale_policy != "warn" and (period == 0 or stale < period):
            raise UserError(
                f"refresh.max_stale_steps ({stale}) must be at least refresh.export_every ({self.refresh.export_every or 'exports by drift alone'}) "
                f"times staleness_multiplier ({self.refresh.staleness_multiplier}) with stale_policy {self.refresh.stale_policy}: a trainer would "
                "wait for an export that it has not made; raise it, or set stale_policy to warn."
            )


_LEAST = {"steps": 0, "batch_size": 1, "checkpoint_every": 1, "read": 1, "retrieve": 1, "negatives": 0, "keep_checkpoints": 1, "token_budget": 1,
          "reader_buckets": 1, "extra_retrieved": 0, "shard_rows": 1, "keep_last": 1, "max_span_tokens": 1, "warmup_steps": 0}  # fmt: skip
_SHARES = (
    "keep_sentence_prob",
    "mask_span_prob",
    "null_prob",
    "substitution_prob",
    "title_span_prob",
    "final_lr_ratio",
)
_NOT_NEGATIVE = ("lr", "retriever_lr", "max_grad_norm", "weight_decay", "grace_s")


def _check_ranges(name: str, section: object) -> None:
    """Raises UserError for a number in a section, or in the sections below, that cannot be
    meant. By field name: it means the same everywhere."""
    for field_name, value in vars(section).items() if is_dataclass(section) else ():
        where = f"{name}.{field_name}"
        _check_ranges(where, value)
        if field_name in _LEAST and value is not None and value < _LEAST[field_name]:
            raise UserError(f"{where} must be at least {_LEAST[field_name]}, got {value}.")
        if field_name in _SHARES and not 0 <= value <= 1:
            raise UserError(f"{where} is a share and must lie between 0 and 1, got {value}.")
        if field_name in _NOT_NEGATIVE and value is not None and not 0 <= value < math.inf:
            raise UserError(f"{where} must be a number from 0 up, got {value}.")
