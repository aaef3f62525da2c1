"""Kinds of damage to the files and folders of a run."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _missing(path: Path, _: Path) -> None:
    path.unlink()


def _empty(path: Path, _: Path) -> None:
    _rewrite(path, b"")


def _truncated(path: Path, _: Path) -> None:
    content = path.read_bytes()
    _rewrite(path, content[: len(content) // 2])


def _flipped(path: Path, _: Path) -> None:
    """Flip a bit in up to 200 bytes, at positions that depend on the name only."""
    content, rng = bytearray(path.read_bytes()), random.Random(path.name)
    for position in rng.sample(range(len(content)), min(200, max(1, len(content) // 3), len(content))):
        content[position] ^= 1 << rng.randrange(8)
    _rewrite(path, bytes(content))


def _of_another_run(path: Path, other: Path) -> None:
    _rewrite(path, other.read_bytes())


def _unreadable(path: Path, _: Path) -> None:
    _rewrite(path, path.read_bytes())
    path.chmod(0)


def _folder_in_its_place(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def _removed_folder(path: Path, _: Path) -> None:
    shutil.rmtree(path)


def _emptied_folder(path: Path, _: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _file_in_its_place(path: Path, _: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def _rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # it may be a hard link to the kept copy
    path.write_bytes(content)


FILE_DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "missing": _missing,
    "empty": _empty,
    "truncated": _truncated,
    "flipped": _flipped,
    "of another run": _of_another_run,
    "unreadable": _unreadable,
    "folder in its place": _folder_in_its_place,
}
FOLDER_DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "removed": _removed_folder,
    "emptied": _emptied_folder,
    "file in its place": _file_in_its_place,
}


@dataclass(frozen=True)
class Case:
    """One command after one damage; `path` is relative to the folder of the run and its corpus."""

    command: str
    path: str
    damage: str

    def __str__(self) -> str:
        return f"{self.command} | {self.path} | {self.damage}"
