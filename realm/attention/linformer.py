"""Keys and values projected along the length to a fixed number, so that attention is linear in the
length (Wang et al. 2020, "Linformer", section 4).

head = softmax(Q (E K)ᵀ / √D) (F V) with E and F of size k × n (equation 7). The projections are
initialized to mean pooling: row j averages bin j of k bins of the n positions, so that a pretrained
model starts with coarse but meaningful keys instead of random mixtures. A row whose bin lies
completely after the last real token is not attended to; a row with a partly filled bin averages the
tokens in it.

Shape legend: B rows, H heads, L tokens, D width of a head, K projected length, n the model's
positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realm.attention.projected import ProjectedSelfAttention, masked_attention, may_be_padded
from realm.attention.variant import AttentionConfig
from realm.errors import UserError


@AttentionConfig.register_subclass("linformer")
@dataclass(frozen=True)
class LinformerAttention(AttentionConfig):
    """Low-rank attention. A text of L of the model's n positions has about K · L / n keys, so
    `reader.max_tokens` should not be much larger than the texts."""

    fixed_length: ClassVar[bool] = True

    projected_tokens: int = 256
    """Projected length K."""
    sharing: Literal["none", "headwise", "key_value", "layerwise"] = "headwise"
    """`none`: one projection per head for keys and one for values; `headwise`: one E and one F per
    layer; `key_value`: one projection per layer for both; `layerwise`: one for all layers (section
    4.3)."""

    def __post_init__(self) -> None:
        if self.projected_tokens < 1:
            raise UserError(f"attention.projected_tokens must be at least 1, got {self.projected_tokens}.")

    def replace_all(self, attentions: Sequence[nn.Module]) -> list[nn.Module]:
        modules: list[LinformerSelfAttention] = []
        for attention in attentions:
            owner = modules[0] if modules and self.sharing == "layerwise" else None
            modules.append(LinformerSelfAttention(attention, self, owner))
        return list(modules)


class LinformerSelfAttention(ProjectedSelfAttention):
    """Has its own length projections, or uses those of the layer `owner`."""

    def __init__(
        self, bert_attention: nn.Module, config: LinformerAttention, owner: "LinformerSelfAttention | None" = None
    ) -> None:
        super().__init__(bert_attention)
        positions: int = bert_attention.config.max_position_embeddings  # type: ignore[union-attr, assignment]
        if config.projected_tokens > positions:
            raise UserError(
                f"attention.projected_tokens ({config.projected_tokens}) exceeds the reader's {positions} positions; "
                "lower it."
            )
        self.config = config
        heads = self.num_heads if config.sharing == "none" else 1
        pooling_HKn = mean_pooling(config.projected_tokens, positions).expand(heads, -1, -1)
        # A tuple hides the owner from nn.Module: its projection is saved and counted once.
        self.owner = (owner or self,)
        if owner is None:
            self.key_projection = nn.Parameter(pooling_HKn.clone())
        if config.sharing in ("none", "headwise"):
            self.value_projection = nn.Parameter(pooling_HKn.clone())

    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, token_mask_BL: Tensor) -> Tensor:
        L = query_BHLD.shape[2]
        key_projection = self.owner[0].key_projection
        K, positions = key_projection.shape[1:]
        if positions < L:
            raise UserError(
                f"a text of {L} wordpieces exceeds the {positions} positions of the linformer projections; "
                "shorten the text."
            )
        value_projection = self.value_projection if self.config.sharing in ("none", "headwise") else key_projection
        token_weight_BL = token_mask_BL.to(key_BHLD.dtype)
        padded = may_be_padded(token_mask_BL)
        # The means of bins that the text fills in part are rescaled to means of real tokens.
        starts_K, ends_K = bin_edges(K, positions, token_mask_BL.device)
        before_BL1 = F.pad(token_mask_BL.long().cumsum(1), (1, 0))
        count_BK = before_BL1[:, ends_K.clamp(max=L)] - before_BL1[:, starts_K.clamp(max=L)]
        filled_BK = count_BK.to(key_BHLD.dtype) / (ends_K - starts_K)
        factor_BK = torch.where(filled_BK > 0, 1 / filled_BK.clamp(min=1e-6), torch.zeros_like(filled_BK))

        def project(projection_HKn: Tensor, x_BHLD: Tensor) -> Tensor:
            if padded:
                x_BHLD = x_BHLD * token_weight_BL[:, None, :, None]
            projection_HKL = projection_HKn[..., :L].to(x_BHLD.dtype)
            if len(projection_HKL) == 1:  # heads that share a projection are one matrix product
                B, H, _, D = x_BHLD.shape
                x_BLW = x_BHLD.transpose(1, 2).reshape(B, L, H * D)
                projected_BHKD = (projection_HKL @ x_BLW).view(B, K, H, D).transpose(1, 2)
            else:
                projected_BHKD = projection_HKL @ x_BHLD
            return projected_BHKD * factor_BK[:, None, :, None]

        key_BHKD, value_BHKD = project(key_projection, key_BHLD), project(value_projection, value_BHLD)
        return masked_attention(query_BHLD, key_BHKD, value_BHKD, filled_BK > 0, self.dropout if self.training else 0.0)


def bin_edges(num_bins: int, positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Starts and ends (exclusive) of `num_bins` bins of the positions, both (num_bins,)."""
    edges = torch.arange(num_bins + 1, device=device) * positions // num_bins
    return edges[:-1], edges[1:]


def mean_pooling(num_bins: int, positions: int) -> Tensor:
    """Row j averages bin j of the positions, (num_bins, positions)."""
    starts, ends = bin_edges(num_bins, positions)
    position = torch.arange(positions)
    inside = (position >= starts[:, None]) & (position < ends[:, None])
    return inside / inside.sum(1, keepdim=True)
