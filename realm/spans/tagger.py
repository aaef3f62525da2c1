"""Salient spans: the named entities, dates and numbers that pretraining masks (REALM, section 3.4).

`SpanTagger` applies a spaCy pipeline or the built-in rules to a stream of texts. `SpanCache`
(`realm.spans.cache`) stores the results on disk by text hash, so that a killed run can continue.
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
from realm.runtime.section import MAX_PROCESSES, PathText, Section
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
"""OntoNotes and CoNLL/WikiNER labels; other labels (MISC, WORK_OF_ART, EVENT, …) are "other"."""
_PIECE = re.compile(r"[^ ]+ ?| ")


@dataclass(frozen=True)
class SpanConfig(Section):
    """Which spans are salient and how they are found."""

    pipeline: PathText = "builtin"
    """"builtin" (rules, no installation) or the name or path of a spaCy pipeline with entities."""
    dates: bool = True
    """Add the dates found by the built-in rules to those of the pipeline; false with "builtin":
    no dates."""
    batch_size: int = 256
    """Number of texts per spaCy batch."""
    num_workers: int = 1
    """Number of tagging processes; more than one is worthwhile from about 10,000 texts."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(1, "batch_size", "num_workers")
        yield from self.at_most(MAX_PROCESSES, "num_workers")


class _RuleTokenizer:
    """Converts a text to a spaCy `Doc` with the built-in spans as entities.

    The rules work on characters, so the text is only split at spaces and at span boundaries. This
    is several times as fast as English tokenization and aligns every span with tokens.
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
    """Finds salient spans with a spaCy pipeline, optionally with the built-in date rules."""

    def __init__(self, nlp: Language, name: str, config: SpanConfig):
        self.nlp = nlp
        self.name = name
        """Name and version of the pipeline and rules: part of the cache key."""
        self.config = config

    @classmethod
    def load(cls, config: SpanConfig) -> "SpanTagger":
        """Load the pipeline of `config`.

        Raises UserError if it is not installed or does not set entities.
        """
        if config.pipeline == "builtin":
            nlp = spacy.blank("en")
            nlp.tokenizer = _RuleTokenizer(nlp.vocab)
            nlp.max_length = sys.maxsize
            return cls(nlp, f"builtin-{RULES_VERSION}" + ("" if config.dates else "-without-dates"), config)
        try:
            nlp = spacy.load(config.pipeline)
        except OSError as error:
            raise UserError(
                f"spaCy pipeline {config.pipeline!r} cannot be loaded; install it "
                f"(python -m spacy download {config.pipeline}), give the path of a pipeline, "
                'or set `spans.pipeline` to "builtin".'
            ) from error
        if not any("doc.ents" in nlp.get_pipe_meta(pipe).assigns for pipe in nlp.pipe_names):
            raise UserError(
                f"spaCy pipeline {config.pipeline!r} does not set entities "
                f"(components: {', '.join(nlp.pipe_names) or 'none'}); "
                "choose a pipeline with an entity component such as ner."
            )
        _disable_unused(nlp)
        name = f"{nlp.lang}_{nlp.meta['name']}-{nlp.meta['version']}"
        if Path(config.pipeline).is_dir():
            name += "-" + _folder_digest(Path(config.pipeline))
        return cls(nlp, name + (f"+dates-{RULES_VERSION}" if config.dates else ""), config)

    def tag(self, texts: Iterable[str]) -> Iterator[tuple[SalientSpan, ...]]:
        """Yield the salient spans of each text, in the order of `texts`.

        Spans are sorted, non-overlapping, and without surrounding white space.
        """
        if self.config.num_workers == 1:
            yield from self._tag_here(texts)
            return
        texts = iter(texts)
        pending: deque[AsyncResult[list[tuple[SalientSpan, ...]]]] = deque()
        # `n_process` of nlp.pipe is not used: it returns whole documents, which takes longer than
        # the rules.
        with get_context("fork").Pool(self.config.num_workers, _init_worker, (self,)) as pool:
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
            yield _merge_dates(found, text) if self.config.dates else tuple(found)


_worker_tagger: SpanTagger
"""Tagger of a worker process, inherited by fork."""


def _init_worker(tagger: SpanTagger) -> None:
    global _worker_tagger
    _worker_tagger = tagger


def _tag_batch(texts: list[str]) -> list[tuple[SalientSpan, ...]]:
    return list(_worker_tagger._tag_here(texts))


def _disable_unused(nlp: Language) -> None:
    """Disable the parser and other components that do not affect the entities.

    They take half of the time of a small pipeline.
    """
    unused = {"tagger", "parser", "senter", "lemmatizer", "attribute_ruler", "morphologizer"} & set(nlp.pipe_names)
    if set(nlp.pipe_names) - unused <= {"tok2vec", "transformer", "ner"}:
        for pipe in unused:
            nlp.disable_pipe(pipe)


def _folder_digest(folder: Path) -> str:
    """Digest of the content of a pipeline folder.

    Pipelines trained by a user may have the same name and version.
    """
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


def _merge_dates(found: list[SalientSpan], text: str) -> tuple[SalientSpan, ...]:
    """Merge the pipeline's spans with the dates of the rules, without overlaps.

    In order of priority: the pipeline's names, the dates of the rules, the pipeline's own dates and
    numbers.
    """
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
