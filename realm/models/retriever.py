"""The retriever: BERT towers that embed queries and passages for maximum inner product search (Guu
et al. 2020, section 3.2).

Exported folders have the layout of sentence-transformers and load there as they are; passages are
encoded as `[CLS] title [SEP] text [SEP]` with every token of type 0, queries as `[CLS] text [SEP]`.

Shape legend: B rows, L wordpieces, H hidden width, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel, PreTrainedTokenizerBase

from realm.attention.binding import bind_attention
from realm.attention.dense import DenseAttention
from realm.errors import UserError
from realm.models.bert import BertSource, load_bert
from realm.models.precision import Precision, autocast


@dataclass(frozen=True)
class RetrieverConfig:
    """Towers, pooling and projection."""

    bert: BertSource = field(default_factory=BertSource)
    """The encoder of each tower."""
    pooling: Literal["cls", "mean"] = "cls"
    """What stands for the whole text: the first token, or the mean of all real tokens
    (off-the-shelf sentence encoders)."""
    projection: Literal["linear", "none"] = "linear"
    """A linear map to `projection_dim` (the paper's W), or the pooled vector itself."""
    projection_dim: int = 128
    """Embedding width D with a linear projection."""
    normalize: bool = False
    """Scale embeddings to length 1; set a `temperature` well below 1 with it."""
    temperature: float = 1.0
    """Inner products are divided by this before the softmax over candidates; the ranking does
    not change."""
    shared_tower: bool = True
    """One tower for queries and passages, or one each (started alike)."""
    max_query_tokens: int = 96
    """Longest query, special tokens included."""
    max_passage_tokens: int = 288
    """Longest passage, title and special tokens included."""


class Tower(nn.Module):
    """One BERT with pooling and projection: (B, L) token ids to (B, D)."""

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
        dtype = torch.promote_types(
            hidden_BLH.dtype, torch.float32
        )  # from here on, whatever autocast says: scores must not be rounded
        if self.pooling == "cls":
            pooled_BH = hidden_BLH[:, 0].to(dtype)
        else:
            pooled_BH = (hidden_BLH * mask_BL[..., None].to(hidden_BLH.dtype)).sum(1, dtype=dtype) / mask_BL.sum(
                1, keepdim=True
            )
        if isinstance(self.projection, nn.Linear):
            pooled_BH = pooled_BH.to(self.projection.weight.dtype)
        with torch.autocast(pooled_BH.device.type, enabled=False):
            emb_BD = self.projection(pooled_BH)
        return F.normalize(emb_BD, dim=-1) if self.normalize else emb_BD


class Retriever(nn.Module):
    """Query tower and passage tower; with `shared_tower` they are one module."""

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
        """Whether both towers are one."""
        return self.query_tower is self.passage_tower

    def embed_queries(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, L) ids and padding mask to query embeddings (B, D)."""
        return self.query_tower(ids_BL, mask_BL)

    def embed_passages(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, L) ids and padding mask to passage embeddings (B, D)."""
        return self.passage_tower(ids_BL, mask_BL)

    def score(self, query_emb_BD: Tensor, candidate_emb_BND: Tensor) -> Tensor:
        """Relevance f(x, z) of N candidates a query, (B, N): inner product over temperature
        (section 3.1)."""
        with torch.autocast(query_emb_BD.device.type, enabled=False):
            return torch.einsum("bd,bnd->bn", query_emb_BD.float(), candidate_emb_BND.float()) / self.temperature


def embed_by_length(
    embed: Callable[[Tensor, Tensor], Tensor], ids_BL: Tensor, mask_BL: Tensor, num_buckets: int = 4
) -> Tensor:
    """`embed(ids_BL, mask_BL)`, (B, D), in buckets of similar length, so that short texts are not
    computed as long as the longest.

    The number of buckets is the same for every B, so that ranks issue the same collectives.
    """
    lengths_B = mask_BL.sum(1)
    order_B = lengths_B.argsort(descending=True, stable=True)
    parts = []
    for rows in order_B.tensor_split(num_buckets):
        used = rows if len(rows) else order_B[-1:]
        longest = int(lengths_B[used].max())
        parts.append(embed(ids_BL[used, :longest], mask_BL[used, :longest])[: len(rows)])
    return torch.cat(parts)[order_B.argsort()]


def embed_no_grad(tower: nn.Module, ids_BL: Tensor, mask_BL: Tensor, precision: Precision = "fp32") -> np.ndarray:
    """Embeddings without gradient or dropout, on the tower's own device, (B, D) float32;
    `precision` bf16 computes under autocast."""
    device = next(tower.parameters()).device
    training = tower.training
    tower.eval()
    with torch.inference_mode(), autocast(device, precision):
        embeddings = tower(ids_BL.to(device), mask_BL.to(device)).float().cpu().numpy()
    tower.train(training)
    return embeddings


def build_retriever(config: RetrieverConfig, tokenizer: PreTrainedTokenizerBase) -> Retriever:
    """A retriever as the config says, from a checkpoint or from random weights."""

    def tower() -> Tower:
        bert = load_bert(config.bert, len(tokenizer), tokenizer.pad_token_id, "retriever.bert")
        return Tower(
            bert, config.pooling, config.projection_dim if config.projection == "linear" else None, config.normalize
        )

    query_tower = tower()
    longest = max(config.max_query_tokens, config.max_passage_tokens)
    if longest > query_tower.bert.config.max_position_embeddings:
        raise UserError(
            f"retriever.max_query_tokens / max_passage_tokens ({longest}) exceed the encoder's {query_tower.bert.config.max_position_embeddings} "
            "positions; lower them."
        )
    if config.shared_tower:
        return Retriever(query_tower, query_tower, config.temperature)
    passage_tower = tower()
    passage_tower.load_state_dict(query_tower.state_dict())
    return Retriever(query_tower, passage_tower, config.temperature)
