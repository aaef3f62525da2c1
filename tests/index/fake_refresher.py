"""A tiny corpus and encoder for tests, and a program that runs a refresher on them:
fake_refresher.py RUN SECONDS_PER_BATCH, or `fake_refresher.py RUN blocked`, whose build of an index
takes ten minutes, in which the main thread does not look at anything else."""

import hashlib
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor, nn

from index import version_build
from index.encode import Encoder, encode_passages
from index.refresh import refresh
from index.search import PassageIndex
from index.workers import WorkerGroup
from realm.runtime.publish import published
from realm.runtime.versions import Version, versions_in
from realm.text.inputs import Wordpieces
from realm.training.refresh_section import RefreshConfig

DIM = 8
SPECIAL_IDS = Wordpieces(cls=1, sep=2, mask=3, pad=0, continuation=np.zeros(0, bool))
MAX_TOKENS = 16
TOKENIZER = "tokenizer-of-tests"
CONFIG = RefreshConfig(shard_rows=10, token_budget=64, poll_s=0.05, keep_last=2, grace_s=0.0, lease_expiry_s=1.0)


class FakeCorpus:
    """Passages of random wordpieces, 60 by default."""

    def __init__(self, num_rows: int = 60, seed: int = 0) -> None:
        self.manifest = {"tokenizer": TOKENIZER}
        rng = np.random.default_rng(seed)
        self._titles = [rng.integers(3, 100, rng.integers(0, 4)).astype(np.int32) for _ in range(num_rows)]
        self._texts = [rng.integers(3, 100, rng.integers(1, 20)).astype(np.int32) for _ in range(num_rows)]
        self.lengths = np.array([len(title) + len(text) for title, text in zip(self._titles, self._texts, strict=True)])
        self.base_rows, self.deleted = num_rows, frozenset[int]()
        self.fingerprint = hashlib.sha256(b"".join(text.tobytes() for text in self._texts)).hexdigest()
        self.ancestors = {self.fingerprint: num_rows}

    def __len__(self) -> int:
        return len(self._texts)

    def title_ids(self, row: int) -> np.ndarray:
        return self._titles[row]

    def text_ids(self, row: int) -> np.ndarray:
        return self._texts[row]


class FakeRetriever(nn.Module):
    """Sum of token vectors, weighted by position so that order and padding matter."""

    dim = DIM

    def __init__(self, seed: int, seconds_per_batch: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(100, DIM)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(100, DIM, generator=torch.Generator().manual_seed(seed)))
        self.seconds_per_batch = seconds_per_batch
        self.batch_shapes: list[tuple[int, int]] = []

    @property
    def passage_tower(self) -> "FakeRetriever":
        return self

    @property
    def bert(self) -> nn.Module:
        """The module that is cast to lower precision."""
        return self.table

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        time.sleep(self.seconds_per_batch)
        self.batch_shapes.append(tuple(ids_BL.shape))
        weight_BL = mask_BL / (1 + torch.arange(ids_BL.shape[1]))
        return (self.table(ids_BL) * weight_BL[..., None]).sum(1)

    def embed_queries(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self(ids_BL, mask_BL)


def export(run: Path, attempt: int, step: int) -> Path:
    """Publish an encoder as the trainer does; it consists of the seed of its weights only."""
    folder = run / "encoders" / Version(attempt, step).name
    with published(folder) as temporary:
        (temporary / "seed").write_text(f"{attempt}{step}")
    return folder


def load(folder: Path, seconds_per_batch: float = 0.0) -> Encoder:
    retriever = FakeRetriever(int((folder / "seed").read_text()), seconds_per_batch).eval()
    return Encoder(retriever, SPECIAL_IDS, MAX_TOKENS, TOKENIZER)  # type: ignore[arg-type]


def direct_embeddings(folder: Path, corpus: FakeCorpus) -> np.ndarray:
    return encode_passages(
        load(folder).retriever.passage_tower, corpus, np.arange(len(corpus)), SPECIAL_IDS, MAX_TOKENS
    )  # type: ignore[arg-type]


def indexes(run: Path) -> list[str]:
    """Names of the published index versions."""
    return [version.name for version in versions_in(run / "indexes")]


def refresh_once(run: Path, corpus: FakeCorpus, config: RefreshConfig = CONFIG, **more: object) -> list[str]:
    """Refresh until no work is left; returns the log lines."""
    lines: list[str] = []
    refresh(run, config, corpus, **{"once": True, "log": lines.append, "load": load, **more})  # type: ignore[arg-type]
    return lines


def assert_equals_direct_encoding(run: Path, name: str, corpus: FakeCorpus) -> None:
    """Assert that an index version is valid and contains the embeddings of its encoder."""
    version = name.rsplit("-e", 1)[0]
    encoder = run / "encoders" / version
    PassageIndex.open(run / "indexes" / name, corpus.fingerprint, dim=8, encoder=encoder)
    index = faiss.read_index(str(run / "indexes" / name / "passages.index"))
    np.testing.assert_allclose(
        index.reconstruct_n(0, index.ntotal), direct_embeddings(encoder, corpus), rtol=1e-5, atol=1e-6
    )


def block(*arguments: object, **options: object) -> None:
    """Stand for a long call of FAISS; creates the file `blocked`."""
    Path(sys.argv[1], "blocked").touch()
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        time.sleep(1.0)


def program(run: Path, seconds_per_batch: float) -> None:
    """Refresh until training ends; each worker writes its number of encoded batches to
    `batches-RANK`."""
    workers, encoders = WorkerGroup.join(), []

    def load_and_record(folder: Path) -> Encoder:
        encoders.append(load(folder, seconds_per_batch))
        return encoders[-1]

    refresh(run, CONFIG, FakeCorpus(), load=load_and_record, workers=workers)  # type: ignore[arg-type]
    (run / f"batches-{workers.rank}").write_text(str(sum(len(encoder.retriever.batch_shapes) for encoder in encoders)))  # type: ignore[arg-type]
    workers.leave()


if __name__ == "__main__":
    if sys.argv[2] == "blocked":
        version_build.build_index = block  # type: ignore[assignment]
    program(Path(sys.argv[1]), 0.0 if sys.argv[2] == "blocked" else float(sys.argv[2]))
