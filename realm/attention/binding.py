"""Binding attention variants to transformers models: the only file that depends on transformers'
internals."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertModel, PreTrainedModel

from realm.attention.dense import DenseAttention, dense_attention
from realm.attention.projected import ExternalProjections, ProjectedSelfAttention, may_be_padded
from realm.attention.variant import AttentionConfig
from realm.errors import UserError

_DENSE = "realm_dense"
_REPLACED = "realm_replaced_module"
_DISPATCHED = "realm_dispatched"
_VARIANT = "realm_variant"
"""Attribute that stores the variant in the attention modules of model families other than BERT."""


def _padding_mask(batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **_: object) -> Tensor | None:
    """The mask that transformers passes to the variants: the (B, L) padding mask instead of a dense
    (B, 1, L, L) one."""
    return attention_mask


def _padding_mask_if_padded(
    batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **_: object
) -> Tensor | None:
    """The padding mask, or None if nothing is padded. On a GPU the check would cost a
    synchronization, and compiled code cannot check; both keep the mask."""
    if attention_mask is None or torch.compiler.is_compiling() or may_be_padded(attention_mask):
        return attention_mask
    return None


def _never_called(*_: object, **__: object) -> tuple[Tensor, None]:
    raise AssertionError("a self-attention module was not replaced")


def _dispatched(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    mask_BL: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Call the variant bound to a module that projects queries, keys and values itself; layers with
    a sliding window keep it."""
    if sliding_window is not None:
        return dense_attention(
            module, query_BHLD, key_BHLD, value_BHLD, mask_BL, scaling, sliding_window=sliding_window, **options
        )
    B, _, L, D = query_BHLD.shape
    if scaling is not None:  # variants scale by 1/√D
        query_BHLD = query_BHLD * (scaling * D**0.5)
    token_mask_BL = torch.ones(B, L, dtype=torch.bool, device=query_BHLD.device) if mask_BL is None else mask_BL.bool()
    variant: ProjectedSelfAttention = getattr(module, _VARIANT)
    return variant.attend(query_BHLD, key_BHLD, value_BHLD, token_mask_BL).transpose(1, 2), None


AttentionInterface.register(_DENSE, dense_attention)
AttentionInterface.register(_DISPATCHED, _dispatched)
AttentionMaskInterface.register(_DISPATCHED, _padding_mask)
AttentionMaskInterface.register(_DENSE, _padding_mask_if_padded)
AttentionInterface.register(_REPLACED, _never_called)
AttentionMaskInterface.register(_REPLACED, _padding_mask)


def bind_attention(bert: PreTrainedModel, attention: AttentionConfig) -> None:
    """Replace the self-attention of every layer of `bert` with `attention`, in place, keeping the
    pretrained projections.

    Callers of the library may pass an encoder of another family (ModernBERT) that projects queries,
    keys and values itself and dispatches to transformers' attention interface; its sliding-window
    layers are not changed. Call this again after rebuilding a model: transformers' config does not
    store the variant. Raises UserError for a decoder, and in such a family for a variant that needs
    more than queries, keys and values.
    """
    if isinstance(attention, DenseAttention):
        bert.set_attn_implementation(_DENSE)
        return
    if not isinstance(bert, BertModel):
        _bind_dispatching(bert, attention)
        return
    layers: Any = bert.encoder.layer
    for layer, module in zip(layers, attention.replace_all([layer.attention.self for layer in layers]), strict=True):
        layer.attention.self = module.to(bert.device).train(layer.training)
    bert.set_attn_implementation(_REPLACED)


def _bind_dispatching(model: PreTrainedModel, attention: AttentionConfig) -> None:
    """Bind a variant to each layer of `model` with full attention; if it raises, the model is
    unchanged."""
    family, variant_name = type(model).__name__, type(attention).__name__
    modules = _find_dispatching_modules(model)
    if not modules:
        raise UserError(
            f"{family} has no full-attention layer that dispatches to transformers' attention interface; "
            f"use a BERT model, or {family} with dense attention."
        )
    variants = attention.replace_all([heads for _, heads in modules])
    if not all(isinstance(variant, ProjectedSelfAttention) for variant in variants):
        raise UserError(
            f"{variant_name} needs additional projections, which are not supported in {family}; "
            "use it with a BERT model, or choose another variant."
        )
    for (module, _), variant in zip(modules, variants, strict=True):
        setattr(module, _VARIANT, variant.to(model.device).train(module.training))
    model.set_attn_implementation(_DISPATCHED)


def _find_dispatching_modules(model: PreTrainedModel) -> list[tuple[nn.Module, ExternalProjections]]:
    """The attention modules without a sliding window, in the order of the forward pass; found by a
    forward pass over a short text."""
    found: list[tuple[nn.Module, ExternalProjections]] = []

    def record(
        module: Any, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, *_: object, **options: Any
    ) -> tuple[Tensor, None]:
        if getattr(module, "is_causal", False) or key_BHLD.shape != query_BHLD.shape:
            raise UserError(
                f"{type(model).__name__} is causal or shares keys between heads; "
                "attention variants require an encoder with one key per head."
            )
        if options.get("sliding_window") is None:
            dropout = module.attention_dropout if isinstance(getattr(module, "attention_dropout", None), float) else 0.0
            found.append((module, ExternalProjections(model.config, query_BHLD.shape[1], query_BHLD.shape[3], dropout)))
        return torch.zeros_like(query_BHLD).transpose(1, 2), None

    before, training = model.config._attn_implementation, model.training
    AttentionInterface.register(_DISPATCHED, record)
    try:
        model.eval().set_attn_implementation(_DISPATCHED)
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device))
    finally:
        AttentionInterface.register(_DISPATCHED, _dispatched)
        model.train(training).set_attn_implementation(before)
    return found


def extend_positions(bert: BertModel, max_positions: int) -> None:
    """Extend `bert` to `max_positions` tokens; new position embeddings are copies of the learned
    ones (Beltagy et al. 2020, section 5)."""
    embeddings = bert.embeddings
    old = embeddings.position_embeddings.weight
    if max_positions <= old.shape[0]:
        return
    copies = -(-max_positions // old.shape[0])
    longer = nn.Embedding(max_positions, old.shape[1], device=old.device, dtype=old.dtype)
    with torch.no_grad():
        longer.weight.copy_(old.repeat(copies, 1)[:max_positions])
    embeddings.position_embeddings = longer
    embeddings.register_buffer(
        "position_ids", torch.arange(max_positions, device=old.device).expand((1, -1)), persistent=False
    )
    embeddings.register_buffer("token_type_ids", torch.zeros_like(embeddings.position_ids), persistent=False)
    bert.config.max_position_embeddings = max_positions
