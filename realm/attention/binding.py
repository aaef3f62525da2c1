"""How a variant gets into a transformers BERT: the one file that knows transformers' internals."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertModel, PreTrainedModel

from realm.attention.dense import DenseAttention, dense_attention
from realm.attention.projected import ForeignHeads, ProjectedSelfAttention, may_be_padded
from realm.attention.variant import AttentionConfig
from realm.errors import UserError

_DENSE = "realm_dense"
_REPLACED = "realm_replaced_module"
_DISPATCHED = "realm_dispatched"
_VARIANT = "realm_variant"
"""Name under which a variant lives in the attention module of a family other than BERT."""


def _padding_mask(batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **_: object) -> Tensor | None:
    """What transformers hands to our attentions as mask: the plain (B, L) padding mask instead
    of a dense (B, 1, L, L)."""
    return attention_mask


def _padding_mask_if_padded(
    batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **_: object
) -> Tensor | None:
    """The same, or None where nothing is padded; on a GPU the look would cost a synchronisation,
    and compiled code cannot look."""
    if attention_mask is None or torch.compiler.is_compiling() or may_be_padded(attention_mask):
        return attention_mask
    return None


def _never_called(*_: object, **__: object) -> tuple[Tensor, None]:
    raise AssertionError("a self-attention module that was to be replaced is still in place")


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
    """The variant bound to a module that makes queries, keys and values itself; layers that are
    local by themselves stay so."""
    if sliding_window is not None:
        return dense_attention(
            module, query_BHLD, key_BHLD, value_BHLD, mask_BL, scaling, sliding_window=sliding_window, **options
        )
    B, _, L, D = query_BHLD.shape
    if scaling is not None:  # variants divide by √D
        query_BHLD = query_BHLD * (scaling * D**0.5)
    real_BL = torch.ones(B, L, dtype=torch.bool, device=query_BHLD.device) if mask_BL is None else mask_BL.bool()
    variant: ProjectedSelfAttention = getattr(module, _VARIANT)
    return variant.attend(query_BHLD, key_BHLD, value_BHLD, real_BL).transpose(1, 2), None


AttentionInterface.register(_DENSE, dense_attention)
AttentionInterface.register(_DISPATCHED, _dispatched)
AttentionMaskInterface.register(_DISPATCHED, _padding_mask)
AttentionMaskInterface.register(_DENSE, _padding_mask_if_padded)
AttentionInterface.register(_REPLACED, _never_called)
AttentionMaskInterface.register(_REPLACED, _padding_mask)


def bind_attention(bert: PreTrainedModel, attention: AttentionConfig) -> None:
    """Put `attention` into every layer of `bert`, in place, keeping its pretrained projections.

    For callers of the library `bert` may be of another family of encoders (ModernBERT) that makes
    queries, keys and values itself and dispatches to transformers' attention interface; its layers
    with a window of their own keep it. Must be called again after a model is built anew: the choice
    is not saved in transformers' own config. Raises UserError for a variant that needs more than
    queries, keys and values in such a family, and for decoders.
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
    """Let the layers of `model` that attend to everything call a variant each; a model that is
    refused stays as it was."""
    family, kind = type(model).__name__, type(attention).__name__
    modules = _dispatching_modules(model)
    if not modules:
        raise UserError(
            f"{family} has no layer that dispatches to transformers' attention interface; use a BERT, or {family} with dense attention."
        )
    variants = attention.replace_all([heads for _, heads in modules])
    if not all(isinstance(variant, ProjectedSelfAttention) for variant in variants):
        raise UserError(
            f"{kind} needs projections of its own, which {family} does not give; use it with a BERT, or choose another variant."
        )
    for (module, _), variant in zip(modules, variants, strict=True):
        setattr(module, _VARIANT, variant.to(model.device).train(module.training))
    model.set_attn_implementation(_DISPATCHED)


def _dispatching_modules(model: PreTrainedModel) -> list[tuple[nn.Module, ForeignHeads]]:
    """The attention modules without a window of their own, in the order in which a text passes
    them; the model itself is asked, by a short text."""
    found: list[tuple[nn.Module, ForeignHeads]] = []

    def record(
        module: Any, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, *_: object, **options: Any
    ) -> tuple[Tensor, None]:
        if getattr(module, "is_causal", False) or key_BHLD.shape != query_BHLD.shape:
            raise UserError(
                f"{type(model).__name__} is causal, or shares keys between heads; the variants are for encoders that do neither."
            )
        if options.get("sliding_window") is None:
            dropout = module.attention_dropout if isinstance(getattr(module, "attention_dropout", None), float) else 0.0
            found.append((module, ForeignHeads(model.config, query_BHLD.shape[1], query_BHLD.shape[3], dropout)))
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
    """Let `bert` read `max_positions` tokens: learned positions past the end repeat the learned
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
