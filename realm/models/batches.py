"""The batches of the training stages: dataclasses of tensors that move to a device together.

Shape legend: B queries, N candidates a query (slot 0 is the null passage), C passages of a batch, U
distinct passages, K retrieved passages, M masked wordpieces, R joint inputs of a bucket, L
wordpieces, W span widths, D embedding width.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


class Batch:
    """Base of batches: dataclasses of tensors (or lists of batches) that move to a device together."""

    def to(self, device: torch.device) -> Self:
        """The same batch with every tensor on `device`."""
        moved = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            moved[entry.name] = [part.to(device) for part in value] if isinstance(value, list) else value.to(device)
        return type(self)(**moved)


@dataclass
class PairBatch(Batch):
    """B queries and C passages, of which each query has one to find."""

    query_ids_BL: Tensor
    query_mask_BL: Tensor
    passage_ids_CL: Tensor
    passage_mask_CL: Tensor
    target_B: Tensor
    """Row of the passage each query should find."""
    excluded_BC: Tensor
    """True on passages that are none of a query's candidates: neither right nor wrong."""


@dataclass
class JointBatch(Batch):
    """Joint inputs `[CLS] x [SEP] z [SEP]`; `row_R` is the place of each in the flat (B·N) order."""

    ids_RL: Tensor
    mask_RL: Tensor
    type_RL: Tensor
    row_R: Tensor


@dataclass
class MaskedBatch(Batch):
    """Joint inputs with the masked wordpieces of their x; candidates that are read together have
    one."""

    joint: list[JointBatch]
    position_BM: Tensor
    """Where the masks of query b stand in each of its joint inputs (x comes first, so the place
    is the same for all candidates)."""
    target_BM: Tensor
    """The wordpieces under the masks."""
    token_mask_BM: Tensor
    """False on padding of the two above."""
    read_slot_BN: Tensor
    """Candidate whose joint input stands for each candidate: its own number, or that of the one
    it is read with."""


@dataclass
class RealmBatch(Batch):
    """Masked sentences with their candidates."""

    query_ids_BL: Tensor
    query_mask_BL: Tensor
    passage_ids_UL: Tensor
    passage_mask_UL: Tensor
    candidate_BN: Tensor
    """Row in the distinct passages of each candidate; row 0 is the null passage."""
    valid_BN: Tensor
    """False on slots that hold nothing."""
    contains_span_BN: Tensor
    """True where the masked span stands in the candidate with what is around it (telemetry alone)."""
    masked: MaskedBatch


@dataclass
class SpanTargets(Batch):
    """Where the span head should find the span in the joint inputs of a bucket."""

    is_answer_RLW: Tensor
    """True on occurrences of the span."""
    allowed_RLW: Tensor
    """True on spans inside the passage."""


@dataclass
class ReaderPretrainingBatch(Batch):
    """Masked sentences with one passage each, and the span's places in it, bucket by bucket."""

    masked: MaskedBatch
    spans: list[SpanTargets]


@dataclass
class QuestionBatch(Batch):
    """Questions with K retrieved passages, of which the first choice N are read.

    Shape legend: Q joint inputs, one for each passage read on its own, W span widths.
    """

    query_ids_BL: Tensor
    query_mask_BL: Tensor
    passage_emb_BKD: Tensor
    """Embeddings of the retrieved passages as the index holds them."""
    has_answer_BK: Tensor
    valid_BK: Tensor
    read_emb_BND: Tensor
    """Embeddings of the passages read."""
    read_slot_BN: Tensor
    """Place (0 … N − 1) at which each of them is read: its own, or that of the one it is read
    with; -1 where there is none."""
    row_Q: Tensor
    """Place of each joint input in the flat (B·N) order."""
    ids_QL: Tensor
    mask_QL: Tensor
    type_QL: Tensor
    is_answer_QLW: Tensor
    """True on spans that are an accepted answer."""
    allowed_QLW: Tensor
    """True on spans inside the passage."""

    def by_passage(self, value_QLW: Tensor, fill: float | bool) -> Tensor:
        """Values of spans by place, (B, N, L·W); `fill` where nothing is read."""
        B, N = self.read_slot_BN.shape
        flat = value_QLW.flatten(1)
        return flat.new_full((B * N, flat.shape[1]), fill).index_copy(0, self.row_Q, flat).view(B, N, -1)
