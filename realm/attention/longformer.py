"""Sliding-window attention with global tokens (Beltagy et al. 2020, "Longformer", sections 3.1 and
3.2).

Every token attends to the tokens at most `window` places away and to the global tokens; a global
token attends to every token, through query, key and value projections of its own that start as
copies of the local ones. Windows may differ by layer, small ones below; a head may be dilated and
see every d-th token of a window d times as wide (section 3.1). Work and memory grow linearly with
the length.

Shape legend: B rows, H heads, L tokens, D width of a head, G global tokens of the row that has
most.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from realm.attention.projected import masked_attention
from realm.attention.variant import AttentionConfig
from realm.attention.windowed import Windowed, dilated_attention
from realm.errors import UserError


@AttentionConfig.register_subclass("longformer")
@dataclass(frozen=True)
class LongformerAttention(AttentionConfig):
    """Sliding window plus global tokens."""

    window: int = 256
    """Tokens visible on each side (the paper's w is 2 × this)."""
    layer_windows: tuple[int, ...] = ()
    """The same layer by layer, lowest first; none: `window` in all."""
    dilation: tuple[int, ...] = ()
    """Distance of the tokens visible, head by head; none: 1 in all."""

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
                f"attention.layer_windows names {len(self.layer_windows)} layers where the encoder has {len(attentions)}."
            )
        windows = self.layer_windows or (self.window,) * len(attentions)
        return [
            LongformerSelfAttention(attention, window, self.dilation)
            for attention, window in zip(attentions, windows, strict=True)
        ]


class LongformerSelfAttention(nn.Module):
    """Takes over the local projections of a BERT self-attention module and adds the global ones."""

    def __init__(self, local: nn.Module, window: int, dilation: Sequence[int] = ()) -> None:
        super().__init__()
        self.window = window
        self.num_heads: int = local.num_attention_heads  # type: ignore[assignment]
        if dilation and len(dilation) != self.num_heads:
            raise UserError(f"attention.dilation names {len(dilation)} heads where the encoder has {self.num_heads}.")
        self.dilation = tuple(dilation) or (1,) * self.num_heads
        self.query: nn.Linear = local.query  # type: ignore[assignment]
        self.key: nn.Linear = local.key  # type: ignore[assignment]
        self.value: nn.Linear = local.value  # type: ignore[assignment]
        self.query_global = copy.deepcopy(self.query)
        self.key_global = copy.deepcopy(self.key)
        self.value_global = copy.deepcopy(self.value)
        self.dropout: float = local.dropout.p  # type: ignore[union-attr, assignment]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """`hidden_states` (B, L, H·D); `attention_mask` (B, L) true on real tokens; `global_mask`
        (B, L) true on global tokens.

        Without a global mask the first token of every row ([CLS]) is global. Outputs on padding are
        finite and meaningless.
        """
        B, L, width = hidden_states.shape
        real_BL = (
            torch.ones(B, L, dtype=torch.bool, device=hidden_states.device)
            if attention_mask is None
            else attention_mask.bool()
        )
        if global_mask is None:
            global_mask = torch.zeros_like(real_BL)
            global_mask[:, 0] = True
        global_BL = global_mask.bool() & real_BL
        dropout = self.dropout if self.training else 0.0

        def heads(projected: Tensor) -> Tensor:
            return projected.view(B, -1, self.num_heads, width // self.num_heads).transpose(1, 2)

        at_BG, present_BG = global_positions(global_BL)
        q, k, v = heads(self.query(hidden_states)), heads(self.key(hidden_states)), heads(self.value(hidden_states))
        shared_k, shared_v = (
            x.gather(2, at_BG[:, None, :, None].expand(-1, self.num_heads, -1, x.shape[-1])) for x in (k, v)
        )
        local_BL = real_BL & ~global_BL  # a global key is left to its own slot, so that no window counts it twice
        strides = sorted(set(self.dilation))
        parts = []
        for stride in strides:
            own = (
                slice(None)
                if len(strides) == 1
                else [head for head, mine in enumerate(self.dilation) if mine == stride]
            )
            inputs = Windowed(q[:, own], k[:, own], v[:, own], shared_k[:, own], shared_v[:, own], local_BL, present_BG)
            parts.append(dilated_attention(inputs, self.window, stride, dropout))
        order = sorted(range(self.num_heads), key=lambda head: self.dilation[head])  # as the parts hold the heads
        out_BHLD = parts[0] if len(parts) == 1 else torch.cat(parts, 1)[:, torch.tensor(order).argsort().tolist()]

        hidden_BGW = hidden_states.gather(1, at_BG[..., None].expand(-1, -1, width))
        global_k, global_v = heads(self.key_global(hidden_states)), heads(self.value_global(hidden_states))
        global_out_BHGD = masked_attention(heads(self.query_global(hidden_BGW)), global_k, global_v, real_BL, dropout)
        out_BLW = out_BHLD.transpose(1, 2).reshape(B, L, width)
        global_out_BGW = global_out_BHGD.transpose(1, 2).reshape(B, -1, width).to(out_BLW.dtype)
        at_BGW = at_BG[..., None].expand_as(global_out_BGW)
        return out_BLW.scatter(
            1, at_BGW, torch.where(present_BG[..., None], global_out_BGW, out_BLW.gather(1, at_BGW))
        ), None


def global_positions(global_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of each row's global tokens, (B, G), and which of those slots are filled, (B,
    G); G is at least 1."""
    count = max(1, int(global_BL.sum(1).max()))
    order = torch.sort((~global_BL).to(torch.int8), dim=1, stable=True).indices[:, :count]
    return order, global_BL.gather(1, order)
