"""Dense attention on a CPU against plain loops in double precision: outputs, gradients, padding,
and the rows taken at a time."""

import math

import pytest
import torch
from torch import nn

from realm.attention import dense, naive
from realm.attention.dense import dense_attention

MODULE = nn.Identity()


def inputs(rows: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value (B, 2, L, 4), and a padding mask under which row b has at most L - b
    tokens."""
    generator = torch.Generator().manual_seed(7)
    tensors = [
        torch.randn(rows, 2, length, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(3)
    ]
    mask_BL = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask_BL[row, max(1, length - row) :] = 0
    return tensors, mask_BL


def naive_heads(query, key, value, mask_BL, scale):
    """`naive.dense` on every row and head, padded keys removed, (B, L, H, D)."""
    B, H = query.shape[:2]
    rows = []
    for b in range(B):
        kept = slice(None) if mask_BL is None else mask_BL[b].bool()
        heads = [naive.dense(query[b, h], key[b, h, kept], value[b, h, kept], scale) for h in range(H)]
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("cached_scores", [1, 2 * 25 * 2, 2**19], ids=["a row", "two rows", "all"])
@pytest.mark.parametrize("padded", [True, False])
def test_outputs_and_gradients_are_those_of_plain_loops(monkeypatch, cached_scores, padded):
    monkeypatch.setattr(dense, "CACHED_SCORES", cached_scores)
    tensors, mask_BL = inputs(3, 5)
    mask = mask_BL if padded else None
    weight = torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output, _ = dense_attention(MODULE, *tensors, mask, scaling=0.3)
    gradients = torch.autograd.grad((output * weight).sum(), tensors)
    expected = naive_heads(*tensors, mask, 0.3)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), tensors)
    assert torch.allclose(output, expected, atol=1e-12)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-12)


def test_without_gradient_the_outputs_are_the_same(monkeypatch):
    monkeypatch.setattr(dense, "CACHED_SCORES", 60)
    tensors, mask_BL = inputs(4, 5)
    with torch.inference_mode():
        alone = dense_attention(MODULE, *tensors, mask_BL)[0]
    assert torch.equal(alone, dense_attention(MODULE, *tensors, mask_BL)[0])


@pytest.mark.parametrize("length", [1, 7, 33])
def test_the_fused_kernel_that_reads_long_texts_agrees(monkeypatch, length):
    tensors, mask_BL = inputs(3, length)
    ours = dense_attention(MODULE, *tensors, mask_BL)[0]
    ours_gradients = torch.autograd.grad(ours.square().sum(), tensors)
    monkeypatch.setattr(dense, "_LONGEST", 0)
    fused = dense_attention(MODULE, *tensors, mask_BL)[0]
    assert fused.shape == ours.shape == (3, length, 2, 4)
    assert torch.allclose(ours, fused, atol=1e-10)
    for mine, theirs in zip(ours_gradients, torch.autograd.grad(fused.square().sum(), tensors), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


def test_padding_changes_nothing():
    tensors, mask_BL = inputs(2, 9)
    mask_BL[:] = 1
    mask_BL[:, 6:] = 0
    padded = dense_attention(MODULE, *tensors, mask_BL)[0]
    short = dense_attention(MODULE, *(tensor[:, :, :6] for tensor in tensors), None)[0]
    assert torch.allclose(padded[:, :6], short, atol=1e-14)


def test_half_precision_keeps_the_softmax_in_single():
    tensors, mask_BL = inputs(3, 200, torch.bfloat16)
    output = dense_attention(MODULE, *tensors, mask_BL)[0]
    exact = dense_attention(MODULE, *(tensor.double() for tensor in tensors), mask_BL)[0]
    assert output.dtype == torch.bfloat16
    assert (output.double() - exact).abs().mean() < 2**-8 * exact.abs().mean() * math.sqrt(2)


def test_dropout_drops_probabilities():
    tensors, mask_BL = inputs(2, 50)
    torch.manual_seed(0)
    dropped = dense_attention(MODULE, *tensors, mask_BL, dropout=0.5)[0]
    assert not torch.allclose(dropped, dense_attention(MODULE, *tensors, mask_BL)[0], atol=1e-2)
