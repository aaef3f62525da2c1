"""Built-in salient-span rules: dates, entities and numbers found by regular expressions.

The rules are for use without a trained spaCy pipeline. They work on ordinary and space-tokenized
text (`word ,`) and use only the text and a few fixed word lists. Exact boundaries matter more than
correct types.
"""

import re
from typing import NamedTuple

from realm.spans.dates import date_spans, number_spans
from realm.spans.words import (
    ABBREVIATIONS,
    AFTER_NAMES,
    AND_PAIRS,
    BEFORE_PLACES,
    BYNAMES,
    CAPITAL_STOP_WORDS,
    DEMONYM,
    EVENTS,
    FIRST_NAMES,
    FOR_HEADS,
    HEADS,
    NEVER_NAMES,
    OFFICES,
    ORGANISATION_WORDS,
    PARTICLES,
    PLACE_WORDS,
    POSSESSED,
    SMALL_WORDS,
    STARTER_SUFFIX,
    STARTERS,
    TITLES,
)

SPAN_TYPES: tuple[str, ...] = ("person", "place", "organisation", "date", "number", "other")
"""Span types. Files contain indices into this tuple, so its order is part of the file format."""
RULES_VERSION = 1
"""Increment this when the results of the rules change; it is part of the cache key."""


class SalientSpan(NamedTuple):
    """A named entity, date or number.

    `start` and `end` (exclusive) are character offsets, `type` is one of `SPAN_TYPES`.
    """

    start: int
    end: int
    type: str


_UPPER = "A-Z" + "".join(c for c in map(chr, range(0x80, 0x2FFF)) if c.isupper())
_NAME = re.compile(
    rf"""[{_UPPER}](?:
      \.(?:\ ?-?[{_UPPER}]\.)*(?!\w)(?:[{_UPPER}](?!\w))?
    | [\w&]*(?:(?:[-\u2013'\u2019&./\u02bc](?![st]\b)|['\u2019]s-)[\w&]+)* )""",
    re.VERBOSE,
)
_PREFIX = re.compile(r"(?<!\w)(?:[a-z]{1,3}[-'\u2019]|[a-z])$")
_OPENING = re.compile(r"(?:^|[.!?:;)\]\n]|[.!?]\ ?[\"'”\u2019)])\s*[\"“('\u2018]?\s*$")
_QUOTED = re.compile(r'(?:"|``|“) ?([^"“”`]{1,90}?) ?(?:"|\'\'|”)')
_FOLLOWING = re.compile(r"\s?([\w'\u2019]+|\S)")
_YEAR_BEFORE = re.compile(r"(?<![\w.,-])(?:1[89]|20)\d\d(?:\ ?[\u2013-]\ ?\d\d)?\ $")
_NUMBER_AFTER = re.compile(
    r"\ (?:\d{1,3}|[3-9]\d{3})(?![\w,%]|\.\d|\ ?[\u2013-]|\ (?:[a-z]+s|to|of|and|million|billion|per)\b)"
)
_VERB_OF_I = re.compile(
    r" (?:am|was|have|had|['\u2019]\w+|would|will|did|do|think|know|love|want|can|could|should|never|always|also)\b"
)
_COMPOUND = re.compile(
    r"-(?:themed|rated|style|free|animated|based|born|era|like|funded|speaking|only|led|winning|nominated|owned|shaped|wide)$"
)
_INSTITUTIONS = HEADS | POSSESSED
_OCCUPATION = re.compile(
    r"(?:ist|mate|grapher|ician|logian|Singer|Actor|Actress|Producer|Writer|Author|Drummer|Composer|Painter|Historian|Engineer)$"
)


