"""Cache of salient spans on disk, so that a killed run can continue."""

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from realm.spans.rules import SPAN_TYPES, SalientSpan

if TYPE_CHECKING:
    from realm.spans.tagger import SpanTagger

_SCHEMA = pa.schema(
    [
        ("text_hash", pa.binary(16)),
        ("starts", pa.list_(pa.int32())),
        ("ends", pa.list_(pa.int32())),
        ("types", pa.list_(pa.int8())),
    ]
)


class SpanCache:
    """Cache of salient spans, keyed by tagger and text.

    `folder / tagger.name` contains one Arrow IPC shard per chunk. A shard is published atomically
    (temporary file, fsync, rename) and named by the digest of its content. Shards that do not match
    their name are ignored, so a writer can be killed at any time. Several processes may share a
    folder.
    """

    def __init__(self, folder: Path, tagger: "SpanTagger", chunk_size: int = 10_000):
        """`chunk_size`: number of texts in memory and per shard; a kill loses at most one chunk."""
        self.tagger = tagger
        self.chunk_size = chunk_size
        self.folder = folder / tagger.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards: dict[str, pa.RecordBatch] = {}
        self._keys = np.empty(0, "S16")
        for leftover in self.folder.glob("*.tmp"):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink(missing_ok=True)

    def tag(
        self, texts: Iterable[str], progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[SalientSpan, ...]]:
        """Yield the same as `tagger.tag(texts)`, but tag only texts that are not in the cache.

        `progress(n)` is called after every n further texts.
        """
        self._load_shards()
        texts = iter(texts)
        while chunk := list(islice(texts, self.chunk_size)):
            keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in chunk]
            spans_of = self._look_up(keys)
            missing = {key: text for key, text in zip(keys, chunk, strict=True) if key not in spans_of}
            if progress is not None:
                progress(len(chunk) - len(missing))
            found = {}
            for key, spans in zip(missing, self.tagger.tag(missing.values()), strict=True):
                found[key] = spans
                if progress is not None:
                    progress(1)
            if found:
                self._publish(found)
            spans_of |= found
            yield from (spans_of[key] for key in keys)

    def _load_shards(self) -> None:
        """Load new shards, which other calls, processes or runs may have published."""
        for path in sorted(self.folder.glob("*.arrow")):
            if path.stem not in self._shards and (batch := _read_shard(path)) is not None:
                self._shards[path.stem] = batch
        batches = list(self._shards.values())
        keys = [np.frombuffer(batch["text_hash"].buffers()[1], "S16", len(batch)) for batch in batches]
        all_keys = np.concatenate([np.empty(0, "S16"), *keys])
        order = np.argsort(all_keys, kind="stable")
        self._keys, self._rows = all_keys[order], order
        self._first_rows = np.cumsum([0] + [len(batch) for batch in batches])

    def _look_up(self, keys: list[bytes]) -> dict[bytes, tuple[SalientSpan, ...]]:
        """Spans of those `keys` that are in the cache."""
        if not len(self._keys):
            return {}
        wanted = np.array(keys, "S16")
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        batches = list(self._shards.values())
        spans_of = {}
        for i in np.flatnonzero(self._keys[places] == wanted):
            row = self._rows[places[i]]
            shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            columns = (
                batches[shard][name][int(row - self._first_rows[shard])].as_py() for name in ("starts", "ends", "types")
            )
            spans_of[keys[i]] = tuple(
                SalientSpan(start, end, SPAN_TYPES[kind]) for start, end, kind in zip(*columns, strict=True)
            )
        return spans_of

    def _publish(self, found: dict[bytes, tuple[SalientSpan, ...]]) -> None:
        columns = [
            list(found),
            [[span.start for span in spans] for spans in found.values()],
            [[span.end for span in spans] for spans in found.values()],
            [[SPAN_TYPES.index(span.type) for span in spans] for spans in found.values()],
        ]
        batch = pa.record_batch(columns, schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.arrow")


def _read_shard(path: Path) -> pa.RecordBatch | None:
    """The memory-mapped batch of a shard, or None if its content does not match its name."""
    content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    if hashlib.blake2b(content, digest_size=16).hexdigest() != path.stem:
        return None
    return pa.ipc.open_file(content).get_batch(0)
