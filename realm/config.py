"""The configuration tree of a run. Modules own the config classes of what they build; this file adds those of the stages and composes the whole."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from realm.corpus import CorpusConfig
from realm.errors import UserError
from realm.reader import ReaderConfig
from realm.retriever import RetrieverConfig
from realm.salient_spans import SpanConfig
from realm.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, a linear schedule with warm-up, and clipping; the same for every stage."""

    lr: float = 3e-5
    """Peak learning rate (of the reader, where a stage trains both)."""
    retriever_lr: float | None = None
    """Peak learning rate of the retriever; none: `lr`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and layer norms have none."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    warmup_steps: int = 100
    """Steps over which the rate rises from 0."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: falling linearly to `final_lr_share` at the last step, or constant."""
    final_lr_share: float = 0.0
    """Share of the peak rate left at the last step of a linear schedule."""


@dataclass(frozen=True)
class EngineConfig:
    """How training runs on the machine."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast over fp32 parameters. It pays on GPUs and on CPUs with AMX from widths of some hundreds; others emulate it, very slowly."""
    threads: int = 0
    """CPU threads of the trainer; 0 leaves torch's choice."""
    log_every_s: float = 10.0
    """Seconds between progress lines where the output is no terminal."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept per stage."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed settings merged over those made from this config."""


@dataclass(frozen=True)
class IctConfig:
    """Inverse cloze warm start of the retriever (Lee et al. 2019, section 4)."""

    steps: int = 100_000
    """Updates."""
    batch_size: int = 4096
    """Sentence-block pairs per update and process: each block is a negative of the other sentences."""
    keep_sentence: float = 0.1
    """Share of examples whose sentence stays in its block."""
    mask_spans: float = 0.0
    """Share of examples in which one salient span of the sentence is masked, so that queries look as in pretraining."""
    null_share: float = 0.0
    """Share of sentences whose block is withheld and whose right choice is the null passage, so that its score starts out between those of
    passages that match and those that do not; 0: the null passage takes no part."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    """Optimiser."""


@dataclass(frozen=True)
class ReaderWarmupConfig:
    """Salient spans predicted from retrieved passages that hold them: the reader learns to read before it teaches the retriever."""

    steps: int = 1000
    """Updates."""
    batch_size: int = 32
    """Statement-passage pairs per update and process."""
    retrieve: int = 20
    """Passages retrieved per statement, of which those that hold the span are read."""
    substitution: float = 0.8
    """Share of examples whose span is replaced, in target and passage alike, by another span of its type: copying instead of remembering."""
    topic_share: float = 1.0
    """Share kept of the examples whose span stands in the passage's title: naming the topic takes little reading."""
    null_share: float = 0.0
    """Share of examples read with the null passage: what may be expected of a span unread, so that no passage beats a wrong one."""
    span_loss: float = 1.0
    """Weight of the span head's loss (the same span, found in the passage) beside the masked-language head's; 0 leaves that head to finetuning."""
    sentence_steps: int = 0
    """First steps that read only the sentence that holds the span: copying is found sooner in a short text."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""


@dataclass(frozen=True)
class PretrainConfig:
    """REALM pretraining (Guu et al. 2020, section 3)."""

    steps: int = 200_000
    """Updates."""
    threads: int = 0
    """CPU threads of the trainer in this stage, beside a refresher on the same cores; 0: those of `engine.threads`."""
    batch_size: int = 16
    """Masked sentences per update and process."""
    candidates: int = 8
    """Passages read per sentence, the null passage in slot 0 included."""
    extra_retrieved: int = 8
    """Passages retrieved beyond `candidates`, so that dropping trivial ones leaves enough."""
    max_span_tokens: int = 10
    """Longest salient span masked; longer ones are never chosen."""
    marginal: Literal["joint", "per_token"] = "joint"
    """Marginal likelihood over the whole span, or token by token."""
    substitution: float = 0.0
    """Share of examples with entity substitution, as in the reader's warm-up, applied to every candidate alike."""
    reader_buckets: int = 4
    """Groups of similar length into which the joint inputs are padded; fixed, so that ranks issue the same collectives."""
    reader_check: int = 256
    """Masked sentences on which the reader is tested against a passage that holds the span before training starts; 0: no test."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5))
    """Optimiser."""


@dataclass(frozen=True)
class RefreshConfig:
    """Asynchronous refresh of the index, and how the trainer takes to it."""

    every_steps: int = 500
    """Steps between exports of the retriever; 0: it is exported by drift alone."""
    max_drift: float | None = None
    """Export, too, when the embeddings of the probe passages have moved by so much since the last export (mean of 1 − cosine)."""
    drift_every_steps: int = 50
    """Steps between looks at the drift, where `max_drift` is set."""
    probe_passages: int = 256
    """Passages, the same throughout a run, on which drift is measured, by the trainer and for each index version."""
    staleness_multiplier: int = 1
    """Every so many times `every_steps` alone counts: for experiments with stale indexes (Guu et al. 2020, section 4.4)."""
    factory: str = "Flat"
    """FAISS index factory string."""
    search_parameters: str = ""
    """How the index is searched, in FAISS's words: `nprobe=32` (inverted lists), `efSearch=128` (HNSW), `k_factor_rf=4` (refinement), several
    with commas; part of each index version."""
    search_on: Literal["cpu", "gpu"] = "cpu"
    """Where trainer and evaluation search: on a GPU by FAISS's GPU build, or without it, a flat index exactly through torch."""
    shard_rows: int = 50_000
    """Passages per encoding shard, the unit of work a killed refresher repeats."""
    token_budget: int = 4096
    """Padded wordpieces per encoding batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of encoding; embeddings are stored as fp32."""
    compile: bool = False
    """Compile the encoder for each version (torch.compile, which on a CPU needs a C++ compiler): half a minute that pays from some 10,000
    passages on."""
    threads: int = 1
    """CPU threads of the refresher."""
    poll_s: float = 0.5
    """Seconds between looks at the file system, refresher and trainer alike."""
    keep_last: int = 3
    """Index versions kept."""
    grace_s: float = 60.0
    """Seconds an index outlives its replacement."""
    lease_expiry_s: float = 30.0
    """Seconds without a heartbeat after which another refresher takes over."""
    max_stale_steps: int | None = None
    """Steps the index may lag behind the trainer; none: unbounded."""
    stale_policy: Literal["warn", "wait", "stop"] = "warn"
    """What happens beyond `max_stale_steps`."""
    wait_timeout_s: float = 120.0
    """Longest wait for an index, at the start and under the policy `wait`; then training stops with a message."""

    @property
    def period(self) -> int:
        """Steps between exports; 0 where drift alone decides."""
        return self.every_steps * self.staleness_multiplier


