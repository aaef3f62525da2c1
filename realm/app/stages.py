"""The registry of training stages: how each is opened for training and for timing."""

from collections.abc import Callable
from dataclasses import dataclass

from finetune.train_reader import Finetuning
from finetune.train_retriever import RetrieverFinetuning
from index.interface import Index
from pretrain.ict import InverseCloze
from pretrain.reader_pretraining import ReaderPretraining
from pretrain.realm import LiveRealmPretraining, RealmPretraining
from realm.run.folder import Run
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
