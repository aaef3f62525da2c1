"""Inspect and clean the index stores of a run: list versions, verify them, collect garbage."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.build import IndexManifest
from index.lease import Lease
from index.retention import (
    GarbageCollector,
    pinning_processes,
    process_name,
    referenced_by_checkpoints,
    remove_leftovers,
)
from index.search import IndexRefused, PassageIndex
from realm.errors import UserError
from realm.runtime.publish import MANIFEST, PublishError
from realm.runtime.versions import Lineage, Version, newest, versions_in
from realm.training.refresh_section import RefreshConfig


@dataclass(frozen=True)
class VersionInfo:
    """One index version in a store."""

    store: Path
    """The run folder, or a folder under its `frozen/`."""
    version: Version
    manifest: IndexManifest | None
    """None if it cannot be read."""
    bytes: int
    readers: tuple[str, ...]
    """`host.pid` of the processes that pin it."""
    referenced: bool
    """Whether a checkpoint references it."""
    abandoned: bool
    """Whether its step was abandoned when an earlier checkpoint was resumed."""
    newest: bool

    @property
    def path(self) -> Path:
        return self.store / "indexes" / self.version.name

    @property
    def state(self) -> str:
        """Short description of why the version is kept, and of its problems."""
        words = [
            "newest" if self.newest else "",
            f"pinned by {len(self.readers)}" if self.readers else "",
            "referenced by a checkpoint" if self.referenced else "",
            "abandoned by a resume" if self.abandoned else "",
            "unreadable" if self.manifest is None else "",
        ]
        return ", ".join(word for word in words if word) or "kept"


def index_stores(run: Path) -> Iterator[Path]:
    """Yield the store that the trainer follows, then the stores of frozen retrievers."""
    if (run / "indexes").is_dir():
        yield run
    yield from sorted(path.parent for path in run.glob("frozen/*/indexes"))


def list_versions(run: Path) -> list[VersionInfo]:
    """All index versions of a run, by store, oldest first. Raises UserError if there are none."""
    found = []
    for store in index_stores(run):
        lineage = Lineage.load(store)
        referenced = {reference.index for reference in referenced_by_checkpoints(store)}
        usable = newest(store / "indexes", lineage, lineage.current) if lineage.current is not None else []
        for version in versions_in(store / "indexes"):
            folder = store / "indexes" / version.name
            try:
                manifest: IndexManifest | None = IndexManifest.read(folder)[0]
            except PublishError:
                manifest = None
            found.append(
                VersionInfo(
                    store,
                    version,
                    manifest,
                    _num_bytes(folder),
                    tuple(pinning_processes(store, version)),
                    version in referenced,
                    version not in usable,
                    bool(usable) and version == usable[0],
                )
            )
    if not found:
        raise UserError(
            f"run {run} has no index yet; the refresher builds one from the first encoder that training exports."
        )
    return found


def _num_bytes(folder: Path) -> int:
    """Size of the files in a folder; a collector may be removing it."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def find_version(run: Path, name: str) -> VersionInfo:
    """The version named `name`, or with the path `name` relative to the run folder.

    Raises UserError, which lists the candidates, if no version or more than one matches.
    """
    all_versions = list_versions(run)
    matching = [info for info in all_versions if name in (info.version.name, info.path.relative_to(run).as_posix())]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(info.path.relative_to(run).as_posix() for info in (matching or all_versions))
    problem = "matches several indexes" if matching else "does not match any index"
    raise UserError(f"{name!r} {problem}; choose one of: {listed}.")


def unlisted_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of the files in a published folder that its manifest does not list."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return sorted(names - {MANIFEST, *manifest["files"]})


def verify(info: VersionInfo, log: Callable[[str], None]) -> str | None:
    """Check every byte of a version against its manifest and map it into memory.

    Returns the reason why it would be refused, or None.
    """
    start = time.monotonic()
    try:
        manifest, raw_manifest = IndexManifest.read(info.path)
        encoder = info.store / "encoders" / manifest.encoder
        index = PassageIndex.open(
            info.path, manifest.corpus, encoder=encoder if encoder.is_dir() else None, lexical=manifest.lexical
        )
    except (PublishError, IndexRefused, OSError) as error:
        log(f"{info.path}: REFUSED: {error}")
        return str(error)
    index.close()
    for name in unlisted_files(info.path, raw_manifest):
        log(f"{info.path / name}: not in the manifest, ignored")
    contents = f"{manifest.count:,} passages{' with BM25' if manifest.lexical else ''}"
    note = "" if encoder.is_dir() else "; encoder removed, its checksum was not compared"
    seconds = time.monotonic() - start
    log(f"{info.path}: valid, {contents}, {info.bytes / 2**20:,.1f} MiB read in {seconds:.1f} s{note}")
    return None


def collect_garbage(
    run: Path, config: RefreshConfig, grace_s: float, dry_run: bool, log: Callable[[str], None]
) -> list[Path]:
    """Remove leftovers of crashes, and all versions and encoders unused for `grace_s` seconds.

    Returns the removed paths; with `dry_run` the paths that would be removed. Raises UserError if
    a refresher is running: it collects garbage itself.
    """
    removed: list[Path] = []
    for store in index_stores(run):
        with Lease(store / "refresher" / "lease", process_name(), config.lease_expiry_s) as lease:
            _acquire_lease(lease, store, config, log)
            removed += [] if dry_run else remove_leftovers(store)
            collector = GarbageCollector(store, config.keep_last, float("inf") if dry_run else grace_s)
            collected = collector.collect()
            waiting = collector.in_grace_period()
            if dry_run:
                removed += [store / "indexes" / version.name for version in waiting]
                continue
            if waiting:
                log(f"removing {len(waiting)} versions unless a process pins them within {grace_s:g} s")
                time.sleep(grace_s)
                lease.check()
                collected += collector.collect()
            removed += [
                store / ("encoders" if version.epoch is None else "indexes") / version.name for version in collected
            ]
    return removed


def _acquire_lease(lease: Lease, store: Path, config: RefreshConfig, log: Callable[[str], None]) -> None:
    """Acquire the lease. Raises UserError if its holder renews the heartbeat before it expires."""
    deadline = time.monotonic() + config.lease_expiry_s + 1.0
    logged = False
    while not lease.try_acquire():
        if not logged:
            logged = True
            log(f"waiting {config.lease_expiry_s:g} s for a heartbeat of refresher {lease.current_holder()} in {store}")
        if time.monotonic() > deadline:
            raise UserError(
                f"refresher {lease.current_holder()} is running in {store} and collects garbage itself; "
                "stop it first, or let it collect garbage."
            )
        time.sleep(min(0.2, config.lease_expiry_s / 6))
