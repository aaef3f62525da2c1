"""Questions made from sentences."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from pretrain.masking import MaskedSentence
from pretrain.pseudo_questions import PseudoQuestions
from realm.spans.rules import SPAN_TYPES
from realm.text.tokenizer import tokenize
from realm.training.sections import PseudoQuestionConfig

SENTENCE = "After the war, the old bridge of Alda was built by Mara Venn in 1810, and it stood for long."
PLAIN = PseudoQuestionConfig(drop_prob=0.0, shuffle=0.0, clause_words=6)


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"?,.()", *map(chr, range(97, 123)), *map(str, range(10))]
    words += [f"##{chr(code)}" for code in range(97, 123)] + [f"##{digit}" for digit in range(10)]
    words += sorted({word.lower().strip(",.") for word in SENTENCE.split()} | {"who", "when", "what", "year", "in"})
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(dict.fromkeys(words))})


def example(tokenizer: BertTokenizerFast, span: str, kind: str, sentence: str = SENTENCE) -> MaskedSentence:
    ids, offsets = tokenize(tokenizer, [sentence])[0]
    first = sentence.index(span)
    inside = np.flatnonzero((offsets[:, 0] >= first) & (offsets[:, 1] <= first + len(span)))
    return MaskedSentence(0, ids, int(inside[0]), int(inside[-1]) + 1, SPAN_TYPES.index(kind))


def question(tokenizer: BertTokenizerFast, made: MaskedSentence, config: PseudoQuestionConfig, seed: int = 0) -> str:
    asked = PseudoQuestions(config, tokenizer, 62)(made, np.random.default_rng(seed)).question
    assert asked is not None
    return tokenizer.decode(asked)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("noisy", "who the old bridge of alda was built by in 1810?"),
        ("identity", "the old bridge of alda was built by who in 1810?"),
        ("template", "who in 1810 the old bridge of alda was built by?"),
    ],
)
def test_the_clause_around_the_span_becomes_a_question(tokenizer: BertTokenizerFast, form: str, expected: str) -> None:
    made = example(tokenizer, "Mara Venn", "person")
    assert question(tokenizer, made, replace(PLAIN, form=form)) == expected


def test_a_clause_with_too_few_words_is_extended_by_the_shortest_neighbour(tokenizer: BertTokenizerFast) -> None:
    made = example(tokenizer, "Mara Venn", "person")
    longer = question(tokenizer, made, replace(PLAIN, clause_words=11))
    assert longer == "who after the war the old bridge of alda was built by in 1810?"
    whole = question(tokenizer, made, replace(PLAIN, clause_words=100))
    assert whole.startswith("who after the war") and whole.endswith("it stood for long?")


def test_question_words_follow_the_type_and_none_are_needed(tokenizer: BertTokenizerFast) -> None:
    made = example(tokenizer, "1810", "date")
    found = {question(tokenizer, made, PLAIN, seed).split(" the old")[0] for seed in range(30)}
    assert found == {"when", "what year", "in what year"}
    assert question(tokenizer, made, replace(PLAIN, question_words={})).startswith("the old bridge")


def test_noise_drops_and_moves_words_by_a_bounded_distance(tokenizer: BertTokenizerFast) -> None:
    made = example(tokenizer, "Mara Venn", "person")
    clause = question(tokenizer, made, PLAIN)[:-1].split()[1:]
    config = replace(PLAIN, shuffle=3.0, drop_prob=0.2)
    kept = 0
    for seed in range(200):
        words = question(tokenizer, made, config, seed)[:-1].split()[1:]
        places = [clause.index(word) for word in words]
        assert all(abs(sorted(places).index(place) - number) < 3 for number, place in enumerate(places))
        kept += len(words)
    assert 0.75 < kept / (200 * len(clause)) < 0.85


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_questions_never_contain_their_answer_and_fit(tokenizer: BertTokenizerFast, data: st.DataObject) -> None:
    sentence = data.draw(
        st.lists(st.sampled_from(["alda", "built", "(", ")", ",", ".", "war", "1810", "mara"]), min_size=1)
    )
    ids, _ = tokenize(tokenizer, [" ".join(sentence)])[0]
    start = data.draw(st.integers(0, len(ids) - 1))
    made = MaskedSentence(0, ids, start, data.draw(st.integers(start + 1, len(ids))), 0)
    form = data.draw(st.sampled_from(["noisy", "identity", "template"]))
    asked = PseudoQuestions(PseudoQuestionConfig(form=form), tokenizer, 12)(made, np.random.default_rng(0)).question
    assert asked is not None and 1 <= len(asked) <= 12 and tokenizer.decode(asked[-1:]) == "?"
    maker = PseudoQuestions(PseudoQuestionConfig(form=form), tokenizer, 12)
    assert not maker.words.find(asked, made.span_ids)
