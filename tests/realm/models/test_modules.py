"""The training modules: prediction in buckets, and losses compared with plain loops."""

import math

import numpy as np
import pytest
import torch

from realm.models.batches import JointBatch, MaskedBatch, PairBatch, ReaderPretrainingBatch, RealmBatch, SpanTargets
from realm.models.bert import BertSource
from realm.models.modules import DualEncoderModel, ReaderPretrainingModel, RealmModel, read_masked, retrieval_telemetry
from realm.models.reader import ReaderConfig, build_reader, pad_joint, span_targets
from realm.models.retriever import RetrieverConfig, build_retriever
from realm.text.inputs import Wordpieces, pad_batch

CLS, SEP, MASK, PAD = 2, 3, 4, 0
WORDS = Wordpieces(CLS, SEP, MASK, PAD, np.zeros(1000, dtype=bool))
BERT = BertSource(layers=1, hidden=16, heads=2, intermediate=32, max_positions=40, dropout=0.0, init_std=0.3)
B, N = 3, 4
SPANS = [(1, 3), (0, 1), (2, 5)]
"""Masked wordpieces of each query, end exclusive: lengths 2, 1 and 3."""


@pytest.fixture
def retriever(tokenizer):
    torch.manual_seed(0)
    return build_retriever(
        RetrieverConfig(bert=BERT, projection_dim=6, max_query_tokens=20, max_passage_tokens=40, temperature=2.0),
        tokenizer,
    )


@pytest.fixture
def reader(tokenizer):
    torch.manual_seed(1)
    return build_reader(ReaderConfig(bert=BERT, span_hidden=4, max_tokens=40), tokenizer)[0]


