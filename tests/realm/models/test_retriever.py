"""The retriever: towers, and exported folders, which sentence-transformers loads with the same
embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import nn

from realm.errors import UserError
from realm.models.bert import BertSource
from realm.models.objectives import in_batch_loss
from realm.models.retriever import RetrieverConfig, build_retriever
from realm.models.retriever_files import load_retriever, read_retriever_settings, save_retriever
from realm.text.inputs import Wordpieces, pad_batch

QUERIES = ["Where does the Danube rise?", "[MASK] was born in London in [MASK] .", "ada", ""]
PASSAGES = [
    ("Danube", "The river Danube rises in the Black Forest and ends in the Black Sea."),
    ("", "A text without a title."),
    ("A title [SEP] of [PAD] words", "Ada [MASK] was born in [CLS] London [SEP] in 1815 [UNK]"),
    ("Zürich", ""),
    ("London", "the Black Sea and the Black Forest " * 20),
]
BERT = BertSource(layers=2, hidden=24, heads=2, intermediate=32, max_positions=64, dropout=0.3, init_std=0.2)
CONFIG = RetrieverConfig(bert=BERT, projection_dim=10, max_query_tokens=16, max_passage_tokens=40)
KINDS = [
    pytest.param(
        replace(
            CONFIG, pooling=pooling, projection=projection, normalize=normalize, shared_tower=shared, temperature=0.5
        ),
        id=f"{pooling}-{projection}-{'unit' if normalize else 'raw'}-{'shared' if shared else 'two-towers'}",
    )
    for pooling in ("cls", "mean")
    for projection in ("linear", "none")
    for normalize in (False, True)
    for shared in (True, False)
]


def build(config, tokenizer):
    """A retriever in evaluation mode, with different weights in its towers and nonzero biases."""
    torch.manual_seed(0)
    retriever = build_retriever(config, tokenizer).eval()
    with torch.no_grad():
        for parameter in retriever.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return retriever


def save(retriever, config, tokenizer, path):
    save_retriever(retriever, tokenizer, path, config.max_query_tokens, config.max_passage_tokens)
    return path


def embed(retriever, config, tokenizer, wordpieces):
    """Query and passage embeddings of `QUERIES` and `PASSAGES`."""
    pad = tokenizer.pad_token_id
    # In sentence-transformers a shared tower has one maximum length, the larger one.
    query_tokens = (
        max(config.max_query_tokens, config.max_passage_tokens) if config.shared_tower else config.max_query_tokens
    )
    queries = pad_batch(
        [Wordpieces.from_tokenizer(tokenizer).query(wordpieces(text), query_tokens) for text in QUERIES], pad
    )
    inputs = [
        Wordpieces.from_tokenizer(tokenizer).passage(wordpieces(title), wordpieces(text), config.max_passage_tokens)
        for title, text in PASSAGES
    ]
    with torch.no_grad():
        return retriever.embed_queries(*queries).numpy(), retriever.embed_passages(*pad_batch(inputs, pad)).numpy()


@pytest.mark.parametrize("config", KINDS)
def test_sentence_transformers_computes_the_same_embeddings(config, tokenizer, wordpieces, tmp_path):
    retriever = build(config, tokenizer)
    path = save(retriever, config, tokenizer, tmp_path / "exported")
    query_emb_BD, passage_emb_BD = embed(retriever, config, tokenizer, wordpieces)

    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    np.testing.assert_allclose(model.encode_query(QUERIES), query_emb_BD, atol=1e-5)
    np.testing.assert_allclose(model.encode_document(PASSAGES), passage_emb_BD, atol=1e-5)
    np.testing.assert_allclose(model.encode(PASSAGES), passage_emb_BD, atol=1e-5)
    if config.shared_tower:
        np.testing.assert_allclose(model.encode(QUERIES), query_emb_BD, atol=1e-5)
    else:
        assert np.abs(model.encode(QUERIES) - query_emb_BD).max() > 1e-2, "without a task, the passage tower is used"
    scores = model.similarity(query_emb_BD, passage_emb_BD)
    np.testing.assert_allclose(scores, query_emb_BD @ passage_emb_BD.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "two-towers"])
def test_the_exported_tokenizer_builds_the_same_inputs(shared, tokenizer, wordpieces, tmp_path):
    config = replace(CONFIG, shared_tower=shared)
    path = save(build(config, tokenizer), config, tokenizer, tmp_path / "exported")
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    features = model.preprocess(PASSAGES, task="document")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for row, (title, text) in enumerate(PASSAGES):
        ids = features["input_ids"][row][features["attention_mask"][row].bool()].tolist()
        assert ids == Wordpieces.from_tokenizer(tokenizer).passage(wordpieces(title), wordpieces(text), 40).tolist()
        special = [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id]
        assert special == [cls, sep, sep], "names of special tokens in a text are plain text"
    assert not features.get("token_type_ids", torch.zeros(1)).any()


@pytest.mark.parametrize("config", KINDS)
def test_load_retriever_restores_weights_and_settings(config, tokenizer, wordpieces, tmp_path):
    retriever = build(config, tokenizer)
    path = save(retriever, config, tokenizer, tmp_path / "exported")
    loaded, loaded_tokenizer = load_retriever(path)
    assert loaded.shared == config.shared_tower and not loaded.training
    assert loaded.temperature == 0.5 and loaded.dim == retriever.dim
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    for expected, found in zip(
        embed(retriever, config, tokenizer, wordpieces),
        embed(loaded, config, loaded_tokenizer, wordpieces),
        strict=True,
    ):
        np.testing.assert_array_equal(expected, found)
    settings = read_retriever_settings(path)
    assert (settings["max_query_tokens"], settings["max_passage_tokens"]) == (16, 40)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "two-towers"])
def test_an_export_contains_no_pickle(shared, tokenizer, tmp_path):
    config = replace(CONFIG, shared_tower=shared, normalize=True)
    path = save(build(config, tokenizer), config, tokenizer, tmp_path / "exported")
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt"}
    assert ".safetensors" in suffixes


def test_an_export_replaces_an_older_one_in_the_same_folder(tokenizer, wordpieces, tmp_path):
    path = save(build(CONFIG, tokenizer), CONFIG, tokenizer, tmp_path / "exported")
    retriever = build(CONFIG, tokenizer)
    nn.init.normal_(retriever.query_tower.projection.weight)
    save(retriever, CONFIG, tokenizer, path)
    for expected, found in zip(
        embed(retriever, CONFIG, tokenizer, wordpieces),
        embed(load_retriever(path)[0], CONFIG, tokenizer, wordpieces),
        strict=True,
    ):
        np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_change_embeddings(pooling, tokenizer, wordpieces):
    retriever = build(replace(CONFIG, pooling=pooling), tokenizer)
    inputs = [Wordpieces.from_tokenizer(tokenizer).query(wordpieces(text), 16) for text in QUERIES]
    ids_BL, mask_BL = pad_batch(inputs, tokenizer.pad_token_id)
    with torch.no_grad():
        together_BD = retriever.embed_queries(ids_BL, mask_BL)
        alone_BD = torch.cat([retriever.embed_queries(*pad_batch([row], tokenizer.pad_token_id)) for row in inputs])
        other_padding_BD = retriever.embed_queries(torch.where(mask_BL.bool(), ids_BL, 7), mask_BL)
    torch.testing.assert_close(together_BD, alone_BD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together_BD, other_padding_BD, atol=1e-5, rtol=1e-5)


def test_two_towers_have_equal_but_separate_initial_weights(tokenizer):
    retriever = build_retriever(replace(CONFIG, shared_tower=False), tokenizer)
    pairs = list(zip(retriever.query_tower.parameters(), retriever.passage_tower.parameters(), strict=True))
    assert all(torch.equal(query, passage) and query is not passage for query, passage in pairs)
    assert not retriever.shared


def test_parameters_of_a_shared_tower_are_listed_once(tokenizer):
    retriever = build_retriever(CONFIG, tokenizer)
    assert retriever.shared
    assert len(list(retriever.parameters())) == len(list(retriever.query_tower.parameters()))


def test_score_is_the_inner_product_divided_by_the_temperature(tokenizer):
    retriever = build_retriever(replace(CONFIG, temperature=0.25), tokenizer)
    query_emb_BD, candidate_emb_BND = torch.randn(3, 10), torch.randn(3, 4, 10)
    score_BN = retriever.score(query_emb_BD, candidate_emb_BND)
    for b in range(3):
        for n in range(4):
            inner = sum(float(q * c) for q, c in zip(query_emb_BD[b], candidate_emb_BND[b, n], strict=True))
            assert score_BN[b, n].item() == pytest.approx(4 * inner, abs=1e-4)


def test_scores_are_not_rounded_under_autocast(tokenizer):
    retriever = build_retriever(replace(CONFIG, temperature=0.5), tokenizer)
    query_emb_BD = torch.tensor([[12.0, 5.0, 1.0]])
    candidate_emb_BND = torch.tensor([[[12.0, 5.0, 1.0], [12.0, 5.0, 1.3], [12.0, 5.0, 1.45]]])
    expected = torch.tensor([[340.0, 340.6, 340.9]])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(retriever.score(query_emb_BD, candidate_emb_BND), expected)
        loss, _ = in_batch_loss(
            query_emb_BD, candidate_emb_BND[0], torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool), 0.5
        )
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0])))


def test_normalized_embeddings_have_length_1(tokenizer, wordpieces):
    config = replace(CONFIG, normalize=True)
    for emb_BD in embed(build(config, tokenizer), config, tokenizer, wordpieces):
        np.testing.assert_allclose(np.linalg.norm(emb_BD, axis=1), 1.0, rtol=1e-5)


def test_more_tokens_than_positions_raise(tokenizer):
    with pytest.raises(UserError, match=r"max_passage_tokens \(65\) exceed the encoder's 64"):
        build_retriever(replace(CONFIG, max_passage_tokens=65), tokenizer)


@pytest.mark.parametrize("content", ["{", "[1"], ids=["truncated object", "truncated list"])
def test_a_folder_that_is_not_a_retriever_raises(content, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder} is not a saved retriever"):
            load_retriever(folder)
    (tmp_path / "retriever.json").write_text(content)
    with pytest.raises(UserError, match=r"retriever\.json is not valid JSON .*; restore the model"):
        load_retriever(tmp_path)


@pytest.mark.parametrize("with_manifest", [True, False], ids=["with manifest", "of an earlier version"])
@pytest.mark.parametrize("shared", [True, False], ids=["one tower", "two towers"])
def test_a_damaged_file_of_a_saved_retriever_is_named(with_manifest, shared, tokenizer, tmp_path):
    config = replace(CONFIG, shared_tower=shared, projection="linear")
    path = save(build(config, tokenizer), config, tokenizer, tmp_path / "exported")
    if not with_manifest:
        (path / "manifest.json").unlink()
    for file in sorted(path.rglob("*.safetensors")) + sorted(path.rglob("config.json")):
        content = file.read_bytes()
        for damaged in (b"", content[: len(content) // 2], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            if file.parent.name.endswith(("Pooling", "Dense")) and file.suffix == ".json" and not with_manifest:
                continue  # only sentence-transformers reads it
            with pytest.raises(UserError, match=f"{path}.*; restore the model from a copy"):
                load_retriever(path)
        file.write_bytes(content)
    load_retriever(path)


def test_flipped_weights_of_a_saved_retriever_are_found(tokenizer, tmp_path):
    path = save(build(CONFIG, tokenizer), CONFIG, tokenizer, tmp_path / "exported")
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors does not match the checksum in its manifest; restore"):
        load_retriever(path)


def test_sentence_transformers_loads_every_weight(tokenizer, tmp_path):
    path = save(build(CONFIG, tokenizer), CONFIG, tokenizer, tmp_path / "exported")
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    assert {name for name, _ in model[0].auto_model.named_parameters()} == set(load_file(path / "model.safetensors"))
