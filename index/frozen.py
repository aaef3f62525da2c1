"""The index of a frozen retriever: reuse a published one, or build one in a store under `frozen/`,
separate from the store that the trainer follows.

Reader pretraining, masked-span evaluation, finetuning and evaluation all search this index, so the
passages are encoded once per retriever.
"""

import errno
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from index.build import IndexManifest, link_or_copy
from index.fusion import Fusion
from index.refresh import refresh
from index.retention import FROZEN, VersionPin
from index.search import IndexRefused, PassageIndex
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.runtime.distributed import on_rank_zero
from realm.runtime.publish import PublishError, checksum, published, write_manifest
from realm.runtime.signals import Interrupted
from realm.runtime.threads import cpu_threads
from realm.runtime.versions import Lineage, Version, newest, start_attempt, versions_in
from realm.training.refresh_section import RefreshConfig

_UNPINNED: set[Path] = set()
"""Stores for which this process has said that it cannot pin their versions."""


def frozen_index(
    run: Path,
    retriever: Path,
    passages: PreparedCorpus,
    config: RefreshConfig,
    log: Callable[[str], None] = print,
    fusion: Fusion | None = None,
) -> PassageIndex:
    """Open the index of the retriever saved in `retriever`; build one under `run/frozen/` if the
    run has not published one, with the BM25 that `fusion` needs (default: none).

    If the run has published one without it, its embeddings are used again.
    A build that was killed resumes from its finished shards. Raises UserError if the index cannot
    be built as configured or is damaged, and Interrupted on Ctrl-C and SIGTERM during the build.
    """
    retriever_checksum = checksum(retriever)
    store = _store_folder(run, retriever_checksum)
    stop = threading.Event()
    fusion = fusion or Fusion()
    remedy = f"remove {store} and rerun the command, which builds the index again"

    def find() -> PassageIndex | None:
        return _find(run, retriever_checksum, passages, config, log, fusion) or _find(
            store, retriever_checksum, passages, config, log, fusion
        )

    def build() -> None:
        if find() is not None:
            return
        try:
            encoder = _copy_encoder(store, retriever)
            if checksum(encoder) != retriever_checksum:
                raise UserError(f"{encoder} is not a copy of {retriever}; {remedy}.")
            if fusion.lexical and not versions_in(store / "indexes"):
                dense = _find(run, retriever_checksum, passages, config, log, Fusion())
                if dense is not None:  # only BM25 has to be built
                    _publish_copy(dense, store, Version.parse(encoder.name))
            with cpu_threads(0):
                threads = torch.get_num_threads()
                refresh(store, replace(config, threads=threads), passages, once=True, log=log, stop=stop, fusion=fusion)
        except OSError as error:
            raise UserError(
                f"the index of {retriever} cannot be built in {store}: {error}; fix this and rerun the command."
            ) from error
        if stop.is_set():
            raise Interrupted(
                f"encoding the passages for {store} was interrupted; finished shards are kept; "
                "rerun the command to continue."
            )

    on_rank_zero(build)
    index = find()
    if index is None:
        raise UserError(f"{store} contains no valid index of {retriever}; {remedy}.")
    return index


def _copy_encoder(store: Path, retriever: Path) -> Path:
    """The encoder in `store`, which is a copy of `retriever`; copied if there is none."""
    existing = versions_in(store / "encoders")
    if existing:
        return store / "encoders" / existing[-1].name
    store.mkdir(parents=True, exist_ok=True)
    encoder = store / "encoders" / Version(start_attempt(store), 0).name
    with published(encoder) as temporary:
        shutil.copytree(retriever, temporary, dirs_exist_ok=True)
    return encoder


def publish_frozen(
    run: Path,
    retriever: Path,
    passages: PreparedCorpus,
    config: RefreshConfig,
    encoder: Version,
    fusion: Fusion | None = None,
) -> bool:
    """Publish the frozen index of `retriever` under epoch 0 as the index of the run's export
    `encoder`, which is a copy of `retriever`. Returns False if there is no such index, with the
    BM25 that `fusion` needs (default: none).

    A trainer then starts with the index that reader pretraining searched, instead of waiting for
    the refresher to build the same index again.
    """
    retriever_checksum = checksum(retriever)
    store = _store_folder(run, retriever_checksum)
    index = _find(store, retriever_checksum, passages, config, lambda line: None, fusion or Fusion())
    if index is None:
        return False
    _publish_copy(index, run, encoder)
    return True


def _publish_copy(index: PassageIndex, store: Path, encoder: Version) -> None:
    """Publish an index in `store` under epoch 0 as that of `encoder`, and close it."""
    manifest: IndexManifest = replace(index.manifest, encoder=encoder.name)
    with published(store / "indexes" / encoder.with_epoch(0).name) as folder:
        for name, file in index.files.items():
            link_or_copy(file, folder / name)
        write_manifest(folder, {"format": 1, **asdict(manifest)})
    index.close()


def _store_folder(run: Path, retriever_checksum: str) -> Path:
    return run / FROZEN / retriever_checksum[:12]


def _find(
    store: Path,
    retriever_checksum: str,
    passages: PreparedCorpus,
    config: RefreshConfig,
    log: Callable[[str], None],
    fusion: Fusion,
) -> PassageIndex | None:
    """Open the newest valid index of the retriever in `store` with the BM25 that `fusion` needs,
    pinned, or return None."""
    lineage = Lineage.load(store)
    if lineage.current is None:
        return None
    for version in newest(store / "indexes", lineage, lineage.current):
        folder, pin = store / "indexes" / version.name, None
        try:
            manifest = IndexManifest.read(folder)[0]
            if manifest.encoder_checksum == retriever_checksum and fusion.accepts(manifest.lexical):
                pin = _pin(store, version, log)  # before opening it: a running refresher may collect the version
                index = PassageIndex.open(
                    folder, passages.fingerprint, search_on=config.search_on, lexical=fusion.lexical
                )
                if pin is not None:
                    index.attach_pin(pin)
                return index
        except (IndexRefused, PublishError) as error:
            log(str(error))
        if pin is not None:
            pin.release()
    return None


def _pin(store: Path, version: Version, log: Callable[[str], None]) -> VersionPin | None:
    """Pin a version; None if nothing can be written there, because reading must work anyway."""
    try:
        return VersionPin(store, version)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
            raise
        if store not in _UNPINNED:
            _UNPINNED.add(store)
            log(
                f"{store} cannot be written ({error.strerror}), so its index is not protected from "
                "`realm index gc` on other machines while it is read"
            )
        return None
