"""The base class of training stages: the trained module, its batches, and its state."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from realm.models.batches import Batch
from realm.models.reader import Reader
from realm.models.retriever import Retriever
from realm.training.engine import Engine
from realm.training.sections import StageConfig


class Stage(AbstractContextManager["Stage"], ABC):
    """A training stage, run by `realm.training.loop.train`.

    Batches must be a function of the seed, the step, and the state that `restore` reads, so that a
    resumed stage gets the same batches as without the interruption. A stage is used as a context
    manager: on exit, it releases what it opened (index, threads, processes).
    """

    name: ClassVar[str]
    """Name of the stage's config section, folder and metrics."""

    def __init__(
        self, module: nn.Module, config: StageConfig, retriever: Retriever | None = None, reader: Reader | None = None
    ) -> None:
        """`module(batch)` returns scalars, including `loss`.

        `retriever` and `reader` are the models in it that are published when the stage ends.
        """
        self.module, self.config, self.retriever, self.reader = module, config, retriever, reader
        self.engine: Engine | None = None
        self.started_from: dict[str, str | None] = {}
        """The saved models that the stage started from; part of every checkpoint."""
        self.settings: dict[str, Any] = {}
        """The settings that the stage must be resumed with; part of every checkpoint."""
        self.checkpoint_at_end = False
        """Whether to write a checkpoint after the last step, because publishing takes long and may
        be interrupted."""

    @abstractmethod
    def draw(self, step: int, size: int) -> Batch:
        """The batch of step `step` on this rank, with `size` examples."""

    @abstractmethod
    def progress_line(self, values: dict[str, Any]) -> str:
        """The figures of a step as text for the progress line."""

    def batch(self, step: int) -> Batch:
        """The batch of step `step` on this rank."""
        return self.draw(step, self.config.batch_size)

    def sample_batch(self, step: int, size: int) -> Batch:
        """A batch like that of step `step`, for timing (see `realm.app.step_timing`)."""
        return self.draw(step, size)

    def modules_called_between_steps(self) -> Sequence[nn.Module]:
        """Parts of the module that `batch` and `after_step` call through `current`."""
        return ()

    def current(self, part: nn.Module) -> nn.Module:
        """A part of the module with its current weights; all ranks must call this together."""
        return part if self.engine is None else self.engine.gathered_copy(part)

    def begin(self, engine: Engine) -> None:
        """Called once before the first step, after the weights are loaded into `engine`."""
        self.engine = engine

    def after_step(self, step: int) -> dict[str, float | str]:
        """Called when `step` steps are done; returns figures for the metrics."""
        return {}

    def state(self) -> dict[str, Any]:
        """Values to add to a checkpoint's `state.json`."""
        return {}

    def save(self, folder: Path) -> None:
        """Add this rank's files to a checkpoint, without collectives."""

    def restore(self, folder: Path, step: int) -> None:
        """Read the files written by `save`; training continues from step `step`."""

    def before_saving(self) -> None:
        """Called on rank 0, with all parameters in full, before the models are saved."""

    def after_saving(self, folder: Path) -> None:
        """Called on rank 0 when the models are saved in `folder`, before it is published; may
        change its content. Without collectives."""

    def finish(self) -> None:
        """Called after the models are published."""

    def close(self) -> None:
        """Release what the stage opened."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
