"""What people ask of a run's index store: which versions there are and who needs them, whether
they are sound, and what may go."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from index.build import IndexManifest
from index.lease import Lease
from index.retention import GarbageCollector, pinning_readers, process_name, referenced_by_checkpoints, remove_leftovers
from index.search import IndexRefused, PassageIndex
from realm.errors import UserError
from realm.runtime.publish import PublishError
from realm.runtime.versions import Lineage, Version, newest, versions_in
from realm.training.sections import RefreshConfig


@dataclass(frozen=True)
class VersionInfo:
    """One index version as it stands in a store."""

    store: Path
    """The run folder, or a folder under its `frozen/`."""
    version: Version
    manifest: IndexManifest | None
    """None where it cannot be read."""
    bytes: int
    readers: tuple[str, ...]
    """`host.pid` of the readers that hold it."""
    pinned: bool
    """Whether a checkpoint needs it."""
    abandoned: bool
    """Whether it belongs to a future that a resume went back behind."""
    newest: bool

    @property
    def path(self) -> Path:
        return self.store / "indexes" / self.version.name

    @property
    def state(self) -> str:
        """Everything that keeps it, or that speaks against it, in a few words."""
        words = [
            "newest" if self.newest else "",
            f"held by {len(self.readers)}" if self.readers else "",
            "pinned by a checkpoint" if self.pinned else "",
            "of an abandoned future" if self.abandoned else "",
            "unreadable" if self.manifest is None else "",
        ]
        return ", ".join(word for word in words if word) or "kept"


def stores(run: Path) -> Iterator[Path]:
    """The run's own store, which a trainer follows, and those of retrievers that stand still."""
    if (run / "indexes").is_dir():
        yield run
    yield from sorted(path.parent for path in run.glob("frozen/*/indexes"))


def list_versions(run: Path) -> list[VersionInfo]:
    """All index versions of a run, store by store, oldest first. Raises UserError where the run
    has none."""
    found = []
    for store in stores(run):
        lineage, pins = Lineage.load(store), referenced_by_checkpoints(store)
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
                    sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
                    tuple(pinning_readers(store, version)),
                    version.name in pins,
                    version not in usable,
                    bool(usable) and version == usable[0],
                )
            )
    if not found:
        raise UserError(
            f"run {run} has no index yet; a refresher builds one from the first encoder that training exports."
        )
    return found


def find_version(run: Path, name: str) -> VersionInfo:
    """The version called `name`. Raises UserError where there is none, or more than one, naming
    those there are."""
    all_versions = list_versions(run)
    matching = [info for info in all_versions if name in (info.version.name, info.path.relative_to(run).as_posix())]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(info.path.relative_to(run).as_posix() for info in (matching or all_versions))
    raise UserError(f"{'several indexes are' if matching else 'no index is'} called {name!r}; name one of: {listed}.")


def verify(info: VersionInfo, log: Callable[[str], None]) -> str | None:
    """Read every byte of a version against its manifest and map it; the reason why it would be
    refused, or None."""
    began = time.monotonic()
    try:
        manifest = IndexManifest.read(info.path)[0]
        encoder = info.store / "encoders" / manifest.encoder
        index = PassageIndex.open(info.path, manifest.corpus, encoder=encoder if encoder.is_dir() else None)
    except (PublishError, IndexRefused) as error:
        log(f"{info.path}: REFUSED: {error}")
        return str(error)
    index.close()
    beside = "" if encoder.is_dir() else "; its encoder is not there to be compared"
    log(
        f"{info.path}: sound, {manifest.count:,} passages, {info.bytes / 2**20:,.1f} MiB read in {time.monotonic() - began:.1f} s{beside}"
    )
    return None


def collect_garbage(
    run: Path, config: RefreshConfig, grace_s: float, dry_run: bool, log: Callable[[str], None]
) -> list[Path]:
    """Remove crashes' leftovers, and every version and encoder that nobody has needed for `grace_s`
    seconds; returns what was removed.

    Raises UserError where a refresher is at work: it collects by itself.
    """
    removed: list[Path] = []
    for store in stores(run):
        lineage = Lineage.load(store)
        with Lease(store / "refresher" / "lease", process_name(), config.lease_expiry_s) as lease:
            _acquire(lease, store, config, log)
            removed += [] if dry_run else remove_leftovers(store)
            collector = GarbageCollector(store, config.keep_last, float("inf") if dry_run else grace_s)
            if lineage.current is None:
                continue
            gone = collector.collect(lineage, lineage.current)
            waiting = collector.in_grace_period()
            if dry_run:
                removed += [store / "indexes" / version.name for version in waiting]
                continue
            if waiting:
                log(f"{len(waiting)} versions go if nobody takes them within {grace_s:g} s")
                time.sleep(grace_s)
                lease.check()
                gone += collector.collect(lineage, lineage.current)
            removed += [store / ("encoders" if version.epoch is None else "indexes") / version.name for version in gone]
    return removed


def _acquire(lease: Lease, store: Path, config: RefreshConfig, log: Callable[[str], None]) -> None:
    """Take the lease; a holder that shows a sign of life within its expiry is at work."""
    deadline = time.monotonic() + config.lease_expiry_s + 1.0
    told = False
    while not lease.try_acquire():
        if not told:
            told = True
            log(
                f"waiting {config.lease_expiry_s:g} s for a sign of life of refresher {lease.current_holder()} in {store}"
            )
        if time.monotonic() > deadline:
            raise UserError(
                f"refresher {lease.current_holder()} is at work in {store} and collects by itself; stop it first, or let it be."
            )
        time.sleep(min(0.2, config.lease_expiry_s / 6))
