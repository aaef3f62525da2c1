"""The modules that `realm bench attention` measures: the self-attention of every variant and of
installed peers (other implementations), with or without projections.

All have the same number of heads and the same width. If they support global tokens, the first 32
tokens ([CLS] and a question) are global. The output projection of peers, which BERT has outside its
self-attention, is removed. Windows, features and projected lengths are the same in variant and
peer.

Shape legend: B rows (1), L tokens, W hidden width.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from realm.attention import AttentionConfig
from realm.attention.binding import bind_attention
from realm.errors import UserError
from realm.run.config_file import decode
from realm.run.yaml_text import InvalidYaml, parse_yaml

NUM_GLOBAL = 32
_WINDOW, _FEATURES, _SEGMENT = 256, 256, 512
"""Window (tokens visible on each side), random features or projected tokens, and segment of the
peers: the variants' defaults."""

Call = Callable[[Tensor], Tensor]
"""Maps hidden states (1, L, W) to outputs of the same shape."""


@dataclass(frozen=True)
class Shape:
    """Size of the module; without `projections` it uses hidden states as queries, keys and values,
    to measure only the attention."""

    heads: int
    head_width: int
    length: int
    projections: bool = True

    @property
    def width(self) -> int:
        """W."""
        return self.heads * self.head_width


def parse_variant(text: str) -> AttentionConfig:
    """Parse a variant's name, or its config in YAML: `{type: longformer, window: 128}`. Raises
    UserError if there is no such variant or field."""
    known = sorted(AttentionConfig.get_known_choices())
    try:
        tree = parse_yaml(text)
    except InvalidYaml:
        tree = None
    tree = {"type": tree} if isinstance(tree, str) else tree
    if not isinstance(tree, dict) or tree.get("type") not in known:
        raise UserError(
            f"{text!r} is not an attention variant; use one of {', '.join(known)}, or a config such as "
            "'{type: longformer, window: 128}'."
        )
    return decode(AttentionConfig, tree, repr(text))


def registered_variants() -> dict[str, AttentionConfig]:
    """All registered variants with their defaults, dense first."""
    return {
        name: parse_variant(name)
        for name in sorted(AttentionConfig.get_known_choices(), key=lambda name: (name != "dense", name))
    }


def build_variant(attention: AttentionConfig, shape: Shape) -> nn.Module:
    """The variant's module in a BERT layer of this size."""
    config = BertConfig(
        vocab_size=8,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_hidden_layers=1,
        intermediate_size=8,
        max_position_embeddings=shape.length,
        attention_probs_dropout_prob=0.0,
    )
    bert = BertModel(config, add_pooling_layer=False)
    bind_attention(bert, attention)
    layers: Any = bert.encoder.layer
    return layers[0].attention.self


class IdentityProjection(nn.Module):
    """Replaces a projection with the identity, with the output dtype of a projection under
    autocast."""

    def forward(self, hidden_BLW: Tensor) -> Tensor:
        """(1, L, W) to (1, L, W)."""
        device_type = hidden_BLW.device.type
        if not torch.is_autocast_enabled(device_type):
            return hidden_BLW
        return hidden_BLW.to(torch.get_autocast_dtype(device_type))


def prepare_module(module: nn.Module, shape: Shape, device: str) -> Any:
    """Move the module to the device, and remove its projections if `shape` has none."""
    if not shape.projections:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, IdentityProjection())
    return module.to(device)


def global_mask(length: int, device: torch.device | str = "cpu") -> Tensor:
    """True on global tokens, (1, L)."""
    return torch.arange(length, device=device)[None] < NUM_GLOBAL


def call_variant(attention: AttentionConfig, shape: Shape, device: str) -> Call:
    """A callable of the variant's module."""
    module, mask_BL = prepare_module(build_variant(attention, shape), shape, device), global_mask(shape.length, device)
    extra = {"global_mask": mask_BL} if "global_mask" in inspect.signature(module.forward).parameters else {}
    return lambda hidden_BLW: module(hidden_BLW, None, **extra)[0]


