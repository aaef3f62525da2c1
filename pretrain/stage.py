"""What the pretraining stages share: opening a run, its models and its batch maker; ending a stage."""

from pathlib import Path

from index.frozen import start_retriever
from pretrain.data import BatchMaker
from realm.publish import published
from realm.ranks import is_main
from realm.reader import Reader, build_reader, load_reader, save_reader
from realm.retriever import Retriever, save_retriever
from realm.run import Run
from realm.telemetry import console


def batch_maker(run: Run) -> BatchMaker:
    """Batches as the run's config says."""
    retriever, reader = run.config.retriever, run.config.reader
    return BatchMaker(
        run.passages, run.wordpieces, retriever.max_query_tokens, retriever.max_passage_tokens, reader.max_tokens, run.config.pretrain.reader_buckets
    )


def initial_retriever(run: Run, stage: str) -> Path:
    """Folder of the retriever that stage `stage` starts from: the newest of an earlier stage, else as the config builds it."""
    return run.latest("retriever", before=stage) or start_retriever(run)


def initial_reader(run: Run, stage: str) -> Reader:
    """The reader that stage `stage` starts from."""
    path = run.latest("reader", before=stage)
    if path:
        return load_reader(path)
    reader, notes = build_reader(run.config.reader, run.tokenizer)
    for line in notes:
        console.print(f"  note: {line}")
    return reader


def save_models(run: Run, stage: str, seconds: float, retriever: Retriever | None = None, reader: Reader | None = None) -> None:
    """Publish the stage's result, all at once: the stage has ended."""
    if not is_main():
        return
    with published(run.model(stage)) as folder:
        if retriever is not None:
            export_retriever(run, retriever, folder / "retriever")
        if reader is not None:
            save_reader(reader, run.tokenizer, folder / "reader")
        (folder / "seconds.txt").write_text(f"{seconds:.3f}\n")


def export_retriever(run: Run, retriever: Retriever, folder: Path) -> None:
    """Write a retriever with the run's tokenizer and lengths."""
    save_retriever(retriever, run.tokenizer, folder, run.config.retriever.max_query_tokens, run.config.retriever.max_passage_tokens)
