"""How a variant gets into a transformers BERT: the one file that knows transformers' internals."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertModel

from realm.attention import AttentionConfig
from realm.attention.dense import DenseAttention, dense_attention

_DENSE = "realm_dense"
_REPLACED = "realm_replaced_module"


def _padding_mask(batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **_: object) -> Tensor | None:
    """What transformers hands to our attentions as mask: the plain (B, L) padding mask instead of a dense (B, 1, L, L)."""
    return attention_mask


def _padding_mask_if_padded(batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **_: object) -> Tensor | None:
    """The same, or None where nothing is padded; on a GPU the look would cost a synchronisation."""
    if attention_mask is not None and attention_mask.device.type == "cpu" and bool(attention_mask.all()):
        return None
    return attention_mask


def _never_called(*_: object, **__: object) -> tuple[Tensor, None]:
    raise AssertionError("a self-attention module that was to be replaced is still in place")


AttentionInterface.register(_DENSE, dense_attention)
AttentionMaskInterface.register(_DENSE, _padding_mask_if_padded)
AttentionInterface.register(_REPLACED, _never_called)
AttentionMaskInterface.register(_REPLACED, _padding_mask)


def bind_attention(bert: BertModel, attention: AttentionConfig) -> None:
    """Put `attention` into every layer of `bert`, in place, keeping its pretrained projections.

    Must be called again after a model is built anew: the choice is not saved in transformers' own config.
    """
    if isinstance(attention, DenseAttention):
        bert.set_attn_implementation(_DENSE)
        return
    layers: Any = bert.encoder.layer
    for layer, module in zip(layers, attention.replace_all([layer.attention.self for layer in layers]), strict=True):
        layer.attention.self = module.train(layer.training)
    bert.set_attn_implementation(_REPLACED)


def extend_positions(bert: BertModel, max_positions: int) -> None:
    """Let `bert` read `max_positions` tokens: learned positions past the end repeat the learned ones (Beltagy et al. 2020, section 5)."""
    embeddings = bert.embeddings
    old = embeddings.position_embeddings.weight
    if max_positions <= old.shape[0]:
        return
    copies = -(-max_positions // old.shape[0])
    longer = nn.Embedding(max_positions, old.shape[1], device=old.device, dtype=old.dtype)
    with torch.no_grad():
        longer.weight.copy_(old.repeat(copies, 1)[:max_positions])
    embeddings.position_embeddings = longer
    embeddings.register_buffer("position_ids", torch.arange(max_positions, device=old.device).expand((1, -1)), persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros_like(embeddings.position_ids), persistent=False)
    bert.config.max_position_embeddings = max_positions
