"""Search with a retriever that stands still: for the reader's warm-up and for measuring."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from index.frozen import frozen_index
from pretrain.data import BatchMaker, MaskedSentence
from pretrain.stage import batch_maker
from realm.models.precision import Precision
from realm.models.retriever import embed_no_grad, load_retriever
from realm.run.folder import Run
from realm.runtime.distributed import local_device
from realm.runtime.telemetry import console


class FrozenSearch:
    """The passages as a saved retriever embeds them, searched with its queries."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.retriever = load_retriever(folder)[0].to(local_device())
        self.maker, self.precision = batch_maker(run), run.config.engine.precision
        self.index = frozen_index(
            run.folder, folder, run.passages, run.config.refresh, lambda line: console.print(f"  {line}")
        )

    def __call__(self, examples: Sequence[MaskedSentence], k: int) -> np.ndarray:
        """Rows of the `k` best passages for each masked sentence, (len(examples), k), best
        first; all of them where there are fewer."""
        embeddings = embed_masked(self.retriever.query_tower, examples, self.maker, self.precision)
        return self.index.search(embeddings, min(k, len(self.index)))[1]


def embed_masked(
    query_tower: nn.Module,
    examples: Sequence[MaskedSentence],
    maker: BatchMaker,
    precision: Precision,
    batch_size: int = 256,
) -> np.ndarray:
    """Query embeddings of masked sentences, (len(examples), D) float32, without gradient and
    without dropout."""
    order = np.argsort([len(example.sentence_ids) for example in examples], kind="stable")
    embeddings: list[np.ndarray] = []
    for start in range(0, len(order), batch_size):
        ids_BL, mask_BL = maker.queries([examples[i] for i in order[start : start + batch_size]])
        embeddings.append(embed_no_grad(query_tower, ids_BL, mask_BL, precision))
    return np.concatenate(embeddings)[order.argsort()]
