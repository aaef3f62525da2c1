"""FAVOR+: softmax attention approximated by random features, linear in the length (Choromanski et
al. 2021, "Rethinking Attention with Performers").

With φ such that E[φ(q)·φ(k)] = exp(q·k), attention is φ(Q) (φ(K)ᵀ V) over φ(Q) (φ(K)ᵀ 1), and
nothing of size length × length is made. Positive features (section 3, equation 5) keep the
denominators away from zero; trigonometric ones (equation 6 of Rahimi & Recht 2007, as the paper's
baseline) do not. Orthogonal rows (section 4.2) lower the variance. The ReLU kernel (appendix D.3's
generalised attention) approximates nothing: it is a mechanism of its own.

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
"""Tokens whose features are made at a time."""
_RELU_FLOOR = 1e-3
"""Added to ReLU features, so that no query is left without any."""


@AttentionConfig.register_subclass("performer")
@dataclass(frozen=True)
class PerformerAttention(AttentionConfig):
    """Random-feature attention."""

    num_features: int = 256
    """Features M; more approximate softmax attention better, at a cost that grows with them."""
    kernel: Literal["softmax", "trigonometric", "relu"] = "softmax"
    """Positive features of the softmax kernel (FAVOR+), trigonometric ones of the same kernel,
    or ReLU."""
    orthogonal: bool = True
    """Rows of the projection orthogonal within blocks of D, or independent."""
    redraw_every: int = 1000
    """Training steps between new projections (the paper's appendix redraws them so that none is
    learned by heart); 0: never."""
    seed: int = 0
    """Seed of the projections; each layer and each drawing has its own."""

    def __post_init__(self) -> None:
        if self.num_features < 1 or (self.kernel == "trigonometric" and self.num_features % 2):
            raise UserError(
                f"attention.num_features must be positive, and even with trigonometric features, got {self.num_features}."
            )
        if self.redraw_every < 0:
            raise UserError(f"attention.redraw_every must be 0 or more, got {self.redraw_every}.")

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        return PerformerSelfAttention(attention, self, layer)


class PerformerSelfAttention(ProjectedSelfAttention, CountsUpdates):
    """One projection a layer, shared by its heads; it is saved with the weights, and so is the
    number of updates. Dropout falls on the output."""

    projection: Tensor
    steps: Tensor

    def __init__(self, local: nn.Module, config: PerformerAttention, layer: int) -> None:
        super().__init__(local)
        self.config, self.layer = config, layer
        rows = config.num_features // 2 if config.kernel == "trigonometric" else config.num_features
        self.register_buffer("projection", torch.zeros(rows, self.head_width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.redraw()

    def redraw(self) -> None:
        """A new projection: a function of the seed, the layer and the number of training steps."""
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

    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, real_BL: Tensor) -> Tensor:
        # Features are exponentials, and sums over the length follow: single precision at least,
        # whatever autocast says.
        with torch.autocast(query_BHLD.device.type, enabled=False):
            query, key, value = (
                x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_BHLD, key_BHLD, value_BHLD)
            )
            projection_MD = self.projection.to(query.dtype)
            out = random_feature_attention(query, key, value, projection_MD, real_BL, self.config.kernel).to(
                value_BHLD.dtype
            )
        return F.dropout(out, self.dropout, self.training)


def draw_projection(rows: int, width: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """Gaussian rows, (`rows`, `width`) float32; with `orthogonal` they are so within blocks of
    `width`, their lengths those of independent ones."""
    if not orthogonal:
        return torch.randn(rows, width, generator=generator)
    blocks = []
    for _ in range(-(-rows // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        blocks.append((q * r.diagonal().sign()).T)  # the sign makes the distribution uniform over rotations
    lengths = torch.randn(rows, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * lengths).float()


def random_feature_attention(
    query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, projection_MD: Tensor, real_BL: Tensor, kernel: str
) -> Tensor:
    """φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1), (B, H, L, D), keys where `real_BL` is false left out.

    Texts longer than a chunk are worked off chunk by chunk, and the gradient makes a chunk's
    features again: what is kept is of the size of queries, keys and values, not of their features.
    """
    short, padded = query_BHLD.shape[2] <= CHUNK, may_be_padded(real_BL)

    def in_chunk(work: Callable[..., Any], *arguments: Tensor | None) -> Any:
        if short or not torch.is_grad_enabled():
            return work(*arguments, projection_MD, kernel)
        return checkpoint(work, *arguments, projection_MD, kernel, use_reentrant=False, preserve_rng_state=False)

    projection_MD = projection_MD * projection_MD.shape[1] ** -0.25  # √ of the 1/√D that softmax attention divides by
    value_BHLE = F.pad(value_BHLD, (0, 1), value=1.0)  # its sums are the denominators
    parts = zip(key_BHLD.split(CHUNK, 2), value_BHLE.split(CHUNK, 2), real_BL.split(CHUNK, 1), strict=True)
    memories, levels = zip(
        *(in_chunk(_written, key, value, ~real if padded else None) for key, value, real in parts), strict=True
    )
    highest_BH11 = torch.stack(levels).amax(0)
    memory_BHME = sum(memory * (level - highest_BH11).exp() for memory, level in zip(memories, levels, strict=True))
    return torch.cat([in_chunk(_read, query, memory_BHME) for query in query_BHLD.split(CHUNK, 2)], 2)


def _written(
    key_BHLD: Tensor, value_BHLE: Tensor, padding_BL: Tensor | None, projection_MD: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    """φ(K)ᵀ V of a chunk, (B, H, M, E), and the logarithm of what it is divided by, (B, H, 1, 1)."""
    feature_BHLM, level_BH11 = key_features(key_BHLD, projection_MD, padding_BL, kernel)
    return feature_BHLM.transpose(-1, -2) @ value_BHLE, level_BH11


def _read(query_BHLD: Tensor, memory_BHME: Tensor, projection_MD: Tensor, kernel: str) -> Tensor:
    """(B, H, L, D)."""
    read_BHLE = query_features(query_BHLD, projection_MD, kernel) @ memory_BHME
    return read_BHLE[..., :-1] / _away_from_zero(read_BHLE[..., -1:])


def query_features(query_BHLD: Tensor, projection_MD: Tensor, kernel: str) -> Tensor:
    """Features, (B, H, L, M), but for a factor of each query, which stands in numerator and
    denominator alike."""
    projected_BHLM = query_BHLD @ projection_MD.T
    if kernel == "relu":
        return F.relu(projected_BHLM) + _RELU_FLOOR
    if kernel == "trigonometric":
        return torch.cat((projected_BHLM.cos(), projected_BHLM.sin()), -1)
    return projected_BHLM.sub_(
        projected_BHLM.detach().amax(-1, keepdim=True)
    ).exp_()  # exp(-|q|²/2) is such a factor, and so is this


def key_features(
    key_BHLD: Tensor, projection_MD: Tensor, padding_BL: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Features of keys, (B, H, L, M), zero where `padding_BL` is true, and the logarithm of what
    they are divided by lest an exponential overflows, (B, H, 1, 1)."""
    projected_BHLM = key_BHLD @ projection_MD.T
    padding_B1L1 = None if padding_BL is None else padding_BL[:, None, :, None]
    if kernel == "relu":
        feature_BHLM, level_BH11 = (
            F.relu(projected_BHLM) + _RELU_FLOOR,
            projected_BHLM.new_zeros(*key_BHLD.shape[:2], 1, 1),
        )
        return feature_BHLM if padding_B1L1 is None else feature_BHLM.masked_fill(padding_B1L1, 0.0), level_BH11
    norm_BHL1 = key_BHLD.square().sum(-1, keepdim=True) * (key_BHLD.shape[-1] ** -0.5 / 2)
    # exp(q·k) = exp(|q|²/2) cos(w·(q-k)) exp(|k|²/2) in expectation, or exp(w·q - |q|²/2) exp(w·k -
    # |k|²/2)
    logarithm = norm_BHL1 if kernel == "trigonometric" else projected_BHLM.add_(-norm_BHL1)
    if padding_B1L1 is not None:
        logarithm = logarithm.masked_fill(padding_B1L1, -math.inf)
    level_BH11 = logarithm.detach().amax((2, 3), keepdim=True).clamp(min=torch.finfo(logarithm.dtype).min)
    factor = logarithm.sub_(level_BH11).exp_()
    if kernel == "trigonometric":
        return torch.cat((projected_BHLM.cos(), projected_BHLM.sin()), -1) * factor, level_BH11
    return factor, level_BH11


def _away_from_zero(total: Tensor) -> Tensor:
    """Denominators of positive features only underflow; those of trigonometric ones may be
    anything."""
    tiny = torch.finfo(total.dtype).tiny * 1e4
    return torch.where(total.abs() < tiny, torch.full_like(total, tiny), total)
