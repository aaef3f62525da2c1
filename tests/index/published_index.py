"""Small published indexes for tests, ways to damage them, and brute-force search."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from index.build import IndexManifest, build_index, write_version
from realm.runtime.versions import Version

RNG = np.random.default_rng(0)
COUNT, DIM = 500, 16
EMBEDDINGS_ND = RNG.standard_normal((COUNT, DIM)).astype(np.float32)
QUERIES_BD = RNG.standard_normal((7, DIM)).astype(np.float32)


def publish(
    folder: Path, version: Version, emb_ND: np.ndarray = EMBEDDINGS_ND, factory: str = "Flat", **changes: object
) -> Path:
    index = build_index(emb_ND, factory)
    fields = {
        "encoder": version.encoder.name,
        "encoder_checksum": "unknown",
        "corpus": "corpus",
        "tokenizer": "tokenizer",
        "dim": index.d,
        "count": index.ntotal,
        "factory": factory,
        "seconds": {},
        "created_at": "2020-01-01T00:00:00+00:00",
    }
    return write_version(folder, version, index, IndexManifest(**{**fields, **changes}))  # type: ignore[arg-type]


def brute_force_search(k: int) -> tuple[np.ndarray, np.ndarray]:
    scores_BN = QUERIES_BD @ EMBEDDINGS_ND.T
    rows_BK = np.argsort(-scores_BN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_BN, rows_BK, 1), rows_BK


def _truncate(folder: Path) -> None:
    path = folder / "passages.index"
    path.write_bytes(path.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    path = folder / "passages.index"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "corpus": "corpus", "count": 499}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, "bytes"),
    (_flip, "checksum"),
    (_remove_manifest, "missing"),
    (_edit_manifest, "modified after it was published"),
]
