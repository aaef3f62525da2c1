"""Salient spans: the named entities, dates and numbers that pretraining masks (REALM, section 3.4).

`SpanTagger` runs any spaCy pipeline, or the built-in rules, over a stream of texts; `SpanCache` keeps what it found on disk by text hash,
so that a killed run goes on where it was.
"""

import hashlib
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import spacy
from spacy.language import Language
from spacy.tokens import Doc, Span
from spacy.vocab import Vocab

from realm.errors import UserError
from realm.span_rules import RULES_VERSION, SPAN_TYPES, SalientSpan, builtin_spans, date_spans

__all__ = ["SPAN_TYPES", "SalientSpan", "SpanCache", "SpanConfig", "SpanTagger"]

_BUILTIN_LABELS = {"person": "PERSON", "place": "GPE", "organisation": "ORG", "date": "DATE", "number": "CARDINAL", "other": "MISC"}
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
    """"builtin" (rules, nothing to install) or any installed spaCy pipeline with entities, by name or path."""
    dates: bool = True
    """Also the date expressions of the built-in rules, whatever the pipeline; false with "builtin" leaves dates out."""
    batch_size: int = 256
    """Texts handed to spaCy at a time."""
    num_workers: int = 1
    """Processes that tag; more than one pays for itself from some ten thousand texts."""


class _RuleTokenizer:
    """Text to a spaCy `Doc` with the built-in spans as its entities.

    The rules read characters, not tokens, so the text is cut at blanks and at the spans' ends: several times as fast as English
    tokenisation, and every span stands on token boundaries.
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
        doc = Doc(self.vocab, words=[piece[:-1] if space else piece for piece, space in zip(pieces, spaces, strict=True)], spaces=spaces)
        doc.ents = tuple(Span(doc, *place) for place in places)
        return doc


class SpanTagger:
    """A spaCy pipeline, with or without the built-in date expressions, as a stream from texts to salient spans."""

    def __init__(self, nlp: Language, name: str, config: SpanConfig):
        self.nlp = nlp
        self.name = name
        """What found the spans, and in which version: part of the cache's key."""
        self.config = config

    @classmethod
    def load(cls, config: SpanConfig) -> "SpanTagger":
        """Loads the pipeline of `config`. Raises UserError where it is not installed or marks no entities."""
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
        """Yields each text's salient spans in the order of `texts`: sorted, not overlapping, without white space at their ends."""
        builtin = self.config.pipeline == "builtin"
        for doc in self.nlp.pipe(texts, batch_size=self.config.batch_size, n_process=self.config.num_workers):
            found = [SalientSpan(entity.start_char, entity.end_char, _TYPE_OF_LABEL.get(entity.label_, "other")) for entity in doc.ents]
            if builtin:
                yield tuple(found if self.config.dates else (span for span in found if span.type != "date"))
                continue
            text = doc.text
            found = [span for span in (_trimmed(span, text) for span in found) if span.start < span.end]
            yield _with_dates(found, text) if self.config.dates else tuple(found)


def _disable_unused(nlp: Language) -> None:
    """Skips the parser and its like where they cannot touch the entities: they take half of a small pipeline's time."""
    unused = {"tagger", "parser", "senter", "lemmatizer", "attribute_ruler", "morphologizer"} & set(nlp.pipe_names)
    if set(nlp.pipe_names) - unused <= {"tok2vec", "transformer", "ner"}:
        for pipe in unused:
            nlp.disable_pipe(pipe)


def _folder_digest(folder: Path) -> str:
    """Digest of a pipeline folder's content: two pipelines trained by a user may well bear one name and version."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _trimmed(span: SalientSpan, text: str) -> SalientSpan:
    inside = text[span.start : span.end]
    return SalientSpan(span.start + len(inside) - len(inside.lstrip()), span.end - len(inside) + len(inside.rstrip()), span.type)


def _with_dates(found: list[SalientSpan], text: str) -> tuple[SalientSpan, ...]:
    """The pipeline's names first, then the rules' dates, then the pipeline's own dates and numbers, each where nothing stands yet."""
    is_name = [span.type not in ("date", "number") for span in found]
    dates = [SalientSpan(start, end, "date") for start, end in date_spans(text)]
    kept: list[SalientSpan] = []
    for candidates in (
        [span for span, name in zip(found, is_name, strict=True) if name],
        dates,
        [span for span, name in zip(found, is_name, strict=True) if not name],
    ):
        free = [span for span in candidates if not any(span.start < other.end and other.start < span.end for other in kept)]
        kept.extend(free)
    return tuple(sorted(kept))