class Example:
    """Three masked sentences with four candidates each: the null passage and three passages, or two
    and an empty slot for the first query."""

    def __init__(self):
        generator = np.random.default_rng(0)
        empty = np.zeros(0, np.int32)
        self.targets = [generator.integers(5, 90, end - start) for start, end in SPANS]
        self.queries = []
        for start, end in SPANS:
            query = generator.integers(5, 90, 6)
            query[start:end] = MASK
            self.queries.append(query)
        self.passages = [(empty, empty)] + [
            (generator.integers(5, 90, 2), generator.integers(5, 90, length)) for length in (3, 15, 9, 1)
        ]
        self.candidate_BN = torch.tensor([[0, 1, 2, 0], [0, 3, 4, 1], [0, 2, 2, 4]])
        self.valid_BN = torch.tensor([[True, True, True, False], [True] * 4, [True] * 4])
        self.lexical_BN = torch.tensor([[0.0, 0.9, 0.0, 0.0], [0.0, 0.3, 1.4, 0.0], [0.0, 0.0, 0.6, 0.2]])
        self.joints = [
            WORDS.joint(self.queries[b], *self.passages[row], 40) for b in range(B) for row in self.candidate_BN[b]
        ]

    def masked(self, order, num_buckets):
        joint = [
            JointBatch(
                *pad_joint([self.joints[i][0] for i in rows], [self.joints[i][1] for i in rows], PAD),
                torch.from_numpy(rows),
            )
            for rows in np.array_split(np.array(order), num_buckets)
        ]
        position_BM, token_mask_BM = pad_batch([np.arange(start, end) + 1 for start, end in SPANS], 0)
        return MaskedBatch(
            joint,
            position_BM,
            pad_batch(self.targets, 0)[0],
            token_mask_BM.bool(),
            torch.arange(len(self.joints) // B).expand(B, -1),
        )

    def realm(self):
        queries = pad_batch([WORDS.query(query, 20) for query in self.queries], PAD)
        passages = pad_batch([WORDS.passage(title, text, 40) for title, text in self.passages], PAD)
        contains_span_BN = torch.zeros(B, N, dtype=torch.bool)
        contains_span_BN[:, 1] = True
        order = np.random.default_rng(1).permutation(B * N)
        return RealmBatch(
            *queries,
            *passages,
            self.candidate_BN,
            self.valid_BN,
            contains_span_BN,
            self.masked(order, 3),
            self.lexical_BN,
        )


def predict_each(reader, example):
    """log p of the target wordpieces, whether all of them are the most probable ones, and log p of
    the most probable ones, for one joint input at a time."""
    log_ps, right, best_log_ps = [], [], []
    for i, (ids, first, _) in enumerate(example.joints):
        b, (start, end) = i // N, SPANS[i // N]
        with torch.no_grad():
            hidden_BLH = reader(*pad_joint([ids], [first], PAD))
            log_p_MV = reader.mlm_logits(hidden_BLH, torch.arange(start + 1, end + 1)[None])[0].log_softmax(-1)
        log_ps.append([log_p_MV[m, token].item() for m, token in enumerate(example.targets[b])])
        right.append(log_p_MV.argmax(-1).tolist() == example.targets[b].tolist())
        best_log_ps.append(log_p_MV.max(-1).values.sum().item())
    return log_ps, right, best_log_ps


@pytest.mark.parametrize("num_buckets", [1, 3, 5, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_predictions_do_not_depend_on_the_buckets(num_buckets, seed, reader):
    example = Example()
    prediction = read_masked(reader, example.masked(np.random.default_rng(seed).permutation(B * N), num_buckets))
    log_ps, right, best_log_ps = predict_each(reader, example)
    assert prediction.token_log_p_BNM.shape == (B, N, 3)
    for i, log_p_M in enumerate(log_ps):
        b, n = divmod(i, N)
        assert prediction.token_log_p_BNM[b, n, : len(log_p_M)].tolist() == pytest.approx(log_p_M, abs=1e-5)
        assert prediction.correct_BN[b, n].item() == right[i]
        assert prediction.best_log_p_BN[b, n].item() == pytest.approx(best_log_ps[i], abs=1e-5)


def test_a_prediction_is_right_if_all_wordpieces_except_padding_are(reader):
    example = Example()
    batch = example.masked(np.arange(B * N), 1)
    joint = batch.joint[0]
    with torch.no_grad():
        best = reader.mlm_logits(
            reader(joint.ids_RL, joint.mask_RL, joint.type_RL), batch.position_BM[joint.row_R // N]
        ).argmax(-1)
    batch.target_BM = torch.where(batch.token_mask_BM, best.view(B, N, -1)[:, 0], 7)
    assert read_masked(reader, batch).correct_BN[:, 0].all()
    batch.target_BM[2, 2] = (batch.target_BM[2, 2] + 1) % 50
    assert read_masked(reader, batch).correct_BN[:, 0].tolist() == [True, True, False]


@pytest.mark.parametrize("marginal", ["joint", "per_token"])
def test_realm_loss_and_telemetry_equal_plain_loops(marginal, retriever, reader):
    example = Example()
    batch = example.realm()
    outputs = RealmModel(retriever, reader, marginal)(batch)
    log_ps, right, _ = predict_each(reader, example)

    total, null_mass, best_right, utility = 0.0, 0.0, 0, 0.0
    for b in range(B):
        with torch.no_grad():
            query_emb = retriever.embed_queries(*pad_batch([WORDS.query(example.queries[b], 20)], PAD))[0]
            inputs = [WORDS.passage(*example.passages[row], 40) for row in example.candidate_BN[b]]
            products = [float(query_emb @ retriever.embed_passages(*pad_batch([ids], PAD))[0]) for ids in inputs]
        scores = [
            (product + extra) / 2.0 for product, extra in zip(products, example.lexical_BN[b].tolist(), strict=True)
        ]
        weights = [
            math.exp(score) if valid else 0.0 for score, valid in zip(scores, example.valid_BN[b].tolist(), strict=True)
        ]
        p_N = [weight / sum(weights) for weight in weights]
        token_p_NM = [[math.exp(log_p) for log_p in log_ps[b * N + n]] for n in range(N)]
        if marginal == "joint":
            total -= math.log(sum(p * math.prod(row) for p, row in zip(p_N, token_p_NM, strict=True)))
        else:
            total -= sum(
                math.log(sum(p * row[m] for p, row in zip(p_N, token_p_NM, strict=True)))
                for m in range(len(token_p_NM[0]))
            )
        null_mass += p_N[0] / B
        best_right += right[b * N + p_N.index(max(p_N))]
        utility += sum(sum(log_ps[b * N + n]) - sum(log_ps[b * N]) for n in range(1, N) if example.valid_BN[b, n])
    assert outputs["loss"].item() == pytest.approx(total / B, rel=1e-4)
    assert outputs["null_mass"].item() == pytest.approx(null_mass, rel=1e-4)
    assert outputs["accuracy"].item() == pytest.approx(best_right / B)
    assert outputs["utility"].item() == pytest.approx(utility / 8, rel=1e-3)
    assert outputs["candidate_hit_rate"].item() == pytest.approx(3 / 8)
    assert all(not value.requires_grad for name, value in outputs.items() if name != "loss")


def test_both_towers_and_the_reader_have_gradients(reader, tokenizer):
    config = RetrieverConfig(
        bert=BERT, projection_dim=6, max_query_tokens=20, max_passage_tokens=40, shared_tower=False
    )
    retriever = build_retriever(config, tokenizer)
    RealmModel(retriever, reader, "joint")(Example().realm())["loss"].backward()
    for tower in (retriever.query_tower, retriever.passage_tower):
        assert tower.projection.weight.grad.abs().max() > 1e-5
        assert tower.bert.embeddings.word_embeddings.weight.grad.abs().max() > 1e-5
    assert reader.mlm_bias.grad.abs().max() > 1e-5
    parameters = [*retriever.parameters(), *reader.parameters()]
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in parameters)


def test_the_content_of_an_empty_slot_does_not_matter(retriever, reader):
    model, example = RealmModel(retriever, reader, "joint"), Example()
    before = model(example.realm())
    example.candidate_BN[0, 3] = 2
    example.joints[3] = WORDS.joint(example.queries[0], *example.passages[2], 40)
    after = model(example.realm())
    assert {name: value.item() for name, value in after.items()} == pytest.approx(
        {name: value.item() for name, value in before.items()}, abs=1e-5
    )


def test_the_null_passage_has_probability_1_without_other_candidates(retriever, reader):
    example = Example()
    example.valid_BN[:, 1:] = False
    outputs = RealmModel(retriever, reader, "joint")(example.realm())
    log_ps, right, _ = predict_each(reader, example)
    assert outputs["loss"].item() == pytest.approx(-sum(sum(log_ps[b * N]) for b in range(B)) / B, rel=1e-4)
    assert outputs["null_mass"].item() == pytest.approx(1.0)
    assert outputs["entropy"].item() == pytest.approx(0.0, abs=1e-6)
    assert (outputs["utility"].item(), outputs["candidate_hit_rate"].item()) == (0.0, 0.0)
    accuracy = sum(right[b * N] for b in range(B)) / B
    assert outputs["accuracy"].item() == outputs["accuracy_null"].item() == pytest.approx(accuracy)


def test_telemetry_of_a_small_example():
    p_BN = torch.tensor([[0.2, 0.5, 0.3], [0.75, 0.25, 0.0]])
    log_p_y_BN = torch.tensor([[-4.0, -1.0, -6.0], [-2.0, -3.0, -9.0]])
    correct_BN = torch.tensor([[False, True, False], [True, False, False]])
    valid_BN = torch.tensor([[True, True, True], [True, True, False]])
    contains_span_BN = torch.tensor([[False, True, False], [True, True, True]])
    metrics = retrieval_telemetry(p_BN.log(), log_p_y_BN, correct_BN, valid_BN, contains_span_BN)
    entropy = -sum(p * math.log(p) for p in (0.2, 0.5, 0.3, 0.75, 0.25)) / 2
    expected = {
        "utility": (3.0 - 2.0 - 1.0) / 3,
        "null_mass": 0.475,
        "entropy": entropy,
        "candidate_hit_rate": 2 / 3,
        "accuracy": 1.0,
        "accuracy_null": 0.5,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, abs=1e-5)


def test_reader_pretraining_losses_are_means_over_examples_and_over_passages_with_the_span(reader):
    example = Example()
    rows = np.arange(B) * N + 1
    example.joints = [example.joints[i] for i in rows]
    width = reader.config.max_span_tokens
    # Starts and lengths of the span in each joint input; the second passage does not contain it.
    occurrences = [[(8, 2), (11, 1)], [], [(12, 3)]]
    order, num_buckets = np.array([2, 0, 1]), 2
    masked = example.masked(order, num_buckets)
    spans = [
        SpanTargets(
            *span_targets(
                [occurrences[row] for row in joint.row_R.tolist()],
                joint.ids_RL,
                joint.mask_RL,
                joint.type_RL,
                WORDS,
                width,
            )
        )
        for joint in masked.joint
    ]
    outputs = ReaderPretrainingModel(reader, 0.5)(ReaderPretrainingBatch(masked, spans))

    masked_loss, span_losses, span_right = 0.0, [], []
    for b, (ids, first, _) in enumerate(example.joints):
        with torch.no_grad():
            hidden = reader(*pad_joint([ids], [first], PAD))
            position_M = torch.arange(SPANS[b][0] + 1, SPANS[b][1] + 1)
            log_p_MV = reader.mlm_logits(hidden, position_M[None])[0].log_softmax(-1)
            score = reader.span_scores(hidden)[0]
        masked_loss -= sum(log_p_MV[m, token].item() for m, token in enumerate(example.targets[b])) / B
        scores = {}
        for start in range(first, len(ids)):
            for length in range(1, width + 1):
                if start + length <= len(ids) and not {CLS, SEP} & set(ids[start : start + length].tolist()):
                    scores[start, length] = score[start, length - 1].item()
        total = sum(math.exp(value) for value in scores.values())
        if occurrences[b]:
            span_losses.append(-math.log(sum(math.exp(scores[span]) for span in occurrences[b]) / total))
            span_right.append(max(scores, key=scores.__getitem__) in occurrences[b])
    assert outputs["masked_loss"].item() == pytest.approx(masked_loss, rel=1e-5)
    assert outputs["span_loss"].item() == pytest.approx(sum(span_losses) / 2, rel=1e-4)
    assert outputs["loss"].item() == pytest.approx(masked_loss + 0.25 * sum(span_losses), rel=1e-4)
    assert outputs["span_accuracy"].item() == pytest.approx(sum(span_right) / 2)


def test_dual_encoder_scores_are_divided_by_the_temperature(retriever):
    example = Example()
    queries = pad_batch([WORDS.query(query, 20) for query in example.queries], PAD)
    passages = pad_batch([WORDS.passage(*example.passages[row], 40) for row in (1, 2, 3)], PAD)
    outputs = DualEncoderModel(retriever)(
        PairBatch(*queries, *passages, torch.arange(3), torch.zeros(3, 3, dtype=torch.bool))
    )
    with torch.no_grad():
        log_p_BB = (retriever.embed_queries(*queries) @ retriever.embed_passages(*passages).T / 2.0).log_softmax(-1)
    assert outputs["loss"].item() == pytest.approx(-log_p_BB.diagonal().mean().item(), rel=1e-5)
    assert outputs["accuracy"].item() == pytest.approx((log_p_BB.argmax(-1) == torch.arange(3)).float().mean().item())


def test_all_tensors_of_a_batch_move_to_the_device():
    batch = Example().realm().to(torch.device("meta"))
    assert batch.query_ids_BL.device.type == "meta" and batch.masked.target_BM.device.type == "meta"
    assert [joint.ids_RL.device.type for joint in batch.masked.joint] == ["meta"] * 3
