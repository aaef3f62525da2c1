"""The trainable wholes: reading in buckets, and REALM's loss by hand."""

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
    """Three masked sentences with four candidates each: the null passage, two passages and, for
    the first query, an empty slot."""

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
            *queries, *passages, self.candidate_BN, self.valid_BN, contains_span_BN, self.masked(order, 3)
        )


def read_alone(reader, example):
    """log p of each right wordpiece, whether all are the first choice, and the first choices'
    log p: one joint input at a time."""
    log_ps, rights, bests = [], [], []
    for i, (ids, first, _) in enumerate(example.joints):
        b, (start, end) = i // N, SPANS[i // N]
        with torch.no_grad():
            hidden_BLH = reader(*pad_joint([ids], [first], PAD))
            log_p_MV = reader.mlm_logits(hidden_BLH, torch.arange(start + 1, end + 1)[None])[0].log_softmax(-1)
        log_ps.append([log_p_MV[m, token].item() for m, token in enumerate(example.targets[b])])
        rights.append(log_p_MV.argmax(-1).tolist() == example.targets[b].tolist())
        bests.append(log_p_MV.max(-1).values.sum().item())
    return log_ps, rights, bests


@pytest.mark.parametrize("num_buckets", [1, 3, 5, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_reading_in_buckets_is_reading_each_input_alone(num_buckets, seed, reader):
    example = Example()
    reading = read_masked(reader, example.masked(np.random.default_rng(seed).permutation(B * N), num_buckets))
    log_ps, rights, bests = read_alone(reader, example)
    assert reading.token_log_p_BNM.shape == (B, N, 3)
    for i, log_p_M in enumerate(log_ps):
        assert reading.token_log_p_BNM[i // N, i % N, : len(log_p_M)].tolist() == pytest.approx(log_p_M, abs=1e-5)
        assert reading.right_BN[i // N, i % N].item() == rights[i]
        assert reading.best_log_p_BN[i // N, i % N].item() == pytest.approx(bests[i], abs=1e-5)


def test_right_means_every_wordpiece_and_padding_does_not_count(reader):
    example = Example()
    batch = example.masked(np.arange(B * N), 1)
    joint = batch.joint[0]
    with torch.no_grad():
        choice = reader.mlm_logits(
            reader(joint.ids_RL, joint.mask_RL, joint.type_RL), batch.position_BM[joint.row_R // N]
        ).argmax(-1)
    batch.target_BM = torch.where(batch.token_mask_BM, choice.view(B, N, -1)[:, 0], 7)
    assert read_masked(reader, batch).right_BN[:, 0].all()
    batch.target_BM[2, 2] = (batch.target_BM[2, 2] + 1) % 50
    assert read_masked(reader, batch).right_BN[:, 0].tolist() == [True, True, False]


@pytest.mark.parametrize("marginal", ["joint", "per_token"])
def test_realm_loss_by_hand(marginal, retriever, reader):
    example = Example()
    batch = example.realm()
    outputs = RealmModel(retriever, reader, marginal)(batch)
    log_ps, rights, _ = read_alone(reader, example)

    total, null_mass, best_right, utility = 0.0, 0.0, 0, 0.0
    for b in range(B):
        with torch.no_grad():
            query_emb = retriever.embed_queries(*pad_batch([WORDS.query(example.queries[b], 20)], PAD))[0]
            inputs = [WORDS.passage(*example.passages[row], 40) for row in example.candidate_BN[b]]
            scores = [float(query_emb @ retriever.embed_passages(*pad_batch([ids], PAD))[0]) / 2.0 for ids in inputs]
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
        best_right += rights[b * N + p_N.index(max(p_N))]
        utility += sum(sum(log_ps[b * N + n]) - sum(log_ps[b * N]) for n in range(1, N) if example.valid_BN[b, n])
    assert outputs["loss"].item() == pytest.approx(total / B, rel=1e-4)
    assert outputs["null_mass"].item() == pytest.approx(null_mass, rel=1e-4)
    assert outputs["accuracy"].item() == pytest.approx(best_right / B)
    assert outputs["utility"].item() == pytest.approx(utility / 8, rel=1e-3)
    assert outputs["candidate_hit_rate"].item() == pytest.approx(3 / 8)
    assert all(not value.requires_grad for name, value in outputs.items() if name != "loss")


def test_gradient_reaches_both_towers_and_the_reader(reader, tokenizer):
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


def test_what_fills_an_empty_slot_changes_nothing(retriever, reader):
    model, example = RealmModel(retriever, reader, "joint"), Example()
    before = model(example.realm())
    example.candidate_BN[0, 3] = 2
    example.joints[3] = WORDS.joint(example.queries[0], *example.passages[2], 40)
    after = model(example.realm())
    assert {name: value.item() for name, value in after.items()} == pytest.approx(
        {name: value.item() for name, value in before.items()}, abs=1e-5
    )


def test_the_null_passage_alone_takes_all_mass(retriever, reader):
    example = Example()
    example.valid_BN[:, 1:] = False
    outputs = RealmModel(retriever, reader, "joint")(example.realm())
    log_ps, rights, _ = read_alone(reader, example)
    assert outputs["loss"].item() == pytest.approx(-sum(sum(log_ps[b * N]) for b in range(B)) / B, rel=1e-4)
    assert outputs["null_mass"].item() == pytest.approx(1.0)
    assert outputs["entropy"].item() == pytest.approx(0.0, abs=1e-6)
    assert (outputs["utility"].item(), outputs["candidate_hit_rate"].item()) == (0.0, 0.0)
    assert (
        outputs["accuracy"].item()
        == outputs["accuracy_null"].item()
        == pytest.approx(sum(rights[b * N] for b in range(B)) / B)
    )


def test_telemetry_of_a_small_table():
    p_BN = torch.tensor([[0.2, 0.5, 0.3], [0.75, 0.25, 0.0]])
    log_p_y_BN = torch.tensor([[-4.0, -1.0, -6.0], [-2.0, -3.0, -9.0]])
    right_BN = torch.tensor([[False, True, False], [True, False, False]])
    valid_BN = torch.tensor([[True, True, True], [True, True, False]])
    contains_span_BN = torch.tensor([[False, True, False], [True, True, True]])
    figures = retrieval_telemetry(p_BN.log(), log_p_y_BN, right_BN, valid_BN, contains_span_BN)
    entropy = -sum(p * math.log(p) for p in (0.2, 0.5, 0.3, 0.75, 0.25)) / 2
    expected = {
        "utility": (3.0 - 2.0 - 1.0) / 3,
        "null_mass": 0.475,
        "entropy": entropy,
        "candidate_hit_rate": 2 / 3,
        "accuracy": 1.0,
        "accuracy_null": 0.5,
    }
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected, abs=1e-5)


def test_warm_up_losses_are_means_over_examples_and_over_those_that_hold_the_span(reader):
    example = Example()
    rows = np.arange(B) * N + 1
    example.joints = [example.joints[i] for i in rows]
    width = reader.config.max_span_tokens
    places = [
        [(8, 2), (11, 1)],
        [],
        [(12, 3)],
    ]  # starts and lengths of the span in each joint input; the second passage lacks it
    order, num_buckets = np.array([2, 0, 1]), 2
    masked = example.masked(order, num_buckets)
    spans = [
        SpanTargets(
            *span_targets(
                [places[row] for row in joint.row_R.tolist()], joint.ids_RL, joint.mask_RL, joint.type_RL, WORDS, width
            )
        )
        for joint in masked.joint
    ]
    outputs = ReaderPretrainingModel(reader, 0.5)(ReaderPretrainingBatch(masked, spans))

    masked_loss, span_losses, found = 0.0, [], []
    for b, (ids, first, _) in enumerate(example.joints):
        with torch.no_grad():
            hidden = reader(*pad_joint([ids], [first], PAD))
            log_p_MV = reader.mlm_logits(hidden, torch.arange(SPANS[b][0] + 1, SPANS[b][1] + 1)[None])[0].log_softmax(
                -1
            )
            score = reader.span_scores(hidden)[0]
        masked_loss -= sum(log_p_MV[m, token].item() for m, token in enumerate(example.targets[b])) / B
        scores = {}
        for start in range(first, len(ids)):
            for length in range(1, width + 1):
                if start + length <= len(ids) and not {CLS, SEP} & set(ids[start : start + length].tolist()):
                    scores[start, length] = score[start, length - 1].item()
        total = sum(math.exp(value) for value in scores.values())
        if places[b]:
            span_losses.append(-math.log(sum(math.exp(scores[place]) for place in places[b]) / total))
            found.append(max(scores, key=scores.__getitem__) in places[b])
    assert outputs["masked_loss"].item() == pytest.approx(masked_loss, rel=1e-5)
    assert outputs["span_loss"].item() == pytest.approx(sum(span_losses) / 2, rel=1e-4)
    assert outputs["loss"].item() == pytest.approx(masked_loss + 0.25 * sum(span_losses), rel=1e-4)
    assert outputs["span_accuracy"].item() == pytest.approx(sum(found) / 2)


def test_a_dual_encoder_scores_over_the_temperature(retriever):
    example = Example()
    queries = pad_batch([WORDS.query(query, 20) for query in example.queries], PAD)
    blocks = pad_batch([WORDS.passage(*example.passages[row], 40) for row in (1, 2, 3)], PAD)
    outputs = DualEncoderModel(retriever)(
        PairBatch(*queries, *blocks, torch.arange(3), torch.zeros(3, 3, dtype=torch.bool))
    )
    with torch.no_grad():
        log_p_BB = (retriever.embed_queries(*queries) @ retriever.embed_passages(*blocks).T / 2.0).log_softmax(-1)
    assert outputs["loss"].item() == pytest.approx(-log_p_BB.diagonal().mean().item(), rel=1e-5)
    assert outputs["accuracy"].item() == pytest.approx((log_p_BB.argmax(-1) == torch.arange(3)).float().mean().item())


def test_a_batch_moves_as_a_whole():
    batch = Example().realm().to(torch.device("meta"))
    assert batch.query_ids_BL.device.type == "meta" and batch.masked.target_BM.device.type == "meta"
    assert [joint.ids_RL.device.type for joint in batch.masked.joint] == ["meta"] * 3
