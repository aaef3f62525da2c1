"""The configuration tree of a run.

Each section is defined in the module that it configures; this file combines them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from realm.corpus.sources import CorpusConfig
from realm.models.reader import ReaderConfig
from realm.models.retriever import RetrieverConfig
from realm.run.data_config import DataConfig
from realm.runtime.section import InvalidSection, PathText, Section, all_problems
from realm.runtime.threads import threads_beside
from realm.spans.tagger import SpanConfig
from realm.text.tokenizer import TokenizerConfig
from realm.training.fusion_section import FusionConfig
from realm.training.held_out_section import HeldOutConfig
from realm.training.pseudo_question_section import PseudoQuestionConfig
from realm.training.refresh_section import RefreshConfig
from realm.training.sections import (
    EngineConfig,
    EvaluateConfig,
    FinetuneConfig,
    FinetuneRetrieverConfig,
    IctConfig,
    PretrainConfig,
    ReaderPretrainingConfig,
)

MIN_PASSAGE_ROOM = 16
"""Minimum number of wordpieces in a joint input that must remain for the passage."""


@dataclass(frozen=True)
class InitFromConfig:
    """Models of another run to start from, instead of those of `retriever` and `reader`."""

    retriever: PathText | None = None
    """Folder of a saved retriever, such as `RUN/pretrain/model/retriever`; default: built from
    `retriever`."""
    reader: PathText | None = None
    """Folder of a saved reader, such as `RUN/pretrain/model/reader`; default: built from
    `reader`."""


@dataclass(frozen=True)
class RealmConfig(Section):
    """Configuration of a run."""

    run: PathText
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
    """Precision, threads, checkpoints and DeepSpeed."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Documents held out to measure each stage without labels."""
    ict: IctConfig = field(default_factory=IctConfig)
    """Inverse cloze stage."""
    reader_pretraining: ReaderPretrainingConfig = field(default_factory=ReaderPretrainingConfig)
    """Reader pretraining stage."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """REALM stage."""
    pseudo_questions: PseudoQuestionConfig = field(default_factory=PseudoQuestionConfig)
    """Questions made from sentences, as queries without labels."""
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """Asynchronous index refresh."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """Retrieval by BM25 in addition to the retriever."""
    finetune_retriever: FinetuneRetrieverConfig = field(default_factory=FinetuneRetrieverConfig)
    """Retriever finetuning stage."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Finetuning stage."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""
    data: DataConfig = field(default_factory=DataConfig)
    """Questions and annotated statements."""

    def threads(self, stage: str) -> int:
        """CPU threads of the trainer in a stage; 0: torch's default. REALM pretraining leaves the
        refresher its cores."""
        if stage != "pretrain":
            return self.engine.threads
        return self.pretrain.threads or self.engine.threads or threads_beside(self.refresh.threads)

    def __post_init__(self) -> None:
        if problems := list(all_problems(self)):
            raise InvalidSection(problems)

    def problems(self) -> Iterator[str]:
        """Yield the problems of `seed`, and those that involve several sections."""
        yield from self.at_least(0, "seed")
        query, joint = self.retriever.max_query_tokens, self.reader.max_tokens
        if joint < query + MIN_PASSAGE_ROOM:
            yield (
                f"reader.max_tokens ({joint}) leaves no room for a passage after retriever.max_query_tokens ({query}); "
                "raise reader.max_tokens"
            )
        context, block = self.corpus.context_tokens, self.corpus.block_tokens
        if context and not block <= context <= joint - query:
            yield (
                f"corpus.context_tokens ({context}) must be 0, or between corpus.block_tokens ({block}) and "
                f"reader.max_tokens minus retriever.max_query_tokens ({joint - query}); change it, or raise "
                "reader.max_tokens"
            )
