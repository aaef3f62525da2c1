"""The reader: a BERT over `[CLS] x [SEP] title [SEP] text [SEP]` with a masked-language head and a
span head.

Token type 0 marks `[CLS] x [SEP]` (global tokens in long-context attention), type 1 the passage.

Shape legend: B joint inputs, L wordpieces, M masked wordpieces, V vocabulary, H hidden width, P
allowed spans of a batch, K hidden width of the span head, W maximum answer length in wordpieces.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import draccus
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerBase

from realm.attention import AttentionConfig
from realm.attention.binding import bind_attention, extend_positions
from realm.attention.dense import DenseAttention
from realm.errors import UserError
from realm.models.bert import BertSource, load_bert, suppress_loading_reports
from realm.models.objectives import MASKED_SCORE
from realm.models.saved import REMEDY, reading_model
from realm.runtime.publish import read_json, write_manifest
from realm.runtime.section import Section
from realm.text.inputs import IntArray, Wordpieces, pad_batch


@dataclass(frozen=True)
class ReaderConfig(Section):
    """Encoder, attention and heads."""

    bert: BertSource = field(default_factory=BertSource)
    """The encoder."""
    attention: AttentionConfig = field(default_factory=DenseAttention)
    """Self-attention variant, selected by `type`."""
    mlm_head: Literal["transform", "tied"] = "transform"
    """BERT's dense transform before the tied output embeddings, or only the tied output embeddings
    (better with few steps from scratch)."""
    span_hidden: int = 256
    """Width of the span head's hidden layer."""
    max_span_tokens: int = 10
    """Maximum length W of an answer span in wordpieces."""
    max_tokens: int = 384
    """Maximum length of a joint input in wordpieces; if the encoder has fewer positions, they are
    extended."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(1, "span_hidden", "max_span_tokens", "max_tokens")


SpanSoftmax: TypeAlias = Literal["passage", "passages"]
"""The spans of one passage and "the answer is not in this passage", as in reader pretraining and
REALM (`span_log_probs`), or the spans of all passages read, as in finetuning (`open_qa_loss`)."""


class Reader(nn.Module):
    """Encoder with a masked-language head and a span head."""

    def __init__(self, bert: BertModel, config: ReaderConfig) -> None:
        super().__init__()
        extend_positions(bert, config.max_tokens)
        bind_attention(bert, config.attention)
        self.config = config
        self.bert = bert
        hidden = bert.config.hidden_size
        if config.mlm_head == "transform":
            self.mlm_transform: nn.Module = nn.Sequential(
                nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=bert.config.layer_norm_eps)
            )
        else:
            self.mlm_transform = nn.Identity()
        self.mlm_bias = nn.Parameter(torch.zeros(bert.config.vocab_size))
        self.span_start = nn.Linear(hidden, config.span_hidden)
        self.span_end = nn.Linear(hidden, config.span_hidden)
        self.span_norm = nn.LayerNorm(config.span_hidden)
        self.span_score = nn.Linear(config.span_hidden, 1)
        self.span_absent = nn.Linear(hidden, 1)
        nn.init.zeros_(self.span_absent.weight)
        nn.init.zeros_(self.span_absent.bias)
        self.span_softmax: SpanSoftmax = "passages"
        """The spans that share a softmax in the last training of the span head."""

    def adapt(self, config: ReaderConfig) -> None:
        """Change to `config`, in place: longer inputs, or another variant instead of dense
        attention.

        Raises UserError if the trained parameters do not fit: if a variant other than dense would
        change, if a head or the span length differs, and for longer inputs with a variant of fixed
        length.
        """
        old = self.config
        for name in ("mlm_head", "span_hidden", "max_span_tokens"):
            if getattr(config, name) != getattr(old, name):
                raise UserError(
                    f"reader.{name} is {getattr(config, name)!r}, but the reader was trained with "
                    f"{getattr(old, name)!r}; use that value."
                )
        positions = self.bert.config.max_position_embeddings
        if old.attention.fixed_length and config.max_tokens > positions:
            raise UserError(
                f"reader.max_tokens is {config.max_tokens}, but {old.attention} was trained for {positions} positions; "
                f"set it to at most {positions}."
            )
        extend_positions(self.bert, config.max_tokens)
        if config.attention != old.attention:
            if not isinstance(old.attention, DenseAttention):
                raise UserError(
                    f"reader.attention is {config.attention}, but the reader was trained with {old.attention}; "
                    "only a reader with dense attention can change to another variant."
                )
            bind_attention(self.bert, config.attention)
        self.config = config

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, type_BL: Tensor) -> Tensor:
        """Hidden states (B, L, H)."""
        # Variants receive the global mask through BERT's keyword arguments; dense attention needs
        # none.
        extra = {}
        if not isinstance(self.config.attention, DenseAttention):
            extra["global_mask"] = (type_BL == 0) & mask_BL.bool()
        output = self.bert(input_ids=ids_BL, attention_mask=mask_BL, token_type_ids=type_BL, **extra)
        hidden_BLH: Tensor = output.last_hidden_state
        return hidden_BLH

    def mlm_logits(self, hidden_BLH: Tensor, position_BM: Tensor) -> Tensor:
        """Vocabulary logits at the given positions, (B, M, V)."""
        hidden_BMH = hidden_BLH.gather(1, position_BM[..., None].expand(-1, -1, hidden_BLH.shape[-1]))
        word_embeddings = self.bert.embeddings.word_embeddings.weight
        logits_BMV = F.linear(self.mlm_transform(hidden_BMH), word_embeddings, self.mlm_bias)
        return logits_BMV.to(torch.promote_types(logits_BMV.dtype, torch.float32))

    def span_scores(self, hidden_BLH: Tensor, allowed_BLW: Tensor) -> Tensor:
        """Scores of spans, (B, L, W): entry [b, s, w] is the span from s to s + w inclusive (Lee et
        al. 2019, section 3.3). MASKED_SCORE where `allowed_BLW` is false (see `span_mask`).

        Only allowed spans are computed: about half of all, which halves the time and memory.
        """
        start_BLK, end_BLK = self.span_start(hidden_BLH), self.span_end(hidden_BLH)
        row_P, start_P, width_P = allowed_BLW.nonzero(as_tuple=True)
        at_P = row_P * hidden_BLH.shape[1] + start_P
        # index_select, because the gradient of start_BLK[row_P, start_P] is slower on CPUs.
        sum_PK = start_BLK.flatten(0, 1).index_select(0, at_P) + end_BLK.flatten(0, 1).index_select(0, at_P + width_P)
        score_P = _in_full_precision(self.span_score, self.span_norm(F.relu(sum_PK)))
        score_BLW = torch.full(allowed_BLW.shape, MASKED_SCORE, dtype=score_P.dtype, device=score_P.device)
        return score_BLW.index_put((row_P, start_P, width_P), score_P)

    def absent_scores(self, hidden_BLH: Tensor) -> Tensor:
        """Score of the choice "the answer is not in this passage", (B,), from the `[CLS]` token (as
        in Devlin et al. 2019, section 4.3); see `span_log_probs`."""
        return _in_full_precision(self.span_absent, hidden_BLH[:, 0])


def _in_full_precision(linear: nn.Linear, hidden_XH: Tensor) -> Tensor:
    """A linear layer with one output, (X,), in fp32 or better also under autocast: rounded to bf16,
    different spans would have the same score."""
    dtype = torch.promote_types(hidden_XH.dtype, torch.float32)
    with torch.autocast(hidden_XH.device.type, enabled=False):
        score_X1: Tensor = linear(hidden_XH.to(dtype))
    return score_X1.squeeze(-1)


def span_mask(inside_BL: Tensor, continuation_BL: Tensor, width: int) -> Tensor:
    """True on spans of whole words inside the passage, (B, L, W).

    `inside_BL`: true on wordpieces of the passage except special tokens; `continuation_BL`: true on
    wordpieces that continue a word.
    """
    inside_BLW = F.pad(inside_BL, (0, width - 1)).unfold(1, width, 1)
    word_ends_BL = F.pad(~continuation_BL[:, 1:], (0, 1), value=True)
    word_ends_BLW = F.pad(word_ends_BL, (0, width - 1)).unfold(1, width, 1)
    return inside_BLW.to(torch.int8).cumprod(-1).bool() & ~continuation_BL[..., None] & word_ends_BLW


def span_targets(
    occurrences: Sequence[Sequence[tuple[int, int]]],
    ids_BL: Tensor,
    mask_BL: Tensor,
    type_BL: Tensor,
    words: Wordpieces,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Masks of the spans that are the answer and of those that are allowed, both (B, L, W); see
    `Reader.span_scores` and `span_mask`.

    `occurrences` lists start and length in wordpieces of every occurrence of the answer, per joint
    input; occurrences longer than W are ignored.
    """
    is_answer_BLW = torch.zeros(*ids_BL.shape, width, dtype=torch.bool)
    for row, spans in enumerate(occurrences):
        for start, length in spans:
            if length <= width:
                is_answer_BLW[row, start, length - 1] = True
    inside_BL = mask_BL.bool() & (type_BL == 1) & ~torch.isin(ids_BL, torch.tensor((words.cls, words.sep)))
    return is_answer_BLW, span_mask(inside_BL, torch.from_numpy(words.continuation)[ids_BL], width)


