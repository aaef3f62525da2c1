"""The models that a stage starts from.

These are the models of an earlier stage, of another run (`init_from`), or those that the config
describes.
"""

from pathlib import Path

import torch

from realm.errors import UserError
from realm.models.reader import Reader, build_reader, load_reader
from realm.models.retriever import build_retriever
from realm.models.retriever_files import load_retriever, save_retriever
from realm.run.folder import Run
from realm.runtime.distributed import on_rank_zero
from realm.runtime.publish import published
from realm.runtime.telemetry import log_line
from realm.text.tokenizer import load_tokenizer
from realm.training.streams import RunStream, run_seed


def initial_retriever(run: Run, stage: str, learned: bool = False) -> Path:
    """Folder of the retriever that a stage starts from.

    It is that of the last finished stage before it, or of `build_initial_retriever`. With
    `learned`, raises UserError instead of returning random weights.
    """
    path = run.latest("retriever", before=stage)
    if path is None and learned and run.config.init_from.retriever is None and run.config.retriever.bert.path is None:
        raise UserError(
            f"run {run.folder} has no trained retriever yet; run `realm ict` or `realm pretrain` first, or set "
            "init_from.retriever."
        )
    return path or build_initial_retriever(run)


def build_initial_retriever(run: Run) -> Path:
    """Folder of the retriever before any training in this run; built if it does not exist.

    It is a copy of another run's retriever, a pretrained checkpoint, or randomly initialized.
    Raises UserError if `init_from.retriever` is not a saved retriever, or has a different
    vocabulary than the corpus.
    """
    folder, source = run.folder / "initial" / "retriever", run.config.init_from.retriever

    def build() -> None:
        if folder.exists():
            return
        torch.manual_seed(run_seed(run.config.seed, RunStream.ICT))
        if source is None:
            built = build_retriever(run.config.retriever, run.tokenizer)
        else:
            _check_saved("retriever", source)
            built, tokenizer = load_retriever(Path(source))
            _check_vocabulary(run, "retriever", source, tokenizer.get_vocab())
        config = run.config.retriever
        with published(folder) as temporary:
            save_retriever(built, run.tokenizer, temporary, config.max_query_tokens, config.max_passage_tokens)

    on_rank_zero(build)
    return folder


def initial_reader(run: Run, stage: str, learned: bool = False) -> Reader:
    """The reader that a stage starts from.

    It is that of the last finished stage before it, or of `build_initial_reader`. With `learned`,
    raises UserError instead of returning random weights.
    """
    if path := run.latest("reader", before=stage):
        return load_reader(path, run.config.reader)
    if learned and run.config.init_from.reader is None and run.config.reader.bert.path is None:
        raise UserError(
            f"run {run.folder} has no trained reader yet; run `realm reader-pretraining` or `realm pretrain` first, "
            "or set init_from.reader."
        )
    return build_initial_reader(run)


def build_initial_reader(run: Run) -> Reader:
    """The reader before any training in this run: another run's, or as the config describes it.

    Raises UserError if `init_from.reader` is not a saved reader, has a different vocabulary than
    the corpus, or cannot be adapted to the config.
    """
    if source := run.config.init_from.reader:
        _check_saved("reader", source)
        reader = load_reader(Path(source), run.config.reader)
        _check_vocabulary(run, "reader", source, load_tokenizer(source).get_vocab())
        return reader
    reader, notes = build_reader(run.config.reader, run.tokenizer)
    for line in notes:
        log_line(f"note: {line}")
    return reader


def check_init_from(run: Run) -> None:
    """Raise UserError if `init_from` names a folder that is not a saved model."""
    for part, source in vars(run.config.init_from).items():
        if source is not None:
            _check_saved(part, source)


def _check_saved(part: str, source: str) -> None:
    if not (Path(source) / f"{part}.json").is_file():
        raise UserError(
            f"init_from.{part} {source!r} is not a saved {part} (it has no {part}.json); "
            f"give one such as RUN/pretrain/model/{part}."
        )


def _check_vocabulary(run: Run, part: str, source: str, vocabulary: dict[str, int]) -> None:
    if vocabulary != run.tokenizer.get_vocab():
        raise UserError(
            f"init_from.{part} {source!r} has a different vocabulary than the corpus {run.prepared}; "
            f"prepare the corpus with tokenizer.path: {source}."
        )
