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
class StageProgram:
    """Functions that open a stage."""

    open: Callable[[Run], Stage]
    """Opens the stage for training in a run."""
    open_sample: Callable[[Run, Index], Stage]
    """Opens the stage for timing, with untrained models of the same sizes and a random index."""


STAGE_PROGRAMS = {
    "ict": StageProgram(InverseCloze.open, lambda run, _: InverseCloze.open_sample(run)),
    "reader_pretraining": StageProgram(ReaderPretraining.open, ReaderPretraining.open_sample),
    "pretrain": StageProgram(LiveRealmPretraining.open, RealmPretraining.open_sample),
    "finetune_retriever": StageProgram(RetrieverFinetuning.open, RetrieverFinetuning.open_sample),
    "finetune": StageProgram(Finetuning.open, Finetuning.open_sample),
}
"""By name, in the order of `realm.run.folder.STAGES`."""
