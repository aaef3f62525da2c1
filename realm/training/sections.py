"""Config sections of the training stages and the evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from realm.models.precision import Precision
from realm.runtime.section import MAX_INT, MAX_PROCESSES, Section
from realm.training.deepspeed_settings import deepspeed_problems


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with a linear schedule, warmup and gradient clipping."""

    lr: float = 3e-5
    """Peak learning rate (of the reader, if a stage trains reader and retriever)."""
    retriever_lr: float | None = None
    """Peak learning rate of the retriever; default: `lr`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay; not applied to biases and layer norms."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to its peak."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warmup: linear decay to `final_lr_ratio` at the last step, or constant."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end of a linear schedule, as a fraction of the peak."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(0, "lr", "retriever_lr", "weight_decay", "max_grad_norm", "warmup_steps")
        yield from self.probabilities("final_lr_ratio")
        yield from self.below_one("betas")


@dataclass(frozen=True)
class EngineConfig(Section):
    """How training uses the machine."""

    precision: Precision = "fp32"
    """bf16 is autocast over fp32 parameters. It is faster on GPUs, and on CPUs with AMX from hidden
    sizes of a few hundred; other CPUs emulate it, many times slower."""
    threads: int = 0
    """CPU threads of the trainer; 0: torch's default."""
    log_every_s: float = 10.0
    """Seconds between progress lines if the output is not a terminal."""
    keep_checkpoints: int = 2
    """Number of most recent checkpoints to keep per stage."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed settings, merged over those made from this config."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(0, "threads", "log_every_s")
        yield from self.at_most(MAX_PROCESSES, "threads")
        yield from self.at_most(MAX_INT, "log_every_s")
        yield from self.at_least(1, "keep_checkpoints")
        yield from deepspeed_problems(self.deepspeed)


MAX_BATCH = 65_536
"""Largest batch per process; one of millions would fill the memory before the first step."""


@dataclass(frozen=True)
class StageConfig(Section):
    """Settings that every training stage has."""

    steps: int = 1000
    """Optimizer updates."""
    batch_size: int = 16
    """Examples per update and process."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(0, "steps")
        yield from self.at_least(1, "batch_size", "checkpoint_every")
        yield from self.at_most(MAX_BATCH, "batch_size")


