"""One index version, from an exported encoder to its published index: encode, build, measure the
drift, publish."""

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
from index.lease import Lease
from index.search import IndexRefused, PassageIndex
from index.workers import WorkerGroup
from realm.errors import UserError
from realm.runtime.publish import PublishError, checksum
from realm.runtime.telemetry import peak_memory, progress
from realm.runtime.versions import Lineage, Version, newest, versions_in
from realm.training.sections import RefreshConfig

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus
    from realm.models.retriever import Tower


class Superseded(Exception):
    """A newer export, or a new attempt, makes the running work pointless."""


class Stopped(Exception):
    """Someone asked the refresher to end."""


def is_current(folder: Path, corpus: "PreparedCorpus", config: RefreshConfig) -> bool:
    """Whether an index folder is of this corpus, factory and search parameters."""
    try:
        manifest, _ = IndexManifest.read(folder)
    except PublishError:
        return False
    return (manifest.corpus, manifest.factory, manifest.search_parameters) == (
        corpus.fingerprint,
        config.factory,
        config.search_parameters,
    )


@dataclass
class VersionBuild:
    """The work on one version; every worker runs it, and the first builds and publishes."""

    run: Path
    config: RefreshConfig
    corpus: "PreparedCorpus"
    version: Version
    """The encoder."""
    lease: Lease
    workers: WorkerGroup
    stop: threading.Event
    log: Callable[[str], None]

    def build(self, load: Callable[[Path], Encoder], check_superseded: Callable[[float], None]) -> None:
        """Build and publish; `check_superseded(share_done)` is called before each round of shards.

        Raises Superseded, Stopped, NonFiniteEmbeddings for embeddings of no use, LeaseLost, OSError from the
        file system, and UserError where no index can be built as configured.
        """
        folder = self.run / "encoders" / self.version.name
        clock = _Clock()
        encoder = load(folder)
        if encoder.tokenizer_fingerprint != self.corpus.manifest["tokenizer"]:
            raise UserError(
                f"{folder} has another tokenizer than the corpus; prepare the corpus with the encoder's tokenizer"
            )
        empty_index(
            encoder.retriever.dim, self.config.factory
        )  # a factory string that cannot work is found out before encoding
        encoder_checksum = checksum(folder)
        clock.phase("load")
        ancestor = self.workers.run_on_first(lambda: self._ancestor(encoder_checksum))
        shards, num_kept = self._encode(
            encoder, encoder_checksum, 0 if ancestor is None else ancestor[1], check_superseded
        )
        clock.phase("encode")
        self.workers.run_on_first(
            lambda: self._build_and_publish(encoder, encoder_checksum, ancestor, shards, num_kept, clock)
        )

    def _ancestor(self, encoder_checksum: str) -> tuple[Path, int] | None:
        """An index of the same encoder over what the corpus was before it grew, and the number
        of its rows; None where there is none."""
        for older in reversed(versions_in(self.run / "indexes")):
            folder = self.run / "indexes" / older.name
            with suppress(PublishError, IndexRefused):
                manifest = IndexManifest.read(folder)[0]
                same = (manifest.encoder_checksum, manifest.factory) == (encoder_checksum, self.config.factory)
                if (
                    older.encoder == self.version
                    and same
                    and manifest.corpus in self.corpus.ancestors
                    and (folder / DRIFT_FILE).exists()
                ):
                    PassageIndex.open(folder, manifest.corpus)  # checked before anything is built on it
                    return folder, manifest.count
        return None

    def _build_and_publish(
        self,
        encoder: Encoder,
        encoder_checksum: str,
        ancestor: tuple[Path, int] | None,
        shards: list[np.ndarray],
        num_kept: int,
        clock: "_Clock",
    ) -> None:
        if ancestor is None:
            index = build_index(shards, self.config.factory, parameters=self.config.search_parameters)
            reference_PD = gather_rows(shards, drift_rows(self.corpus.base_rows, self.config.drift_passages))
        else:
            index = faiss.read_index(str(ancestor[0] / INDEX_FILE))
            add_rows(index, shards)
            reference_PD = np.load(ancestor[0] / DRIFT_FILE, allow_pickle=False)
        clock.phase("build")
        drift = self._drift(encoder, index, reference_PD)
        clock.phase("drift")
        manifest = IndexManifest(
            encoder=self.version.name,
            encoder_checksum=encoder_checksum,
            corpus=self.corpus.fingerprint,
            tokenizer=encoder.tokenizer_fingerprint,
            dim=index.d,
            count=index.ntotal,
            factory=self.config.factory,
            seconds=dict(clock.seconds),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            search_parameters=self.config.search_parameters,
            drift=drift,
        )

        def before_publish() -> None:
            self.lease.check()
            if self.stop.is_set():
                raise Stopped

        final = self.version.with_epoch(self.lease.epoch)
        arrays = {DRIFT_FILE: reference_PD}
        if self.corpus.deleted:
            arrays[DELETED_FILE] = np.array(sorted(self.corpus.deleted), dtype=np.int64)
        write_version(self.run / "indexes", final, index, manifest, before_publish, arrays)
        clock.phase("publish")
        self._report(final.name, index.ntotal, num_kept, clock.seconds, drift)

    def _drift(self, encoder: Encoder, fresh: faiss.Index, reference_PD: np.ndarray) -> dict[str, Any]:
        """How far the encoder has moved since the newest index before this one; empty where
        there is none that tells."""
        lineage = Lineage.load(self.run)
        assert lineage.current is not None
        for older in newest(self.run / "indexes", lineage, lineage.current):
            folder = self.run / "indexes" / older.name
            if (
                older.step < self.version.step
                and is_current(folder, self.corpus, self.config)
                and (folder / DRIFT_FILE).exists()
            ):
                with suppress(IndexRefused):
                    stale = PassageIndex.open(folder, self.corpus.fingerprint, dim=fresh.d, threads=self.config.threads)
                    stale_reference_PD = np.load(folder / DRIFT_FILE, allow_pickle=False)
                    if stale_reference_PD.shape == reference_PD.shape:
                        return measure_drift(stale, stale_reference_PD, fresh, reference_PD, encoder, self.corpus)
        return {}

    def _encode(
        self, encoder: Encoder, encoder_checksum: str, first: int, check_superseded: Callable[[float], None]
    ) -> tuple[list[np.ndarray], int]:
        """All passages from row `first` on in shards, mapped from disk, and how many shards an
        earlier refresher had finished."""

        def stop_if_asked() -> None:
            if self.stop.is_set():
                raise Stopped

        @cache
        def tower() -> "Tower | CompiledTower":  # compiled when the first shard needs it
            return encoding_tower(encoder.retriever, self.config.precision, self.config.compile)

        def encode(rows: np.ndarray) -> np.ndarray:

            def after_batch(done: int) -> None:
                stop_if_asked()
                ticker.update(int(rows[0]) + done)

            budget = self.config.token_budget
            return encode_passages(
                tower(), self.corpus, rows, encoder.wordpieces, encoder.max_passage_tokens, budget, after_batch
            )

        def before_shard(share_done: float) -> None:
            self.lease.check()
            check_superseded(share_done)

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
                work, range(first, len(self.corpus)), self.config.shard_rows, plan, encode, before_shard, self.workers
            )

    def _report(self, name: str, rows: int, num_kept: int, seconds: dict[str, float], drift: dict[str, Any]) -> None:
        phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
        kept = f" ({num_kept} shards kept from before)" if num_kept else ""
        moved = (
            f"; since {drift['against']} embeddings moved by {drift['cosine_change']:.4f} (1 - cosine)" if drift else ""
        )
        self.log(f"index {name} published: {rows} passages, {phases}{kept}{moved}")
        entry: dict[str, Any] = {
            "version": name,
            "rows": rows,
            "shards_kept": num_kept,
            "seconds": seconds,
            "time": time.time(),
            **peak_memory(),
        }
        entry |= {"drift": drift}
        with (self.run / "refresher" / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


class _Clock:
    """Seconds by phase, each since the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def phase(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