@dataclass(frozen=True)
class FinetuneRetrieverConfig:
    """Finetuning of both towers on questions with hard negatives (Karpukhin et al. 2020, section 3); the passages are encoded again after it."""

    steps: int = 0
    """Updates; 0: the retriever comes to finetuning as pretraining left it."""
    batch_size: int = 48
    """Questions per update and process; the passages of the others are each one's negatives."""
    retrieve: int = 50
    """Passages retrieved per question, to draw hard negatives from and to look for one with an answer where none is known."""
    negatives: int = 1
    """Hard negatives per question."""
    positives: Literal["answer", "document"] = "answer"
    """Passages that are no negatives: all that hold an answer, or only those of the question's own document."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))
    """Optimiser."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Finetuning on questions (Lee et al. 2019, section 5; Guu et al. 2020, section 4.3).

    The query tower and the reader are trained; passage embeddings stay as the index holds them (shared towers are untied first).
    """

    steps: int = 2000
    """Updates."""
    batch_size: int = 16
    """Questions per update and process."""
    retrieve: int = 50
    """Passages in the retriever's softmax."""
    read: int = 5
    """Passages read."""
    substitution: float = 0.0
    """Share of questions whose answer is replaced, in every passage read, by another span of its type."""
    positives: Literal["answer", "document"] = "answer"
    """Passages the retriever should prefer: all that hold an answer, or those of the question's own document where that is known."""
    read_gold: bool = True
    """Put the question's own passage among those read when it was not found, and with `positives: document` among those retrieved too
    (training only)."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """Optimiser."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Questions answered and counted."""

    read: int = 5
    """Passages read per question."""
    batch_size: int = 64
    """Questions per forward pass."""
    retrieve: int = 20
    """Passages retrieved per question: the deepest recall reported."""
    token_budget: int = 8192
    """Padded wordpieces the reader takes at a time."""
    normalize_nfd: bool = True
    """Unicode NFD before the SQuAD normaliser; off for parity with the official script."""


