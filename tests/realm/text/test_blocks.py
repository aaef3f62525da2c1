"""Splitting documents into blocks at sentence boundaries, and aligning spans with wordpieces."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realm.spans.rules import builtin_spans
from realm.text.blocks import align_spans, cut_blocks, sentence_bounds, text_hash
from realm.text.tokenizer import tokenize
from tests.realm.corpus.rivers import river_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return river_tokenizer()


SENTENCES = {
    "plain": ["The Rhine is long. ", "It ends in the sea! ", "Does it? ", "Yes."],
    "titles and initials": ["Dr. Smith met J. K. Rowling and Prof. X in St. Louis. ", "Mr. and Mrs. Poe came."],
    "acronyms": ["He lived in the U.S. He left Washington, D.C. in May. ", "Then he died."],
    "numbers": ["It is 3.5 km, no. 5 on p. 7 of vol. 2, since Jan. 5. ", "In Jan. ", "Snow fell."],
    "lower case": ["They watched Yahoo! news at 10 p.m. today, etc. and left. ", "Good."],
    "spaced": [
        "The Rhine is long . ",
        "He moved to the U.S. . ",
        "A U.S . Senator , Mr . Poe , came . ",
        "Eek ! ",
        "The end .",
    ],
    "quotes": ['He said "Go!" ', "Then (at last.) ", "“Stay.” ", "She left."],
    "notes": ["It won.[3] ", "It lost . [ citation needed ] ", "Later it won."],
    "dots": ["Well... ", "Now what?! ", "Nothing…"],
    "uncased": ["all is low. ", "it still ends. ", "so it is."],
    "paragraphs": ["A heading\n\n", "Its text. ", "More.\n"],
    "no space between": ["彼は来た。", "「行く。」", "彼女は\uff01", "終"],
    "junior": ["Tom Poe Jr. ( born 1950 ) sings. ", "He met Al Poe Jr. ", "Al left."],
    "stray mark": ["All over . . ", "The rest"],
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_sentences(kind):
    text = "".join(SENTENCES[kind])
    bounds = sentence_bounds(text)
    assert [text[start:end] for start, end in zip(bounds, [*bounds[1:], len(text)], strict=True)] == SENTENCES[kind]


INVISIBLE = "\u200b\ufffd\x1c"
LONG_UNKNOWN, LONG_KNOWN = "x" * 120, "qzj" * 30
words = st.sampled_from(
    [
        *"aZ.!?,()[]\"'…。",
        *INVISIBLE,
        "the",
        "Cat.",
        "Dr.",
        "한국어",
        "naïve",
        "e\u0301",
        "Zürich",
        "東京",
        LONG_UNKNOWN,
        LONG_KNOWN,
    ]
)
texts = st.lists(st.tuples(words, st.sampled_from(["", " ", "  ", "\n", "\n\n", "\u3000"])), max_size=60).map(
    lambda pairs: "".join(word + space for word, space in pairs)
) | st.text(max_size=200)


@given(texts)
def test_sentence_bounds_are_sorted_and_follow_white_space(text):
    bounds = sentence_bounds(text)
    assert bounds == sorted(set(bounds)) and bounds[0] == 0 and bounds[-1] <= max(0, len(text) - 1)
    assert not any(text[bound].isspace() for bound in bounds[1:])


@settings(deadline=None)
@given(texts.filter(str.strip), st.integers(8, 60))
@example("qzj" * 30 + " " + "한국어" * 40, 8)
def test_concatenated_blocks_are_the_document(tokenizer, text, max_tokens):
    ids, offset_L2 = tokenize(tokenizer, [text])[0]
    if not len(ids):
        return
    is_word_start_L = np.array([not piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(ids.tolist())])
    bounds = sentence_bounds(text)
    blocks = cut_blocks(len(text), offset_L2, is_word_start_L, bounds, max_tokens)
    assert "".join(text[block.start : block.end] for block in blocks) == text
    assert [block.first for block in blocks] == [0, *(block.last for block in blocks[:-1])] and blocks[-1].last == len(
        ids
    )
    for block in blocks:
        starts = block.sentence_starts
        assert 0 < block.last - block.first <= max_tokens
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < block.last - block.first
        offsets = offset_L2[block.first : block.last]
        assert offsets.min() >= block.start and offsets.max() <= block.end
    if all(is_word_start_L[block.first] for block in blocks):
        alone = tokenize(tokenizer, [text[block.start : block.end] for block in blocks])
        assert np.array_equal(np.concatenate([block_ids for block_ids, _ in alone]), ids)


def test_whole_sentences_are_packed_greedily(tokenizer):
    text = "The cat sat. The cat sat. The cat sat. "
    _, offset_L2 = tokenize(tokenizer, [text])[0]
    per_sentence = len(offset_L2) // 3
    for max_tokens in (2 * per_sentence, 3 * per_sentence - 1):
        blocks = cut_blocks(len(text), offset_L2, np.ones(len(offset_L2), bool), sentence_bounds(text), max_tokens)
        assert [text[block.start : block.end] for block in blocks] == ["The cat sat. The cat sat. ", "The cat sat. "]
        assert [block.sentence_starts for block in blocks] == [[0, per_sentence], [0]]


def test_long_sentence_is_split_between_words(tokenizer):
    text = "The cat sat. " + "Zürich river bridges naïve " * 20
    ids, offset_L2 = tokenize(tokenizer, [text])[0]
    is_word_start_L = np.array([not piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(ids.tolist())])
    blocks = cut_blocks(len(text), offset_L2, is_word_start_L, sentence_bounds(text), 16)
    pieces = [text[block.start : block.end] for block in blocks]
    assert pieces[0] == "The cat sat. "
    assert len(pieces) > 3 and all(piece.endswith(" ") for piece in pieces)


def test_spans_that_split_a_wordpiece_or_cross_a_sentence_are_dropped():
    offset_L2 = np.array([[0, 3], [4, 7], [7, 8], [9, 12], [13, 16]])
    spans = [
        (0, 3, "place"),
        (0, 7, "date"),
        (1, 3, "cut"),
        (4, 6, "cut"),
        (4, 12, "crosses"),
        (8, 9, "nothing"),
        (9, 16, "other"),
    ]
    assert list(align_spans(offset_L2, [0, 3], spans)) == [(0, 1, "place"), (0, 2, "date"), (3, 5, "other")]


def test_text_hash_ignores_only_case_and_white_space():
    assert text_hash("The  Danube\nflows ") == text_hash("the danube flows")
    assert text_hash("the danube flows") != text_hash("the danube flow s")


@pytest.mark.parametrize("unit", ["a", " ", "\t", "\n x", "!", "!'", "! ''", " .", "A. ", "1,", "\u3002"])
def test_the_time_is_linear_in_the_text(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    started = time.process_time()
    sentence_bounds(text)
    builtin_spans(text)
    assert time.process_time() - started < 5  # with quadratic time: minutes


def test_many_sentences_are_placed_in_linear_time() -> None:
    count = 60_000
    starts = np.arange(count, dtype=np.int32)
    offset_L2 = np.stack([starts, starts + 1], 1)
    started = time.process_time()
    assert len(cut_blocks(count, offset_L2, np.ones(count, bool), range(count), 30)) == count // 30
    assert time.process_time() - started < 2  # with a copy of the offsets per sentence: 4 s
