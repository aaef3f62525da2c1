"""Performer, linformer and infini-attention against plain loops in double precision: outputs,
gradients, padding, lengths, half precision."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

from realm.attention import AttentionConfig, count_update, naive, performer
from realm.attention.infini import InfiniAttention
from realm.attention.linformer import LinformerAttention, LinformerSelfAttention, mean_pooling
from realm.attention.performer import PerformerAttention, draw_projection, random_feature_attention
from realm.attention.projected import masked_attention
from realm.errors import UserError

HEADS, D = 2, 3
WIDTH, POSITIONS = HEADS * D, 40


@pytest.fixture(params=["all at once", "in small parts"], autouse=True, scope="module")
def parts(request):
    """Texts of a few tokens in one part as short texts are, or in several as long ones are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in small parts":
            patch.setattr(performer, "CHUNK", 5)
        yield


Reference = Callable[[torch.nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(module, q, k, v of one text and head as (L, D)) to (L, D); `module` gets an attribute `head`,
the number of the head."""


def module(attention: AttentionConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        attention_probs_dropout_prob=0.0,
    )
    layers = [layer.double().eval() for layer in attention.replace_all([BertSelfAttention(config) for _ in range(2)])]
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return layers[1]


def performer_reference(built, head, query, key, value):
    return naive.performer(query, key, value, built.projection.double(), built.config.kernel)


def linformer_reference(built, head, query, key, value):
    own = head if built.config.sharing == "none" else 0
    key_projection = built.owner[0].key_projection[own]
    shares = built.config.sharing in ("key_value", "layerwise")
    return naive.linformer(query, key, value, key_projection, key_projection if shares else built.value_projection[own])


def infini_reference(built, head, query, key, value):
    gate = torch.sigmoid(built.gate[head])
    return naive.infini(query, key, value, built.config.segment, built.config.update, gate)


VARIANTS: dict[str, tuple[AttentionConfig, Reference]] = {
    **{
        f"performer-{kernel}": (PerformerAttention(8, kernel, redraw_every=0), performer_reference)
        for kernel in ("softmax", "trigonometric", "relu")
    },
    "performer-iid": (PerformerAttention(7, orthogonal=False, redraw_every=0), performer_reference),
    **{
        f"linformer-{sharing}": (LinformerAttention(6, sharing), linformer_reference)
        for sharing in ("none", "headwise", "key_value", "layerwise")
    },
    **{f"infini-{update}": (InfiniAttention(4, update), infini_reference) for update in ("linear", "delta")},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def naive_texts(built, reference: Reference, hidden_BLW: Tensor, lengths: list[int]) -> list[Tensor]:
    """Outputs (L, W) of each text alone."""
    outputs = []
    for b, length in enumerate(lengths):
        hidden = hidden_BLW[b, :length]
        q, k, v = built.query(hidden), built.key(hidden), built.value(hidden)
        parts = [slice(head * D, (head + 1) * D) for head in range(HEADS)]
        outputs.append(
            torch.cat(
                [reference(built, head, q[:, part], k[:, part], v[:, part]) for head, part in enumerate(parts)], dim=1
            )
        )
    return outputs


def batch(lengths: list[int], padding: int = 0, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    L = max(lengths) + padding
    return torch.randn(len(lengths), L, WIDTH, generator=generator, dtype=torch.float64), torch.arange(
        L
    ) < torch.tensor(lengths)[:, None]


def gradients(built, out: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    named = [*built.named_parameters(), ("hidden", hidden)]
    if isinstance(built, LinformerSelfAttention) and built.owner[0] is not built:
        named.append(("the shared projection", built.owner[0].key_projection))
    found = torch.autograd.grad((out * weight).sum(), [parameter for _, parameter in named], allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named, found, strict=True)
    }


@every_variant
def test_outputs_and_gradients_are_those_of_plain_loops(name):
    attention, reference = VARIANTS[name]
    built, lengths = module(attention), [11, 4, 1, 8]
    hidden, real = batch(lengths, padding=2)
    hidden.requires_grad_()
    out = built(hidden, real.long())[0][real]
    expected = torch.cat(naive_texts(built, reference, hidden, lengths))
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-8)
    ours, theirs = gradients(built, out, hidden), gradients(built, expected, hidden)
    for parameter, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[parameter], atol=1e-10, rtol=1e-7, msg=lambda text, p=parameter: f"{p}: {text}"
        )
    assert ours["hidden"].abs().max() > 1e-3


@every_variant
@given(lengths=st.lists(st.integers(1, 23), min_size=1, max_size=3), padding=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_length_and_any_padding_give_what_each_text_gives_alone(name, lengths, padding, seed):
    built = module(VARIANTS[name][0])
    hidden, real = batch(lengths, padding, seed)
    out = built(hidden, real.long())[0]
    assert out.isfinite().all(), "on padding, too"
    changed = torch.where(real[..., None], hidden, torch.full_like(hidden, 50.0))
    torch.testing.assert_close(built(changed, real.long())[0][real], out[real], atol=1e-9, rtol=1e-9)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(out[b, :length], built(hidden[b : b + 1, :length])[0][0], atol=1e-9, rtol=1e-9)


@every_variant
def test_half_precision_is_near(name):
    built = module(VARIANTS[name][0])
    hidden, real = batch([20, 9])
    exact = built(hidden, real.long())[0][real]
    half = built.float()
    with torch.autocast("cpu", torch.bfloat16):
        near = half(hidden.float(), real.long())[0][real]
    if "trigonometric" not in name:  # whose denominators may come close to zero
        assert (near.double() - exact).abs().mean() < 0.06 * exact.abs().mean()
    assert near.isfinite().all()


def test_mean_pooling_rows_are_means_of_the_stretches():
    pooling = mean_pooling(3, 8)
    assert pooling.tolist() == [[0.5, 0.5, 0, 0, 0, 0, 0, 0], [0, 0, pytest.approx(1 / 3)] + [pytest.approx(1 / 3)] * 2 + [0, 0, 0],
                                [0, 0, 0, 0, 0] + [pytest.approx(1 / 3)] * 3]  # fmt: skip


def test_layerwise_projections_are_one_parameter_and_saved_once():
    config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=POSITIONS)
    first, second = LinformerAttention(6, "layerwise").replace_all([BertSelfAttention(config) for _ in range(2)])
    assert "key_projection" in first.state_dict() and "key_projection" not in second.state_dict()
    hidden, _ = batch([20])
    before = second.double()(hidden)[0]
    with torch.no_grad():
        first.double().key_projection.mul_(2)
    assert not torch.allclose(second(hidden)[0], before), "the second layer uses the projection of the first"


def test_a_segment_as_long_as_the_text_is_dense_attention():
    built = module(InfiniAttention(30))
    hidden, real = batch([17, 30])
    out = built(hidden, real.long())[0]
    for b, length in enumerate((17, 30)):
        q, k, v = (
            part(hidden[b, :length]).view(length, HEADS, D).transpose(0, 1)
            for part in (built.query, built.key, built.value)
        )
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, WIDTH)
        torch.testing.assert_close(out[b, :length], dense, atol=1e-10, rtol=1e-8)


def test_a_memory_brings_news_from_the_far_end():
    built = module(InfiniAttention(4))
    hidden, _ = batch([20])
    changed = hidden.clone()
    changed[0, 19] += 1.0
    assert (built(changed)[0] - built(hidden)[0])[0, 0].abs().max() > 1e-6
    with torch.no_grad():
        built.gate.fill_(-1000.0)
    assert torch.equal(built(changed)[0][0, :16], built(hidden)[0][0, :16]), "a closed gate reads no memory"


def draws(kernel: str, orthogonal: bool, number: int, rows: int = 16, size: float = 0.6) -> tuple[Tensor, Tensor]:
    """Attention outputs of some drawings of features, (number, L, 8), and the exact one; queries
    and keys of standard deviation `size`."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        scale * torch.randn(1, 1, 24, 8, generator=generator, dtype=torch.float64) for scale in (size, size, 1.0)
    )
    real = torch.ones(1, 24, dtype=torch.bool)
    outs = []
    for _ in range(number):
        projection = draw_projection(
            rows // 2 if kernel == "trigonometric" else rows, 8, orthogonal, generator
        ).double()
        outs.append(random_feature_attention(q, k, v, projection, real, kernel)[0, 0])
    return torch.stack(outs), torch.nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]


