"""From embeddings to a published index version.

Shape legend: N passages, D dimension of the embeddings.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index.gpu import clustering_on_gpu
from realm.errors import UserError
from realm.runtime.publish import PublishError, published, read_manifest, write_manifest
from realm.runtime.versions import Version

INDEX_FILE = "passages.index"
DELETED_FILE = "deleted.npy"
"""Rows that were taken away from the corpus; without the file none was."""

_ADD_ROWS = 65_536


@dataclass(frozen=True)
class IndexManifest:
    """What an index says of itself: `manifest.json`, beside `format` and sizes and checksums of
    the files."""

    encoder: str
    """Name of the encoder version."""
    encoder_checksum: str
    """Checksum of the encoder's folder, see `realm.runtime.publish.checksum`."""
    corpus: str
    """Fingerprint of the prepared corpus; row i of the index is passage i of it."""
    tokenizer: str
    """Fingerprint of the tokenizer the corpus was prepared with."""
    dim: int
    """Dimension of the embeddings."""
    count: int
    """Passages in the index."""
    factory: str
    """FAISS factory string."""
    seconds: dict[str, float]
    """Time the refresher took, by phase."""
    created_at: str
    """UTC, ISO 8601; for people, nothing is decided by it."""
    search_parameters: str = ""
    """How it is searched, in FAISS's words: `nprobe=32`."""
    drift: dict[str, Any] = field(default_factory=dict)
    """How far the encoder has moved since the version named under `against` (see `index.drift`);
    empty for the first."""

    @classmethod
    def read(cls, folder: Path) -> tuple["IndexManifest", dict[str, Any]]:
        """The manifest of an index folder, and all of it as it stands there. PublishError where
        missing, altered or of another format."""
        manifest = read_manifest(folder)
        if manifest.get("format") != 1:
            raise PublishError(
                f"{folder} has index format {manifest.get('format')!r} where this program reads 1; build the index again"
            )
        return cls(**{entry.name: manifest[entry.name] for entry in fields(cls) if entry.name in manifest}), manifest


def empty_index(dim: int, factory: str) -> faiss.Index:
    """An inner-product index from a FAISS factory string, without vectors. UserError where FAISS
    cannot make it for `dim` dimensions."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f'FAISS cannot make index factory "{factory}" for {dim} dimensions ({_reason(error)}); try "Flat"'
        ) from error
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexFastScan | faiss.IndexIVFFastScan):
        raise UserError(
            f'index factory "{factory}" cannot give its vectors back, which finetuning needs; add ",RFlat" to it'
        )
    return index


def set_search_parameters(index: faiss.Index, parameters: str) -> None:
    """Set FAISS search parameters such as `nprobe=32` or `efSearch=128,k_factor_rf=4`. UserError
    for what the index has not."""
    try:
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]  # FAISS's stubs know one overload
    except RuntimeError as error:
        raise UserError(
            f'search parameters "{parameters}" do not suit the index ({_reason(error)}); mend refresh.search_parameters'
        ) from error


def build_index(
    embeddings: np.ndarray | Sequence[np.ndarray],
    factory: str = "Flat",
    seed: int = 0,
    training_rows: int = 500_000,
    parameters: str = "",
) -> faiss.Index:
    """Build an inner-product index over (N, D) embeddings, given whole or as shards in row order;
    row numbers are the ids.

    What needs training gets at most `training_rows` rows, drawn with `seed`. `parameters`: see
    `set_search_parameters`. UserError as from `empty_index`, where the parameters do not suit,
    where the N vectors are too few to train it, and where it could not give them back.
    """
    shards = [embeddings] if isinstance(embeddings, np.ndarray) else list(embeddings)
    count, dim = sum(len(shard) for shard in shards), shards[0].shape[1]
    index = empty_index(dim, factory)
    try:
        if not index.is_trained:
            with clustering_on_gpu(index):
                index.train(_sample(shards, min(count, training_rows), seed))
        set_search_parameters(index, parameters)
        inverted = faiss.try_extract_index_ivf(index)
        if inverted is not None:  # otherwise its vectors cannot be read back by their numbers
            inverted.set_direct_map_type(faiss.DirectMap.Array)  # type: ignore[attr-defined]
        add_rows(index, shards)
    except RuntimeError as error:
        raise UserError(
            f'index factory "{factory}" cannot take {count} passages ({_reason(error)}); try "Flat"'
        ) from error
    return index


def add_rows(index: faiss.Index, shards: Sequence[np.ndarray]) -> None:
    """Add embeddings behind those the index has."""
    for shard in shards:
        for start in range(0, len(shard), _ADD_ROWS):
            index.add(np.ascontiguousarray(shard[start : start + _ADD_ROWS], dtype=np.float32))


def index_bytes(index: faiss.Index) -> int:
    """Bytes of the index as it is written and mapped."""
    return len(faiss.serialize_index(index))


def _reason(error: RuntimeError) -> str:
    """FAISS's own words: its messages open with a C++ signature and a source line."""
    return re.sub(r"^.*?\.(?:cpp|h):[0-9]+: (?:Error: '.*' failed:)?", "", str(error), count=1, flags=re.DOTALL).strip()


def _sample(shards: list[np.ndarray], num_rows: int, seed: int) -> np.ndarray:
    """`num_rows` rows in ascending order, the same for the same seed and count however the rows
    are cut into shards."""
    count = sum(len(shard) for shard in shards)
    chosen = np.sort(np.random.default_rng(seed).choice(count, num_rows, replace=False))
    parts, start = [], 0
    for shard in shards:
        first, last = np.searchsorted(chosen, (start, start + len(shard)))
        parts.append(shard[chosen[first:last] - start])
        start += len(shard)
    return np.concatenate(parts).astype(np.float32, copy=False)


def write_version(
    indexes: Path,
    version: Version,
    index: faiss.Index,
    manifest: IndexManifest,
    before_publish: Callable[[], None] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Publish `index` as `indexes/<version>`, `arrays` by file name beside it, and return that
    folder.

    `before_publish` is called when all is written, just before the version appears; what it raises
    stops the publishing and leaves nothing behind.
    """
    final = indexes / version.name
    with published(final) as folder:
        faiss.write_index(index, str(folder / INDEX_FILE))
        for name, array in (arrays or {}).items():
            np.save(folder / name, array, allow_pickle=False)
        write_manifest(folder, {"format": 1, **asdict(manifest)})
        if before_publish is not None:
            before_publish()
    return final
