"""Open-domain question answering metrics, each with its convention.

Exact match and F1 use the SQuAD normaliser (lower case, no punctuation, no articles, single spaces), by default after Unicode NFD so that
composed and decomposed spellings agree. `has_answer` matches whole tokens, as DPR does.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TOKEN = re.compile(r"\w+|[^\w\s]")


def normalize_answer(text: str, nfd: bool = True) -> str:
    """The SQuAD v1.1 script's normal form; `nfd=False` is that script to the letter."""
    if nfd:
        text = unicodedata.normalize("NFD", text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str], nfd: bool = True) -> bool:
    """Whether the prediction equals any answer after normalisation."""
    return any(normalize_answer(prediction, nfd) == normalize_answer(answer, nfd) for answer in answers)


def f1(prediction: str, answers: Sequence[str], nfd: bool = True) -> float:
    """Largest token F1 of the prediction against any answer, 0 to 1."""
    return max((_f1(normalize_answer(prediction, nfd).split(), normalize_answer(answer, nfd).split()) for answer in answers), default=0.0)


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the tokens of any answer stand in the text one after the other, case and composition aside; an empty answer stands nowhere."""
    tokens = f"\0{chr(0).join(_tokens(text))}\0"
    return any((answer := _tokens(text_)) and f"\0{chr(0).join(answer)}\0" in tokens for text_ in answers)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(unicodedata.normalize("NFC", text).lower())
