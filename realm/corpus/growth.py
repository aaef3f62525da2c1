"""Adding documents to a prepared corpus and deleting documents from it; row numbers do not change.

    passages/                     the corpus as originally prepared
      additions/0123456789ab/     added documents, prepared in the same way
      additions/step-0001.json    one step: the added part, the deleted rows, the old and new
                                  fingerprint

The fingerprint of a step depends on the previous one, so an index of an earlier state is recognized
and extended instead of rebuilt. Steps are created exclusively and never change; a process that has
the corpus open keeps the state it opened.
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
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.prepared_folder import ADDITIONS
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
    """Add documents to the corpus in `path`, delete documents from it, and return the new corpus.

    `sources` are the documents to add, `delete` the ids of the documents to delete. With `replace`,
    added documents replace existing documents with the same ids. If the call is killed it can be
    repeated; documents are not added twice. Raises UserError if the tokenizer or span pipeline
    differs from that of the corpus, if an id to add exists (without `replace`), if an id to delete
    does not exist, or if another process changes the corpus at the same time.
    """
    corpus = PreparedCorpus.open(path)
    if tokenizer_fingerprint(tokenizer) != corpus.manifest["tokenizer"]:
        raise UserError(f"{path} was prepared with a different tokenizer; use a run that was created with this corpus.")
    if tagger.name != corpus.manifest["span_pipeline"]:
        raise UserError(
            f"{path} was prepared with span pipeline {corpus.manifest['span_pipeline']}, not {tagger.name}; "
            "restore the `spans` settings."
        )
    rows_of = _rows_by_document(corpus)
    unknown = [name for name in delete if name not in rows_of]
    if unknown:
        raise UserError(
            f"cannot delete from {path}: it does not contain document "
            f"{', '.join(map(repr, unknown[:3]))}{' …' if len(unknown) > 3 else ''}."
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
            part = None  # added by an earlier call that was killed before the index was built
        else:
            existing = [name for name in _rows_by_document(added) if name in rows_of]
            if existing and not replace:
                raise UserError(
                    f"{path} already contains document {', '.join(map(repr, existing[:3]))}"
                    f"{' …' if len(existing) > 3 else ''} ({len(existing):,} in total); "
                    "remove it from the input, or replace it with --replace."
                )
            deleted += [row for name in existing for row in rows_of[name]]
    if part is None and not deleted:
        return corpus
    _write_step(path, corpus, part, sorted(set(deleted)))
    return PreparedCorpus.open(path)


def _write_step(path: Path, corpus: PreparedCorpus, part: str | None, deleted: list[int]) -> None:
    """Write the next step. Raises UserError if another process wrote it first."""
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
        raise UserError(f"another process changed {path} at the same time; rerun the command.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _rows_by_document(corpus: PreparedCorpus) -> dict[str, list[int]]:
    """Rows of every document that is not deleted, by document id."""
    deleted = corpus.deleted
    rows: dict[str, list[int]] = {}
    ids = list(corpus.ids)
    documents = np.fromiter((corpus.document(row) for row in range(len(corpus))), np.int64, len(corpus))
    is_single_block = np.bincount(documents, minlength=1) == 1 if len(documents) else np.zeros(0, bool)
    for row, name in enumerate(ids):
        if row not in deleted:
            rows.setdefault(name if is_single_block[documents[row]] else name.rpartition("#")[0], []).append(row)
    return rows
