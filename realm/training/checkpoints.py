"""Checkpoints of a stage: folders `checkpoints/step-NNNNNN`, each with a `state.json`."""

import json
from pathlib import Path
from typing import Any

from realm.errors import UserError
from realm.runtime.distributed import world_size

STATE_FILE = "state.json"


def checkpoint_folder(stage: Path, step: int) -> Path:
    """Folder of the checkpoint of a step, in a stage's folder."""
    return stage / "checkpoints" / f"step-{step:06d}"


def checkpoints(stage: Path) -> list[Path]:
    """The published checkpoints in a stage's folder, oldest first."""
    return sorted((stage / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def newest_checkpoint(stage: Path) -> Path | None:
    """The newest published checkpoint in a stage's folder."""
    found = checkpoints(stage)
    return found[-1] if found else None


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's state, with the number of processes."""
    (checkpoint / STATE_FILE).write_text(json.dumps({"world_size": world_size(), **state}, indent=1))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's state. Raises UserError if another number of processes wrote it."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    if state["world_size"] != world_size():
        written, now = state["world_size"], world_size()
        raise UserError(
            f"{checkpoint} was written by {written} processes, but this run has {now}; resume with {written}."
        )
    return state
