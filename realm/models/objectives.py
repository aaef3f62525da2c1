"""Training objectives as functions of scores and log-probabilities, independent of models and data.

Shape legend: B queries, N candidates per query, K retrieved passages, C passages of a batch, M
masked wordpieces, S spans of a passage, D embedding width.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED_SCORE = -1e9
"""Score of empty slots: finite, so that gradients are never NaN."""


def candidate_log_prior(score_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """log p(z|x), (B, N): softmax of relevance scores over the candidates (Guu et al. 2020, section
    3.1).

    `valid_BN` is false on empty slots, which get probability 0.
    """
    return F.log_softmax(score_BN.masked_fill(~valid_BN, MASKED_SCORE), dim=-1)


def joint_marginal_log_likelihood(log_p_z_BN: Tensor, token_log_p_BNM: Tensor, token_mask_BM: Tensor) -> Tensor:
    """log p(y|x) = log Σ_z p(z|x) Π_m p(y_m|z,x), (B,) (Guu et al. 2020, section 3.1 and equation
    1).

    `token_mask_BM` is true on the wordpieces of y, false on padding. The gradient with respect to a
    candidate's score is [p(y|z,x)/p(y|x) − 1]·p(z|x), negated in the loss (appendix A).
    """
    log_p_y_given_z_BN = (token_log_p_BNM * token_mask_BM[:, None]).sum(-1)
    return torch.logsumexp(log_p_z_BN + log_p_y_given_z_BN, dim=-1)


def per_token_marginal_log_likelihood(log_p_z_BN: Tensor, token_log_p_BNM: Tensor, token_mask_BM: Tensor) -> Tensor:
    """Σ_m log Σ_z p(z|x) p(y_m|z,x), (B,): each wordpiece marginalized separately, as in the
    released TensorFlow code."""
    log_p_y_BM = torch.logsumexp(log_p_z_BN[..., None] + token_log_p_BNM, dim=1)
    return (log_p_y_BM * token_mask_BM).sum(-1)


def span_log_probs(score_BS: Tensor, absent_score_B: Tensor) -> tuple[Tensor, Tensor]:
    """log p(s|z,x) of the spans of a passage, (B, S), and log p(absent|z,x), (B,).

    One softmax over both: exp(score_s) / (exp(absent) + Σ_s' exp(score_s')). It is the reader of
    Guu et al. 2020, section 3.2, p(y|z,x) ∝ Σ_s exp(score_s), normalized within the passage, with
    "the answer is not in this passage" as one more choice, as for unanswerable questions in Devlin
    et al. 2019, section 4.3. Spans that are not allowed score MASKED_SCORE; without allowed spans,
    as in the null passage, p(absent|z,x) is 1.
    """
    log_p = F.log_softmax(torch.cat((absent_score_B[:, None], score_BS), dim=-1), dim=-1)
    return log_p[:, 1:], log_p[:, 0]


def span_marginal_log_likelihood(
    log_p_z_BN: Tensor, log_p_y_BN: Tensor, log_p_absent_BN: Tensor, has_answer_BN: Tensor
) -> Tensor:
    """log Σ_z p(z|x) p(y|z,x), (B,), with p(y|z,x) = Σ p(s|z,x) over the spans s of z that are y
    (Guu et al. 2020, equation 1, with the p(y|z,x) of `span_log_probs`).

    `log_p_y_BN` counts where `has_answer_BN` is true; p(y|z,x) is 0 in the other passages. If no
    candidate of x contains y, the target is absent in all of them: log Σ_z p(z|x) p(absent|z,x).
    The gradient with respect to a candidate's score is [p(t|z,x)/p(t|x) − 1]·p(z|x), where t is
    that target, negated in the loss (section 3.3).
    """
    log_p_y_BN = log_p_y_BN.masked_fill(~has_answer_BN, MASKED_SCORE)
    log_p_target_BN = torch.where(has_answer_BN.any(-1, keepdim=True), log_p_y_BN, log_p_absent_BN)
    return torch.logsumexp(log_p_z_BN + log_p_target_BN, dim=-1)


def mean_over(value_B: Tensor, counted_B: Tensor) -> Tensor:
    """Mean of the values where `counted_B` is true, a scalar; 0 if it is true nowhere."""
    return value_B.masked_fill(~counted_B, 0.0).sum() / counted_B.sum().clamp(min=1)


Marginal: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log p(y|x), (B,), of p(z|x), the wordpieces' log-probabilities and their mask."""
MARGINALS: dict[str, Marginal] = {
    "joint": joint_marginal_log_likelihood,
    "per_token": per_token_marginal_log_likelihood,
}
"""Marginal likelihoods by their names in configs."""


