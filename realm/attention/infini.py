"""Segments with local attention and a compressive memory of the others (Munkhdalai et al. 2024,
"Leave No Context Behind", section 2).

The text is cut into segments. A token attends to its segment by softmax, and reads a memory with
σ(q) M / σ(q) z (equation 3), σ being ELU + 1; a gate learned for each head mixes the two (equation
6). In the paper a segment reads the memory of those before it. A reader looks both ways, so here
two memories are kept, one written from the left and one from the right, each by the paper's rule,
linear (equation 4) or delta (equation 5): a segment reads the left memory as it stands before it
and the right memory as it stands behind it, both at once: σ(q)(M→ + M←) / σ(q)(z→ + z←). Under the
linear rule that is the memory of all other segments. A text of one segment is attended as ever.

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


@AttentionConfig.register_subclass("infini")
@dataclass(frozen=True)
class InfiniAttention(AttentionConfig):
    """Local attention and compressive memory."""

    segment: int = 512
    """Tokens of a segment."""
    update: Literal["linear", "delta"] = "delta"
    """How a segment is written into the memory: added, or only what the memory does not say
    already."""
    gate_init: float = -2.0
    """Start of the gate before its sigmoid: negative leans on local attention, as a pretrained
    model does."""

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise UserError(f"attention.segment must be at least 1, got {self.segment}.")

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        return InfiniSelfAttention(attention, self)


class InfiniSelfAttention(ProjectedSelfAttention):
    """A gate for each head; the memories belong to a text and are not kept."""

    def __init__(self, local: nn.Module, config: InfiniAttention) -> None:
        super().__init__(local)
        self.config = config
        self.gate = nn.Parameter(torch.full((self.num_heads,), config.gate_init))

    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, real_BL: Tensor) -> Tensor:
        B, H, L, D = query_BHLD.shape
        S = min(self.config.segment, L)
        N = -(-L // S)

        def segments(x_BHLD: Tensor) -> Tensor:
            return (F.pad(x_BHLD, (0, 0, 0, N * S - L)) if L % S else x_BHLD).view(B, H, N, S, D)

        query, key, value = segments(query_BHLD), segments(key_BHLD), segments(value_BHLD)
        real_BNS = F.pad(real_BL, (0, N * S - L)).view(B, N, S)
        out = local_attention(query, key, value, real_BNS, self.dropout if self.training else 0.0)
        if N > 1:
            out = mixed_with_memory(out, query, key, value, real_BNS, torch.sigmoid(self.gate), self.config.update)
        elif self.training:
            out = out + 0 * self.gate.sum().to(
                out.dtype
            )  # so that it has a gradient on every rank, whatever the length of its texts
        return out.reshape(B, H, N * S, D)[:, :, :L]


def local_attention(
    query_BHNSD: Tensor, key_BHNSD: Tensor, value_BHNSD: Tensor, real_BNS: Tensor, dropout: float
) -> Tensor:
    """Softmax attention within each segment, (B, H, N, S, D)."""
    B, H, N, S, D = query_BHNSD.shape

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(B * N, H, S, D)

    out = masked_attention(rows(query_BHNSD), rows(key_BHNSD), rows(value_BHNSD), real_BNS.reshape(B * N, S), dropout)
    return out.view(B, N, H, S, D).transpose(1, 2)


def mixed_with_memory(
    local_BHNSD: Tensor,
    query_BHNSD: Tensor,
    key_BHNSD: Tensor,
    value_BHNSD: Tensor,
    real_BNS: Tensor,
    gate_H: Tensor,
    update: str,
) -> Tensor:
    """Local attention and what each token reads from both memories, (B, H, N, S, D); local
    attention alone where the memories hold nothing."""
    filled_BN = real_BNS.any(-1)
    gate_BHN = gate_H[None, :, None] * (filled_BN.sum(1, keepdim=True) > filled_BN.long())[:, None]
    with torch.autocast(query_BHNSD.device.type, enabled=False):  # sums over the whole text: single precision at least
        key_BHNSD = _sigma(key_BHNSD) * real_BNS[:, None, :, :, None]
        segments = list(zip(key_BHNSD.unbind(2), value_BHNSD.to(key_BHNSD.dtype).unbind(2), strict=True))
        from_left, from_right = memories(segments, update), memories(segments[::-1], update)[::-1]
        mixed = []
        for n, (local, query) in enumerate(zip(local_BHNSD.unbind(2), query_BHNSD.unbind(2), strict=True)):
            memory_BHDD, norm_BHD1 = (left + right for left, right in zip(from_left[n], from_right[n], strict=True))
            mixed.append(_read(local, query, memory_BHDD, norm_BHD1, gate_BHN[..., n, None, None]))
    return torch.stack(mixed, 2)


def memories(segments: Sequence[tuple[Tensor, Tensor]], update: str) -> list[tuple[Tensor, Tensor]]:
    """Memory (B, H, D, D) and normalisation (B, H, D, 1) as they stand before each of the
    segments is written; of each σ(keys) and values."""
    B, H, _, D = segments[0][0].shape
    memory_BHDD, norm_BHD1 = segments[0][0].new_zeros(B, H, D, D), segments[0][0].new_zeros(B, H, D, 1)
    states = []
    for key_BHSD, value_BHSD in segments:
        states.append((memory_BHDD, norm_BHD1))
        new_BHSD = value_BHSD
        if update == "delta" and len(states) > 1:  # nothing is known at first
            new_BHSD = value_BHSD - key_BHSD @ memory_BHDD / (key_BHSD @ norm_BHD1).clamp(min=1e-6)
        memory_BHDD, norm_BHD1 = (
            memory_BHDD + key_BHSD.transpose(-1, -2) @ new_BHSD,
            norm_BHD1 + key_BHSD.sum(2)[..., None],
        )
    return states


def _read(local_BHSD: Tensor, query_BHSD: Tensor, memory_BHDD: Tensor, norm_BHD1: Tensor, gate_BH11: Tensor) -> Tensor:
    """A segment's local attention mixed with what its tokens read."""
    query = _sigma(query_BHSD)
    read_BHSD = query @ memory_BHDD / (query @ norm_BHD1).clamp(min=1e-6)
    return torch.lerp(local_BHSD.to(read_BHSD.dtype), read_BHSD, gate_BH11.to(read_BHSD.dtype)).to(local_BHSD.dtype)


def _sigma(x: Tensor) -> Tensor:
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1
