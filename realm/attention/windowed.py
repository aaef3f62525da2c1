"""Attention of every token to a window around it and to some keys that all see: the work of Longformer, in time and memory linear in the length.

Queries are taken in blocks, each against the keys of its window; nothing of size length × length is ever made. On a GPU, or with dropout, all
blocks go to torch's fused attention at once, under a mask. On a CPU the blocks are matrix products one after another, their scores in the
cache; the gradient computes them again.

Shape legend: B rows, H heads, L tokens, D width of a head, G shared keys, C block of queries, K keys that a block sees, N = ⌈L/C⌉ blocks.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST_BLOCK, _LONGEST_BLOCK = 64, 256
"""Queries of a block on a CPU: as many as a window holds on one side, within these bounds."""
_MASKED = -1e30
"""Score of a key that is not seen; finite, so that a query that sees nothing (padding) looks at everything instead of producing NaN."""


class Windowed(NamedTuple):
    """What windows are laid over."""

    q_BHLD: Tensor
    k_BHLD: Tensor
    v_BHLD: Tensor
    shared_k_BHGD: Tensor
    """Keys that every token sees beside its window."""
    shared_v_BHGD: Tensor
    local_BL: Tensor
    """True on keys that windows see."""
    present_BG: Tensor
    """True on shared keys that count."""

    @classmethod
    def alone(cls, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask_BL: Tensor | None) -> "Windowed":
        """Windows and nothing else; `mask_BL` is 0 on padding, None where there is none."""
        B, _, L, _ = q_BHLD.shape
        local_BL = torch.ones(B, L, dtype=torch.bool, device=q_BHLD.device) if mask_BL is None else mask_BL.bool()
        return cls(q_BHLD, k_BHLD, v_BHLD, k_BHLD[:, :, :0], v_BHLD[:, :, :0], local_BL, local_BL[:, :0])


def dilated_attention(inputs: Windowed, window: int, stride: int, dropout: float) -> Tensor:
    """Windowed attention over every `stride`-th token, (B, H, L, D): each residue of the positions is a text of its own."""
    if stride == 1:
        return windowed_attention(inputs, window, dropout)
    B, H, L, D = inputs.q_BHLD.shape
    pad = -L % stride
    length = (L + pad) // stride

    def texts(x_BHLD: Tensor) -> Tensor:
        return F.pad(x_BHLD, (0, 0, 0, pad)).view(B, H, length, stride, D).permute(0, 3, 1, 2, 4).reshape(B * stride, H, length, D)

    shared_k, shared_v = (x.repeat_interleave(stride, 0) for x in (inputs.shared_k_BHGD, inputs.shared_v_BHGD))
    local_BL = F.pad(inputs.local_BL, (0, pad)).view(B, length, stride).transpose(1, 2).reshape(B * stride, length)
    present_BG = inputs.present_BG.repeat_interleave(stride, 0)
    split = Windowed(texts(inputs.q_BHLD), texts(inputs.k_BHLD), texts(inputs.v_BHLD), shared_k, shared_v, local_BL, present_BG)
    out = windowed_attention(split, window, dropout)
    return out.view(B, stride, H, length, D).permute(0, 2, 3, 1, 4).reshape(B, H, length * stride, D)[:, :, :L]


def windowed_attention(inputs: Windowed, window: int, dropout: float) -> Tensor:
    """Attention of every token to its window and to the shared keys, (B, H, L, D)."""
    if inputs.q_BHLD.device.type == "cpu" and not dropout:
        return _Blocks.apply(*inputs, window)  # type: ignore[no-untyped-call]
    return _all_blocks_at_once(inputs, window, dropout)


class _Blocks(torch.autograd.Function):
    """Block after block, row after row, by matrix products in the dtype of the inputs, the softmax in single precision or better."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, window = arguments
        inputs = Windowed(*tensors)
        out_BHLD = torch.empty_like(inputs.q_BHLD, memory_format=torch.contiguous_format)
        norm_BHL = inputs.q_BHLD.new_empty(inputs.q_BHLD.shape[:3], dtype=_softmax_dtype(inputs.q_BHLD))
        for block in _blocks(inputs, window):
            score_HCK = block.scores()
            norm_HC = score_HCK.logsumexp(-1)
            norm_BHL[block.row, :, block.queries] = norm_HC
            probability_HCK = score_HCK.sub_(norm_HC[..., None]).exp_().to(out_BHLD.dtype)
            out_BHLD[block.row, :, block.queries] = probability_HCK @ block.value_HKD
        ctx.save_for_backward(*tensors, out_BHLD, norm_BHL)
        ctx.window = window
        return out_BHLD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out_BHLD, norm_BHL = ctx.saved_tensors
        inputs, towards_BHLD = Windowed(*tensors), gradients[0]
        q, k, v, shared_k, shared_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])
        G = shared_k.shape[2]
        for block in _blocks(inputs, ctx.window):
            row, queries, keys = block.row, block.queries, block.keys
            towards_HCD = towards_BHLD[row, :, queries].contiguous()
            probability_HCK = block.scores().sub_(norm_BHL[row, :, queries, None]).exp_()
            along_HC1 = (towards_HCD * out_BHLD[row, :, queries]).sum(-1, keepdim=True, dtype=probability_HCK.dtype)
            score_HCK = (towards_HCD @ block.value_HKD.transpose(-1, -2)).to(probability_HCK.dtype)
            score_HCK = score_HCK.sub_(along_HC1).mul_(probability_HCK).mul_(block.scale).to(towards_HCD.dtype)
            value_HKD = probability_HCK.to(towards_HCD.dtype).transpose(-1, -2) @ towards_HCD
            key_HKD = score_HCK.transpose(-1, -2) @ block.query_HCD
            q[row, :, queries] = score_HCK @ block.key_HKD
            for whole, shared, part in ((k, shared_k, key_HKD), (v, shared_v, value_HKD)):
                shared[row] += part[:, :G]
                whole[row, :, keys] += part[:, G:]
        return q, k, v, shared_k, shared_v, None, None, None


