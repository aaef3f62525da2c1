"""BM25 over title and text of a corpus, with the package bm25s: built, saved, mapped from disk.

It depends on the corpus and on the settings, not on the retriever: versions of the same corpus
share its files by hard links.

Over 190,705 passages with 63 different terms each, building took 34 s of one core and 380 MiB of
memory (33 bytes per different term of a passage: 2 GiB per million passages), and the files have
97 MiB. Scoring reads the postings of the query's terms: 5 ms per question.

Shape legend: N passages, deleted ones included.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bm25s
import numpy as np

from index.build import LEXICAL_FOLDER, link_or_copy
from index.retention import FROZEN, remove_path, run_of_store, stores_of_run
from realm.runtime.publish import PublishError, check_files, published, read_manifest, write_manifest
from realm.runtime.versions import versions_in
from realm.text.terms import Terms

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus

_ROWS_PER_CHECK = 256


class LexicalIndex:
    """BM25 scores of all passages (Robertson and Zaragoza 2009; Lucene's variant, as in Kamphuis et
    al. 2020)."""

    def __init__(self, bm25: bm25s.BM25) -> None:
        self._bm25 = bm25

    @classmethod
    def build(
        cls,
        corpus: "PreparedCorpus",
        terms: Terms,
        k1: float,
        b: float,
        check: Callable[[], object] = lambda: None,
    ) -> "LexicalIndex":
        """Index title and text of every row that is not deleted.

        `check()` is called every few hundred passages, and may raise to stop the build.
        """
        documents = _TermIds(corpus, terms, check)
        bm25 = bm25s.BM25(k1=k1, b=b, csc_backend="auto")
        if documents.vocab:
            bm25.index(documents, create_empty_token=False, show_progress=False)
        else:  # bm25s would divide by an average length of 0
            postings = {
                "data": np.zeros(0, np.float32),
                "indices": np.zeros(0, np.int32),
                "indptr": np.zeros(1, np.int64),
            }
            bm25.scores, bm25.vocab_dict, bm25.nonoccurrence_array = postings, {}, None
        # From here on documents have their row numbers: deleted rows are never found.
        bm25.scores["indices"] = documents.rows[bm25.scores["indices"]]
        bm25.scores["num_docs"] = len(corpus)
        return cls(bm25)

    @classmethod
    def open(cls, folder: Path) -> "LexicalIndex":
        """Map the files that `save` wrote; only the vocabulary is read into memory."""
        return cls(bm25s.BM25.load(folder, mmap=True))

    def save(self, folder: Path) -> None:
        """Write all files into `folder`, without pickle."""
        self._bm25.save(folder, show_progress=False)

    def __len__(self) -> int:
        return int(self._bm25.scores["num_docs"])

    def scores(self, query_terms: Sequence[str]) -> np.ndarray:
        """BM25 score of every row for a query, (N,) float32; 0 for deleted rows.

        A term that is repeated in the query counts as often as it is repeated.
        """
        ids = self._bm25.get_tokens_ids(query_terms)
        return self._bm25.get_scores_from_ids(ids) if ids else np.zeros(len(self), np.float32)


class _TermIds:
    """The documents as bm25s reads them: a vocabulary, and term ids by document.

    The ids are kept in one array of 4 bytes per occurrence and become a list one document at a
    time: lists of all documents would take ten times the memory.
    """

    def __init__(self, corpus: "PreparedCorpus", terms: Terms, check: Callable[[], object]) -> None:
        self.rows = np.asarray(corpus.rows, dtype=np.int32)
        """Row of each document."""
        self.vocab: dict[str, int] = {}
        """Number of each term, in the order of their first appearance."""
        self._check, self._ids, self._ends = check, array("i"), array("q", [0])
        for number, row in enumerate(self.rows.tolist()):
            if number % _ROWS_PER_CHECK == 0:
                check()
            for ids in (corpus.title_ids(row), corpus.text_ids(row)):
                self._ids.extend([self.vocab.setdefault(term, len(self.vocab)) for term in terms(ids)])
            self._ends.append(len(self._ids))

    @property
    def ids(self) -> "_TermIds":
        """The term ids by document, which bm25s only counts and iterates over."""
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            if number % _ROWS_PER_CHECK == 0:
                self._check()
            yield self._ids[self._ends[number] : self._ends[number + 1]].tolist()


def best_rows(score_N: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k largest scores above 0, best first, of equal scores the first; fewer if fewer
    scores are above 0."""
    rows = np.flatnonzero(score_N > 0)
    if len(rows) > k:
        rows = rows[score_N[rows] >= np.partition(score_N[rows], -k)[-k]]
    return rows[np.argsort(-score_N[rows], kind="stable")][:k]


def prepare_lexical(
    folder: Path,
    store: Path,
    corpus: "PreparedCorpus",
    terms: Terms,
    settings: Mapping[str, Any],
    check: Callable[[], object] = lambda: None,
) -> None:
    """Make `folder` contain BM25 of the corpus, in `folder/bm25`, if it does not yet.

    The files are linked from any folder of the run that `store` belongs to, if one has the same
    corpus and settings, or built. `check`: see `LexicalIndex.build`.
    """
    identity = {"corpus": corpus.fingerprint, "lexical": dict(settings)}
    if _contains(folder, identity):
        return
    if folder.exists():
        remove_path(folder)
    try:
        with published(folder) as temporary:
            if not any(_link_from(other, temporary, identity) for other in _folders_of_run(store)):
                LexicalIndex.build(corpus, terms, settings["k1"], settings["b"], check).save(temporary / LEXICAL_FOLDER)
            write_manifest(temporary, {"format": 1, **identity})
    except PublishError:
        if not _contains(folder, identity):  # otherwise another process has just built it
            raise


def _contains(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder has undamaged files of BM25 of this identity."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except PublishError:
        return False
    return _identity(manifest) == identity


def _folders_of_run(store: Path) -> Iterator[Path]:
    """All folders of a run that may contain BM25: its index versions, newest first, and the one
    without an index."""
    yield lexical_of_run(store)
    for other in stores_of_run(store):
        yield from (other / "indexes" / version.name for version in reversed(versions_in(other / "indexes")))


def lexical_of_run(store: Path) -> Path:
    """The folder of a run with BM25 that does not belong to an index version."""
    return run_of_store(store) / FROZEN / "lexical"


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: manifest.get(name) for name in ("corpus", "lexical")}


def _link_from(source: Path, folder: Path, identity: Mapping[str, Any]) -> bool:
    """Link the files of BM25 from one published folder into another; False if the source has none
    of this identity, or if they are damaged or being removed."""
    try:
        manifest = read_manifest(source)
        if _identity(manifest) != identity:
            return False
        files = {name: entry for name, entry in manifest["files"].items() if Path(name).parts[0] == LEXICAL_FOLDER}
        check_files(source, {"files": files})
        for name in files:
            link_or_copy(source / name, folder / name)
    except (PublishError, OSError):
        if (folder / LEXICAL_FOLDER).exists():
            remove_path(folder / LEXICAL_FOLDER)
        return False
    return True
