"""Open-domain question answering metrics, each with its convention.

Exact match and F1 use the SQuAD normalization (lower case, no punctuation, no articles, single
spaces), by default after Unicode NFD so that composed and decomposed spellings match. Answers are
searched in passages by whole tokens, as in DPR, or as substrings, as in ORQA. Patterns
(`finetune.patterns`) must match a whole prediction, and may match anywhere in a passage.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b(?![\u0300-\u036f])")
"""Articles as whole words; the "the" of a decomposed "thé" is followed by an accent."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
"""DPR's tokens: runs of letters, digits and marks, and every other visible character alone."""


def normalize_answer(text: str, nfd: bool = True) -> str:
    """Normalize as the SQuAD v1.1 script does; with `nfd=False`, exactly as it does."""
    if nfd:
        text = unicodedata.normalize("NFD", text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str], nfd: bool = True) -> bool:
    """Whether the prediction equals any answer after normalization."""
    return any(normalize_answer(prediction, nfd) == normalize_answer(answer, nfd) for answer in answers)


def f1(prediction: str, answers: Sequence[str], nfd: bool = True) -> float:
    """Largest token F1 of the prediction against any answer, 0 to 1."""
    return max(
        (_f1(normalize_answer(prediction, nfd).split(), normalize_answer(answer, nfd).split()) for answer in answers),
        default=0.0,
    )


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def answer_tokens(text: str) -> list[str]:
    """Lower-case tokens after NFD, as in DPR's evaluation."""
    return _TOKEN.findall(unicodedata.normalize("NFD", text).lower())


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the text contains the consecutive tokens of any answer (DPR).

    An answer without tokens does not match.
    """
    tokens = f"\0{chr(0).join(answer_tokens(text))}\0"
    return any((answer := answer_tokens(text_)) and f"\0{chr(0).join(answer)}\0" in tokens for text_ in answers)


def has_substring(text: str, answers: Sequence[str]) -> bool:
    """Whether any answer is a substring of the text, ignoring case and composition (ORQA).

    "hij" matches in "hijklmn". A blank answer does not match.
    """
    folded = unicodedata.normalize("NFD", text).lower()
    return any(
        (answer := unicodedata.normalize("NFD", text_).lower().strip()) and answer in folded for text_ in answers
    )


def answers_in_corpus(texts: Iterable[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether any text contains an answer to each question (`has_answer`), (questions,) bool.

    Takes one pass over the texts.
    """
    questions_of: dict[str, list[int]] = {}
    by_first: dict[str, set[str]] = {}
    for number, accepted in enumerate(answers):
        for tokens in map(answer_tokens, accepted):
            if tokens:
                key = "\0".join(tokens)
                questions_of.setdefault(key, []).append(number)
                by_first.setdefault(tokens[0], set()).add(f"{key}\0")
    found = np.zeros(len(answers), dtype=bool)
    for text in texts:
        tokens = answer_tokens(text)
        starts = [token for token in set(tokens) if token in by_first]
        if not starts:
            continue
        joined = f"\0{chr(0).join(tokens)}\0"
        for first in starts:
            here = [key for key in by_first[first] if f"\0{key}" in joined]
            for key in here:
                found[questions_of[key[:-1]]] = True
                by_first[first].discard(key)
            if not by_first[first]:
                del by_first[first]
    return found
