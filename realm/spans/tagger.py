"""Salient spans: the named entities, dates and numbers that pretraining masks (REALM, section 3.4).

`SpanTagger` runs any spaCy pipeline, or the built-in rules, over a stream of texts; `SpanCache`
keeps what it found on disk by text hash, so that a killed run goes on where it was.
"""

import hashlib
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from pathlib import Path

import spacy
from spacy.language import Language
from spacy.tokens import Doc, Span
from spacy.vocab import Vocab

from realm.errors import UserError
from realm.spans.rules import RULES_VERSION, SalientSpan, builtin_spans, date_spans

_BUILTIN_LABELS = {
    "person": "PERSON",
    "place": "GPE",
    "organisation": "ORG",
    "date": "DATE",
    "number": "CARDINAL",
    "other": "MISC",
}
_TYPE_OF_LABEL = {
    **dict.fromkeys(("PERSON", "PER"), "person"),
    **dict.fromkeys(("GPE", "LOC", "FAC"), "place"),
    **dict.fromkeys(("ORG", "NORP"), "organisation"),
    **dict.fromkeys(("DATE", "TIME"), "date"),
    **dict.fromkeys(("CARDINAL", "ORDINAL", "MONEY", "PERCENT", "QUANTITY"), "number"),
}
"""OntoNotes and CoNLL/WikiNER labels; every other label (MISC, WORK_OF_ART, EVENT, …) is "other"."""
_PIECE = re.compile(r"[^ ]+ ?| ")


@dataclass(frozen=True)
class SpanConfig:
    """Which spans are salient, and how they are found."""

    pipeline: str = "builtin"
    """"builtin" (rules, nothing to install) or any installed spaCy pipeline with entities, by
    name or path."""
    dates: bool = True
    """Also the date expressions of the built-in rules, whatever the pipeline; false with
    "builtin" leaves dates out."""
    batch_size: int = 256
    """Texts handed to spaCy at a time."""
    num_workers: int = 1
    """Processes that tag; more than one pays for itself from some ten thousand texts."""


class _RuleTokenizer:
    """Text to a spaCy `Doc` with the built-in spans as its entities.

    The rules read characters, not tokens, so the text is cut at blanks and at the spans' ends:
    several times as fast as English tokenisation, and every span stands on token boundaries.
    """

    def __init__(self, vocab: Vocab):
        self.vocab = vocab

    def __call__(self, text: str) -> Doc:
        pieces: list[str] = []
        places = []
        done = 0
        for start, end, span_type in builtin_spans(text):
            pieces += _PIECE.findall(text, done, start)
            first = len(pieces)
            pieces += _PIECE.findall(text, start, end)
            places.append((first, len(pieces), _BUILTIN_LABELS[span_type]))
            done = end
        pieces += _PIECE.findall(text, done)
        spaces = [len(piece) > 1 and piece[-1] == " " for piece in pieces]
        doc = Doc(
            self.vocab,
            words=[piece[:-1] if space else piece for piece, space in zip(pieces, spaces, strict=True)],
            spaces=spaces,
        )
        doc.ents = tuple(Span(doc, *place) for place in places)
        return doc


