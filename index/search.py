"""Open a published index version and search it.

Shape legend: B queries, K results per query, D embedding dimension.
"""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from index.build import DELETED_FILE, INDEX_FILE, LEXICAL_FOLDER, IndexManifest, set_search_parameters
from index.exact import Searcher, TiledExactSearch, flat_vectors, is_flat
from index.gpu import move_to_gpu
from index.lexical import LexicalIndex
from index.retention import VersionPin
from realm.errors import UserError
from realm.runtime.publish import PublishError, check_files, checksum
from realm.runtime.versions import Version


class IndexRefused(UserError):
    """An index folder that must not be searched; the message gives the reason."""


class PassageIndex:
    """A verified, memory-mapped index version; row numbers are those of the prepared corpus."""

    def __init__(
        self,
        version: Version,
        manifest: IndexManifest,
        files: Mapping[str, Path],
        index: faiss.Index,
        searcher: Searcher,
        threads: int | None,
        deleted: np.ndarray,
        lexical: LexicalIndex | None = None,
    ) -> None:
        self.version = version
        self.manifest = manifest
        self.lexical = lexical
        """BM25 over the same passages; None if it was not asked for."""
        self.files = files
        """Verified files by name; a file that the manifest does not list is ignored."""
        self._index = index
        self._searcher = searcher
        self._threads = threads
        self._deleted = deleted
        self._release_pin: Callable[[], object] = lambda: None

    @classmethod
    def open(
        cls,
        folder: Path,
        corpus_fingerprint: str,
        dim: int | None = None,
        tokenizer_fingerprint: str | None = None,
        encoder: Path | None = None,
        threads: int | None = None,
        search_on: str = "cpu",
        lexical: Mapping[str, Any] | None = None,
    ) -> "PassageIndex":
        """Verify `folder` against its manifest and the caller's arguments, and map it.

        `dim`, `tokenizer_fingerprint`, `encoder` (folder of the encoder version that the index must
        be built from): compared if given. `threads`: OpenMP threads per search, for callers that
        run other work at the same time. None: the caller has the machine to itself, and a flat
        index is searched in torch, which is faster. `search_on`: cpu or gpu (see `index.gpu`).
        `lexical`: settings with which the version must contain BM25, which is mapped too. Raises
        IndexRefused if the index is broken, incomplete, or of another corpus, tokenizer, dimension
        or encoder, or if it does not have this BM25.
        """
        try:
            version = Version.parse(folder.name)
            manifest, raw_manifest = IndexManifest.read(folder)
        except PublishError as error:
            raise IndexRefused(f"index refused: {error}") from error
        remedy = "start the refresher for this run, or use the run that the index belongs to"
        if manifest.corpus != corpus_fingerprint:
            raise IndexRefused(
                f"{folder} was built from another corpus ({manifest.corpus}, expected {corpus_fingerprint}); {remedy}"
            )
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            raise IndexRefused(
                f"{folder} was built with another tokenizer "
                f"({manifest.tokenizer}, expected {tokenizer_fingerprint}); {remedy}"
            )
        if dim is not None and manifest.dim != dim:
            raise IndexRefused(
                f"{folder} has embeddings of {manifest.dim} dimensions, expected {dim} as in the encoder; {remedy}"
            )
        if manifest.encoder != version.encoder.name or (
            encoder is not None and manifest.encoder_checksum != checksum(encoder)
        ):
            raise IndexRefused(
                f"{folder} was built by another encoder, expected {encoder or version.encoder}; {remedy}"
            )
        if lexical and manifest.lexical != lexical:
            found = f"BM25 of {_listed(manifest.lexical)}" if manifest.lexical else "no BM25"
            raise IndexRefused(f"{folder} contains {found}, expected that of {_listed(lexical)}; {remedy}")
        try:
            check_files(folder, raw_manifest)
        except PublishError as error:
            raise IndexRefused(f"index refused: {error}") from error
        index = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
        if (index.ntotal, index.d, index.metric_type) != (manifest.count, manifest.dim, faiss.METRIC_INNER_PRODUCT):
            expected = f"{manifest.count} vectors of {manifest.dim} dimensions with inner product"
            raise IndexRefused(f"{folder} does not contain the {expected} stated in its manifest; {remedy}")
        set_search_parameters(index, manifest.search_parameters)
        files = {name: folder / name for name in raw_manifest["files"]}
        deleted = np.load(files[DELETED_FILE], allow_pickle=False) if DELETED_FILE in files else np.zeros(0, np.int64)
        opened = LexicalIndex.open(folder / LEXICAL_FOLDER) if lexical else None
        if opened is not None and len(opened) != manifest.count:
            raise IndexRefused(f"{folder / LEXICAL_FOLDER} does not cover {manifest.count} passages; {remedy}")
        searcher: Searcher = index
        if search_on == "gpu":
            searcher = move_to_gpu(index)
        elif threads is None and is_flat(index):
            searcher = TiledExactSearch(torch.from_numpy(flat_vectors(index)))
        return cls(version, manifest, files, index, searcher, threads, deleted, opened)

    @property
    def step(self) -> int:
        """Training step of the encoder that the index was built from."""
        return self.version.step

    def __len__(self) -> int:
        return self.manifest.count

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k passages with the largest inner products, best first: `scores_BK` float32
        and `rows_BK` int64.

        Deleted passages are never returned. If there are fewer than k others, or an approximate
        index finds fewer, the remaining rows are -1. Raises UserError if k exceeds the corpus.
        """
        if k > len(self):
            raise UserError(f"k = {k} exceeds the corpus, which has only {len(self)} passages; lower k.")
        if self._threads is not None:
            faiss.omp_set_num_threads(self._threads)  # applies to the calling thread only
        query_emb_BD = np.ascontiguousarray(query_emb_BD, dtype=np.float32)
        if not len(self._deleted):
            return self._searcher.search(query_emb_BD, k)
        num_retrieved = k + 8
        while True:
            num_retrieved = min(num_retrieved, k + len(self._deleted), len(self))
            score_BK, row_BK = self._searcher.search(query_emb_BD, num_retrieved)
            row_BK[np.isin(row_BK, self._deleted)] = -1
            enough = ((row_BK >= 0).sum(1) >= k).all()
            if enough or num_retrieved == min(k + len(self._deleted), len(self)):
                # Move the remaining rows to the front, keeping their order.
                order_BK = np.argsort(row_BK < 0, axis=1, kind="stable")[:, :k]
                return np.take_along_axis(score_BK, order_BK, 1), np.take_along_axis(row_BK, order_BK, 1)
            num_retrieved *= 2

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Passage embeddings stored in the index, (len(rows), D) float32: exact in a flat index,
        approximate in a compressed one."""
        return self._index.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))

    def attach_pin(self, pin: VersionPin) -> None:
        """Release `pin` on `close`, or when this object is garbage-collected."""
        self._release_pin = weakref.finalize(self, pin.release)

    def close(self) -> None:
        """Release the pin; the refresher may delete the version from now on."""
        self._release_pin()


def _listed(settings: Mapping[str, Any]) -> str:
    """Settings of BM25 as in `b 0.75, k1 1.5`."""
    return ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))
