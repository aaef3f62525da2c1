"""The prepared corpus: memory-mapped blocks.

A *document* is one record of the input. A *block* consists of consecutive sentences of one document
and is the unit that is retrieved and read.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from realm.errors import UserError

MANIFEST = "manifest.json"
BLOCKS = "blocks.arrow"
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


class _Batch:
    """A record batch as NumPy views of the mapped file; `lists[name]` is (offsets, values)."""

    def __init__(self, batch: pa.RecordBatch, first_document: int):
        self.columns = {name: batch.column(name) for name in ("id", "title", "text")}
        self.document, self.place, self.text_hash = (
            batch.column(name).to_numpy() for name in ("document", "place", "text_hash")
        )
        if first_document:
            self.document = self.document + first_document
        self.lists = {
            name: (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy()) for name in _LISTS
        }

    def list_values(self, name: str, row: int) -> np.ndarray:
        offsets, values = self.lists[name]
        piece: np.ndarray = values[offsets[row] : offsets[row + 1]]
        return piece


class PreparedCorpus:
    """The blocks of a prepared corpus, read-only and memory-mapped.

    Processes that open the same folder share its memory. Rows are in the order of the input. Arrays
    are views of the mapped file, int32 unless stated otherwise.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], batches: list[pa.RecordBatch]):
        self.path = path
        self.manifest = manifest
        """Manifest of the whole corpus, additions included, except for `inputs`, which describes
        the corpus as originally prepared."""
        self.fingerprint: str = manifest["fingerprint"]
        """SHA-256 over the ids, titles and texts of the documents in order, the tokenizer and the
        block size; after a change, over the previous fingerprint and the added and deleted
        documents."""
        self.ids: Sequence[str] = _BlockIds(self)
        """Id of every row: the document's id if it has a single block, else `document#0`,
        `document#1`, …"""
        self.ancestors: dict[str, int] = {self.fingerprint: manifest["blocks"]}
        """Number of rows by fingerprint: the current one and those before each change, oldest
        first."""
        self.base_rows: int = manifest["blocks"]
        """Number of rows as originally prepared, without additions."""
        self.deleted: frozenset[int] = frozenset()
        """Deleted rows: they keep their numbers and are never retrieved or trained on."""
        self.parts: list[str] = []
        """Names of the added parts."""
        self._batches = [_Batch(batch, 0) for batch in batches]
        self._first_rows = [0, *accumulate(len(batch) for batch in batches)]

    @classmethod
    def open(cls, path: Path | str) -> "PreparedCorpus":
        """Map the folder that `realm.corpus.prepare.prepare_corpus` wrote, and its additions.

        Raises UserError if it is missing, unfinished or modified.
        """
        path = Path(path)
        manifest, batches = _map_folder(path)
        corpus = cls(path, manifest, batches)
        for file in sorted((path / ADDITIONS).glob("step-*.json")):
            corpus._apply_step(json.loads(file.read_bytes()))
        return corpus

    def _apply_step(self, step: dict[str, Any]) -> None:
        if step["parent"] != self.fingerprint:
            raise UserError(
                f"{self.path / ADDITIONS} does not belong to this corpus; remove it or restore all its files."
            )
        if step["part"] is not None:
            manifest, batches = _map_folder(self.path / ADDITIONS / step["part"])
            self._batches += [_Batch(batch, self.manifest["documents"]) for batch in batches]
            self._first_rows = [0, *accumulate(len(batch.document) for batch in self._batches)]
            sums = {
                name: self.manifest[name] + manifest[name]
                for name in ("documents", "skipped", "blocks", "spans", "spans_dropped", "bytes")
            }
            self.manifest = self.manifest | sums
            self.parts.append(step["part"])
        self.deleted |= frozenset(step["deleted"])
        self.fingerprint = step["fingerprint"]
        self.manifest = self.manifest | {"fingerprint": self.fingerprint}
        self.ancestors[self.fingerprint] = len(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedCorpus.open, (self.path,)

    def __len__(self) -> int:
        return self._first_rows[-1]

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows that are not deleted, int64, ascending."""
        return np.delete(np.arange(len(self)), sorted(self.deleted))

    def title(self, row: int) -> str:
        """Title of the block's document."""
        batch, i = self._locate(row)
        return str(batch.columns["title"][i].as_py())

    def text(self, row: int) -> str:
        """Text of the block with leading and trailing white space.

        The concatenated blocks of a document are its text.
        """
        batch, i = self._locate(row)
        return str(batch.columns["text"][i].as_py())

    def title_ids(self, row: int) -> np.ndarray:
        """Wordpieces of the title without special tokens, truncated to half a block."""
        batch, i = self._locate(row)
        return batch.list_values("title_ids", i)

    def text_ids(self, row: int) -> np.ndarray:
        """Wordpieces of the text without special tokens."""
        batch, i = self._locate(row)
        return batch.list_values("text_ids", i)

    def sentence_starts(self, row: int) -> np.ndarray:
        """Offsets into `text_ids` at which sentences begin.

        The first is 0 even if the block begins within a long sentence.
        """
        batch, i = self._locate(row)
        return batch.list_values("sentence_starts", i)

    def spans(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Salient spans: starts, ends and types.

        Starts and ends (exclusive) are offsets into `text_ids`, types are int8 indices into
        `SPAN_TYPES`.
        """
        batch, i = self._locate(row)
        return (
            batch.list_values("span_starts", i),
            batch.list_values("span_ends", i),
            batch.list_values("span_types", i),
        )

    def document(self, row: int) -> int:
        """Index of the block's document in the input."""
        batch, i = self._locate(row)
        return int(batch.document[i])

    def place(self, row: int) -> int:
        """Index of the block in its document."""
        batch, i = self._locate(row)
        return int(batch.place[i])

    def text_hash(self, row: int) -> int:
        """64-bit hash of the text that ignores case and white space: equal for copies."""
        batch, i = self._locate(row)
        return int(batch.text_hash[i])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of wordpieces of title and text of every row, without special tokens."""
        counts = [np.diff(batch.lists["title_ids"][0]) + np.diff(batch.lists["text_ids"][0]) for batch in self._batches]
        return np.concatenate(counts).astype(np.int32)

    @cached_property
    def places(self) -> np.ndarray:
        """`place` of every row; 0 at the beginning of a document."""
        return np.concatenate([batch.place for batch in self._batches])

    def row_of_id(self, block_id: str) -> int:
        """Row of the block with this id. The first call reads all ids into memory.

        Raises KeyError if there is no such block or it is deleted.
        """
        return self._rows[block_id]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {block_id: row for row, block_id in enumerate(self.ids) if row not in self.deleted}

    def _locate(self, row: int) -> tuple[_Batch, int]:
        if not 0 <= row < self._first_rows[-1]:
            raise IndexError(f"row {row} is out of range for a corpus of {self._first_rows[-1]} blocks")
        number = bisect_right(self._first_rows, row) - 1
        return self._batches[number], row - self._first_rows[number]


def _map_folder(path: Path) -> tuple[dict[str, Any], list[pa.RecordBatch]]:
    """Manifest and mapped record batches of one prepared folder."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        state = "is not a finished prepared corpus" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}; run `realm prepare` with the same config first.") from None
    except ValueError as error:
        raise UserError(
            f"{path / MANIFEST} is not valid JSON ({error}); prepare the corpus again in a new folder."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{path / MANIFEST} does not have layout {FORMAT}, which this version reads; "
            "prepare the corpus again in a new folder."
        )
    blocks = path / BLOCKS
    size = blocks.stat().st_size if blocks.is_file() else 0
    if size != manifest["bytes"]:
        raise UserError(
            f"{blocks} has {size} bytes, but its manifest says {manifest['bytes']}; "
            "prepare the corpus again in a new folder."
        )
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(blocks)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except pa.ArrowInvalid as error:
        raise UserError(f"{blocks} is corrupt ({error}); prepare the corpus again in a new folder.") from error
    count = sum(map(len, batches))
    if count != manifest["blocks"]:
        raise UserError(
            f"{blocks} has {count} rows, but its manifest says {manifest['blocks']}; "
            "prepare the corpus again in a new folder."
        )
    return manifest, batches


class _BlockIds(Sequence[str]):
    """Lazy sequence of the ids of a corpus, read from the mapped file."""

    def __init__(self, corpus: PreparedCorpus):
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        batch, i = self._corpus._locate(row)
        return str(batch.columns["id"][i].as_py())

    def __iter__(self) -> Iterator[str]:
        for batch in self._corpus._batches:
            yield from batch.columns["id"].to_pylist()