@dataclass(frozen=True)
class IctNegativesConfig(Section):
    """Hard negatives per query of inverse cloze: passages that do not contain the span that a
    question asks for, or the sentence. The negatives of a query are also those of the others."""

    lexical: int = 0
    """Passages that BM25 finds for the query."""
    document: int = 0
    """Other blocks of the same document (Ram et al. 2022, section 3)."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(0, "lexical", "document")


@dataclass(frozen=True)
class IctConfig(StageConfig):
    """Inverse cloze task: the warm start of the retriever (Lee et al. 2019, section 4)."""

    steps: int = 100_000
    """Optimizer updates; 0: skip the stage."""
    batch_size: int = 4096
    """Query-block pairs per update and process; the negatives of a query are the blocks of the
    other pairs."""
    chunk_size: int | None = None
    """Most texts whose activations are kept at once: the others are embedded again in the backward
    pass, so that memory does not limit the batch. The gradients are the same; a step takes about a
    third longer. Default: all."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    """Optimizer."""
    question_prob: float = 0.0
    """Probability that a query is a question made from a sentence (`pseudo_questions`)."""
    title_prob: float = 0.0
    """Probability that a query is the title of the block's document. Other queries are
    sentences."""
    keep_sentence_prob: float = 0.1
    """Probability that the sentence, or the title, stays in the block."""
    mask_span_prob: float = 0.0
    """Probability that one salient span of the sentence is masked, as in pretraining's queries."""
    null_prob: float = 0.0
    """Probability that the sentence's block is withheld, so that the null passage is the correct
    choice. After this stage, the score of the null passage is between those of matching and of
    other passages. 0: the null passage is not a candidate."""
    negatives: IctNegativesConfig = field(default_factory=IctNegativesConfig)
    """Hard negatives in addition to the blocks of the other pairs."""
    average: float = 0.0
    """At the end, weights become this share of the retriever's that the stage started from plus the
    rest of the trained ones (Wortsman et al. 2022): less forgotten, less learned. 0: the trained
    weights."""
    keep: Literal["better", "always"] = "better"
    """Which retriever is published. better: the trained one only if it finds the held-out
    questions' passages better than the one that the stage started from, otherwise that one; with
    too few held-out questions the trained one. always: the trained one."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.at_least(1, "chunk_size")
        yield from self.probabilities("question_prob", "title_prob", "keep_sentence_prob", "mask_span_prob")
        yield from self.probabilities("null_prob", "average")
        if self.question_prob + self.title_prob > 1:
            yield f"question_prob + title_prob must be at most 1, got {self.question_prob + self.title_prob:g}"


@dataclass(frozen=True)
class ReaderPretrainingConfig(StageConfig):
    """Reader pretraining: predict salient spans from retrieved passages that contain them.

    The reader must be able to read before the retriever can learn from it.
    """

    steps: int = 1000
    """Optimizer updates; 0: skip the stage."""
    batch_size: int = 32
    """Sentence-passage pairs per update and process."""
    retrieve: int = 20
    """Passages retrieved per sentence; the first one that contains the span is read."""
    substitution_prob: float = 0.8
    """Probability of entity substitution: the span is replaced, in target and passage, by another
    span of its type, so that it must be copied and cannot be remembered."""
    title_span_prob: float = 1.0
    """Probability of keeping an example whose span appears in the passage's title, because such a
    span can be predicted with little reading."""
    null_prob: float = 0.0
    """Probability of reading the null passage instead, so that predictions from the null passage
    are not worse than predictions from a wrong passage."""
    span_loss: float = 1.0
    """Weight of the span head's loss (find the same span in the passage, or that it is absent)
    relative to the masked-language head's; 0: the span head is not trained in this stage."""
    question_prob: float = 0.0
    """Share of examples whose query is a question made from the sentence (`pseudo_questions`)
    instead of the masked sentence."""
    sentence_steps: int = 0
    """Number of steps at the start in which only the sentence that contains the span is read:
    copying is learned faster from short texts."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.at_least(1, "retrieve")
        yield from self.at_least(0, "sentence_steps", "span_loss")
        yield from self.probabilities("substitution_prob", "title_span_prob", "null_prob", "question_prob")


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """REALM pretraining (Guu et al. 2020, section 3)."""

    steps: int = 200_000
    """Optimizer updates; 0: skip the stage."""
    threads: int = 0
    """CPU threads of the trainer in this stage; 0: `engine.threads`, or else the cores that
    `refresh.threads` leaves. If the refresher runs on another machine, set it to all cores."""
    batch_size: int = 16
    """Masked sentences per update and process."""
    candidates: int = 8
    """Passages read per sentence, including the null passage in slot 0."""
    extra_retrieved: int = 8
    """Passages retrieved in addition to `candidates`, to replace trivial ones."""
    max_span_tokens: int = 10
    """Longest salient span that is masked, in wordpieces."""
    head: Literal["mlm", "span", "both"] = "mlm"
    """The reader's head whose p(y|z,x) is marginalized: `mlm` predicts the masked wordpieces,
    `span` finds the span in the passage, as in question answering, or says that it is absent;
    `both`: the sum of the two losses."""
    marginal: Literal["joint", "per_token"] = "joint"
    """Marginal likelihood of the masked-language head: of the whole span, or of each wordpiece
    separately."""
    substitution_prob: float = 0.0
    """Probability of entity substitution, as in reader pretraining; applied to all candidates."""
    question_prob: float = 0.0
    """Share of examples whose query is a question made from the sentence (`pseudo_questions`)
    instead of the masked sentence."""
    reader_buckets: int = 4
    """Groups of similar length into which joint inputs are padded. Constant, so that all ranks
    issue the same collectives."""
    reader_check: int = 256
    """Masked sentences on which the reader is tested before training, with a passage that contains
    the span; 0: no test."""
    keep: Literal["better", "always"] = "better"
    """Which retriever is published, as in inverse cloze; the reader is always the trained one."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5))
    """Optimizer."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.at_least(0, "threads", "extra_retrieved", "reader_check")
        yield from self.at_most(MAX_PROCESSES, "threads")
        yield from self.at_least(1, "max_span_tokens", "reader_buckets")
        yield from self.probabilities("substitution_prob", "question_prob")
        if self.question_prob and self.head == "mlm":
            yield "question_prob must be 0 with head mlm, because questions have no masks; set head to span or both"
        if self.candidates < 2:
            yield f"candidates must be at least 2 (the null passage and one other), got {self.candidates}"


@dataclass(frozen=True)
class FinetuneRetrieverConfig(StageConfig):
    """Finetuning of both towers of the retriever on questions with hard negatives.

    Karpukhin et al. 2020, section 3. All passages are encoded again afterwards.
    """

    steps: int = 0
    """Optimizer updates; 0: skip the stage."""
    batch_size: int = 48
    """Questions per update and process; the negatives of a question are the passages of the other
    questions."""
    chunk_size: int | None = None
    """Most texts whose activations are kept at once, as in inverse cloze; default: all."""
    retrieve: int = 50
    """Passages retrieved per question. Hard negatives are drawn from them, and a question without a
    known passage is paired with the best one that contains an answer."""
    negatives: int = 1
    """Hard negatives per question."""
    positives: Literal["answer", "document"] = "answer"
    """Passages that are not negatives: all that contain an answer, or only those of the question's
    own document."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))
    """Optimizer."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.at_least(1, "retrieve", "chunk_size")
        yield from self.at_least(0, "negatives")


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """Finetuning of the reader and the query tower on questions.

    Lee et al. 2019, section 5; Guu et al. 2020, section 4.3. Passage embeddings are frozen; shared
    towers are untied.
    """

    steps: int = 2000
    """Optimizer updates; 0: skip the stage."""
    batch_size: int = 16
    """Questions per update and process."""
    retrieve: int = 50
    """Passages in the retriever's softmax."""
    read: int = 5
    """Passages read per question."""
    substitution_prob: float = 0.0
    """Probability that a question's answer is replaced, in every passage read, by another span of
    its type."""
    positives: Literal["answer", "document"] = "answer"
    """Passages that the retriever should prefer: all that contain an answer, or those of the
    question's own document if it is known."""
    read_gold: bool = True
    """In training, add the question's own passage to those read if it was not retrieved; with
    `positives: document` also add it to those retrieved."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """Optimizer."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.at_least(1, "retrieve", "read")
        yield from self.probabilities("substitution_prob")


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """Question answering and its metrics."""

    read: int = 5
    """Passages read per question."""
    batch_size: int = 64
    """Questions per retrieval batch."""
    retrieve: int = 20
    """Passages retrieved per question, the maximum depth of the reported recall."""
    token_budget: int = 8192
    """Padded wordpieces per reader batch."""
    normalize_nfd: bool = True
    """Apply Unicode NFD before SQuAD's normalization; false: as in the official script."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(1, "read", "batch_size", "retrieve", "token_budget")
