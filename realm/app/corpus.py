"""`realm prepare` and `realm index add`: prepare documents, and add or remove them later."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from index.frozen import FROZEN
from index.fusion import Fusion
from index.refresh import refresh
from realm.corpus.documents import read_documents
from realm.corpus.formats import count_ignored, format_of
from realm.corpus.growth import grow_corpus
from realm.corpus.prepare import prepare_corpus
from realm.corpus.prepared_folder import ADDITIONS
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.run.config import RealmConfig
from realm.run.folder import BUILTIN, Run, source_path
from realm.runtime.lock import locked
from realm.runtime.publish import MANIFEST
from realm.runtime.telemetry import log_line, progress
from realm.runtime.versions import Lineage
from realm.spans.tagger import SpanTagger
from realm.text.tokenizer import load_or_train_tokenizer


def prepare(config: RealmConfig, skip_bad: bool = False) -> None:
    """Prepare the passages and statements of a config, unless they are prepared already.

    `skip_bad`: skip and count records that cannot be used. Raises UserError as `prepare_corpus`
    does, and if another process is preparing the same folder.
    """
    corpus, prepared = config.corpus, Path(config.corpus.prepared)
    groups = {"passages": corpus.passages} | ({} if corpus.statements is None else {"statements": corpus.statements})
    if all((prepared / kind / MANIFEST).exists() for kind in groups):  # the folder may be read-only
        _prepare(config, groups, skip_bad or corpus.skip_bad)
        return
    if prepared.exists() and not prepared.is_dir():
        raise UserError(f"{prepared} is a file; choose a folder for the prepared corpus with --corpus.prepared.")
    with locked(prepared / "prepare.lock", f"preparing {prepared}"):
        _prepare(config, groups, skip_bad or corpus.skip_bad)


def _prepare(config: RealmConfig, groups: dict[str, tuple[SourceConfig, ...]], skip_bad: bool) -> None:
    """Prepare the sources of each group, `passages` and `statements`."""
    corpus, prepared = config.corpus, Path(config.corpus.prepared)
    if any(source.path.startswith(BUILTIN) for sources in groups.values() for source in sources):
        from realm.gazetteer import write_gazetteer

        made = write_gazetteer(prepared / "gazetteer")
        log_line(
            f"built-in corpus: {made.entities} entities, {made.facts} facts, {made.passages} passages, "
            f"{made.statements} statements"
        )
    resolved = {
        kind: [replace(source, path=str(source_path(source.path, prepared))) for source in corpus.limited(sources)]
        for kind, sources in groups.items()
    }
    for kind, sources in resolved.items():
        for source in sources:
            detected = ", auto-detected" if source.format == "auto" else ""
            ignored = count_ignored(source)
            others = f"; {ignored:,} other files ignored" if ignored else ""
            log_line(f"{kind}: {source.path} ({format_of(source)}{detected}{others})")

    def texts() -> list[str]:
        documents = (document for sources in resolved.values() for document in read_documents(sources, skip_bad))
        return [f"{document.title} {document.text}" for document in documents]

    tokenizer = load_or_train_tokenizer(config.tokenizer, prepared / "tokenizer", texts)
    tagger = SpanTagger.load(config.spans)
    for kind, sources in resolved.items():
        with progress(f"prepare {kind}", 1, unit="document", every_s=config.engine.log_every_s) as ticker:
            ready = prepare_corpus(
                sources,
                prepared / kind,
                tokenizer,
                corpus.block_tokens,
                tagger,
                corpus.num_workers,
                skip_bad,
                ticker.set,
            )
        manifest = ready.manifest
        log_line(
            f"{kind}: {len(ready):,} blocks of {manifest['documents']:,} documents, "
            f"{manifest['spans']:,} salient spans ({tagger.name}), {manifest['skipped']} records skipped"
        )


def add_documents(
    run: Run, sources: Sequence[SourceConfig], delete: Sequence[str], replace_existing: bool, skip_bad: bool
) -> None:
    """Add and remove documents of the run's corpus, then update the newest indexes.

    Only new documents are encoded. `delete`: ids of documents to remove; `replace_existing`: added
    documents replace those with the same id. Raises UserError as `grow_corpus` does.
    """
    before, config = run.passages, run.config
    stores = [run.folder, *(encoders.parent for encoders in (run.folder / FROZEN).glob("*/encoders"))]
    for store in stores:
        if (store / "encoders").exists() and not (store / "encoders").is_dir():
            raise UserError(f"{store / 'encoders'} is not a folder, so no index can be updated; remove it.")
        Lineage.load(store)  # a damaged one is refused before anything is changed
    lock = locked(before.path / ADDITIONS / "change.lock", f"changing {before.path}")
    with lock, progress("prepare", 1, unit="document", every_s=config.engine.log_every_s) as ticker:
        corpus = grow_corpus(
            run.prepared / "passages",
            sources,
            delete,
            replace_existing,
            run.tokenizer,
            SpanTagger.load(config.spans),
            config.corpus.num_workers,
            skip_bad,
            ticker.set,
        )
    added, removed = len(corpus) - len(before), len(corpus.deleted) - len(before.deleted)
    log_line(f"{added:,} blocks added, {removed:,} removed; {len(corpus.rows):,} blocks can now be retrieved")
    stores = [store for store in stores if (store / "encoders").is_dir()]
    if not stores:
        log_line("no encoder has been exported yet; the index will be built from the first one")
    for store in stores:
        refresh(store, config.refresh, corpus, once=True, log=log_line, fusion=Fusion.of(run))
