"""REALM pretraining of retriever and reader (Guu et al. 2020, sections 3.2 to 3.4).

Both learn from masked salient spans by the marginal likelihood, with candidates from a live index.
"""

from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

from torch import nn

from index.frozen import publish_frozen
from index.fusion import Fusion
from index.interface import Index
from index.live import LiveIndex
from index.replay import read_replay
from pretrain.candidates import Candidates, IndexSource
from pretrain.collate import MaskedCollator
from pretrain.exports import ExportSchedule, drift_reference
from pretrain.masked_span_eval import masked_accuracy
from pretrain.masking import SpanSampler
from pretrain.pseudo_questions import ExampleSampler
from pretrain.search import embed_masked, own_rows
from pretrain.selection import find_supporting_passage
from pretrain.verdict import give_verdict
from realm.corpus.collate import NULL
from realm.errors import UserError
from realm.models.batches import RealmBatch
from realm.models.modules import RealmModel
from realm.models.reader import Reader, build_reader
from realm.models.retriever import Retriever, build_retriever
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.run.initial import initial_reader, initial_retriever
from realm.run.train import export_retriever
from realm.runtime.distributed import is_rank_zero, local_device, on_rank_zero
from realm.runtime.signals import Interrupted
from realm.runtime.telemetry import console
from realm.runtime.versions import Version
from realm.training.checkpoints import newest_checkpoint, read_state
from realm.training.engine import Engine
from realm.training.sections import PretrainConfig
from realm.training.stage import Stage
from realm.training.streams import RunStream, run_generator


def check_candidates(run: Run) -> None:
    """Raise UserError if a step needs more candidates than there are passages."""
    candidates, count = run.config.pretrain.candidates, len(run.passages)
    if candidates - 1 > count:
        raise UserError(
            f"pretrain.candidates ({candidates}) exceeds the corpus of {count} passages plus the null passage; "
            "lower it."
        )


class RealmPretraining(Stage):
    """A step swaps the index if a newer one is ready, retrieves, reads, and marginalizes."""

    name = "pretrain"
    config: PretrainConfig
    retriever: Retriever
    reader: Reader

    def __init__(self, run: Run, retriever: Retriever, reader: Reader, source: IndexSource) -> None:
        config = run.config.pretrain
        super().__init__(RealmModel(retriever, reader, config.marginal, config.head), config, retriever, reader)
        if config.head != "mlm":
            reader.span_softmax = "passage"
        self.run, self.source = run, source
        self.collator = MaskedCollator(run.collator, config.reader_buckets)
        self.candidates = Candidates(
            config,
            run.config.seed,
            self.collator,
            ExampleSampler.open(run, config.question_prob),
            run.config.engine.precision,
            source,
            lambda: self.current(retriever.query_tower),
            Fusion.of(run, run.starting_retriever(self.name)),
        )

    @classmethod
    def open_for_timing(cls, run: Run, index: Index) -> "RealmPretraining":
        """Open the stage for timing."""
        retriever = build_retriever(run.config.retriever, run.tokenizer)
        return cls(run, retriever, build_reader(run.config.reader, run.tokenizer)[0], FixedIndex(index))

    def modules_called_between_steps(self) -> Sequence[nn.Module]:
        retriever = self.retriever
        return [retriever.query_tower] if retriever.shared else [retriever.query_tower, retriever.passage_tower]

    def draw(self, step: int, size: int) -> RealmBatch:
        return self.candidates.batch(step, size)

    def progress_line(self, values: dict[str, Any]) -> str:
        heads = f"  utility {values['utility']:+.2f}" if "utility" in values else ""
        heads += f"  span accuracy {values['span_accuracy']:.2f}" if "span_accuracy" in values else ""
        return (
            f"loss {values['loss']:.2f}{heads}  null {values['null_mass']:.2f}  "
            f"hits {values['candidate_hit_rate']:.2f}  index {values['index']} ({values['steps_behind']:.0f} behind)"
        )

    def after_step(self, step: int) -> dict[str, float | str]:
        return dict(self.candidates.timing)

    def close(self) -> None:
        self.candidates.close()


