"""FAVOR+: softmax attention approximated by random features, linear in the length (Choromanski et al. 2021, "Rethinking Attention with
Performers").

With φ such that E[φ(q)·φ(k)] = exp(q·k), attention is φ(Q) (φ(K)ᵀ V) over φ(Q) (φ(K)ᵀ 1), and nothing of size length × length is made. Positive
features (section 3, equation 5) keep the denominators away from zero; trigonometric ones (equation 6 of Rahimi & Recht 2007, as the paper's
baseline) do not. Orthogonal rows (section 4.2) lower the variance. The ReLU kernel (appendix D.3's generalised attention) approximates nothing:
it is a mechanism of its own.

Shape legend: B rows, H heads, L tokens, D width of a head, M features.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realm.attention import AttentionConfig
from realm.attention.projected import ProjectedSelfAttention
from realm.errors import UserError

_RELU_FLOOR = 1e-3
"""Added to ReLU features, so that no query is left without any."""


@AttentionConfig.register_subclass("performer")
@dataclass(frozen=True)
class PerformerAttention(AttentionConfig):
    """Random-feature attention."""

    num_features: int = 256
    """Features M; more approximate softmax attention better, at a cost that grows with them."""
    kernel: Literal["softmax", "trigonometric", "relu"] = "softmax"
    """Positive features of the softmax kernel (FAVOR+), trigonometric ones of the same kernel, or ReLU."""
    orthogonal: bool = True
    """Rows of the projection orthogonal within blocks of D, or independent."""
    redraw_every: int = 1000
    """Training steps between new projections (the paper's appendix redraws them so that none is learned by heart); 0: never."""
    seed: int = 0
    """Seed of the projections; each layer and each drawing has its own."""

    def __post_init__(self) -> None:
        if self.num_features < 1 or (self.kernel == "trigonometric" and self.num_features % 2):
            raise UserError(f"attention.num_features must be positive, and even with trigonometric features, got {self.num_features}.")
        if self.redraw_every < 0:
            raise UserError(f"attention.redraw_every must be 0 or more, got {self.redraw_every}.")

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        return PerformerSelfAttention(attention, self, layer)


class PerformerSelfAttention(ProjectedSelfAttention):
    """One projection a layer, shared by its heads; it is saved with the weights, and so is the number of steps since it was drawn."""

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
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.layer) * 1_000_003 + int(self.steps))
        rows, width = self.projection.shape
        self.projection.copy_(draw_projection(rows, width, self.config.orthogonal, generator))

    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, real_BL: Tensor) -> Tensor:
        if self.training and self.config.redraw_every:
            if int(self.steps) and int(self.steps) % self.config.redraw_every == 0:
                self.redraw()
            self.steps += 1
        # Features are exponentials, and sums over the length follow: single precision at least, whatever autocast says.
        with torch.autocast(query_BHLD.device.type, enabled=False):
            query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_BHLD, key_BHLD, value_BHLD))
            projection_MD = self.projection.to(query.dtype)
            query_BHLM, key_BHLM = features(query, key, projection_MD, real_BL, self.config.kernel)
            return linear_attention(query_BHLM, key_BHLM, value).to(value_BHLD.dtype)


def draw_projection(rows: int, width: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """Gaussian rows, (`rows`, `width`) float32; with `orthogonal` they are so within blocks of `width`, their lengths those of independent ones."""
    if not orthogonal:
        return torch.randn(rows, width, generator=generator)
    blocks = []
    for _ in range(-(-rows // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        blocks.append((q * r.diagonal().sign()).T)  # the sign makes the distribution uniform over rotations
    lengths = torch.randn(rows, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * lengths).float()


def features(query_BHLD: Tensor, key_BHLD: Tensor, projection_MD: Tensor, real_BL: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Features of queries and keys, both (B, H, L, M), zero for keys that are padding.

    Every query's features, and all keys' of a head, may carry a common factor: it stands in numerator and denominator alike, and is chosen so
    that no exponential overflows.
    """
    real_B1L1 = real_BL[:, None, :, None]
    if kernel == "relu":
        scale = query_BHLD.shape[-1] ** -0.25
        return F.relu(scale * query_BHLD @ projection_MD.T) + _RELU_FLOOR, (F.relu(scale * key_BHLD @ projection_MD.T) + _RELU_FLOOR) * real_B1L1
    scale = query_BHLD.shape[-1] ** -0.25  # √ of the 1/√D that softmax attention divides by
    query_BHLD, key_BHLD = scale * query_BHLD, scale * key_BHLD
    query_BHLM, key_BHLM = query_BHLD @ projection_MD.T, key_BHLD @ projection_MD.T
    query_norm, key_norm = (x.square().sum(-1, keepdim=True) / 2 for x in (query_BHLD, key_BHLD))
    if kernel == "trigonometric":  # exp(q·k) = exp(|q|²/2) cos(w·(q-k)) exp(|k|²/2) in expectation
        key_factor = key_norm.masked_fill(~real_B1L1, -math.inf)
        key_factor = (key_factor - key_factor.amax(2, keepdim=True).detach()).exp()
        return torch.cat((query_BHLM.cos(), query_BHLM.sin()), -1), torch.cat((key_BHLM.cos(), key_BHLM.sin()), -1) * key_factor
    query_BHLM = query_BHLM - query_norm
    key_BHLM = (key_BHLM - key_norm).masked_fill(~real_B1L1, -math.inf)
    query_BHLM = query_BHLM - query_BHLM.amax(-1, keepdim=True).detach()
    key_BHLM = key_BHLM - key_BHLM.amax((2, 3), keepdim=True).detach()
    return query_BHLM.exp(), key_BHLM.exp()


def linear_attention(query_BHLM: Tensor, key_BHLM: Tensor, value_BHLD: Tensor) -> Tensor:
    """φ(Q) (φ(K)ᵀ V) / φ(Q) (φ(K)ᵀ 1), (B, H, L, D)."""
    memory_BHMD = key_BHLM.transpose(-1, -2) @ value_BHLD
    total_BHL1 = query_BHLM @ key_BHLM.sum(2)[..., None]
    return (query_BHLM @ memory_BHMD) / _away_from_zero(total_BHL1)


def _away_from_zero(total: Tensor) -> Tensor:
    """Denominators of positive features only underflow; those of trigonometric ones may be anything."""
    tiny = torch.finfo(total.dtype).tiny * 1e4
    return torch.where(total.abs() < tiny, torch.full_like(total, tiny), total)