def entity_spans(text: str, dates: list[tuple[int, int]]) -> list[SalientSpan]:
    """Names in `text` that do not overlap `dates` (sorted).

    Names are quoted titles and runs of capitalized words with the particles that join them.
    """
    quoted = _quoted_titles(text, dates)
    blocked = sorted(quoted + dates)
    spans = [SalientSpan(start, end, "other") for start, end in quoted]
    run: list[tuple[int, int]] = []
    place = run_place = 0
    for match in _NAME.finditer(text):
        start, end = match.span()
        if start and (text[start - 1].isalnum() or text[start - 1] in "-'\u2019"):
            if prefix := _PREFIX.search(text, max(0, start - 4), start):
                start = prefix.start()
            elif text[start - 1].isalnum():
                continue
        if text[end : end + 1] == "." and match[0] in ABBREVIATIONS:
            end += 1
        token = (start, end)
        while place < len(blocked) and blocked[place][1] <= token[0]:
            place += 1
        if place < len(blocked) and blocked[place][0] < token[1]:
            continue
        if run and not (place == run_place and _continues_name(text, run, token)):
            spans += _names_in_run(text, run)
            run = []
        run.append(token)
        run_place = place
    if run:
        spans += _names_in_run(text, run)
    surnames = {text[span.start : span.end].rpartition(" ")[2] for span in spans if span.type == "person"}
    spans = [
        span._replace(type="person") if span.type == "other" and text[span.start : span.end] in surnames else span
        for span in spans
    ]
    return _add_non_overlapping([], sorted(spans))