@dataclass(frozen=True)
class QuestionSource:
    """Questions with answers; in YAML the path alone may stand for it."""

    SHORTHAND: ClassVar[str] = "path"

    path: str
    """File, `builtin:NAME` for a file of the built-in corpus, or (format `datasets`) a saved data set or a name on the Hugging Face hub."""
    format: str = "auto"
    """`squad` (1.1, 2.0), `jsonl` (NQ-open), `qas` (DPR), `webq`, `trec` (CuratedTREC), `timeqa` or `datasets`; `auto`: by name and content."""
    articles: tuple[str, ...] = ()
    """Of SQuAD, only the questions of these articles; none: of all."""
    exclude_articles: tuple[str, ...] = ()
    """Of SQuAD, not the questions of these articles."""
    fields: dict[str, str] = field(default_factory=dict)
    """Where `id`, `question`, `answers`, `context` and `passage` stand in `jsonl` and `datasets`, if not under these names."""
    name: str | None = None
    """Configuration of a data set on the hub."""
    split: str = "train"
    """Split of a data set on the hub or in a folder of splits."""
    limit: int | None = None
    """Take no more than this many questions."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and say how many, instead of refusing the file."""


@dataclass(frozen=True)
class DataConfig:
    """Questions (a path, or a mapping with path and format) and annotated statements; `builtin:NAME` is a file of the built-in corpus."""

    train: QuestionSource | None = None
    """Questions to finetune on."""
    validation: QuestionSource | None = None
    """Questions to choose recipes by."""
    test: QuestionSource | None = None
    """Questions to report."""
    probe: str | None = None
    """Statements with a known answer and passage, to measure masked spans on; none: drawn from the statements."""
    closed_book: str | None = None
    """The test questions' facts as statements with a known answer, for the cloze closed book."""
    orphans: str | None = None
    """Statements whose fact stands in no passage, to see the null passage take mass."""


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
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Machine and DeepSpeed."""
    ict: IctConfig = field(default_factory=IctConfig)
    """Inverse cloze stage."""
    reader_warmup: ReaderWarmupConfig = field(default_factory=ReaderWarmupConfig)
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
            raise UserError(f"reader.max_tokens ({joint}) leaves no room for a passage beside retriever.max_query_tokens ({query}); raise it.")
        context, block = self.reader.context_tokens, self.corpus.block_tokens
        if context and not block <= context <= joint - query:
            raise UserError(
                f"reader.context_tokens ({context}) must be 0 or lie between corpus.block_tokens ({block}) and reader.max_tokens less "
                f"retriever.max_query_tokens ({joint - query}); change it, or raise reader.max_tokens."
            )
        for name, threads in (("pretrain", self.pretrain.threads), ("engine", self.engine.threads)):
            if threads < 0:
                raise UserError(f"{name}.threads must be 0 (torch's choice) or more, got {threads}.")
        if self.refresh.threads < 1:
            raise UserError(f"refresh.threads must be at least 1, got {self.refresh.threads}.")
        if self.pretrain.candidates < 2:
            raise UserError(f"pretrain.candidates must be at least 2, the null passage and one other, got {self.pretrain.candidates}.")
        if self.refresh.every_steps == 0 and self.refresh.max_drift is None:
            raise UserError("refresh.every_steps is 0 and refresh.max_drift is not set, so that nothing would be exported; set one of them.")
        if self.refresh.staleness_multiplier < 1:
            raise UserError(f"refresh.staleness_multiplier must be at least 1, got {self.refresh.staleness_multiplier}.")
