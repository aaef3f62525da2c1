"""Full softmax attention: the yardstick of every other variant.

Shape legend: B rows, H heads, L tokens, D width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realm.attention import AttentionConfig

SHORT = 512
"""Tokens up to which plain products train faster on a CPU in bf16 than torch's fused kernel."""


@AttentionConfig.register_subclass("dense")
@dataclass(frozen=True)
class DenseAttention(AttentionConfig):
    """Every token attends to every token; time and (without a fused kernel) memory grow with the square of the length."""

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        """BERT's own module, its core dispatched to `dense_attention`, is the implementation."""
        return attention


def dense_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, real_BL: Tensor | None, scale: float, dropout: float) -> Tensor:
    """softmax(q kᵀ · scale) v, (B, H, L, D), over the keys where `real_BL` is true; None: over all.

    torch's `scaled_dot_product_attention`, but for training on short bf16 inputs on a CPU, where the backward of its kernel takes several
    times as long as that of plain products.
    """
    mask_B11L = None if real_BL is None else real_BL.bool()[:, None, None, :]
    trains = torch.is_grad_enabled() and (q_BHLD.requires_grad or v_BHLD.requires_grad)
    if not trains or q_BHLD.device.type != "cpu" or q_BHLD.dtype != torch.bfloat16 or k_BHLD.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=mask_B11L, dropout_p=dropout, scale=scale)
    with torch.autocast("cpu", enabled=False):  # else the softmax would be widened to fp32 and written out so
        score_BHLL = (q_BHLD * scale) @ k_BHLD.transpose(-1, -2)
        if mask_B11L is not None:
            score_BHLL = score_BHLL + torch.zeros_like(mask_B11L, dtype=score_BHLL.dtype).masked_fill(~mask_B11L, torch.finfo(score_BHLL.dtype).min)
        p_BHLL = score_BHLL.softmax(-1)
        return (F.dropout(p_BHLL, dropout) if dropout else p_BHLL) @ v_BHLD
