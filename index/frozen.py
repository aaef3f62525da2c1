"""The index of a given exported retriever: found among the published ones, or built now."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import torch

from index.refresh import refresh
from index.search import IndexRefused, PassageIndex
from realm.config import RefreshConfig
from realm.corpus import PreparedCorpus
from realm.publish import Lineage, Version, checksum, newest, published, start_attempt


def index_for(folder: Path, retriever: Path, config: RefreshConfig, passages: PreparedCorpus, log: Callable[[str], None] = print) -> PassageIndex:
    """Open the index built from the retriever saved in `retriever`; where none is published in the run `folder`, export that and build one.

    Raises UserError where it cannot be built as configured.
    """
    wanted = checksum(retriever)

    def find() -> PassageIndex | None:
        lineage = Lineage.load(folder)
        if lineage.current is None:
            return None
        for version in newest(folder / "indexes", lineage, lineage.current):
            try:
                index = PassageIndex.open(folder / "indexes" / version.name, passages.fingerprint)
            except IndexRefused as error:
                log(str(error))
                continue
            if index.manifest.encoder_checksum == wanted:
                return index
        return None

    index = find()
    if index is not None:
        return index
    lineage = Lineage.load(folder)
    attempt = start_attempt(folder) if lineage.current is None else lineage.current
    step = max((version.step + 1 for version in newest(folder / "encoders", Lineage.load(folder), attempt)), default=0)
    with published(folder / "encoders" / Version(attempt, step).name) as temporary:
        copytree(retriever, temporary, dirs_exist_ok=True)
    threads = torch.get_num_threads()
    refresh(folder, config, passages, once=True, log=log)
    torch.set_num_threads(threads)
    index = find()
    assert index is not None, "the refresher returned without the index it was asked for"
    return index
