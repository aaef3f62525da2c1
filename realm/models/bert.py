"""BERT encoders: from a checkpoint (hub name or local folder) or from scratch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, BertConfig, BertModel

from realm.errors import UserError
from realm.runtime.hub import require_on_hub
from realm.runtime.section import PathText, Section


@dataclass(frozen=True)
class BertSource(Section):
    """Source of a BERT encoder; the sizes apply only to one trained from scratch."""

    path: PathText | None = None
    """Hub name or local folder of a BERT checkpoint (default: random weights)."""
    layers: int = 12
    """Transformer layers."""
    hidden: int = 768
    """Hidden width."""
    heads: int = 12
    """Attention heads; must divide `hidden`."""
    intermediate: int = 3072
    """Width of the feed-forward layers."""
    dropout: float = 0.1
    """Dropout of hidden states and attention probabilities, also for checkpoints."""
    max_positions: int = 512
    """Learned position embeddings of a model trained from scratch."""
    init_std: float = 0.02
    """Standard deviation of the random initialization."""
    init: Literal["normal", "mimetic"] = "normal"
    """Plain random initialization, or attention initialized with the structure of trained models;
    see `mimetic_init`."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(1, "layers", "hidden", "heads", "intermediate", "max_positions")
        yield from self.at_least(0, "init_std")
        yield from self.at_most(10, "init_std")
        yield from self.below_one("dropout")


def load_bert(source: BertSource, vocab_size: int, pad_id: int, field: str) -> BertModel:
    """The encoder without BERT's pooler. Error messages name the config section `field`.

    Raises UserError if the checkpoint cannot be found or read, is not a BERT model, or has fewer
    embeddings than the tokenizer has wordpieces.
    """
    if source.path is None:
        if source.hidden % source.heads:
            raise UserError(
                f"{field}.hidden ({source.hidden}) is not a multiple of {field}.heads ({source.heads}); "
                "choose a number of heads that divides it."
            )
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=source.hidden,
            num_hidden_layers=source.layers,
            num_attention_heads=source.heads,
            intermediate_size=source.intermediate,
            max_position_embeddings=source.max_positions,
            hidden_dropout_prob=source.dropout,
            attention_probs_dropout_prob=source.dropout,
            initializer_range=source.init_std,
            pad_token_id=pad_id,
        )
        bert = BertModel(config, add_pooling_layer=False)
        if source.init == "mimetic":
            mimetic_init(bert)
        return bert
    config = bert_config(source.path, field)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = source.dropout
    try:
        with suppress_loading_reports():
            # Parameters are fp32 whatever dtype the checkpoint has; lower precision is autocast.
            bert = BertModel.from_pretrained(source.path, config=config, add_pooling_layer=False, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{field}.path: cannot read BERT weights from {source.path!r} ({first_line(error)})."
        ) from error
    if bert.config.vocab_size < vocab_size:
        raise UserError(
            f"{field}.path: {source.path!r} has embeddings for {bert.config.vocab_size} wordpieces, but the tokenizer "
            f"has {vocab_size}; use the checkpoint's tokenizer (tokenizer.path)."
        )
    return bert


@contextlib.contextmanager
def suppress_loading_reports() -> Iterator[None]:
    """Suppress transformers' reports of missing and unused heads; callers report the missing heads
    that matter."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def mimetic_init(bert: BertModel, copy: float = 1.0, match: float = 0.25) -> None:
    """Add to every attention layer a structure that training from scratch is slow to find (after
    Trockman & Kolter 2023, "Mimetic Initialization").

    The product of value and output projection is about `copy` times the identity, so attended
    tokens are copied; the product of query and key projection is about `match` times the identity,
    so similar tokens attend to each other. The positive sign of the first is that of a model that
    copies: with tied output embeddings, a mask then predicts what it attends to. Positions are
    initialized as sinusoids as large as the word embeddings (Vaswani et al. 2017, section 3.5), so
    that near positions are similar.
    """
    with torch.no_grad():
        positions = bert.embeddings.position_embeddings.weight
        angle = torch.arange(positions.shape[0])[:, None] / 10_000 ** (
            torch.arange(0, positions.shape[1], 2) / positions.shape[1]
        )
        positions.copy_(torch.stack((angle.sin(), angle.cos()), -1).flatten(1) * bert.config.initializer_range * 2**0.5)
        for layer in bert.encoder.layer:
            attention: Any = layer.attention
            hidden = bert.config.hidden_size
            values, keys = (torch.linalg.qr(torch.randn(hidden, hidden)).Q for _ in range(2))
            attention.self.value.weight += copy**0.5 * values
            attention.output.dense.weight += copy**0.5 * values.T
            attention.self.query.weight += match**0.5 * keys
            attention.self.key.weight += match**0.5 * keys


def bert_config(path: str, field: str) -> BertConfig:
    """The checkpoint's config. Raises UserError if it cannot be found or is not a BERT config."""
    local = Path(path).exists() or path.startswith(("/", ".", "~"))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        if local:
            raise UserError(
                f"{field}.path: {path!r} is not a transformers checkpoint folder ({first_line(error)})."
            ) from error
        require_on_hub(path, f"{field}.path:")
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, BertConfig):
        raise UserError(f"{field}.path: {path!r} is a {config.model_type!r} model; use a BERT checkpoint.")
    return config


def first_line(error: Exception) -> str:
    """The first line of another library's error message, for quotation in an error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