def pad_joint(sequences: list[IntArray], first_segments: list[int], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids, mask and token types of joint inputs, each (B, L); `first_segments` are the
    lengths of `[CLS] x [SEP]`."""
    ids_BL, mask_BL = pad_batch(sequences, pad_id)
    type_BL = (torch.arange(ids_BL.shape[1])[None] >= torch.tensor(first_segments)[:, None]).long() * mask_BL
    return ids_BL, mask_BL, type_BL


def build_reader(config: ReaderConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Reader, list[str]]:
    """Build a reader from the config; returns it and notes for the user about weights missing in
    the checkpoint."""
    bert = load_bert(config.bert, len(tokenizer), tokenizer.pad_token_id, "reader.bert")
    reader = Reader(bert, config)
    std = bert.config.initializer_range
    for module in (reader.span_start, reader.span_end, reader.span_score, *reader.mlm_transform.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
    if config.bert.path is None:
        return reader, []
    with suppress_loading_reports():
        loaded: Any = BertForMaskedLM.from_pretrained(config.bert.path, output_loading_info=True, dtype=torch.float32)
    masked_lm, info = loaded
    if any(name.startswith("cls.predictions") and "decoder" not in name for name in info["missing_keys"]):
        return reader, [
            f"reader.bert.path: {config.bert.path!r} has no masked-language head; the head is initialized randomly, so "
            "run `realm reader-pretraining`."
        ]
    head = masked_lm.cls.predictions
    with torch.no_grad():
        reader.mlm_bias[: len(head.bias)].copy_(head.bias)
    if config.mlm_head == "transform":
        assert isinstance(reader.mlm_transform, nn.Sequential)
        reader.mlm_transform[0].load_state_dict(head.transform.dense.state_dict())
        reader.mlm_transform[2].load_state_dict(head.transform.LayerNorm.state_dict())
    return reader, []


def save_reader(reader: Reader, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save weights (safetensors), both configs and the tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in reader.state_dict().items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    reader.bert.config.save_pretrained(path)
    settings = draccus.encode(reader.config) | {"span_softmax": reader.span_softmax}
    (path / "reader.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save_pretrained(path)
    write_manifest(path, {"format": 1})


def load_reader(path: Path, config: ReaderConfig | None = None) -> Reader:
    """Load a reader saved by `save_reader`, with the parameters of its attention variant, in
    evaluation mode; with `config`, adapt it (`Reader.adapt`).

    Raises UserError if the folder is not a saved reader, or if a file of it is damaged (see
    `realm.models.saved`).
    """
    with reading_model(path, "reader"):
        settings = read_json(path / "reader.json", REMEDY)
        settings.pop("context_tokens", None)  # version 0.1 saved it here; it is a setting of the corpus now
        span_softmax = settings.pop("span_softmax", "passages")  # version 0.1 did not save it
        saved = draccus.decode(ReaderConfig, settings)
        bert = BertModel(BertConfig.from_json_file(path / "config.json"), add_pooling_layer=False)
        reader = Reader(bert, saved)
        weights = load_file(path / "model.safetensors")
        for name, value in reader.span_absent.state_dict(prefix="span_absent.").items():
            weights.setdefault(name, value)  # version 0.1 did not have it; it is initially zero
        reader.load_state_dict(weights)
        reader.span_softmax = span_softmax
    if config is not None:
        reader.adapt(config)
    return reader.eval()