def _transformers_longformer(shape: Shape, device: str) -> Call:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        attention_window=[2 * _WINDOW],
        attention_probs_dropout_prob=0.0,
    )
    module = prepare_module(LongformerSelfAttention(config, 0), shape, device)
    length = -(-shape.length // (2 * _WINDOW)) * 2 * _WINDOW
    is_global = global_mask(length, device)
    arguments = {
        "attention_mask": torch.where(is_global, 10000.0, 0.0),
        "is_index_masked": torch.zeros_like(is_global),
        "is_index_global_attn": is_global,
        "is_global_attn": True,
    }
    padding = (0, 0, 0, length - shape.length)
    return lambda hidden_BLW: module(nn.functional.pad(hidden_BLW, padding), **arguments)[0][:, : shape.length]


def _transformers_bigbird(shape: Shape, device: str) -> Call:
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        attention_probs_dropout_prob=0.0,
    )
    module = prepare_module(BigBirdBlockSparseAttention(config, seed=0), shape, device)
    masks = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, shape.length, device=device), config.block_size
    )
    blocked, band, from_mask, to_mask = masks
    return lambda hidden_BLW: module(hidden_BLW, band, from_mask, to_mask, blocked, blocked)[0]


def _performer_pytorch(shape: Shape, device: str) -> Call:
    from performer_pytorch import SelfAttention

    module = SelfAttention(shape.width, heads=shape.heads, dim_head=shape.head_width, nb_features=_FEATURES)
    module.to_out = nn.Identity()
    return prepare_module(module, shape, device)


def _linformer(shape: Shape, device: str) -> Call:
    from linformer import LinformerSelfAttention

    module = LinformerSelfAttention(shape.width, shape.length, k=_FEATURES, heads=shape.heads)
    module.to_out = nn.Identity()
    return prepare_module(module, shape, device)


def _infini_transformer_pytorch(shape: Shape, device: str) -> Call:
    """Its attention is causal: one memory and half of the scores; called segment by segment, as in
    its own model."""
    from infini_transformer_pytorch.infini_transformer import CausalAttention

    module = CausalAttention(shape.width, dim_head=shape.head_width, heads=shape.heads, use_mem_delta_rule=True)
    module.to_out = nn.Identity()
    if not shape.projections:
        raise UserError(
            "infini-transformer-pytorch has one projection for queries, keys and values, which cannot be removed."
        )
    module.to(device)

    def call(hidden_BLW: Tensor) -> Tensor:
        parts, memories = [], None
        for segment in hidden_BLW.split(_SEGMENT, 1):
            out, _, memories = module(segment, past_memories=memories, return_new_memories=True)
            parts.append(out)
        return torch.cat(parts, 1)

    return call


class Peer(NamedTuple):
    """An implementation in another package."""

    package: str
    """The package that must be installed."""
    variant: str | None
    """The variant with the same mechanism, if there is one."""
    build: Callable[[Shape, str], Call]


PEERS = {
    "transformers Longformer": Peer("transformers", "longformer", _transformers_longformer),
    "transformers BigBird": Peer("transformers", None, _transformers_bigbird),
    "performer-pytorch": Peer("performer_pytorch", "performer", _performer_pytorch),
    "linformer (package)": Peer("linformer", "linformer", _linformer),
    "infini-transformer-pytorch (causal)": Peer("infini_transformer_pytorch", "infini", _infini_transformer_pytorch),
}

PEER_OF = {peer.variant: name for name, peer in PEERS.items() if peer.variant is not None}
"""The peer of each variant."""


def installed_peers(wanted: Sequence[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """Names of the peers that can be imported, and for the others the reason why not."""
    installed, missing = [], {}
    for name, peer in PEERS.items():
        if wanted is not None and name not in wanted:
            continue
        try:
            importlib.import_module(peer.package)
            installed.append(name)
        except Exception as error:  # importing another package may raise anything
            missing[name] = f"{type(error).__name__}: {error}"
    return installed, missing


def build_call(case: AttentionConfig | str, shape: Shape, device: str) -> Any:
    """A callable of the variant, or of the peer with this name."""
    return PEERS[case].build(shape, device) if isinstance(case, str) else call_variant(case, shape, device)
