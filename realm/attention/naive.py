"""Naive references: plain loops that define what each attention variant computes, one function per
variant, under the variant's name.

The tests compare every variant's outputs and gradients with these functions. Each takes queries,
keys and values of one head and one text without padding, and attends one query at a time. Nothing
is chunked, fused or rescaled against overflow: use double precision and short texts.

Shape legend: L tokens of a text, S keys, D width of a head, M rows of a random projection, K
projected length, N the model's positions.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RELU_OFFSET = 1e-3
"""Added to every ReLU feature."""


def dense(query_LD: Tensor, key_SD: Tensor, value_SD: Tensor, scale: float | None = None) -> Tensor:
    """softmax(Q Kᵀ · `scale`) V, (L, D): every query attends to every key (Vaswani et al. 2017,
    equation 1). Default scale: 1/√D."""
    scale = query_LD.shape[1] ** -0.5 if scale is None else scale
    rows = []
    for query_D in query_LD:
        weight_S = (scale * (key_SD @ query_D)).exp()
        rows.append(weight_S @ value_SD / weight_S.sum())
    return torch.stack(rows)


def longformer(
    local_qkv: tuple[Tensor, Tensor, Tensor],
    global_qkv: tuple[Tensor, Tensor, Tensor],
    is_global_L: Sequence[bool],
    window: int,
    dilation: int = 1,
) -> Tensor:
    """Sliding-window attention with global tokens, (L, D) (Beltagy et al. 2020, sections 3.1 and
    3.2).

    A local token attends to the tokens that are a multiple of `dilation` and at most `window` ×
    `dilation` positions away, and to all global tokens; a global token attends to all tokens.
    `local_qkv` and `global_qkv` are queries, keys and values, (L, D) each, by the local and by the
    global projections; the type of the query's token selects all three.
    """
    rows = []
    for i, query_is_global in enumerate(is_global_L):
        query_LD, key_LD, value_LD = global_qkv if query_is_global else local_qkv
        visible = []
        for j, key_is_global in enumerate(is_global_L):
            in_window = (i - j) % dilation == 0 and abs(i - j) <= window * dilation
            if query_is_global or key_is_global or in_window:
                visible.append(j)
        rows.append(dense(query_LD[i : i + 1], key_LD[visible], value_LD[visible]))
    return torch.cat(rows)


def performer(query_LD: Tensor, key_LD: Tensor, value_LD: Tensor, projection_MD: Tensor, kernel: str) -> Tensor:
    """Σ_j φ(q)·φ(k_j) v_j / Σ_j φ(q)·φ(k_j), (L, D): softmax attention with exp(q·k / √D) replaced
    by a product of random features (Choromanski et al. 2021, section 3)."""
    features = [random_features(key_D, projection_MD, kernel) for key_D in key_LD]
    rows = []
    for query_D in query_LD:
        query_feature = random_features(query_D, projection_MD, kernel)
        weight_L = torch.stack([query_feature @ key_feature for key_feature in features])
        rows.append(weight_L @ value_LD / weight_L.sum())
    return torch.stack(rows)


def random_features(x_D: Tensor, projection_MD: Tensor, kernel: str) -> Tensor:
    """φ(x); the expectation of φ(q)·φ(k) is exp(q·k / √D) for the kernels "softmax" and
    "trigonometric".

    "softmax": positive features, (M,) (Choromanski et al. 2021, equation 5); "trigonometric":
    cosines and sines, (2M,) (Rahimi & Recht 2007, equation 6, the paper's baseline); "relu": ReLU
    features, (M,), a separate mechanism that does not approximate softmax attention (appendix D.3).
    """
    x_D = x_D * len(x_D) ** -0.25  # of queries and of keys: their product is divided by √D
    half_norm = (x_D @ x_D) / 2
    angle_M = projection_MD @ x_D
    if kernel == "relu":
        feature = angle_M.clamp(min=0) + RELU_OFFSET
    elif kernel == "trigonometric":
        feature = half_norm.exp() * torch.cat((angle_M.cos(), angle_M.sin()))
    else:
        feature = (angle_M - half_norm).exp()
    return feature / math.sqrt(len(projection_MD))


def linformer(
    query_LD: Tensor, key_LD: Tensor, value_LD: Tensor, key_projection_KN: Tensor, value_projection_KN: Tensor
) -> Tensor:
    """softmax(Q (E K)ᵀ / √D) (F V), (L, D), with E and F the projections (Wang et al. 2020, section
    4, equation 7).

    Row j of a projection belongs to bin j of K equal bins of the N positions. In a text shorter
    than N, bins after its last token are not attended to, and a bin that the text fills in part is
    divided by the filled fraction.
    """
    K, N = key_projection_KN.shape
    keys, values = [], []
    for j in range(K):
        bin_positions = range(j * N // K, (j + 1) * N // K)
        filled = sum(i < len(key_LD) for i in bin_positions) / len(bin_positions)
        if filled > 0:
            keys.append(key_projection_KN[j, : len(key_LD)] @ key_LD / filled)
            values.append(value_projection_KN[j, : len(key_LD)] @ value_LD / filled)
    return dense(query_LD, torch.stack(keys), torch.stack(values))


def infini(query_LD: Tensor, key_LD: Tensor, value_LD: Tensor, segment: int, update: str, gate: Tensor) -> Tensor:
    """gate · A_mem + (1 − gate) · A_dot, (L, D): softmax attention within segments, mixed with what
    a compressive memory of the other segments returns (Munkhdalai et al. 2024, section 2, equations
    3 to 6).

    Two memories are kept, one written from the left and one from the right. A segment reads their
    sum: the left one contains only the segments before it, the right one only the segments after
    it: A_mem = σ(q) (M→ + M←) / σ(q) (z→ + z←), with σ = ELU + 1. `update` is "linear" (equation 4)
    or "delta" (equation 5). A text of one segment has A_dot alone.
    """
    starts = range(0, len(key_LD), segment)
    left = _memories(key_LD.split(segment), value_LD.split(segment), update)
    right = _memories(key_LD.split(segment)[::-1], value_LD.split(segment)[::-1], update)[::-1]
    rows = []
    for start, (left_DD, left_norm_D), (right_DD, right_norm_D) in zip(starts, left, right, strict=True):
        tokens = slice(start, start + segment)
        local_SD = dense(query_LD[tokens], key_LD[tokens], value_LD[tokens])
        for query_D, local_D in zip(query_LD[tokens], local_SD, strict=True):
            if len(starts) == 1:
                rows.append(local_D)
                continue
            query_D = F.elu(query_D) + 1
            memory_D = query_D @ (left_DD + right_DD) / (query_D @ (left_norm_D + right_norm_D))
            rows.append(gate * memory_D + (1 - gate) * local_D)
    return torch.stack(rows)


def _memories(keys: Sequence[Tensor], values: Sequence[Tensor], update: str) -> list[tuple[Tensor, Tensor]]:
    """The memory (D, D) and its normalization (D,) before each segment is written, token by token;
    `keys` and `values` are (S, D) per segment, in the order of writing."""
    D = keys[0].shape[1]
    memory_DD, norm_D = keys[0].new_zeros(D, D), keys[0].new_zeros(D)
    states = []
    for key_SD, value_SD in zip(keys, values, strict=True):
        before_DD, before_norm_D = memory_DD, norm_D
        states.append((before_DD, before_norm_D))
        for key_D, value_D in zip(key_SD, value_SD, strict=True):
            key_D = F.elu(key_D) + 1
            if update == "delta":  # write only what the memory does not return for this key
                value_D = value_D - (key_D @ before_DD) / (key_D @ before_norm_D).clamp(min=1e-6)
            memory_DD = memory_DD + torch.outer(key_D, value_D)
            norm_D = norm_D + key_D
    return states
