"""Search with a frozen retriever, for reader pretraining and masked-span evaluation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from index.frozen import frozen_index
from index.fusion import Fusion
from index.interface import Index
from pretrain.collate import MaskedCollator
from pretrain.masking import MaskedSentence
from realm.corpus.prepared import PreparedCorpus
from realm.models.precision import Precision
from realm.models.retriever import Retriever, embed_no_grad
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.runtime.distributed import local_device
from realm.runtime.telemetry import log_line


class FrozenSearch:
    """Search of the passages with a saved retriever; the queries are masked sentences."""

    def __init__(
        self,
        retriever: Retriever,
        index: Index,
        collator: MaskedCollator,
        precision: Precision,
        fusion: Fusion,
        statements: PreparedCorpus,
    ) -> None:
        self.retriever, self.index, self.collator, self.precision = retriever, index, collator, precision
        self.fusion, self.statements = fusion, statements

    @classmethod
    def open(cls, run: Run, folder: Path, collator: MaskedCollator) -> "FrozenSearch":
        """Load the retriever saved in `folder`, and open or build its index."""
        retriever = load_retriever(folder)[0].to(local_device())
        fusion = Fusion.of(run, folder)
        index = frozen_index(run.folder, folder, run.passages, run.config.refresh, log_line, fusion)
        return cls(retriever, index, collator, run.config.engine.precision, fusion, run.statements)

    def __call__(self, examples: Sequence[MaskedSentence], k: int) -> np.ndarray:
        """Rows of the `k` best passages per masked sentence, (len(examples), k), best first.

        Returns all passages if there are fewer than `k`; negative rows are empty slots.
        """
        embeddings = embed_masked(self.retriever.query_tower, examples, self.collator, self.precision)
        query_ids, own_rows = self.collator.query_ids(examples), self._own_rows(examples)
        return self.fusion.retrieve(self.index, embeddings, query_ids, min(k, len(self.index)), own_rows)

    def scores(self, examples: Sequence[MaskedSentence], rows: np.ndarray) -> np.ndarray:
        """Scores of fused retrieval of given passages, of the shape of `rows` (see
        `Fusion.scores`)."""
        return self.fusion.scores(self.index, self.collator.query_ids(examples), rows, self._own_rows(examples))

    def _own_rows(self, examples: Sequence[MaskedSentence]) -> list[int]:
        return own_rows(examples, self.statements, self.collator.inputs.passages)


def own_rows(examples: Sequence[MaskedSentence], statements: PreparedCorpus, passages: PreparedCorpus) -> list[int]:
    """The passage that each sentence was taken from; -1 if it is not from the passages."""
    same_corpus = passages.fingerprint == statements.fingerprint
    return [example.row if same_corpus else -1 for example in examples]


def embed_masked(
    query_tower: nn.Module,
    examples: Sequence[MaskedSentence],
    collator: MaskedCollator,
    precision: Precision,
    batch_size: int = 256,
) -> np.ndarray:
    """Query embeddings of the examples, (len(examples), D) float32; no gradient, no dropout."""
    mask_id = collator.inputs.wordpieces.mask
    order = np.argsort([len(example.query_ids(mask_id)) for example in examples], kind="stable")
    embeddings: list[np.ndarray] = []
    for start in range(0, len(order), batch_size):
        ids_BL, mask_BL = collator.queries([examples[i] for i in order[start : start + batch_size]])
        embeddings.append(embed_no_grad(query_tower, ids_BL, mask_BL, precision))
    return np.concatenate(embeddings)[order.argsort()]
