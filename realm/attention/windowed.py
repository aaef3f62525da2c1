"""Attention of every token to a window around it and to some keys that all see: the work of
Longformer, in time and memory linear in the length.

Queries are taken in blocks, each against the keys of its window; nothing of size length × length is
ever made. On a GPU, or with dropout, all blocks go to torch's fused attention at once, under a
mask. On a CPU the blocks are matrix products one after another, their scores in the cache; the
gradient computes them again.

Shape legend: B rows, H heads, L tokens, D width of a head, G shared keys, C block of queries, K
keys that a block sees, R rows of a block, N = ⌈L/C⌉ blocks.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORTEST_BLOCK, _LONGEST_BLOCK = 64, 192
"""Queries of a block on a CPU: as many as a window holds on one side, within these bounds."""
CACHED_SCORES = 2**19
"""Scores computed at a time, at least those of one row of a block: 2 MiB in single precision."""


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
    """Windowed attention over every `stride`-th token, (B, H, L, D): each residue of the
    positions is a text of its own."""
    if stride == 1:
        return windowed_attention(inputs, window, dropout)
    B, H, L, D = inputs.q_BHLD.shape
    pad = -L % stride
    length = (L + pad) // stride

    def texts(x_BHLD: Tensor) -> Tensor:
        return (
            F.pad(x_BHLD, (0, 0, 0, pad))
            .view(B, H, length, stride, D)
            .permute(0, 3, 1, 2, 4)
            .reshape(B * stride, H, length, D)
        )

    shared_k, shared_v = (x.repeat_interleave(stride, 0) for x in (inputs.shared_k_BHGD, inputs.shared_v_BHGD))
    local_BL = F.pad(inputs.local_BL, (0, pad)).view(B, length, stride).transpose(1, 2).reshape(B * stride, length)
    present_BG = inputs.present_BG.repeat_interleave(stride, 0)
    split = Windowed(
        texts(inputs.q_BHLD), texts(inputs.k_BHLD), texts(inputs.v_BHLD), shared_k, shared_v, local_BL, present_BG
    )
    out = windowed_attention(split, window, dropout)
    return out.view(B, stride, H, length, D).permute(0, 2, 3, 1, 4).reshape(B, H, length * stride, D)[:, :, :L]


def windowed_attention(inputs: Windowed, window: int, dropout: float) -> Tensor:
    """Attention of every token to its window and to the shared keys, (B, H, L, D)."""
    if inputs.q_BHLD.device.type == "cpu" and not dropout:
        return _Blocks.apply(*inputs, window)  # type: ignore[no-untyped-call]
    return _all_blocks_at_once(inputs, window, dropout)


class _Blocks(torch.autograd.Function):
    """Block after block by matrix products in the dtype of the inputs; the softmax adds up in
    single precision or better."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, window = arguments
        inputs = Windowed(*tensors)
        out_BHLD = torch.empty_like(inputs.q_BHLD)
        for block in _blocks(inputs, window):
            out_BHLD[block.queries] = block.probabilities() @ block.value_RHKD
        ctx.save_for_backward(*tensors)
        ctx.window = window
        return out_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, towards_BHLD = Windowed(*ctx.saved_tensors), gradients[0]
        q = torch.empty_like(inputs.q_BHLD)
        # A key stands in several blocks: its gradient is a sum, and is kept as exact as the
        # softmax.
        sums = [torch.zeros_like(x, dtype=softmax_dtype(x)) for x in inputs[1:5]]
        k, v, shared_k, shared_v = sums
        G = shared_k.shape[2]
        for block in _blocks(inputs, ctx.window):
            towards_RHCD, probability_RHCK = towards_BHLD[block.queries].contiguous(), block.probabilities()
            value_RHKD = probability_RHCK.transpose(-1, -2) @ towards_RHCD
            score_RHCK = towards_RHCD @ block.value_RHKD.transpose(-1, -2)
            torch._softmax_backward_data(score_RHCK, probability_RHCK, -1, score_RHCK.dtype, grad_input=score_RHCK)
            q[block.queries] = (score_RHCK @ block.key_RHKD).mul_(block.scale)
            key_RHKD = score_RHCK.transpose(-1, -2) @ block.query_RHCD
            for whole, shared, part in ((k, shared_k, key_RHKD), (v, shared_v, value_RHKD)):
                shared[block.rows] += part[:, :, :G]
                whole[block.keys] += part[:, :, G:]
        return q, *(total.to(q.dtype) for total in sums), None, None, None


