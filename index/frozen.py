"""The index of a frozen retriever: reuse a published one, or build one in a store under `frozen/`,
separate from the store that the trainer follows.

Reader pretraining, masked-span evaluation, finetuning and evaluation all search this index, so the
passages are encoded once per retriever.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from index.build import DELETED_FILE, INDEX_FILE, IndexManifest
from index.drift import DRIFT_FILE
from index.refresh import refresh
from index.retention import VersionPin
from index.search import IndexRefused, PassageIndex
from realm.corpus.prepared import PreparedCorpus
from realm.runtime.distributed import on_rank_zero
from realm.runtime.publish import PublishError, checksum, published, write_manifest
from realm.runtime.threads import cpu_threads
from realm.runtime.versions import Lineage, Version, newest, start_attempt, versions_in
from realm.training.refresh_section import RefreshConfig

FROZEN = "frozen"
"""Folder of a run with the stores of frozen indexes, one per retriever."""


def frozen_index(
    run: Path, retriever: Path, passages: PreparedCorpus, config: RefreshConfig, log: Callable[[str], None] = print
) -> PassageIndex:
    """Open the index of the retriever saved in `retriever`; build one under `run/frozen/` if the
    run has not published one.

    A build that was killed resumes from its finished shards. Raises UserError if the index cannot
    be built as configured.
    """
    retriever_checksum = checksum(retriever)
    store = _store_folder(run, retriever_checksum)

    def find() -> PassageIndex | None:
        return _find(run, retriever_checksum, passages, config, log) or _find(
            store, retriever_checksum, passages, config, log
        )

    def build() -> None:
        if find() is not None:
            return
        store.mkdir(parents=True, exist_ok=True)
        if not versions_in(store / "encoders"):
            with published(store / "encoders" / Version(start_attempt(store), 0).name) as temporary:
                shutil.copytree(retriever, temporary, dirs_exist_ok=True)
        with cpu_threads(0):
            refresh(store, replace(config, threads=torch.get_num_threads()), passages, once=True, log=log)

    on_rank_zero(build)
    index = find()
    assert index is not None, "the refresher returned without building the index"
    return index


def publish_frozen(
    run: Path, retriever: Path, passages: PreparedCorpus, config: RefreshConfig, encoder: Version
) -> bool:
    """Publish the frozen index of `retriever` under epoch 0 as the index of the run's export
    `encoder`, which is a copy of `retriever`. Returns False if there is no such index.

    A trainer then starts with the index that reader pretraining searched, instead of waiting for
    the refresher to build the same index again.
    """
    retriever_checksum = checksum(retriever)
    store = _store_folder(run, retriever_checksum)
    index = _find(store, retriever_checksum, passages, config, lambda line: None)
    if index is None:
        return False
    source = store / "indexes" / index.version.name
    manifest: IndexManifest = replace(index.manifest, encoder=encoder.name)
    with published(run / "indexes" / encoder.with_epoch(0).name) as folder:
        for file in (name for name in (INDEX_FILE, DRIFT_FILE, DELETED_FILE) if (source / name).exists()):
            try:
                os.link(source / file, folder / file)  # published files never change, so a hard link is safe
            except OSError:
                shutil.copyfile(source / file, folder / file)
        write_manifest(folder, {"format": 1, **asdict(manifest)})
    return True


def _store_folder(run: Path, retriever_checksum: str) -> Path:
    return run / FROZEN / retriever_checksum[:12]


def _find(
    store: Path, retriever_checksum: str, passages: PreparedCorpus, config: RefreshConfig, log: Callable[[str], None]
) -> PassageIndex | None:
    """Open the newest valid index of the retriever in `store`, pinned, or return None."""
    lineage = Lineage.load(store)
    if lineage.current is None:
        return None
    for version in newest(store / "indexes", lineage, lineage.current):
        pin = VersionPin(store, version)  # before reading: a running refresher may collect the version
        try:
            folder = store / "indexes" / version.name
            if IndexManifest.read(folder)[0].encoder_checksum == retriever_checksum:
                index = PassageIndex.open(folder, passages.fingerprint, search_on=config.search_on)
                index.attach_pin(pin)
                return index
        except (IndexRefused, PublishError) as error:
            log(str(error))
        pin.release()
    return None