class _Block(NamedTuple):
    """Some queries of one row and the keys they see, the shared ones first."""

    row: int
    queries: slice
    keys: slice
    query_HCD: Tensor
    key_HKD: Tensor
    value_HKD: Tensor
    hidden_CK: Tensor
    """True where a query does not see a key."""
    scale: float

    def scores(self) -> Tensor:
        """(H, C, K), in the dtype of the softmax."""
        score_HCK = (self.query_HCD * self.scale) @ self.key_HKD.transpose(-1, -2)
        return score_HCK.to(_softmax_dtype(score_HCK)).masked_fill_(self.hidden_CK, _MASKED)


def _blocks(inputs: Windowed, window: int) -> Iterator[_Block]:
    B, _, L, D = inputs.q_BHLD.shape
    C = max(_SHORTEST_BLOCK, min(_LONGEST_BLOCK, window))
    offset_L = torch.arange(L, device=inputs.q_BHLD.device)
    for start in range(0, L, C):
        queries, keys = slice(start, min(start + C, L)), slice(max(0, start - window), min(start + C + window, L))
        far_CK = (offset_L[queries, None] - offset_L[None, keys]).abs_() > window
        for row in range(B):
            shared_GK = ~inputs.present_BG[row].expand(far_CK.shape[0], -1)
            yield _Block(
                row,
                queries,
                keys,
                inputs.q_BHLD[row, :, queries],
                torch.cat((inputs.shared_k_BHGD[row], inputs.k_BHLD[row, :, keys]), 1),
                torch.cat((inputs.shared_v_BHGD[row], inputs.v_BHLD[row, :, keys]), 1),
                torch.cat((shared_GK, far_CK | ~inputs.local_BL[row, keys]), 1),
                D**-0.5,
            )


def _softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _all_blocks_at_once(inputs: Windowed, window: int, dropout: float) -> Tensor:
    """Blocks of `window` queries against three blocks of keys, as rows of one call of fused attention."""
    q_BHLD, k_BHLD, v_BHLD, shared_k_BHGD, shared_v_BHGD, local_BL, present_BG = inputs
    B, H, L, D = q_BHLD.shape
    C = min(window, L)
    N = -(-L // C)
    pad = N * C - L

    def blocks_of_queries(x_BHLD: Tensor) -> Tensor:
        return F.pad(x_BHLD, (0, 0, 0, pad)).view(B, H, N, C, D).transpose(1, 2)

    def blocks_of_keys(x_BHLD: Tensor, shared_BHGD: Tensor) -> Tensor:
        around = F.pad(x_BHLD, (0, 0, C, C + pad)).unfold(2, 3 * C, C).permute(0, 2, 1, 4, 3)  # (B, N, H, 3C, D)
        return torch.cat([around, shared_BHGD[:, None].expand(-1, N, -1, -1, -1)], dim=3)

    key_BN3C = F.pad(local_BL, (C, C + pad)).unfold(1, 3 * C, C)
    offset = torch.arange(3 * C, device=q_BHLD.device)[None, :] - C - torch.arange(C, device=q_BHLD.device)[:, None]
    near_C3C = offset.abs() <= window
    mask_BNC3C = key_BN3C[:, :, None, :] & near_C3C
    mask = torch.cat([mask_BNC3C, present_BG[:, None, None, :].expand(-1, N, C, -1)], dim=-1)
    # A query that sees nothing (padding in a row without global tokens) looks at everything instead of producing NaN.
    mask = mask | ~mask.any(-1, keepdim=True)
    keys = 3 * C + shared_k_BHGD.shape[2]
    out = F.scaled_dot_product_attention(
        blocks_of_queries(q_BHLD).reshape(B * N, H, C, D),
        blocks_of_keys(k_BHLD, shared_k_BHGD).reshape(B * N, H, keys, D),
        blocks_of_keys(v_BHLD, shared_v_BHGD).reshape(B * N, H, keys, D),
        attn_mask=mask.reshape(B * N, 1, C, keys),
        dropout_p=dropout,
    )
    return out.view(B, N, H, C, D).transpose(1, 2).reshape(B, H, N * C, D)[:, :, :L]