class SpanTagger:
    """A spaCy pipeline, with or without the built-in date expressions, as a stream from texts to
    salient spans."""

    def __init__(self, nlp: Language, name: str, config: SpanConfig):
        self.nlp = nlp
        self.name = name
        """What found the spans, and in which version: part of the cache's key."""
        self.config = config

    @classmethod
    def load(cls, config: SpanConfig) -> "SpanTagger":
        """Loads the pipeline of `config`. Raises UserError where it is not installed or marks no
        entities."""
        if config.pipeline == "builtin":
            nlp = spacy.blank("en")
            nlp.tokenizer = _RuleTokenizer(nlp.vocab)
            nlp.max_length = sys.maxsize
            return cls(nlp, f"builtin-{RULES_VERSION}" + ("" if config.dates else "-without-dates"), config)
        try:
            nlp = spacy.load(config.pipeline)
        except OSError as error:
            raise UserError(
                f"spaCy pipeline {config.pipeline!r} cannot be loaded: install it (python -m spacy download {config.pipeline}), give the "
                'path of one, or set the pipeline to "builtin"'
            ) from error
        if not any("doc.ents" in nlp.get_pipe_meta(pipe).assigns for pipe in nlp.pipe_names):
            raise UserError(
                f"spaCy pipeline {config.pipeline!r} marks no entities (components: {', '.join(nlp.pipe_names) or 'none'}): "
                "name one with an entity component, such as ner"
            )
        _disable_unused(nlp)
        name = f"{nlp.lang}_{nlp.meta['name']}-{nlp.meta['version']}"
        if Path(config.pipeline).is_dir():
            name += "-" + _folder_digest(Path(config.pipeline))
        return cls(nlp, name + (f"+dates-{RULES_VERSION}" if config.dates else ""), config)

    def tag(self, texts: Iterable[str]) -> Iterator[tuple[SalientSpan, ...]]:
        """Yields each text's salient spans in the order of `texts`: sorted, not overlapping,
        without white space at their ends."""
        if self.config.num_workers == 1:
            yield from self._tag_here(texts)
            return
        texts = iter(texts)
        pending: deque[AsyncResult[list[tuple[SalientSpan, ...]]]] = deque()
        # not nlp.pipe's own processes: those send whole documents back, which takes longer than the
        # rules
        with get_context("fork").Pool(self.config.num_workers, _adopt, (self,)) as pool:
            while batch := list(islice(texts, self.config.batch_size)):
                pending.append(pool.apply_async(_tag_batch, (batch,)))
                if len(pending) > 2 * self.config.num_workers:
                    yield from pending.popleft().get()
            while pending:
                yield from pending.popleft().get()

    def _tag_here(self, texts: Iterable[str]) -> Iterator[tuple[SalientSpan, ...]]:
        builtin = self.config.pipeline == "builtin"
        for doc in self.nlp.pipe(texts, batch_size=self.config.batch_size):
            found = [
                SalientSpan(entity.start_char, entity.end_char, _TYPE_OF_LABEL.get(entity.label_, "other"))
                for entity in doc.ents
            ]
            if builtin:
                yield tuple(found if self.config.dates else (span for span in found if span.type != "date"))
                continue
            text = doc.text
            found = [span for span in (_trimmed(span, text) for span in found) if span.start < span.end]
            yield _with_dates(found, text) if self.config.dates else tuple(found)


_worker_tagger: SpanTagger
"""A worker process's tagger, inherited at the fork."""


def _adopt(tagger: SpanTagger) -> None:
    global _worker_tagger
    _worker_tagger = tagger


def _tag_batch(texts: list[str]) -> list[tuple[SalientSpan, ...]]:
    return list(_worker_tagger._tag_here(texts))


def _disable_unused(nlp: Language) -> None:
    """Skips the parser and its like where they cannot touch the entities: they take half of a
    small pipeline's time."""
    unused = {"tagger", "parser", "senter", "lemmatizer", "attribute_ruler", "morphologizer"} & set(nlp.pipe_names)
    if set(nlp.pipe_names) - unused <= {"tok2vec", "transformer", "ner"}:
        for pipe in unused:
            nlp.disable_pipe(pipe)


def _folder_digest(folder: Path) -> str:
    """Digest of a pipeline folder's content: two pipelines trained by a user may well bear one
    name and version."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _trimmed(span: SalientSpan, text: str) -> SalientSpan:
    inside = text[span.start : span.end]
    return SalientSpan(
        span.start + len(inside) - len(inside.lstrip()), span.end - len(inside) + len(inside.rstrip()), span.type
    )


def _with_dates(found: list[SalientSpan], text: str) -> tuple[SalientSpan, ...]:
    """The pipeline's names first, then the rules' dates, then the pipeline's own dates and
    numbers, each where nothing stands yet."""
    is_name = [span.type not in ("date", "number") for span in found]
    dates = [SalientSpan(start, end, "date") for start, end in date_spans(text)]
    kept: list[SalientSpan] = []
    for candidates in (
        [span for span, name in zip(found, is_name, strict=True) if name],
        dates,
        [span for span, name in zip(found, is_name, strict=True) if not name],
    ):
        free = [
            span for span in candidates if not any(span.start < other.end and other.start < span.end for other in kept)
        ]
        kept.extend(free)
    return tuple(sorted(kept))
