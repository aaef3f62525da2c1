"""The configuration tree: one YAML per kind of run, dotted overrides, every mistake named by its field.

A YAML may start with `extends: other.yaml` (relative to itself); its own keys are merged over that file's. Modules own the config classes of
what they build; this file adds those of the stages and composes the whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import draccus
import yaml
from draccus.utils import DraccusException

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
    """bf16 is autocast over fp32 parameters; on small widths (128) fp32 is the faster one."""
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
    """Steps between exports of the retriever."""
    factory: str = "Flat"
    """FAISS index factory string."""
    shard_rows: int = 50_000
    """Passages per encoding shard, the unit of work a killed refresher repeats."""
    token_budget: int = 4096
    """Padded wordpieces per encoding batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of encoding; embeddings are stored as fp32."""
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
    read_gold: bool = True
    """Put the question's own passage among those read when it was not retrieved (training only)."""
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
    normalize_nfd: bool = True
    """Unicode NFD before the SQuAD normaliser; off for parity with the official script."""


@dataclass(frozen=True)
class DataConfig:
    """Questions and annotated statements; `builtin:NAME` is a file of the built-in corpus."""

    train: str | None = None
    """Questions to finetune on (SQuAD JSON)."""
    validation: str | None = None
    """Questions to choose recipes by."""
    test: str | None = None
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
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Finetuning stage."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""
    data: DataConfig = field(default_factory=DataConfig)
    """Questions and annotated statements."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RealmConfig:
    """Read a YAML file with `--section.field value` overrides.

    Raises UserError naming the file and the field for anything missing, unknown or of the wrong kind.
    """
    tree = _merge(_read_yaml(path), parse_overrides(overrides))
    if complaints := list(_misplaced(RealmConfig, tree)):
        raise UserError(f"{path}: {'; '.join(complaints)}.")
    try:
        return draccus.decode(RealmConfig, tree)
    except (DraccusException, ValueError) as error:
        # A config class that refuses a value says why; draccus only says that it did.
        if isinstance(error.__cause__, UserError):
            raise UserError(f"{path}: {error.__cause__}") from error
        raise UserError(f"{path}: {str(error).strip().rstrip('.')}; see the config classes for the fields there are.") from error


def dump_config(config: RealmConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(draccus.encode(config), sort_keys=False)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--pretrain.steps", "5"]` to `{"pretrain": {"steps": 5}}`; `--field=value` works too."""
    tree: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        name = remaining.pop(0)
        if not name.startswith("--") or len(name) < 3:
            raise UserError(f"unexpected argument {name!r}; overrides are written --section.field value.")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{name} needs a value.")
            text = remaining.pop(0)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--{name}: {text!r} is no YAML value.") from error
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return tree


def _misplaced(kind: Any, value: Any, name: str = "") -> Iterator[str]:
    """What draccus accepts or reports without the field's name: empty values, sections that are no mapping, unknown variants."""
    if value is None:
        if kind is not Any and NoneType not in get_args(kind):
            yield f"`{name}` is empty; give it a value or leave it out"
        return
    section = is_dataclass(kind) or get_origin(kind) is dict
    if section != isinstance(value, dict) and kind is not Any:
        yield f"`{name}` must be {'a mapping of fields' if section else 'a value'}, got {value!r}"
        return
    if section and hasattr(kind, "get_known_choices"):
        choice, known = value.get("type", kind.default_choice_name()), kind.get_known_choices()
        if choice not in known:
            yield f"`{name}.type` {choice!r} is unknown; choose one of {', '.join(known)}"
            return
        kind = known[choice]
    fields = get_type_hints(kind) if is_dataclass(kind) else {}
    for key in value if fields else ():
        if key in fields:
            yield from _misplaced(fields[key], value[key], f"{name}.{key}".lstrip("."))


def _read_yaml(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"config file {path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is no valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} must hold a mapping of sections, got {type(tree).__name__}.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"config file {path}: `extends` must name a file, got {base!r}.")
    if path.resolve() in extending:
        raise UserError(f"config file {path} extends itself, by way of {extending[-1]}.")
    return _merge(_read_yaml(path.parent / base, (*extending, path.resolve())), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        # A section that names another `type` replaces the base's: the fields of one variant are not those of another.
        same_kind = isinstance(value, dict) and isinstance(merged.get(key), dict) and value.get("type", None) in (None, merged[key].get("type"))
        merged[key] = _merge(merged[key], value) if same_kind else value
    return merged
