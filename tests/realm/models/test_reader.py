"""The reader: joint inputs, both heads compared with plain loops, saving, loading checkpoints."""

import json
import logging
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from realm.attention.longformer import LongformerAttention
from realm.errors import UserError
from realm.models.bert import BertSource, load_bert, mimetic_init
from realm.models.objectives import MASKED_SCORE
from realm.models.reader import ReaderConfig, build_reader, load_reader, pad_joint, save_reader, span_mask
from realm.text.inputs import Wordpieces

CLS, SEP = 2, 3
WORDS = Wordpieces(CLS, SEP, 4, 0, np.zeros(1000, dtype=bool))
SOURCE = BertSource(layers=2, hidden=16, heads=2, intermediate=32, max_positions=48, dropout=0.2, init_std=0.3)
CONFIG = ReaderConfig(bert=SOURCE, span_hidden=8, max_span_tokens=4, max_tokens=48)


def build(config, tokenizer):
    torch.manual_seed(0)
    reader = build_reader(config, tokenizer)[0].eval()
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return reader


def joint_batch(*lengths):
    generator = np.random.default_rng(0)
    joints = [
        WORDS.joint(generator.integers(5, 90, 5), generator.integers(5, 90, 2), generator.integers(5, 90, length), 48)
        for length in lengths
    ]
    return pad_joint([ids for ids, _, _ in joints], [first for _, first, _ in joints], 0)


@given(query=st.integers(0, 12), title=st.integers(0, 30), text=st.integers(0, 40), max_tokens=st.integers(17, 48))
@settings(max_examples=100, deadline=None)
def test_joint_input_truncates_only_the_passage(query, title, text, max_tokens):
    query_ids, title_ids, text_ids = np.arange(query) + 100, np.arange(title) + 200, np.arange(text) + 300
    ids, first, text_at = WORDS.joint(query_ids, title_ids, text_ids, max_tokens)
    assert len(ids) == min(max_tokens, query + title + text + 4) and ids.dtype == np.int32
    assert ids[:first].tolist() == [CLS, *query_ids, SEP]
    kept_title, kept_text = text_at - first - 1, len(ids) - text_at - 1
    assert ids[first:].tolist() == [*title_ids[:kept_title], SEP, *text_ids[:kept_text], SEP]
    room = max_tokens - query - 4
    assert kept_title == title or kept_text == text or kept_title == room // 2, "the text keeps half of the room"
    assert kept_title == title or len(ids) == max_tokens


def test_pad_joint_returns_mask_and_token_types():
    ids_BL, mask_BL, type_BL = pad_joint([np.array([2, 7, 3, 8, 3, 9, 3]), np.array([2, 3, 3, 3])], [3, 2], 1)
    assert ids_BL.tolist() == [[2, 7, 3, 8, 3, 9, 3], [2, 3, 3, 3, 1, 1, 1]]
    assert mask_BL.tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert type_BL.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]]


