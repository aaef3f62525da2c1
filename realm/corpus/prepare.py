"""`realm prepare`: the documents of some sources become a folder of memory-mapped blocks, in
parallel, and may be killed at any moment.

Documents are taken in chunks. Each chunk is tokenised, cut and tagged by one process, which
publishes it as `shards/000000.arrow`; a second start finds the finished shards and goes on behind
them. The shards are then put together in order, the manifest is written, and the shards are
removed. What comes out depends on the input alone, not on the number of processes or of starts.
"""

import hashlib
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from realm.corpus.documents import Document, read_documents
from realm.corpus.formats import format_of, source_files
from realm.corpus.prepared import BLOCKS, FORMAT, MANIFEST, SCHEMA, PreparedCorpus
from realm.corpus.shards import Chunk, ShardMaker, make_in_process, start_process, write_batches
from realm.corpus.sources import SourceConfig
from realm.corpus.text_files import BadRecords
from realm.errors import UserError
from realm.runtime.publish import checksum, write_file_atomic, write_json_atomic
from realm.runtime.threads import cores
from realm.spans.tagger import SpanTagger
from realm.text.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_DOCUMENTS = 2_000
CHUNK_CHARACTERS = 4_000_000
"""A chunk ends with the document that reaches either bound: what is in memory for each process,
and what a kill costs."""
CHARACTERS_PER_WORKER = 4_000_000
"""A process takes seconds to start: with `num_workers` 0 it is not started for less."""
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
    """Prepares the documents of `sources` in the folder `out` and opens it; at once where that was
    done already.

    `block_tokens` bounds `[CLS] title [SEP] text [SEP]`. `num_workers` is 0 for one process per CPU
    (fewer for a small corpus), 1 for none beside this one; with more, `tagger` is sent to them by
    pickle. `progress(done, total)` is told how many documents are done.

    Raises UserError for everything `read_documents` refuses, before anything is written, and where
    `out` holds something else, or was begun from other sources, tokenizer, block size or span
    pipeline.
    """
    if block_tokens < MIN_BLOCK_TOKENS:
        raise UserError(f"block_tokens must be at least {MIN_BLOCK_TOKENS}, got {block_tokens}")
    if num_workers < 0:
        raise UserError(f"num_workers must be 0 (one per CPU) or more, got {num_workers}")
    job = _Job(tuple(sources), out, block_tokens, skip_bad)
    inputs = {
        "sources": [identity(source) for source in sources],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "block_tokens": block_tokens,
        "span_pipeline": tagger.name,
        "chunk": [CHUNK_DOCUMENTS, CHUNK_CHARACTERS],
    }
    finished = _finished(job, inputs)
    if finished is not None and (skip_bad or not finished.manifest["skipped"]):
        shutil.rmtree(job.shards, ignore_errors=True)
        return finished
    survey = _survey(job, inputs)
    _begin(job, inputs)
    # The span cache stands beside `out`: it also serves when the same texts are prepared again with
    # another tokenizer.
    maker = ShardMaker(job.shards, out.parent / "spans", tokenizer.backend_tokenizer.to_str(), block_tokens, tagger)
    num_missing = sum(not maker.path(number).exists() for number in range(survey.chunks))
    if num_workers == 0:
        num_workers = min(cores(), survey.characters // CHARACTERS_PER_WORKER + 1)
    num_workers = min(num_workers, num_missing)
    _run(job, maker, num_workers, survey.documents, progress)
    blocks, spans, dropped = _assemble(job, [maker.path(number) for number in range(survey.chunks)])
    manifest = {
        "format": FORMAT,
        "fingerprint": survey.fingerprint,
        "inputs": inputs,
        "tokenizer": inputs["tokenizer"],
        "block_tokens": block_tokens,
        "span_pipeline": tagger.name,
        "documents": survey.documents,
        "skipped": survey.skipped,
        "blocks": blocks,
        "spans": spans,
        "spans_dropped": dropped,
        "bytes": (out / BLOCKS).stat().st_size,
    }
    write_json_atomic(out / MANIFEST, manifest)
    shutil.rmtree(job.shards)
    return PreparedCorpus.open(out)


def identity(source: SourceConfig) -> dict[str, Any]:
    """What a source is, wherever it lies: its content, and how it is read. Of a hub's data set,
    its name."""
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
        return self.out / "shards"

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
class _Survey:
    """What the first reading of the source, from end to end, found."""

    documents: int = 0
    chunks: int = 0
    characters: int = 0
    skipped: int = 0
    fingerprint: str = ""


def _survey(job: _Job, inputs: dict[str, Any]) -> _Survey:
    survey, report = _Survey(), BadRecords()
    digest = hashlib.sha256(f"{inputs['tokenizer']} {job.block_tokens}".encode())
    for chunk in job.chunks(report):
        survey.chunks += 1
        survey.documents += len(chunk.documents)
        for document in chunk.documents:
            survey.characters += len(document.text)
            for part in document:
                content = part.encode()
                digest.update(len(content).to_bytes(8, "little") + content)
    survey.skipped, survey.fingerprint = report.total, digest.hexdigest()
    if report.total:
        logger.warning("%s", report)
    return survey


def _finished(job: _Job, inputs: dict[str, Any]) -> PreparedCorpus | None:
    if not (job.out / MANIFEST).exists():
        return None
    corpus = PreparedCorpus.open(job.out)
    _refuse_other(job, "holds a corpus prepared", corpus.manifest["inputs"], inputs)
    return corpus


def _begin(job: _Job, inputs: dict[str, Any]) -> None:
    """Takes possession of the folder, or checks that what was begun there is the same work."""
    record = job.shards / "inputs.json"
    if record.exists():
        _refuse_other(job, "holds the beginnings of a corpus prepared", json.loads(record.read_bytes()), inputs)
        return
    try:
        foreign = [entry.name for entry in job.out.iterdir() if entry != job.shards] if job.out.exists() else []
    except NotADirectoryError:
        raise UserError(f"{job.out} is a file; give a folder to prepare the corpus in") from None
    if foreign:
        raise UserError(f"{job.out} is not empty and holds no prepared corpus ({foreign[0]}); give another folder")
    job.shards.mkdir(parents=True, exist_ok=True)
    write_json_atomic(record, inputs)


def _refuse_other(job: _Job, what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = {
        "sources": "source of documents",
        "tokenizer": "tokenizer",
        "block_tokens": "block_tokens",
        "span_pipeline": "span pipeline",
        "chunk": "version of this program",
    }
    differing = [
        name + (f" ({old.get(key)}, now {new[key]})" if key in ("block_tokens", "span_pipeline") else "")
        for key, name in names.items()
        if old.get(key) != new[key]
    ]
    if differing:
        raise UserError(
            f"{job.out} {what} with another {' and another '.join(differing)}; remove it or give another folder"
        )


def _run(job: _Job, maker: ShardMaker, num_workers: int, num_documents: int, progress: Progress | None) -> None:
    """Makes the missing shards, here or in `num_workers` processes; at most two chunks for each
    wait in memory."""
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
    # Started anew, never forked: the parent may have threads (torch, tokenizers) whose locks a fork
    # would copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_process, initargs=(maker,))
    waiting: set[Future[int]] = set()
    try:
        for chunk in job.chunks():
            if maker.path(chunk.number).exists():
                report(len(chunk.documents))
                continue
            waiting.add(pool.submit(make_in_process, chunk))
            if len(waiting) >= 2 * num_workers:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    report(future.result())
        for future in as_completed(waiting):
            report(future.result())
    except BrokenProcessPool as error:
        raise UserError(
            f"a process preparing {job.out} died (out of memory?); start again with fewer num_workers to go on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _assemble(job: _Job, shards: list[Path]) -> tuple[int, int, int]:
    """Puts the shards together in order, one in memory at a time; returns the numbers of blocks,
    spans and spans dropped."""
    blocks = spans = dropped = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal blocks, spans, dropped
        for shard in shards:
            with pa.memory_map(str(shard)) as file, pa.ipc.open_file(file) as reader:
                dropped += int(reader.schema.metadata[b"spans_dropped"])
                for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)):
                    blocks += len(batch)
                    spans += len(batch.column("span_starts").values)
                    yield batch.replace_schema_metadata(None)

    # Written among the shards, so that what a kill leaves is removed with them.
    assembled = job.shards / BLOCKS
    write_file_atomic(assembled, partial(write_batches, SCHEMA, batches()))
    assembled.replace(job.out / BLOCKS)
    return blocks, spans, dropped