_SCHEMA = pa.schema(
    [
        ("text_hash", pa.binary(16)),
        ("starts", pa.list_(pa.int32())),
        ("ends", pa.list_(pa.int32())),
        ("types", pa.list_(pa.int8())),
    ]
)


class SpanCache:
    """Salient spans on disk, keyed by tagger and text.

    `folder / tagger.name` holds Arrow IPC shards, one a chunk, each published whole (temporary file, fsync, rename) under the digest of
    its own bytes. A shard that does not match its name is left out, so a writer may be killed at any moment; several may share a folder.
    """

    def __init__(self, folder: Path, tagger: SpanTagger, chunk_size: int = 10_000):
        """`chunk_size` texts are held in memory and published at a time: what a kill can cost."""
        self.tagger = tagger
        self.chunk_size = chunk_size
        self.folder = folder / tagger.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards: dict[str, pa.RecordBatch] = {}
        self._keys = np.empty(0, "S16")
        for leftover in self.folder.glob("*.tmp"):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink(missing_ok=True)

    def tag(self, texts: Iterable[str], progress: Callable[[int], None] | None = None) -> Iterator[tuple[SalientSpan, ...]]:
        """Yields what `tagger.tag(texts)` would, tagging only texts not seen before; `progress(n)` is told of every n texts more done."""
        self._load_shards()
        texts = iter(texts)
        while chunk := list(islice(texts, self.chunk_size)):
            keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in chunk]
            spans_of = self._look_up(keys)
            missing = {key: text for key, text in zip(keys, chunk, strict=True) if key not in spans_of}
            if progress is not None:
                progress(len(chunk) - len(missing))
            found = {}
            for key, spans in zip(missing, self.tagger.tag(missing.values()), strict=True):
                found[key] = spans
                if progress is not None:
                    progress(1)
            if found:
                self._publish(found)
            spans_of |= found
            yield from (spans_of[key] for key in keys)

    def _load_shards(self) -> None:
        """Takes in the shards that other calls, processes or runs have published."""
        for path in sorted(self.folder.glob("*.arrow")):
            if path.stem not in self._shards and (batch := _read_shard(path)) is not None:
                self._shards[path.stem] = batch
        batches = list(self._shards.values())
        keys = [np.frombuffer(batch["text_hash"].buffers()[1], "S16", len(batch)) for batch in batches]
        all_keys = np.concatenate([np.empty(0, "S16"), *keys])
        order = np.argsort(all_keys, kind="stable")
        self._keys, self._rows = all_keys[order], order
        self._first_rows = np.cumsum([0] + [len(batch) for batch in batches])

    def _look_up(self, keys: list[bytes]) -> dict[bytes, tuple[SalientSpan, ...]]:
        """The cached spans of those of `keys` that are cached."""
        if not len(self._keys):
            return {}
        wanted = np.array(keys, "S16")
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        batches = list(self._shards.values())
        spans_of = {}
        for i in np.flatnonzero(self._keys[places] == wanted):
            row = self._rows[places[i]]
            shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            columns = (batches[shard][name][int(row - self._first_rows[shard])].as_py() for name in ("starts", "ends", "types"))
            spans_of[keys[i]] = tuple(SalientSpan(start, end, SPAN_TYPES[kind]) for start, end, kind in zip(*columns, strict=True))
        return spans_of

    def _publish(self, found: dict[bytes, tuple[SalientSpan, ...]]) -> None:
        columns = [
            list(found),
            [[span.start for span in spans] for spans in found.values()],
            [[span.end for span in spans] for spans in found.values()],
            [[SPAN_TYPES.index(span.type) for span in spans] for spans in found.values()],
        ]
        batch = pa.record_batch(columns, schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.arrow")


def _read_shard(path: Path) -> pa.RecordBatch | None:
    """The memory-mapped batch of one shard, or None where its bytes are not those it was named after."""
    content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    if hashlib.blake2b(content, digest_size=16).hexdigest() != path.stem:
        return None
    return pa.ipc.open_file(content).get_batch(0)
