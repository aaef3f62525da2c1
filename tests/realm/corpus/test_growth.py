"""Adding documents to a prepared corpus and deleting documents.

Rows keep their numbers, the result equals that of preparing all documents at once, and errors
change nothing.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from realm.corpus.growth import _write_step, grow_corpus
from realm.corpus.prepare import prepare_corpus
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.spans.tagger import SpanConfig, SpanTagger
from tests.tiny import TOWNS, prepared_run

TEXT = (
    "{town} lies by a lake. It was built by Max Berg in 1900. "
    "Few people know {town} and its old mill, which burned down in 1950."
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    return prepared_run(tmp_path_factory.mktemp("growth"), corpus={"block_tokens": 24})


def documents(folder: Path, *ids: str) -> SourceConfig:
    path = folder / f"{'-'.join(ids)}.jsonl"
    path.write_text(
        "".join(json.dumps({"id": name, "title": name, "text": TEXT.format(town=name)}) + "\n" for name in ids)
    )
    return SourceConfig(str(path))


@pytest.fixture
def corpus(run, tmp_path: Path) -> Path:
    """A copy of the corpus for one test."""
    import shutil

    return Path(shutil.copytree(run.prepared / "passages", tmp_path / "passages"))


def grow(
    run, path: Path, *sources: SourceConfig, delete: tuple[str, ...] = (), replace: bool = False
) -> PreparedCorpus:
    return grow_corpus(path, sources, delete, replace, run.tokenizer, SpanTagger.load(SpanConfig()), 1)


def content(corpus: PreparedCorpus, row: int) -> tuple:
    lists = (corpus.title_ids(row), corpus.text_ids(row), corpus.sentence_starts(row), *corpus.spans(row))
    return (
        corpus.ids[row],
        corpus.title(row),
        corpus.text(row),
        corpus.place(row),
        corpus.text_hash(row),
        *(part.tolist() for part in lists),
    )


def test_added_documents_are_appended_as_if_prepared_with_the_others(run, corpus, tmp_path):
    before = PreparedCorpus.open(corpus)
    first, second = documents(tmp_path, "Xanth", "Yale"), documents(tmp_path, "Zorn")
    grown = grow(run, corpus, first)
    grown = grow(run, corpus, second)
    sources = [SourceConfig(str(run.prepared.parent / "passages.jsonl")), first, second]
    whole = prepare_corpus(sources, tmp_path / "whole", run.tokenizer, 24, SpanTagger.load(SpanConfig()), 1)
    assert len(grown) == len(whole) > len(before)
    for row in range(len(whole)):
        assert content(grown, row) == content(whole, row)
        assert grown.document(row) == whole.document(row)
    assert np.array_equal(grown.lengths, whole.lengths) and np.array_equal(grown.places, whole.places)
    for name in ("documents", "blocks", "spans", "spans_dropped"):
        assert grown.manifest[name] == whole.manifest[name]
    assert list(grown.ancestors.values()) == [len(before), len(before) + 2 * 3, len(grown)] or grown.ancestors[
        before.fingerprint
    ] == len(before)
    assert grown.base_rows == len(before) and grown.fingerprint not in (before.fingerprint, whole.fingerprint)
    assert PreparedCorpus.open(corpus).fingerprint == grown.fingerprint


def test_open_corpus_keeps_its_state(run, corpus, tmp_path):
    before = PreparedCorpus.open(corpus)
    count = len(before)
    grow(run, corpus, documents(tmp_path, "Xanth"))
    assert len(before) == count and before.text(count - 1)
    with pytest.raises(IndexError):
        before.text(count)


def test_deleted_documents_keep_their_rows(run, corpus):
    before = PreparedCorpus.open(corpus)
    deleted = [
        row for row in range(len(before)) if before.ids[row].startswith("town-3#") or before.ids[row] == "town-3"
    ]
    grown = grow(run, corpus, delete=("town-3",))
    assert deleted and grown.deleted == frozenset(deleted) and len(grown) == len(before)
    assert sorted([*grown.rows.tolist(), *deleted]) == list(range(len(before)))
    with pytest.raises(KeyError):
        grown.row_of_id("town-3#0")
    with pytest.raises(UserError, match=r"cannot delete from .*: it does not contain document 'town-3'"):
        grow(run, corpus, delete=("town-3",))


def test_replaced_documents_have_the_new_text(run, corpus, tmp_path):
    with pytest.raises(UserError, match="--replace"):
        grow(run, corpus, documents(tmp_path, "town-0", "town-5", "Xanth"))
    assert PreparedCorpus.open(corpus).parts == []
    grown = grow(run, corpus, documents(tmp_path, "town-0", "town-5", "Xanth"), replace=True)
    texts = " ".join(grown.text(row) for row in grown.rows.tolist())
    assert TOWNS[0] not in texts.replace("town-0", "") and "Xanth lies by a lake" in texts
    assert "lake" in grown.text(grown.row_of_id("town-0#0"))


def test_adding_the_same_documents_again_changes_nothing(run, corpus, tmp_path):
    source = documents(tmp_path, "Xanth")
    grown = grow(run, corpus, source)
    again = grow(run, corpus, source)
    assert again.fingerprint == grown.fingerprint and len(again) == len(grown)


def test_concurrent_change_is_refused(run, corpus, tmp_path):
    outdated = PreparedCorpus.open(corpus)
    grow(run, corpus, documents(tmp_path, "Xanth"))
    with pytest.raises(UserError, match="another process"):
        _write_step(corpus, outdated, None, [0])
    assert PreparedCorpus.open(corpus).deleted == frozenset() and not list(corpus.rglob(".tmp-*"))


def test_different_pipeline_or_foreign_step_is_refused(run, corpus, tmp_path):
    tagger = SpanTagger.load(SpanConfig(dates=False))
    if tagger.name != PreparedCorpus.open(corpus).manifest["span_pipeline"]:
        with pytest.raises(UserError, match="span pipeline"):
            grow_corpus(corpus, [documents(tmp_path, "Xanth")], (), False, run.tokenizer, tagger, 1)
    grow(run, corpus, documents(tmp_path, "Xanth"))
    step = corpus / "additions" / "step-0001.json"
    step.write_text(step.read_text().replace('"parent": "', '"parent": "0'))
    with pytest.raises(UserError, match="does not belong"):
        PreparedCorpus.open(corpus)


def test_the_documents_that_are_held_out_stay_so(run, corpus: Path, tmp_path: Path) -> None:
    def held_out() -> set[str]:
        opened = PreparedCorpus.open(corpus, 0.5)
        return {opened.ids[row] for row in opened.held_out_rows.tolist()}

    before = held_out()
    grow(run, corpus, documents(tmp_path, *(f"new-{n}" for n in range(20))), delete=("town-3",))
    after = held_out()
    added, old = {name for name in after if name.startswith("new")}, {name for name in after if name.startswith("town")}
    assert before and old == {name for name in before if not name.startswith("town-3#")}
    documents_added = {name.partition("#")[0] for name in added}
    assert 3 <= len(documents_added) <= 17, "about half of the new documents are held out, too"
