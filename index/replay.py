"""Following a run's step → version log instead of the wall clock, so that a repeated step searches
the index it searched the first time.

A log entry is the training step whose export the index of a step was built from: attempts and
epochs differ when a run is repeated, the weights exported at a step do not. The trainer says in
`refresher/wanted.json` which exports it still needs; the refresher builds those before newer ones,
and nobody collects them.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from realm.errors import UserError
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import read_metrics
from realm.runtime.versions import Version

_WANTED = "wanted.json"


def read_replay(run: Path) -> dict[int, int]:
    """Step (from 0) → step of the export whose index it searched, as the metrics of `run` tell.
    Raises UserError where they tell nothing."""
    metrics = run / "metrics.jsonl"
    rows = read_metrics(metrics).get("pretrain", []) if metrics.exists() else []
    if not rows:
        raise UserError(
            f"{metrics} tells of no pretraining step to follow; leave out --replay, or name the run to follow."
        )
    return {row["step"] - 1: Version.parse(row["index"]).step for row in rows}


def request_exports(run: Path, replay: Mapping[int, int], step: int) -> None:
    """Tell the refresher which exports the steps from `step` on need."""
    folder = run / "refresher"
    folder.mkdir(exist_ok=True)
    write_json_atomic(folder / _WANTED, sorted({export for at, export in replay.items() if at >= step}))


def requested_exports(run: Path) -> list[int]:
    """Steps of the exports that a trainer which follows a log still needs, in order; none where
    it follows the wall clock."""
    with suppress(FileNotFoundError):
        return list(json.loads((run / "refresher" / _WANTED).read_text()))
    return []


def clear_requested_exports(run: Path) -> None:
    """From now on the newest export counts."""
    (run / "refresher" / _WANTED).unlink(missing_ok=True)
