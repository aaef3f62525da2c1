"""The index of a given saved retriever: found among the published ones, or built now, apart from those that a trainer follows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import torch

from index.refresh import refresh
from index.search import IndexRefused, PassageIndex
from realm.corpus import PreparedCorpus
from realm.publish import Lineage, Version, checksum, newest, published, start_attempt, versions_in
from realm.run import Run


def index_for(run: Run, retriever: Path, log: Callable[[str], None] = print) -> PassageIndex:
    """Open the index built from the retriever saved in `retriever`; where the run has published none, build one under `run/frozen/`.

    Building goes on where it was killed. Raises UserError where the index cannot be built as configured.
    """
    wanted = checksum(retriever)
    apart = run.folder / "frozen" / wanted[:12]
    for folder in (run.folder, apart):
        index = _find(folder, run.passages, wanted, log)
        if index is not None:
            return index
    if not versions_in(apart / "encoders"):
        with published(apart / "encoders" / Version(start_attempt(apart), 0).name) as temporary:
            copytree(retriever, temporary, dirs_exist_ok=True)
    threads = torch.get_num_threads()
    refresh(apart, replace(run.config.refresh, threads=threads), run.passages, once=True, log=log)
    torch.set_num_threads(threads)
    index = _find(apart, run.passages, wanted, log)
    assert index is not None, "the refresher returned without the index it was asked for"
    return index


def _find(folder: Path, passages: PreparedCorpus, wanted: str, log: Callable[[str], None]) -> PassageIndex | None:
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