def error(kernel: str, orthogonal: bool, **options: float) -> float:
    """Mean squared error over 300 drawings."""
    outs, exact = draws(kernel, orthogonal, 300, **options)  # type: ignore[arg-type]
    return (outs - exact).square().mean().item()


def kernel_estimates(kernel: str, orthogonal: bool, number: int) -> tuple[Tensor, Tensor]:
    """Estimates of exp(q·k) by some drawings, (number,), and its value."""
    generator = torch.Generator().manual_seed(4)
    q, k = (0.4 * torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found = []
    for _ in range(number):
        projection = draw_projection(8 if kernel == "trigonometric" else 16, 8, orthogonal, generator).double()
        query_feature, key_feature = (naive.random_features(x[0, 0, 0], projection, kernel) for x in (q, k))
        found.append(query_feature @ key_feature)
    return torch.stack(found), ((q * k).sum() / math.sqrt(8)).exp()


def test_keys_that_are_not_seen_do_not_count_unless_none_is():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, HEADS, 4, D, dtype=torch.float64) for _ in range(3))
    seen = torch.tensor([[True, True, False, True], [False] * 4])
    out = masked_attention(query, key, value, seen, 0.0)
    for row, kept in ((0, [0, 1, 3]), (1, [0, 1, 2, 3])):
        expected = [naive.dense(query[row, h], key[row, h, kept], value[row, h, kept]) for h in range(HEADS)]
        torch.testing.assert_close(out[row], torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("kernel", ["softmax", "trigonometric"])
def test_the_kernel_is_estimated_without_bias(kernel, orthogonal):
    found, exact = kernel_estimates(kernel, orthogonal, 4000)
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(len(found)) + 1e-9


def test_orthogonal_features_err_less_than_independent_ones():
    assert error("softmax", True) < 0.95 * error("softmax", False)


def test_positive_features_err_less_than_trigonometric_ones_where_scores_differ():
    assert error("softmax", True, size=2.0) < 0.5 * error("trigonometric", True, size=2.0)


def test_more_features_and_means_over_drawings_come_closer_to_softmax_attention():
    assert error("softmax", True, rows=256) < 0.2 * error("softmax", True, rows=16)
    outs, exact = draws("softmax", True, 300, rows=256)
    assert (outs.mean(0) - exact).square().mean() < 0.1 * (outs - exact).square().mean()


def test_projections_are_redrawn_on_schedule_saved_and_a_function_of_the_step():
    built = module(PerformerAttention(8, redraw_every=3)).train()
    hidden, _ = batch([5])

    def update(attention):
        (attention(hidden)[0].sum() + attention(2 * hidden)[0].sum()).backward()  # several forwards make one update
        count_update(attention)

    seen = [built.projection.clone()]
    for _ in range(7):
        update(built)
        seen.append(built.projection.clone())
    changes = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changes == [False, False, True, False, False, True, False]
    resumed = module(PerformerAttention(8, redraw_every=3)).train()
    resumed.load_state_dict(built.state_dict())
    for _ in range(3):
        update(built), update(resumed)
    assert torch.equal(built.projection, resumed.projection) and not torch.equal(built.projection, seen[-1])


@pytest.mark.parametrize(
    "attention",
    [PerformerAttention(8), LinformerAttention(6), InfiniAttention(8)],
    ids=["performer", "linformer", "infini"],
)
def test_dropout_of_attention_falls_in_training_alone(attention):
    built = module(attention)
    built.dropout = 0.5
    hidden, _ = batch([20])
    assert not torch.equal(built.train()(hidden)[0], built(hidden)[0])
    assert torch.equal(built.eval()(hidden)[0], built(hidden)[0])


def test_the_gate_has_a_gradient_where_a_text_is_one_segment():
    built = module(InfiniAttention(30)).train()
    built(batch([17])[0])[0].sum().backward()
    assert built.gate.grad is not None and not built.gate.grad.any()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PerformerAttention(0), "num_features"),
        (lambda: PerformerAttention(5, "trigonometric"), "even"),
        (lambda: PerformerAttention(8, redraw_every=-1), "redraw_every"),
        (lambda: LinformerAttention(0), "projected_tokens"),
        (lambda: module(LinformerAttention(41)), "40 positions"),
        (lambda: InfiniAttention(0), "segment"),
        (
            lambda: module(LinformerAttention(6))(torch.zeros(1, 41, WIDTH, dtype=torch.float64)),
            "exceeds the 40 positions",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
