"""Attention variants in a model family that projects queries, keys and values itself and dispatches
to transformers' attention interface: ModernBERT."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model, ModernBertConfig, ModernBertModel

from realm.attention import AttentionConfig
from realm.attention.binding import bind_attention
from realm.attention.dense import DenseAttention
from realm.attention.infini import InfiniAttention
from realm.attention.linformer import LinformerAttention
from realm.attention.longformer import LongformerAttention
from realm.attention.performer import PerformerAttention
from realm.errors import UserError

LENGTHS = (40, 23)


@pytest.fixture
def model() -> ModernBertModel:
    """Four layers, two of them with a sliding window of four tokens on each side."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        global_attn_every_n_layers=2,
        local_attention=8,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return ModernBertModel(config).eval()


def inputs() -> tuple[Tensor, Tensor]:
    ids_BL = torch.randint(5, 50, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask_BL = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids_BL * mask_BL, mask_BL


def hidden_and_gradient(model: ModernBertModel) -> tuple[Tensor, Tensor]:
    ids_BL, mask_BL = inputs()
    model.zero_grad()
    hidden = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state[mask_BL.bool()]
    hidden.square().sum().backward()
    return hidden.detach(), model.embeddings.tok_embeddings.weight.grad.clone()


def test_dense_attention_equals_the_models_own(model):
    expected = hidden_and_gradient(model)
    bind_attention(model, DenseAttention())
    for found, wanted in zip(hidden_and_gradient(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_one_segment_over_the_whole_length_equals_dense_attention(model):
    expected = hidden_and_gradient(model)
    bind_attention(model, InfiniAttention(segment=64))
    for found, wanted in zip(hidden_and_gradient(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "attention",
    [PerformerAttention(16), LinformerAttention(8), InfiniAttention(8)],
    ids=["performer", "linformer", "infini"],
)
def test_variants_replace_only_global_layers_and_are_trained_and_saved_with_the_model(
    model, attention: AttentionConfig
):
    dense, _ = hidden_and_gradient(copy.deepcopy(model))
    bind_attention(model, attention)
    bound = [hasattr(layer.attn, "realm_variant") for layer in model.layers]
    assert bound == [True, False, True, False]
    hidden, _ = hidden_and_gradient(model)
    assert hidden.isfinite().all() and (hidden - dense).abs().max() > 1e-3
    saved = [name for name in model.state_dict() if "realm_variant" in name]
    assert saved and all(p.grad is not None for name, p in model.named_parameters() if "realm_variant" in name)
    ids_BL, mask_BL = inputs()
    with torch.no_grad():
        together = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state[1, : LENGTHS[1]]
        wider = [torch.cat([tensor, torch.zeros(2, 5, dtype=torch.int64)], 1) for tensor in (ids_BL, mask_BL)]
        torch.testing.assert_close(
            model(input_ids=wider[0], attention_mask=wider[1]).last_hidden_state[1, : LENGTHS[1]],
            together,
            atol=1e-5,
            rtol=1e-5,
        )


def test_a_variant_with_additional_projections_raises(model):
    expected, training = hidden_and_gradient(model)[0], model.train().training
    with pytest.raises(
        UserError, match="LongformerAttention needs additional projections, which are not supported in ModernBertModel"
    ):
        bind_attention(model, LongformerAttention(window=4))
    assert model.training == training and torch.equal(hidden_and_gradient(model.eval())[0], expected), "unchanged"


def test_decoders_raise():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    with pytest.raises(UserError, match="GPT2Model is causal"):
        bind_attention(GPT2Model(config), PerformerAttention(8))
