"""FAVOR+: softmax attention approximated by random features, linear in the length (Choromanski et
al. 2021, "Rethinking Attention with Performers").

With φ such that E[φ(q)·φ(k)] = exp(q·k), attention is φ(Q) (φ(K)ᵀ V) over φ(Q) (φ(K)ᵀ 1), and no
length × length matrix is created. Positive features (section 3, equation 5) keep the denominators
away from zero; trigonometric ones (equation 6 of Rahimi & Recht 2007, the paper's baseline) do not.
Orthogonal rows (section 4.2) reduce the variance. The ReLU kernel (generalized attention, appendix
D.3) is a separate mechanism that does not approximate softmax attention.

Shape legend: B rows, H heads, L tokens, D width of a head, E = D + 1, M features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from realm.attention.projected import ProjectedSelfAttention, may_be_padded
from realm.attention.variant import AttentionConfig, CountsUpdates
from realm.errors import UserError

CHUNK = 1024
"""Tokens whose features are computed at a time."""
_RELU_OFFSET = 1e-3
"""Added to ReLU features, so that no query has only zeros."""
_MAX_SEED = 1_000_000
"""Largest seed: with the layer and the number of updates, torch's generator has 64 bits for it."""


@AttentionConfig.register_subclass("performer")
@dataclass(frozen=True)
class PerformerAttention(AttentionConfig):
    """Random-feature attention."""

    num_features: int = 256
    """Features M; more features approximate softmax attention better, at a proportional cost."""
    kernel: Literal["softmax", "trigonometric", "relu"] = "softmax"
    """Positive features of the softmax kernel (FAVOR+), trigonometric features of the same kernel,
    or ReLU features."""
    orthogonal: bool = True
    """Projection with rows orthogonal within blocks of D, or independent rows."""
    redraw_every: int = 1000
    """Redraw the projection every N training steps, so that the model does not overfit to one
    projection (the paper's appendix); 0: never."""
    seed: int = 0
    """Seed of the projections; every layer and every redraw has its own random state."""

    def __post_init__(self) -> None:
        if self.num_features < 1 or (self.kernel == "trigonometric" and self.num_features % 2):
            raise UserError(
                "attention.num_features must be at least 1, and even for trigonometric features, "
                f"got {self.num_features}."
            )
        if self.redraw_every < 0:
            raise UserError(f"attention.redraw_every must be 0 or more, got {self.redraw_every}.")
        if not 0 <= self.seed <= _MAX_SEED:
            raise UserError(f"attention.seed must be between 0 and {_MAX_SEED:,}, got {self.seed}.")

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        return PerformerSelfAttention(attention, self, layer)


class PerformerSelfAttention(ProjectedSelfAttention, CountsUpdates):
    """One random projection per layer, shared by its heads; projection and update count are saved
    with the weights. Dropout is applied to the output."""

    projection: Tensor
    steps: Tensor

    def __init__(self, bert_attention: nn.Module, config: PerformerAttention, layer: int) -> None:
        super().__init__(bert_attention)
        self.config, self.layer = config, layer
        rows = config.num_features // 2 if config.kernel == "trigonometric" else config.num_features
        self.register_buffer("projection", torch.zeros(rows, self.head_width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.redraw()

    def redraw(self) -> None:
        """Draw a new projection; it depends only on the seed, the layer and the number of training
        steps."""
        generator = torch.Generator().manual_seed(
            (self.config.seed * 1_000_003 + self.layer) * 1_000_003 + int(self.steps)
        )
        rows, width = self.projection.shape
        self.projection.copy_(draw_projection(rows, width, self.config.orthogonal, generator))

    def count_update(self) -> None:
        if self.config.redraw_every:
            self.steps += 1
            if int(self.steps) % self.config.redraw_every == 0:
                self.redraw()

    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, token_mask_BL: Tensor) -> Tensor:
        # Exponentials, summed over the length: fp32 or better, also under autocast.
        with torch.autocast(query_BHLD.device.type, enabled=False):
            query, key, value = (
                x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_BHLD, key_BHLD, value_BHLD)
            )
            projection_MD = self.projection.to(query.dtype)
            out = random_feature_attention(query, key, value, projection_MD, token_mask_BL, self.config.kernel)
            out = out.to(value_BHLD.dtype)
        return F.dropout(out, self.dropout, self.training)


