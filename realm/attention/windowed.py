"""Attention of every token to a window around it and to a set of shared keys: the core of
Longformer, linear in the length in time and memory.

Queries are processed in blocks, each against the keys of its window; no length × length matrix is
created. On a GPU, or with dropout, all blocks are one masked call of torch's fused attention. On a
CPU the blocks are matrix products one after another, small enough for the cache; the backward pass
recomputes the scores.

Shape legend: B rows, H heads, L tokens, D width of a head, G shared keys, C queries of a block, K
keys visible to a block, R rows of a block, N = ⌈L/C⌉ blocks.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MIN_BLOCK, _MAX_BLOCK = 64, 192
"""Bounds of the queries per block on a CPU; between them a block is as long as the window on one
side."""
CACHED_SCORES = 2**19
"""Scores computed at a time, at least those of one row of a block: 2 MiB in fp32."""


class WindowInputs(NamedTuple):
    """Inputs of windowed attention."""

    q_BHLD: Tensor
    k_BHLD: Tensor
    v_BHLD: Tensor
    shared_k_BHGD: Tensor
    """Keys visible to every token in addition to its window."""
    shared_v_BHGD: Tensor
    local_mask_BL: Tensor
    """True on keys that are visible in windows."""
    shared_mask_BG: Tensor
    """True on shared keys that are not padding."""

    @classmethod
    def without_shared_keys(
        cls, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask_BL: Tensor | None
    ) -> "WindowInputs":
        """Windows only; `mask_BL` is 0 on padding, or None without padding."""
        B, _, L, _ = q_BHLD.shape
        local_mask_BL = torch.ones(B, L, dtype=torch.bool, device=q_BHLD.device) if mask_BL is None else mask_BL.bool()
        return cls(q_BHLD, k_BHLD, v_BHLD, k_BHLD[:, :, :0], v_BHLD[:, :, :0], local_mask_BL, local_mask_BL[:, :0])


def dilated_attention(inputs: WindowInputs, window: int, dilation: int, dropout: float) -> Tensor:
    """Windowed attention over every `dilation`-th token, (B, H, L, D): positions with the same
    residue modulo `dilation` become one row."""
    if dilation == 1:
        return windowed_attention(inputs, window, dropout)
    B, H, L, D = inputs.q_BHLD.shape
    pad = -L % dilation
    length = (L + pad) // dilation

    def split_residues(x_BHLD: Tensor) -> Tensor:
        x = F.pad(x_BHLD, (0, 0, 0, pad)).view(B, H, length, dilation, D)
        return x.permute(0, 3, 1, 2, 4).reshape(B * dilation, H, length, D)

    q, k, v = split_residues(inputs.q_BHLD), split_residues(inputs.k_BHLD), split_residues(inputs.v_BHLD)
    shared_k, shared_v = (x.repeat_interleave(dilation, 0) for x in (inputs.shared_k_BHGD, inputs.shared_v_BHGD))
    local_mask = F.pad(inputs.local_mask_BL, (0, pad)).view(B, length, dilation)
    local_mask = local_mask.transpose(1, 2).reshape(B * dilation, length)
    shared_mask = inputs.shared_mask_BG.repeat_interleave(dilation, 0)
    out = windowed_attention(WindowInputs(q, k, v, shared_k, shared_v, local_mask, shared_mask), window, dropout)
    out = out.view(B, dilation, H, length, D).permute(0, 2, 3, 1, 4)
    return out.reshape(B, H, length * dilation, D)[:, :, :L]


def windowed_attention(inputs: WindowInputs, window: int, dropout: float) -> Tensor:
    """Attention of every token to its window and to the shared keys, (B, H, L, D)."""
    if inputs.q_BHLD.device.type == "cpu" and not dropout:
        out_BHLD: Tensor = _BlockwiseAttention.apply(*inputs, window)  # type: ignore[no-untyped-call]
        return out_BHLD
    return _fused_windowed_attention(inputs, window, dropout)


class _BlockwiseAttention(torch.autograd.Function):
    """One block after another as matrix products in the dtype of the inputs; the softmax is
    computed in fp32 or better."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, window = arguments
        inputs = WindowInputs(*tensors)
        out_BHLD = torch.empty_like(inputs.q_BHLD)
        for block in _blocks(inputs, window):
            out_BHLD[block.queries] = block.probabilities() @ block.value_RHKD
        ctx.save_for_backward(*tensors)
        ctx.window = window
        return out_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, grad_out_BHLD = WindowInputs(*ctx.saved_tensors), grad_outputs[0]
        grad_q = torch.empty_like(inputs.q_BHLD)
        # A key is in several blocks: its gradient is a sum, in the precision of the softmax.
        key_gradients = [torch.zeros_like(x, dtype=softmax_dtype(x)) for x in inputs[1:5]]
        grad_k, grad_v, grad_shared_k, grad_shared_v = key_gradients
        G = grad_shared_k.shape[2]
        for block in _blocks(inputs, ctx.window):
            grad_out_RHCD, probability_RHCK = grad_out_BHLD[block.queries].contiguous(), block.probabilities()
            grad_value_RHKD = probability_RHCK.transpose(-1, -2) @ grad_out_RHCD
            grad_RHCK = grad_out_RHCD @ block.value_RHKD.transpose(-1, -2)  # of the probabilities, then of the scores
            torch._softmax_backward_data(grad_RHCK, probability_RHCK, -1, grad_RHCK.dtype, grad_input=grad_RHCK)
            grad_q[block.queries] = (grad_RHCK @ block.key_RHKD).mul_(block.scale)
            grad_key_RHKD = grad_RHCK.transpose(-1, -2) @ block.query_RHCD
            for local, shared, grad in (
                (grad_k, grad_shared_k, grad_key_RHKD),
                (grad_v, grad_shared_v, grad_value_RHKD),
            ):
                shared[block.rows] += grad[:, :, :G]
                local[block.keys] += grad[:, :, G:]
        return grad_q, *(grad.to(grad_q.dtype) for grad in key_gradients), None, None, None


