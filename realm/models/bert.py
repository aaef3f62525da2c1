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


@dataclass(frozen=True)
class BertSource:
    """Where a BERT comes from; the sizes count only when it is made from scratch."""

    path: str | None = None
    """Hub name or local folder of a BERT checkpoint; none: random weights of the sizes below."""
    layers: int = 12
    """Transformer layers."""
    hidden: int = 768
    """Width of a token's representation."""
    heads: int = 12
    """Attention heads; must divide `hidden`."""
    intermediate: int = 3072
    """Width of the feed-forward layers."""
    dropout: float = 0.1
    """Dropout on hidden states and attention, of checkpoints too."""
    max_positions: int = 512
    """Learned positions of a model made from scratch."""
    init_std: float = 0.02
    """Standard deviation of random weights."""
    init: Literal["normal", "mimetic"] = "normal"
    """Random weights as they are, or with attention started as trained models end up: see
    `mimetic_init`."""


def load_bert(source: BertSource, vocab_size: int, pad_id: int, field: str) -> BertModel:
    """The encoder without BERT's pooler. `field` names the config section in messages.

    Raises UserError where the checkpoint cannot be found or read, is no BERT, or has fewer
    embeddings than the tokenizer has wordpieces.
    """
    if source.path is None:
        if source.hidden % source.heads:
            raise UserError(
                f"{field}.hidden ({source.hidden}) is no multiple of {field}.heads ({source.heads}); choose a divisor."
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
        with quiet_loading():
            # Whatever the checkpoint was saved in, parameters are fp32; lower precision is
            # autocast.
            bert = BertModel.from_pretrained(source.path, config=config, add_pooling_layer=False, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{field}.path: no BERT weights could be read from {source.path!r} ({first_line(error)})."
        ) from error
    if bert.config.vocab_size < vocab_size:
        raise UserError(
            f"{field}.path: {source.path!r} embeds {bert.config.vocab_size} wordpieces, the tokenizer has {vocab_size}; "
            "use the checkpoint's own tokenizer (tokenizer.path)."
        )
    return bert


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting the heads that a checkpoint lacks, or has and we do not
    use: those that matter we report ourselves."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def mimetic_init(bert: BertModel, copy: float = 1.0, match: float = 0.25) -> None:
    """Add to every attention what training from scratch takes long to find (after Trockman & Kolter
    2023, "Mimetic Initialization").

    Values and output together pass a share `copy` of each attended token on as it is; queries and
    keys together let like attend to like, at scale `match`. The sign of the first is that of a
    model that copies: with tied output embeddings a mask then predicts what it attends to.
    Positions start as sinusoids as large as the word embeddings (Vaswani et al. 2017, section 3.5),
    so that near positions are alike.
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
    """The checkpoint's config; raises UserError with the remedy when it is out of reach or of
    another family."""
    local = Path(path).exists() or path.startswith(("/", ".", "~"))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        if local:
            raise UserError(
                f"{field}.path: {path!r} is no folder of a transformers checkpoint ({first_line(error)})."
            ) from error
        require_on_hub(path, f"{field}.path:")
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, BertConfig):
        raise UserError(f"{field}.path: {path!r} is a {config.model_type!r} model; give a BERT checkpoint.")
    return config


def first_line(error: Exception) -> str:
    """The first line of a library's message, for quoting inside ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
