"""Questions made from sentences."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from pretrain.masking import MaskedSentence, substitute
from pretrain.pseudo_questions import PseudoQuestions
from pretrain.words import Words
from realm.runtime.section import all_problems
from realm.spans.rules import SPAN_TYPES
from realm.text.inputs import Wordpieces
from realm.text.tokenizer import tokenize
from realm.training.pseudo_question_section import FORMS, PHRASE, PseudoQuestionConfig

SENTENCE = "After the war, the old bridge of Alda was built by Mara Venn in 1810, and it stood for long."
FREQUENT = ["the", "of", "a", "in", "by", "was", "it", "and", "for"]
PLAIN = PseudoQuestionConfig(drop_prob=0.0, shuffle=0.0, clause_words=6, min_words=1, min_frequent_share=0.0)


class Corpus:
    """A stub corpus: all blocks have the same text and title, and it notes which are read."""

    def __init__(self, text: np.ndarray, title: np.ndarray, rows: int = 3) -> None:
        self.text, self.title, self.rows, self.read = text, title, np.arange(rows), set[int]()

    def text_ids(self, row: int) -> np.ndarray:
        self.read.add(row)
        return self.text

    def title_ids(self, row: int) -> np.ndarray:
        return self.title


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"?,.()-';$",
        *map(chr, range(97, 123)),
        *map(str, range(10)),
    ]
    words += [f"##{chr(code)}" for code in range(97, 123)] + [f"##{digit}" for digit in range(10)]
    words += sorted(
        {word.lower().strip(",.") for word in SENTENCE.split()} | {"who", "when", "what", "year", *FREQUENT}
    )
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(dict.fromkeys(words))})


def encode(tokenizer: BertTokenizerFast, text: str) -> np.ndarray:
    return tokenize(tokenizer, [text])[0][0]


def corpus(tokenizer: BertTokenizerFast, title: str = "", rows: int = 3) -> Corpus:
    """Texts in which only FREQUENT are frequent: the first tenth of 90 distinct words, of which
    these are the most frequent ones, in that order, if there are 18 rows."""
    rare = [a + b for a in "qxzjkvwyh" for b in "bcdfghmnp"]
    stub = Corpus(encode(tokenizer, " ".join(rare)), encode(tokenizer, title), rows)
    frequent = [encode(tokenizer, " ".join(FREQUENT[: len(FREQUENT) - n])) for n in range(len(FREQUENT))]
    stub.text_ids = lambda row: np.concatenate((stub.text if row == 0 else stub.text[:0], frequent[row // 2 % 9]))  # type: ignore[method-assign]
    return stub


def questions(
    tokenizer: BertTokenizerFast, config: PseudoQuestionConfig, title: str = "", longest: int = 62
) -> PseudoQuestions:
    return PseudoQuestions(config, tokenizer, corpus(tokenizer, title, 18), longest, 10)  # type: ignore[arg-type]


def example(
    tokenizer: BertTokenizerFast, span: str, kind: str, sentence: str = SENTENCE, others: tuple[str, ...] = ()
) -> MaskedSentence:
    ids, offsets = tokenize(tokenizer, [sentence])[0]
    first = sentence.index(span)
    inside = np.flatnonzero((offsets[:, 0] >= first) & (offsets[:, 1] <= first + len(span)))
    start, end = int(inside[0]), int(inside[-1]) + 1
    known = tuple(encode(tokenizer, other) for other in others)
    return MaskedSentence(0, ids, start, end, SPAN_TYPES.index(kind), known)


def text(tokenizer: BertTokenizerFast, made: MaskedSentence | None) -> str | None:
    return None if made is None else str(tokenizer.decode(made.question))


def ask(
    tokenizer: BertTokenizerFast, made: MaskedSentence, config: PseudoQuestionConfig, seed: int = 0, title: str = ""
) -> str | None:
    return text(tokenizer, questions(tokenizer, config, title)(made, np.random.default_rng(seed)))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("noisy", "who the old bridge of alda was built by in 1810?"),
        ("clause", "who the old bridge of alda was built by in 1810?"),
        ("identity", "the old bridge of alda was built by who in 1810?"),
        ("template", "who in 1810, the old bridge of alda was built by?"),
    ],
)
def test_the_clause_around_the_answer_becomes_a_question(
    tokenizer: BertTokenizerFast, form: str, expected: str
) -> None:
    made = example(tokenizer, "Mara Venn", "person")
    assert ask(tokenizer, made, replace(PLAIN, forms={form: 1.0})) == expected


def test_a_clause_with_too_few_words_is_extended_by_the_shortest_neighbour(tokenizer: BertTokenizerFast) -> None:
    made = example(tokenizer, "Mara Venn", "person")
    longer = ask(tokenizer, made, replace(PLAIN, clause_words=11))
    assert longer == "who after the war the old bridge of alda was built by in 1810?"
    whole = ask(tokenizer, made, replace(PLAIN, clause_words=100)) or ""
    assert whole.startswith("who after the war") and whole.endswith("it stood for long?")
    assert ask(tokenizer, made, replace(PLAIN, max_side_words=2)) == "who built by in 1810?"


def test_forms_are_drawn_by_weight_and_only_the_noisy_one_has_noise(tokenizer: BertTokenizerFast) -> None:
    weights = {"noisy": 2.0, "clause": 0.0, "identity": 1.0, "template": 1.0}
    make = questions(tokenizer, replace(PLAIN, forms=weights, drop_prob=1.0, min_words=0))
    made = example(tokenizer, "Mara Venn", "person")
    count = Counter(text(tokenizer, make(made, np.random.default_rng(seed))) for seed in range(400))
    noisy, identity, template = (
        count[question]
        for question in (
            "who?",
            "the old bridge of alda was built by who in 1810?",
            "who in 1810, the old bridge of alda was built by?",
        )
    )
    assert noisy + identity + template == 400
    assert 160 < noisy < 240 and 70 < identity < 130 and 70 < template < 130


def test_question_words_follow_the_answer_and_none_are_needed(tokenizer: BertTokenizerFast) -> None:
    def words(span: str, kind: str, sentence: str, config: PseudoQuestionConfig = PLAIN) -> set[str]:
        made = example(tokenizer, span, kind, sentence)
        return {(ask(tokenizer, made, config, seed) or "").split(" the old")[0] for seed in range(20)}

    assert words("1810", "date", "The old bridge of Alda was built in 1810.") == {"when", "what year", "in what year"}
    assert words("May 1810", "date", "The old bridge of Alda was built in May 1810.") == {"when"}
    assert words("3", "number", "The old bridge of Alda was built for 3.") == {"how many", "how much", "what number"}
    assert words("3rd", "number", "The old bridge of Alda was 3rd.") == {"which", "what"}
    years = replace(PLAIN, question_words={"date": ("what year",), "ordinal": ("what",)})
    assert words("1810", "date", "The old bridge of Alda was built in 1810.", years) == {"what year"}
    none = replace(PLAIN, question_words={})
    assert (
        ask(tokenizer, example(tokenizer, "1810", "date"), none) == "the old bridge of alda was built by mara venn in?"
    )


def test_noise_drops_and_moves_words_by_a_bounded_distance(tokenizer: BertTokenizerFast) -> None:
    made = example(tokenizer, "Mara Venn", "person")
    clause = (ask(tokenizer, made, PLAIN) or "").rstrip("?").split()[1:]
    make = questions(tokenizer, replace(PLAIN, shuffle=3.0, drop_prob=0.2, min_words=0, source_noise=2.0))
    for noise, noisy in ((1.0, make), (2.0, make.with_noise)):
        kept, moved = 0, 0
        for seed in range(200):
            asked = text(tokenizer, noisy(made, np.random.default_rng(seed))) or ""
            places = [clause.index(word) for word in asked.rstrip("?").split()[1:]]
            distances = [abs(sorted(places).index(place) - number) for number, place in enumerate(places)]
            assert all(distance < 3 * noise for distance in distances)
            kept += len(places)
            moved += sum(distances)
        share = kept / (200 * len(clause))
        assert abs(share - (1 - 0.2 * noise)) < 0.05 and moved > 200


def test_marks_inside_words_join_them(tokenizer: BertTokenizerFast) -> None:
    def split(sentence: str) -> list[str]:
        ids = encode(tokenizer, sentence)
        return [words.text(ids[word.start : word.end]) for word in words.split(ids) if not word.is_mark]

    words = Words(tokenizer)
    assert split("a two-year-old, it's J. K. Venn's; no. 3") == ["a", "two-year-old", "it's", "j.k.venn's", "no", "3"]
    assert split("1,000,000 in 1810, 200 in May 4, 1.5 and $3") == (
        ["1,000,000", "in", "1810,200", "in", "may", "4", "1.5", "and", "$", "3"]
    ), "a number before a comma and three digits is one word"
    assert split("the 'old' war") == ["the", "old", "war"]


def test_brackets_are_left_out_unless_the_answer_is_inside(tokenizer: BertTokenizerFast) -> None:
    sentence = "Mara Venn (born in May 1760 (in Alda)) built (it stood for long) the bridge."
    built = ask(tokenizer, example(tokenizer, "bridge", "other", sentence), replace(PLAIN, question_words={}))
    assert built == "mara venn built the?"
    born = ask(tokenizer, example(tokenizer, "May 1760", "date", sentence), replace(PLAIN, clause_words=5))
    assert born == "when mara venn born in built the bridge?"
    fragment = "1810) and the bridge of Alda was built by Mara Venn."
    assert ask(tokenizer, example(tokenizer, "Mara Venn", "person", fragment), PLAIN) is None


def test_sentences_that_do_not_make_a_question(tokenizer: BertTokenizerFast) -> None:
    made = example(tokenizer, "Mara Venn", "person", "It was built by Mara Venn.")
    assert ask(tokenizer, made, replace(PLAIN, min_words=4)) == "who it was built by?"
    assert ask(tokenizer, made, replace(PLAIN, min_words=5)) is None
    listed = example(tokenizer, "Mara Venn", "person", "Alda, Bo Kell, Mara Venn, Old Venn, war.")
    assert ask(tokenizer, listed, replace(PLAIN, min_frequent_share=0.2)) is None
    mixed = "Bridge, Mara Venn, old war bridge long, it was built in the war by Alda."
    asked = ask(tokenizer, example(tokenizer, "Mara Venn", "person", mixed), replace(PLAIN, min_frequent_share=0.4))
    assert asked == "who old war bridge long it was built in the war by alda?", "a longer clause with frequent words"
    twice = example(tokenizer, "Alda", "place", "The bridge of Alda was built by Alda for long.")
    assert ask(tokenizer, twice, PLAIN) is None, "the question would contain its answer"
    unknown = example(tokenizer, "\u4e00", "other", "The old bridge of Alda was \u4e00 for long.")
    assert ask(tokenizer, unknown, PLAIN) is None


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_questions_never_contain_their_answer_and_fit(tokenizer: BertTokenizerFast, data: st.DataObject) -> None:
    words = ["alda", "built", "(", ")", ",", ".", "war", "1810", "mara", "-", "the", "of"]
    sentence = data.draw(st.lists(st.sampled_from(words), min_size=1))
    ids = encode(tokenizer, " ".join(sentence))
    start = data.draw(st.integers(0, len(ids) - 1))
    made = MaskedSentence(0, ids, start, data.draw(st.integers(start + 1, len(ids))), 0)
    config = replace(
        PseudoQuestionConfig(phrase_prob=0.5, title_prob=0.5, min_words=1, min_frequent_share=0.0, source_noise=3.0),
        forms={data.draw(st.sampled_from(FORMS)): 1.0},
    )
    make = questions(tokenizer, config, "Alda (1810)", longest=12)
    asked = make(made, np.random.default_rng(0))
    if asked is None:
        return
    for found in filter(None, (asked, make.with_noise(asked, np.random.default_rng(0)))):
        assert found.question is not None and 2 <= len(found.question) <= 12
        assert tokenizer.decode(found.question[-1:]) == "?"
        assert not make.words.wordpieces.find(found.question, found.span_ids)
        assert found.span_ids.tolist() == asked.span_ids.tolist(), "more noise does not change the answer"
        masked = replace(found, question=None).query_ids(tokenizer.mask_token_id)
        assert (masked == tokenizer.mask_token_id).sum() == found.end - found.start


def test_frequent_words_are_counted_in_a_few_places_of_a_large_corpus(tokenizer: BertTokenizerFast) -> None:
    large = Corpus(encode(tokenizer, "the bridge of alda , 1810 1811 ;" + " the" * 3), np.zeros(0, np.int32), 3_000_000)
    words = Words(tokenizer)
    words.count_frequent(large, 200)  # type: ignore[arg-type]
    assert len(large.read) == 64 * 64 and {0, 63, 2_999_999} <= large.read
    assert sum(row + 1 not in large.read for row in large.read) == 64, "consecutive rows, of few parts of the file"
    words.count_frequent(corpus(tokenizer, rows=18), 200)  # type: ignore[arg-type]
    assert words.frequent == {encode(tokenizer, word).tobytes() for word in FREQUENT}, "a tenth of 90 words"
    words.count_frequent(corpus(tokenizer, rows=18), 2)  # type: ignore[arg-type]
    assert words.frequent == {encode(tokenizer, word).tobytes() for word in ("the", "of")}, "in most blocks"


def test_phrases_are_runs_of_content_words_away_from_names(tokenizer: BertTokenizerFast) -> None:
    sentence = "In 1810 the long old-war bridge of Mara Venn stood for years by the Alda road and it was a dispute."
    made = example(tokenizer, "Alda", "place", sentence, ("1810", "Mara Venn"))
    make = questions(tokenizer, replace(PLAIN, phrase_prob=1.0, question_words={"phrase": ("what",)}))
    found = {}
    for seed in range(50):
        asked = make(made, np.random.default_rng(seed))
        if asked is not None:
            assert asked.kind == PHRASE
            found[tokenizer.decode(asked.span_ids)] = asked
    assert set(found) == {"long old - war bridge", "years", "dispute"}, (
        "neither `stood` nor `road`, which stand next to a name"
    )
    asked = found["years"]
    assert (
        text(tokenizer, asked)
        == "what in 1810 the long old - war bridge of mara venn stood for by the alda road and it was a dispute?"
    )
    assert [tokenizer.decode(other) for other in asked.others] == ["mara venn", "alda"]
    short = example(tokenizer, "Mara Venn", "person", "It was for the Mara Venn of it.")
    kept = make(short, np.random.default_rng(0))
    assert kept is not None and kept.kind == short.kind, "a sentence without a phrase keeps its salient span"


def test_other_spans_of_a_question_are_the_names_in_it(tokenizer: BertTokenizerFast) -> None:
    sentence = "After the war of Kell, the old bridge (or Otto) of Alda was built by Mara Venn in 1810."
    made = example(tokenizer, "Mara Venn", "person", sentence, ("Kell", "Otto", "Alda", "1810"))

    def others(config: PseudoQuestionConfig) -> list[str]:
        asked = questions(tokenizer, config, "Brell Inn")(made, np.random.default_rng(0))
        assert asked is not None
        return [tokenizer.decode(other) for other in asked.others]

    year = questions(tokenizer, PLAIN)(
        example(tokenizer, "1810", "date", sentence, ("Kell", "Alda")), np.random.default_rng(0)
    )
    assert year is not None and year.others == (), "a year and a name are in many passages"
    assert others(PLAIN) == ["alda"], "neither in brackets nor in another clause, and no number"
    assert others(replace(PLAIN, clause_words=100)) == ["kell", "alda"]
    assert others(replace(PLAIN, title_prob=1.0)) == ["alda", "brell inn"], "the title that is added"


def test_titles_are_added_to_questions_that_do_not_name_them(tokenizer: BertTokenizerFast) -> None:
    made = example(tokenizer, "Mara Venn", "person", "It was built by Mara Venn in 1810.")
    titled = replace(PLAIN, title_prob=1.0)
    assert (
        ask(tokenizer, made, titled, title="The Bridge of Alda (Kell)")
        == "who the bridge of alda it was built by in 1810?"
    )
    assert ask(tokenizer, made, replace(PLAIN, title_prob=0.0), title="Alda") == "who it was built by in 1810?"
    assert ask(tokenizer, made, titled, title="The 1810 war") == "who it was built by in 1810?", "it is named"
    assert ask(tokenizer, replace(made, row=-1), titled, title="Alda") == "who it was built by in 1810?"
    assert ask(tokenizer, made, titled) == "who it was built by in 1810?"


def test_substitution_replaces_the_answer_and_not_the_question(tokenizer: BertTokenizerFast) -> None:
    words = Wordpieces.from_tokenizer(tokenizer)
    make = questions(tokenizer, PLAIN)
    asked = make(example(tokenizer, "Mara Venn", "person"), np.random.default_rng(0))
    assert asked is not None
    passage, other = encode(tokenizer, "Mara Venn built it in 1810."), encode(tokenizer, "Bo Kell")
    rng = np.random.default_rng(0)
    changed, (read,) = substitute(asked, [passage], {0: [other]}, words, rng)
    assert changed.span_ids.tolist() == other.tolist() and changed.question is asked.question
    assert tokenizer.decode(read) == "bo kell built it in 1810."
    for pool in ({0: [encode(tokenizer, "Alda")]}, {3: [other]}):
        same, (unread,) = substitute(asked, [passage], pool, words, rng)
        assert same is asked and unread is passage, "the question contains it; the pool has none of the type"


def test_invalid_settings_are_named() -> None:
    wrong = PseudoQuestionConfig(forms={"poem": 1.0, "noisy": -1.0}, question_words={"people": ("who",)}, drop_prob=2.0)
    problems = "\n".join(all_problems(wrong))
    for part in ("'poem' is not a form", "weight of noisy", "'people' is not a type", "drop_prob"):
        assert part in problems
    assert list(all_problems(PseudoQuestionConfig(forms={"noisy": 0.0}))) == (
        ["forms must have a form with a weight greater than 0"]
    )
    assert not list(all_problems(PseudoQuestionConfig()))
