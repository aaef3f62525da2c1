"""The run folder: one resolved config for all programs, and checkpoints and models by stage.

runs/NAME/
  config.yaml                     resolved; written once
  initial/retriever               the retriever before any training
  STAGE/checkpoints/step-000500/  to resume the stage
  STAGE/model/retriever, reader   its models, written last: a stage with `model` is finished
  encoders/ indexes/ refresher/ lineage.json   see `realm.runtime.versions` and `index`
  frozen/                         indexes of frozen retrievers
  locks/                          of processes that write, see `realm.runtime.lock`
  metrics.jsonl tensorboard/ evaluations/ summary.json curves.png
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from realm.corpus.collate import Collator, InputLimits
from realm.corpus.context import Contexts
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.run.changes import changed_fields, existing_config, is_used, update_config
from realm.run.config import RealmConfig
from realm.run.config_file import dump_config, load_config
from realm.run.data_config import QuestionSource
from realm.run.yaml_text import parse_yaml
from realm.runtime.distributed import on_rank_zero
from realm.runtime.lock import locked
from realm.runtime.publish import check_folder, write_text_atomic
from realm.runtime.telemetry import console, log_line
from realm.text.inputs import Wordpieces
from realm.text.terms import Terms
from realm.text.tokenizer import load_tokenizer, tokenizer_fingerprint
from realm.training.checkpoints import newest_checkpoint, read_state, set_damaged_aside

BUILTIN = "builtin:"
"""Prefix of paths inside the built-in corpus."""


class StageInfo(NamedTuple):
    """Properties of a training stage that are known without opening it."""

    title: str
    models: tuple[str, ...]
    """Models in the `model` folder of the finished stage: `retriever`, `reader`."""


STAGES = {
    "ict": StageInfo("inverse cloze", ("retriever",)),
    "reader_pretraining": StageInfo("reader pretraining", ("reader",)),
    "pretrain": StageInfo("REALM", ("retriever", "reader")),
    "finetune_retriever": StageInfo("finetune the retriever", ("retriever",)),
    "finetune": StageInfo("finetune", ("retriever", "reader")),
}
"""Training stages in their order."""


@dataclass(frozen=True)
class Run:
    """A run folder and its config."""

    folder: Path
    config: RealmConfig

    @classmethod
    def create(cls, config: RealmConfig) -> "Run":
        """Create the folder with its config, or open it if it exists with the same config.

        Settings that nothing in the run has used yet may differ (`realm.run.changes`); they are
        updated. Raises UserError if other settings differ, or if the corpus was prepared with
        different settings.
        """
        folder = Path(config.run)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run folder {folder} is a file; choose another folder with --run.")
        path, text = folder / "config.yaml", dump_config(config)
        if path.exists():
            update_config(path, text)
            return cls(folder, config)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"run folder {folder} is not empty and has no config.yaml; choose another folder, or empty this one."
            )
        run = cls(folder, config)
        run.passages, run.statements  # noqa: B018  (an unsuitable corpus is refused before anything is written)
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
        return run

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = ()) -> "Run":
        """Open an existing run; `overrides` are not saved.

        Raises UserError if `folder` is not a run folder.
        """
        path = folder / "config.yaml"
        if not path.exists():
            raise UserError(
                f"{folder} is not a run folder (it has no config.yaml); start a run with `realm ict --config …`, "
                "or check the path."
            )
        existing_config(path)
        return cls(folder, load_config(path, overrides))

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.folder / name

    def model(self, name: str) -> Path:
        """Folder of a stage's models."""
        return self.folder / name / "model"

    def finished(self, name: str) -> bool:
        """Whether a stage is finished."""
        return self.model(name).exists()

    def seconds(self, name: str) -> float:
        """Seconds of training of a finished stage. Raises UserError if they cannot be read."""
        path = self.model(name) / "seconds.txt"
        try:
            return float(path.read_text())
        except (OSError, ValueError):
            raise UserError(
                f"{path} does not contain the seconds of training; restore it from a copy, or write 0 into it."
            ) from None

    def last_finished(self) -> str:
        """Name of the last finished stage; prints a note if a later stage was started.

        Raises UserError if no stage is finished.
        """
        for name in reversed(STAGES):
            if self.finished(name):
                return name
            if self.stage(name).exists():
                log_line(f"stage {name} is not finished (no {self.model(name)}); an earlier stage is used")
        raise UserError(f"run {self.folder} has no finished stage yet; train one first, for example with `realm ict`.")

    def begin(self, stage: str, resume: bool) -> bool:
        """Whether a stage still has to be trained.

        With `resume`, damaged checkpoints are set aside if there is an older whole one, and the
        console says so. Raises UserError if the stage was already started, unless `resume`, and if
        all its checkpoints are damaged.
        """
        if self.finished(stage):
            console.print(f"  {stage}: already finished, in {self.model(stage)}")
            return False
        if not resume and (self.stage(stage) / "checkpoints").exists():
            raise UserError(
                f"stage {stage} of run folder {self.folder} was already started; rerun with --resume to continue, "
                "or choose another folder with --run."
            )
        if resume:
            for line in on_rank_zero(lambda: set_damaged_aside(self.stage(stage))):
                log_line(line)
            checkpoint = newest_checkpoint(self.stage(stage))
            if checkpoint is None and self.stage(stage).exists():
                log_line(f"{stage} has no checkpoint in {self.stage(stage)}; training starts from step 0")
            if checkpoint is not None:
                self._check_start(stage, checkpoint)
        return True

    def starting_models(self, stage: str) -> dict[str, str | None]:
        """The retriever and the reader that a stage starts from, relative to the run folder; None
        for those before any training."""
        found = {part: self.latest(part, before=stage) for part in ("retriever", "reader")}
        return {
            part: None if path is None else path.relative_to(self.folder).as_posix() for part, path in found.items()
        }

    def starting_retriever(self, stage: str) -> Path:
        """Folder of the retriever that a stage starts from; before any training it may not be built
        yet (`realm.run.initial`)."""
        return self.latest("retriever", before=stage) or self.folder / "initial" / "retriever"

    def settings(self, stage: str) -> dict[str, Any]:
        """The settings that a stage must be resumed with, as they are in a config file."""
        tree = parse_yaml(dump_config(self.config))
        settings = {"seed": tree["seed"], stage: tree[stage], "held_out": {"share": self.config.held_out.share}}
        if tree[stage].get("question_prob"):
            settings["pseudo_questions"] = tree["pseudo_questions"]
        if stage.startswith("finetune"):
            settings["data"] = {"train": tree["data"].get("train")}
        if stage != "ict" and self.config.fusion.lexical:
            settings["fusion"] = tree["fusion"]
        return settings

    def _check_start(self, stage: str, checkpoint: Path) -> None:
        """Raise UserError if a stage was started from other models or with other settings than it
        would be now."""
        state = read_state(checkpoint)
        differing = changed_fields(state.get("settings", {}), self.settings(stage))
        changed = [field for field in differing if is_used(field, self.folder)]
        if "settings" in state and changed:
            raise UserError(
                f"stage {stage} was started with other values of {', '.join(changed)}; resume it with the same "
                f"values, or remove {self.stage(stage)} to train the stage again."
            )
        before, now = state.get("started_from", {}), self.starting_models(stage)
        for part, path in before.items():
            if path != now[part]:
                raise UserError(
                    f"stage {stage} was started with the {part} {path or 'before any training'}, and would continue "
                    f"with {now[part] or 'the one before any training'}; restore the former in {self.folder}, or "
                    f"remove {self.stage(stage)} to train the stage again."
                )

    def train_lock(self) -> AbstractContextManager[None]:
        """Lock the run for training: stages start from each other's models, so only one is trained
        at a time. Raises UserError if another process holds the lock."""
        return locked(self.folder / "locks" / "training", f"training run {self.folder}")

    def evaluation_lock(self, name: str) -> AbstractContextManager[None]:
        """Lock the evaluation `name`. Raises UserError if another process holds the lock."""
        return locked(self.folder / "locks" / f"evaluation-{name}", f"writing evaluation {name} of run {self.folder}")

    def latest(self, part: str, before: str | None = None, until: str | None = None) -> Path | None:
        """The `retriever` or `reader` of the last finished stage that has one.

        `before`, `until`: only stages before this one, or up to and including it. Raises UserError
        if that stage's model is missing, instead of returning an earlier one.
        """
        names = list(STAGES)
        end = names.index(before) if before else names.index(until) + 1 if until else len(names)
        for name in reversed(names[:end]):
            if self.finished(name) and part in STAGES[name].models:
                folder = self.model(name) / part
                if not folder.exists():
                    raise UserError(
                        f"{folder} is missing, although stage {name} is finished; restore it from a copy of the run, "
                        f"or remove {self.stage(name)} to train the stage again."
                    )
                return folder
        return None

    @property
    def prepared(self) -> Path:
        """Folder of the prepared corpus."""
        return Path(self.config.corpus.prepared)

    @cached_property
    def passages(self) -> PreparedCorpus:
        """The passages to retrieve from."""
        return self._open_corpus("passages", self.config.corpus.passages)

    @cached_property
    def contexts(self) -> Contexts:
        """The texts that the reader reads for the passages."""
        return Contexts(self.passages, self.config.corpus.context_tokens)

    @cached_property
    def statements(self) -> PreparedCorpus:
        """The corpus of sentences to mask: the statements, or the passages if there are none."""
        sources = self.config.corpus.statements
        return self.passages if sources is None else self._open_corpus("statements", sources)

    def _open_corpus(self, kind: str, sources: Sequence[SourceConfig]) -> PreparedCorpus:
        """Open a prepared corpus.

        Raises UserError if it was prepared with different settings, as far as this can be checked
        without reading the sources.
        """
        self._check_prepared(kind)
        corpus = PreparedCorpus.open(self.prepared / kind, self.config.held_out.share)
        config = self.config.corpus
        inputs = corpus.manifest["inputs"]
        limits = [source.limit for source in config.limited(sources)]
        for name, before, now in (
            ("corpus.block_tokens", inputs["block_tokens"], config.block_tokens),
            (f"the number of sources in corpus.{kind}", len(inputs["sources"]), len(sources)),
            ("the limit of documents per source", [source["limit"] for source in inputs["sources"]], limits),
        ):
            if before != now:
                raise UserError(
                    f"{corpus.path} was prepared with different settings: {name} was {before} and is now {now}; "
                    "restore it, or prepare into another folder with --corpus.prepared."
                )
        return corpus

    def _check_prepared(self, part: str) -> None:
        """Raise UserError if this part of the prepared corpus does not exist."""
        if not (self.prepared / part).exists():
            elsewhere = (
                ""
                if self.prepared.is_absolute()
                else f", or from the folder that corpus.prepared ({self.prepared}) is relative to"
            )
            raise UserError(
                f"{self.prepared.absolute()} contains no prepared corpus; run `realm prepare` with the same config "
                f"first{elsewhere}."
            )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the corpus was prepared with.

        Raises UserError if the corpus is not prepared yet, and if the tokenizer is damaged or is
        not that of the corpus.
        """
        self._check_prepared("tokenizer")
        folder = self.prepared / "tokenizer"
        remedy = "restore it from a copy, or prepare the corpus again in a new folder"
        check_folder(folder, remedy)
        tokenizer = load_tokenizer(str(folder))
        if tokenizer_fingerprint(tokenizer) != self.passages.manifest["tokenizer"]:
            raise UserError(f"the tokenizer in {folder} is not that of {self.passages.path}; {remedy}.")
        return tokenizer

    @cached_property
    def wordpieces(self) -> Wordpieces:
        """The tokenizer's special tokens."""
        return Wordpieces.from_tokenizer(self.tokenizer)

    @cached_property
    def terms(self) -> Terms:
        """Turns wordpieces into terms of BM25."""
        return Terms(self.tokenizer, self.config.fusion.prefix, self.config.fusion.stemmer)

    @cached_property
    def collator(self) -> Collator:
        """Builds the inputs of retriever and reader."""
        retriever, reader = self.config.retriever, self.config.reader
        limits = InputLimits(
            retriever.max_query_tokens, retriever.max_passage_tokens, reader.max_tokens, reader.max_span_tokens
        )
        return Collator(self.contexts, self.wordpieces, limits)

    def data(self, field: str) -> Path | None:
        """File of annotated statements of a field of `data` in the config; None if not set."""
        name = getattr(self.config.data, field)
        return None if name is None else source_path(name, self.prepared)

    def questions(self, field: str) -> QuestionSource | None:
        """Source of questions of a field of `data` in the config; None if not set."""
        source: QuestionSource | None = getattr(self.config.data, field)
        return None if source is None else replace(source, path=str(source_path(source.path, self.prepared)))


def source_path(name: str, prepared: Path) -> Path:
    """Resolve a path from the config.

    `builtin:NAME` is a file of the built-in corpus, which `realm prepare` writes.
    """
    return prepared / "gazetteer" / name.removeprefix(BUILTIN) if name.startswith(BUILTIN) else Path(name)
