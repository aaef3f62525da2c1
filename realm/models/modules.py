"""The modules that DeepSpeed wraps, one per training stage. Each `forward(batch)` returns scalars,
among them `loss`.

Shape legend: B queries, N candidates per query (slot 0 is the null passage), C passages of a batch,
K retrieved passages, U distinct passages, M masked wordpieces, V vocabulary, R joint inputs of a
bucket, Q joint inputs of a batch of questions, L wordpieces, W span widths, S = L·W spans, D
embedding width, H hidden width.
"""

import torch
from torch import Tensor, nn

from realm.models.batches import MaskedBatch, PairBatch, QuestionBatch, RealmBatch
from realm.models.objectives import (
    MARGINALS,
    MASKED_SCORE,
    Marginal,
    candidate_log_prior,
    in_batch_loss,
    joint_marginal_log_likelihood,
    mean_over,
    merge_slot_scores,
    open_qa_loss,
    span_marginal_log_likelihood,
)
from realm.models.predictions import (
    MaskedPrediction,
    SpanPrediction,
    masked_telemetry,
    predict_masked,
    predict_spans,
    read_joint,
    retrieval_telemetry,
    span_telemetry,
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


class ReaderPretrainingModel(nn.Module):
    """Prediction of a span from one passage: the masked-language head predicts its wordpieces, the
    span head its places in the passage, or that it is absent."""

    def __init__(self, reader: Reader, span_loss: float) -> None:
        super().__init__()
        self.reader = reader
        self.span_loss = span_loss

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        hidden = read_joint(self.reader, batch)
        masked, spans = predict_masked(self.reader, batch, hidden), predict_spans(self.reader, batch, hidden)
        # The marginals over one passage z, with p(z|x) = 1.
        log_p_z_B1 = torch.zeros_like(spans.log_p_y_BN)
        masked_loss = masked_lm_loss(joint_marginal_log_likelihood, log_p_z_B1, masked, batch)
        span_loss = span_head_loss(log_p_z_B1, spans)
        return {
            "loss": masked_loss + self.span_loss * span_loss,
            "masked_loss": masked_loss,
            "span_loss": span_loss,
            "accuracy": mean_over(masked.correct_BN[:, 0].float(), batch.has_masks_B),
            "span_accuracy": mean_over(spans.correct_BN.float(), spans.has_answer_BN),
        }


class RealmModel(nn.Module):
    """REALM's p(y|x) = Σ_z p(y|z,x) p(z|x) (Guu et al. 2020, equation 1); the retriever is trained
    through p(z|x).

    p(y|z,x) is that of the masked-language head, Π_m p(y_m|z,x), or of the span head, the sum over
    the occurrences of y in z; with both, the loss is the sum of the two negative log-likelihoods.
    """

    def __init__(self, retriever: Retriever, reader: Reader, marginal: str, head: str) -> None:
        """`marginal`: of the masked-language head, a name in MARGINALS; `head`: mlm, span, or
        both."""
        super().__init__()
        self.retriever = retriever
        self.reader = reader
        self.marginal, self.head = MARGINALS[marginal], head

    def forward(self, batch: RealmBatch) -> dict[str, Tensor]:
        """Losses and telemetry; see `docs/architecture.md` for the meaning of each metric."""
        # Retrieve: candidates were found with a stale index; embed and score them again, with
        # gradients.
        query_emb_BD = self.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
        passage_emb_UD = embed_by_length(self.retriever.embed_passages, batch.passage_ids_UL, batch.passage_mask_UL)
        retrieval_score_BN = self.retriever.score(query_emb_BD, passage_emb_UD[batch.candidate_BN], batch.lexical_BN)
        log_p_z_BN = candidate_log_prior(retrieval_score_BN, batch.valid_BN)
        telemetry = retrieval_telemetry(log_p_z_BN, batch.valid_BN, batch.contains_span_BN)

        # Read: one joint input per candidate; blocks of one document that are read together share
        # p(y|z,x), so that their p(z|x) are summed.
        hidden = read_joint(self.reader, batch.masked)

        # Marginalize.
        losses = {}
        if self.head in ("mlm", "both"):
            masked = predict_masked(self.reader, batch.masked, hidden)
            losses["masked_loss"] = masked_lm_loss(self.marginal, log_p_z_BN, masked, batch.masked)
            telemetry |= masked_telemetry(log_p_z_BN, masked, batch.masked.token_mask_BM, batch.valid_BN)
        if self.head in ("span", "both"):
            spans = predict_spans(self.reader, batch.masked, hidden)
            spans = spans._replace(has_answer_BN=spans.has_answer_BN & batch.valid_BN)
            losses["span_loss"] = span_head_loss(log_p_z_BN, spans)
            telemetry |= span_telemetry(log_p_z_BN, spans, batch.masked)
        return {"loss": torch.stack([*losses.values()]).sum(), **losses, **telemetry}


def masked_lm_loss(marginal: Marginal, log_p_z_BN: Tensor, masked: MaskedPrediction, batch: MaskedBatch) -> Tensor:
    """Mean −log p(y|x) of the masked-language head over the examples with masks; 0 without any."""
    return -mean_over(marginal(log_p_z_BN, masked.token_log_p_BNM, batch.token_mask_BM), batch.has_masks_B)


def span_head_loss(log_p_z_BN: Tensor, spans: SpanPrediction) -> Tensor:
    """Mean −log Σ_z p(z|x) p(y|z,x) of the span head, or of "absent" where no passage contains y
    (see `span_marginal_log_likelihood`)."""
    return -span_marginal_log_likelihood(
        log_p_z_BN, spans.log_p_y_BN, spans.log_p_absent_BN, spans.has_answer_BN
    ).mean()


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
        hidden_QLH = self.reader(batch.ids_QL, batch.mask_QL, batch.type_QL)
        span_score_QLW = self.reader.span_scores(hidden_QLH, batch.allowed_QLW)
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
