"""Built-in rules for dates and numbers, in ordinary or space-tokenized text."""

import re

from realm.spans.words import MEASURES

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec)(?:\ ?\.)?)(?!\w)"
)
_WEEKDAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_DAY = r"(?:3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?(?![\w%])"
_YEAR = r"(?:1\d{3}|20\d{2})(?![\w%]|[.,]\d)"
_ERA = r"(?:BCE|BC|CE|AD|B\.\ ?C\.(?:\ ?E\.)?|A\.\ ?D\.|C\.\ ?E\.)(?!\w)"
_NUMBER_WORD = (
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|"
    r"seventeen|eighteen|nineteen|(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:-(?:one|two|three|four|five|six|seven|eight|nine))?)"
)
_ORDINAL_WORD = (
    r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|thirteenth|fourteenth|fifteenth|"
    r"sixteenth|seventeenth|eighteenth|nineteenth|twentieth|twenty-first)"
)
_PART = r"(?:early|mid|middle|late|later|beginning|end)"
_SEASON = r"(?:[Ss]pring|[Ss]ummer|[Aa]utumn|[Ff]all|[Ww]inter)"
_UNIT = r"(?:day|week|weekend|month|year|decade|century|season|summer|winter|spring|autumn|morning|evening|night)"
_UNITS = r"(?:days?|weeks?|months?|years?|decades?|centuries|century|hours?|minutes?)"
_DIGITS = r"\d[\d,]{0,20}"
_COUNT = rf"(?:[Aa]n?|{_DIGITS}|{_NUMBER_WORD}|several|many|(?:a\ )?few|some|a\ couple\ of)"
_OF_YEAR = rf"(?:\ ?,\ ?|\ (?:of\ )?){_YEAR}"
_TH = r"\d{1,2}(?:st|nd|rd|th)"

_DATE = re.compile(
    rf"""(?<![\w$£€#.])(?:
      (?:{_WEEKDAY}\ ?,?\ )?(?:
          {_DAY}(?:\ ?[-\u2013/]\ ?{_DAY})?\ (?:of\ )?{_MONTH}(?:{_OF_YEAR}|\ \d{{3}}(?!\w))?
        | {_MONTH}\ {_DAY}(?:\ ?[-\u2013]\ ?{_DAY})?(?:{_OF_YEAR})?)
    | \d{{4}}-\d\d-\d\d(?!\w) | \d{{1,2}}/\d{{1,2}}/(?:\d{{4}}|\d\d)(?!\w)
    | (?:{_PART}[-\ ])?{_MONTH}(?:{_OF_YEAR})
    | (?:{_PART}[-\ ])?{_SEASON}\ (?:of\ )?{_YEAR}
    | (?:{_PART}[-\ ])?(?:to[-\ ]{_PART}[-\ ])?(?:1\d|20)\d0\ ?['\u2019]?s(?!\w)
    | (?:{_PART}[-\ ])?(?:{_TH}|{_ORDINAL_WORD})(?:\ ?-\ ?|\ )[Cc]entur(?:y|ies)(?:\ {_ERA})?
    | {_DIGITS}(?:\ ?[-\u2013]\ ?{_DIGITS})?\ {_ERA} | A\.?D\.?\ \d+(?!\w)
    | {_YEAR} | (?:(?<=\d{{4}}\ [\u2013-]\ )|(?<=\d{{4}}[\u2013-]))\d\d(?!\w)
    | (?:(?<=c\.\ )|(?<=circa\ )|(?<=year\ ))\d{{3}}(?!\w|[.,]\d)
    | (?<=[Ii]n\ )\d{{3}}(?=\ (?:,|[A-Z(]|he\b|she\b|the\b))
    | {_PART}[-\ ]{_MONTH} | {_WEEKDAY}(?!\w)
    | (?:January|February|April|June|July|August|September|October|November|December)(?!\w)
    | (?:(?<=[Ii]n\ )|(?<=to\ )|(?<=rom\ )|(?<=ince\ )|(?<=ntil\ )|(?<=[Bb]y\ )|(?<=hrough\ )|(?<=and\ ))
      (?:March|May)(?!\w)
    | (?:[Yy]esterday|[Tt]omorrow|[Tt]onight)(?!\w)
    | (?:[Tt]his|[Ll]ast|[Nn]ext|[Tt]hat|[Tt]he\ (?:following|previous|next|same|past|last))
      \ (?:same\ )?(?:past\ )?{_UNIT}(?!\w)
    | [Tt]he\ (?:past|last|next)\ {_COUNT}\ {_UNITS}(?!\w)
    | {_COUNT}\ {_UNITS}\ (?:ago|later|earlier)(?!\w)
    )""",
    re.VERBOSE,
)
# A search for literal beginnings is several times as fast as trying the whole expression at every
# character.
_BEGINNINGS = (
    r"\d|Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec|Mon|Tue|Wed|Thu|Fri|Sat|Sun|AD|A\.D|"
    r"Spring|Summer|Autumn|Fall|Winter|spring|summer|autumn|fall|winter|early|mid|late|beg|end|"
    r"first|sec|third|four|fif|six|sev|eigh|nin|ten|elev|twel|thirt|twen|yest|Yest|tom|Tom|ton|Ton|"
    r"this |This |last |Last |next |Next |that |That |the [fpnsl]|The [fpnsl]"
)
_MAY_BEGIN = re.compile(rf"(?<!\w)(?:{_BEGINNINGS})")
_MAY_BEGIN_RELATIVE = re.compile(rf"(?<!\w)(?:{_BEGINNINGS}|a|A|one|two|three|forty|several|many|few|some)")
_NEXT_WORD = re.compile(r"\s?-?\s?([\w%]+)")
_YEAR_CUE = re.compile(
    r"(?:[Ii]n|[Ss]ince|[Uu]ntil|till|[Bb]y|[Ff]rom|[Bb]etween|[Aa]round|[Cc]irca|[Cc]a?\s?\.|[Bb]efore|[Aa]fter|[(\u2013-])\s?$"
)


def date_spans(text: str) -> list[tuple[int, int]]:
    """Date expressions of `text` as sorted, non-overlapping (start, end) character offsets."""
    relative = " ago" in text or " later" in text or " earlier" in text
    may_begin = _MAY_BEGIN_RELATIVE if relative else _MAY_BEGIN
    spans, done = [], 0
    while beginning := may_begin.search(text, done):
        start = beginning.start()
        match = _DATE.match(text, start)
        done = match.end() if match else start + 1
        if match and (done - start != 4 or not text[start].isdigit() or _is_year(text, start)):
            spans.append((start, done))
    return spans


def _is_year(text: str, start: int) -> bool:
    """Whether the four digits at `start` are a year and not a quantity.

    Decided by the word after them and, for unlikely years, also by the word before.
    """
    following = _NEXT_WORD.match(text, start + 4)
    if following and following[1] in MEASURES:
        return False
    return "1400" <= text[start : start + 4] < "2040" or bool(_YEAR_CUE.search(text, max(0, start - 9), start))


_NUMBER = re.compile(r"(?<![\w.,])(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:st|nd|rd|th)?(?![\w]|[.,]\d)")


def number_spans(text: str) -> list[tuple[int, int]]:
    """Numbers in digits, years included, as sorted (start, end) character offsets."""
    return [match.span() for match in _NUMBER.finditer(text)]
