"""Self-attention variants of the reader, one file each; the registry is the config schema
(`attention: {type: …}`).

A variant is a frozen dataclass registered under its name. `replace(attention, layer)` receives each
of BERT's self-attention modules and returns the module to use in its place; a variant whose layers
share parameters overrides `replace_all` instead. Nothing here imports the rest of the project; only
`binding` depends on transformers' internals.
"""

from realm.attention import dense, infini, linformer, longformer, performer  # importing a variant registers it
from realm.attention.variant import AttentionConfig, CountsUpdates, count_update

__all__ = [
    "AttentionConfig",
    "CountsUpdates",
    "count_update",
    "dense",
    "infini",
    "linformer",
    "longformer",
    "performer",
]
