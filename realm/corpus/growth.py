"""A prepared corpus grows: documents are added behind those it has, and taken away; rows keep their
numbers.

    passages/                       the corpus as it was prepared
      additions/0123456789ab/       added documents, prepared like it
      additions/step-0001.json      one step: the part added, the rows taken away, the fingerprint before and after

Each step has a fingerprint made from the one before, so an index of an ancestor is recognised and
completed instead of built again. Steps are written once, exclusively, and never change; whoever has
the corpus open goes on with what it opened.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from realm.corpus.prepare import Progress, identity, prepare_corpus
from realm.corpus.prepared import ADDITIONS, PreparedCorpus
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.runtime.publish import TEMPORARY
from realm.spans.tagger import SpanTagger
from realm.text.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def grow_corpus(
    path: Path,
    sources: Sequence[SourceConfig],
    delete: Sequence[str],
    replace: bool,
    tokenizer: "PreTrainedTokenizerBase",
    tagger: SpanTagger,
    num_workers: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """Add the documents of `sources` to the corpus in `path` and take away those with the ids
    `delete`; returns the grown corpus.

    `replace`: added documents take the place of those of the same id. May be killed and called
    again; what was added before is not added twice. Raises UserError for another tokenizer or span
    pipeline than the corpus was prepared with, for ids that the corpus has already or has not, and
    where another process grew the corpus meanwhile.
    """
    corpus = PreparedCorpus.open(path)
    if tokenizer_fingerprint(tokenizer) != corpus.manifest["tokenizer"]:
        raise UserError(f"{path} was prepared with another tokenizer; give the run that it belongs to.")
    if tagger.name != corpus.manifest["span_pipeline"]:
        raise UserError(
            f"{path} was prepared with span pipeline {corpus.manifest['span_pipeline']}, now {tagger.name}; set `spans` as it was."
        )
    rows_of = _rows_by_document(corpus)
    unknown = [name for name in delete if name not in rows_of]
    if unknown:
        raise UserError(
            f"{path} has no document {', '.join(map(repr, unknown[:3]))}{' …' if len(unknown) > 3 else ''} to take away."
        )
    deleted = [row for name in delete for row in rows_of[name]]
    part: str | None = None
    if sources:
        part = hashlib.sha256(
            json.dumps([identity(source) for source in sources], sort_keys=True).encode()
        ).hexdigest()[:12]
        added = prepare_corpus(
            sources,
            path / ADDITIONS / part,
            tokenizer,
            corpus.manifest["block_tokens"],
            tagger,
            num_workers,
            skip_bad,
            progress,
        )
        if part in corpus.parts:
            part = None  # by a call that was killed before its index stood
        else:
            twice = [name for name in _rows_by_document(added) if name in rows_of]
            if twice and not replace:
                raise UserError(
                    f"{path} has document {', '.join(map(repr, twice[:3]))}{' …' if len(twice) > 3 else ''} already ({len(twice):,} in all); "
                    "leave it out, or replace it with --replace."
                )
            deleted += [row for name in twice for row in rows_of[name]]
    if part is None and not deleted:
        return corpus
    _write_step(path, corpus, part, sorted(set(deleted)))
    return PreparedCorpus.open(path)


def _write_step(path: Path, corpus: PreparedCorpus, part: str | None, deleted: list[int]) -> None:
    """Write the next step, exclusively."""
    added = None if part is None else PreparedCorpus.open(path / ADDITIONS / part).fingerprint
    fingerprint = hashlib.sha256(json.dumps([corpus.fingerprint, added, deleted]).encode()).hexdigest()
    step = {"parent": corpus.fingerprint, "fingerprint": fingerprint, "part": part, "deleted": deleted}
    folder = path / ADDITIONS
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{len(corpus.ancestors):04d}.json"
    temporary = folder / f"{TEMPORARY}{final.name}-{uuid.uuid4().hex}"
    try:
        with temporary.open("w") as file:
            json.dump(step, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, final)
    except FileExistsError:
        raise UserError(f"another process added to {path} meanwhile; give the command again.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _rows_by_document(corpus: PreparedCorpus) -> dict[str, list[int]]:
    """Rows of every document that is not taken away, by its own id."""
    gone = corpus.deleted
    rows: dict[str, list[int]] = {}
    ids = list(corpus.ids)
    documents = np.fromiter((corpus.document(row) for row in range(len(corpus))), np.int64, len(corpus))
    alone = np.bincount(documents, minlength=1) == 1 if len(documents) else np.zeros(0, bool)
    for row, name in enumerate(ids):
        if row not in gone:
            rows.setdefault(name if alone[documents[row]] else name.rpartition("#")[0], []).append(row)
    return rows
