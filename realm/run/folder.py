"""The run folder: where each stage keeps its checkpoints and its result, and the one resolved
config that every program reads.

runs/NAME/
  config.yaml                     resolved; written once
  STAGE/checkpoints/step-000500/  to resume the stage
  STAGE/model/retriever, reader   its result, written last: a stage with a `model` folder has ended
  encoders/ indexes/ refresher/ lineage.json   see `realm.runtime.publish` and `index`
  metrics.jsonl tensorboard/ evaluations/
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from realm.corpus.context import Contexts
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.run.config import QuestionSource, RealmConfig
from realm.run.config_file import dump_config, load_config
from realm.runtime.telemetry import console
from realm.text.inputs import Wordpieces
from realm.text.tokenizer import load_tokenizer

BUILTIN = "builtin:"
"""Prefix of paths inside the built-in corpus."""

STAGES = ("ict", "reader_pretraining", "pretrain", "finetune_retriever", "finetune")
"""Training stages in the order in which they build on each other."""


@dataclass(frozen=True)
class Run:
    """A run folder and its config."""

    folder: Path
    config: RealmConfig

    @classmethod
    def create(cls, config: RealmConfig) -> "Run":
        """Make the folder with its config, or go on with one that holds the same config.

        Raises UserError where the folder holds another config, or the corpus is not prepared as the
        config says.
        """
        folder = Path(config.run)
        path, text = folder / "config.yaml", dump_config(config)
        if path.exists():
            if path.read_text() != text:
                old, new = path.read_text().splitlines(), text.splitlines()
                changed = [line[2:].strip() for line in difflib.ndiff(old, new) if line.startswith("+ ")]
                raise UserError(
                    f"run folder {folder} exists with another config (now: {'; '.join(changed[:4]) or 'fewer fields'}); "
                    "give another folder with --run, or restore the config."
                )
            return cls(folder, config)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"run folder {folder} exists and holds no config.yaml; give another folder or empty it.")
        run = cls(folder, config)
        run.passages, run.statements  # noqa: B018  (refused before anything is written, if at all)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".config.yaml"
        temporary.write_text(text)
        temporary.rename(path)
        return run

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = ()) -> "Run":
        """Read an existing run; overrides hold for this program alone. Raises UserError where
        there is none."""
        path = folder / "config.yaml"
        if not path.exists():
            raise UserError(
                f"{folder} is no run folder (no config.yaml); start one with `realm ict --config …` or check the path."
            )
        return cls(folder, load_config(path, overrides))

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.folder / name

    def model(self, name: str) -> Path:
        """Folder of a stage's result."""
        return self.folder / name / "model"

    def finished(self, name: str) -> bool:
        """Whether the stage has ended."""
        return self.model(name).exists()

    def begin(self, stage: str, resume: bool) -> bool:
        """Whether a stage has anything left to do. Raises UserError for one that was begun
        before, unless `resume`."""
        if self.finished(stage):
            console.print(f"  {stage}: finished before, in {self.model(stage)}")
            return False
        if not resume and (self.stage(stage) / "checkpoints").exists():
            raise UserError(
                f"run folder {self.folder} exists and stage {stage} was begun in it; add --resume to go on, or give another folder with --run."
            )
        return True

    def latest(self, part: str, before: str | None = None, until: str | None = None) -> Path | None:
        """The newest `retriever` or `reader` written by a stage; of those before stage `before`,
        or up to and with `until`, if given."""
        stages = STAGES[: STAGES.index(before)] if before else STAGES[: STAGES.index(until) + 1] if until else STAGES
        for name in reversed(stages):
            if (self.model(name) / part).exists():
                return self.model(name) / part
        return None

    def require(self, part: str, remedy: str) -> Path:
        """`latest(part)`; raises UserError with the remedy where no stage has written it yet."""
        path = self.latest(part)
        if path is None:
            raise UserError(f"run {self.folder} has no trained {part} yet; {remedy}.")
        return path

    @property
    def prepared(self) -> Path:
        """Folder of the prepared corpus."""
        return Path(self.config.corpus.prepared)

    @cached_property
    def passages(self) -> PreparedCorpus:
        """The passages to retrieve from."""
        return self._opened("passages", self.config.corpus.passages)

    @cached_property
    def contexts(self) -> Contexts:
        """What the reader reads for a passage."""
        return Contexts(self.passages, self.config.corpus.context_tokens)

    @cached_property
    def statements(self) -> PreparedCorpus:
        """The sentences to mask: a corpus of their own, or the passages."""
        sources = self.config.corpus.statements
        return self.passages if sources is None else self._opened("statements", sources)

    def _opened(self, kind: str, sources: Sequence[SourceConfig]) -> PreparedCorpus:
        """Raises UserError for a corpus that was prepared from other sources than the config
        names, as far as that shows without reading them."""
        corpus, config = PreparedCorpus.open(self.prepared / kind), self.config.corpus
        made = corpus.manifest["inputs"]
        for name, there, here in (
            ("corpus.block_tokens", made["block_tokens"], config.block_tokens),
            (f"the number of sources of corpus.{kind}", len(made["sources"]), len(sources)),
            (
                "the limit of documents of each source",
                [source["limit"] for source in made["sources"]],
                [s.limit for s in config.limited(sources)],
            ),
        ):
            if there != here:
                raise UserError(
                    f"{corpus.path} was prepared otherwise: {name} was {there} and is now {here}; restore it, "
                    "or prepare into another folder with --corpus.prepared."
                )
        return corpus

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the corpus was prepared with. Raises UserError where nothing is prepared
        yet."""
        if not (self.prepared / "tokenizer").exists():
            raise UserError(
                f"{self.prepared} holds no prepared corpus; run `realm prepare` with the same config first."
            )
        return load_tokenizer(str(self.prepared / "tokenizer"))

    @cached_property
    def wordpieces(self) -> Wordpieces:
        """Its special tokens."""
        return Wordpieces.of(self.tokenizer)

    def data(self, field: str) -> Path | None:
        """File of annotated statements named by a field of the config's `data` section,
        `builtin:` resolved."""
        name = getattr(self.config.data, field)
        return None if name is None else source_path(name, self.prepared)

    def questions(self, field: str) -> QuestionSource | None:
        """Source of questions named by a field of the config's `data` section, `builtin:` resolved."""
        source: QuestionSource | None = getattr(self.config.data, field)
        return None if source is None else replace(source, path=str(source_path(source.path, self.prepared)))


def source_path(name: str, prepared: Path) -> Path:
    """A path of the config: `builtin:NAME` is a file of the built-in corpus, written by `realm
    prepare`."""
    return prepared / "gazetteer" / name.removeprefix(BUILTIN) if name.startswith(BUILTIN) else Path(name)
