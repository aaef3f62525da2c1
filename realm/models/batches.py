"""The batches of the training stages: dataclasses of tensors that move to a device together.

Shape legend: B queries, N candidates per query (slot 0 is the null passage), C passages of a batch,
U distinct passages, K retrieved passages, M masked wordpieces, R joint inputs of a bucket, Q joint
inputs of a batch of questions, L wordpieces, W span widths, D embedding width.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


class Batch:
    """Base of the batch dataclasses; every field is a tensor, a batch, or a list of batches."""

    def to(self, device: torch.device) -> Self:
        """Copy of the batch with every tensor on `device`."""
        moved = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            moved[field.name] = [part.to(device) for part in value] if isinstance(value, list) else value.to(device)
        return type(self)(**moved)


@dataclass
class PairBatch(Batch):
    """B queries and C passages, one of which is the target of each query."""

    query_ids_BL: Tensor
    query_mask_BL: Tensor
    passage_ids_CL: Tensor
    passage_mask_CL: Tensor
    target_B: Tensor
    """Index of the target passage of each query."""
    excluded_BC: Tensor
    """True on passages to ignore for a query: neither its target nor negatives."""


@dataclass
class JointBatch(Batch):
    """Joint inputs `[CLS] x [SEP] z [SEP]`; `row_R` is the index of each one's slot in the
    flattened (B·N) slots."""

    ids_RL: Tensor
    mask_RL: Tensor
    type_RL: Tensor
    row_R: Tensor


@dataclass
class MaskedBatch(Batch):
    """Joint inputs with the masked wordpieces of their x; candidates that are read together share
    one joint input."""

    joint: list[JointBatch]
    position_BM: Tensor
    """Positions of the masks of each query in its joint inputs; x comes first, so they are the same
    for all candidates."""
    target_BM: Tensor
    """The masked wordpieces."""
    token_mask_BM: Tensor
    """False on padding of `position_BM` and `target_BM`."""
    read_slot_BN: Tensor
    """Slot whose joint input contains each candidate: its own, or that of the candidate it is read
    with."""


@dataclass
class RealmBatch(Batch):
    """Masked sentences with their candidates."""

    query_ids_BL: Tensor
    query_mask_BL: Tensor
    passage_ids_UL: Tensor
    passage_mask_UL: Tensor
    candidate_BN: Tensor
    """Index of each candidate in the distinct passages; index 0 is the null passage."""
    valid_BN: Tensor
    """False on empty slots."""
    contains_span_BN: Tensor
    """True if the masked span appears in the candidate or its context (telemetry only)."""
    masked: MaskedBatch
    lexical_BN: Tensor
    """Score of each candidate that fused retrieval adds to the inner product; 0 for the null
    passage and empty slots."""


@dataclass
class SpanTargets(Batch):
    """Targets of the span head for the joint inputs of a bucket."""

    is_answer_RLW: Tensor
    """True on occurrences of the span."""
    allowed_RLW: Tensor
    """True on spans inside the passage."""


@dataclass
class ReaderPretrainingBatch(Batch):
    """Masked sentences with one passage each, and the occurrences of the span in it, per bucket."""

    masked: MaskedBatch
    spans: list[SpanTargets]


@dataclass
class QuestionBatch(Batch):
    """Questions with K retrieved passages, of which the top N are read.

    There are Q joint inputs, one per read slot that is not empty.
    """

    query_ids_BL: Tensor
    query_mask_BL: Tensor
    passage_emb_BKD: Tensor
    """Embeddings of the retrieved passages in the index."""
    has_answer_BK: Tensor
    valid_BK: Tensor
    read_emb_BND: Tensor
    """Embeddings of the passages read."""
    read_slot_BN: Tensor
    """Slot (0 … N − 1) in which each of them is read: its own, or that of the passage it is read
    with; -1 for empty slots."""
    row_Q: Tensor
    """Index of the slot of each joint input in the flattened (B·N) slots."""
    ids_QL: Tensor
    mask_QL: Tensor
    type_QL: Tensor
    is_answer_QLW: Tensor
    """True on spans that match an accepted answer."""
    allowed_QLW: Tensor
    """True on spans inside the passage."""
    lexical_BK: Tensor
    """Score of each retrieved passage that fused retrieval adds to the inner product."""
    read_lexical_BN: Tensor
    """The same of the passages read."""

    def by_passage(self, value_QLW: Tensor, fill: float | bool) -> Tensor:
        """Values of spans per read slot, (B, N, L·W); `fill` in slots that are not read."""
        B, N = self.read_slot_BN.shape
        flat = value_QLW.flatten(1)
        return flat.new_full((B * N, flat.shape[1]), fill).index_copy(0, self.row_Q, flat).view(B, N, -1)
