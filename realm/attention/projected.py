"""Base class of variants that need only queries, keys and values. These come from BERT's
projections, whose weights are kept, or from another model family, which keeps its projections.

Shape legend: B rows, H heads, L tokens, D width of a head, G keys.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig


class ExternalProjections(nn.Module):
    """Takes the place of a BERT self-attention module if the model projects queries, keys and
    values itself; only `attend` is called on a variant that is built from it."""

    def __init__(self, config: PreTrainedConfig, num_heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads, self.attention_head_size = num_heads, head_width
        self.query, self.key, self.value = nn.Identity(), nn.Identity(), nn.Identity()
        self.dropout = nn.Dropout(dropout)


def may_be_padded(token_mask_BL: Tensor) -> bool:
    """False if nothing is padded; always True on a GPU, where the check would synchronize."""
    return token_mask_BL.device.type != "cpu" or not bool(token_mask_BL.all())


def masked_attention(
    query_BHLD: Tensor, key_BHGD: Tensor, value_BHGD: Tensor, key_mask_BG: Tensor, dropout: float
) -> Tensor:
    """Softmax attention to the keys where `key_mask_BG` is true, (B, H, L, D), by torch's fused
    kernel; a row with no such key attends to all keys instead of returning NaN."""
    attn_mask = None
    if may_be_padded(key_mask_BG):
        attn_mask = (key_mask_BG | ~key_mask_BG.any(-1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(query_BHLD, key_BHGD, value_BHGD, attn_mask, dropout)


class ProjectedSelfAttention(nn.Module, ABC):
    """Replaces a BERT self-attention module; subclasses implement `attend` on projected queries,
    keys and values."""

    def __init__(self, bert_attention: nn.Module) -> None:
        super().__init__()
        self.num_heads: int = bert_attention.num_attention_heads  # type: ignore[assignment]
        self.head_width: int = bert_attention.attention_head_size  # type: ignore[assignment]
        self.query: nn.Linear = bert_attention.query  # type: ignore[assignment]
        self.key: nn.Linear = bert_attention.key  # type: ignore[assignment]
        self.value: nn.Linear = bert_attention.value  # type: ignore[assignment]
        self.dropout: float = bert_attention.dropout.p  # type: ignore[union-attr, assignment]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object) -> tuple[Tensor, None]:
        """`hidden_states` (B, L, H·D); `attention_mask` (B, L) is true on real tokens. Outputs on
        padding are finite but meaningless."""
        B, L, width = hidden_states.shape
        if attention_mask is None:
            attention_mask = torch.ones(B, L, dtype=torch.bool, device=hidden_states.device)

        def split_heads(projected: Tensor) -> Tensor:
            return projected.view(B, L, self.num_heads, -1).transpose(1, 2)

        query, key, value = (split_heads(project(hidden_states)) for project in (self.query, self.key, self.value))
        out_BHLD = self.attend(query, key, value, attention_mask.bool())
        return out_BHLD.transpose(1, 2).reshape(B, L, width), None

    @abstractmethod
    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, token_mask_BL: Tensor) -> Tensor:
        """The attention itself, (B, H, L, D); keys and values where `token_mask_BL` is false must
        not contribute."""
