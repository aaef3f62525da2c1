"""When REALM pretraining exports the retriever: periodically, on drift, or both, and at the end."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from index.drift import DRIFT_FILE, DriftReference
from realm.corpus.collate import Collator
from realm.models.precision import Precision
from realm.runtime.distributed import is_rank_zero, on_rank_zero
from realm.training.refresh_section import RefreshConfig


def drift_reference(config: RefreshConfig, collator: Collator, precision: Precision) -> DriftReference | None:
    """The passages on which drift is measured; None if `max_drift` is not set."""
    if config.max_drift is None:
        return None
    passages, words, longest = collator.passages, collator.wordpieces, collator.limits.passage
    return DriftReference(passages, words, config.drift_passages, longest, precision)


class ExportSchedule:
    """Decides after each step whether to export; all ranks must call its methods together."""

    def __init__(
        self,
        config: RefreshConfig,
        last_step: int,
        reference: DriftReference | None,
        passage_tower: Callable[[], nn.Module],
    ) -> None:
        """`passage_tower()` returns the tower with its current weights.

        `reference`: passages on which drift is measured; None: export periodically only.
        """
        self.config, self.last_step, self.reference, self.passage_tower = config, last_step, reference, passage_tower
        self.snapshot()

    def drift(self, step: int) -> float | None:
        """Drift of the passage embeddings since the last export; None if not measured now."""
        if self.reference is None or step % self.config.drift_every:
            return None
        reference, tower = self.reference, self.passage_tower()
        return on_rank_zero(lambda: reference.drift(tower))

    def due(self, step: int, drift: float | None) -> bool:
        """Whether to export after `step` steps."""
        period, max_drift = self.config.export_period, self.config.max_drift
        periodic = period > 0 and step % period == 0
        on_drift = drift is not None and max_drift is not None and drift >= max_drift
        return periodic or on_drift or step == self.last_step

    def snapshot(self) -> None:
        """Measure drift relative to the current weights from now on."""
        if self.reference is not None:
            reference, tower = self.reference, self.passage_tower()
            on_rank_zero(lambda: reference.snapshot(tower))

    def save(self, checkpoint: Path) -> None:
        """Add the embeddings relative to which drift is measured to a checkpoint."""
        if self.reference is not None and is_rank_zero():
            np.save(checkpoint / DRIFT_FILE, self.reference.snapshot_PD)

    def restore(self, checkpoint: Path) -> None:
        """Restore the embeddings relative to which drift is measured.

        Without them in the checkpoint, drift is measured relative to the current weights.
        """
        if self.reference is not None and is_rank_zero() and (checkpoint / DRIFT_FILE).exists():
            self.reference.snapshot_PD = np.load(checkpoint / DRIFT_FILE)
