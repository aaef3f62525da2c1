"""The naive references: one for every registered variant, each equal to softmax attention where
its definition says so."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from realm.attention import AttentionConfig, naive

L, D = 9, 4


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one head, (L, D) each."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(L, D, generator=generator, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("variant", AttentionConfig.get_known_choices())
def test_every_registered_variant_has_a_documented_reference(variant):
    reference = getattr(naive, variant, None)
    assert inspect.isfunction(reference) and reference.__module__ == naive.__name__, (
        f"realm/attention/naive.py has no function {variant}()"
    )
    assert list(inspect.signature(reference).parameters) and "et al." in (inspect.getdoc(reference) or "")


def test_dense_is_torchs_scaled_dot_product_attention(qkv):
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(*qkv, scale=scale)
        torch.testing.assert_close(naive.dense(*qkv, scale), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "reference",
    [
        lambda *qkv: naive.longformer(qkv, qkv, [False] * L, window=L - 1),
        lambda *qkv: naive.longformer(qkv, qkv, [True] * L, window=1),
        lambda *qkv: naive.linformer(*qkv, torch.eye(L).double(), torch.eye(L).double()),
        lambda *qkv: naive.infini(*qkv, L, "delta", torch.tensor(0.7)),
    ],
    ids=["longformer, one window", "longformer, all global", "linformer, identity projections", "infini, one segment"],
)
def test_special_cases_are_dense_attention(reference, qkv):
    torch.testing.assert_close(reference(*qkv), naive.dense(*qkv), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["softmax", "trigonometric"])
def test_many_random_features_approach_dense_attention(kernel, qkv):
    query, key, value = 0.5 * qkv[0], 0.5 * qkv[1], qkv[2]
    projection = torch.randn(20_000, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = naive.performer(query, key, value, projection, kernel)
    torch.testing.assert_close(found, naive.dense(query, key, value), atol=0.02, rtol=0)
