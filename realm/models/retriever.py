"""The retriever: BERT towers that embed queries and passages for maximum inner product search (Guu
et al. 2020, section 3.2).

Passages are encoded as `[CLS] title [SEP] text [SEP]` with token type 0 throughout, queries as
`[CLS] text [SEP]`.

Shape legend: B rows, N candidates per query, L wordpieces, H hidden width, D embedding width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertModel, PreTrainedTokenizerBase

from realm.attention.binding import bind_attention
from realm.attention.dense import DenseAttention
from realm.errors import UserError
from realm.models.bert import BertSource, load_bert
from realm.models.precision import Precision, autocast
from realm.runtime.section import Section


@dataclass(frozen=True)
class RetrieverConfig(Section):
    """Towers, pooling and projection."""

    bert: BertSource = field(default_factory=BertSource)
    """The encoder of each tower."""
    pooling: Literal["cls", "mean"] = "cls"
    """Pooling of the hidden states: the first token, or the mean of all real tokens (off-the-shelf
    sentence encoders)."""
    projection: Literal["linear", "none"] = "linear"
    """Linear projection to `projection_dim` (the paper's W), or none."""
    projection_dim: int = 128
    """Embedding width D with a linear projection."""
    normalize: bool = False
    """Scale embeddings to length 1; use it with a `temperature` well below 1."""
    temperature: float = 1.0
    """Divisor of inner products before the softmax over candidates; does not change the ranking."""
    shared_tower: bool = True
    """One tower for queries and passages, or one for each (with the same initial weights)."""
    max_query_tokens: int = 96
    """Maximum length of a query in wordpieces, including special tokens."""
    max_passage_tokens: int = 288
    """Maximum length of a passage in wordpieces, including its title and special tokens."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(1, "projection_dim")
        yield from self.at_least(4, "max_query_tokens", "max_passage_tokens")
        yield from self.positive("temperature")


class Tower(nn.Module):
    """One BERT with pooling and projection: (B, L) token ids to embeddings (B, D)."""

    def __init__(self, bert: BertModel, pooling: str, projection_dim: int | None, normalize: bool) -> None:
        super().__init__()
        bind_attention(bert, DenseAttention())
        self.bert = bert
        self.pooling = pooling
        self.normalize = normalize
        hidden = bert.config.hidden_size
        self.projection = nn.Identity() if projection_dim is None else nn.Linear(hidden, projection_dim)
        self.dim = hidden if projection_dim is None else projection_dim

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        hidden_BLH = self.bert(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        # From here on fp32 or better, also under autocast: scores must not be rounded.
        dtype = torch.promote_types(hidden_BLH.dtype, torch.float32)
        if self.pooling == "cls":
            pooled_BH = hidden_BLH[:, 0].to(dtype)
        else:
            sum_BH = (hidden_BLH * mask_BL[..., None].to(hidden_BLH.dtype)).sum(1, dtype=dtype)
            pooled_BH = sum_BH / mask_BL.sum(1, keepdim=True)
        if isinstance(self.projection, nn.Linear):
            pooled_BH = pooled_BH.to(self.projection.weight.dtype)
        with torch.autocast(pooled_BH.device.type, enabled=False):
            emb_BD = self.projection(pooled_BH)
        return F.normalize(emb_BD, dim=-1) if self.normalize else emb_BD


class Retriever(nn.Module):
    """Query tower and passage tower; with `shared_tower` they are the same module."""

    def __init__(self, query_tower: Tower, passage_tower: Tower, temperature: float) -> None:
        super().__init__()
        self.query_tower = query_tower
        self.passage_tower = passage_tower
        self.temperature = temperature

    @property
    def dim(self) -> int:
        """Embedding width D."""
        return self.query_tower.dim

    @property
    def shared(self) -> bool:
        """Whether both towers are the same module."""
        return self.query_tower is self.passage_tower

    def embed_queries(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, L) ids and padding mask to query embeddings (B, D)."""
        query_emb_BD: Tensor = self.query_tower(ids_BL, mask_BL)
        return query_emb_BD

    def embed_passages(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, L) ids and padding mask to passage embeddings (B, D)."""
        passage_emb_BD: Tensor = self.passage_tower(ids_BL, mask_BL)
        return passage_emb_BD

    def score(self, query_emb_BD: Tensor, candidate_emb_BND: Tensor, extra_BN: Tensor | None = None) -> Tensor:
        """Relevance f(x, z) of N candidates per query, (B, N): inner product divided by the
        temperature (section 3.1).

        `extra_BN` is added to the inner products, such as the scores of fused retrieval.
        """
        with torch.autocast(query_emb_BD.device.type, enabled=False):
            score_BN = torch.einsum("bd,bnd->bn", query_emb_BD.float(), candidate_emb_BND.float())
            return (score_BN if extra_BN is None else score_BN + extra_BN) / self.temperature


def embed_by_length(
    embed: Callable[[Tensor, Tensor], Tensor],
    ids_BL: Tensor,
    mask_BL: Tensor,
    num_buckets: int = 4,
    chunk_size: int | None = None,
) -> Tensor:
    """`embed(ids_BL, mask_BL)`, (B, D), in buckets of similar length, so that short texts are not
    padded to the longest.

    With `chunk_size`, a bucket has at most that many rows, and the backward pass embeds it again
    instead of keeping its activations: memory is that of one bucket, embeddings and gradients are
    those of the whole batch (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup"). The number of buckets depends only on B, so that all ranks issue the
    same collectives if they have the same B.
    """
    if chunk_size is not None:
        num_buckets = max(num_buckets, -(-len(ids_BL) // chunk_size))
    lengths_B = mask_BL.sum(1)
    order_B = lengths_B.argsort(descending=True, stable=True)
    parts = []
    for rows in order_B.tensor_split(num_buckets):
        bucket = rows if len(rows) else order_B[-1:]
        max_length = int(lengths_B[bucket].max())
        inputs = ids_BL[bucket, :max_length], mask_BL[bucket, :max_length]
        # Not reentrant: each parameter's gradient is accumulated once, as ZeRO's hooks expect.
        emb_RD = embed(*inputs) if chunk_size is None else checkpoint(embed, *inputs, use_reentrant=False)
        parts.append(emb_RD[: len(rows)])
    return torch.cat(parts)[order_B.argsort()]


def embed_no_grad(tower: nn.Module, ids_BL: Tensor, mask_BL: Tensor, precision: Precision = "fp32") -> np.ndarray:
    """Embeddings without gradients and dropout, computed on the tower's device, (B, D) float32;
    with `precision` bf16 under autocast."""
    device = next(tower.parameters()).device
    training = tower.training
    tower.eval()
    with torch.inference_mode(), autocast(device, precision):
        embeddings: np.ndarray = tower(ids_BL.to(device), mask_BL.to(device)).float().cpu().numpy()
    tower.train(training)
    return embeddings


def build_retriever(config: RetrieverConfig, tokenizer: PreTrainedTokenizerBase) -> Retriever:
    """Build a retriever from the config, with the weights of a checkpoint or random weights."""

    def tower() -> Tower:
        bert = load_bert(config.bert, len(tokenizer), tokenizer.pad_token_id, "retriever.bert")
        projection_dim = config.projection_dim if config.projection == "linear" else None
        return Tower(bert, config.pooling, projection_dim, config.normalize)

    query_tower = tower()
    max_tokens = max(config.max_query_tokens, config.max_passage_tokens)
    max_positions = query_tower.bert.config.max_position_embeddings
    if max_tokens > max_positions:
        raise UserError(
            f"retriever.max_query_tokens / max_passage_tokens ({max_tokens}) exceed the encoder's {max_positions} "
            "positions; lower them."
        )
    if config.shared_tower:
        return Retriever(query_tower, query_tower, config.temperature)
    passage_tower = tower()
    passage_tower.load_state_dict(query_tower.state_dict())
    return Retriever(query_tower, passage_tower, config.temperature)
