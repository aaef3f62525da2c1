"""Build FAISS indexes from embeddings and publish them as versions, with BM25 if it is configured.

Shape legend: N passages, D embedding dimension.
"""

import os
import re
import shutil
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
LEXICAL_FOLDER = "bm25"
"""Folder with the files of BM25 (see `index.lexical`); absent without BM25."""
DELETED_FILE = "deleted.npy"
"""Rows deleted from the corpus; the file is absent if there are none."""

TRAINING_ROWS = 500_000
"""Maximum number of rows on which an index is trained."""

_ADD_ROWS = 65_536


@dataclass(frozen=True)
class IndexManifest:
    """Contents of an index's `manifest.json`, except `format` and the checksums of the files."""

    encoder: str
    """Name of the encoder version the index was built from."""
    encoder_checksum: str
    """Checksum of the encoder's folder, see `realm.runtime.publish.checksum`."""
    corpus: str
    """Fingerprint of the prepared corpus; row i of the index is passage i of the corpus."""
    tokenizer: str
    """Fingerprint of the tokenizer the corpus was prepared with."""
    dim: int
    """Embedding dimension."""
    count: int
    """Number of passages in the index."""
    factory: str
    """FAISS factory string."""
    seconds: dict[str, float]
    """Build time by phase."""
    created_at: str
    """UTC, ISO 8601; for information only."""
    search_parameters: str = ""
    """FAISS search parameters, such as `nprobe=32`."""
    lexical: dict[str, Any] = field(default_factory=dict)
    """Settings of BM25 (see `FusionConfig.lexical`), whose files are in the folder `bm25`; empty
    without BM25."""
    drift: dict[str, Any] = field(default_factory=dict)
    """Drift of the encoder since the version named under `against` (see `index.drift`); empty for
    the first version."""

    @classmethod
    def read(cls, folder: Path) -> tuple["IndexManifest", dict[str, Any]]:
        """The manifest of an index folder, and its raw JSON.

        Raises PublishError if it is missing, altered or of another format.
        """
        manifest = read_manifest(folder)
        if manifest.get("format") != 1:
            raise PublishError(f"{folder} has index format {manifest.get('format')!r}, expected 1; rebuild the index")
        try:
            return cls(**{item.name: manifest[item.name] for item in fields(cls) if item.name in manifest}), manifest
        except TypeError as error:
            raise PublishError(f"{folder} is not an index: its manifest lacks fields; rebuild the index") from error


def empty_index(dim: int, factory: str) -> faiss.Index:
    """Create an empty inner-product index from a FAISS factory string.

    Raises UserError if FAISS cannot create it for `dim` dimensions, or if it cannot reconstruct
    its vectors.
    """
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f'FAISS cannot create index factory "{factory}" for {dim} dimensions ({_reason(error)}); try "Flat".'
        ) from error
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexFastScan | faiss.IndexIVFFastScan):
        raise UserError(
            f'index factory "{factory}" cannot reconstruct vectors, which finetuning requires; append ",RFlat" to it.'
        )
    return index


def set_search_parameters(index: faiss.Index, parameters: str) -> None:
    """Set FAISS search parameters such as `nprobe=32` or `efSearch=128,k_factor_rf=4`.

    Raises UserError if the index does not have such a parameter.
    """
    try:
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]  # FAISS's stubs have one overload
    except RuntimeError as error:
        raise UserError(
            f'search parameters "{parameters}" are invalid for this index ({_reason(error)}); '
            "fix refresh.search_parameters."
        ) from error


def build_index(
    embeddings: np.ndarray | Sequence[np.ndarray],
    factory: str = "Flat",
    seed: int = 0,
    training_rows: int = TRAINING_ROWS,
    parameters: str = "",
) -> faiss.Index:
    """Build an inner-product index over (N, D) embeddings; the ids are the row numbers.

    `embeddings`: one array, or shards in row order. An index that needs training is trained on at
    most `training_rows` rows, sampled with `seed`. `parameters`: see `set_search_parameters`.
    Raises UserError if FAISS cannot create the index or reconstruct its vectors (see
    `empty_index`), if the parameters are invalid, or if N vectors are too few to train it.
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
        if inverted is not None:  # otherwise vectors cannot be reconstructed by row number
            inverted.set_direct_map_type(faiss.DirectMap.Array)  # type: ignore[attr-defined]
        add_rows(index, shards)
    except RuntimeError as error:
        raise UserError(
            f'index factory "{factory}" cannot be built from {count} passages ({_reason(error)}); try "Flat".'
        ) from error
    return index


def add_rows(index: faiss.Index, shards: Sequence[np.ndarray]) -> None:
    """Append embeddings to the index."""
    for shard in shards:
        for start in range(0, len(shard), _ADD_ROWS):
            index.add(np.ascontiguousarray(shard[start : start + _ADD_ROWS], dtype=np.float32))


def index_bytes(index: faiss.Index) -> int:
    """Size of the serialized index in bytes."""
    return len(faiss.serialize_index(index))


def _reason(error: RuntimeError) -> str:
    """FAISS's message without its prefix, a C++ signature and source line."""
    return re.sub(r"^.*?\.(?:cpp|h):[0-9]+: (?:Error: '.*' failed:)?", "", str(error), count=1, flags=re.DOTALL).strip()


def _sample(shards: list[np.ndarray], num_rows: int, seed: int) -> np.ndarray:
    """Sample `num_rows` rows in ascending order.

    The sample depends on the seed and the total count, not on how the rows are split into shards.
    """
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
    before_publish: Callable[[], object] = lambda: None,
    arrays: Mapping[str, np.ndarray] | None = None,
    lexical: Path | None = None,
) -> Path:
    """Publish `index`, and `arrays` by file name, as `indexes/<version>`; returns that folder.

    `lexical`: folder that contains BM25 (see `index.lexical.prepare_lexical`), whose files are
    linked.
    `before_publish` is called when all files are flushed to disk, just before the version becomes
    visible. If it raises, nothing is published and the files are removed.
    """
    final = indexes / version.name
    with published(final, before_publish) as folder:
        faiss.write_index(index, str(folder / INDEX_FILE))
        for name, array in (arrays or {}).items():
            np.save(folder / name, array, allow_pickle=False)
        if lexical is not None:
            for file in (lexical / LEXICAL_FOLDER).iterdir():
                link_or_copy(file, folder / LEXICAL_FOLDER / file.name)
        write_manifest(folder, {"format": 1, **asdict(manifest)})
    return final


def link_or_copy(source: Path, target: Path) -> None:
    """Make a published file, which never changes, available as `target`: by a hard link if the file
    system has them."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