class LiveRealmPretraining(RealmPretraining):
    """REALM pretraining with a refresher: follows its indexes and exports the retriever for it."""

    source: LiveIndex
    start: Path
    """Folder of the retriever that the stage starts from."""

    @classmethod
    def open(cls, run: Run, with_refresher: bool = False, replay: Path | None = None) -> "LiveRealmPretraining":
        """Open the stage for training in `run`, with its first index.

        `with_refresher`: start a refresher process. `replay`: a run folder, this one or another,
        whose log determines which index each step searches; after the end of the log, each step
        searches the newest one. Raises UserError if no index appears within
        `refresh.wait_timeout_s`.
        """
        check_candidates(run)
        source = initial_retriever(run, cls.name)
        retriever, reader = load_retriever(source)[0], initial_reader(run, cls.name)
        checkpoint = newest_checkpoint(run.stage(cls.name))
        state = {} if checkpoint is None else read_state(checkpoint)
        start = state.get("step", 0)
        log = None if replay is None else on_rank_zero(lambda: read_replay(replay))
        live = LiveIndex.begin(
            run.folder,
            run.config.refresh,
            run.passages,
            run.tokenizer,
            retriever.dim,
            state.get("attempt"),
            start,
            log,
            run.config.threads(cls.name),
            run.config.fusion.lexical,
        )
        try:
            if live.needs_export():
                _export_first(run, live, source, start)
            if with_refresher:
                live.start_refresher()
            live.wait_for_first(start)
            if checkpoint is None and run.config.pretrain.reader_check:
                # Before DeepSpeed may partition the parameters.
                check_reader(run, retriever.to(local_device()), reader.to(local_device()), live.index)
            stage = cls(run, retriever, reader, live)
            stage.start = source
            stage.checkpoint_at_end = run.config.pretrain.keep == "better" and bool(run.config.held_out.share)
            return stage
        except BaseException:
            live.close()
            raise

    def begin(self, engine: Engine) -> None:
        super().begin(engine)
        refresh = self.run.config.refresh
        reference = drift_reference(refresh, self.run.collator, self.run.config.engine.precision)
        self.exports = ExportSchedule(
            refresh, self.config.steps, reference, lambda: self.current(self.retriever.passage_tower)
        )

    def after_step(self, step: int) -> dict[str, float | str]:
        drift = self.exports.drift(step)
        if self.exports.due(step, drift):
            self._export(step)
        return self.candidates.timing | self.source.telemetry(step) | ({} if drift is None else {"drift": drift})

    def _export(self, step: int) -> None:
        assert self.engine is not None
        with self.engine.gathered(self.retriever):
            self.source.export(step, lambda folder: export_retriever(self.run, self.retriever, folder))
        self.exports.snapshot()

    def state(self) -> dict[str, Any]:
        return {"attempt": self.source.attempt}

    def save(self, folder: Path) -> None:
        self.candidates.save(folder)
        self.exports.save(folder)
        if is_rank_zero():  # keeps the version as long as the checkpoint
            (folder / "index_version").write_text(self.source.index.version.name + "\n")

    def restore(self, folder: Path, step: int) -> None:
        self.candidates.restore(folder, step)
        self.exports.restore(folder)

    def after_saving(self, folder: Path) -> None:
        if self.config.keep == "better":
            give_verdict(self.run, self.name, folder, self.start)

    def finish(self) -> None:
        try:
            self.source.end_training()
        except KeyboardInterrupt:
            raise Interrupted(
                f"{self.name} is finished, but not the index of its last export; "
                f"run `realm refresh --run {self.run.folder}` to build it."
            ) from None

    def close(self) -> None:
        super().close()
        self.source.close()


class FixedIndex:
    """The source of an index that is never swapped."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def swap(self, step: int) -> None:
        """Keep the index."""


def _export_first(run: Run, live: LiveIndex, source: Path, start: int) -> None:
    """Export the retriever that training starts from; its frozen index becomes the first index.

    Without a frozen index, the refresher builds the first index. Raises UserError if training does
    not start at step 0, because then an export is missing.
    """
    if start:
        raise UserError(
            f"{run.folder}/encoders has no export from before step {start}; restore it from a copy of the run."
        )
    live.export(0, lambda folder: copytree(source, folder, dirs_exist_ok=True))
    first = Version(live.attempt, 0)
    fusion = Fusion.of(run)
    if on_rank_zero(lambda: publish_frozen(run.folder, source, run.passages, run.config.refresh, first, fusion)):
        console.print("  the first index is the one that reader pretraining searched")


def check_reader(run: Run, retriever: Retriever, reader: Reader, index: Index) -> None:
    """Check whether the heads that `pretrain.head` trains use the passages, and print the result.

    Compares the masked-language head's accuracy from passages that contain the span and from the
    null passage; the span head finds nothing in the null passage.
    """
    config, precision = run.config.pretrain, run.config.engine.precision
    collator = MaskedCollator(run.collator, config.reader_buckets)
    sampler = SpanSampler(run.statements, config.max_span_tokens, run.collator.limits.query - 2)
    rng = run_generator(run.config.seed, RunStream.READER_CHECK)
    examples = [sampler.draw(int(row), rng) for row in rng.choice(sampler.rows, config.reader_check)]
    query_emb_BD = embed_masked(retriever.query_tower, examples, collator, precision)
    query_ids, own = collator.query_ids(examples), own_rows(examples, run.statements, run.passages)
    fusion = Fusion.of(run, run.starting_retriever(RealmPretraining.name))
    retrieved = fusion.retrieve(index, query_emb_BD, query_ids, min(20, len(index)), own)
    found = [
        find_supporting_passage(rows, example, run.statements, run.collator)
        for example, rows in zip(examples, retrieved, strict=True)
    ]
    pairs = [(example, row) for example, row in zip(examples, found, strict=True) if row is not None]
    if not pairs:
        console.print(
            "  reader check: no retrieved passage contains a masked span; train the retriever first (realm ict)"
        )
        return
    chosen = [example for example, _ in pairs]
    supported = masked_accuracy(reader, collator, precision, chosen, [row for _, row in pairs])
    null = masked_accuracy(reader, collator, precision, chosen, [NULL] * len(pairs))
    figures, gains = [], []
    if config.head != "span":
        gains.append(supported.masked - null.masked)
        figures.append(
            f"masked-span accuracy with a passage that contains the span {supported.masked:.0f} %, "
            f"with the null passage {null.masked:.0f} %"
        )
    if config.head != "mlm":
        gains.append(supported.span)
        figures.append(f"the span head finds the span in {supported.span:.0f} % of the passages that contain it")
    console.print(f"  reader check: {'; '.join(figures)} ({len(pairs)} spans)")
    if min(gains) < 10:
        console.print(
            "  warning: the reader does not use the passages yet, so the retriever will learn little from it; "
            "raise reader_pretraining.steps"
        )