class _Block(NamedTuple):
    """Queries of some rows and the keys visible to them, shared keys first."""

    rows: slice
    queries: tuple[slice, slice, slice]
    """Index of the queries in (B, H, L)."""
    keys: tuple[slice, slice, slice]
    """Index of the windows' keys in (B, H, L)."""
    query_RHCD: Tensor
    """Multiplied by `scale`."""
    key_RHKD: Tensor
    value_RHKD: Tensor
    masks: Sequence[tuple[slice, Tensor]]
    """Ranges of keys, and the mask of each: true if the query (last but one axis) does not see the
    key."""
    scale: float

    def probabilities(self) -> Tensor:
        """(R, H, C, K). A query without visible keys (padding) gets a uniform distribution."""
        score_RHCK = self.query_RHCD @ self.key_RHKD.transpose(-1, -2)
        for keys, mask in self.masks:
            mask_scores_(score_RHCK[..., keys], mask)
        return torch.softmax(score_RHCK, -1, out=score_RHCK)


def _blocks(inputs: WindowInputs, window: int) -> Iterator[_Block]:
    """All blocks; a block has all rows if their scores fit the cache, otherwise fewer."""
    B, H, L, D = inputs.q_BHLD.shape
    scale = D**-0.5
    G = inputs.shared_k_BHGD.shape[2]
    C = max(_MIN_BLOCK, min(_MAX_BLOCK, window))
    for start in range(0, L, C):
        block = slice(start, min(start + C, L))
        visible = slice(max(0, start - window), min(start + C + window, L))
        # Only keys before the window of the last query, or after the window of the first query, are
        # outside the window of some query of the block.
        left = slice(visible.start, max(visible.start, min(visible.stop, block.stop - 1 - window)))
        right = slice(min(visible.stop, max(visible.start, start + window + 1)), visible.stop)
        offset = G - visible.start
        window_masks = [
            (
                slice(offset + edge.start, offset + edge.stop),
                _outside_window(block.stop - start, edge.stop - edge.start, edge.start - start, window),
            )
            for edge in (left, right)
            if edge.stop > edge.start
        ]
        num_rows = max(1, CACHED_SCORES // (H * (block.stop - start) * (G + visible.stop - visible.start)))
        for row in range(0, B, num_rows):
            rows, heads = slice(row, min(row + num_rows, B)), slice(None)
            queries, keys = (rows, heads, block), (rows, heads, visible)
            key_mask_RK = torch.cat((inputs.shared_mask_BG[rows], inputs.local_mask_BL[rows, visible]), 1)
            padding = [] if bool(key_mask_RK.all()) else [(slice(None), ~key_mask_RK[:, None, None, :])]
            key = torch.cat((inputs.shared_k_BHGD[rows], inputs.k_BHLD[keys]), 2)
            value = torch.cat((inputs.shared_v_BHGD[rows], inputs.v_BHLD[keys]), 2)
            query = inputs.q_BHLD[queries].contiguous() * scale
            yield _Block(rows, queries, keys, query, key, value, [*window_masks, *padding], scale)


@functools.lru_cache(64)
def _outside_window(num_queries: int, num_keys: int, offset: int, window: int) -> Tensor:
    """True if a key is more than `window` positions from a query, (num_queries, num_keys); the
    first key is `offset` positions after the first query."""
    return (torch.arange(num_queries)[:, None] - torch.arange(num_keys)[None] - offset).abs_() > window


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or the dtype of `tensor` if it is more precise."""
    return torch.promote_types(tensor.dtype, torch.float32)


def mask_scores_(scores: Tensor, mask: Tensor) -> Tensor:
    """Fill scores with the lowest finite value where `mask` is true, in place; -inf would make rows
    without a visible key NaN."""
    return scores.masked_fill_(mask, torch.finfo(scores.dtype).min)


def _fused_windowed_attention(inputs: WindowInputs, window: int, dropout: float) -> Tensor:
    """Blocks of `window` queries against three blocks of keys, as rows of one call of fused
    attention."""
    q_BHLD, k_BHLD, v_BHLD, shared_k_BHGD, shared_v_BHGD, local_mask_BL, shared_mask_BG = inputs
    B, H, L, D = q_BHLD.shape
    C = max(1, min(window, L))
    N = -(-L // C)
    pad = N * C - L

    def query_blocks(x_BHLD: Tensor) -> Tensor:
        return F.pad(x_BHLD, (0, 0, 0, pad)).view(B, H, N, C, D).transpose(1, 2)

    def key_blocks(x_BHLD: Tensor, shared_BHGD: Tensor) -> Tensor:
        visible = F.pad(x_BHLD, (0, 0, C, C + pad)).unfold(2, 3 * C, C).permute(0, 2, 1, 4, 3)  # (B, N, H, 3C, D)
        return torch.cat([visible, shared_BHGD[:, None].expand(-1, N, -1, -1, -1)], dim=3)

    key_mask_BN3C = F.pad(local_mask_BL, (C, C + pad)).unfold(1, 3 * C, C)
    offset = torch.arange(3 * C, device=q_BHLD.device)[None, :] - C - torch.arange(C, device=q_BHLD.device)[:, None]
    in_window_C3C = offset.abs() <= window
    mask_BNC3C = key_mask_BN3C[:, :, None, :] & in_window_C3C
    mask = torch.cat([mask_BNC3C, shared_mask_BG[:, None, None, :].expand(-1, N, C, -1)], dim=-1)
    # A query without visible keys (padding in a row without global tokens) attends to all keys
    # instead of returning NaN.
    mask = mask | ~mask.any(-1, keepdim=True)
    num_keys = 3 * C + shared_k_BHGD.shape[2]
    out = F.scaled_dot_product_attention(
        query_blocks(q_BHLD).reshape(B * N, H, C, D),
        key_blocks(k_BHLD, shared_k_BHGD).reshape(B * N, H, num_keys, D),
        key_blocks(v_BHLD, shared_v_BHGD).reshape(B * N, H, num_keys, D),
        attn_mask=mask.reshape(B * N, 1, C, num_keys),
        dropout_p=dropout,
    )
    return out.view(B, N, H, C, D).transpose(1, 2).reshape(B, H, N * C, D)[:, :, :L]
