"""What variants share that need no more than queries, keys and values: BERT's projections, taken
over with their weights, or those of another family of models, which stay where they are.

Shape legend: B rows, H heads, L tokens, D width of a head.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig


class ForeignHeads(nn.Module):
    """Stands for BERT's self-attention where a model makes queries, keys and values itself: a
    variant built on it is asked to `attend` alone."""

    def __init__(self, config: PreTrainedConfig, num_heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads, self.attention_head_size = num_heads, head_width
        self.query, self.key, self.value = nn.Identity(), nn.Identity(), nn.Identity()
        self.dropout = nn.Dropout(dropout)


def may_be_padded(real_BL: Tensor) -> bool:
    """False where nothing is padded; on a GPU always true, since looking would wait for it."""
    return real_BL.device.type != "cpu" or not bool(real_BL.all())


def masked_attention(
    query_BHLD: Tensor, key_BHGD: Tensor, value_BHGD: Tensor, seen_BG: Tensor, dropout: float
) -> Tensor:
    """Softmax attention to the keys where `seen_BG` is true, (B, H, L, D), by torch's fused
    kernel; where none is, to all of them, instead of NaN."""
    mask = None
    if may_be_padded(seen_BG):
        mask = (seen_BG | ~seen_BG.any(-1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(query_BHLD, key_BHGD, value_BHGD, mask, dropout)


class ProjectedSelfAttention(nn.Module, ABC):
    """Takes the place of a BERT self-attention module; subclasses say what becomes of queries,
    keys and values in `attend`."""

    def __init__(self, local: nn.Module) -> None:
        super().__init__()
        self.num_heads: int = local.num_attention_heads  # type: ignore[assignment]
        self.head_width: int = local.attention_head_size  # type: ignore[assignment]
        self.query: nn.Linear = local.query  # type: ignore[assignment]
        self.key: nn.Linear = local.key  # type: ignore[assignment]
        self.value: nn.Linear = local.value  # type: ignore[assignment]
        self.dropout: float = local.dropout.p  # type: ignore[union-attr, assignment]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object) -> tuple[Tensor, None]:
        """`hidden_states` (B, L, H·D); `attention_mask` (B, L) true on real tokens. Outputs on
        padding are finite and meaningless."""
        B, L, width = hidden_states.shape
        real_BL = (
            torch.ones(B, L, dtype=torch.bool, device=hidden_states.device)
            if attention_mask is None
            else attention_mask.bool()
        )

        def heads(projected: Tensor) -> Tensor:
            return projected.view(B, L, self.num_heads, -1).transpose(1, 2)

        out_BHLD = self.attend(
            heads(self.query(hidden_states)), heads(self.key(hidden_states)), heads(self.value(hidden_states)), real_BL
        )
        return out_BHLD.transpose(1, 2).reshape(B, L, width), None

    @abstractmethod
    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, real_BL: Tensor) -> Tensor:
        """The attention itself, (B, H, L, D); keys and values where `real_BL` is false must not
        count."""
