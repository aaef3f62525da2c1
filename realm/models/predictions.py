"""What the reader predicts of masked spans, with each of its heads, and the telemetry of it.

Shape legend: B queries, N candidates per query (slot 0 is the null passage), M masked wordpieces, V
vocabulary, R joint inputs of a bucket, L wordpieces, W span widths, S = L·W spans, H hidden width.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from realm.models.batches import MaskedBatch
from realm.models.objectives import mean_over, merge_slot_scores, positive_log_marginal, span_log_probs
from realm.models.reader import Reader


class MaskedPrediction(NamedTuple):
    """The masked-language head's predictions of masked spans."""

    token_log_p_BNM: Tensor
    """log p(y_m | z, x) of the target wordpieces."""
    correct_BN: Tensor
    """True if the most probable wordpieces are the whole target span; false without masks."""
    best_log_p_BN: Tensor
    """Log-probability of the most probable wordpieces."""


class SpanPrediction(NamedTuple):
    """The span head's predictions: places of the span in the passages."""

    has_answer_BN: Tensor
    """True if the passage contains the span y, and y is no longer than the head's W."""
    log_p_y_BN: Tensor
    """log p(y | z, x), the sum over the occurrences of y; 0 without any."""
    log_p_absent_BN: Tensor
    """log p(absent | z, x)."""
    correct_BN: Tensor
    """True if the most probable span is an occurrence of y."""
    best_log_p_BN: Tensor
    """Log-probability of the most probable span; MASKED_SCORE or less without allowed spans."""


def read_joint(reader: Reader, batch: MaskedBatch) -> list[Tensor]:
    """Hidden states of each bucket, (R, L, H)."""
    return [reader(joint.ids_RL, joint.mask_RL, joint.type_RL) for joint in batch.joint]


def predict_masked(reader: Reader, batch: MaskedBatch, hidden: Iterable[Tensor]) -> MaskedPrediction:
    """Predict the masked wordpieces from the hidden states of each bucket."""
    num_candidates = batch.read_slot_BN.shape[1]
    log_p, correct, best = [], [], []
    for joint, hidden_RLH in zip(batch.joint, hidden, strict=True):
        query_R = joint.row_R // num_candidates
        log_p_RMV = reader.mlm_logits(hidden_RLH, batch.position_BM[query_R]).log_softmax(-1)
        target_RM, token_mask_RM = batch.target_BM[query_R], batch.token_mask_BM[query_R]
        best_log_p_RM, best_RM = log_p_RMV.detach().max(-1)
        log_p.append(log_p_RMV.gather(-1, target_RM[..., None]).squeeze(-1))
        correct.append(((best_RM == target_RM) | ~token_mask_RM).all(-1) & token_mask_RM.any(-1))
        best.append((best_log_p_RM * token_mask_RM).sum(-1))
    return MaskedPrediction(*map(batch.by_candidate, (log_p, correct, best)))


def predict_spans(reader: Reader, batch: MaskedBatch, hidden: Iterable[Tensor]) -> SpanPrediction:
    """Locate the span in the passages from the hidden states of each bucket."""
    has_answer, log_p_y, log_p_absent, correct, best = [], [], [], [], []
    for spans, hidden_RLH in zip(batch.spans, hidden, strict=True):
        score_RLW = reader.span_scores(hidden_RLH, spans.allowed_RLW)
        log_p_RS, log_p_absent_R = span_log_probs(score_RLW.flatten(1), reader.absent_scores(hidden_RLH))
        is_answer_RS = (spans.is_answer_RLW & spans.allowed_RLW).flatten(1)
        log_p_y_R, has_answer_R = positive_log_marginal(log_p_RS, is_answer_RS)
        best_log_p_R, best_R = log_p_RS.detach().max(-1)
        has_answer.append(has_answer_R)
        log_p_y.append(log_p_y_R)
        log_p_absent.append(log_p_absent_R)
        correct.append(is_answer_RS.gather(1, best_R[:, None])[:, 0])
        best.append(best_log_p_R)
    return SpanPrediction(*map(batch.by_candidate, (has_answer, log_p_y, log_p_absent, correct, best)))


