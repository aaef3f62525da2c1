"""Searching a published index, and following the versions a refresher publishes.

Shape legend: B queries, K results a query, D dimension of the embeddings.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch

from index.build import DELETED_FILE, INDEX_FILE, IndexManifest, set_search_parameters
from index.exact import Searcher, TiledExact, is_flat, vectors
from index.gpu import on_gpu
from index.retention import ReaderPin
from realm.errors import UserError
from realm.runtime.publish import PublishError, check_files, checksum
from realm.runtime.versions import Lineage, Version, newest


class IndexRefused(UserError):
    """An index folder that must not be searched, with the reason."""


class PassageIndex:
    """A checked, memory-mapped index version; row numbers are those of the prepared corpus."""

    def __init__(
        self,
        version: Version,
        manifest: IndexManifest,
        index: faiss.Index,
        searcher: Searcher,
        threads: int | None,
        deleted: np.ndarray,
    ) -> None:
        self.version = version
        self.manifest = manifest
        self._index = index
        self._searcher = searcher
        self._threads = threads
        self._deleted = deleted
        self._release: Callable[[], object] = lambda: None

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
    ) -> "PassageIndex":
        """Check `folder` against its manifest and against what the caller has, and map it.

        `dim`, `tokenizer_fingerprint`, `encoder` (folder of the encoder version it must come from):
        compared where given. `threads`: OpenMP threads of a search beside other work; None: the
        machine is the caller's, and a flat index is searched through torch, which is faster.
        `search_on`: cpu or gpu (see `index.gpu`). Raises IndexRefused for an index that is broken,
        partial, or of another corpus, tokenizer, dimension or encoder.
        """
        try:
            version = Version.parse(folder.name)
            manifest, everything = IndexManifest.read(folder)
        except PublishError as error:
            raise IndexRefused(f"index refused: {error}") from error
        rebuild = "start the refresher for this run, or give the run it belongs to"
        if manifest.corpus != corpus_fingerprint:
            raise IndexRefused(
                f"{folder} is an index of another corpus ({manifest.corpus}, expected {corpus_fingerprint}); {rebuild}"
            )
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            raise IndexRefused(
                f"{folder} has another tokenizer ({manifest.tokenizer}, expected {tokenizer_fingerprint}); {rebuild}"
            )
        if dim is not None and manifest.dim != dim:
            raise IndexRefused(
                f"{folder} holds embeddings of {manifest.dim} dimensions where the encoder gives {dim}; {rebuild}"
            )
        if manifest.encoder != version.encoder.name or (
            encoder is not None and manifest.encoder_checksum != checksum(encoder)
        ):
            raise IndexRefused(f"{folder} was built by another encoder than {encoder or version.encoder}; {rebuild}")
        try:
            check_files(folder, everything)
        except PublishError as error:
            raise IndexRefused(f"index refused: {error}") from error
        index = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
        if (index.ntotal, index.d, index.metric_type) != (manifest.count, manifest.dim, faiss.METRIC_INNER_PRODUCT):
            promise = f"{manifest.count} vectors of {manifest.dim} dimensions under inner product"
            raise IndexRefused(f"{folder} does not hold the {promise} its manifest promises; {rebuild}")
        set_search_parameters(index, manifest.search_parameters)
        deleted = (
            np.load(folder / DELETED_FILE, allow_pickle=False)
            if (folder / DELETED_FILE).exists()
            else np.zeros(0, np.int64)
        )
        searcher: Searcher = index
        if search_on == "gpu":
            searcher = on_gpu(index)
        elif threads is None and is_flat(index):
            searcher = TiledExact(torch.from_numpy(vectors(index)))
        return cls(version, manifest, index, searcher, threads, deleted)

    @property
    def step(self) -> int:
        """Training step of the encoder behind it."""
        return self.version.step

    def __len__(self) -> int:
        return self.manifest.count

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k passages with the largest inner products, best first: `scores_BK` float32 and
        `rows_BK` int64.

        Passages that were taken away from the corpus are never found. Where there are fewer, or an
        approximate index finds fewer, the rest are row -1. UserError where k exceeds the corpus.
        """
        if k > len(self):
            raise UserError(f"k = {k} passages were asked for but the corpus has only {len(self)}; lower k")
        if self._threads is not None:
            faiss.omp_set_num_threads(
                self._threads
            )  # holds for the calling thread alone, so it is set where the search runs
        query_emb_BD = np.ascontiguousarray(query_emb_BD, dtype=np.float32)
        if not len(self._deleted):
            return self._searcher.search(query_emb_BD, k)
        wanted = k + 8
        while True:
            wanted = min(wanted, k + len(self._deleted), len(self))
            score_BK, row_BK = self._searcher.search(query_emb_BD, wanted)
            row_BK[np.isin(row_BK, self._deleted)] = -1
            enough = ((row_BK >= 0).sum(1) >= k).all()
            if enough or wanted == min(k + len(self._deleted), len(self)):
                # What is left moves to the front, in its order.
                order_BK = np.argsort(row_BK < 0, axis=1, kind="stable")[:, :k]
                return np.take_along_axis(score_BK, order_BK, 1), np.take_along_axis(row_BK, order_BK, 1)
            wanted *= 2

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Passage embeddings as the index holds them, (len(rows), D) float32: exact in a flat
        index, approximate in a compressed one."""
        return self._index.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))

    def keep(self, hold: ReaderPin) -> None:
        """Tie a hold to this index: it ends with `close`, or when the index is garbage-collected."""
        self._release = weakref.finalize(self, hold.release)

    def close(self) -> None:
        """Give the hold back; the refresher may delete the version from now on."""
        self._release()


class IndexWatcher:
    """Follows `run/indexes` on a background thread: opens and checks there, so that the trainer
    changes a reference and nothing else.

    Only versions of `attempt` and its ancestors count, the newest first, and none older than one
    already opened. A refused version is logged once with its reason and the last good one stays.
    With `follow` false it opens the versions that `request` names instead: ranks other than the
    first open what that one has chosen. The other arguments are those of `PassageIndex.open`.
    """

    def __init__(
        self,
        run: Path,
        attempt: int,
        corpus_fingerprint: str,
        dim: int | None = None,
        tokenizer_fingerprint: str | None = None,
        poll_s: float = 1.0,
        threads: int | None = None,
        log: Callable[[str], None] = print,
        follow: bool = True,
        search_on: str = "cpu",
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.follow = follow
        self.refused: dict[str, str] = {}
        """Name of each version refused, and why."""
        self._open_checked = partial(
            PassageIndex.open,
            corpus_fingerprint=corpus_fingerprint,
            dim=dim,
            tokenizer_fingerprint=tokenizer_fingerprint,
            threads=threads,
            search_on=search_on,
        )
        self._poll_s = poll_s
        self._log = log
        self._lineage = Lineage.load(run)
        self._changed = threading.Condition()
        self._ready: PassageIndex | None = None
        self._opened: Version | None = None
        self._requested: Version | None = None
        self._failure: BaseException | None = None
        self._trouble = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="index-watcher", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> Version | None:
        """The version `use_folds` would give now."""
        with self._changed:
            return None if self._ready is None else self._ready.version

    def take(self) -> PassageIndex | None:
        """A newly opened version, once, or None. Never waits for the file system. The caller
        closes the one it replaces."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            taken, self._ready = self._ready, None
            return taken

    def request(self, version: Version) -> None:
        """Open `version` next, where the watcher does not follow the store itself."""
        self._requested = version

    def wait_for(self, min_step: int, timeout_s: float) -> bool:
        """Wait until a version of at least `min_step` has been opened (taken or not), at most
        `timeout_s` seconds; whether there is one."""

        def reached() -> bool:
            return self._opened is not None and self._opened.step >= min_step

        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or reached(), timeout_s)
            if self._failure is not None:
                raise self._failure
            return reached()

    def stop(self) -> None:
        """End the thread; an opened version nobody took is closed."""
        self._stop.set()
        self._thread.join()
        with self._changed:
            if self._ready is not None:
                self._ready.close()
                self._ready = None

    def __enter__(self) -> "IndexWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        with suppress(
            OSError, AttributeError
        ):  # reading every byte of a version must not slow the step; Linux knows priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not self._stop.is_set():
            try:
                self._look()
                self._trouble = ""
            except OSError as error:  # a file server that hiccups; training goes on with what it has
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    self._log(f"index store not readable, trying again every {self._poll_s:g} s: {error}")
            except (
                BaseException
            ) as error:  # our own mistake: the trainer must hear of it, a silent thread would only make the index stale
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            self._stop.wait(self._poll_s)

    def _look(self) -> None:
        if not self.follow:
            version = self._requested
            if (
                version is not None
                and version != self._opened
                and version.name not in self.refused
                and (index := self._open(version)) is not None
            ):
                self._offer(index)
            return
        for version in newest(self.run / "indexes", self._lineage, self.attempt):
            if self._opened is not None and version <= self._opened:
                return
            if version.name not in self.refused:
                index = self._open(version)
                if index is not None:
                    self._offer(index)
                    return

    def _open(self, version: Version) -> PassageIndex | None:
        folder = self.run / "indexes" / version.name
        encoder = self.run / "encoders" / version.encoder.name
        hold = ReaderPin(self.run, version)
        started = time.monotonic()
        try:
            index = self._open_checked(folder, encoder=encoder if encoder.is_dir() else None)
        except BaseException as error:
            hold.release()
            if not isinstance(error, IndexRefused):
                raise
            if folder.is_dir():  # otherwise it was collected before our hold: no news
                self.refused[version.name] = str(error)
                self._log(str(error))
            return None
        index.keep(hold)
        self._log(f"index {version} opened and checked in {time.monotonic() - started:.2f} s")
        return index

    def _offer(self, index: PassageIndex) -> None:
        with self._changed:
            if self._ready is not None:
                self._ready.close()
            self._ready, self._opened = index, index.version
            self._changed.notify_all()