def in_batch_loss(
    query_emb_BD: Tensor, passage_emb_CD: Tensor, target_B: Tensor, excluded_BC: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy over the C passages of a batch: loss and accuracy, both scalars.

    The loss of the inverse cloze task (Lee et al. 2019, section 4) and of finetuning on questions
    with hard negatives (Karpukhin et al. 2020, section 3.2), which differ in their batches. The
    target of query b is passage `target_B[b]`; passages where `excluded_BC` is true are ignored.
    """
    # Scores rounded to bf16 would not distinguish similar passages.
    dtype = torch.promote_types(query_emb_BD.dtype, torch.float32)
    with torch.autocast(query_emb_BD.device.type, enabled=False):
        score_BC = query_emb_BD.to(dtype) @ passage_emb_CD.to(dtype).T / temperature
    score_BC = score_BC.masked_fill(excluded_BC, MASKED_SCORE)
    return F.cross_entropy(score_BC, target_B), (score_BC.argmax(-1) == target_B).float().mean()


def merge_slot_scores(score_BN: Tensor, read_slot_BN: Tensor) -> Tensor:
    """Relevance score of each read slot, (B, N): log Σ exp of the scores of its passages, or
    MASKED_SCORE if it has none.

    `read_slot_BN` is the slot in which each passage is read: its own, or that of another passage of
    the same document; -1 for empty slots.
    """
    member_BNN = read_slot_BN[:, None, :] == torch.arange(read_slot_BN.shape[1], device=read_slot_BN.device)[:, None]
    return torch.logsumexp(score_BN[:, None, :].masked_fill(~member_BNN, MASKED_SCORE), dim=-1)


def positive_log_marginal(log_p: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ p over the positives of the last axis, and whether there are any; both without the
    last axis (Lee et al. 2019, equation 6).

    The log-likelihood of rows without a positive is 0; exclude them from the mean.
    """
    has_positive = positive.any(-1)
    log_likelihood = torch.logsumexp(log_p.masked_fill(~positive, MASKED_SCORE), dim=-1)
    return torch.where(has_positive, log_likelihood, torch.zeros_like(log_likelihood)), has_positive


def open_qa_loss(
    retrieval_score_BK: Tensor,
    has_answer_BK: Tensor,
    valid_BK: Tensor,
    span_score_BNS: Tensor,
    is_answer_BNS: Tensor,
    valid_BNS: Tensor,
) -> dict[str, Tensor]:
    """ORQA's finetuning loss (Lee et al. 2019, section 5): the sum of a retriever loss and a reader
    loss, each averaged over the rows with a positive.

    The retriever's softmax is over K retrieved passages, the reader's over all spans S of the N
    passages read, whose scores already include the passage's retrieval score. Returns `loss`,
    `retriever_loss`, `reader_loss`, and the fractions of B with a positive, `retriever_rows` and
    `reader_rows`.
    """
    log_p_BK = F.log_softmax(retrieval_score_BK.masked_fill(~valid_BK, MASKED_SCORE), dim=-1)
    retriever_log_p_B, retriever_rows_B = positive_log_marginal(log_p_BK, has_answer_BK & valid_BK)
    flat_score = span_score_BNS.masked_fill(~valid_BNS, MASKED_SCORE).flatten(1)
    flat_answer = (is_answer_BNS & valid_BNS).flatten(1)
    reader_log_p_B, reader_rows_B = positive_log_marginal(F.log_softmax(flat_score, dim=-1), flat_answer)
    retriever_loss = -mean_over(retriever_log_p_B, retriever_rows_B)
    reader_loss = -mean_over(reader_log_p_B, reader_rows_B)
    return {
        "loss": retriever_loss + reader_loss,
        "retriever_loss": retriever_loss,
        "reader_loss": reader_loss,
        "retriever_rows": retriever_rows_B.float().mean(),
        "reader_rows": reader_rows_B.float().mean(),
    }
