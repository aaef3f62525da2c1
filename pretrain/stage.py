"""What the pretraining stages share: the models they start from, and their batch maker."""

from pathlib import Path

from index.frozen import start_retriever
from pretrain.data import BatchMaker
from realm.reader import Reader, build_reader, load_reader
from realm.run import Run
from realm.telemetry import console


def batch_maker(run: Run) -> BatchMaker:
    """Batches as the run's config says."""
    retriever, reader = run.config.retriever, run.config.reader
    return BatchMaker(
        run.contexts, run.wordpieces, retriever.max_query_tokens, retriever.max_passage_tokens, reader.max_tokens, run.config.pretrain.reader_buckets
    )


def initial_retriever(run: Run, stage: str) -> Path:
    """Folder of the retriever that stage `stage` starts from: the newest of an earlier stage, else as the config builds it."""
    return run.latest("retriever", before=stage) or start_retriever(run)


def initial_reader(run: Run, stage: str) -> Reader:
    """The reader that stage `stage` starts from."""
    path = run.latest("reader", before=stage)
    if path:
        return load_reader(path, run.config.reader)
    reader, notes = build_reader(run.config.reader, run.tokenizer)
    for line in notes:
        console.print(f"  note: {line}")
    return reader
