"""The marginal by the span head, in float64, compared with plain loops over candidates and spans:
losses, telemetry, and the gradients of the reader and of the retrieval scores."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.collate import MaskedCollator
from pretrain.masking import MaskedSentence
from realm.corpus.collate import Collator, InputLimits
from realm.models.batches import RealmBatch
from realm.models.bert import BertSource
from realm.models.modules import ReaderPretrainingModel, RealmModel
from realm.models.objectives import (
    MASKED_SCORE,
    candidate_log_prior,
    span_log_probs,
    span_marginal_log_likelihood,
)
from realm.models.predictions import SpanPrediction, best_span_is_right
from realm.models.reader import ReaderConfig, build_reader, pad_joint
from realm.text.inputs import Wordpieces, pad_batch

PAD, CLS, SEP, MASK = 0, 2, 3, 4
CONTINUATION = 80
"""Wordpieces from this one on continue a word."""
WORDS = Wordpieces(CLS, SEP, MASK, PAD, np.arange(300) >= CONTINUATION)
W = 3
BERT = BertSource(layers=1, hidden=16, heads=2, intermediate=32, max_positions=48, dropout=0.0, init_std=0.3)
NULL = ((), ())
Y, LONG = (10, 11), (10, 11, 12, 13)
"""An answer that the span head can predict, and one that is too long."""


def sentence(span, question=False):
    ids = np.array([20, 21, *span, 22], np.int32)
    return MaskedSentence(0, ids, 2, 2 + len(span), 0, (), np.array([30, 31, 32, 33]) if question else None)


# Per example: masked sentence or question, candidates (title, text) after the null passage, None
# for an empty slot, and the slot in which each one is read.
HELD = sentence(Y), [((10, 11), (40, 10, 11, 41)), ((42,), (10, 11, CONTINUATION, 43, 10, 11)), None], (0, 1, 2, 0)
"""y is in two passages: in the title and in the text, and once as a part of a word."""
ABSENT = sentence(Y), [((44,), (45, 46, 47)), ((48,), (10, 49, 11)), ((50,), (51,))], (0, 1, 2, 3)
TOO_LONG = sentence(LONG), [((52,), (*LONG, 53)), ((54,), (55, 56)), None], (0, 1, 2, 0)
TOGETHER = sentence(Y, question=True), [((57,), (58, 10, 11)), ((57,), (58, 10, 11)), ((59,), (60, 61))], (0, 1, 1, 3)
"""A question; the blocks in slots 1 and 2 are read together in slot 1."""


@pytest.fixture
def reader(tokenizer):
    torch.manual_seed(0)
    reader = build_reader(ReaderConfig(bert=BERT, span_hidden=4, max_span_tokens=W, max_tokens=48), tokenizer)[0]
    nn.init.normal_(reader.span_absent.weight)
    return reader.double()


class FixedScores(nn.Module):
    """A retriever whose scores are its parameter."""

    def __init__(self, B, N, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.score_BN = nn.Parameter(2 * torch.randn(B, N, generator=generator, dtype=torch.float64))

    def embed_queries(self, ids_BL, mask_BL):
        return torch.zeros(len(ids_BL), 1)

    embed_passages = embed_queries

    def score(self, query_emb_BD, candidate_emb_BND, extra_BN):
        return self.score_BN + extra_BN


def masked_batch(examples, slots):
    """`slots`: title and text of each passage read, the null passage included."""
    collator = MaskedCollator(Collator(SimpleNamespace(corpus=None), WORDS, InputLimits(20, 30, 48, W)), 2)
    parts = [[tuple(np.array(ids, np.int32) for ids in passage) for passage in passages] for passages in slots]
    read_slot_BN = np.array([read for _, _, read in examples])
    return collator.masked([example for example, _, _ in examples], parts, read_slot_BN)


def realm_batch(examples):
    valid_BN = torch.tensor([[True, *(parts is not None for parts in passages)] for _, passages, _ in examples])
    any_ids = pad_batch([np.array([CLS, SEP])], PAD)
    contains_BN, candidate_BN = torch.zeros_like(valid_BN), torch.zeros(valid_BN.shape, dtype=torch.long)
    slots = [[NULL, *(parts or NULL for parts in passages)] for _, passages, _ in examples]
    lexical_BN = torch.zeros(valid_BN.shape)
    masked = masked_batch(examples, slots)
    return RealmBatch(*any_ids, *any_ids, candidate_BN, valid_BN, contains_BN, masked, lexical_BN)


def read_one(reader, example, parts):
    """Of one joint input: log p(s|z,x) of every span of whole words (last: absent), the numbers of
    those that are y, and log p of the masked wordpieces."""
    title, text = parts
    ids, first, _ = WORDS.joint(example.query_ids(MASK), np.array(title, np.int32), np.array(text, np.int32), 48)
    hidden = reader(*pad_joint([ids], [first], PAD))[0]
    scores, answers = [], []
    for start in range(first, len(ids) - 1):
        for end in range(start + 1, min(start + W, len(ids) - 1) + 1):
            piece = ids[start:end].tolist()
            if SEP in piece or ids[start] >= CONTINUATION or ids[end] >= CONTINUATION:
                continue
            if piece == example.span_ids.tolist():
                answers.append(len(scores))
            pair = (reader.span_start(hidden[start]) + reader.span_end(hidden[end - 1])).clamp(min=0)
            scores.append(reader.span_score(reader.span_norm(pair)))
    scores.append(reader.span_absent(hidden[0]))
    token_log_p = []
    if example.question is None:
        for place in range(example.start, example.end):
            logits_V = reader.mlm_logits(hidden[None], torch.tensor([[place + 1]]))[0, 0]
            token_log_p.append(logits_V.log_softmax(0)[int(example.sentence_ids[place])])
    return torch.cat(scores).log_softmax(0), answers, token_log_p


def mean(values):
    return sum(values) / max(1, len(values))


def loop(reader, score_BN, examples):
    """Losses and telemetry by plain loops over probabilities."""
    masked_losses, span_losses, right, hit, absent = [], [], [], [], []
    for (example, passages, read), score_N in zip(examples, score_BN, strict=True):
        slots = [NULL, *passages]
        weights = [torch.exp(score_N[n]) if slots[n] is not None else 0.0 for n in range(len(slots))]
        p_z = [weight / sum(weights) for weight in weights]
        readings = {n: read_one(reader, example, slots[n]) for n in sorted(set(read)) if slots[n] is not None}
        p_y, p_absent, p_masked, best = 0.0, 0.0, 0.0, {}
        for n, p in enumerate(p_z):
            if slots[n] is None:
                continue
            log_p, answers, token_log_p = readings[read[n]]
            p_y = p_y + p * sum(log_p[s].exp() for s in answers)
            p_absent = p_absent + p * log_p[-1].exp()
            p_masked = p_masked + p * torch.exp(sum(token_log_p)) if token_log_p else 0.0
            for s in range(len(log_p) - 1):
                best[read[n], s] = best.get((read[n], s), 0.0) + (p * log_p[s].exp()).item()
        found = any(answers for _, answers, _ in readings.values())
        span_losses.append(-torch.log(p_y if found else p_absent))
        if example.question is None:
            masked_losses.append(-torch.log(p_masked))
        if found:
            n, s = max(best, key=best.__getitem__)
            right.append(float(s in readings[n][1]))
            in_slots = (n for n in range(len(slots)) if slots[n] is not None and readings[read[n]][1])
            hit.append(sum(p_z[n].item() for n in in_slots))
        else:
            absent.append(p_absent.item())
    telemetry = {"span_rows": len(right) / len(examples), "span_accuracy": mean(right)}
    telemetry |= {"hit_mass": mean(hit), "absent_mass": mean(absent)}
    return mean(masked_losses), mean(span_losses), telemetry


BATCHES = {
    "all kinds": [HELD, ABSENT, TOO_LONG, TOGETHER],
    "y in a passage": [HELD, TOGETHER],
    "y in no passage": [ABSENT, TOO_LONG],
    "questions": [TOGETHER, TOGETHER],
}


LOSSES = {"mlm": ["masked_loss"], "span": ["span_loss"], "both": ["masked_loss", "span_loss"]}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("head", LOSSES)
def test_losses_telemetry_and_gradients_of_realm_equal_plain_loops(head, name, reader):
    examples = BATCHES[name]
    retriever = FixedScores(len(examples), 4)
    model = RealmModel(retriever, reader, "joint", head)
    outputs = model(realm_batch(examples))
    masked_loss, span_loss, telemetry = loop(reader, retriever.score_BN, examples)
    expected = {"masked_loss": masked_loss, "span_loss": span_loss}
    expected = {loss: expected[loss] for loss in LOSSES[head]}
    for loss, value in expected.items():
        assert outputs[loss].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-9)
    assert {loss for loss in outputs if loss.endswith("_loss")} == set(expected)
    total = sum(expected.values())
    assert outputs["loss"].item() == pytest.approx(torch.as_tensor(total).item(), rel=1e-9)
    for figure, value in telemetry.items() if head != "mlm" else ():
        assert outputs[figure].item() == pytest.approx(value, rel=1e-5), figure

    outputs["loss"].backward()
    ours = gradients(model)
    model.zero_grad()
    if torch.is_tensor(total):
        total.backward()
    theirs = gradients(model)
    for parameter, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-7, atol=1e-12, msg=parameter)
    if head == "span":
        assert ours["retriever.score_BN"].abs().max() > 1e-3 and ours["reader.span_start.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("span_loss", [0.0, 0.5])
def test_reader_pretraining_counts_passages_without_the_span_as_absent(span_loss, reader):
    inside = [((10, 11), (40, 10, 11, 41))]
    examples = [
        (sentence(Y), inside, (0,)),
        (sentence(Y, question=True), inside, (0,)),
        (sentence(LONG), [((52,), (*LONG, 53))], (0,)),
        (sentence(Y), [NULL], (0,)),
    ]
    model = ReaderPretrainingModel(reader, span_loss)
    outputs = model(masked_batch(examples, [passages for _, passages, _ in examples]))
    masked_losses, span_losses, right = [], [], []
    for example, (parts,), _ in examples:
        log_p, answers, token_log_p = read_one(reader, example, parts)
        span_losses.append(-torch.log(sum(log_p[s].exp() for s in answers)) if answers else -log_p[-1])
        if answers:
            right.append(float(log_p[:-1].argmax().item() in answers))
        if token_log_p:
            masked_losses.append(-sum(token_log_p))
    assert len(masked_losses) == 3 and len(right) == 2 and span_losses[3].item() == 0.0
    total = mean(masked_losses) + span_loss * mean(span_losses)
    assert outputs["loss"].item() == pytest.approx(total.item(), rel=1e-9)
    assert outputs["span_loss"].item() == pytest.approx(mean(span_losses).item(), rel=1e-9)
    assert outputs["span_accuracy"].item() == pytest.approx(mean(right))
    outputs["loss"].backward()
    ours = gradients(model)
    model.zero_grad()
    total.backward()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-7, atol=1e-12, msg=parameter)


def test_a_step_calls_the_same_modules_and_trains_the_same_parameters_whatever_it_reads(reader):
    """Under ZeRO, ranks whose batches differ must issue the same collectives."""
    calls, trained, shapes = [], [], []
    for examples in ([HELD] * 4, [ABSENT] * 4, [TOGETHER] * 4, [TOO_LONG, HELD, TOGETHER, ABSENT]):
        model, names = RealmModel(FixedScores(4, 4), reader, "joint", "both"), []
        hooks = [
            module.register_forward_hook(lambda *_, name=name, names=names: names.append(name))
            for name, module in model.named_modules()
        ]
        batch = realm_batch(examples)
        model.zero_grad()
        model(batch)["loss"].backward()
        for hook in hooks:
            hook.remove()
        calls.append(names)
        trained.append({name for name, value in model.named_parameters() if value.grad is not None})
        shapes.append((len(batch.masked.joint), len(batch.masked.spans)))
    assert len(calls[0]) > 20 and all(names == calls[0] for names in calls)
    assert all(names == trained[0] for names in trained) and "reader.span_absent.weight" in trained[0]
    assert shapes == [(2, 2)] * 4


def test_the_probabilities_of_candidates_that_are_read_together_are_added():
    """(0.3 + 0.3) · 0.6 is more than 0.4 · 0.8; empty slots are read with the null passage."""
    p_z_BN = torch.tensor([[1e-9, 0.3, 0.3, 0.4, 0.0]])
    best_p_BN = torch.tensor([[0.0, 0.6, 0.6, 0.8, 0.0]])
    correct_BN = torch.tensor([[False, True, True, False, False]])
    spans = SpanPrediction(correct_BN, best_p_BN.log(), best_p_BN, correct_BN, best_p_BN.log().clamp(min=MASKED_SCORE))
    log_p_z_BN = p_z_BN.log().clamp(min=MASKED_SCORE)
    assert best_span_is_right(log_p_z_BN, spans, torch.tensor([[0, 1, 1, 3, 0]])).tolist() == [True]
    assert best_span_is_right(log_p_z_BN, spans, torch.tensor([[0, 1, 2, 3, 0]])).tolist() == [False]


def test_the_null_passage_alone_says_that_everything_is_absent(reader):
    retriever = FixedScores(2, 4)
    batch = realm_batch([(example, [None] * 3, (0,) * 4) for example, *_ in (HELD, TOGETHER)])
    outputs = RealmModel(retriever, reader, "joint", "span")(batch)
    assert outputs["loss"].item() == 0.0 and outputs["absent_mass"].item() == pytest.approx(1.0)
    assert outputs["span_rows"].item() == outputs["span_accuracy"].item() == 0.0
    outputs["loss"].backward()
    assert all(not gradient.any() for gradient in gradients(reader).values())
    assert retriever.score_BN.grad.abs().max() < 1e-12


def test_the_gradient_of_a_retrieval_score_is_that_of_realm():
    """[p(t|z,x)/p(t|x) − 1]·p(z|x), with t = y where a candidate contains it, and absent elsewhere
    (Guu et al. 2020, section 3.3)."""
    generator = torch.Generator().manual_seed(0)
    B, N, S = 4, 5, 7
    score_BN = torch.randn(B, N, generator=generator, dtype=torch.float64, requires_grad=True)
    valid_BN = torch.rand(B, N, generator=generator) < 0.8
    span_score = torch.randn(B * N, S, generator=generator, dtype=torch.float64)
    absent_score = torch.randn(B * N, generator=generator, dtype=torch.float64)
    log_p, log_p_absent = span_log_probs(span_score, absent_score)
    is_answer = (torch.rand(B, N, S, generator=generator) < 0.2) & valid_BN[..., None]
    is_answer[0] = False
    p_y_BN = (log_p.view(B, N, S).exp() * is_answer).sum(-1)
    has_answer_BN, log_p_absent_BN = is_answer.any(-1), log_p_absent.view(B, N)
    assert has_answer_BN.any(-1).tolist() == [False, True, True, True]
    log_p_z_BN = candidate_log_prior(score_BN, valid_BN)
    log_likelihood_B = span_marginal_log_likelihood(log_p_z_BN, p_y_BN.log(), log_p_absent_BN, has_answer_BN)
    log_likelihood_B.sum().backward()
    for b in range(B):
        p_z_N = log_p_z_BN[b].exp().tolist()
        p_t_N = (p_y_BN[b] if has_answer_BN[b].any() else log_p_absent_BN[b].exp()).tolist()
        p_t = sum(p * q for p, q in zip(p_z_N, p_t_N, strict=True))
        assert log_likelihood_B[b].item() == pytest.approx(math.log(p_t), rel=1e-9)
        expected_N = [(q / p_t - 1) * p for p, q in zip(p_z_N, p_t_N, strict=True)]
        assert score_BN.grad[b].tolist() == pytest.approx(expected_N, abs=1e-12)


def gradients(model):
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }
