"""Sliding-window attention with global tokens (Beltagy et al. 2020, "Longformer", sections 3.1 and
3.2).

Every token attends to the tokens at most `window` positions away and to the global tokens. A global
token attends to every token, through additional query, key and value projections that are
initialized as copies of the local ones. Windows may differ by layer, with smaller ones in lower
layers; a dilated head attends to every d-th token of a window d times as wide (section 3.1). Time
and memory are linear in the length.

Shape legend: B rows, H heads, L tokens, D width of a head, W hidden width, G maximum number of
global tokens in a row.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from realm.attention.projected import masked_attention
from realm.attention.variant import AttentionConfig
from realm.attention.windowed import WindowInputs, dilated_attention
from realm.errors import UserError


@AttentionConfig.register_subclass("longformer")
@dataclass(frozen=True)
class LongformerAttention(AttentionConfig):
    """Sliding window plus global tokens."""

    window: int = 256
    """Tokens visible on each side (the paper's w is 2 × this)."""
    layer_windows: tuple[int, ...] = ()
    """One `window` per layer, lowest first (default: `window` in all layers)."""
    dilation: tuple[int, ...] = ()
    """Distance between visible tokens, one value per head (default: 1 in all heads)."""

    def __post_init__(self) -> None:
        if min((self.window, *self.layer_windows)) < 1:
            raise UserError(
                f"attention.window must be at least 1 in every layer, got {min((self.window, *self.layer_windows))}."
            )
        if self.dilation and min(self.dilation) < 1:
            raise UserError(f"attention.dilation must be at least 1 in every head, got {min(self.dilation)}.")

    def replace_all(self, attentions: Sequence[nn.Module]) -> list[nn.Module]:
        if self.layer_windows and len(self.layer_windows) != len(attentions):
            raise UserError(
                f"attention.layer_windows has {len(self.layer_windows)} values for an encoder of {len(attentions)} "
                "layers; give one per layer."
            )
        windows = self.layer_windows or (self.window,) * len(attentions)
        return [
            LongformerSelfAttention(attention, window, self.dilation)
            for attention, window in zip(attentions, windows, strict=True)
        ]


class LongformerSelfAttention(nn.Module):
    """Keeps the projections of a BERT self-attention module as the local ones and adds global
    ones."""

    def __init__(self, bert_attention: nn.Module, window: int, dilation: Sequence[int] = ()) -> None:
        super().__init__()
        self.window = window
        self.num_heads: int = bert_attention.num_attention_heads  # type: ignore[assignment]
        if dilation and len(dilation) != self.num_heads:
            raise UserError(
                f"attention.dilation has {len(dilation)} values for an encoder of {self.num_heads} heads; "
                "give one per head."
            )
        self.dilation = tuple(dilation) or (1,) * self.num_heads
        self.query: nn.Linear = bert_attention.query  # type: ignore[assignment]
        self.key: nn.Linear = bert_attention.key  # type: ignore[assignment]
        self.value: nn.Linear = bert_attention.value  # type: ignore[assignment]
        self.query_global = copy.deepcopy(self.query)
        self.key_global = copy.deepcopy(self.key)
        self.value_global = copy.deepcopy(self.value)
        self.dropout: float = bert_attention.dropout.p  # type: ignore[union-attr, assignment]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """`hidden_states` (B, L, H·D); `attention_mask` (B, L) is true on real tokens;
        `global_mask` (B, L) is true on global tokens.

        Without a global mask, the first token of every row ([CLS]) is global. Outputs on padding
        are finite but meaningless.
        """
        B, L, width = hidden_states.shape
        if attention_mask is None:
            attention_mask = torch.ones(B, L, dtype=torch.bool, device=hidden_states.device)
        token_mask_BL = attention_mask.bool()
        if global_mask is None:
            global_mask = torch.zeros_like(token_mask_BL)
            global_mask[:, 0] = True
        global_mask_BL = global_mask.bool() & token_mask_BL
        dropout = self.dropout if self.training else 0.0

        def split_heads(projected: Tensor) -> Tensor:
            return projected.view(B, -1, self.num_heads, width // self.num_heads).transpose(1, 2)

        position_BG, slot_mask_BG = global_positions(global_mask_BL)
        q, k, v = (split_heads(project(hidden_states)) for project in (self.query, self.key, self.value))
        shared_k, shared_v = (
            x.gather(2, position_BG[:, None, :, None].expand(-1, self.num_heads, -1, x.shape[-1])) for x in (k, v)
        )
        local_mask_BL = token_mask_BL & ~global_mask_BL  # global keys are shared keys; windows must not count them too
        dilations = sorted(set(self.dilation))
        parts = []
        for dilation in dilations:
            heads = slice(None) if len(dilations) == 1 else [h for h, d in enumerate(self.dilation) if d == dilation]
            inputs = WindowInputs(
                q[:, heads],
                k[:, heads],
                v[:, heads],
                shared_k[:, heads],
                shared_v[:, heads],
                local_mask_BL,
                slot_mask_BG,
            )
            parts.append(dilated_attention(inputs, self.window, dilation, dropout))
        head_order = sorted(range(self.num_heads), key=lambda head: self.dilation[head])  # the order in `parts`
        out_BHLD = parts[0] if len(parts) == 1 else torch.cat(parts, 1)[:, torch.tensor(head_order).argsort().tolist()]

        hidden_BGW = hidden_states.gather(1, position_BG[..., None].expand(-1, -1, width))
        global_k, global_v = split_heads(self.key_global(hidden_states)), split_heads(self.value_global(hidden_states))
        global_q = split_heads(self.query_global(hidden_BGW))
        global_out_BHGD = masked_attention(global_q, global_k, global_v, token_mask_BL, dropout)
        out_BLW = out_BHLD.transpose(1, 2).reshape(B, L, width)
        global_out_BGW = global_out_BHGD.transpose(1, 2).reshape(B, -1, width).to(out_BLW.dtype)
        position_BGW = position_BG[..., None].expand_as(global_out_BGW)
        updated_BGW = torch.where(slot_mask_BG[..., None], global_out_BGW, out_BLW.gather(1, position_BGW))
        return out_BLW.scatter(1, position_BGW, updated_BGW), None


def global_positions(global_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of each row's global tokens, (B, G), and the mask of the slots in use, (B, G); G is
    at least 1."""
    count = max(1, int(global_mask_BL.sum(1).max()))
    order = torch.sort((~global_mask_BL).to(torch.int8), dim=1, stable=True).indices[:, :count]
    return order, global_mask_BL.gather(1, order)
