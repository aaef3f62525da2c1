"""The built-in rules on ordinary and space-tokenized sentences."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realm.spans.dates import date_spans
from realm.spans.rules import SPAN_TYPES, builtin_spans


def _found(text: str, *types: str) -> list[str]:
    return [text[span.start : span.end] for span in builtin_spans(text) if not types or span.type in types]


def _names(text: str) -> list[str]:
    return _found(text, "person", "place", "organisation", "other")


@pytest.mark.parametrize(
    ("text", "dates"),
    [
        ("It opened on 3 May 1921.", ["3 May 1921"]),
        ("It opened on May 3 , 1921 .", ["May 3 , 1921"]),
        ("Sunday, May 28, 2006 was hot.", ["Sunday, May 28, 2006"]),
        ("Built in the late 1970s and rebuilt in 1998.", ["late 1970s", "1998"]),
        ("From 1914 to 1918 he wrote.", ["1914", "1918"]),
        ("a bridge of the 19th century", ["19th century"]),
        ("They met two years ago and again last week.", ["two years ago", "last week"]),
        ("He ruled until 43 BC.", ["43 BC"]),
        ("In winter 1941 it froze.", ["winter 1941"]),
        ("The file is dated 2021-03-04.", ["2021-03-04"]),
        ("open from March to August", ["March", "August"]),
        ("She may march in the fall of the city.", []),
        ("a village of 1700 people, 1850 m high", []),
        ("It cost $1995 and weighs 1,950 kg.", []),
        ("Room 1250 is shut.", []),
        ("Nearly all towers stand here.", []),
    ],
)
def test_date_expressions(text: str, dates: list[str]) -> None:
    assert [text[start:end] for start, end in date_spans(text)] == dates


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("In Lisbon the rain fell.", ["Lisbon"]),
        ("The river Tagus reaches Lisbon.", ["Tagus", "Lisbon"]),
        ("Lisbon is a port.", ["Lisbon"]),
        ("However, rivers are long.", []),
        ("Rivers flow.", []),
        ("President Ada Quill met Dr. Omar Reyes.", ["Ada Quill", "Omar Reyes"]),
        ("He studied at the University of Porto and the Bank of Ghana .", ["University of Porto", "Bank of Ghana"]),
        ("a letter from Ludwig van Beethoven to Charles de Gaulle", ["Ludwig van Beethoven", "Charles de Gaulle"]),
        ("Quill's house and Quill 's garden", ["Quill", "Quill"]),
        ('She sang " The Glass Orchard " twice .', ["The Glass Orchard"]),
        ('He said "we are late" and left.', []),
        ("the poet J. K. Marsh of the U.S. Army", ["J. K. Marsh", "U.S. Army"]),
        ("the Anglo-Saxon kings", ["Anglo-Saxon"]),
        ("at St. Louis and Mt. Kenya", ["St. Louis", "Mt. Kenya"]),
        ("the 1976 Summer Olympics in Montreal", ["1976 Summer Olympics", "Montreal"]),
        ("when Soviet Premier Nikita Khrushchev spoke", ["Soviet", "Nikita Khrushchev"]),
        ("They own a TV and I own a DVD.", []),
        ("during World War I in Belgium", ["World War I", "Belgium"]),
        ("in Århus and Łódź", ["Århus", "Łódź"]),
    ],
)
def test_names(text: str, names: list[str]) -> None:
    assert _names(text) == names


@pytest.mark.parametrize(
    ("text", "span", "span_type"),
    [
        ("Mary Shelley wrote it.", "Mary Shelley", "person"),
        ("Sir Quill wrote it.", "Quill", "person"),
        ("She lives in Quito.", "Quito", "place"),
        ("beyond the Moro River", "Moro River", "place"),
        ("the University of Porto", "University of Porto", "organisation"),
        ("in 1969 it rained", "1969", "date"),
        ("there are 12,400 trees", "12,400", "number"),
        ("about 1850 m high", "1850", "number"),
        ("a length of 3.5 m", "3.5", "number"),
        ("the 1976 Summer Olympics", "1976 Summer Olympics", "other"),
    ],
)
def test_types(text: str, span: str, span_type: str) -> None:
    assert span in _found(text, span_type)


def test_surname_has_the_type_of_the_full_name() -> None:
    text = "Mary Oduya was born here. Later Oduya left."
    assert _found(text, "person") == ["Mary Oduya", "Oduya"]


_PIECES = st.sampled_from(
    [
        "Ada",
        "Quill",
        "the",
        "of",
        " ",
        "  ",
        ",",
        ".",
        '"',
        "'s",
        "1976",
        "Olympics",
        "May",
        "3",
        "\n",
        "\u00a0",
        "St.",
        "-",
        "I",
        "iPod",
        "al-",
        "Ł",
    ]
)


@given(st.one_of(st.text(), st.lists(_PIECES).map("".join), st.lists(_PIECES).map(" ".join)))
@example('" \u00a0Quill\u2003"')
@example("Quill 1976 Summer Olympics")
def test_spans_are_sorted_non_overlapping_and_trimmed(text: str) -> None:
    done = 0
    for start, end, span_type in builtin_spans(text):
        assert done <= start < end <= len(text)
        assert text[start:end] == text[start:end].strip()
        assert span_type in SPAN_TYPES
        done = end
