import numpy as np
import pytest
import torch
from fake_refresher import DIM, MAX_TOKENS, SPECIAL_IDS, FakeCorpus, FakeRetriever

from index.encode import BadEncoder, encode_in_shards, encode_passages
from realm.inputs import pad_batch, passage_input


def test_embeddings_come_in_the_order_asked_for_whatever_the_batches(corpus: FakeCorpus) -> None:
    retriever = FakeRetriever(seed=1)
    rows = np.random.default_rng(0).permutation(len(corpus))[:40]
    emb_RD = encode_passages(retriever, corpus, rows, SPECIAL_IDS, MAX_TOKENS, token_budget=64)
    assert emb_RD.dtype == np.float32 and emb_RD.shape == (40, DIM)
    for row, emb_D in zip(rows.tolist(), emb_RD, strict=True):
        sequence = passage_input(corpus.title_ids(row), corpus.text_ids(row), SPECIAL_IDS.cls, SPECIAL_IDS.sep, MAX_TOKENS)
        with torch.inference_mode():
            alone_D = retriever.eval().embed_passages(*pad_batch([sequence], 0))[0].numpy()
        np.testing.assert_allclose(emb_D, alone_D, rtol=1e-5, atol=1e-6)


def test_batches_stay_within_the_token_budget_and_waste_little(corpus: FakeCorpus) -> None:
    retriever = FakeRetriever(seed=1)
    done: list[int] = []
    encode_passages(retriever, corpus, np.arange(len(corpus)), SPECIAL_IDS, MAX_TOKENS, token_budget=64, progress=done.append)
    padded = sum(rows * longest for rows, longest in retriever.batch_shapes)
    assert max(rows * longest for rows, longest in retriever.batch_shapes) <= 64
    assert padded < 1.1 * np.minimum(corpus.lengths + 3, MAX_TOKENS).sum()
    assert done[-1] == len(corpus) and len(done) == len(retriever.batch_shapes)


def test_training_mode_is_given_back(corpus: FakeCorpus) -> None:
    retriever = FakeRetriever(seed=1).train()
    encode_passages(retriever, corpus, np.arange(3), SPECIAL_IDS, MAX_TOKENS)
    assert retriever.training


def test_a_diverged_encoder_is_named_with_the_passage(corpus: FakeCorpus) -> None:
    retriever = FakeRetriever(seed=1)
    with torch.no_grad():
        retriever.table.weight[corpus.text_ids(7)[0]] = torch.nan
    with pytest.raises(BadEncoder, match="not finite"):
        encode_passages(retriever, corpus, np.array([7]), SPECIAL_IDS, MAX_TOKENS)


def test_shards_of_another_plan_are_thrown_away(tmp_path: object) -> None:
    work = tmp_path / "work"  # type: ignore[operator]

    def run(factor: float, plan: dict) -> tuple[np.ndarray, int]:
        shards, num_kept = encode_in_shards(work, range(10), 4, plan, lambda rows: factor * rows[:, None].astype(np.float32), lambda share: None)
        return np.concatenate(shards)[:, 0], num_kept

    values, num_kept = run(1.0, {"encoder": "a"})
    assert num_kept == 0 and values.tolist() == list(range(10))
    values, num_kept = run(2.0, {"encoder": "a"})
    assert num_kept == 3 and values.tolist() == list(range(10))
    values, num_kept = run(2.0, {"encoder": "b"})
    assert num_kept == 0 and values.tolist() == list(range(0, 20, 2))
