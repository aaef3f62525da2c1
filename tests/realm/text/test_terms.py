"""Terms of BM25: words, their beginnings and stems."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from realm.text.terms import Terms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def test_wordpieces_are_joined_to_words_without_punctuation(
    tokenizer: "PreTrainedTokenizerBase", wordpieces: Callable[[str], np.ndarray]
) -> None:
    ids = wordpieces("Zürich borders lakes; 1234567890 people never lived there, did they?")
    words = ["zurich", "borders", "lakes", "1234567890", "people", "never", "lived", "there", "did", "they"]
    assert any(piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(ids.tolist()))
    terms = Terms(tokenizer)
    assert terms(ids) == words and terms(ids.tolist()) == words, "the second time they come from the cache"
    assert terms([]) == []


def test_words_are_stemmed(tokenizer: "PreTrainedTokenizerBase", wordpieces: Callable[[str], np.ndarray]) -> None:
    assert Terms(tokenizer, stemmer="english")(wordpieces("rivers lived ends")) == ["river", "live", "end"]
    assert Terms(tokenizer, stemmer="german")(wordpieces("lebten enden")) == ["lebt", "end"]


def test_beginnings_of_longer_words_are_terms(
    tokenizer: "PreTrainedTokenizerBase", wordpieces: Callable[[str], np.ndarray]
) -> None:
    ids = wordpieces("Zürich ends there")
    assert Terms(tokenizer, prefix=4)(ids) == ["zurich", "zuri", "ends", "there", "ther"]
    assert Terms(tokenizer, 4, "english")(wordpieces("rivers end")) == ["river", "rive", "end"]


def test_words_with_special_tokens_are_dropped(
    tokenizer: "PreTrainedTokenizerBase", wordpieces: Callable[[str], np.ndarray]
) -> None:
    words = ["ada", "borders", "lakes", "there"]
    terms, ids = Terms(tokenizer), wordpieces(" ".join(words))
    continues = [piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(ids.tolist())]
    inside = continues.index(True)
    cut = words[inside - 1]
    masked = ids.copy()
    masked[inside - 1] = tokenizer.mask_token_id
    assert terms(masked) == [word for word in words if word != cut], "the word that the mask is a part of"
    assert terms([tokenizer.cls_token_id, *ids.tolist(), tokenizer.unk_token_id, tokenizer.sep_token_id]) == words


def test_a_text_that_begins_inside_a_word(tokenizer: "PreTrainedTokenizerBase") -> None:
    continuation = next(id for piece, id in sorted(tokenizer.get_vocab().items()) if piece.startswith("##a"))
    piece = tokenizer.convert_ids_to_tokens(continuation)
    assert Terms(tokenizer)([continuation, continuation]) == [2 * piece.removeprefix("##")]


@pytest.mark.parametrize("name", ["klingon", ""])
def test_an_unknown_stemmer_is_refused_with_the_known_ones(name: str) -> None:
    from realm.training.fusion_section import FusionConfig

    (problem,) = FusionConfig(stemmer=name).problems()
    assert "english" in problem and repr(name) in problem
