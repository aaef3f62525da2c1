"""Search with a retriever that stands still: for the reader's warm-up and for measuring."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from index.frozen import index_for
from pretrain.data import BatchMaker, MaskedSentence
from pretrain.stage import batch_maker
from realm.retriever import embed_plain, load_retriever
from realm.run import Run
from realm.telemetry import console


class FrozenSearch:
    """The passages as a saved retriever embeds them, searched with its queries."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.retriever = load_retriever(folder)[0]
        self.maker = batch_maker(run)
        self.index = index_for(run, folder, lambda line: console.print(f"  {line}"))

    def __call__(self, examples: Sequence[MaskedSentence], k: int, batch_size: int = 256) -> np.ndarray:
        """Rows of the `k` best passages for each masked sentence, (len(examples), k), best first; all of them where there are fewer."""
        embeddings = embed_masked(self.retriever.query_tower, examples, self.maker, batch_size)
        return self.index.search(embeddings, min(k, len(self.index)))[1]


def embed_masked(query_tower: nn.Module, examples: Sequence[MaskedSentence], maker: BatchMaker, batch_size: int = 256) -> np.ndarray:
    """Query embeddings of masked sentences, (len(examples), D) float32, without gradient and without dropout."""
    batches = [maker.queries(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
    return np.concatenate([embed_plain(query_tower, ids_BL, mask_BL) for ids_BL, mask_BL in batches])
