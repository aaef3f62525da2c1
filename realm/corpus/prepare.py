"""`realm prepare`: convert documents to a folder of memory-mapped blocks, in parallel.

Preparation can be killed at any time and resumed. Documents are processed in chunks: one process
tokenizes, splits and tags a chunk and publishes it as `shards/000000.arrow`; a later start skips
the finished shards. Finally the shards are concatenated in order, the manifest is written, and the
shards are removed. The result depends only on the input, not on the number of processes or starts.
"""

import hashlib
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from realm.corpus.documents import Document, read_documents
from realm.corpus.formats import format_of, source_files
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.prepared_folder import BLOCKS, FORMAT, SCHEMA, SHARDS, batch_checksums, prepare_again
from realm.corpus.records import BadRecords
from realm.corpus.shards import Chunk, ShardMaker, init_worker, interrupts_left_to_parent, make_in_worker, write_batches
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.runtime.publish import (
    MANIFEST,
    checksum,
    read_json,
    write_file_atomic,
    write_json_atomic,
    write_manifest,
)
from realm.runtime.threads import cores
from realm.spans.tagger import SpanTagger
from realm.text.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_DOCUMENTS = 2_000
CHUNK_CHARACTERS = 4_000_000
"""A chunk ends with the document that reaches either limit. Its size determines the memory of each
process and the work lost when preparation is killed."""
CHARACTERS_PER_WORKER = 4_000_000
"""Minimum work per process with `num_workers` 0, because a process takes seconds to start."""
MIN_BLOCK_TOKENS = 16

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]