def _quoted_titles(text: str, dates: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Quoted titles of works: every word except small words is capitalized.

    This excludes quoted speech and Latin species names.
    """
    spans = []
    for match in _QUOTED.finditer(text):
        inside = match[1].rstrip(",.;: \t\n\r").strip()
        words = inside.split()
        if not words or not (words[0][0].isupper() or words[0][0].isdigit()) or inside.isnumeric():
            continue
        if any(word[0].isalpha() and not word[0].isupper() and word not in SMALL_WORDS for word in words[1:]):
            continue
        if (len(words) == 1 and (len(inside) == 1 or inside in NEVER_NAMES)) or words[-1] in SMALL_WORDS:
            continue
        start = match.start(1) + len(match[1]) - len(match[1].lstrip())
        span = (start, start + len(inside))
        if span not in dates and not any(first < span[0] < last or first < span[1] < last for first, last in dates):
            spans.append(span)
    return spans


def _continues_name(text: str, run: list[tuple[int, int]], token: tuple[int, int]) -> bool:
    """Whether the capitalized word `token` continues the name that ends with `run`."""
    gap = text[run[-1][1] : token[0]]
    last, word = text[slice(*run[-1])], text[slice(*token)]
    if gap == " ":
        return last not in ("Inc.", "Ltd.", "Jr.", "Sr.") and (word != "I" or not _VERB_OF_I.match(text, token[1]))
    if gap[:1] == " " and gap[-1:] == " " and len(gap) > 2:
        joiner = gap[1:-1]
        if joiner in PARTICLES:
            return last not in CAPITAL_STOP_WORDS
        head = text[slice(*run[0])]
        if joiner in ("for", "for the"):
            return last in FOR_HEADS
        if joiner in ("of", "of the"):
            # "Bank of Canada" and "Isle of Man", but not "Brent Hinds of Mastodon": two ordinary
            # words before "of" are a person.
            return last not in CAPITAL_STOP_WORDS and (
                len(run) - (head in CAPITAL_STOP_WORDS) < 2
                or last in HEADS
                or head in HEADS
                or " of " in text[run[0][0] : run[-1][0]]
            )
        if joiner == "and":
            span = text[run[0][0] : run[-1][1]]
            return (head in HEADS and (" of " in span or " for " in span) and word not in HEADS) or (
                last,
                word,
            ) in AND_PAIRS
        if joiner == "at":
            return head == "University"
        if joiner == "the":
            return word in BYNAMES
    if gap in (" 's ", "'s ", "\u2019s ", " \u2019s "):
        return word in POSSESSED or text[slice(*run[0])] == "St."
    return gap in (". ", " . ") and last in ("St", "Mt", "Ft")


def _names_in_run(text: str, run: list[tuple[int, int]]) -> list[SalientSpan]:
    """Names in a run of capitalized words, without the sentence's first word, titles and roles.

    An office between two names separates them ("Soviet Premier Nikita Khrushchev").
    """
    words = [text[slice(*token)] for token in run]
    begin, end = run[0][0], run[-1][1]
    after_word = begin > 1 and text[begin - 1] == " " and (text[begin - 2].isalnum() or text[begin - 2] == ",")
    opening = not after_word and bool(_OPENING.search(text, max(0, begin - 5), begin))
    first = 0
    if (
        (words[0] in CAPITAL_STOP_WORDS and (opening or words[0] in ("A", "An", "This", "That", "The")))
        or (opening and (words[0].lower() in STARTERS or (len(run) == 1 and not _is_subject(text, words[0], end))))
        or (len(run) > 2 and _OCCUPATION.search(words[0]))
    ):
        first = 1
    for k in range(first + 1, len(run) - 1):
        if words[k] in OFFICES and text[run[k - 1][1] : run[k][0]] == " ":
            return _names_in_run(text, run[first:k]) + _names_in_run(text, run[k:])
    titled = False
    while first < len(run) and words[first].rstrip(".") in TITLES:
        if (
            first + 1 < len(run)
            and words[first + 1] in _INSTITUTIONS
            and text[run[first][1] : run[first + 1][0]] == " "
        ):
            break
        titled = True
        first += 1
    while first < len(run) and (words[first] in NEVER_NAMES or len(words[first].rstrip(".")) == 1):
        if first + 1 < len(run) and (
            words[first][-1] == "." or (text[run[first][1] : run[first + 1][0]] == " " and len(words[first]) > 1)
        ):
            break
        first += 1
    if first == len(run) or (first == len(run) - 1 and _COMPOUND.search(words[first])):
        return []
    begin = run[first][0]
    if EVENTS.intersection(words[first:]) and (before := _YEAR_BEFORE.search(text, max(0, begin - 12), begin)):
        begin = before.start()
    if after := _NUMBER_AFTER.match(text, end):
        end = after.end()
    return [SalientSpan(begin, end, _guess_type(text, begin, words[first:], titled))]


def _is_subject(text: str, word: str, end: int) -> bool:
    """Whether the single capitalized word that begins a sentence is a name.

    Decided by its letters and by the following word.
    """
    if not word[1:].islower():
        return word not in NEVER_NAMES
    following = _FOLLOWING.match(text, end)
    after = following[1] if following else "."
    if STARTER_SUFFIX.search(word) or (word.endswith("s") and after in ("are", "were", "have", "of")):
        return False
    return after in AFTER_NAMES or after.endswith("ed") or not after[0].isalnum()


def _guess_type(text: str, begin: int, words: list[str], titled: bool) -> str:
    """Guess the type of the name `words` at `begin` from its words and the preceding word."""
    kinds = set(words)
    if titled:
        return "person"
    if kinds & EVENTS:
        return "other"
    if words[-1] in PLACE_WORDS:
        return "place"
    if kinds & ORGANISATION_WORDS or (words[-1] == "United" and len(words) > 1):
        return "organisation"
    if kinds & PLACE_WORDS:
        return "place"
    if len(words) > 1 and (words[0] in FIRST_NAMES or any(len(word) == 2 and word[1] == "." for word in words[:-1])):
        return "person"
    before = text[max(0, begin - 12) : begin].split()
    if before and before[-1] in BEFORE_PLACES:
        return "place"
    if len(words) == 1:
        return (
            "organisation"
            if len(words[0]) > 1 and words[0].isupper()
            else "person"
            if words[0] in FIRST_NAMES
            else "other"
        )
    no_article = not before or before[-1].lower() not in ("the", "a", "an")
    return "person" if len(words) < 4 and no_article and not DEMONYM.search(words[0]) and not kinds & HEADS else "other"


def builtin_spans(text: str) -> list[SalientSpan]:
    """All salient spans of `text`: sorted, non-overlapping, without surrounding white space."""
    dates = date_spans(text)
    spans = entity_spans(text, dates)
    for candidates, span_type in ((dates, "date"), (number_spans(text), "number")):
        spans = _add_non_overlapping(spans, [SalientSpan(start, end, span_type) for start, end in candidates])
    return spans


def _add_non_overlapping(spans: list[SalientSpan], candidates: list[SalientSpan]) -> list[SalientSpan]:
    """Add those `candidates` that overlap no span and no earlier candidate; all are sorted."""
    free: list[SalientSpan] = []
    place = 0
    for candidate in candidates:
        while place < len(spans) and spans[place].end <= candidate.start:
            place += 1
        if (place == len(spans) or candidate.end <= spans[place].start) and (
            not free or free[-1].end <= candidate.start
        ):
            free.append(candidate)
    return sorted(spans + free)