def draw_projection(rows: int, width: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """Gaussian rows, (`rows`, `width`) float32; with `orthogonal`, rows are orthogonal within
    blocks of `width` and have the norms of independent Gaussian rows."""
    if not orthogonal:
        return torch.randn(rows, width, generator=generator)
    blocks = []
    for _ in range(-(-rows // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        blocks.append((q * r.diagonal().sign()).T)  # the signs make the distribution uniform over rotations
    norms = torch.randn(rows, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    projection_MD: Tensor = torch.cat(blocks)[:rows] * norms
    return projection_MD.float()


def random_feature_attention(
    query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, projection_MD: Tensor, token_mask_BL: Tensor, kernel: str
) -> Tensor:
    """φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1), (B, H, L, D), without keys where `token_mask_BL` is false.

    Texts longer than a chunk are processed in chunks whose features the backward pass recomputes:
    saved tensors have the size of queries, keys and values, not of their features.
    """
    one_chunk, padded = query_BHLD.shape[2] <= CHUNK, may_be_padded(token_mask_BL)

    def run_chunk(function: Callable[..., Any], *arguments: Tensor | None) -> Any:
        if one_chunk or not torch.is_grad_enabled():
            return function(*arguments, projection_MD, kernel)
        return checkpoint(function, *arguments, projection_MD, kernel, use_reentrant=False, preserve_rng_state=False)

    projection_MD = projection_MD * projection_MD.shape[1] ** -0.25  # √ of softmax attention's scale 1/√D
    value_BHLE = F.pad(value_BHLD, (0, 1), value=1.0)  # the sums of the ones are the denominators
    chunks = zip(key_BHLD.split(CHUNK, 2), value_BHLE.split(CHUNK, 2), token_mask_BL.split(CHUNK, 1), strict=True)
    sums, log_scales = zip(
        *(run_chunk(_sum_values, key, value, ~mask if padded else None) for key, value, mask in chunks), strict=True
    )
    max_log_scale_BH11 = torch.stack(log_scales).amax(0)
    sum_BHME = sum(
        chunk_sum * (log_scale - max_log_scale_BH11).exp()
        for chunk_sum, log_scale in zip(sums, log_scales, strict=True)
    )
    return torch.cat([run_chunk(_weighted_mean, query, sum_BHME) for query in query_BHLD.split(CHUNK, 2)], 2)


def _sum_values(
    key_BHLD: Tensor, value_BHLE: Tensor, padding_BL: Tensor | None, projection_MD: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    """φ(K)ᵀ V of a chunk, (B, H, M, E), and the logarithm of its divisor, (B, H, 1, 1)."""
    feature_BHLM, log_scale_BH11 = key_features(key_BHLD, projection_MD, padding_BL, kernel)
    return feature_BHLM.transpose(-1, -2) @ value_BHLE, log_scale_BH11


def _weighted_mean(query_BHLD: Tensor, sum_BHME: Tensor, projection_MD: Tensor, kernel: str) -> Tensor:
    """Attention output of a chunk of queries, (B, H, L, D)."""
    out_BHLE = query_features(query_BHLD, projection_MD, kernel) @ sum_BHME
    return out_BHLE[..., :-1] / _nonzero(out_BHLE[..., -1:])


def query_features(query_BHLD: Tensor, projection_MD: Tensor, kernel: str) -> Tensor:
    """Features, (B, H, L, M), up to a factor per query, which numerator and denominator share."""
    projected_BHLM = query_BHLD @ projection_MD.T
    if kernel == "relu":
        return F.relu(projected_BHLM) + _RELU_OFFSET
    if kernel == "trigonometric":
        return torch.cat((projected_BHLM.cos(), projected_BHLM.sin()), -1)
    # exp(-|q|²/2) is a factor per query, and so is the exponential of the maximum subtracted here.
    return projected_BHLM.sub_(projected_BHLM.detach().amax(-1, keepdim=True)).exp_()


def key_features(
    key_BHLD: Tensor, projection_MD: Tensor, padding_BL: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Features of keys, (B, H, L, M), zero where `padding_BL` is true, and the logarithm of their
    divisor, which avoids overflow, (B, H, 1, 1)."""
    projected_BHLM = key_BHLD @ projection_MD.T
    padding_B1L1 = None if padding_BL is None else padding_BL[:, None, :, None]
    if kernel == "relu":
        feature_BHLM = F.relu(projected_BHLM) + _RELU_OFFSET
        log_scale_BH11 = projected_BHLM.new_zeros(*key_BHLD.shape[:2], 1, 1)
        return feature_BHLM if padding_B1L1 is None else feature_BHLM.masked_fill(padding_B1L1, 0.0), log_scale_BH11
    half_norm_BHL1 = key_BHLD.square().sum(-1, keepdim=True) * (key_BHLD.shape[-1] ** -0.5 / 2)
    # In expectation, exp(q·k) = exp(|q|²/2) cos(w·(q-k)) exp(|k|²/2), and
    # exp(q·k) = exp(w·q - |q|²/2) exp(w·k - |k|²/2).
    log_feature = half_norm_BHL1 if kernel == "trigonometric" else projected_BHLM.add_(-half_norm_BHL1)
    if padding_B1L1 is not None:
        log_feature = log_feature.masked_fill(padding_B1L1, -math.inf)
    log_scale_BH11 = log_feature.detach().amax((2, 3), keepdim=True).clamp(min=torch.finfo(log_feature.dtype).min)
    factor = log_feature.sub_(log_scale_BH11).exp_()
    if kernel == "trigonometric":
        return torch.cat((projected_BHLM.cos(), projected_BHLM.sin()), -1) * factor, log_scale_BH11
    return factor, log_scale_BH11


def _nonzero(denominator: Tensor) -> Tensor:
    """Replace denominators near zero with a tiny value: those of positive features may underflow,
    those of trigonometric features may have any value."""
    tiny = torch.finfo(denominator.dtype).tiny * 1e4
    return torch.where(denominator.abs() < tiny, torch.full_like(denominator, tiny), denominator)