class _Block(NamedTuple):
    """Some queries of some rows and the keys they see, the shared ones first."""

    rows: slice
    queries: tuple[slice, slice, slice]
    """Where they stand in (B, H, L)."""
    keys: tuple[slice, slice, slice]
    """Where the keys of the window stand in (B, H, L)."""
    query_RHCD: Tensor
    """Multiplied by `scale`."""
    key_RHKD: Tensor
    value_RHKD: Tensor
    hidden: Sequence[tuple[slice, Tensor]]
    """Stretches of keys, and where in them a query (last but one axis) does not see a key."""
    scale: float

    def probabilities(self) -> Tensor:
        """(R, H, C, K). A query that sees nothing (padding) looks at everything alike."""
        score_RHCK = self.query_RHCD @ self.key_RHKD.transpose(-1, -2)
        for keys, hidden in self.hidden:
            hide_(score_RHCK[..., keys], hidden)
        return torch.softmax(score_RHCK, -1, out=score_RHCK)


def _blocks(inputs: Windowed, window: int) -> Iterator[_Block]:
    """All rows of a block at once where they are short, and fewer where their scores would not
    stay in the cache."""
    B, H, L, D = inputs.q_BHLD.shape
    scale = D**-0.5
    G = inputs.shared_k_BHGD.shape[2]
    C = max(_SHORTEST_BLOCK, min(_LONGEST_BLOCK, window))
    for start in range(0, L, C):
        here, around = slice(start, min(start + C, L)), slice(max(0, start - window), min(start + C + window, L))
        # Keys before the window of the block's last query, and behind that of its first: only they
        # are too far for some query.
        before = slice(around.start, max(around.start, min(around.stop, here.stop - 1 - window)))
        behind = slice(min(around.stop, max(around.start, start + window + 1)), around.stop)
        offset = G - around.start
        far = [
            (
                slice(offset + end.start, offset + end.stop),
                _too_far(here.stop - start, end.stop - end.start, end.start - start, window),
            )
            for end in (before, behind)
            if end.stop > end.start
        ]
        size = max(1, CACHED_SCORES // (H * (here.stop - here.start) * (G + around.stop - around.start)))
        for row in range(0, B, size):
            rows, heads = slice(row, min(row + size, B)), slice(None)
            queries, keys = (rows, heads, here), (rows, heads, around)
            seen_RK = torch.cat((inputs.present_BG[rows], inputs.local_BL[rows, around]), 1)
            absent = [] if bool(seen_RK.all()) else [(slice(None), ~seen_RK[:, None, None, :])]
            key = torch.cat((inputs.shared_k_BHGD[rows], inputs.k_BHLD[keys]), 2)
            value = torch.cat((inputs.shared_v_BHGD[rows], inputs.v_BHLD[keys]), 2)
            yield _Block(
                rows, queries, keys, inputs.q_BHLD[queries].contiguous() * scale, key, value, [*far, *absent], scale
            )


@functools.lru_cache(64)
def _too_far(queries: int, keys: int, offset: int, window: int) -> Tensor:
    """True where a key is more than `window` places from a query, (queries, keys); the first key
    stands `offset` behind the first query."""
    return (torch.arange(queries)[:, None] - torch.arange(keys)[None] - offset).abs_() > window


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    """Single precision, or that of `tensor` where it is better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def hide_(scores: Tensor, hidden: Tensor) -> Tensor:
    """Give the lowest score there is, in place, where a key is not seen; finite, so that a query
    which sees none has no NaN."""
    return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)


def _all_blocks_at_once(inputs: Windowed, window: int, dropout: float) -> Tensor:
    """Blocks of `window` queries against three blocks of keys, as rows of one call of fused
    attention."""
    q_BHLD, k_BHLD, v_BHLD, shared_k_BHGD, shared_v_BHGD, local_BL, present_BG = inputs
    B, H, L, D = q_BHLD.shape
    C = max(1, min(window, L))
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
    # A query that sees nothing (padding in a row without global tokens) looks at everything instead
    # of producing NaN.
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
