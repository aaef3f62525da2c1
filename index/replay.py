"""Replay: repeat a run with the index versions that its log records for each step, instead of the
newest ones.

The log maps a training step to the export from which the index of that step was built. It does not
record attempts and epochs: they differ when a run is repeated, while the weights exported at a step
do not. The trainer writes the exports it still needs to `refresher/wanted.json`; the refresher
builds those before newer ones and does not collect them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from realm.errors import UserError
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import read_metrics
from realm.runtime.versions import Version

_REQUESTS_FILE = "wanted.json"


def read_replay(run: Path) -> dict[int, int]:
    """Map each step (from 0) to the step of the export whose index it searched, from the metrics of
    `run`. Raises UserError if they contain no pretraining step."""
    metrics = run / "metrics.jsonl"
    rows = read_metrics(metrics).get("pretrain", []) if metrics.exists() else []
    if not rows:
        raise UserError(f"{metrics} contains no pretraining step to replay; omit --replay, or name the run to replay.")
    return {row["step"] - 1: Version.parse(row["index"]).step for row in rows}


def request_exports(run: Path, replay: Mapping[int, int], step: int) -> None:
    """Request indexes of the exports that the steps from `step` on need."""
    folder = run / "refresher"
    folder.mkdir(exist_ok=True)
    write_json_atomic(folder / _REQUESTS_FILE, sorted({export for at, export in replay.items() if at >= step}))


def requested_exports(run: Path) -> list[int]:
    """Steps of the exports that a replay still needs, ascending; empty without a replay."""
    path = run / "refresher" / _REQUESTS_FILE
    try:
        steps = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError:
        steps = None
    if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
        raise UserError(f"{path} is not a list of steps; remove it, and restart the replay.")
    return steps


def clear_requested_exports(run: Path) -> None:
    """End the replay: the refresher builds the newest export again."""
    (run / "refresher" / _REQUESTS_FILE).unlink(missing_ok=True)
