"""Encoding of passages: order, padding, precision, compilation, shards."""

import numpy as np
import pytest
import torch
from fake_refresher import DIM, MAX_TOKENS, SPECIAL_IDS, FakeCorpus, FakeRetriever
from transformers import BertConfig, BertModel

from index.encode import NonFiniteEmbeddings, encode_in_shards, encode_passages, encoding_tower
from realm.errors import UserError
from realm.models.retriever import Retriever, Tower
from realm.text.inputs import pad_batch


def test_embeddings_are_in_the_requested_order(corpus: FakeCorpus) -> None:
    tower = FakeRetriever(seed=1).eval()
    rows = np.random.default_rng(0).permutation(len(corpus))[:40]
    emb_RD = encode_passages(tower, corpus, rows, SPECIAL_IDS, MAX_TOKENS, token_budget=64)
    assert emb_RD.dtype == np.float32 and emb_RD.shape == (40, DIM)
    for row, emb_D in zip(rows.tolist(), emb_RD, strict=True):
        sequence = SPECIAL_IDS.passage(corpus.title_ids(row), corpus.text_ids(row), MAX_TOKENS)
        with torch.inference_mode():
            alone_D = tower(*pad_batch([sequence], 0))[0].numpy()
        np.testing.assert_allclose(emb_D, alone_D, rtol=1e-5, atol=1e-6)


def test_batches_respect_the_token_budget_with_little_padding(corpus: FakeCorpus) -> None:
    tower = FakeRetriever(seed=1).eval()
    done: list[int] = []
    encode_passages(
        tower, corpus, np.arange(len(corpus)), SPECIAL_IDS, MAX_TOKENS, token_budget=64, progress=done.append
    )
    padded = sum(rows * longest for rows, longest in tower.batch_shapes)
    assert max(rows * longest for rows, longest in tower.batch_shapes) <= 64
    assert padded < 1.1 * np.minimum(corpus.lengths + 3, MAX_TOKENS).sum()
    assert done[-1] == len(corpus) and len(done) == len(tower.batch_shapes)


def tiny_retriever() -> Retriever:
    bert = BertModel(
        BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        False,
    )
    tower = Tower(bert, "mean", None, True)
    return Retriever(tower, tower, 1.0).eval()


@pytest.mark.parametrize("max_tokens", [100, 288])
def test_aligned_padding_of_long_passages_does_not_change_embeddings(max_tokens: int) -> None:
    """Lengths are rounded up, but never beyond `max_tokens`."""
    torch.manual_seed(0)
    corpus, rows = FakeCorpus(12), np.arange(12)
    corpus._texts = [np.arange(3, 3 + length).astype(np.int32) % 97 + 3 for length in range(40, 160, 10)]
    corpus.lengths = np.array(
        [len(title) + len(text) for title, text in zip(corpus._titles, corpus._texts, strict=True)]
    )
    tower, widths = encoding_tower(tiny_retriever(), "fp32"), []
    tower.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    embeddings = encode_passages(tower, corpus, rows, SPECIAL_IDS, max_tokens, token_budget=400)
    assert {width for width in widths if width > 64} <= {80, 96, 112, 128, 144, 160, 176, max_tokens} and max(
        widths
    ) <= max_tokens
    for row in rows.tolist():
        sequence = SPECIAL_IDS.passage(corpus.title_ids(row), corpus.text_ids(row), max_tokens)
        with torch.inference_mode():
            np.testing.assert_allclose(embeddings[row], tower(*pad_batch([sequence], 0))[0].numpy(), atol=2e-6)


def test_bf16_leaves_the_retriever_unchanged_and_is_close_to_fp32(corpus: FakeCorpus) -> None:
    torch.manual_seed(0)
    retriever, rows = tiny_retriever(), np.arange(len(corpus))
    exact = encode_passages(encoding_tower(retriever, "fp32"), corpus, rows, SPECIAL_IDS, MAX_TOKENS)
    rounded = encode_passages(encoding_tower(retriever, "bf16"), corpus, rows, SPECIAL_IDS, MAX_TOKENS)
    assert next(retriever.parameters()).dtype == torch.float32 and rounded.dtype == np.float32
    assert 0 < (1 - (exact * rounded).sum(1)).max() < 1e-3


@pytest.mark.slow
def test_compiled_encoding_equals_eager_for_all_lengths_and_encoders(corpus: FakeCorpus) -> None:
    """Weights are compiled as constants; those of the next encoder must replace them."""
    rows = np.arange(len(corpus))
    for seed in range(2):
        torch.manual_seed(seed)
        retriever = tiny_retriever()
        exact = encode_passages(encoding_tower(retriever, "fp32"), corpus, rows, SPECIAL_IDS, MAX_TOKENS)
        compiled = encode_passages(
            encoding_tower(retriever, "fp32", compiled=True), corpus, rows, SPECIAL_IDS, MAX_TOKENS, token_budget=64
        )
        np.testing.assert_allclose(compiled, exact, atol=1e-5)


def test_failed_compilation_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("No working C++ compiler found\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        UserError, match=r"refresh.compile: torch cannot compile .*No working C\+\+ compiler found\); install"
    ):
        encoding_tower(tiny_retriever(), "fp32", compiled=True)


def test_non_finite_embeddings_are_reported(corpus: FakeCorpus) -> None:
    tower = FakeRetriever(seed=1).eval()
    with torch.no_grad():
        tower.table.weight[corpus.text_ids(7)[0]] = torch.nan
    with pytest.raises(NonFiniteEmbeddings, match="not finite"):
        encode_passages(tower, corpus, np.array([7]), SPECIAL_IDS, MAX_TOKENS)


def test_shards_of_another_plan_are_deleted(tmp_path: object) -> None:
    work = tmp_path / "work"  # type: ignore[operator]

    def run(factor: float, plan: dict) -> tuple[np.ndarray, int]:
        shards, num_kept = encode_in_shards(
            work, range(10), 4, plan, lambda rows: factor * rows[:, None].astype(np.float32), lambda fraction_done: None
        )
        return np.concatenate(shards)[:, 0], num_kept

    values, num_kept = run(1.0, {"encoder": "a"})
    assert num_kept == 0 and values.tolist() == list(range(10))
    values, num_kept = run(2.0, {"encoder": "a"})
    assert num_kept == 3 and values.tolist() == list(range(10))
    values, num_kept = run(2.0, {"encoder": "b"})
    assert num_kept == 0 and values.tolist() == list(range(0, 20, 2))
