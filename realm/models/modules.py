"""The modules that DeepSpeed wraps, one per training stage. Each `forward(batch)` returns scalars,
among them `loss`.

Shape legend: B queries, N candidates per query (slot 0 is the null passage), C passages of a batch,
K retrieved passages, U distinct passages, M masked wordpieces, V vocabulary, R joint inputs of a
bucket, Q joint inputs of a batch of questions, L wordpieces, W span widths, S = L·W spans, D
embedding width, H hidden width.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from realm.models.batches import MaskedBatch, PairBatch, QuestionBatch, ReaderPretrainingBatch, RealmBatch
from realm.models.objectives import (
    MARGINALS,
    MASKED_SCORE,
    candidate_log_prior,
    in_batch_loss,
    merge_slot_scores,
    open_qa_loss,
    positive_log_marginal,
)
from realm.models.reader import Reader
from realm.models.retriever import Retriever, embed_by_length


class DualEncoderModel(nn.Module):
    """Retrieval of each query's passage from those of the batch: the inverse cloze task, and
    finetuning of the retriever on questions."""

    def __init__(self, retriever: Retriever, chunk_size: int | None = None) -> None:
        """`chunk_size`: most texts whose activations are kept at once (see `embed_by_length`);
        None: all."""
        super().__init__()
        self.retriever, self.chunk_size = retriever, chunk_size

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        retriever, chunk = self.retriever, self.chunk_size
        query_emb_BD = embed_by_length(
            retriever.embed_queries, batch.query_ids_BL, batch.query_mask_BL, num_buckets=1, chunk_size=chunk
        )
        passage_emb_CD = embed_by_length(
            retriever.embed_passages, batch.passage_ids_CL, batch.passage_mask_CL, chunk_size=chunk
        )
        loss, accuracy = in_batch_loss(
            query_emb_BD, passage_emb_CD, batch.target_B, batch.excluded_BC, self.retriever.temperature
        )
        return {"loss": loss, "accuracy": accuracy}


class MaskedPrediction(NamedTuple):
    """The reader's predictions of masked spans."""

    token_log_p_BNM: Tensor
    """log p(y_m | z, x) of the target wordpieces."""
    correct_BN: Tensor
    """True if the most probable wordpieces are the whole target span."""
    best_log_p_BN: Tensor
    """Log-probability of the most probable wordpieces."""


def read_joint(reader: Reader, batch: MaskedBatch) -> list[Tensor]:
    """Hidden states of each bucket, (R, L, H)."""
    return [reader(joint.ids_RL, joint.mask_RL, joint.type_RL) for joint in batch.joint]


def predict_masked(reader: Reader, batch: MaskedBatch, hidden: Iterable[Tensor]) -> MaskedPrediction:
    """Predict the masked wordpieces from the hidden states of each bucket."""
    B, N = batch.read_slot_BN.shape
    log_ps, right, best_log_ps, rows = [], [], [], []
    for joint, hidden_RLH in zip(batch.joint, hidden, strict=True):
        query_R = joint.row_R // N
        log_p_RMV = reader.mlm_logits(hidden_RLH, batch.position_BM[query_R]).log_softmax(-1)
        target_RM, token_mask_RM = batch.target_BM[query_R], batch.token_mask_BM[query_R]
        best_log_p_RM, best_RM = log_p_RMV.detach().max(-1)
        log_ps.append(log_p_RMV.gather(-1, target_RM[..., None]).squeeze(-1))
        right.append(((best_RM == target_RM) | ~token_mask_RM).all(-1))
        best_log_ps.append((best_log_p_RM * token_mask_RM).sum(-1))
        rows.append(joint.row_R)
    # The index of each slot's joint input in the concatenated buckets.
    row_R, first_slot_B1 = torch.cat(rows), torch.arange(0, B * N, N, device=batch.read_slot_BN.device)[:, None]
    joint_of_slot = torch.zeros(B * N, dtype=torch.long, device=row_R.device).index_copy(
        0, row_R, torch.arange(len(row_R), device=row_R.device)
    )
    joint_BN = joint_of_slot[first_slot_B1 + batch.read_slot_BN]
    return MaskedPrediction(torch.cat(log_ps)[joint_BN], torch.cat(right)[joint_BN], torch.cat(best_log_ps)[joint_BN])


