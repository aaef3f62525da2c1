"""Performer, linformer and infini-attention against the naive references in double precision:
outputs, gradients, padding, lengths, bf16."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
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


@pytest.fixture(params=["one chunk", "chunks of 5"], autouse=True, scope="module")
def chunk_size(request):
    """Texts of a few tokens in one chunk, like short texts, and in several, like long ones."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "chunks of 5":
            patch.setattr(performer, "CHUNK", 5)
        yield


Reference = Callable[[nn.Module, int, Tensor, Tensor, Tensor], Tensor]
"""From module, head number, and queries, keys and values of one text and head, (L, D) each, to
outputs (L, D)."""


def build_module(attention: AttentionConfig) -> nn.Module:
    """The second of two layers in float64, all parameters changed from their initial values."""
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


def performer_reference(module, head, query, key, value):
    return naive.performer(query, key, value, module.projection.double(), module.config.kernel)


def linformer_reference(module, head, query, key, value):
    sharing, head = module.config.sharing, head if module.config.sharing == "none" else 0
    key_projection = module.owner[0].key_projection[head]
    value_projection = module.value_projection[head] if sharing in ("none", "headwise") else key_projection
    return naive.linformer(query, key, value, key_projection, value_projection)


def infini_reference(module, head, query, key, value):
    gate = torch.sigmoid(module.gate[head])
    return naive.infini(query, key, value, module.config.segment, module.config.update, gate)


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
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def naive_outputs(module, reference: Reference, hidden_BLW: Tensor, lengths: list[int]) -> Tensor:
    """Outputs of the reference for the real tokens of all texts, (tokens, W)."""
    outputs = []
    for b, length in enumerate(lengths):
        hidden = hidden_BLW[b, :length]
        q, k, v = (project(hidden).split(D, 1) for project in (module.query, module.key, module.value))
        outputs.append(torch.cat([reference(module, head, q[head], k[head], v[head]) for head in range(HEADS)], 1))
    return torch.cat(outputs)


def batch(lengths: list[int], padding: int = 0, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, W) and token mask (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    L = max(lengths) + padding
    hidden = torch.randn(len(lengths), L, WIDTH, generator=generator, dtype=torch.float64)
    return hidden, torch.arange(L) < torch.tensor(lengths)[:, None]


def gradients(module, out: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Gradients of a random linear combination of the outputs with respect to the hidden states and
    all parameters."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    named = [*module.named_parameters(), ("hidden", hidden)]
    if isinstance(module, LinformerSelfAttention) and module.owner[0] is not module:
        named.append(("shared projection", module.owner[0].key_projection))
    grads = torch.autograd.grad((out * weight).sum(), [parameter for _, parameter in named], allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named, grads, strict=True)
    }


@every_variant
def test_outputs_and_gradients_equal_the_naive_reference(variant):
    attention, reference = VARIANTS[variant]
    module, lengths = build_module(attention), [11, 4, 1, 8]
    hidden, mask = batch(lengths, padding=2)
    hidden.requires_grad_()
    out = module(hidden, mask.long())[0][mask]
    expected = naive_outputs(module, reference, hidden, lengths)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-8)
    found, wanted = gradients(module, out, hidden), gradients(module, expected, hidden)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-10, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found["hidden"].abs().max() > 1e-3


