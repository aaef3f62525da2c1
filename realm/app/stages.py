"""The registry of training stages: how each is opened for training and for timing."""

from collections.abc import Callable
from dataclasses import dataclass

from finetune.train_reader import Finetuning
from finetune.train_retriever import RetrieverFinetuning
from index.interface import Index
from pretrain.held_out import measure_retriever
from pretrain.ict import InverseCloze
from pretrain.reader_pretraining import ReaderPretraining
from pretrain.realm import LiveRealmPretraining, RealmPretraining
from realm.run.folder import Run
from realm.run.initial import initial_retriever
from realm.run.train import train_stage
from realm.runtime.distributed import on_rank_zero
from realm.training.stage import Stage


@dataclass(frozen=True)
class StageFactory:
    """Functions that open a stage."""

    open: Callable[[Run], Stage]
    """Opens the stage for training in a run."""
    open_for_timing: Callable[[Run, Index], Stage]
    """Opens the stage for timing, with untrained models of the same sizes and a random index."""


STAGE_FACTORIES = {
    "ict": StageFactory(InverseCloze.open, lambda run, _: InverseCloze.open_for_timing(run)),
    "reader_pretraining": StageFactory(ReaderPretraining.open, ReaderPretraining.open_for_timing),
    "pretrain": StageFactory(LiveRealmPretraining.open, RealmPretraining.open_for_timing),
    "finetune_retriever": StageFactory(RetrieverFinetuning.open, RetrieverFinetuning.open_for_timing),
    "finetune": StageFactory(Finetuning.open, Finetuning.open_for_timing),
}
"""By name, in the order of `realm.run.folder.STAGES`."""


def train(run: Run, name: str, resume: bool = False, open_stage: Callable[[Run], Stage] | None = None) -> None:
    """Train a stage (see `train_stage`); if it retrieves with a tuned weight of BM25, the weight is
    tuned first for the retriever that it starts from.

    `open_stage`: default: that of the registry.
    """
    opened = open_stage or STAGE_FACTORIES[name].open

    def open_tuned(run: Run) -> Stage:
        if run.config.fusion.tunes_weight and name != InverseCloze.name:
            start = initial_retriever(run, name)
            on_rank_zero(lambda: measure_retriever(run, start))
        return opened(run)

    train_stage(run, name, open_tuned, resume)
