"""One prepared folder: its manifest, and its record batches mapped into memory.

A corpus consists of the folder as originally prepared and of those that were added later
(`realm.corpus.prepared`, `realm.corpus.growth`).
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from realm.errors import UserError
from realm.runtime.publish import MANIFEST, PublishError, check_files, read_json, read_manifest

BLOCKS = "blocks.arrow"
SHARDS = "shards"
"""Subfolder of a preparation that is not finished."""
ADDITIONS = "additions"
"""Subfolder with documents that were added later, see `realm.corpus.growth`."""
FORMAT = 1
"""Version of the layout of a prepared folder."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("document", pa.int32()),
        ("place", pa.int32()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("title_ids", pa.list_(pa.int32())),
        ("text_ids", pa.list_(pa.int32())),
        ("sentence_starts", pa.list_(pa.int32())),
        ("span_starts", pa.list_(pa.int32())),
        ("span_ends", pa.list_(pa.int32())),
        ("span_types", pa.list_(pa.int8())),
        ("text_hash", pa.uint64()),
    ]
)
_LISTS = tuple(column.name for column in SCHEMA if pa.types.is_list(column.type))


def _batch_checksum(batch: pa.RecordBatch) -> str:
    """SHA-256 of the content of a record batch."""
    digest = hashlib.sha256(str(len(batch)).encode())
    for column in batch.columns:
        for buffer in column.buffers():
            digest.update(b"" if buffer is None else buffer)
    return digest.hexdigest()


def prepare_again(folder: Path) -> str:
    """The remedy for a damaged prepared folder, for messages."""
    base = folder.parent.parent if folder.parent.name == ADDITIONS else folder
    added = " and `realm index add`" if (base / ADDITIONS).exists() else ""
    return f"restore it from a copy, or remove {base} and run `realm prepare`{added} again"


def batch_checksums(blocks: Path) -> list[str]:
    """The checksums of all record batches of a file, for its manifest."""
    with pa.memory_map(str(blocks)) as file, pa.ipc.open_file(file) as reader:
        return [_batch_checksum(reader.get_batch(i)) for i in range(reader.num_record_batches)]


class Batch:
    """A record batch as NumPy views of the mapped file; `lists[name]` is (offsets, values).

    Its content is compared with the checksum `expected` when it is first used, not when the corpus
    is opened, so that opening a corpus of any size takes milliseconds.
    """

    def __init__(self, batch: pa.RecordBatch, first_document: int, number: int, path: Path, expected: str | None):
        self._batch, self._number, self._path, self._expected = batch, number, path, expected
        self.columns = {name: batch.column(name) for name in ("id", "title", "text")}
        self.document, self.place, self.text_hash = (
            batch.column(name).to_numpy() for name in ("document", "place", "text_hash")
        )
        if first_document:
            self.document = self.document + first_document
        self.lists = {
            name: (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy()) for name in _LISTS
        }

    def checked(self) -> "Batch":
        """This batch. Raises PublishError at the first use if its content is not what was
        prepared."""
        if self._expected is not None:
            if _batch_checksum(self._batch) != self._expected:
                raise PublishError(
                    f"{self._path / BLOCKS} does not match the checksum of its record batch {self._number}; "
                    f"{prepare_again(self._path)}"
                )
            self._expected = None
        return self

    def list_values(self, name: str, row: int) -> np.ndarray:
        offsets, values = self.lists[name]
        piece: np.ndarray = values[offsets[row] : offsets[row + 1]]
        return piece


def read_folder_manifest(path: Path) -> dict[str, Any]:
    """The manifest of one prepared folder. Raises UserError if it is missing or damaged."""
    again = prepare_again(path)
    if not (path / MANIFEST).exists():
        if (path / BLOCKS).exists() and not (path / SHARDS).exists():
            raise UserError(f"{path / MANIFEST} is missing: {path} was copied only partially; {again}.")
        state = "is not a finished prepared corpus" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}; run `realm prepare` with the same config first.")
    manifest = read_json(path / MANIFEST, again)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST} does not have layout {FORMAT}, which this version reads; {again}.")
    return read_manifest(path, again) if "manifest_sha256" in manifest else manifest


def map_folder(path: Path) -> tuple[dict[str, Any], list[pa.RecordBatch]]:
    """Manifest and mapped record batches of one prepared folder."""
    manifest, blocks, again = read_folder_manifest(path), path / BLOCKS, prepare_again(path)
    check_files(path, {"files": {BLOCKS: {"bytes": manifest.get("bytes")}}}, again, contents=False)
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(blocks)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()
        if reader.schema != SCHEMA:
            raise pa.ArrowInvalid("it has other columns")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{blocks} is corrupt ({error}); {again}.") from error
    count = sum(map(len, batches))
    if (count, len(batches)) != (manifest.get("blocks"), len(manifest.get("batches", batches))):
        raise UserError(f"{blocks} has {count} rows, but its manifest says {manifest.get('blocks')}; {again}.")
    return manifest, batches


def checked_batches(
    path: Path, manifest: dict[str, Any], batches: list[pa.RecordBatch], first_document: int
) -> list[Batch]:
    """The record batches of a prepared folder, with their checksums if it has any."""
    expected = manifest.get("batches", [None] * len(batches))
    return [
        Batch(batch, first_document, number, path, checksum)
        for number, (batch, checksum) in enumerate(zip(batches, expected, strict=True))
    ]