@every_variant
@given(lengths=st.lists(st.integers(1, 23), min_size=1, max_size=3), padding=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_outputs_do_not_depend_on_padding_or_other_rows(variant, lengths, padding, seed):
    module = build_module(VARIANTS[variant][0])
    hidden, mask = batch(lengths, padding, seed)
    out = module(hidden, mask.long())[0]
    assert out.isfinite().all(), "also on padding"
    changed = torch.where(mask[..., None], hidden, torch.full_like(hidden, 50.0))
    torch.testing.assert_close(module(changed, mask.long())[0][mask], out[mask], atol=1e-9, rtol=1e-9)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(out[b, :length], module(hidden[b : b + 1, :length])[0][0], atol=1e-9, rtol=1e-9)


@every_variant
def test_bf16_outputs_are_close(variant):
    module = build_module(VARIANTS[variant][0])
    hidden, mask = batch([20, 9])
    exact = module(hidden, mask.long())[0][mask]
    module = module.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(hidden.float(), mask.long())[0][mask]
    if "trigonometric" not in variant:  # its denominators may be close to zero
        assert (out.double() - exact).abs().mean() < 0.06 * exact.abs().mean()
    assert out.isfinite().all()


def test_mean_pooling_averages_bins():
    pooling = mean_pooling(3, 8)
    third = pytest.approx(1 / 3)
    assert pooling.tolist() == [
        [0.5, 0.5, 0, 0, 0, 0, 0, 0],
        [0, 0, third, third, third, 0, 0, 0],
        [0, 0, 0, 0, 0, third, third, third],
    ]


def test_layers_that_share_a_projection_save_it_once():
    config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=POSITIONS)
    first, second = LinformerAttention(6, "layerwise").replace_all([BertSelfAttention(config) for _ in range(2)])
    assert "key_projection" in first.state_dict() and "key_projection" not in second.state_dict()
    hidden, _ = batch([20])
    before = second.double()(hidden)[0]
    with torch.no_grad():
        first.double().key_projection.mul_(2)
    assert not torch.allclose(second(hidden)[0], before), "the second layer uses the projection of the first"


def test_a_segment_as_long_as_the_text_equals_dense_attention():
    module = build_module(InfiniAttention(30))
    hidden, mask = batch([17, 30])
    out = module(hidden, mask.long())[0]
    for b, length in enumerate((17, 30)):
        q, k, v = (
            part(hidden[b, :length]).view(length, HEADS, D).transpose(0, 1)
            for part in (module.query, module.key, module.value)
        )
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, WIDTH)
        torch.testing.assert_close(out[b, :length], dense, atol=1e-10, rtol=1e-8)


def test_a_token_depends_on_distant_segments_through_the_memory():
    module = build_module(InfiniAttention(4))
    hidden, _ = batch([20])
    changed = hidden.clone()
    changed[0, 19] += 1.0
    assert (module(changed)[0] - module(hidden)[0])[0, 0].abs().max() > 1e-6
    with torch.no_grad():
        module.gate.fill_(-1000.0)
    assert torch.equal(module(changed)[0][0, :16], module(hidden)[0][0, :16]), "a closed gate does not read the memory"


