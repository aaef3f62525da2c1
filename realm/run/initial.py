"""The models that a stage starts from: an earlier stage's, those of another run (`init_from` in
the config), or as the config builds them."""

from pathlib import Path

import torch

from realm.errors import UserError
from realm.models.reader import Reader, build_reader, load_reader
from realm.models.retriever import build_retriever, load_retriever, save_retriever
from realm.run.folder import Run
from realm.runtime.distributed import on_rank_zero
from realm.runtime.publish import published
from realm.runtime.telemetry import console
from realm.text.tokenizer import load_tokenizer


def initial_retriever(run: Run, stage: str, learned: bool = False) -> Path:
    """Folder of the retriever that stage `stage` starts from: the newest of an earlier stage, else
    `build_initial_retriever`.

    Raises UserError with `learned` where that would be random weights.
    """
    path = run.latest("retriever", before=stage)
    if path is None and learned and run.config.init_from.retriever is None and run.config.retriever.bert.path is None:
        raise UserError(
            f"run {run.folder} has no trained retriever yet; run `realm ict` or `realm pretrain` first, or name one in init_from.retriever."
        )
    return path or build_initial_retriever(run)


def build_initial_retriever(run: Run) -> Path:
    """Folder of the retriever before any training in this run: a copy of another run's, a
    checkpoint off the shelf, or random weights.

    Raises UserError where `init_from.retriever` is no saved retriever or has another vocabulary
    than the corpus.
    """
    folder, source = run.folder / "initial" / "retriever", run.config.init_from.retriever

    def build() -> None:
        if folder.exists():
            return
        torch.manual_seed(run.config.seed)
        if source is None:
            built = build_retriever(run.config.retriever, run.tokenizer)
        else:
            _check_saved("retriever", source, "retriever.json")
            built, tokenizer = load_retriever(Path(source))
            _check_vocabulary(run, "retriever", source, tokenizer.get_vocab())
        with published(folder) as temporary:
            save_retriever(
                built,
                run.tokenizer,
                temporary,
                run.config.retriever.max_query_tokens,
                run.config.retriever.max_passage_tokens,
            )

    on_rank_zero(build)
    return folder


def initial_reader(run: Run, stage: str, learned: bool = False) -> Reader:
    """The reader that stage `stage` starts from: the newest of an earlier stage, else
    `build_initial_reader`.

    Raises UserError with `learned` where that would be random weights.
    """
    if path := run.latest("reader", before=stage):
        return load_reader(path, run.config.reader)
    if learned and run.config.init_from.reader is None and run.config.reader.bert.path is None:
        raise UserError(
            f"run {run.folder} has no trained reader yet; run `realm reader-pretraining` or `realm pretrain` first, or name one in init_from.reader."
        )
    return build_initial_reader(run)


def build_initial_reader(run: Run) -> Reader:
    """The reader before any training in this run: another run's, or as the config builds it.

    Raises UserError where `init_from.reader` is no saved reader, has another vocabulary than the
    corpus, or cannot read as the config says.
    """
    if source := run.config.init_from.reader:
        _check_saved("reader", source, "reader.json")
        reader = load_reader(Path(source), run.config.reader)
        _check_vocabulary(run, "reader", source, load_tokenizer(source).get_vocab())
        return reader
    reader, notes = build_reader(run.config.reader, run.tokenizer)
    for line in notes:
        console.print(f"  note: {line}")
    return reader


def _check_saved(part: str, source: str, file: str) -> None:
    if not (Path(source) / file).is_file():
        raise UserError(
            f"init_from.{part} {source!r} is no saved {part} (no {file} there); name one such as RUN/pretrain/model/{part}."
        )


def _check_vocabulary(run: Run, part: str, source: str, vocabulary: dict[str, int]) -> None:
    if vocabulary != run.tokenizer.get_vocab():
        raise UserError(
            f"init_from.{part} {source!r} has another vocabulary than the corpus {run.prepared}; prepare the corpus with tokenizer.path: {source}."
        )
