"""The prepared corpus: memory-mapped blocks.

A *document* is one record of the input. A *block* consists of consecutive sentences of one document
and is the unit that is retrieved and read.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from realm.corpus.prepared_folder import (
    ADDITIONS,
    Batch,
    checked_batches,
    map_folder,
    prepare_again,
    read_folder_manifest,
)
from realm.errors import UserError
from realm.runtime.publish import check_files, read_json


class PreparedCorpus:
    """The blocks of a prepared corpus, read-only and memory-mapped.

    Processes that open the same folder share its memory. Rows are in the order of the input. Arrays
    are views of the mapped file, int32 unless stated otherwise.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], batches: list[pa.RecordBatch], held_out_share: float = 0.0
    ):
        self.path = path
        self.held_out_share = held_out_share
        """Share of the documents that are held out (see `held_out_rows`)."""
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
        self._batches = checked_batches(path, manifest, batches, 0)
        self._first_rows = [0, *accumulate(len(batch) for batch in batches)]

    @classmethod
    def open(cls, path: Path | str, held_out_share: float = 0.0) -> "PreparedCorpus":
        """Map the folder that `realm.corpus.prepare.prepare_corpus` wrote, and its additions.

        The sizes of all files are checked here, the content of each record batch (about 2,000
        documents) when a row of it is first read; the latter takes about 1 s per GB. Raises
        UserError if the corpus is missing, unfinished or damaged.
        """
        path = Path(path)
        manifest, batches = map_folder(path)
        corpus = cls(path, manifest, batches, held_out_share)
        for file in sorted((path / ADDITIONS).glob("step-*.json")):
            corpus._apply_step(file)
        return corpus

    def check(self) -> None:
        """Compare the whole content of all files with their checksums.

        Raises PublishError naming the first file that is damaged. Corpora of earlier versions have
        no checksums; their sizes are checked on opening.
        """
        for part in (self.path, *(self.path / ADDITIONS / name for name in self.parts)):
            manifest = read_folder_manifest(part)
            if "files" in manifest:
                check_files(part, manifest, prepare_again(part))

    @property
    def has_checksums(self) -> bool:
        """Whether checksums were recorded; corpora of earlier versions have none."""
        return "batches" in self.manifest

    def _apply_step(self, file: Path) -> None:
        step = read_json(file, prepare_again(self.path))
        if not isinstance(step, dict) or step.get("parent") != self.fingerprint:
            raise UserError(f"{file} does not belong to this corpus; restore {file.parent} from a copy, or remove it.")
        if step["part"] is not None:
            part = self.path / ADDITIONS / step["part"]
            manifest, batches = map_folder(part)
            self._batches += checked_batches(part, manifest, batches, self.manifest["documents"])
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
        return PreparedCorpus.open, (self.path, self.held_out_share)

    def __len__(self) -> int:
        return self._first_rows[-1]

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows that are not deleted, int64, ascending."""
        return np.delete(np.arange(len(self)), sorted(self.deleted))

    @cached_property
    def held_out_rows(self) -> np.ndarray:
        """Rows of held-out documents, int64, ascending; never deleted ones.

        Their sentences are never trained on. A document is held out if the hash of its first block
        is below `held_out_share` of all hashes, whatever other documents there are.
        """
        rows: np.ndarray = self.rows[self._is_held_out[self.rows]]
        return rows

    @cached_property
    def training_rows(self) -> np.ndarray:
        """Rows that sentences and queries may be drawn from: not deleted and not held out,
        int64."""
        rows: np.ndarray = self.rows[~self._is_held_out[self.rows]]
        return rows

    @cached_property
    def _is_held_out(self) -> np.ndarray:
        """Whether the document of each row is held out."""
        if not self.held_out_share:
            return np.zeros(len(self), dtype=bool)
        document = np.cumsum(self.places == 0) - 1
        first_hash = self.text_hashes[self.places == 0]
        is_held_out: np.ndarray = (first_hash < np.uint64(self.held_out_share * 2**64))[document]
        return is_held_out

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
        lists = [batch.checked().lists for batch in self._batches]
        counts = [np.diff(columns["title_ids"][0]) + np.diff(columns["text_ids"][0]) for columns in lists]
        return np.concatenate(counts).astype(np.int32)

    @cached_property
    def places(self) -> np.ndarray:
        """`place` of every row; 0 at the beginning of a document."""
        return np.concatenate([batch.checked().place for batch in self._batches])

    @cached_property
    def text_hashes(self) -> np.ndarray:
        """`text_hash` of every row, uint64."""
        return np.concatenate([batch.checked().text_hash for batch in self._batches])

    def row_of_id(self, block_id: str) -> int:
        """Row of the block with this id. The first call reads all ids into memory.

        Raises KeyError if there is no such block or it is deleted.
        """
        return self._rows[block_id]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {block_id: row for row, block_id in enumerate(self.ids) if row not in self.deleted}

    def _locate(self, row: int) -> tuple[Batch, int]:
        if not 0 <= row < self._first_rows[-1]:
            raise IndexError(f"row {row} is out of range for a corpus of {self._first_rows[-1]} blocks")
        number = bisect_right(self._first_rows, row) - 1
        return self._batches[number].checked(), row - self._first_rows[number]


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
            yield from batch.checked().columns["id"].to_pylist()