def draw_outputs(
    kernel: str, orthogonal: bool, num_draws: int, rows: int = 16, std: float = 0.6
) -> tuple[Tensor, Tensor]:
    """Attention outputs for several projections, (num_draws, L, 8), and the exact output; `std` is
    the standard deviation of queries and keys."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (scale * torch.randn(1, 1, 24, 8, generator=generator, dtype=torch.float64) for scale in (std, std, 1.0))
    mask = torch.ones(1, 24, dtype=torch.bool)
    outs = []
    for _ in range(num_draws):
        projection = draw_projection(
            rows // 2 if kernel == "trigonometric" else rows, 8, orthogonal, generator
        ).double()
        outs.append(random_feature_attention(q, k, v, projection, mask, kernel)[0, 0])
    return torch.stack(outs), torch.nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]


def mean_squared_error(kernel: str, orthogonal: bool, **options: float) -> float:
    """Mean squared error over 300 projections."""
    outs, exact = draw_outputs(kernel, orthogonal, 300, **options)  # type: ignore[arg-type]
    return (outs - exact).square().mean().item()


def kernel_estimates(kernel: str, orthogonal: bool, num_draws: int) -> tuple[Tensor, Tensor]:
    """Estimates of exp(q·k / √D) from several projections, (num_draws,), and the exact value."""
    generator = torch.Generator().manual_seed(4)
    q, k = (0.4 * torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    estimates = []
    for _ in range(num_draws):
        projection = draw_projection(8 if kernel == "trigonometric" else 16, 8, orthogonal, generator).double()
        query_feature, key_feature = (naive.random_features(x[0, 0, 0], projection, kernel) for x in (q, k))
        estimates.append(query_feature @ key_feature)
    return torch.stack(estimates), ((q * k).sum() / math.sqrt(8)).exp()


def test_masked_keys_are_ignored_unless_all_keys_are_masked():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, HEADS, 4, D, dtype=torch.float64) for _ in range(3))
    key_mask = torch.tensor([[True, True, False, True], [False] * 4])
    out = masked_attention(query, key, value, key_mask, 0.0)
    for row, kept in ((0, [0, 1, 3]), (1, [0, 1, 2, 3])):
        expected = [naive.dense(query[row, h], key[row, h, kept], value[row, h, kept]) for h in range(HEADS)]
        torch.testing.assert_close(out[row], torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("kernel", ["softmax", "trigonometric"])
def test_kernel_estimates_are_unbiased(kernel, orthogonal):
    estimates, exact = kernel_estimates(kernel, orthogonal, 4000)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(len(estimates)) + 1e-9


def test_orthogonal_features_have_a_lower_error_than_independent_ones():
    assert mean_squared_error("softmax", True) < 0.95 * mean_squared_error("softmax", False)


def test_positive_features_have_a_lower_error_than_trigonometric_ones_if_scores_differ():
    assert mean_squared_error("softmax", True, std=2.0) < 0.5 * mean_squared_error("trigonometric", True, std=2.0)


def test_more_features_and_averaging_over_projections_reduce_the_error():
    assert mean_squared_error("softmax", True, rows=256) < 0.2 * mean_squared_error("softmax", True, rows=16)
    outs, exact = draw_outputs("softmax", True, 300, rows=256)
    assert (outs.mean(0) - exact).square().mean() < 0.1 * (outs - exact).square().mean()


def test_projections_are_redrawn_on_schedule_and_resume_from_saved_state():
    module = build_module(PerformerAttention(8, redraw_every=3)).train()
    hidden, _ = batch([5])

    def update(attention):
        (attention(hidden)[0].sum() + attention(2 * hidden)[0].sum()).backward()  # one update for two forward passes
        count_update(attention)

    projections = [module.projection.clone()]
    for _ in range(7):
        update(module)
        projections.append(module.projection.clone())
    changes = [not torch.equal(a, b) for a, b in pairwise(projections)]
    assert changes == [False, False, True, False, False, True, False]
    resumed = build_module(PerformerAttention(8, redraw_every=3)).train()
    resumed.load_state_dict(module.state_dict())
    for _ in range(3):
        update(module), update(resumed)
    assert torch.equal(module.projection, resumed.projection) and not torch.equal(module.projection, projections[-1])


@pytest.mark.parametrize(
    "attention",
    [PerformerAttention(8), LinformerAttention(6), InfiniAttention(8)],
    ids=["performer", "linformer", "infini"],
)
def test_dropout_is_applied_only_in_training(attention):
    module = build_module(attention)
    module.dropout = 0.5
    hidden, _ = batch([20])
    assert not torch.equal(module.train()(hidden)[0], module(hidden)[0])
    assert torch.equal(module.eval()(hidden)[0], module(hidden)[0])


def test_the_gate_has_a_gradient_if_the_text_is_one_segment():
    module = build_module(InfiniAttention(30)).train()
    module(batch([17])[0])[0].sum().backward()
    assert module.gate.grad is not None and not module.gate.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerformerAttention(0), "num_features"),
        (lambda: PerformerAttention(5, "trigonometric"), "even"),
        (lambda: PerformerAttention(8, redraw_every=-1), "redraw_every"),
        (lambda: LinformerAttention(0), "projected_tokens"),
        (lambda: build_module(LinformerAttention(41)), "40 positions"),
        (lambda: InfiniAttention(0), "segment"),
        (
            lambda: build_module(LinformerAttention(6))(torch.zeros(1, 41, WIDTH, dtype=torch.float64)),
            "exceeds the 40 positions",
        ),
    ],
)
def test_invalid_settings_raise(make, message):
    with pytest.raises(UserError, match=message):
        make()
