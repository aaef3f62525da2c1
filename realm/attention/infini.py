"""Segments with local attention and a compressive memory of the others (Munkhdalai et al. 2024, "Leave No Context Behind", section 2).

The text is cut into segments. A token attends to its segment by softmax, and reads a memory with σ(q) M / σ(q) z (equation 3), σ being ELU + 1;
a gate learned for each head mixes the two (equation 6). In the paper a segment reads the memory of those before it. A reader looks both
ways, so here two memories are kept, one written from the left and one from the right, each by the paper's rule, linear (equation 4) or delta
(equation 5): a segment reads the left memory as it stands before it and the right memory as it stands behind it, both at once:
σ(q)(M→ + M←) / σ(q)(z→ + z←). Under the linear rule that is the memory of all other segments. A text of one segment is attended as ever.

Shape legend: B rows, H heads, L tokens, D width of a head, N segments of S tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realm.attention import AttentionConfig
from realm.attention.projected import ProjectedSelfAttention
from realm.attention.windowed import shared_attention
from realm.errors import UserError


@AttentionConfig.register_subclass("infini")
@dataclass(frozen=True)
class InfiniAttention(AttentionConfig):
    """Local attention and compressive memory."""

    segment: int = 512
    """Tokens of a segment."""
    update: Literal["linear", "delta"] = "delta"
    """How a segment is written into the memory: added, or only what the memory does not say already."""
    gate_init: float = -2.0
    """Start of the gate before its sigmoid: negative leans on local attention, as a pretrained model does."""

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
            return F.pad(x_BHLD, (0, 0, 0, N * S - L)).view(B, H, N, S, D)

        query, key, value = segments(query_BHLD), segments(key_BHLD), segments(value_BHLD)
        real_BNS = F.pad(real_BL, (0, N * S - L)).view(B, N, S)
        local = local_attention(query, key, value, real_BNS, self.dropout if self.training else 0.0)
        if N > 1:
            read, there = read_memory(query, key, value, real_BNS, self.config.update)
            gate = torch.sigmoid(self.gate).view(1, H, 1, 1, 1).to(local.dtype) * there
            local = gate * read + (1 - gate) * local
        return local.reshape(B, H, N * S, D)[:, :, :L]


def local_attention(query_BHNSD: Tensor, key_BHNSD: Tensor, value_BHNSD: Tensor, real_BNS: Tensor, dropout: float) -> Tensor:
    """Softmax attention within each segment, (B, H, N, S, D)."""
    B, H, N, S, D = query_BHNSD.shape

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(B * N, H, S, D)

    seen_BNS = real_BNS | ~real_BNS.any(-1, keepdim=True)  # a segment of padding looks at itself instead of producing NaN
    out = shared_attention(rows(query_BHNSD), rows(key_BHNSD), rows(value_BHNSD), seen_BNS.reshape(B * N, S), dropout)
    return out.view(B, N, H, S, D).transpose(1, 2)


def read_memory(query_BHNSD: Tensor, key_BHNSD: Tensor, value_BHNSD: Tensor, real_BNS: Tensor, update: str) -> tuple[Tensor, Tensor]:
    """What each token reads from both memories, (B, H, N, S, D), and 1 where they hold anything, (B, 1, N, 1, 1)."""
    dtype = value_BHNSD.dtype
    with torch.autocast(query_BHNSD.device.type, enabled=False):  # sums over the whole text: single precision at least
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_BHNSD, key_BHNSD, value_BHNSD))
        query = F.elu(query) + 1
        key = (F.elu(key) + 1) * real_BNS[:, None, :, :, None]
        from_left, from_right = memories(key, value, update), memories(key, value, update, backwards=True)
        memory_BHNDD, norm_BHND = from_left[0] + from_right[0], from_left[1] + from_right[1]
        read = query @ memory_BHNDD / (query @ norm_BHND[..., None]).clamp(min=1e-6)
    there = real_BNS.any(-1).sum(1, keepdim=True) - real_BNS.any(-1).long() > 0
    return read.to(dtype), there[:, None, :, None, None].to(dtype)


def memories(key_BHNSD: Tensor, value_BHNSD: Tensor, update: str, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """Memory (B, H, N, D, D) and normalisation (B, H, N, D) as they stand before each segment is written, the first one first or the last."""

    def before(written: Tensor) -> Tensor:
        return (written.flip(2).cumsum(2).flip(2) if backwards else written.cumsum(2)) - written

    norm_BHND = before(key_BHNSD.sum(3))
    if update == "linear":
        return before(key_BHNSD.transpose(-1, -2) @ value_BHNSD), norm_BHND
    # Taken apart once: the gradient of an index is a text of zeros for every segment.
    segments = list(zip(key_BHNSD.unbind(2), value_BHNSD.unbind(2), norm_BHND.unbind(2), strict=True))
    memory_BHDD = key_BHNSD.new_zeros(*key_BHNSD.shape[:2], key_BHNSD.shape[-1], value_BHNSD.shape[-1])
    states = []
    for key, value, norm in reversed(segments) if backwards else segments:
        states.append(memory_BHDD)
        known = key @ memory_BHDD / (key @ norm[..., None]).clamp(min=1e-6)
        memory_BHDD = memory_BHDD + key.transpose(-1, -2) @ (value - known)
    return torch.stack(states[::-1] if backwards else states, 2), norm_BHND
