"""`realm bench spans`: precision, recall, F1 and speed of a salient-span pipeline against annotated
sentences.

Annotations are CoNLL files, plain or gzip, with BIO tags: one token per line (`token TAB tag` or
`number TAB token TAB tag`), a blank line between sentences. A sentence's tokens are joined by
single spaces for tagging; a predicted span is correct if start and end equal those of an annotated
span.
"""

import gzip
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import error as ZlibError

from realm.errors import UserError
from realm.runtime.printable import printable
from realm.spans.rules import SalientSpan
from realm.spans.tagger import SpanConfig, SpanTagger

_TAG = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class AnnotatedSentence:
    """A sentence's text, its tokens joined by single spaces, and its annotated spans as (start,
    end, label) in characters."""

    text: str
    spans: tuple[tuple[int, int, str], ...]


def read_conll(path: Path) -> Iterator[AnnotatedSentence]:
    """The sentences of a CoNLL file. Raises UserError with file and line for a malformed line, and
    for a file that cannot be read."""
    tokens: list[str] = []
    tags: list[str] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    fields = line.rstrip("\r\n").split("\t")
                    if len(fields) not in (2, 3) or not fields[-2].strip() or not _TAG.fullmatch(fields[-1]):
                        raise UserError(
                            f"{path}, line {number}: expected two or three tab-separated fields, the last two a token "
                            f"and a tag (O, B-… or I-…), got {line.rstrip()!r}."
                        )
                    tokens.append(fields[-2])
                    tags.append(fields[-1])
                elif tokens:
                    yield _sentence(tokens, tags)
                    tokens, tags = [], []
    except (OSError, EOFError, ZlibError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as {'gzip-compressed ' if path.suffix == '.gz' else ''}UTF-8 text: {error}."
        ) from error
    if tokens:
        yield _sentence(tokens, tags)


def _sentence(tokens: list[str], tags: list[str]) -> AnnotatedSentence:
    spans: list[tuple[int, int, str]] = []
    position = 0
    label = ""
    for token, tag in zip(tokens, tags, strict=True):
        end = position + len(token)
        if tag.startswith("I-") and tag[2:] == label:
            spans[-1] = (spans[-1][0], end, label)
        elif tag != "O":
            # An I- tag that continues no span starts one, as in the IOB1 files of CoNLL 2003.
            spans.append((position, end, tag[2:]))
        label = "" if tag == "O" else tag[2:]
        position = end + 1
    return AnnotatedSentence(" ".join(tokens), tuple(spans))


def bench_spans(entities: Path | None, dates: Path | None, config: SpanConfig) -> list[dict]:
    """One row per file: what, pipeline, file, sentences, annotated, precision, recall, f1
    (fractions of 1) and sentences_per_s.

    On `entities` only boundaries are compared, and predicted dates and numbers are ignored; on
    `dates` all predictions except dates are ignored. Raises UserError if a file is malformed or
    empty, and if the pipeline is not installed.
    """
    tagger = SpanTagger.load(config)
    files = [("entities", entities), ("dates", dates)]
    return [_bench_file(what, path, tagger) for what, path in files if path is not None]


def _bench_file(what: str, path: Path, tagger: SpanTagger) -> dict:
    sentences = list(read_conll(path))
    if not sentences:
        raise UserError(f"{path} contains no sentences; use a CoNLL file with one token per line.")
    began = time.perf_counter()
    tagged = list(tagger.tag(sentence.text for sentence in sentences))
    seconds = time.perf_counter() - began
    num_correct = num_predicted = num_annotated = 0
    for sentence, spans in zip(sentences, tagged, strict=True):
        predicted = {(span.start, span.end) for span in spans if _is_evaluated(span, what)}
        annotated = {(start, end) for start, end, _ in sentence.spans}
        num_correct += len(predicted & annotated)
        num_predicted += len(predicted)
        num_annotated += len(annotated)
    return {
        "what": what,
        "pipeline": tagger.name,
        "file": path.name,
        "sentences": len(sentences),
        "annotated": num_annotated,
        "precision": num_correct / num_predicted if num_predicted else 0.0,
        "recall": num_correct / num_annotated if num_annotated else 0.0,
        "f1": 2 * num_correct / (num_predicted + num_annotated) if num_predicted + num_annotated else 0.0,
        "sentences_per_s": len(sentences) / seconds,
    }


def _is_evaluated(span: SalientSpan, what: str) -> bool:
    return span.type == "date" if what == "dates" else span.type not in ("date", "number")


def _table(rows: list[dict]) -> str:
    formats = {
        "precision": "{:.3f}",
        "recall": "{:.3f}",
        "f1": "{:.3f}",
        "sentences_per_s": "{:,.0f}",
        "sentences": "{:,}",
        "annotated": "{:,}",
    }
    cells = [[*rows[0]], *([formats.get(name, "{}").format(value) for name, value in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_numeric = [name in formats for name in rows[0]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(line, widths, is_numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def report_spans(entities: Path | None, dates: Path | None, pipeline: str, json_file: Path | None) -> None:
    """Print one table with the rows of `bench_spans`, and write them to `json_file`.

    Raises UserError if both files are None, and as `bench_spans`.
    """
    if entities is None and dates is None:
        raise UserError("nothing to measure; give --entities FILE, --dates FILE or both.")
    rows = bench_spans(entities, dates, SpanConfig(pipeline=pipeline))
    print(printable(_table(rows)))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
