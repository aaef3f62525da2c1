"""What each stage does: the sections of the configuration that belong to training, refreshing,
finetuning and evaluating."""

from dataclasses import dataclass, field
from typing import Any, Literal

from realm.models.precision import Precision


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
    max_grad_norm: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    warmup_steps: int = 100
    """Steps over which the rate rises from 0."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: falling linearly to `final_lr_ratio` at the last step, or constant."""
    final_lr_ratio: float = 0.0
    """Share of the peak rate towards which a linear schedule falls."""


@dataclass(frozen=True)
class EngineConfig:
    """How training runs on the machine."""

    precision: Precision = "fp32"
    """bf16 is autocast over fp32 parameters. It pays on GPUs and on CPUs with AMX from widths of
    some hundreds; others emulate it, very slowly."""
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
    keep_sentence_prob: float = 0.1
    """Share of examples whose sentence stays in its block."""
    mask_span_prob: float = 0.0
    """Share of examples in which one salient span of the sentence is masked, so that queries
    look as in pretraining."""
    null_prob: float = 0.0
    """Share of sentences whose block is withheld and whose right choice is the null passage, so
    that its score starts out between those of passages that match and those that do not; 0: the
    null passage takes no part."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    """Optimiser."""


@dataclass(frozen=True)
class ReaderPretrainingConfig:
    """Salient spans predicted from retrieved passages that hold them: the reader learns to read
    before it teaches the retriever."""

    steps: int = 1000
    """Updates."""
    batch_size: int = 32
    """Statement-passage pairs per update and process."""
    retrieve: int = 20
    """Passages retrieved per statement, of which those that hold the span are read."""
    substitution_prob: float = 0.8
    """Share of examples whose span is replaced, in target and passage alike, by another span of
    its type: copying instead of remembering."""
    title_span_prob: float = 1.0
    """Share kept of the examples whose span stands in the passage's title: naming the topic
    takes little reading."""
    null_prob: float = 0.0
    """Share of examples read with the null passage: what may be expected of a span unread, so
    that no passage beats a wrong one."""
    span_loss: float = 1.0
    """Weight of the span head's loss (the same span, found in the passage) beside the
    masked-language head's; 0 leaves that head to finetuning."""
    sentence_steps: int = 0
    """First steps that read only the sentence that holds the span: copying is found sooner in a
    short text."""
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
    """CPU threads of the trainer in this stage, beside a refresher on the same cores; 0: those
    of `engine.threads`."""
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
    substitution_prob: float = 0.0
    """Share of examples with entity substitution, as in the reader's warm-up, applied to every
    candidate alike."""
    reader_buckets: int = 4
    """Groups of similar length into which the joint inputs are padded; fixed, so that ranks
    issue the same collectives."""
    reader_check: int = 256
    """Masked sentences on which the reader is tested against a passage that holds the span
    before training starts; 0: no test."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5))
    """Optimiser."""


@dataclass(frozen=True)
class RefreshConfig:
    """Asynchronous refresh of the index, and how the trainer takes to it."""

    export_every: int = 500
    """Steps between exports of the retriever; 0: it is exported by drift alone."""
    max_drift: float | None = None
    """Export, too, when the embeddings of the probe passages have moved by so much since the
    last export (mean of 1 − cosine)."""
    drift_every: int = 50
    """Steps between looks at the drift, where `max_drift` is set."""
    drift_passages: int = 256
    """Passages, the same throughout a run, on which drift is measured, by the trainer and for
    each index version."""
    staleness_multiplier: int = 1
    """Every so many times `export_every` alone counts: for experiments with stale indexes (Guu
    et al. 2020, section 4.4)."""
    factory: str = "Flat"
    """FAISS index factory string."""
    search_parameters: str = ""
    """How the index is searched, in FAISS's words: `nprobe=32` (inverted lists), `efSearch=128`
    (HNSW), `k_factor_rf=4` (refinement), several with commas; part of each index version."""
    search_on: Literal["cpu", "gpu"] = "cpu"
    """Where trainer and evaluation search: on a GPU by FAISS's GPU build, or without it, a flat
    index exactly through torch."""
    shard_rows: int = 50_000
    """Passages per encoding shard, the unit of work a killed refresher repeats."""
    token_budget: int = 4096
    """Padded wordpieces per encoding batch."""
    precision: Precision = "fp32"
    """Arithmetic of encoding; embeddings are stored as fp32."""
    compile: bool = False
    """Compile the encoder for each version (torch.compile, which on a CPU needs a C++ compiler):
    half a minute that pays from some 10,000 passages on."""
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
    """Longest wait for an index, at the start and under the policy `wait`; then training stops
    with a message."""

    @property
    def period(self) -> int:
        """Steps between exports; 0 where drift alone decides."""
        return self.export_every * self.staleness_multiplier


@dataclass(frozen=True)
class FinetuneRetrieverConfig:
    """Finetuning of both towers on questions with hard negatives (Karpukhin et al. 2020, section
    3); the passages are encoded again after it."""

    steps: int = 0
    """Updates; 0: the retriever comes to finetuning as pretraining left it."""
    batch_size: int = 48
    """Questions per update and process; the passages of the others are each one's negatives."""
    retrieve: int = 50
    """Passages retrieved per question, to draw hard negatives from and to look for one with an
    answer where none is known."""
    negatives: int = 1
    """Hard negatives per question."""
    positives: Literal["answer", "document"] = "answer"
    """Passages that are no negatives: all that hold an answer, or only those of the question's
    own document."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))
    """Optimiser."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Finetuning on questions (Lee et al. 2019, section 5; Guu et al. 2020, section 4.3).

    The query tower and the reader are trained; passage embeddings stay as the index holds them
    (shared towers are untie_towers first).
    """

    steps: int = 2000
    """Updates."""
    batch_size: int = 16
    """Questions per update and process."""
    retrieve: int = 50
    """Passages in the retriever's softmax."""
    read: int = 5
    """Passages read."""
    substitution_prob: float = 0.0
    """Share of questions whose answer is replaced, in every passage read, by another span of its
    type."""
    positives: Literal["answer", "document"] = "answer"
    """Passages the retriever should prefer: all that hold an answer, or those of the question's
    own document where that is known."""
    read_gold: bool = True
    """Put the question's own passage among those read when it was not found, and with
    `positives: document` among those retrieved too (training only)."""
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
    """Questions retrieved for at a time."""
    retrieve: int = 20
    """Passages retrieved per question: the deepest recall reported."""
    token_budget: int = 8192
    """Padded wordpieces the reader takes at a time."""
    normalize_nfd: bool = True
    """Unicode NFD before the SQuAD normaliser; off for parity with the official script."""
