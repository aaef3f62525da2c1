"""Dense attention on a CPU against `naive.dense` in double precision: outputs, gradients, padding,
and the number of rows per chunk."""

import math

import pytest
import torch
from torch import nn

from realm.attention import dense, naive
from realm.attention.dense import dense_attention

MODULE = nn.Identity()


def inputs(rows: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value (B, 2, L, 4), and a padding mask that leaves row b with L - b tokens, at
    least one."""
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
    """`naive.dense` for every row and head, with padded keys removed, (B, L, H, D)."""
    B, H = query.shape[:2]
    rows = []
    for b in range(B):
        kept = slice(None) if mask_BL is None else mask_BL[b].bool()
        heads = [naive.dense(query[b, h], key[b, h, kept], value[b, h, kept], scale) for h in range(H)]
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("cached_scores", [1, 2 * 25 * 2, 2**19], ids=["one row", "two rows", "all rows"])
@pytest.mark.parametrize("padded", [True, False])
def test_outputs_and_gradients_equal_the_naive_reference(monkeypatch, cached_scores, padded):
    monkeypatch.setattr(dense, "CACHED_SCORES", cached_scores)
    tensors, mask_BL = inputs(3, 5)
    mask = mask_BL if padded else None
    weight = torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output, _ = dense_attention(MODULE, *tensors, mask, scaling=0.3)
    gradients = torch.autograd.grad((output * weight).sum(), tensors)
    expected = naive_heads(*tensors, mask, 0.3)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), tensors)
    assert torch.allclose(output, expected, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-12)


def test_inference_mode_gives_the_same_outputs(monkeypatch):
    monkeypatch.setattr(dense, "CACHED_SCORES", 60)
    tensors, mask_BL = inputs(4, 5)
    with torch.inference_mode():
        inference = dense_attention(MODULE, *tensors, mask_BL)[0]
    assert torch.equal(inference, dense_attention(MODULE, *tensors, mask_BL)[0])


@pytest.mark.parametrize("length", [1, 7, 33])
def test_the_fused_kernel_for_long_texts_agrees(monkeypatch, length):
    tensors, mask_BL = inputs(3, length)
    cached = dense_attention(MODULE, *tensors, mask_BL)[0]
    cached_gradients = torch.autograd.grad(cached.square().sum(), tensors)
    monkeypatch.setattr(dense, "_MAX_CACHED_TOKENS", 0)
    fused = dense_attention(MODULE, *tensors, mask_BL)[0]
    fused_gradients = torch.autograd.grad(fused.square().sum(), tensors)
    assert fused.shape == cached.shape == (3, length, 2, 4)
    assert torch.allclose(cached, fused, atol=1e-10)
    for cached_gradient, fused_gradient in zip(cached_gradients, fused_gradients, strict=True):
        assert torch.allclose(cached_gradient, fused_gradient, atol=1e-10)


def test_padding_does_not_change_outputs():
    tensors, mask_BL = inputs(2, 9)
    mask_BL[:] = 1
    mask_BL[:, 6:] = 0
    padded = dense_attention(MODULE, *tensors, mask_BL)[0]
    short = dense_attention(MODULE, *(tensor[:, :, :6] for tensor in tensors), None)[0]
    assert torch.allclose(padded[:, :6], short, atol=1e-14)


def test_the_softmax_of_bf16_inputs_is_fp32():
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
