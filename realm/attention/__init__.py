"""Self-attention variants for the reader, one file each, and `naive.py` with the plain loops that
define them.

A variant is a frozen dataclass registered under its name, which is its `type` in configs
(`attention: {type: …}`). `replace(attention, layer)` receives each of BERT's self-attention modules
and returns its replacement; a variant whose layers share parameters overrides `replace_all`. Within
the project, this package imports only `realm.errors`; only `binding` depends on transformers'
internals.
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