def best_span_is_right(log_p_z_BN: Tensor, spans: SpanPrediction, read_slot_BN: Tensor) -> Tensor:
    """Whether the span with the largest p(z|x) p(s|z,x) of all candidates is an occurrence of y,
    (B,). p(z|x) of candidates that are read together is their sum."""
    read_log_p_BN = merge_slot_scores(log_p_z_BN, read_slot_BN)
    best_B1 = (read_log_p_BN + spans.best_log_p_BN).argmax(-1, keepdim=True)
    return spans.correct_BN.gather(1, best_B1)[:, 0]


@torch.no_grad()
def retrieval_telemetry(log_p_z_BN: Tensor, valid_BN: Tensor, contains_span_BN: Tensor) -> dict[str, Tensor]:
    """Retrieval metrics of a batch.

    `null_mass`: p(null|x) and `entropy` of p(z|x) in nats, averaged over B; `candidate_hit_rate`:
    fraction of retrieved passages that contain the span, in themselves or in their context.
    """
    passage_BN, p_BN = _passages(valid_BN), log_p_z_BN.exp()
    return {
        "null_mass": p_BN[:, 0].mean(),
        "entropy": -(p_BN * log_p_z_BN.clamp(min=-100.0)).sum(-1).mean(),
        "candidate_hit_rate": mean_over(contains_span_BN.float(), passage_BN),
    }


@torch.no_grad()
def masked_telemetry(
    log_p_z_BN: Tensor, prediction: MaskedPrediction, token_mask_BM: Tensor, valid_BN: Tensor
) -> dict[str, Tensor]:
    """Metrics of the masked-language head, averaged over the examples with masks.

    `utility`: log p(y|z,x) − log p(y|null,x) of retrieved passages (Guu et al. 2020, section 4.2),
    averaged over valid ones; `accuracy`: the head predicts the span correctly from the most
    probable candidate; `accuracy_null`: from the null passage.
    """
    has_masks_B = token_mask_BM.any(-1)
    log_p_y_BN = (prediction.token_log_p_BNM * token_mask_BM[:, None]).sum(-1)
    best_B1 = log_p_z_BN.argmax(-1, keepdim=True)
    return {
        "utility": mean_over(log_p_y_BN - log_p_y_BN[:, :1], _passages(valid_BN) & has_masks_B[:, None]),
        "accuracy": mean_over(prediction.correct_BN.gather(1, best_B1)[:, 0].float(), has_masks_B),
        "accuracy_null": mean_over(prediction.correct_BN[:, 0].float(), has_masks_B),
    }


@torch.no_grad()
def span_telemetry(log_p_z_BN: Tensor, spans: SpanPrediction, batch: MaskedBatch) -> dict[str, Tensor]:
    """Metrics of the span head.

    `span_rows`: fraction of examples with a candidate that contains y. Averaged over these:
    `span_accuracy`: the span with the largest p(z|x) p(s|z,x) is y; `hit_mass`: p(z|x) of the
    candidates that contain y. Averaged over the others: `absent_mass`: Σ_z p(z|x) p(absent|z,x).
    """
    found_B = spans.has_answer_BN.any(-1)
    p_BN = log_p_z_BN.exp()
    right_B = best_span_is_right(log_p_z_BN, spans, batch.read_slot_BN)
    return {
        "span_rows": found_B.float().mean(),
        "span_accuracy": mean_over(right_B.float(), found_B),
        "hit_mass": mean_over((p_BN * spans.has_answer_BN).sum(-1), found_B),
        "absent_mass": mean_over((p_BN * spans.log_p_absent_BN.exp()).sum(-1), ~found_B),
    }


def _passages(valid_BN: Tensor) -> Tensor:
    """The slots with a retrieved passage: valid, and not the null passage."""
    passage_BN = valid_BN.clone()
    passage_BN[:, 0] = False
    return passage_BN
