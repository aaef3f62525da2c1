"""Full softmax attention: the default of the reader, the attention of the retriever's towers, and
the baseline of the other variants.

On a GPU this is torch's fused kernel. On a CPU the backward pass of that kernel takes most of a
training step, so short texts use matrix products instead: a few rows at a time, so that scores stay
in the cache, with probabilities saved for the backward pass. Without gradients the fused kernel is
faster on CPUs with AMX.

Shape legend: B rows, H heads, L tokens, D width of a head, R rows processed at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from realm.attention.variant import AttentionConfig
from realm.attention.windowed import CACHED_SCORES, WindowInputs, mask_scores_, softmax_dtype, windowed_attention

_MAX_CACHED_TOKENS = 512
"""Longest text for which probabilities (L × L) are saved for the backward pass; longer ones use the
fused kernel, which saves none."""


@AttentionConfig.register_subclass("dense")
@dataclass(frozen=True)
class DenseAttention(AttentionConfig):
    """Every token attends to every token; time and (without a fused kernel) memory are quadratic in
    the length."""

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        """BERT's module is kept; it dispatches to `dense_attention`."""
        return attention


def dense_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    mask_BL: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · `scaling`) v, (B, L, H, D), with the signature of transformers' attention
    interface; `mask_BL` is 0 on padding, or None without padding.

    `sliding_window`: in the local layers of families that have them, one more than the tokens
    visible on each side.
    """
    if sliding_window is not None:
        query_BHLD = query_BHLD if scaling is None else query_BHLD * (scaling * query_BHLD.shape[-1] ** 0.5)
        inputs = WindowInputs.without_shared_keys(query_BHLD, key_BHLD, value_BHLD, mask_BL)
        return windowed_attention(inputs, sliding_window - 1, dropout).transpose(1, 2), None
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    token_mask_BL = None if mask_BL is None else mask_BL.bool()
    if (
        query_BHLD.device.type == "cpu"
        and query_BHLD.shape[2] <= _MAX_CACHED_TOKENS
        and not dropout
        and not _fused_is_faster(query_BHLD.dtype)
    ):
        return _CachedAttention.apply(query_BHLD, key_BHLD, value_BHLD, token_mask_BL, scale), None  # type: ignore[no-untyped-call]
    attn_mask = None if token_mask_BL is None else token_mask_BL[:, None, None, :]
    out_BHLD = F.scaled_dot_product_attention(query_BHLD, key_BHLD, value_BHLD, attn_mask, dropout, scale=scale)
    return out_BHLD.transpose(1, 2), None


class _CachedAttention(torch.autograd.Function):
    """Attention as matrix products in the dtype of the inputs; the softmax is computed in fp32 or
    better."""

    @staticmethod
    def forward(
        ctx: Any, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, token_mask_BL: Tensor | None, scale: float
    ) -> Tensor:
        query_BHLD, key_BHLD, value_BHLD = query_BHLD.contiguous(), key_BHLD.contiguous(), value_BHLD.contiguous()
        B, H, L, D = query_BHLD.shape
        chunk_rows, save_probabilities = _rows_per_chunk(H, L), any(ctx.needs_input_grad)
        probability_BHLL = query_BHLD.new_empty(B if save_probabilities else min(chunk_rows, B), H, L, L)
        score_RHLL = torch.empty(min(chunk_rows, B), H, L, L, dtype=softmax_dtype(query_BHLD))
        out_BLHD = value_BHLD.new_empty(B, L, H, D)
        for start in range(0, B, chunk_rows):
            rows = slice(start, min(start + chunk_rows, B))
            size = rows.stop - start
            probability = probability_BHLL[rows] if save_probabilities else probability_BHLL[:size]
            score = score_RHLL[:size]
            score.copy_(torch.matmul(query_BHLD[rows] * scale, key_BHLD[rows].transpose(-1, -2), out=probability))
            if token_mask_BL is not None:
                mask_scores_(score, ~token_mask_BL[rows, None, None, :])
            probability.copy_(torch.softmax(score, -1, out=score))
            out_BLHD[rows] = torch.matmul(probability, value_BHLD[rows]).transpose(1, 2)
        ctx.save_for_backward(query_BHLD, key_BHLD, value_BHLD, probability_BHLL if save_probabilities else None)
        ctx.scale = scale
        return out_BLHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_BHLD, key_BHLD, value_BHLD, probability_BHLL = ctx.saved_tensors
        grad_out_BHLD = grad_outputs[0].transpose(1, 2).contiguous()
        B, H, L, _ = query_BHLD.shape
        chunk_rows, dtype = _rows_per_chunk(H, L), softmax_dtype(query_BHLD)
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query_BHLD, key_BHLD, value_BHLD))
        for start in range(0, B, chunk_rows):
            rows = slice(start, min(start + chunk_rows, B))
            probability, grad_out = probability_BHLL[rows], grad_out_BHLD[rows]
            torch.matmul(probability.transpose(-1, -2), grad_out, out=grad_value[rows])
            grad_probability = torch.matmul(grad_out, value_BHLD[rows].transpose(-1, -2)).to(dtype)
            grad_score = torch._softmax_backward_data(grad_probability, probability.to(dtype), -1, dtype)
            grad_score = grad_score.to(query_BHLD.dtype).mul_(ctx.scale)
            torch.matmul(grad_score, key_BHLD[rows], out=grad_query[rows])
            torch.matmul(grad_score.transpose(-1, -2), query_BHLD[rows], out=grad_key[rows])
        return grad_query, grad_key, grad_value, None, None


def _fused_is_faster(dtype: torch.dtype) -> bool:
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() or dtype != torch.bfloat16:
        return False
    return bool(torch.cpu.get_capabilities().get("amx_tile", False))


def _rows_per_chunk(heads: int, length: int) -> int:
    return max(1, CACHED_SCORES // (heads * length * length))
