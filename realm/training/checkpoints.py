"""Checkpoints of a stage: folders `checkpoints/step-NNNNNN` with `state.json` and a manifest."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from realm.errors import UserError
from realm.runtime.distributed import world_size
from realm.runtime.publish import PublishError, check_folder, read_json, write_manifest

STATE_FILE = "state.json"
DAMAGED = "damaged-"
"""Prefix of the names of checkpoints that were set aside."""
_REMEDY = "restore it from a copy, or remove the checkpoint to resume from an older one"


def checkpoint_folder(stage: Path, step: int) -> Path:
    """Folder of the checkpoint of a step, in a stage's folder."""
    return stage / "checkpoints" / f"step-{step:06d}"


def checkpoints(stage: Path) -> list[Path]:
    """The published checkpoints in a stage's folder, oldest first."""
    folders = (stage / "checkpoints").glob("step-*")
    found = [folder for folder in folders if re.fullmatch(r"step-[0-9]+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))


def newest_checkpoint(stage: Path) -> Path | None:
    """The newest published checkpoint in a stage's folder."""
    found = checkpoints(stage)
    return found[-1] if found else None


def set_damaged_aside(stage: Path) -> list[str]:
    """Rename checkpoints that are newer than the newest whole one, so that training resumes from
    it.

    Every file is compared with its checksum, which takes about 1 s per GB. Returns a line about
    each renamed checkpoint. Raises UserError, and renames nothing, if there are checkpoints but no
    whole one.
    """
    damaged: list[tuple[Path, str]] = []
    found = checkpoints(stage)
    for folder in reversed(found):
        try:
            aside = DAMAGED + folder.name
            check_checkpoint(folder, f"it was renamed to {aside}, and training resumes from an older checkpoint")
            break
        except PublishError as error:
            damaged.append((folder, f"warning: {error}"))
    if found and len(damaged) == len(found):
        again = f"or remove {stage} to train {stage.name} again from step 0"
        check_checkpoint(found[-1], f"no whole checkpoint is left: restore one from a copy of the run, {again}")
    for folder, _ in damaged:
        folder.rename(folder.with_name(DAMAGED + folder.name))
    return [line for _, line in damaged]


def check_checkpoint(folder: Path, remedy: str) -> bool:
    """Check every file of a checkpoint; returns False if it has no checksums (earlier versions).

    Raises PublishError, which names the first file that is missing or damaged and ends with
    `remedy`.
    """
    has_checksums = check_folder(folder, remedy)
    state = read_json(folder / STATE_FILE, remedy)
    if not isinstance(state, dict) or not {"step", "world_size"} <= state.keys():
        raise PublishError(f"{folder / STATE_FILE} is not the state of a checkpoint; {remedy}")
    weights = sorted(folder.glob("*/*_model_states.pt"))
    if not weights:
        raise PublishError(f"{folder} contains no weights; {remedy}")
    for file in weights if not has_checksums else ():
        if not zipfile.is_zipfile(file):
            raise PublishError(f"{file} is truncated; {remedy}")
    return has_checksums


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's state, with the number of processes, and then the manifest of all its
    files; these must be the last ones that are written."""
    (checkpoint / STATE_FILE).write_text(json.dumps({"world_size": world_size(), **state}, indent=1))
    write_manifest(checkpoint, {"format": 1})


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's state. Raises UserError if another number of processes wrote it."""
    state: dict[str, Any] = read_json(checkpoint / STATE_FILE, _REMEDY)
    if state["world_size"] != world_size():
        written, now = state["world_size"], world_size()
        raise UserError(
            f"{checkpoint} was written by {written} processes, but this run has {now}; resume with {written}."
        )
    return state
