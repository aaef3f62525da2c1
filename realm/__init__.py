"""Retrieval-augmented pretraining (REALM, Guu et al. 2020): a BERT retriever and a long-context
reader trained end to end with an asynchronously refreshed FAISS index.

The names below are the public API; everything else may change between versions. Each is imported
on first use, so that `import realm` is instant and loads neither torch nor transformers:

    import realm

    retriever, tokenizer = realm.load_retriever(Path("runs/demo/pretrain/model/retriever"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from index.search import PassageIndex as PassageIndex
    from realm.attention import AttentionConfig as AttentionConfig
    from realm.attention import count_update as count_update
    from realm.attention.binding import bind_attention as bind_attention
    from realm.attention.binding import extend_positions as extend_positions
    from realm.attention.dense import DenseAttention as DenseAttention
    from realm.attention.infini import InfiniAttention as InfiniAttention
    from realm.attention.linformer import LinformerAttention as LinformerAttention
    from realm.attention.longformer import LongformerAttention as LongformerAttention
    from realm.attention.performer import PerformerAttention as PerformerAttention
    from realm.corpus.prepared import PreparedCorpus as PreparedCorpus
    from realm.errors import UserError as UserError
    from realm.models.reader import Reader as Reader
    from realm.models.reader import load_reader as load_reader
    from realm.models.retriever import Retriever as Retriever
    from realm.models.retriever_files import load_retriever as load_retriever
    from realm.run.config import RealmConfig as RealmConfig
    from realm.run.config_file import load_config as load_config
    from realm.run.folder import Run as Run
    from realm.runtime.telemetry import read_metrics as read_metrics
    from realm.runtime.versions import versions_in as versions_in
    from realm.spans.tagger import SpanConfig as SpanConfig
    from realm.spans.tagger import SpanTagger as SpanTagger

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "DenseAttention",
    "InfiniAttention",
    "LinformerAttention",
    "LongformerAttention",
    "PassageIndex",
    "PerformerAttention",
    "PreparedCorpus",
    "Reader",
    "RealmConfig",
    "Retriever",
    "Run",
    "SpanConfig",
    "SpanTagger",
    "UserError",
    "__version__",
    "bind_attention",
    "count_update",
    "extend_positions",
    "load_config",
    "load_reader",
    "load_retriever",
    "read_metrics",
    "versions_in",
]

_MODULE_OF = {
    "AttentionConfig": "realm.attention",
    "DenseAttention": "realm.attention.dense",
    "InfiniAttention": "realm.attention.infini",
    "LinformerAttention": "realm.attention.linformer",
    "LongformerAttention": "realm.attention.longformer",
    "PassageIndex": "index.search",
    "PerformerAttention": "realm.attention.performer",
    "PreparedCorpus": "realm.corpus.prepared",
    "Reader": "realm.models.reader",
    "RealmConfig": "realm.run.config",
    "Retriever": "realm.models.retriever",
    "Run": "realm.run.folder",
    "SpanConfig": "realm.spans.tagger",
    "SpanTagger": "realm.spans.tagger",
    "UserError": "realm.errors",
    "bind_attention": "realm.attention.binding",
    "count_update": "realm.attention",
    "extend_positions": "realm.attention.binding",
    "load_config": "realm.run.config_file",
    "load_reader": "realm.models.reader",
    "load_retriever": "realm.models.retriever_files",
    "read_metrics": "realm.runtime.telemetry",
    "versions_in": "realm.runtime.versions",
}
"""Module of each public name, imported when the name is first used (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # later uses find it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
