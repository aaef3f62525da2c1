"""Which checkpoint a stage resumes from if some are damaged, missing or of an earlier version."""

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from realm.errors import UserError
from realm.training.checkpoints import (
    checkpoint_folder,
    newest_checkpoint,
    read_state,
    set_damaged_aside,
    write_state,
)


def write_checkpoint(stage: Path, step: int, with_checksums: bool = True) -> Path:
    folder = checkpoint_folder(stage, step)
    (folder / "deepspeed").mkdir(parents=True)
    with zipfile.ZipFile(folder / "deepspeed" / "mp_rank_00_model_states.pt", "w") as file:
        file.writestr("data", bytes(1000))
    write_state(folder, {"step": step})
    if not with_checksums:
        (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path / "ict", step)
    return tmp_path / "ict"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "state.json").unlink(), r"state\.json is missing"),
    (lambda folder: truncate(folder / "state.json"), r"state\.json"),
    (lambda folder: truncate(folder / "deepspeed/mp_rank_00_model_states.pt"), r"model_states\.pt"),
    (lambda folder: shutil.rmtree(folder / "deepspeed"), "weights|model_states"),
    (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "cannot be read"),
]


def test_whole_checkpoints_are_not_touched(stage: Path) -> None:
    assert set_damaged_aside(stage) == []
    assert newest_checkpoint(stage) == checkpoint_folder(stage, 6)
    assert set_damaged_aside(stage.parent / "nowhere") == []


@pytest.mark.parametrize("with_checksums", [True, False], ids=["with checksums", "of an earlier version"])
@pytest.mark.parametrize(("damage", "problem"), DAMAGE)
def test_an_older_whole_checkpoint_is_used_and_the_warning_says_so(
    tmp_path: Path, damage: Callable[[Path], object], problem: str, with_checksums: bool
) -> None:
    stage = tmp_path / "ict"
    folders = [write_checkpoint(stage, step, with_checksums) for step in (2, 4, 6)]
    for folder in folders[1:]:
        damage(folder)
    lines = set_damaged_aside(stage)
    assert newest_checkpoint(stage) == folders[0] and read_state(folders[0])["step"] == 2
    assert len(lines) == 2 and all("resumes from an older checkpoint" in line for line in lines)
    assert re.search(problem, lines[0]) and str(folders[2]) in lines[0]
    assert (stage / "checkpoints" / "damaged-step-000006").exists()


def test_flipped_bits_are_found(stage: Path) -> None:
    flip(checkpoint_folder(stage, 6) / "deepspeed/mp_rank_00_model_states.pt")
    assert "does not match the checksum" in set_damaged_aside(stage)[0]
    assert newest_checkpoint(stage) == checkpoint_folder(stage, 4)


def test_damaged_checkpoints_alone_are_refused_and_kept(stage: Path) -> None:
    for step in (2, 4, 6):
        (checkpoint_folder(stage, step) / "state.json").unlink()
    with pytest.raises(UserError, match=rf"is missing; no whole checkpoint .* or remove {stage} to train ict"):
        set_damaged_aside(stage)
    assert newest_checkpoint(stage) == checkpoint_folder(stage, 6)


def test_other_names_are_no_checkpoints(stage: Path) -> None:
    (stage / "checkpoints" / "step-old").mkdir()
    assert newest_checkpoint(stage) == checkpoint_folder(stage, 6)
