"""Large batches in chunks: the same loss and gradients as the whole batch, in less memory."""

import numpy as np
import pytest
import torch
from torch import Tensor

from realm.models.batches import PairBatch
from realm.models.bert import BertSource
from realm.models.modules import DualEncoderModel
from realm.models.retriever import Retriever, RetrieverConfig, build_retriever, embed_by_length
from realm.text.inputs import pad_batch

NUM_QUERIES, NUM_PASSAGES = 7, 10


def build(tokenizer, dropout: float = 0.0, shared: bool = True) -> Retriever:
    torch.manual_seed(0)
    bert = BertSource(layers=2, hidden=16, heads=2, intermediate=32, max_positions=40, dropout=dropout, init_std=0.3)
    config = RetrieverConfig(
        bert=bert, projection_dim=6, shared_tower=shared, max_query_tokens=20, max_passage_tokens=40
    )
    return build_retriever(config, tokenizer).double()


def pairs() -> PairBatch:
    rng = np.random.default_rng(0)
    queries = pad_batch([rng.integers(5, 90, rng.integers(3, 12)) for _ in range(NUM_QUERIES)], 0)
    passages = pad_batch([rng.integers(5, 90, rng.integers(3, 30)) for _ in range(NUM_PASSAGES)], 0)
    excluded_BC = torch.zeros(NUM_QUERIES, NUM_PASSAGES, dtype=torch.bool)
    excluded_BC[0, 8] = excluded_BC[3, 1] = True
    return PairBatch(*queries, *passages, torch.arange(NUM_QUERIES), excluded_BC)


def loss_and_gradients(retriever: Retriever, chunk_size: int | None) -> tuple[Tensor, list[Tensor]]:
    loss = DualEncoderModel(retriever, chunk_size)(pairs())["loss"]
    return loss.detach(), list(torch.autograd.grad(loss, list(retriever.parameters()), allow_unused=True))


@pytest.mark.parametrize("shared", [True, False], ids=["one tower", "two towers"])
@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_chunks_change_neither_loss_nor_gradients(tokenizer, chunk_size: int, shared: bool) -> None:
    retriever = build(tokenizer, shared=shared)
    # In one piece: every text padded to the longest, one call per tower.
    batch = pairs()
    query_emb_BD = retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
    passage_emb_CD = retriever.embed_passages(batch.passage_ids_CL, batch.passage_mask_CL)
    score_BC = (query_emb_BD @ passage_emb_CD.T).masked_fill(batch.excluded_BC, -1e9)
    expected = -score_BC.log_softmax(-1).gather(1, batch.target_B[:, None]).mean()
    expected_gradients = torch.autograd.grad(expected, list(retriever.parameters()), allow_unused=True)
    loss, gradients = loss_and_gradients(retriever, chunk_size)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    used = 0
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)
            used += int(gradient.abs().sum() > 0)
    assert used > 10


def test_the_replay_of_a_chunk_draws_the_same_dropout(tokenizer) -> None:
    retriever = build(tokenizer, dropout=0.2).train()
    batch = pairs()
    results = []
    for replayed in (False, True):
        torch.manual_seed(1)
        # Five buckets, with and without keeping their activations.
        options = {"chunk_size": 2} if replayed else {"num_buckets": 5}
        emb_CD = embed_by_length(retriever.embed_passages, batch.passage_ids_CL, batch.passage_mask_CL, **options)
        results.append([emb_CD, *torch.autograd.grad(emb_CD.square().sum(), list(retriever.parameters())[:3])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_activations_of_chunks_are_not_kept(tokenizer) -> None:
    retriever = build(tokenizer)

    def kept_bytes(chunk_size: int | None) -> int:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in retriever.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            DualEncoderModel(retriever, chunk_size)(pairs())
        return sum(sizes.values())

    assert kept_bytes(3) < kept_bytes(None) / 20