def read_masked(reader: Reader, batch: MaskedBatch) -> MaskedPrediction:
    """Read every joint input of the batch and predict the masked wordpieces."""
    return predict_masked(reader, batch, read_joint(reader, batch))


class ReaderPretrainingModel(nn.Module):
    """Prediction of the masked span from one passage that contains it: the masked-language head
    predicts its wordpieces, the span head its position."""

    def __init__(self, reader: Reader, span_loss: float) -> None:
        super().__init__()
        self.reader = reader
        self.span_loss = span_loss

    def forward(self, batch: ReaderPretrainingBatch) -> dict[str, Tensor]:
        hidden = read_joint(self.reader, batch.masked)
        prediction = predict_masked(self.reader, batch.masked, hidden)
        masked_loss = -(prediction.token_log_p_BNM[:, 0] * batch.masked.token_mask_BM).sum(-1).mean()
        log_p, has_answer, right = [], [], []
        for spans, hidden_RLH in zip(batch.spans, hidden, strict=True):
            allowed_RS = spans.allowed_RLW.flatten(1)
            is_answer_RS = (spans.is_answer_RLW & spans.allowed_RLW).flatten(1)
            span_score_RS = self.reader.span_scores(hidden_RLH).flatten(1).masked_fill(~allowed_RS, MASKED_SCORE)
            log_p_R, has_answer_R = positive_log_marginal(span_score_RS.log_softmax(-1), is_answer_RS)
            log_p.append(log_p_R)
            has_answer.append(has_answer_R)
            right.append(is_answer_RS.gather(1, span_score_RS.argmax(-1, keepdim=True))[:, 0])
        num_rows = torch.cat(has_answer).sum().clamp(min=1)
        span_loss = -torch.cat(log_p).sum() / num_rows
        return {
            "loss": masked_loss + self.span_loss * span_loss,
            "masked_loss": masked_loss,
            "span_loss": span_loss,
            "accuracy": prediction.correct_BN.float().mean(),
            "span_accuracy": torch.cat(right).sum() / num_rows,
        }


class RealmModel(nn.Module):
    """REALM's p(y|x) = Σ_z p(y|z,x) p(z|x) (Guu et al. 2020, section 3.1); the retriever is trained
    through p(z|x)."""

    def __init__(self, retriever: Retriever, reader: Reader, marginal: str) -> None:
        super().__init__()
        self.retriever = retriever
        self.reader = reader
        self.marginal = MARGINALS[marginal]

    def forward(self, batch: RealmBatch) -> dict[str, Tensor]:
        """Loss and telemetry; see `docs/architecture.md` for the meaning of each metric."""
        # Retrieve: candidates were found with a stale index; embed and score them again, with
        # gradients.
        query_emb_BD = self.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
        passage_emb_UD = embed_by_length(self.retriever.embed_passages, batch.passage_ids_UL, batch.passage_mask_UL)
        retrieval_score_BN = self.retriever.score(query_emb_BD, passage_emb_UD[batch.candidate_BN], batch.lexical_BN)
        log_p_z_BN = candidate_log_prior(retrieval_score_BN, batch.valid_BN)

        # Read: one joint input per candidate; blocks of one document that are read together share
        # p(y|z,x), so that their p(z|x) are summed.
        prediction = read_masked(self.reader, batch.masked)

        # Marginalize.
        token_mask_BM = batch.masked.token_mask_BM
        loss = -self.marginal(log_p_z_BN, prediction.token_log_p_BNM, token_mask_BM).mean()
        with torch.no_grad():
            log_p_y_BN = (prediction.token_log_p_BNM * token_mask_BM[:, None]).sum(-1)
            telemetry = retrieval_telemetry(
                log_p_z_BN, log_p_y_BN, prediction.correct_BN, batch.valid_BN, batch.contains_span_BN
            )
        return {"loss": loss, **telemetry}


