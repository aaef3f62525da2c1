"""Build one index version from an exported encoder: encode, build (with BM25 if it is configured),
measure the drift, publish."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from index.build import DELETED_FILE, INDEX_FILE, IndexManifest, add_rows, build_index, empty_index, write_version
from index.drift import DRIFT_FILE, drift_rows, gather_rows, measure_drift
from index.encode import CompiledTower, Encoder, encode_in_shards, encode_passages, encoding_tower
from index.fusion import Fusion
from index.lease import Lease
from index.lexical import prepare_lexical
from index.search import IndexRefused, PassageIndex
from index.workers import WorkerGroup
from realm.errors import UserError
from realm.runtime.publish import PublishError, checksum
from realm.runtime.telemetry import peak_memory, progress
from realm.runtime.versions import Lineage, Version, newest, versions_in
from realm.training.refresh_section import RefreshConfig

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus
    from realm.models.retriever import Tower


class Superseded(Exception):
    """A newer export or a new attempt makes the running build obsolete."""


class Stopped(Exception):
    """The refresher was asked to stop."""


def matches_config(folder: Path, corpus: "PreparedCorpus", config: RefreshConfig, fusion: Fusion | None = None) -> bool:
    """Whether an index has this corpus, factory and search parameters, and the BM25 that `fusion`
    needs."""
    try:
        manifest, _ = IndexManifest.read(folder)
    except PublishError:
        return False
    same = (manifest.corpus, manifest.factory, manifest.search_parameters) == (
        corpus.fingerprint,
        config.factory,
        config.search_parameters,
    )
    return same and (fusion is None or fusion.accepts(manifest.lexical))


@dataclass
class VersionBuild:
    """The build of one version; every worker runs it, the first one builds and publishes."""

    run: Path
    config: RefreshConfig
    corpus: "PreparedCorpus"
    version: Version
    """The encoder version."""
    lease: Lease
    workers: WorkerGroup
    stop: threading.Event
    log: Callable[[str], None]
    fusion: Fusion
    """Determines whether the version contains BM25, and with which settings."""

    def build(self, load: Callable[[Path], Encoder], check_superseded: Callable[[float], None]) -> None:
        """Build and publish; calls `check_superseded(fraction_done)` before each round of shards.

        Raises Superseded, Stopped, NonFiniteEmbeddings, LeaseLost, OSError from the file system,
        and UserError if no index can be built as configured.
        """
        folder = self.run / "encoders" / self.version.name
        timer = _PhaseTimer()
        encoder = load(folder)
        if encoder.tokenizer_fingerprint != self.corpus.manifest["tokenizer"]:
            raise UserError(
                f"{folder} was trained with a different tokenizer than the corpus; "
                "prepare the corpus with the encoder's tokenizer."
            )
        empty_index(encoder.retriever.dim, self.config.factory)  # fail before encoding if the factory is invalid
        encoder_checksum = checksum(folder)
        timer.end_phase("load")
        ancestor = self.workers.run_on_first(lambda: self._find_ancestor(encoder_checksum))
        first_row = 0 if ancestor is None else ancestor[1]
        shards, num_kept = self._encode(encoder, encoder_checksum, first_row, check_superseded)
        timer.end_phase("encode")
        self.workers.run_on_first(
            lambda: self._build_and_publish(encoder, encoder_checksum, ancestor, shards, num_kept, timer)
        )

    def _find_ancestor(self, encoder_checksum: str) -> tuple[Path, int] | None:
        """The folder and row count of an index of the same encoder over an earlier state of the
        corpus, or None."""
        for older in reversed(versions_in(self.run / "indexes")):
            folder = self.run / "indexes" / older.name
            with suppress(PublishError, IndexRefused):
                manifest = IndexManifest.read(folder)[0]
                same_build = (manifest.encoder_checksum, manifest.factory) == (encoder_checksum, self.config.factory)
                if older.encoder == self.version and same_build and manifest.corpus in self.corpus.ancestors:
                    index = PassageIndex.open(folder, manifest.corpus)  # verify before building on it
                    if DRIFT_FILE in index.files:
                        return folder, manifest.count
        return None

    def _build_and_publish(
        self,
        encoder: Encoder,
        encoder_checksum: str,
        ancestor: tuple[Path, int] | None,
        shards: list[np.ndarray],
        num_kept: int,
        timer: "_PhaseTimer",
    ) -> None:
        lexical = None
        if self.fusion.lexical:
            lexical = self._prepare_lexical()
            timer.end_phase("bm25")
        if ancestor is None:
            index = build_index(shards, self.config.factory, parameters=self.config.search_parameters)
            reference_PD = gather_rows(shards, drift_rows(self.corpus.base_rows, self.config.drift_passages))
        else:
            index = faiss.read_index(str(ancestor[0] / INDEX_FILE))
            add_rows(index, shards)
            reference_PD = np.load(ancestor[0] / DRIFT_FILE, allow_pickle=False)
        timer.end_phase("build")
        drift = self._drift(encoder, index, reference_PD)
        timer.end_phase("drift")
        manifest = IndexManifest(
            encoder=self.version.name,
            encoder_checksum=encoder_checksum,
            corpus=self.corpus.fingerprint,
            tokenizer=encoder.tokenizer_fingerprint,
            dim=index.d,
            count=index.ntotal,
            factory=self.config.factory,
            seconds=dict(timer.seconds),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            search_parameters=self.config.search_parameters,
            lexical=self.fusion.lexical,
            drift=drift,
        )

        final = self.version.with_epoch(self.lease.epoch)
        arrays = {DRIFT_FILE: reference_PD}
        if self.corpus.deleted:
            arrays[DELETED_FILE] = np.array(sorted(self.corpus.deleted), dtype=np.int64)
        write_version(self.run / "indexes", final, index, manifest, self._check_running, arrays, lexical)
        timer.end_phase("publish")
        self._log_published(final.name, index.ntotal, num_kept, timer.seconds, drift)

    def _check_running(self) -> None:
        """Raise LeaseLost or Stopped if this refresher must not continue."""
        self.lease.check()
        if self.stop.is_set():
            raise Stopped

    def _prepare_lexical(self) -> Path:
        """A folder that contains BM25 of the corpus; a refresher that is killed after this need not
        build it again."""
        assert self.fusion.terms is not None
        folder = self.run / "refresher" / self.version.name / "lexical"
        prepare_lexical(folder, self.run, self.corpus, self.fusion.terms, self.fusion.lexical, self._check_running)
        return folder

    def _drift(self, encoder: Encoder, fresh: faiss.Index, reference_PD: np.ndarray) -> dict[str, Any]:
        """Drift of the encoder since the newest earlier index; empty if no index is comparable."""
        lineage = Lineage.load(self.run)
        assert lineage.current is not None
        for older in newest(self.run / "indexes", lineage, lineage.current):
            folder = self.run / "indexes" / older.name
            if older.step < self.version.step and matches_config(folder, self.corpus, self.config):
                with suppress(IndexRefused):
                    stale = PassageIndex.open(folder, self.corpus.fingerprint, dim=fresh.d, threads=self.config.threads)
                    if DRIFT_FILE not in stale.files:
                        continue
                    stale_reference_PD = np.load(stale.files[DRIFT_FILE], allow_pickle=False)
                    if stale_reference_PD.shape == reference_PD.shape:
                        return measure_drift(stale, stale_reference_PD, fresh, reference_PD, encoder, self.corpus)
        return {}

    def _encode(
        self, encoder: Encoder, encoder_checksum: str, first_row: int, check_superseded: Callable[[float], None]
    ) -> tuple[list[np.ndarray], int]:
        """Encode all passages from `first_row` on; returns the shards, memory-mapped, and how many
        of them an earlier refresher had finished."""

        @cache
        def tower() -> "Tower | CompiledTower":  # built and compiled only if a shard is missing
            return encoding_tower(encoder.retriever, self.config.precision, self.config.compile)

        def encode(rows: np.ndarray) -> np.ndarray:
            def after_batch(num_done: int) -> None:
                if self.stop.is_set():
                    raise Stopped
                ticker.update(int(rows[0]) + num_done)

            budget = self.config.token_budget
            return encode_passages(
                tower(), self.corpus, rows, encoder.wordpieces, encoder.max_passage_tokens, budget, after_batch
            )

        def before_round(fraction_done: float) -> None:
            self.lease.check()
            check_superseded(fraction_done)

        plan = {
            "encoder": encoder_checksum,
            "corpus": self.corpus.fingerprint,
            "precision": self.config.precision,
            "compiled": self.config.compile,
        }
        work = self.run / "refresher" / self.version.name
        with progress(
            f"encode {self.version}",
            len(self.corpus),
            unit="passage",
            every_s=10.0 if self.workers.is_first else float("inf"),
        ) as ticker:
            return encode_in_shards(
                work,
                range(first_row, len(self.corpus)),
                self.config.shard_rows,
                plan,
                encode,
                before_round,
                self.workers,
            )

    def _log_published(
        self, name: str, rows: int, num_kept: int, seconds: dict[str, float], drift: dict[str, Any]
    ) -> None:
        """Log the version as a line of text, and append it to `refresher/log.jsonl`."""
        phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
        kept = f" ({num_kept} shards kept)" if num_kept else ""
        moved = f"; drift since {drift['against']}: {drift['cosine_change']:.4f} (1 - cosine)" if drift else ""
        self.log(f"index {name} published: {rows} passages, {phases}{kept}{moved}")
        entry: dict[str, Any] = {
            "version": name,
            "rows": rows,
            "shards_kept": num_kept,
            "seconds": seconds,
            "time": time.time(),
            **peak_memory(),
            "drift": drift,
        }
        with (self.run / "refresher" / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


class _PhaseTimer:
    """Seconds per phase, each measured from the end of the previous one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end_phase(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
