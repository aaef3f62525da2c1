"""Objectives compared with plain loops over candidates, wordpieces and spans, and their gradients
with the closed forms of the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realm.models.objectives import (
    MARGINALS,
    MASKED_SCORE,
    candidate_log_prior,
    in_batch_loss,
    joint_marginal_log_likelihood,
    merge_slot_scores,
    open_qa_loss,
    per_token_marginal_log_likelihood,
    positive_log_marginal,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000))


def example(B: int, N: int, M: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, mask of valid slots, log-probabilities and token mask of y, with some empty slots and
    some padding, but never only that."""
    generator = torch.Generator().manual_seed(seed)
    score_BN = 2 * torch.randn(B, N, generator=generator, dtype=torch.float64)
    valid_BN = torch.rand(B, N, generator=generator) < 0.7
    valid_BN[:, 0] = True
    token_log_p_BNM = (
        torch.randn(B, N, M, 6, generator=generator, dtype=torch.float64).log_softmax(-1)[..., 0].contiguous()
    )
    token_mask_BM = torch.arange(M) < torch.randint(1, M + 1, (B, 1), generator=generator)
    return score_BN.requires_grad_(), valid_BN, token_log_p_BNM.requires_grad_(), token_mask_BM


def prior(score_N: Tensor, valid_N: Tensor) -> list[float]:
    """Softmax over the valid slots."""
    weights = [
        math.exp(score) if valid else 0.0 for score, valid in zip(score_N.tolist(), valid_N.tolist(), strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def joint_probability(p_N: list[float], token_p_NM: list[list[float]], token_M: list[bool]) -> float:
    return sum(
        p * math.prod(q for q, token in zip(token_p_M, token_M, strict=True) if token)
        for p, token_p_M in zip(p_N, token_p_NM, strict=True)
    )


def per_token_probability(p_N: list[float], token_p_NM: list[list[float]], token_M: list[bool]) -> float:
    return math.prod(
        sum(p * row[m] for p, row in zip(p_N, token_p_NM, strict=True)) for m, token in enumerate(token_M) if token
    )


@pytest.mark.parametrize(("name", "brute_force"), [("joint", joint_probability), ("per_token", per_token_probability)])
@given(shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_marginal_equals_the_sum_over_candidates(name, brute_force, shape):
    score_BN, valid_BN, token_log_p_BNM, token_mask_BM = example(*shape)
    log_likelihood_B = MARGINALS[name](candidate_log_prior(score_BN, valid_BN), token_log_p_BNM, token_mask_BM)
    for b in range(len(score_BN)):
        expected = brute_force(
            prior(score_BN[b], valid_BN[b]), token_log_p_BNM[b].exp().tolist(), token_mask_BM[b].tolist()
        )
        assert log_likelihood_B[b].item() == pytest.approx(math.log(expected), abs=1e-10)


@given(shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_joint_gradient_equals_that_of_the_paper(shape):
    """Guu et al. 2020, appendix A: the gradient of the log-likelihood with respect to f(x, z) is
    [p(y|z,x)/p(y|x) − 1]·p(z|x)."""
    score_BN, valid_BN, token_log_p_BNM, token_mask_BM = example(*shape)
    loss = -joint_marginal_log_likelihood(candidate_log_prior(score_BN, valid_BN), token_log_p_BNM, token_mask_BM).sum()
    loss.backward()
    for b in range(len(score_BN)):
        p_N, token_p_NM = prior(score_BN[b], valid_BN[b]), token_log_p_BNM[b].exp().tolist()
        token_M = token_mask_BM[b].tolist()
        p_y = joint_probability(p_N, token_p_NM, token_M)
        for n, p_z in enumerate(p_N):
            p_y_given_z = joint_probability([1.0], [token_p_NM[n]], token_M)
            assert score_BN.grad[b, n].item() == pytest.approx(-(p_y_given_z / p_y - 1) * p_z, abs=1e-10)
            for m, token in enumerate(token_M):
                posterior = p_z * p_y_given_z / p_y if token else 0.0
                assert token_log_p_BNM.grad[b, n, m].item() == pytest.approx(-posterior, abs=1e-10)


@given(shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_per_token_gradient_equals_the_sum_over_wordpieces(shape):
    score_BN, valid_BN, token_log_p_BNM, token_mask_BM = example(*shape)
    loss = -per_token_marginal_log_likelihood(
        candidate_log_prior(score_BN, valid_BN), token_log_p_BNM, token_mask_BM
    ).sum()
    loss.backward()
    for b in range(len(score_BN)):
        p_N, token_p_NM = prior(score_BN[b], valid_BN[b]), token_log_p_BNM[b].exp().tolist()
        for n, p_z in enumerate(p_N):
            expected = 0.0
            for m, token in enumerate(token_mask_BM[b].tolist()):
                p_y_m = sum(p * row[m] for p, row in zip(p_N, token_p_NM, strict=True))
                expected -= (token_p_NM[n][m] / p_y_m - 1) * p_z if token else 0.0
            assert score_BN.grad[b, n].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", MARGINALS)
def test_gradcheck(name):
    score_BN, valid_BN, token_log_p_BNM, token_mask_BM = example(2, 4, 3, 1)
    assert not valid_BN.all() and not token_mask_BM.all()

    def loss(score_BN: Tensor, token_log_p_BNM: Tensor) -> Tensor:
        return -MARGINALS[name](candidate_log_prior(score_BN, valid_BN), token_log_p_BNM, token_mask_BM).mean()

    assert torch.autograd.gradcheck(loss, (score_BN, token_log_p_BNM))


def test_marginals_agree_on_one_wordpiece_and_differ_on_two():
    score_BN, valid_BN, token_log_p_BNM, _ = example(2, 3, 2, 0)
    log_p_z_BN = candidate_log_prior(score_BN, valid_BN)
    for length, equal in ((1, True), (2, False)):
        token_mask_BM = torch.arange(2).expand(2, 2) < length
        joint_B, per_token_B = (
            MARGINALS[name](log_p_z_BN, token_log_p_BNM, token_mask_BM) for name in ("joint", "per_token")
        )
        assert torch.allclose(joint_B, per_token_B) == equal


@pytest.mark.parametrize("name", MARGINALS)
def test_empty_slots_have_zero_probability_and_gradient(name):
    score_BN = torch.tensor([[0.5, 80.0, -1.0, 3.0]], requires_grad=True)
    valid_BN = torch.tensor([[True, False, True, False]])
    token_log_p_BNM = torch.tensor([[[-3.0], [-0.1], [-0.2], [-0.3]]], requires_grad=True)
    log_p_z_BN = candidate_log_prior(score_BN, valid_BN)
    assert log_p_z_BN.exp()[~valid_BN].tolist() == [0.0, 0.0]
    assert log_p_z_BN.exp().sum().item() == pytest.approx(1.0)
    MARGINALS[name](log_p_z_BN, token_log_p_BNM, torch.ones(1, 1, dtype=torch.bool)).sum().backward()
    assert score_BN.grad[~valid_BN].tolist() == [0.0, 0.0]
    assert token_log_p_BNM.grad[~valid_BN].flatten().tolist() == [0.0, 0.0]
    assert score_BN.grad[valid_BN].abs().min() > 0.01 and score_BN.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("excluded", [set(), {(0, 1), (0, 6), (3, 4), (4, 1)}])
def test_in_batch_loss_and_gradient_equal_plain_loops(temperature, excluded):
    generator = torch.Generator().manual_seed(3)
    query_emb_BD = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    passage_emb_CD = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target, excluded_BC = [5, 1, 0, 3, 4 if not excluded else 0], torch.zeros(5, 7, dtype=torch.bool)
    for query_and_passage in excluded:
        excluded_BC[query_and_passage] = True
    loss, accuracy = in_batch_loss(query_emb_BD, passage_emb_CD, torch.tensor(target), excluded_BC, temperature)
    loss.backward()
    losses, right = [], 0
    gradient_BD = [[0.0] * 4 for _ in range(5)]
    for b in range(5):
        scores = {
            c: sum(q * p for q, p in zip(query_emb_BD[b].tolist(), passage_emb_CD[c].tolist(), strict=True))
            / temperature
            for c in range(7)
            if (b, c) not in excluded
        }
        total = sum(math.exp(score) for score in scores.values())
        losses.append(math.log(total) - scores[target[b]])
        right += max(scores, key=scores.__getitem__) == target[b]
        for c, score in scores.items():
            for d in range(4):
                gradient_BD[b][d] += (
                    (math.exp(score) / total - (c == target[b])) * passage_emb_CD[c, d].item() / temperature / 5
                )
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert accuracy.item() == pytest.approx(right / 5)
    assert torch.allclose(query_emb_BD.grad, torch.tensor(gradient_BD, dtype=torch.float64), atol=1e-5)
    assert passage_emb_CD.grad.abs().sum(-1).min() > 0


def test_positive_log_marginal_sums_over_the_positives():
    generator = torch.Generator().manual_seed(4)
    log_p = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    positive = torch.rand(2, 3, 5, generator=generator) < 0.4
    positive[0, 1], positive[1, 2] = False, True
    log_likelihood, has_positive = positive_log_marginal(log_p, positive)
    for i in range(2):
        for j in range(3):
            total = sum(
                p for p, included in zip(log_p[i, j].exp().tolist(), positive[i, j].tolist(), strict=True) if included
            )
            assert has_positive[i, j].item() == (total > 0)
            assert log_likelihood[i, j].item() == pytest.approx(math.log(total) if total else 0.0, abs=1e-10)
    assert not has_positive.all()


def mean_negative_log_marginal(score: Tensor, positive: Tensor, valid: Tensor) -> tuple[float, float]:
    """Mean of −log Σ p over the rows with a positive, and the fraction of these rows, by loops."""
    losses = []
    for score_S, positive_S, valid_S in zip(score.tolist(), positive.tolist(), valid.tolist(), strict=True):
        total = sum(math.exp(s) for s, v in zip(score_S, valid_S, strict=True) if v)
        positive_total = sum(math.exp(s) for s, p, v in zip(score_S, positive_S, valid_S, strict=True) if p and v)
        if positive_total:
            losses.append(-math.log(positive_total / total))
    return (sum(losses) / len(losses) if losses else 0.0), len(losses) / len(score)


@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=60, deadline=None)
def test_open_qa_loss_is_the_sum_of_both_marginals(seed, rate):
    generator = torch.Generator().manual_seed(seed)
    B, K, N, S = 4, 3, 2, 4
    retrieval_score_BK = torch.randn(B, K, generator=generator, dtype=torch.float64, requires_grad=True)
    span_score_BNS = torch.randn(B, N, S, generator=generator, dtype=torch.float64, requires_grad=True)
    has_answer_BK = torch.rand(B, K, generator=generator) < rate
    is_answer_BNS = torch.rand(B, N, S, generator=generator) < rate
    valid_BK, valid_BNS = torch.rand(B, K, generator=generator) < 0.8, torch.rand(B, N, S, generator=generator) < 0.8
    valid_BNS[0] = False  # a question without a valid span
    losses = open_qa_loss(retrieval_score_BK, has_answer_BK, valid_BK, span_score_BNS, is_answer_BNS, valid_BNS)
    retriever_loss, retriever_rows = mean_negative_log_marginal(retrieval_score_BK, has_answer_BK, valid_BK)
    reader_loss, reader_rows = mean_negative_log_marginal(
        span_score_BNS.flatten(1), is_answer_BNS.flatten(1), valid_BNS.flatten(1)
    )
    expected = {
        "loss": retriever_loss + reader_loss,
        "retriever_loss": retriever_loss,
        "reader_loss": reader_loss,
        "retriever_rows": retriever_rows,
        "reader_rows": reader_rows,
    }
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, abs=1e-7)
    losses["loss"].backward()
    no_positive_B = ~(has_answer_BK & valid_BK).any(-1)
    for grad in (retrieval_score_BK.grad, span_score_BNS.grad):
        assert grad.isfinite().all()
    assert not retrieval_score_BK.grad[no_positive_B].any() and not retrieval_score_BK.grad[~valid_BK].any()
    assert not span_score_BNS.grad[~valid_BNS].any()


def test_open_qa_loss_without_positives_is_zero():
    score_BK, score_BNS = torch.randn(2, 3, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    false_BK, false_BNS = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 1, 4, dtype=torch.bool)
    losses = open_qa_loss(score_BK, false_BK, ~false_BK, score_BNS, false_BNS, ~false_BNS)
    assert all(value.item() == 0.0 for value in losses.values())
    losses["loss"].backward()
    assert not score_BK.grad.any() and not score_BNS.grad.any()


def test_the_score_of_a_read_slot_is_the_log_sum_exp_of_its_passages():
    torch.manual_seed(0)
    score_BN = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    read_slot_BN = torch.tensor([[0, 1, 0, -1], [0, 0, 0, 3]])
    scores = merge_slot_scores(score_BN, read_slot_BN)
    for b in range(2):
        for slot in range(4):
            total = sum(math.exp(score_BN[b, n].item()) for n in range(4) if read_slot_BN[b, n] == slot)
            if total:
                assert scores[b, slot].item() == pytest.approx(math.log(total))
            else:
                assert scores[b, slot].item() < MASKED_SCORE / 2
    weight_BN = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    (scores * weight_BN).sum().backward()
    for b in range(2):
        for n in range(4):
            slot, expected = read_slot_BN[b, n], 0.0
            if slot >= 0:
                expected = weight_BN[b, slot].item() * math.exp(score_BN[b, n].item() - scores[b, slot].item())
            assert score_BN.grad[b, n].item() == pytest.approx(expected)
