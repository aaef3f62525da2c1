"""Conversion of a chunk of documents to a shard: tokenize, split into blocks, tag, write.

Runs in the worker processes of `realm.corpus.prepare`.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from realm.corpus.documents import Document
from realm.corpus.prepared_folder import SCHEMA
from realm.errors import UserError
from realm.runtime.publish import write_file_atomic
from realm.spans.cache import SpanCache
from realm.spans.rules import SPAN_TYPES
from realm.spans.tagger import SpanTagger
from realm.text.blocks import NUM_SPECIAL_TOKENS, align_spans, cut_blocks, sentence_bounds, text_hash
from realm.text.tokenizer import tokenize


class Chunk(NamedTuple):
    """Chunk `number`: consecutive documents of the input, beginning with `first_document`."""

    number: int
    first_document: int
    documents: list[Document]


class ShardMaker:
    """Converts chunks to shards; pickled and sent to the worker processes."""

    def __init__(self, shards: Path, span_cache: Path, tokenizer_json: str, block_tokens: int, tagger: SpanTagger):
        self.shards = shards
        self.span_cache = span_cache
        self.tokenizer_json = tokenizer_json
        self.block_tokens = block_tokens
        self.tagger = tagger

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer_json)

    @cached_property
    def is_word_start_V(self) -> np.ndarray:
        """Whether each of the V wordpieces of the vocabulary begins a word."""
        vocabulary = self.tokenizer.get_vocab()
        is_word_start_V = np.ones(max(vocabulary.values()) + 1, dtype=bool)
        for wordpiece, i in vocabulary.items():
            is_word_start_V[i] = not wordpiece.startswith("##")
        return is_word_start_V

    def path(self, chunk_number: int) -> Path:
        return self.shards / f"{chunk_number:06d}.arrow"

    def make(self, chunk: Chunk) -> int:
        """Tokenize, split and tag the documents of `chunk` and publish the shard.

        Returns the number of documents. Raises UserError if a text has no wordpieces.
        """
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        pieces = []
        titles = tokenize(self.tokenizer, [document.title for document in chunk.documents])
        texts = tokenize(self.tokenizer, [document.text for document in chunk.documents])
        for row, (document, (title_ids, _), (text_ids, offset_L2)) in enumerate(
            zip(chunk.documents, titles, texts, strict=True)
        ):
            if not len(text_ids):
                raise UserError(
                    f"the text of document {document.id!r} has no wordpieces, because the tokenizer drops all its "
                    "characters; remove the document."
                )
            room = self.block_tokens - NUM_SPECIAL_TOKENS
            title_ids = title_ids[: room // 2]
            bounds = sentence_bounds(document.text)
            blocks = cut_blocks(
                len(document.text), offset_L2, self.is_word_start_V[text_ids], bounds, room - len(title_ids)
            )
            for place, block in enumerate(blocks):
                text = document.text[block.start : block.end]
                columns["id"].append(document.id if len(blocks) == 1 else f"{document.id}#{place}")
                columns["document"].append(chunk.first_document + row)
                columns["place"].append(place)
                columns["title"].append(document.title)
                columns["text"].append(text)
                columns["title_ids"].append(title_ids)
                columns["text_ids"].append(text_ids[block.first : block.last])
                columns["sentence_starts"].append(block.sentence_starts)
                columns["text_hash"].append(text_hash(text))
                pieces.append((offset_L2[block.first : block.last] - block.start, block.sentence_starts))
        dropped = 0
        # One cache folder per chunk, because opening a cache reads all its keys.
        cache = SpanCache(self.span_cache / f"{chunk.number:06d}", self.tagger)
        for spans, (offset_L2, sentence_starts) in zip(cache.tag(columns["text"]), pieces, strict=True):
            aligned = list(align_spans(offset_L2, sentence_starts, spans))
            dropped += len(spans) - len(aligned)
            columns["span_starts"].append([start for start, _, _ in aligned])
            columns["span_ends"].append([end for _, end, _ in aligned])
            columns["span_types"].append([SPAN_TYPES.index(kind) for _, _, kind in aligned])
        schema = SCHEMA.with_metadata({"spans_dropped": str(dropped)})
        batch = pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
        write_file_atomic(self.path(chunk.number), partial(write_batches, schema, [batch]))
        return len(chunk.documents)


_maker: ShardMaker


@contextmanager
def interrupts_left_to_parent() -> Iterator[None]:
    """Processes that are started in the block never receive Ctrl-C; this process does after it.

    Blocked signals are inherited, so that Ctrl-C does not interrupt the imports of a new process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(maker: ShardMaker) -> None:
    """Initialize a worker process.

    Tokenizer threads are disabled, and the worker exits with its parent.
    """
    global _maker
    _maker = maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process ends; a worker would otherwise outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def make_in_worker(chunk: Chunk) -> int:
    """Call `ShardMaker.make` in a process that was initialized by `init_worker`."""
    return _maker.make(chunk)


def write_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: IO[bytes]) -> None:
    with pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
