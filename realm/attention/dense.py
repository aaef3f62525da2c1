"""Full softmax attention: the yardstick of every other variant, and what the retriever's towers
use.

On a GPU it is torch's fused kernel. On a CPU that kernel spends most of a training step in its
backward pass, so short texts go through matrix products here: a few rows at a time, so that scores
stay in the cache, the probabilities kept for the gradient. Without a gradient the fused kernel is
the faster one where it can use the tiles of AMX.

Shape legend: B rows, H heads, L tokens, D width of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from realm.attention.variant import AttentionConfig
from realm.attention.windowed import CACHED_SCORES, Windowed, hide_, softmax_dtype, windowed_attention

_LONGEST = 512
"""Tokens up to which probabilities (L × L) are kept for the gradient; longer texts go to the
fused kernel, which keeps none."""


@AttentionConfig.register_subclass("dense")
@dataclass(frozen=True)
class DenseAttention(AttentionConfig):
    """Every token attends to every token; time and (without a fused kernel) memory grow with the
    square of the length."""

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        """BERT's own module, dispatched to `dense_attention`, is the implementation."""
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
    """softmax(q kᵀ · `scaling`) v, (B, L, H, D), as transformers calls it; `mask_BL` is 0 on
    padding, None where there is none.

    `sliding_window`: in families with layers that are local by themselves, the places that such a
    layer sees on each side, and one.
    """
    if sliding_window is not None:
        query_BHLD = query_BHLD if scaling is None else query_BHLD * (scaling * query_BHLD.shape[-1] ** 0.5)
        return windowed_attention(
            Windowed.alone(query_BHLD, key_BHLD, value_BHLD, mask_BL), sliding_window - 1, dropout
        ).transpose(1, 2), None
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    keep_BL = None if mask_BL is None else mask_BL.bool()
    if (
        query_BHLD.device.type == "cpu"
        and query_BHLD.shape[2] <= _LONGEST
        and not dropout
        and not _fused_is_faster(query_BHLD.dtype)
    ):
        return _CachedAttention.apply(query_BHLD, key_BHLD, value_BHLD, keep_BL, scale), None  # type: ignore[no-untyped-call]
    keep = None if keep_BL is None else keep_BL[:, None, None, :]
    return F.scaled_dot_product_attention(query_BHLD, key_BHLD, value_BHLD, keep, dropout, scale=scale).transpose(
        1, 2
    ), None


class _CachedAttention(torch.autograd.Function):
    """Attention by matrix products in the dtype of its inputs, the softmax in single precision
    or better."""

    @staticmethod
    def forward(
        ctx: Any, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, keep_BL: Tensor | None, scale: float
    ) -> Tensor:
        query_BHLD, key_BHLD, value_BHLD = query_BHLD.contiguous(), key_BHLD.contiguous(), value_BHLD.contiguous()
        B, H, L, D = query_BHLD.shape
        rows, keep_all = _rows_at_a_time(H, L), any(ctx.needs_input_grad)
        probability_BHLL = query_BHLD.new_empty(B if keep_all else min(rows, B), H, L, L)
        score_RHLL = torch.empty(min(rows, B), H, L, L, dtype=softmax_dtype(query_BHLD))
        output_BLHD = value_BHLD.new_empty(B, L, H, D)
        for start in range(0, B, rows):
            part = slice(start, min(start + rows, B))
            size = part.stop - start
            probability, score = probability_BHLL[part] if keep_all else probability_BHLL[:size], score_RHLL[:size]
            score.copy_(torch.matmul(query_BHLD[part] * scale, key_BHLD[part].transpose(-1, -2), out=probability))
            if keep_BL is not None:
                hide_(score, ~keep_BL[part, None, None, :])
            probability.copy_(torch.softmax(score, -1, out=score))
            output_BLHD[part] = torch.matmul(probability, value_BHLD[part]).transpose(1, 2)
        ctx.save_for_backward(query_BHLD, key_BHLD, value_BHLD, probability_BHLL if keep_all else None)
        ctx.scale = scale
        return output_BLHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_BHLD, key_BHLD, value_BHLD, probability_BHLL = ctx.saved_tensors
        output_gradient_BHLD = gradients[0].transpose(1, 2).contiguous()
        B, H, L, _ = query_BHLD.shape
        rows, dtype = _rows_at_a_time(H, L), softmax_dtype(query_BHLD)
        query_gradient, key_gradient, value_gradient = (
            torch.empty_like(tensor) for tensor in (query_BHLD, key_BHLD, value_BHLD)
        )
        for start in range(0, B, rows):
            part = slice(start, min(start + rows, B))
            probability, gradient = probability_BHLL[part], output_gradient_BHLD[part]
            torch.matmul(probability.transpose(-1, -2), gradient, out=value_gradient[part])
            towards = torch.matmul(gradient, value_BHLD[part].transpose(-1, -2)).to(dtype)
            score = (
                torch._softmax_backward_data(towards, probability.to(dtype), -1, dtype)
                .to(query_BHLD.dtype)
                .mul_(ctx.scale)
            )
            torch.matmul(score, key_BHLD[part], out=query_gradient[part])
            torch.matmul(score.transpose(-1, -2), query_BHLD[part], out=key_gradient[part])
        return query_gradient, key_gradient, value_gradient, None, None


def _fused_is_faster(dtype: torch.dtype) -> bool:
    if torch.compiler.is_compiling():
        return True
    return (
        not torch.is_grad_enabled() and dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_tile", False)
    )


def _rows_at_a_time(heads: int, length: int) -> int:
    return max(1, CACHED_SCORES // (heads * length * length))
