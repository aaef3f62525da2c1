"""The index of a retriever that stands still: found among the published ones, or built now, store
from those that a trainer follows.

Warm-up, probes, finetuning and evaluation all search through it, so the passages are encoded once
for each retriever.
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
from index.retention import ReaderPin
from index.search import IndexRefused, PassageIndex
from realm.corpus.prepared import PreparedCorpus
from realm.runtime.distributed import on_rank_zero
from realm.runtime.publish import PublishError, checksum, published, write_manifest
from realm.runtime.threads import cpu_threads
from realm.runtime.versions import Lineage, Version, newest, start_attempt, versions_in
from realm.training.sections import RefreshConfig

FROZEN = "frozen"
"""Folder of a run with the indexes that are built here, one store for each retriever."""


def frozen_index(
    run: Path, retriever: Path, passages: PreparedCorpus, config: RefreshConfig, log: Callable[[str], None] = print
) -> PassageIndex:
    """Open the index built from the retriever saved in `retriever`; where the run has published
    none, build one under `run/frozen/`.

    Building goes on where it was killed. Raises UserError where the index cannot be built as
    configured.
    """
    wanted = checksum(retriever)
    store = _store(run, wanted)

    def find() -> PassageIndex | None:
        return _find(run, wanted, passages, config, log) or _find(store, wanted, passages, config, log)

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
    assert index is not None, "the refresher returned without the index it was asked for"
    return index


def publish_frozen(
    run: Path, retriever: Path, passages: PreparedCorpus, config: RefreshConfig, encoder: Version
) -> bool:
    """Publish the frozen index of `retriever` as that of the run's export `encoder`, a copy of it,
    under epoch 0; whether there was one.

    A trainer then starts with the index that its warm-up searched, instead of waiting for a
    refresher to build the same again.
    """
    wanted = checksum(retriever)
    index = _find(_store(run, wanted), wanted, passages, config, lambda line: None)
    if index is None:
        return False
    source = _store(run, wanted) / "indexes" / index.version.name
    manifest: IndexManifest = replace(index.manifest, encoder=encoder.name)
    with published(run / "indexes" / encoder.with_epoch(0).name) as folder:
        for file in (name for name in (INDEX_FILE, DRIFT_FILE, DELETED_FILE) if (source / name).exists()):
            try:
                os.link(source / file, folder / file)  # published files never change, so two names may share one
            except OSError:
                shutil.copyfile(source / file, folder / file)
        write_manifest(folder, {"format": 1, **asdict(manifest)})
    return True


def _store(run: Path, retriever_checksum: str) -> Path:
    return run / FROZEN / retriever_checksum[:12]


def _find(
    folder: Path, wanted: str, passages: PreparedCorpus, config: RefreshConfig, log: Callable[[str], None]
) -> PassageIndex | None:
    lineage = Lineage.load(folder)
    if lineage.current is None:
        return None
    for version in newest(folder / "indexes", lineage, lineage.current):
        hold = ReaderPin(folder, version)  # before the look: a refresher at work may be collecting
        try:
            if IndexManifest.read(folder / "indexes" / version.name)[0].encoder_checksum == wanted:
                index = PassageIndex.open(
                    folder / "indexes" / version.name, passages.fingerprint, search_on=config.search_on
                )
                index.keep(hold)
                return index
        except (IndexRefused, PublishError) as error:
            log(str(error))
        hold.release()
    return None
