"""BM25 of a run's passages for what searches no index version."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

from index.lexical import lexical_folder
from realm.run.folder import Run

LEXICAL = "lexical"
"""Folder of a run with these files."""


def lexical_files(run: Run) -> Path:
    """Folder with BM25 of the run's passages, with the settings of `fusion` whatever its method,
    for `LexicalIndex.open`.

    Its files are those of an index version of the run, or are built once in `RUN/lexical`. To be
    called on one rank.
    """
    settings = replace(run.config.fusion, method="weighted").lexical
    versions = chain(run.folder.glob("indexes/*"), run.folder.glob("frozen/*/indexes/*"))
    return lexical_folder(run.folder / LEXICAL, sorted(versions), run.passages, run.terms, settings)
