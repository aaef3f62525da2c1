"""Local attention within segments and a compressive memory of the other segments (Munkhdalai et al.
2024, "Leave No Context Behind", section 2).

The text is split into segments. A token attends to its own segment by softmax, and reads a memory
by σ(q) M / σ(q) z (equation 3) with σ = ELU + 1; a learned gate per head mixes the two (equation
6). In the paper, a segment reads the memory of the segments before it. A reader is bidirectional,
so two memories are kept here, one written from the left and one from the right, both by the paper's
update rule, linear (equation 4) or delta (equation 5). A segment reads the sum of the left memory,
which contains only the segments before it, and the right memory, which contains only the segments
after it: σ(q)(M→ + M←) / σ(q)(z→ + z←). With the linear rule this is the memory of all other
segments. A text of one segment uses only softmax attention.

Shape legend: B rows, H heads, L tokens, D width of a head, N segments of S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realm.attention.projected import ProjectedSelfAttention, masked_attention
from realm.attention.variant import AttentionConfig
from realm.errors import UserError

_MAX_GATE = 100.0
"""Largest absolute gate logit; its sigmoid is 0 or 1 in any precision."""


@AttentionConfig.register_subclass("infini")
@dataclass(frozen=True)
class InfiniAttention(AttentionConfig):
    """Local attention and compressive memory."""

    segment: int = 512
    """Tokens per segment."""
    update: Literal["linear", "delta"] = "delta"
    """Update rule of the memory: add the values of a segment (`linear`), or only their difference
    from the values that the memory already returns (`delta`)."""
    gate_init: float = -2.0
    """Initial gate logit; negative values favor local attention, as in a pretrained model."""

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise UserError(f"attention.segment must be at least 1, got {self.segment}.")
        if abs(self.gate_init) > _MAX_GATE:
            raise UserError(f"attention.gate_init must be between {-_MAX_GATE} and {_MAX_GATE}, got {self.gate_init}.")

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        return InfiniSelfAttention(attention, self)


class InfiniSelfAttention(ProjectedSelfAttention):
    """The only parameters it adds are one gate per head; memories are computed per text and not
    stored."""

    def __init__(self, bert_attention: nn.Module, config: InfiniAttention) -> None:
        super().__init__(bert_attention)
        self.config = config
        self.gate = nn.Parameter(torch.full((self.num_heads,), config.gate_init))

    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, token_mask_BL: Tensor) -> Tensor:
        B, H, L, D = query_BHLD.shape
        S = min(self.config.segment, L)
        N = -(-L // S)

        def split_segments(x_BHLD: Tensor) -> Tensor:
            return (F.pad(x_BHLD, (0, 0, 0, N * S - L)) if L % S else x_BHLD).view(B, H, N, S, D)

        query, key, value = split_segments(query_BHLD), split_segments(key_BHLD), split_segments(value_BHLD)
        token_mask_BNS = F.pad(token_mask_BL, (0, N * S - L)).view(B, N, S)
        out = local_attention(query, key, value, token_mask_BNS, self.dropout if self.training else 0.0)
        if N > 1:
            out = mix_with_memory(out, query, key, value, token_mask_BNS, torch.sigmoid(self.gate), self.config.update)
        elif self.training:
            # The gate must have a gradient on every rank, whatever the length of its texts.
            out = out + 0 * self.gate.sum().to(out.dtype)
        return out.reshape(B, H, N * S, D)[:, :, :L]


def local_attention(
    query_BHNSD: Tensor, key_BHNSD: Tensor, value_BHNSD: Tensor, token_mask_BNS: Tensor, dropout: float
) -> Tensor:
    """Softmax attention within each segment, (B, H, N, S, D)."""
    B, H, N, S, D = query_BHNSD.shape

    def as_rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(B * N, H, S, D)

    query, key, value = as_rows(query_BHNSD), as_rows(key_BHNSD), as_rows(value_BHNSD)
    out = masked_attention(query, key, value, token_mask_BNS.reshape(B * N, S), dropout)
    return out.view(B, N, H, S, D).transpose(1, 2)


def mix_with_memory(
    local_BHNSD: Tensor,
    query_BHNSD: Tensor,
    key_BHNSD: Tensor,
    value_BHNSD: Tensor,
    token_mask_BNS: Tensor,
    gate_H: Tensor,
    update: str,
) -> Tensor:
    """Local attention mixed with what each token reads from both memories, (B, H, N, S, D); only
    local attention if both memories are empty."""
    has_tokens_BN = token_mask_BNS.any(-1)
    reads_memory_BN = has_tokens_BN.sum(1, keepdim=True) > has_tokens_BN.long()  # another segment has tokens
    gate_BHN = gate_H[None, :, None] * reads_memory_BN[:, None]
    with torch.autocast(query_BHNSD.device.type, enabled=False):  # sums over the whole text need fp32 or better
        key_BHNSD = _elu_plus_one(key_BHNSD) * token_mask_BNS[:, None, :, :, None]
        segments = list(zip(key_BHNSD.unbind(2), value_BHNSD.to(key_BHNSD.dtype).unbind(2), strict=True))
        from_left, from_right = memory_states(segments, update), memory_states(segments[::-1], update)[::-1]
        mixed = []
        for n, (local, query) in enumerate(zip(local_BHNSD.unbind(2), query_BHNSD.unbind(2), strict=True)):
            memory_BHDD, norm_BHD1 = (left + right for left, right in zip(from_left[n], from_right[n], strict=True))
            mixed.append(_mix_segment(local, query, memory_BHDD, norm_BHD1, gate_BHN[..., n, None, None]))
    return torch.stack(mixed, 2)


def memory_states(segments: Sequence[tuple[Tensor, Tensor]], update: str) -> list[tuple[Tensor, Tensor]]:
    """Memory (B, H, D, D) and normalization (B, H, D, 1) before each segment is written; a segment
    is σ(keys) and values."""
    B, H, _, D = segments[0][0].shape
    memory_BHDD, norm_BHD1 = segments[0][0].new_zeros(B, H, D, D), segments[0][0].new_zeros(B, H, D, 1)
    states = []
    for key_BHSD, value_BHSD in segments:
        states.append((memory_BHDD, norm_BHD1))
        new_BHSD = value_BHSD
        if update == "delta" and len(states) > 1:  # the first memory is empty
            new_BHSD = value_BHSD - key_BHSD @ memory_BHDD / (key_BHSD @ norm_BHD1).clamp(min=1e-6)
        memory_BHDD, norm_BHD1 = (
            memory_BHDD + key_BHSD.transpose(-1, -2) @ new_BHSD,
            norm_BHD1 + key_BHSD.sum(2)[..., None],
        )
    return states


def _mix_segment(
    local_BHSD: Tensor, query_BHSD: Tensor, memory_BHDD: Tensor, norm_BHD1: Tensor, gate_BH11: Tensor
) -> Tensor:
    """A segment's local attention mixed with what its tokens read from the memory."""
    query = _elu_plus_one(query_BHSD)
    read_BHSD = query @ memory_BHDD / (query @ norm_BHD1).clamp(min=1e-6)
    return torch.lerp(local_BHSD.to(read_BHSD.dtype), read_BHSD, gate_BH11.to(read_BHSD.dtype)).to(local_BHSD.dtype)


def _elu_plus_one(x: Tensor) -> Tensor:
    """σ of the paper, in fp32 or better."""
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1
