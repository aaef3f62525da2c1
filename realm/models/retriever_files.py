"""Saving and loading retrievers in the folder layout of sentence-transformers, which loads them
without changes.

A tower's weights, config and tokenizer, its pooling, projection and normalization are one module
folder each; `retriever.json` adds the settings that sentence-transformers does not store.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from realm.models.retriever import Retriever, Tower
from realm.models.saved import REMEDY, reading_model
from realm.runtime.publish import read_json, write_manifest
from realm.text.tokenizer import load_tokenizer


def save_retriever(
    retriever: Retriever, tokenizer: PreTrainedTokenizerBase, path: Path, max_query_tokens: int, max_passage_tokens: int
) -> None:
    """Save to a folder that `load_retriever` and `SentenceTransformer(path)` both load (safetensors
    and JSON, no pickle).

    With two towers the folder is a sentence-transformers Router: `encode_query` and
    `encode_document` select the tower.
    """
    path.mkdir(parents=True, exist_ok=True)
    if retriever.shared:
        modules = _save_tower(retriever.query_tower, tokenizer, path, "", max(max_query_tokens, max_passage_tokens))
        _write_json(path / "modules.json", modules)
    else:
        types, structure = {}, {}
        for route, tower, tokens in (
            ("query", retriever.query_tower, max_query_tokens),
            ("document", retriever.passage_tower, max_passage_tokens),
        ):
            modules = _save_tower(tower, tokenizer, path, f"{route}_", tokens)
            types.update({module["path"]: module["type"] for module in modules})
            structure[route] = [module["path"] for module in modules]
        parameters = {"default_route": "document", "allow_empty_key": True}
        _write_json(path / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
        _write_json(path / "modules.json", [_module_entry(0, "", "sentence_transformers.models.Router")])
    _write_json(
        path / "config_sentence_transformers.json", {"model_type": "SentenceTransformer", "similarity_fn_name": "dot"}
    )
    settings = {
        "shared_tower": retriever.shared,
        "pooling": retriever.query_tower.pooling,
        "projection_dim": None if isinstance(retriever.query_tower.projection, nn.Identity) else retriever.dim,
        "normalize": retriever.query_tower.normalize,
        "temperature": retriever.temperature,
        "max_query_tokens": max_query_tokens,
        "max_passage_tokens": max_passage_tokens,
    }
    _write_json(path / "retriever.json", settings)
    write_manifest(path, {"format": 1})


def load_retriever(path: Path) -> tuple[Retriever, PreTrainedTokenizerBase]:
    """Load a retriever saved by `save_retriever`, in evaluation mode, and its tokenizer.

    Raises UserError if the folder is not an exported retriever, or if a file of it is damaged (see
    `realm.models.saved`).
    """

    def load_tower(prefix: str) -> Tower:
        transformer = path / f"{prefix}0_Transformer" if prefix else path
        bert = BertModel(BertConfig.from_json_file(transformer / "config.json"), add_pooling_layer=False)
        bert.load_state_dict(load_file(transformer / "model.safetensors"))
        tower = Tower(bert, settings["pooling"], settings["projection_dim"], settings["normalize"])
        if settings["projection_dim"] is not None:
            dense = load_file(path / f"{prefix}2_Dense" / "model.safetensors")
            tower.projection.load_state_dict({name.removeprefix("linear."): value for name, value in dense.items()})
        return tower

    with reading_model(path, "retriever"):
        settings = read_retriever_settings(path)
        if settings["shared_tower"]:
            tower = load_tower("")
            retriever = Retriever(tower, tower, settings["temperature"])
            tokenizer = load_tokenizer(str(path))
        else:
            retriever = Retriever(load_tower("query_"), load_tower("document_"), settings["temperature"])
            tokenizer = load_tokenizer(str(path / "query_0_Transformer"))
    return retriever.eval(), tokenizer


def read_retriever_settings(path: Path) -> dict[str, Any]:
    """The `retriever.json` of an exported retriever. Raises UserError if it cannot be read."""
    settings: dict[str, Any] = read_json(path / "retriever.json", REMEDY)
    return settings


def _save_tower(
    tower: Tower, tokenizer: PreTrainedTokenizerBase, path: Path, prefix: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Save one tower as modules of sentence-transformers; returns their entries of modules.json."""
    package = "sentence_transformers.models"
    transformer = path / f"{prefix}0_Transformer" if prefix else path
    transformer.mkdir(exist_ok=True)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tower.bert.state_dict().items()},
        transformer / "model.safetensors",
        {"format": "pt"},
    )
    tower.bert.config.architectures = ["BertModel"]
    tower.bert.config.save_pretrained(transformer)
    tokenizer.save_pretrained(transformer)
    # The weights have no pooler; without this argument, loading would report its weights missing.
    model_args = {"add_pooling_layer": False}
    _write_json(
        transformer / "sentence_bert_config.json",
        {"max_seq_length": max_tokens, "do_lower_case": False, "model_args": model_args},
    )
    # All tokens of a passage have token type 0, so the tokenizer must not return token types.
    tokenizer_config = json.loads((transformer / "tokenizer_config.json").read_text())
    tokenizer_config |= {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": max_tokens}
    _write_json(transformer / "tokenizer_config.json", tokenizer_config)
    modules = [_module_entry(0, transformer.name if prefix else "", f"{package}.Transformer")]

    def add(name: str, config: dict[str, Any]) -> Path:
        folder = path / f"{prefix}{len(modules)}_{name}"
        folder.mkdir(exist_ok=True)
        if config:
            _write_json(folder / "config.json", config)
        modules.append(_module_entry(len(modules), folder.name, f"{package}.{name}"))
        return folder

    hidden = tower.bert.config.hidden_size
    add(
        "Pooling",
        {
            "word_embedding_dimension": hidden,
            "pooling_mode_cls_token": tower.pooling == "cls",
            "pooling_mode_mean_tokens": tower.pooling == "mean",
        },
    )
    if isinstance(tower.projection, nn.Linear):
        dense = {
            "in_features": hidden,
            "out_features": tower.dim,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        weights = {
            f"linear.{name}": value.detach().cpu().contiguous() for name, value in tower.projection.state_dict().items()
        }
        save_file(weights, add("Dense", dense) / "model.safetensors")
    if tower.normalize:
        add("Normalize", {})
    return modules


def _module_entry(number: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
