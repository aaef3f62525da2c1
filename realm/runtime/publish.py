"""Atomic publishing, manifests and checksums, for processes that share only a file system.

A published directory never changes: it is written under a temporary name in the same parent
directory, flushed to disk and renamed. The names of temporary files begin with `.tmp-`, including
files left behind by a crash.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from realm.errors import UserError

TEMPORARY = ".tmp-"
"""Name prefix of files and folders that are not published yet."""

MANIFEST = "manifest.json"
_REMEDY = "publish it again"


class PublishError(UserError):
    """A published directory is missing, corrupt, or already exists."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def published(final: Path, before_rename: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """Yield an empty temporary directory that is renamed to `final` when the block ends.

    `before_rename` is called just before that, when all files are flushed to disk. If it or the
    block raises, the temporary directory is removed. Raises PublishError if `final` exists:
    published directories never change. Raises OSError, such as "No space left on device", if a
    library could not write and raised an exception of its own.
    """
    if final.exists():
        raise PublishError(
            f"{final} already exists and published folders never change; remove it, or choose another name"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{TEMPORARY}{final.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for file in files:
                _sync(Path(folder, file))
            _sync(Path(folder))
        before_rename()
        try:
            temporary.rename(final)
        except OSError as error:
            if final.exists():
                raise PublishError(f"{final} was published by another process; that copy is kept") from error
            raise
    except BaseException as error:
        of_library = isinstance(error, Exception) and not isinstance(error, OSError | UserError)
        cause = _write_error(temporary) if of_library else None
        shutil.rmtree(temporary, ignore_errors=True)
        if cause is not None:
            raise cause from error
        raise
    _sync(final.parent)


def _write_error(folder: Path) -> OSError | None:
    """Why nothing can be written to a folder; None if a small file can."""
    try:
        with (folder / f"{TEMPORARY}{uuid.uuid4().hex}").open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return OSError(error.errno, error.strerror, str(folder.parent))
    return None


def write_file_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file with `write(file)`, then rename it to `path`.

    A concurrent reader sees either the old or the new content.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}-{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically (see `write_file_atomic`)."""
    write_file_atomic(path, lambda file: file.write(text.encode()))


def write_json_atomic(path: Path, value: Any) -> None:
    write_file_atomic(path, lambda file: file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode()))


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of a folder: over the sorted names and checksums of all its files."""
    if path.is_dir():
        files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(f"{checksum(file)}  {name}\n" for name, file in files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file.

    Raises PublishError, which ends with `remedy`, if it is missing, unreadable or invalid.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PublishError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise PublishError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise PublishError(f"{path} is not valid JSON ({error}); {remedy}") from None


def write_manifest(folder: Path, manifest: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Write `manifest.json` with the sizes and checksums of the files `names` in `folder` (default:
    all other files).

    It also contains a checksum of itself. It must be the last file that is written.
    """
    if names is None:
        names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": checksum(folder / name)}
        for name in sorted(names)
        if name != MANIFEST
    }
    manifest = {**manifest, "files": files}
    write_json_atomic(folder / MANIFEST, {**manifest, "manifest_sha256": _self_checksum(manifest)})


def read_manifest(folder: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read the manifest that `write_manifest` wrote, `files` included.

    Raises PublishError, which ends with `remedy`, if it is missing, not valid JSON, or was
    modified.
    """
    path = folder / MANIFEST
    if folder.is_dir() and not os.path.lexists(path):
        raise PublishError(
            f"{path} is missing: {folder.name} was not published by this program, or was copied only partially"
        )
    manifest = read_json(path, remedy)
    if not isinstance(manifest, dict) or manifest.pop("manifest_sha256", None) != _self_checksum(manifest):
        raise PublishError(f"{path} was modified after it was published; {remedy}")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], remedy: str = _REMEDY, contents: bool = True) -> None:
    """Check the size, then the checksum, of every file in the manifest; without `contents` only the
    sizes.

    Raises PublishError naming the first file that differs; the message ends with `remedy`.
    """
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise PublishError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise PublishError(f"{path} has {size} bytes, but its manifest says {expected['bytes']}; {remedy}")
    for name, expected in manifest["files"].items() if contents else ():
        try:
            found = checksum(folder / name)
        except OSError as error:
            raise PublishError(f"{folder / name} cannot be read ({error.strerror}); {remedy}") from error
        if found != expected["sha256"]:
            raise PublishError(f"{folder / name} does not match the checksum in its manifest; {remedy}")


def check_folder(folder: Path, remedy: str) -> bool:
    """Check all files of a folder against its manifest.

    Returns False if it has no manifest, as in folders of earlier versions. Raises
    PublishError, which names the file and ends with `remedy`, if one is missing or differs.
    """
    if not os.path.lexists(folder / MANIFEST):
        return False
    check_files(folder, read_manifest(folder, remedy), remedy)
    return True