def test_span_mask_equals_a_plain_loop():
    _, mask_BL, type_BL = joint_batch(12, 3)
    special_BL = torch.zeros_like(mask_BL, dtype=torch.bool)
    for b, last in enumerate((22, 13)):
        special_BL[b, [0, 6, 9, last]] = True
    W, L = 4, mask_BL.shape[1]
    continuation_BL = torch.rand(mask_BL.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    allowed_BLW = span_mask(mask_BL.bool() & (type_BL == 1) & ~special_BL, continuation_BL, W)
    assert allowed_BLW.shape == (2, L, W)
    for b in range(2):
        for start in range(L):
            for width in range(W):
                positions, after = range(start, start + width + 1), start + width + 1
                inside = all(i < L and mask_BL[b, i] and type_BL[b, i] == 1 and not special_BL[b, i] for i in positions)
                whole_words = not continuation_BL[b, start] and (after >= L or not continuation_BL[b, after])
                assert allowed_BLW[b, start, width].item() == (inside and whole_words)
    assert allowed_BLW[1].any() and not allowed_BLW[1, 13:].any()


def allowed_spans(B, L, W=4):
    """Some of the spans that end within L."""
    allowed_BLW = torch.rand(B, L, W, generator=torch.Generator().manual_seed(0)) < 0.6
    return allowed_BLW & (torch.arange(L)[:, None] + torch.arange(W) < L)


def test_span_scores_and_their_gradients_equal_a_plain_loop(tokenizer):
    reader = build(CONFIG, tokenizer).double()
    hidden_BLH = torch.randn(2, 11, 16, dtype=torch.float64)
    allowed_BLW, weight_BLW = allowed_spans(2, 11), torch.randn(2, 11, 4, dtype=torch.float64)

    def loop(hidden_BLH, allowed_BLW):
        score_BLW = torch.full((2, 11, 4), MASKED_SCORE, dtype=torch.float64)
        for b, start, width in allowed_BLW.nonzero().tolist():
            hidden = reader.span_start(hidden_BLH[b, start]) + reader.span_end(hidden_BLH[b, start + width])
            score_BLW[b, start, width] = reader.span_score(reader.span_norm(hidden.clamp(min=0)))[0]
        return score_BLW

    results = []
    for scores in (reader.span_scores, loop):
        reader.zero_grad()
        leaf_BLH = hidden_BLH.clone().requires_grad_()
        score_BLW = scores(leaf_BLH, allowed_BLW)
        (score_BLW * weight_BLW)[allowed_BLW].sum().backward()
        gradients = [reader.get_parameter(name).grad.clone() for name in ("span_start.weight", "span_norm.weight")]
        results.append([score_BLW.detach(), leaf_BLH.grad, *gradients])
    assert results[0][0].dtype == torch.float64
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_no_allowed_span_has_no_score_and_a_gradient_of_zero(tokenizer):
    reader = build(CONFIG, tokenizer)
    score_BLW = reader.span_scores(torch.randn(2, 11, 16), torch.zeros(2, 11, 4, dtype=torch.bool))
    assert (score_BLW == MASKED_SCORE).all()
    score_BLW.sum().backward()
    assert reader.span_start.weight.grad.abs().max() == 0.0


def test_scores_are_not_rounded_under_autocast(tokenizer):
    reader, hidden_BLH = build(CONFIG, tokenizer), torch.randn(2, 40, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        score_P = reader.span_scores(hidden_BLH, allowed_spans(2, 40))[allowed_spans(2, 40)]
        absent_B = reader.absent_scores(hidden_BLH)
    assert score_P.dtype == absent_B.dtype == torch.float32
    assert (score_P.bfloat16().float() != score_P).float().mean() > 0.5


def test_absent_scores_zero_until_it_is_trained(tokenizer):
    reader, hidden_BLH = build_reader(CONFIG, tokenizer)[0], torch.randn(2, 11, 16)
    score_B = reader.absent_scores(hidden_BLH)
    assert score_B.tolist() == [0.0, 0.0]
    score_B.sum().backward()
    torch.testing.assert_close(reader.span_absent.weight.grad, hidden_BLH[:, 0].sum(0, keepdim=True))


@pytest.mark.parametrize("head", ["transform", "tied"])
def test_mlm_logits_equal_a_plain_loop(head, tokenizer):
    reader = build(replace(CONFIG, mlm_head=head), tokenizer)
    hidden_BLH, position_BM = torch.randn(2, 11, 16), torch.tensor([[3, 10, 0], [5, 5, 1]])
    with torch.no_grad():
        logits_BMV = reader.mlm_logits(hidden_BLH, position_BM)
        assert logits_BMV.shape == (2, 3, len(tokenizer))
        for b in range(2):
            for m, position in enumerate(position_BM[b]):
                hidden_H = hidden_BLH[b, position]
                if head == "transform":
                    dense, gelu, norm = reader.mlm_transform
                    hidden_H = norm(gelu(dense(hidden_H)))
                expected_V = reader.bert.embeddings.word_embeddings.weight @ hidden_H + reader.mlm_bias
                torch.testing.assert_close(logits_BMV[b, m], expected_V, atol=1e-5, rtol=1e-5)


def test_output_embeddings_are_tied(tokenizer):
    reader = build(replace(CONFIG, mlm_head="tied"), tokenizer)
    reader.mlm_logits(torch.randn(1, 4, 16), torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    assert reader.bert.embeddings.word_embeddings.weight.grad.any()


@pytest.mark.parametrize("attention", [CONFIG.attention, LongformerAttention(window=5)], ids=["dense", "longformer"])
def test_padding_does_not_change_either_head(attention, tokenizer):
    reader = build(replace(CONFIG, attention=attention), tokenizer)
    ids_BL, mask_BL, type_BL = joint_batch(30, 4)
    length, position_BM = int(mask_BL[1].sum()), torch.tensor([[2, 4]])

    @torch.no_grad()
    def read(*batch):
        hidden_BLH = reader(*batch)
        logits_BMV = reader.mlm_logits(hidden_BLH, position_BM.expand(len(hidden_BLH), -1))
        allowed_BLW = torch.ones(*hidden_BLH.shape[:2], 4, dtype=torch.bool)
        allowed_BLW &= torch.arange(hidden_BLH.shape[1])[:, None] + torch.arange(4) < hidden_BLH.shape[1]
        return logits_BMV[-1], reader.span_scores(hidden_BLH, allowed_BLW)[-1]

    alone = read(ids_BL[1:, :length], mask_BL[1:, :length], type_BL[1:, :length])
    other_padding = torch.where(mask_BL.bool(), ids_BL, 9)
    for logits_MV, score_LW in (read(ids_BL, mask_BL, type_BL), read(other_padding, mask_BL, type_BL)):
        torch.testing.assert_close(logits_MV, alone[0], atol=1e-5, rtol=1e-5)
        for width in range(4):
            torch.testing.assert_close(
                score_LW[: length - width, width], alone[1][: length - width, width], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("head", ["transform", "tied"])
def test_a_loaded_reader_has_the_outputs_of_the_saved_one(head, tokenizer, tmp_path):
    config = replace(CONFIG, mlm_head=head)
    reader = build(config, tokenizer)
    reader.span_softmax = "passage"
    save_reader(reader, tokenizer, tmp_path / "reader")
    loaded = load_reader(tmp_path / "reader")
    assert loaded.config == config and not loaded.training and loaded.span_softmax == "passage"
    batch, position_BM = joint_batch(20, 7), torch.tensor([[1, 2], [3, 0]])
    with torch.no_grad():
        assert torch.equal(reader(*batch), loaded(*batch))
        assert torch.equal(
            reader.mlm_logits(reader(*batch), position_BM), loaded.mlm_logits(loaded(*batch), position_BM)
        )
        allowed_BLW = allowed_spans(*batch[0].shape)
        assert torch.equal(
            reader.span_scores(reader(*batch), allowed_BLW), loaded.span_scores(loaded(*batch), allowed_BLW)
        )
        assert torch.equal(reader.absent_scores(reader(*batch)), loaded.absent_scores(loaded(*batch)))


def test_a_folder_that_is_not_a_reader_raises(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is not a saved reader"):
        load_reader(tmp_path)


def checkpoint(tokenizer, path, vocab=None, dtype=torch.float32, with_head=True):
    """A BERT saved by transformers, with no parameter at its default value."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=vocab or len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        initializer_range=0.3,
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model = model.to(dtype)
    (model if with_head else model.bert).save_pretrained(path)
    return model.float()


def test_a_reader_saved_by_version_0_1_loads(tokenizer, tmp_path):
    reader = build(CONFIG, tokenizer)
    save_reader(reader, tokenizer, tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").unlink()
    file = tmp_path / "saved" / "reader.json"
    settings = json.loads(file.read_text()) | {"context_tokens": 0}
    del settings["span_softmax"]
    file.write_text(json.dumps(settings))
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("span_absent.")}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "saved" / "model.safetensors")
    loaded = load_reader(tmp_path / "saved")
    assert loaded.config == reader.config and loaded.span_softmax == "passages"
    assert not loaded.span_absent.weight.any() and not loaded.span_absent.bias.any()
    assert torch.equal(loaded.span_start.weight, reader.span_start.weight)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "reader.json", "tokenizer.json"])
def test_a_damaged_file_of_a_saved_reader_is_named(name, tokenizer, tmp_path):
    save_reader(build(CONFIG, tokenizer), tokenizer, tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{file} has \d+ bytes, but its manifest says .*; restore the model"):
        load_reader(tmp_path)
    (tmp_path / "manifest.json").unlink()  # as in folders of earlier versions
    if name != "tokenizer.json":
        with pytest.raises(UserError, match=f"{tmp_path}.*; restore the model from a copy"):
            load_reader(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"{tmp_path}") if name != "tokenizer.json" else nullcontext():
        load_reader(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("extra_vocabulary", [0, 14])
def test_the_masked_language_head_of_a_checkpoint_is_loaded(dtype, extra_vocabulary, tokenizer, tmp_path):
    model = checkpoint(tokenizer, tmp_path / "bert", len(tokenizer) + extra_vocabulary, dtype)
    reader, notes = build_reader(replace(CONFIG, bert=BertSource(path=str(tmp_path / "bert"))), tokenizer)
    assert notes == []
    assert {parameter.dtype for parameter in reader.parameters()} == {torch.float32}
    ids_BL, mask_BL, type_BL = joint_batch(30, 9)
    position_BL = torch.arange(ids_BL.shape[1]).expand(2, -1)
    with torch.no_grad():
        logits_BLV = reader.eval().mlm_logits(reader(ids_BL, mask_BL, type_BL), position_BL)
        expected_BLV = model(input_ids=ids_BL, attention_mask=mask_BL, token_type_ids=type_BL).logits
    real_BL = mask_BL.bool()
    torch.testing.assert_close(logits_BLV[real_BL], expected_BLV[real_BL], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_without_a_masked_language_head_gives_a_note(tokenizer, tmp_path, caplog, monkeypatch):
    path = str(tmp_path / "bert")
    model = checkpoint(tokenizer, path, with_head=False)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    reader, notes = build_reader(replace(CONFIG, bert=BertSource(path=path)), tokenizer)
    assert len(notes) == 1 and path in notes[0] and "no masked-language head" in notes[0]
    assert not caplog.records, "transformers logs nothing"
    assert not reader.mlm_bias.any()
    assert torch.equal(reader.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_incompatible_checkpoints_raise(tokenizer, tmp_path):
    checkpoint(tokenizer, tmp_path / "small", vocab=50)
    with pytest.raises(UserError, match=r"reader.bert.path: .*has embeddings for 50 wordpieces, but the tokenizer has"):
        build_reader(replace(CONFIG, bert=BertSource(path=str(tmp_path / "small"))), tokenizer)
    with pytest.raises(UserError, match=r"reader.bert.path: .*absent"):
        build_reader(replace(CONFIG, bert=BertSource(path=str(tmp_path / "absent"))), tokenizer)
    with pytest.raises(UserError, match=r"reader.bert.hidden \(15\) is not a multiple of reader.bert.heads \(2\)"):
        build_reader(replace(CONFIG, bert=replace(SOURCE, hidden=15)), tokenizer)


def test_mimetic_init_changes_only_attention_projections_and_positions():
    torch.manual_seed(0)
    bert = load_bert(replace(SOURCE, init_std=0.02), 60, 0, "reader.bert")
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    mimetic_init(bert, copy=1.0, match=0.25)
    changed = {name for name, value in bert.state_dict().items() if not torch.equal(value, before[name])}
    projections = ("self.query", "self.key", "self.value", "output.dense")
    assert changed == {"embeddings.position_embeddings.weight"} | {
        f"encoder.layer.{layer}.attention.{name}.weight" for layer in range(2) for name in projections
    }
    for layer in bert.encoder.layer:
        attention, diagonal = layer.attention, torch.eye(16)
        output_value = attention.output.dense.weight @ attention.self.value.weight
        query_key = attention.self.query.weight.T @ attention.self.key.weight
        assert (output_value - diagonal).abs().max() < 0.3 and (query_key - 0.25 * diagonal).abs().max() < 0.2


def test_mimetic_init_is_selected_in_the_config():
    def value_std(init):
        torch.manual_seed(0)
        bert = load_bert(replace(SOURCE, init=init, init_std=0.02), 60, 0, "reader.bert")
        return bert.encoder.layer[1].attention.self.value.weight.std()

    assert value_std("mimetic") > 5 * value_std("normal")


def test_near_mimetic_positions_are_similar():
    torch.manual_seed(0)
    source = BertSource(layers=1, hidden=32, heads=2, intermediate=8, max_positions=64, init="mimetic")
    bert = load_bert(source, 50, 0, "reader.bert")
    positions = bert.embeddings.position_embeddings.weight.detach()
    similarity = torch.nn.functional.cosine_similarity(positions[10][None], positions).tolist()
    assert similarity[10] > similarity[11] > similarity[12] > similarity[14]
    assert similarity[11] == pytest.approx(similarity[9], abs=1e-4)
    assert positions.std().item() == pytest.approx(bert.embeddings.word_embeddings.weight.std().item(), rel=0.5)
