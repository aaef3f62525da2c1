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
    out = F.scaled_dot_product_attention(rows(query_BHNSD), rows(key_BHNSD), rows(value_BHNSD), seen_BNS.reshape(B * N, 1, 1, S), dropout_p=dropout)
    return out.view(B, N, H, S, D).transpose(1, 2)


def read_memory(query_BHNSD: Tensor, key_BHNSD: Tensor, value_BHNSD: Tensor, real_BNS: Tensor, update: str) -> tuple[Tensor, Tensor]:
    """What each token reads from both memories, (B, H, N, S, D), and 1 where they hold anything, (B, 1, N, 1, 1)."""
    dtype = value_BHNSD.dtype
    with torch.autocast(query_BHNSD.device.type, enabled=False):  # sums over the whole text: single precision at least
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_BHNSD, key_BHNSD, value_BHNSD))
        query = F.elu(query) + 1
        key = (F.elu(key) + 1) * real_BNS[:, None, :, :, None]
        memory_BHNDD, norm_BHND = memories(key, value, update)
        backward_memory, backward_norm = memories(key.flip(2), value.flip(2), update)
        memory_BHNDD, norm_BHND = memory_BHNDD + backward_memory.flip(2), norm_BHND + backward_norm.flip(2)
        read = query @ memory_BHNDD / (query @ norm_BHND[..., None]).clamp(min=1e-6)
    there = real_BNS.any(-1).sum(1, keepdim=True) - real_BNS.any(-1).long() > 0
    return read.to(dtype), there[:, None, :, None, None].to(dtype)


def memories(key_BHNSD: Tensor, value_BHNSD: Tensor, update: str) -> tuple[Tensor, Tensor]:
    """Memory (B, H, N, D, D) and normalisation (B, H, N, D) as they stand before each segment is written."""
    norm_BHND = key_BHNSD.sum(3)
    before_BHND = norm_BHND.cumsum(2) - norm_BHND
    if update == "linear":
        written = key_BHNSD.transpose(-1, -2) @ value_BHNSD
        return written.cumsum(2) - written, before_BHND
    memory = torch.zeros_like(key_BHNSD[:, :, 0].transpose(-1, -2) @ value_BHNSD[:, :, 0])
    states = []
    for n in range(key_BHNSD.shape[2]):
        states.append(memory)
        key, value = key_BHNSD[:, :, n], value_BHNSD[:, :, n]
        known = key @ memory / (key @ before_BHND[:, :, n, :, None]).clamp(min=1e-6)
        memory = memory + key.transpose(-1, -2) @ (value - known)
    return torch.stack(states, 2), before_BHND
