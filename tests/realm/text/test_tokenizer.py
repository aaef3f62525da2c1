"""Tokenizers: training, saving, loading, special tokens in text, and errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from realm.errors import UserError
from realm.text.tokenizer import (
    TokenizerConfig,
    load_or_train_tokenizer,
    load_tokenizer,
    tokenize,
    tokenizer_fingerprint,
    train_wordpiece,
)

TEXTS = [
    "The river Danube rises in the Black Forest [ and ends in the Black Sea ] .",
    "MASK and SEP and CLS and PAD are words here, as are mask, sep, cls and pad.",
    "Zürich lies on the lake, and the lakes lie on the land: 1234567890.",
]
SPECIAL_TOKENS_TEXT = "[CLS] a [MASK] river [SEP][PAD] [UNK]"


@pytest.fixture(scope="module")
def trained():
    return train_wordpiece(TEXTS, TokenizerConfig(vocab_size=200))


def _special_ids(tokenizer):
    return [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id]


def test_trained_tokenizer_is_a_bert_tokenizer(trained):
    assert len(trained) <= 200
    assert trained("the Danube").tokens()[0] == "[CLS]"
    assert trained("the Danube").tokens()[-1] == "[SEP]"
    assert len({*_special_ids(trained), trained.unk_token_id}) == 5
    assert trained.tokenize("DANUBE") == trained.tokenize("danube")


def test_lowercase_false_keeps_case():
    cased = train_wordpiece(TEXTS, TokenizerConfig(vocab_size=200, lowercase=False))
    assert cased.tokenize("MASK") != cased.tokenize("mask")


def test_training_is_deterministic_across_processes(trained):
    program = (
        "import json, sys; from realm.text.tokenizer import *; config, texts = json.load(sys.stdin); "
        "print(tokenizer_fingerprint(train_wordpiece(iter(texts), TokenizerConfig(**config))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([{"vocab_size": 200}, TEXTS]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == tokenizer_fingerprint(trained)


def test_saved_tokenizer_is_reused(tmp_path):
    config = TokenizerConfig(vocab_size=200)
    first = load_or_train_tokenizer(config, tmp_path / "tokenizer", lambda: TEXTS)
    second = load_or_train_tokenizer(config, tmp_path / "tokenizer", lambda: pytest.fail("trained a second time"))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    with pytest.raises(UserError, match="different `tokenizer` settings"):
        load_or_train_tokenizer(TokenizerConfig(vocab_size=150), tmp_path / "tokenizer", lambda: TEXTS)


def test_fingerprint_depends_on_vocabulary_and_normalizer(trained):
    fewer = train_wordpiece(TEXTS, TokenizerConfig(vocab_size=100))
    cased = train_wordpiece([text.lower() for text in TEXTS], TokenizerConfig(vocab_size=200, lowercase=False))
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in (trained, fewer, cased)}) == 3


def _check_plain(tokenizer):
    ids, offset_L2 = tokenize(tokenizer, [SPECIAL_TOKENS_TEXT])[0]
    assert ids.dtype == offset_L2.dtype == np.int32
    assert not np.isin(ids, _special_ids(tokenizer)).any()
    pieces = [SPECIAL_TOKENS_TEXT[start:end] for start, end in offset_L2]
    assert "".join(pieces) == SPECIAL_TOKENS_TEXT.replace(" ", "")
    assert "[MASK]" not in pieces


def test_special_tokens_in_text_stay_text(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    for tokenizer in (trained, load_tokenizer(str(tmp_path))):
        _check_plain(tokenizer)
    assert trained.mask_token_id not in AutoTokenizer.from_pretrained(tmp_path)("a [MASK] b")["input_ids"], (
        "split_special_tokens is not saved"
    )


@pytest.mark.real_data
def test_special_tokens_in_text_stay_text_with_bert_vocabulary(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "vocab" / "bert-base-uncased-vocab.txt"))
    _check_plain(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenize(tokenizer, ["[MASK]"])[0][0].tolist()) == ["[", "mask", "]"]


def test_plain_encoding_ignores_saved_truncation_and_padding(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert np.array_equal(tokenize(tokenizer, TEXTS)[0][0], tokenize(trained, TEXTS)[0][0])


def test_empty_text_has_no_wordpieces(trained):
    ids, offset_L2 = tokenize(trained, [""])[0]
    assert ids.shape == (0,) and offset_L2.shape == (0, 2)


def test_bare_vocabulary_file_and_folder(trained, tmp_path):
    vocabulary = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    for path in (tmp_path / "vocab.txt", tmp_path):
        assert np.array_equal(tokenize(load_tokenizer(str(path)), TEXTS)[0][0], tokenize(trained, TEXTS)[0][0])


def _missing(path):
    return path / "nowhere"


def _no_vocabulary(path):
    (path / "list.txt").write_text("one\ntwo\n")
    return path / "list.txt"


def _repeated(path):
    (path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n")
    return path / "vocab.txt"


def _binary(path):
    (path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    return path / "vocab.txt"


def _empty_folder(path):
    return path


def _only_config(path):
    (path / "config.json").write_text('{"model_type": "bert"}')
    return path


def _broken(path):
    (path / "tokenizer.json").write_text("{")
    (path / "tokenizer_config.json").write_text("{}")
    return path


def _byte_pairs(path):
    from tokenizers import Tokenizer, models

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(path)
    return path


def _without_mask(path):
    from tokenizers import Tokenizer, models

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    return path


def _special_by_spelling(path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_missing, "does not exist"),
        (_no_vocabulary, r"no line \[PAD\]"),
        (_repeated, "1 duplicate lines"),
        (_binary, "not UTF-8"),
        (_empty_folder, "contains no tokenizer"),
        (_only_config, "has only special tokens"),
        (_broken, "cannot be loaded"),
        (_byte_pairs, "is not a WordPiece tokenizer"),
        (_without_mask, "no mask token"),
        (_special_by_spelling, "encodes the text .* as special tokens"),
    ],
)
def test_invalid_tokenizer_is_refused_in_one_line(tmp_path, make, reason):
    path = make(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no such/name here", "-nothing-"])
def test_invalid_hub_name_is_refused(name):
    with pytest.raises(UserError, match="neither an existing path nor a valid hub name"):
        load_tokenizer(name)


def test_hub_name_without_network_is_refused(tmp_path):
    program = (
        "import sys; from realm.text.tokenizer import *\n"
        "try: load_tokenizer('someone/bert')\nexcept UserError as error: print(error)"
    )
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=unreachable, capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.count("\n") == 1 and "hub cannot be reached" in run.stdout


@pytest.mark.parametrize("vocab_size", [0, 99])
def test_too_small_vocabulary_is_refused(vocab_size):
    with pytest.raises(UserError, match="at least 100"):
        train_wordpiece(TEXTS, TokenizerConfig(vocab_size=vocab_size))


def test_training_without_text_is_refused():
    with pytest.raises(UserError, match="no visible characters"):
        train_wordpiece([" ", ""], TokenizerConfig())


def test_long_words_are_not_used_in_training_and_unknown_in_encoding() -> None:
    texts = ["the river runs through the old town"] * 3
    config = TokenizerConfig(vocab_size=200, lowercase=True)
    letters = "".join("0123456789abcdef"[n * n % 16] for n in range(1_000_000))
    tokenizer = train_wordpiece([*texts, letters, "a" * 1_000_000], config)
    words = set(tokenizer.get_vocab())
    assert "river" in words and not {"aaaa", "##aaaa"} & words
    ids, offsets = tokenize(tokenizer, ["the " + "a" * 101])[0]
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["the", "[UNK]"] and offsets[-1].tolist() == [4, 105]


def test_a_tokenizer_that_splits_words_of_any_length_is_refused(tmp_path: Path) -> None:
    backend = train_wordpiece(["a b c"], TokenizerConfig(vocab_size=100)).backend_tokenizer
    backend.model.max_input_chars_per_word = 10**9
    names = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "sep_token", "unk_token")}
    special = names | {"cls_token": "[CLS]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="splits words of up to 1,000,000,000 characters"):
        load_tokenizer(str(tmp_path))