def retrieval_telemetry(
    log_p_z_BN: Tensor, log_p_y_BN: Tensor, correct_BN: Tensor, valid_BN: Tensor, contains_span_BN: Tensor
) -> dict[str, Tensor]:
    """Retrieval and reader metrics of a batch, each averaged over B.

    `utility`: log p(y|z,x) − log p(y|null,x) of retrieved passages (Guu et al. 2020, section 4.2),
    averaged over valid ones; `null_mass`: p(null|x); `entropy`: of p(z|x) in nats;
    `candidate_hit_rate`: fraction of retrieved passages that contain the span, in themselves or in
    their context; `accuracy`: the reader predicts the span correctly from the most probable
    candidate; `accuracy_null`: from the null passage.
    """
    passage_BN = valid_BN.clone()
    passage_BN[:, 0] = False
    count = passage_BN.sum().clamp(min=1)
    p_BN = log_p_z_BN.exp()
    best_B1 = log_p_z_BN.argmax(-1, keepdim=True)
    return {
        "utility": ((log_p_y_BN - log_p_y_BN[:, :1]) * passage_BN).sum() / count,
        "null_mass": p_BN[:, 0].mean(),
        "entropy": -(p_BN * log_p_z_BN.clamp(min=-100.0)).sum(-1).mean(),
        "candidate_hit_rate": (contains_span_BN & passage_BN).sum() / count,
        "accuracy": correct_BN.gather(1, best_B1).float().mean(),
        "accuracy_null": correct_BN[:, 0].float().mean(),
    }


class OpenQaModel(nn.Module):
    """Question answering by span extraction from retrieved passages (Lee et al. 2019); trains the
    query tower and the reader."""

    def __init__(self, retriever: Retriever, reader: Reader) -> None:
        super().__init__()
        self.retriever = retriever
        self.reader = reader

    def forward(self, batch: QuestionBatch) -> dict[str, Tensor]:
        query_emb_BD = self.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
        retrieval_score_BK = self.retriever.score(query_emb_BD, batch.passage_emb_BKD, batch.lexical_BK)
        span_score_QLW = self.reader.span_scores(self.reader(batch.ids_QL, batch.mask_QL, batch.type_QL))
        span_score_BNS, _ = self.score_spans(batch, span_score_QLW, query_emb_BD)
        is_answer_BNS = batch.by_passage(batch.is_answer_QLW, False)
        allowed_BNS = batch.by_passage(batch.allowed_QLW, False)
        losses = open_qa_loss(
            retrieval_score_BK, batch.has_answer_BK, batch.valid_BK, span_score_BNS, is_answer_BNS, allowed_BNS
        )
        with torch.no_grad():
            best_B = span_score_BNS.masked_fill(~allowed_BNS, MASKED_SCORE).flatten(1).argmax(-1, keepdim=True)
            losses["accuracy"] = is_answer_BNS.flatten(1).gather(1, best_B).float().mean()
        return losses

    def score_spans(self, batch: QuestionBatch, span_score_QLW: Tensor, query_emb_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Span scores plus the relevance score of their read slot, (B, N, L·W), and the relevance
        scores, (B, N)."""
        score_BN = self.retriever.score(query_emb_BD, batch.read_emb_BND, batch.read_lexical_BN)
        read_score_BN = merge_slot_scores(score_BN, batch.read_slot_BN)
        return batch.by_passage(span_score_QLW, MASKED_SCORE) + read_score_BN[..., None], read_score_BN
