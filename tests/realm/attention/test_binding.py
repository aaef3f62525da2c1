"""Attention variants inside BERT: replacing self-attention, positions, saving, and the choice of a
variant in the config."""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from realm.attention import AttentionConfig
from realm.attention.binding import bind_attention, extend_positions
from realm.attention.dense import DenseAttention
from realm.attention.infini import InfiniAttention
from realm.attention.linformer import LinformerAttention
from realm.attention.longformer import LongformerAttention, LongformerSelfAttention
from realm.attention.performer import PerformerAttention
from realm.errors import UserError
from realm.models.bert import BertSource
from realm.models.reader import ReaderConfig, build_reader, load_reader, pad_joint, save_reader
from realm.run.config_file import load_config
from realm.text.inputs import pad_batch

SOURCE = BertSource(layers=2, hidden=16, heads=2, intermediate=32, max_positions=64, dropout=0.0, init_std=0.3)


def tiny_bert(layers: int = 2, max_positions: int = 64) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=max_positions,
        initializer_range=0.3,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def token_batch(*lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return pad_batch([torch.randint(5, 50, (length,), generator=generator).numpy() for length in lengths], 0)


@torch.no_grad()
def hidden(bert: BertModel, ids_BL: Tensor, mask_BL: Tensor, **extra: Tensor) -> Tensor:
    return bert(input_ids=ids_BL, attention_mask=mask_BL, **extra).last_hidden_state


@pytest.mark.parametrize("window", [20, 21, 500])
def test_a_window_over_the_whole_length_equals_dense_attention(window):
    ids_BL, mask_BL = token_batch(21, 13, 1)
    bert = tiny_bert()
    bound = copy.deepcopy(bert)
    bind_attention(bert, DenseAttention())
    bind_attention(bound, LongformerAttention(window=window))
    real_BL = mask_BL.bool()
    torch.testing.assert_close(
        hidden(bound, ids_BL, mask_BL)[real_BL], hidden(bert, ids_BL, mask_BL)[real_BL], atol=1e-5, rtol=1e-5
    )


def test_a_smaller_window_differs_from_dense_attention():
    ids_BL, mask_BL = token_batch(21)
    bert = tiny_bert()
    bound = copy.deepcopy(bert)
    bind_attention(bound, LongformerAttention(window=3))
    assert (hidden(bound, ids_BL, mask_BL) - hidden(bert, ids_BL, mask_BL)).abs().max() > 1e-2


@pytest.mark.parametrize("attention", [DenseAttention(), LongformerAttention(window=4)], ids=["dense", "longformer"])
def test_padding_does_not_change_real_tokens(attention):
    bert = tiny_bert()
    bind_attention(bert, attention)
    ids_BL, mask_BL = token_batch(19, 11)
    real_BL = mask_BL.bool()
    together = hidden(bert, ids_BL, mask_BL)
    for row, length in enumerate((19, 11)):
        alone = hidden(bert, ids_BL[row : row + 1, :length], mask_BL[row : row + 1, :length])[0]
        torch.testing.assert_close(together[row, :length], alone, atol=1e-5, rtol=1e-5)
    wider = [torch.cat([tensor, torch.zeros(2, 9, dtype=torch.int64)], 1) for tensor in (ids_BL, mask_BL)]
    torch.testing.assert_close(hidden(bert, *wider)[:, :19][real_BL], together[real_BL], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        hidden(bert, torch.where(real_BL, ids_BL, 7), mask_BL)[real_BL], together[real_BL], atol=1e-5, rtol=1e-5
    )


def test_query_tokens_are_global_in_the_reader(tokenizer):
    """With one layer and a window of 2, a distant token depends on x but not on the rest of the
    passage."""
    torch.manual_seed(0)
    config = ReaderConfig(
        bert=BertSource(**{**vars(SOURCE), "layers": 1}),
        attention=LongformerAttention(window=2),
        span_hidden=8,
        max_tokens=40,
    )
    reader, _ = build_reader(config, tokenizer)
    sequence = torch.randint(10, len(tokenizer), (30,)).numpy()

    @torch.no_grad()
    def read(changed: int | None) -> Tensor:
        ids = sequence.copy()
        if changed is not None:
            ids[changed] = 9
        return reader.eval()(*pad_joint([ids], [6], 0))[0]

    difference_x_L, difference_passage_L = ((read(position) - read(None)).abs().amax(-1) for position in (3, 15))
    assert (difference_x_L > 1e-6).all()
    assert (difference_passage_L[:6] > 1e-6).all(), "global tokens attend to the whole passage"
    assert difference_passage_L.nonzero().flatten().tolist() == [*range(6), *range(13, 18)]


def test_layers_are_replaced_lowest_first():
    @dataclass(frozen=True)
    class Recorder(AttentionConfig):
        layers: list[int] = field(default_factory=list)

        def replace(self, attention: nn.Module, layer: int) -> nn.Module:
            self.layers.append(layer)
            return LongformerSelfAttention(attention, 4)

    recorder, bert = Recorder(), tiny_bert(layers=3)
    bind_attention(bert.train(), recorder)
    assert recorder.layers == [0, 1, 2]
    assert all(
        isinstance(layer.attention.self, LongformerSelfAttention) and layer.attention.self.training
        for layer in bert.encoder.layer
    )


@pytest.mark.parametrize(
    "attention",
    [
        DenseAttention(),
        LongformerAttention(window=3),
        PerformerAttention(8, seed=3),
        LinformerAttention(9, "layerwise"),
        LinformerAttention(9, "none"),
        InfiniAttention(7),
    ],
    ids=["dense", "longformer", "performer", "linformer-layerwise", "linformer-none", "infini"],
)
def test_a_loaded_reader_has_the_outputs_of_the_saved_one(attention, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = ReaderConfig(bert=SOURCE, attention=attention, span_hidden=8, max_tokens=90)
    reader = build_reader(config, tokenizer)[0].eval()
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_reader(reader, tokenizer, tmp_path / "reader")
    loaded = load_reader(tmp_path / "reader")
    assert loaded.config == config and not loaded.training
    assert {file.suffix for file in (tmp_path / "reader").iterdir()} <= {".json", ".safetensors"}
    state, loaded_state = reader.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    batch = pad_joint([torch.randint(5, len(tokenizer), (length,)).numpy() for length in (80, 33)], [7, 12], 0)
    with torch.no_grad():
        assert torch.equal(reader(*batch), loaded(*batch))


def test_extended_positions_are_copies_of_the_learned_ones():
    bert = tiny_bert(max_positions=8)
    learned = bert.embeddings.position_embeddings.weight.detach().clone()
    ids_BL, mask_BL = token_batch(8)
    before = hidden(bert, ids_BL, mask_BL)
    extend_positions(bert, 20)
    extended = bert.embeddings.position_embeddings.weight
    assert extended.shape == (20, 16) and bert.config.max_position_embeddings == 20
    assert all(torch.equal(extended[position], learned[position % 8]) for position in range(20))
    torch.testing.assert_close(hidden(bert, ids_BL, mask_BL), before, atol=0, rtol=0)
    assert hidden(bert, *token_batch(20)).shape == (1, 20, 16)


@pytest.mark.parametrize("max_positions", [3, 8])
def test_positions_are_not_changed_if_there_are_enough(max_positions):
    bert = tiny_bert(max_positions=8)
    embedding = bert.embeddings.position_embeddings
    extend_positions(bert, max_positions)
    assert bert.embeddings.position_embeddings is embedding and bert.config.max_position_embeddings == 8


def test_the_config_names_the_variant(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: runs/x\ncorpus: {passages: p.jsonl}\nreader:\n  attention: {type: longformer, window: 7}\n")
    assert load_config(path).reader.attention == LongformerAttention(window=7)
    path.write_text(path.read_text().replace("longformer, window: 7", "spiral"))
    with pytest.raises(UserError, match="spiral") as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "attention" in str(caught.value)


def test_a_reader_with_dense_attention_can_change_to_another_variant(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = ReaderConfig(bert=SOURCE, span_hidden=8, max_tokens=64)
    reader = build_reader(config, tokenizer)[0].eval()
    save_reader(reader, tokenizer, tmp_path / "reader")
    longer = replace(config, attention=LongformerAttention(window=64), max_tokens=90)
    loaded = load_reader(tmp_path / "reader", longer)
    assert loaded.config == longer and loaded.bert.config.max_position_embeddings == 90
    batch = pad_joint([torch.randint(5, len(tokenizer), (length,)).numpy() for length in (60, 33)], [7, 12], 0)
    # A window over the whole text equals dense attention, since global projections are initialized
    # as copies of the local ones.
    with torch.no_grad():
        real = batch[1].bool()
        torch.testing.assert_close(loaded(*batch)[real], reader(*batch)[real])
        assert loaded(*pad_joint([torch.randint(5, len(tokenizer), (90,)).numpy()], [7], 0)).shape == (1, 90, 16)
    save_reader(loaded, tokenizer, tmp_path / "longer")
    assert load_reader(tmp_path / "longer", longer).config == longer


@pytest.mark.parametrize(
    "attention", [LongformerAttention(4), PerformerAttention(8), LinformerAttention(8), InfiniAttention(8)]
)
def test_a_variant_is_created_on_the_models_device(attention):
    bert = tiny_bert(max_positions=8).to("meta")
    bind_attention(bert, attention)
    assert {tensor.device.type for tensor in bert.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        (
            {"attention": PerformerAttention(8)},
            {"attention": LongformerAttention(5)},
            "reader.attention is LongformerAttention.* but the reader was trained with PerformerAttention",
        ),
        (
            {"attention": LinformerAttention(8)},
            {"max_tokens": 90},
            "max_tokens is 90, but LinformerAttention.* was trained for 64 positions",
        ),
        ({}, {"span_hidden": 16}, "reader.span_hidden is 16, but the reader was trained with 8"),
        ({}, {"max_span_tokens": 4}, "reader.max_span_tokens is 4"),
    ],
    ids=["attention", "length", "span head", "span length"],
)
def test_incompatible_reader_settings_raise(saved, wanted, message, tokenizer, tmp_path):
    config = ReaderConfig(bert=SOURCE, span_hidden=8, max_tokens=64)
    save_reader(build_reader(replace(config, **saved), tokenizer)[0], tokenizer, tmp_path / "reader")
    with pytest.raises(UserError, match=message):
        load_reader(tmp_path / "reader", replace(config, **{**saved, **wanted}))