def prepare_corpus(
    sources: Sequence[SourceConfig],
    out: Path,
    tokenizer: "PreTrainedTokenizerBase",
    block_tokens: int,
    tagger: SpanTagger,
    num_workers: int,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """Prepare the documents of `sources` in the folder `out` and open the result.

    If `out` is already prepared, compares it with its checksums and opens it. `block_tokens` is the
    maximum length of `[CLS] title [SEP] text [SEP]`. `num_workers`: 0 for one process per CPU
    (fewer for a small corpus), 1 to use only this process; with more, `tagger` is pickled.
    `progress(done, total)` is called with the number of finished documents.

    Raises UserError if `read_documents` does (before anything is written), if `out` contains other
    files, or if it was prepared, completely or partially, from different sources or with a
    different tokenizer, block size or span pipeline.
    """
    if block_tokens < MIN_BLOCK_TOKENS:
        raise UserError(f"block_tokens must be at least {MIN_BLOCK_TOKENS}, got {block_tokens}.")
    if num_workers < 0:
        raise UserError(f"num_workers must be 0 (one per CPU) or more, got {num_workers}.")
    job = _Job(tuple(sources), out, block_tokens, skip_bad)
    inputs = {
        "sources": [identity(source) for source in sources],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "block_tokens": block_tokens,
        "span_pipeline": tagger.name,
        "chunk": [CHUNK_DOCUMENTS, CHUNK_CHARACTERS],
    }
    finished = _open_finished(job, inputs)
    if finished is not None and (skip_bad or not finished.manifest["skipped"]):
        shutil.rmtree(job.shards, ignore_errors=True)
        return finished
    stats = _scan_sources(job, inputs)
    _claim_output(job, inputs)
    # The span cache is outside `out`, so it is reused when the same texts are prepared again with a
    # different tokenizer.
    maker = ShardMaker(job.shards, out.parent / "spans", tokenizer.backend_tokenizer.to_str(), block_tokens, tagger)
    num_missing = sum(not maker.path(number).exists() for number in range(stats.chunks))
    if num_workers == 0:
        num_workers = min(cores(), stats.characters // CHARACTERS_PER_WORKER + 1)
    num_workers = min(num_workers, num_missing)
    _make_shards(job, maker, num_workers, stats.documents, progress)
    blocks, spans, dropped = _assemble(job, [maker.path(number) for number in range(stats.chunks)])
    manifest = {
        "format": FORMAT,
        "fingerprint": stats.fingerprint,
        "inputs": inputs,
        "tokenizer": inputs["tokenizer"],
        "block_tokens": block_tokens,
        "span_pipeline": tagger.name,
        "documents": stats.documents,
        "skipped": stats.skipped,
        "blocks": blocks,
        "spans": spans,
        "spans_dropped": dropped,
        "bytes": (out / BLOCKS).stat().st_size,
        "batches": batch_checksums(out / BLOCKS),
    }
    write_manifest(out, manifest, [BLOCKS])
    shutil.rmtree(job.shards)
    return PreparedCorpus.open(out)


def identity(source: SourceConfig) -> dict[str, Any]:
    """Identity of a source, independent of its path: checksums of its files and its settings.

    A dataset on the hub is identified by its name.
    """
    digests = [checksum(file) for file in source_files(source)]
    settings = {name: value for name, value in asdict(source).items() if name not in ("path", "format")}
    return {"format": format_of(source), "content": digests or source.path, **settings}


@dataclass(frozen=True)
class _Job:
    sources: tuple[SourceConfig, ...]
    out: Path
    block_tokens: int
    skip_bad: bool

    @property
    def shards(self) -> Path:
        return self.out / SHARDS

    def chunks(self, report: BadRecords | None = None) -> Iterator[Chunk]:
        number, first_document = 0, 0
        documents: list[Document] = []
        characters = 0
        for document in read_documents(self.sources, self.skip_bad, report):
            documents.append(document)
            characters += len(document.text)
            if len(documents) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
                yield Chunk(number, first_document, documents)
                number, first_document, documents, characters = number + 1, first_document + len(documents), [], 0
        if documents:
            yield Chunk(number, first_document, documents)


@dataclass
class _SourceStats:
    """Statistics and fingerprint of the sources, from a first complete pass."""

    documents: int = 0
    chunks: int = 0
    characters: int = 0
    skipped: int = 0
    fingerprint: str = ""


def _scan_sources(job: _Job, inputs: dict[str, Any]) -> _SourceStats:
    stats, report = _SourceStats(), BadRecords()
    digest = hashlib.sha256(f"{inputs['tokenizer']} {job.block_tokens}".encode())
    for chunk in job.chunks(report):
        stats.chunks += 1
        stats.documents += len(chunk.documents)
        for document in chunk.documents:
            stats.characters += len(document.text)
            for part in document:
                content = part.encode()
                digest.update(len(content).to_bytes(8, "little") + content)
    stats.skipped, stats.fingerprint = report.total, digest.hexdigest()
    if report.total:
        logger.warning("%s", report)
    return stats


def _open_finished(job: _Job, inputs: dict[str, Any]) -> PreparedCorpus | None:
    if not (job.out / MANIFEST).exists():
        return None
    corpus = PreparedCorpus.open(job.out)
    corpus.check()
    _check_same_inputs(job, "a corpus that was prepared", corpus.manifest["inputs"], inputs)
    return corpus


def _claim_output(job: _Job, inputs: dict[str, Any]) -> None:
    """Create the output folder, or check that an interrupted preparation had the same inputs."""
    record = job.shards / "inputs.json"
    if record.exists():
        old = read_json(record, f"remove {job.shards} to prepare from the beginning")
        _check_same_inputs(job, "a corpus that was partially prepared", old, inputs)
        return
    try:
        foreign = [entry.name for entry in job.out.iterdir() if entry != job.shards] if job.out.exists() else []
    except NotADirectoryError:
        raise UserError(f"{job.out} is a file; choose a folder for the prepared corpus.") from None
    if BLOCKS in foreign:
        raise UserError(
            f"{job.out / MANIFEST} is missing: {job.out} was copied only partially; {prepare_again(job.out)}."
        )
    if foreign:
        raise UserError(
            f"{job.out} is not empty and does not contain a prepared corpus (found {foreign[0]}); "
            "choose another folder."
        )
    job.shards.mkdir(parents=True, exist_ok=True)
    write_json_atomic(record, inputs)


def _check_same_inputs(job: _Job, content: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise UserError naming every input that differs; `content` says what the folder contains."""
    names = {
        "sources": "documents",
        "tokenizer": "tokenizer",
        "block_tokens": "block_tokens",
        "span_pipeline": "span pipeline",
        "chunk": "version of realm",
    }
    differing = [
        name + (f" ({old.get(key)}, now {new[key]})" if key in ("block_tokens", "span_pipeline") else "")
        for key, name in names.items()
        if old.get(key) != new[key]
    ]
    if differing:
        raise UserError(
            f"{job.out} contains {content} from different inputs: {', '.join(differing)}; "
            "remove the folder or choose another one."
        )


def _make_shards(job: _Job, maker: ShardMaker, num_workers: int, num_documents: int, progress: Progress | None) -> None:
    """Make the missing shards, in this process or in `num_workers` processes.

    At most two chunks per process are queued in memory.
    """
    done = 0

    def report(documents: int) -> None:
        nonlocal done
        done += documents
        if progress is not None:
            progress(done, num_documents)

    if num_workers <= 1:
        for chunk in job.chunks():
            if not maker.path(chunk.number).exists():
                maker.make(chunk)
            report(len(chunk.documents))
        return
    # Not forked: a fork would copy locks held by threads of the parent (torch, tokenizers).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=init_worker, initargs=(maker,))
    waiting: set[Future[int]] = set()
    try:
        for chunk in job.chunks():
            if maker.path(chunk.number).exists():
                report(len(chunk.documents))
                continue
            with interrupts_left_to_parent():  # submitting may start a process
                waiting.add(pool.submit(make_in_worker, chunk))
            if len(waiting) >= 2 * num_workers:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    report(future.result())
        for future in as_completed(waiting):
            report(future.result())
    except BrokenProcessPool as error:
        raise UserError(
            f"a process preparing {job.out} died (out of memory?); rerun with a smaller corpus.num_workers to continue."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _opened(shard: Path) -> Iterator[pa.RecordBatchFileReader]:
    """Open a finished shard. Raises UserError if it is damaged."""
    try:
        with pa.memory_map(str(shard)) as file, pa.ipc.open_file(file) as reader:
            yield reader
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{shard} is corrupt ({error}); remove it, and rerun the command to prepare it again."
        ) from error


def _assemble(job: _Job, shards: list[Path]) -> tuple[int, int, int]:
    """Concatenate the shards, one in memory at a time.

    Returns the numbers of blocks, spans and dropped spans.
    """
    blocks = spans = dropped = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal blocks, spans, dropped
        for shard in shards:
            with _opened(shard) as reader:
                dropped += int(reader.schema.metadata[b"spans_dropped"])
                for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)):
                    blocks += len(batch)
                    spans += len(batch.column("span_starts").values)
                    yield batch.replace_schema_metadata(None)

    # Written to the folder of the shards, so that leftovers of a kill are removed with them.
    assembled = job.shards / BLOCKS
    write_file_atomic(assembled, partial(write_batches, SCHEMA, batches()))
    assembled.replace(job.out / BLOCKS)
    return blocks, spans, dropped
