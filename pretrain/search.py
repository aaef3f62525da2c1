"""Search with a retriever that stands still: for the reader's warm-up and for measuring, where no refresher is needed."""

from collections.abc import Sequence

import numpy as np
import torch

from index.build import build_index
from index.encode import encode_passages
from pretrain.data import BatchMaker, MaskedSentence
from realm.corpus import PreparedCorpus
from realm.retriever import Retriever


class FrozenSearch:
    """All passages embedded once, in memory, searched exactly."""

    def __init__(self, retriever: Retriever, passages: PreparedCorpus, maker: BatchMaker) -> None:
        self.retriever, self.maker = retriever, maker
        self.index = build_index(encode_passages(retriever, passages, np.arange(len(passages)), maker.wordpieces, maker.max_passage))

    def __call__(self, examples: Sequence[MaskedSentence], k: int, batch_size: int = 256) -> np.ndarray:
        """Rows of the `k` best passages for each masked sentence, (len(examples), k), best first; all of them where there are fewer."""
        embeddings = embed_masked(self.retriever, examples, self.maker, batch_size)
        return self.index.search(embeddings, min(k, self.index.ntotal))[1]


def embed_masked(retriever: Retriever, examples: Sequence[MaskedSentence], maker: BatchMaker, batch_size: int = 256) -> np.ndarray:
    """Query embeddings of masked sentences, (len(examples), D) float32, without gradient and without dropout."""
    device = next(retriever.parameters()).device
    training = retriever.training
    retriever.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            ids_BL, mask_BL = maker.queries(examples[start : start + batch_size])
            parts.append(retriever.embed_queries(ids_BL.to(device), mask_BL.to(device)).float().cpu().numpy())
    retriever.train(training)
    return np.concatenate(parts)
