"""Baseline retrievers for `realm evaluate --compare`: BM25 and sentence-transformers models."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from finetune.questions import Question
from index.frozen import FROZEN
from index.fusion import open_lexical
from index.lexical import best_rows
from realm.corpus.collate import EMPTY
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.run.folder import Run
from realm.runtime.publish import check_folder, published, write_manifest
from realm.runtime.telemetry import console, progress


class PassageRetriever(Protocol):
    """The retriever interface that evaluation uses."""

    def retrieve(self, questions: Sequence[Question], k: int) -> np.ndarray:
        """Rows of the `k` best passages per question, (B, k), padded with -1."""


class Bm25:
    """BM25 over title and text: that of fused retrieval (`index.lexical`), with the settings of
    `fusion`."""

    def __init__(self, run: Run) -> None:
        console.print(f"  BM25 over {len(run.passages.rows):,} passages")
        self.terms, self.max_query_tokens = run.terms, run.config.retriever.max_query_tokens
        self.lexical = open_lexical(run)

    def retrieve(self, questions: Sequence[Question], k: int) -> np.ndarray:
        row_BK = np.full((len(questions), k), EMPTY, np.int64)
        for b, question in enumerate(questions):
            found = best_rows(self.lexical.scores(self.terms(question.ids[: self.max_query_tokens - 2])), k)
            row_BK[b, : len(found)] = found
        return row_BK


class SentenceTransformerRetriever:
    """A sentence-transformers model, by path or hub name, over `title text`."""

    def __init__(self, name: str, passages: PreparedCorpus, cache: Path, log_every_s: float) -> None:
        """Passage embeddings are cached in a folder inside `cache`."""
        import faiss
        from sentence_transformers import SentenceTransformer

        from realm.runtime.hub import require_on_hub

        if not Path(name).exists():
            require_on_hub(name, "--compare")
        try:
            self.model = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--compare: {name} cannot be loaded as a sentence-transformers model ({str(error).splitlines()[0]})."
            ) from error
        self.rows = passages.rows
        embeddings_ND = self._embeddings(name, passages, cache, log_every_s)
        self.index = faiss.IndexFlatIP(embeddings_ND.shape[1])
        self.index.add(embeddings_ND)

    def _embeddings(self, name: str, passages: PreparedCorpus, cache: Path, log_every_s: float) -> np.ndarray:
        weights = hashlib.sha256(json.dumps([name, passages.fingerprint]).encode())
        for parameter in self.model.parameters():
            weights.update(parameter.detach().float().cpu().numpy().tobytes())
        folder = cache / f"{Path(name).name}-{weights.hexdigest()[:12]}"
        if not folder.exists():
            texts = [f"{passages.title(row)} {passages.text(row)}" for row in passages.rows.tolist()]
            order = np.argsort([-len(text) for text in texts], kind="stable")
            embeddings_ND = np.empty((len(texts), self.model.get_sentence_embedding_dimension() or 0), dtype=np.float32)
            title = f"encode with {Path(name).name}"
            with progress(title, len(texts), unit="passage", every_s=log_every_s) as ticker:
                for start in range(0, len(texts), 1024):
                    rows = order[start : start + 1024]
                    embeddings_ND[rows] = self.model.encode_document([texts[row] for row in rows], batch_size=32)
                    ticker.update(start + len(rows))
            with published(folder) as temporary:
                np.save(temporary / "embeddings.npy", embeddings_ND, allow_pickle=False)
                write_manifest(temporary, {"format": 1})
        check_folder(folder, f"remove {folder}, and rerun the command to encode again")
        return np.load(folder / "embeddings.npy", allow_pickle=False)

    def retrieve(self, questions: Sequence[Question], k: int) -> np.ndarray:
        embeddings_BD = np.asarray(self.model.encode_query([question.text for question in questions]), dtype=np.float32)
        return self.rows[self.index.search(embeddings_BD, k)[1]]


def load_baseline(name: str, run: Run) -> PassageRetriever:
    """Load `bm25`, or a sentence-transformers model by path or hub name.

    Raises UserError if the model cannot be loaded.
    """
    if name == "bm25":
        return Bm25(run)
    return SentenceTransformerRetriever(name, run.passages, run.folder / FROZEN, run.config.engine.log_every_s)
