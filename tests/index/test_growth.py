"""`realm index add`: only new passages are encoded, and the result equals a full rebuild."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from index.frozen import frozen_index
from index.search import PassageIndex
from realm.app.cli import main
from realm.corpus.prepared import PreparedCorpus
from realm.run.folder import Run
from realm.runtime.versions import versions_in
from tests.tiny import prepared_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with the index of a frozen retriever."""
    from realm.run.initial import build_initial_retriever

    run = prepared_run(tmp_path, refresh={"shard_rows": 4, "poll_s": 0.05, "grace_s": 0.0, "lease_expiry_s": 1.0})
    frozen_index(run.folder, build_initial_retriever(run), run.passages, run.config.refresh, lambda line: None).close()
    return run


def store(run: Run) -> Path:
    return next(path.parent for path in run.folder.glob("frozen/*/indexes"))


def newest(run: Run) -> PassageIndex:
    corpus = PreparedCorpus.open(run.prepared / "passages")
    return PassageIndex.open(store(run) / "indexes" / versions_in(store(run) / "indexes")[-1].name, corpus.fingerprint)


def add(run: Run, name: str, *arguments: str) -> int:
    path = run.prepared.parent / f"{name}.jsonl"
    path.write_text(
        json.dumps(
            {"id": name, "title": name, "text": f"{name} is a new town on the river Wend. It was founded in 2001."}
        )
        + "\n"
    )
    return main(["index", "add", "--run", str(run.folder), str(path), *arguments])


def test_only_new_passages_are_encoded_and_the_index_equals_a_full_rebuild(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    old = newest(run)
    assert add(run, "Xanth") == 0
    output = capsys.readouterr().out
    assert "1 blocks added" in output and "published: 13 passages" in output
    log = [json.loads(line) for line in (store(run) / "refresher" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["rows"] == 13
    grown = newest(run)
    np.testing.assert_array_equal(grown.embeddings(np.arange(12)), old.embeddings(np.arange(12)))
    # Full rebuild over the grown corpus.
    shutil.rmtree(store(run) / "indexes")
    assert main(["index", "add", "--run", str(run.folder), str(run.prepared.parent / "Xanth.jsonl")]) == 0
    np.testing.assert_allclose(
        newest(run).embeddings(np.arange(13)), grown.embeddings(np.arange(13)), rtol=1e-5, atol=1e-6
    )


def test_deleted_documents_are_never_retrieved(run: Run, tmp_path: Path) -> None:
    queries = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    scores, rows = newest(run).search(queries, 12)
    ids = tmp_path / "ids"
    ids.write_text("town-2\ntown-7\n\n")
    assert main(["index", "add", "--run", str(run.folder), "--delete", str(ids)]) == 0
    corpus, index = PreparedCorpus.open(run.prepared / "passages"), newest(run)
    assert corpus.deleted == {2, 7}
    for k in (1, 3, 10):
        new_scores, new_rows = index.search(queries, k)
        for b in range(5):
            kept = [
                (row, score)
                for row, score in zip(rows[b].tolist(), scores[b].tolist(), strict=True)
                if row not in (2, 7)
            ][:k]
            assert new_rows[b].tolist() == [row for row, _ in kept]
            np.testing.assert_allclose(new_scores[b], [score for _, score in kept], rtol=1e-6)
    assert index.search(queries, 12)[1][:, 10:].tolist() == [[-1, -1]] * 5


def test_replacement_and_invalid_arguments(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(run, "town-1") == 2
    assert (
        "already contains document 'town-1'" in capsys.readouterr().err
        and len(versions_in(store(run) / "indexes")) == 1
    )
    assert add(run, "town-1", "--replace") == 0
    corpus = PreparedCorpus.open(run.prepared / "passages")
    assert corpus.deleted == {1} and corpus.row_of_id("town-1") == 12
    assert main(["index", "add", "--run", str(run.folder)]) == 2 and "no documents to add" in capsys.readouterr().err
    assert main(["index", "add", "--run", str(run.folder), str(tmp_path / "missing.jsonl")]) == 2
    empty = tmp_path / "empty"
    empty.touch()
    assert main(["index", "add", "--run", str(run.folder), "--delete", str(empty)]) == 2
    assert "Traceback" not in capsys.readouterr().err
