"""BM25 in index versions: built, shared, checked, refused and grown with them."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index import lexical, version_build
from index.frozen import frozen_index, publish_frozen
from index.fusion import Fusion, open_lexical
from index.lexical import LexicalIndex, lexical_of_run
from index.search import IndexRefused, PassageIndex
from index.watcher import IndexWatcher
from realm.app.cli import main
from realm.corpus.prepared import PreparedCorpus
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever
from realm.runtime.publish import checksum
from realm.runtime.signals import Interrupted
from realm.runtime.versions import Version, start_attempt, versions_in
from realm.text.tokenizer import tokenize
from realm.training.fusion_section import FusionConfig
from tests.tiny import RIVERS, prepared_run

FUSED = {"fusion": {"method": "weighted"}}
REFRESH = {"refresh": {"poll_s": 0.05, "grace_s": 0.0, "lease_expiry_s": 1.0}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = prepared_run(tmp_path_factory.mktemp("fused"), **FUSED, **REFRESH)
    build_initial_retriever(run)
    return run


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Iterator[Run]:
    """A copy of a run that has no index yet."""
    shutil.copytree(prepared.folder, tmp_path / "run")
    yield Run(tmp_path / "run", prepared.config)


def open_index(run: Run, fusion: Fusion | None = None, log: Callable[[str], None] = lambda line: None) -> PassageIndex:
    retriever = run.folder / "initial" / "retriever"
    return frozen_index(run.folder, retriever, run.passages, run.config.refresh, log, fusion or Fusion.of(run))


def encode_nothing(*arguments: object) -> np.ndarray:
    raise AssertionError("no passage needs to be encoded")


def terms_of(run: Run, text: str) -> list[str]:
    return run.terms(tokenize(run.tokenizer, [text])[0][0])


def test_a_version_contains_bm25_and_is_searched_with_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(run)
    assert index.lexical is not None and index.manifest.lexical == run.config.fusion.lexical
    assert "bm25" in index.manifest.seconds
    expected = LexicalIndex.build(run.passages, run.terms, 1.5, 0.75)
    for row, river in enumerate(RIVERS):
        scores = index.lexical.scores(terms_of(run, f"On the river {river}?"))
        assert scores.argmax() == row
        np.testing.assert_array_equal(scores, expected.scores(terms_of(run, f"On the river {river}?")))
    lines: list[str] = []
    assert open_index(run, log=lines.append).version == index.version and lines == [], "it is not built twice"
    assert main(["index", "ls", "--run", str(run.folder)]) == 0
    assert "Flat + BM25" in capsys.readouterr().out
    assert main(["index", "verify", "--run", str(run.folder)]) == 0
    assert "12 passages with BM25" in capsys.readouterr().out
    assert main(["index", "show", "--run", str(run.folder), index.version.name]) == 0
    assert json.loads(capsys.readouterr().out)["lexical"]["prefix"] == 4


def test_a_version_with_a_damaged_file_of_bm25_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(run)
    names = sorted(name for name in index.files if name.startswith("bm25/"))
    assert len(names) == 5
    for name in names:
        for damage in ("flip", "truncate", "missing"):
            path, content = index.files[name], index.files[name].read_bytes()
            path.unlink()
            if damage != "missing":
                flipped = bytes([content[0] ^ 1]) + content[1:]
                path.write_bytes(flipped if damage == "flip" else content[:-1])
            for settings in (run.config.fusion.lexical, None):  # also if BM25 is not needed
                with pytest.raises(IndexRefused, match=rf"{path} "):
                    PassageIndex.open(path.parent.parent, run.passages.fingerprint, lexical=settings)
            assert main(["index", "verify", "--run", str(run.folder)]) == 2
            assert "Traceback" not in capsys.readouterr().err
            path.write_bytes(content)
    assert len(open_index(run)) == 12


@pytest.mark.parametrize("where", ["frozen store", "the trainer's store"])
def test_an_index_from_before_fusion_gets_bm25_without_encoding(
    run: Run, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    dense = open_index(run, Fusion())
    assert dense.lexical is None and dense.manifest.lexical == {}
    folder = next(run.folder.glob("frozen/*/indexes/*"))
    if where == "the trainer's store":
        retriever, encoder = run.folder / "initial" / "retriever", Version(start_attempt(run.folder), 0)
        assert not publish_frozen(run.folder, retriever, run.passages, run.config.refresh, encoder, Fusion.of(run)), (
            "the trainer would refuse it"
        )
        assert publish_frozen(run.folder, retriever, run.passages, run.config.refresh, encoder)
        shutil.rmtree(run.folder / "frozen")
        folder = run.folder / "indexes" / encoder.with_epoch(0).name
    with pytest.raises(IndexRefused, match=r"contains no BM25, expected that of b 0.75, k1 1.5, .*; start the refresh"):
        PassageIndex.open(folder, run.passages.fingerprint, lexical=run.config.fusion.lexical)
    monkeypatch.setattr(version_build, "encode_passages", encode_nothing)
    fused = open_index(run)
    assert fused.lexical is not None and fused.files["passages.index"].parent != folder
    np.testing.assert_array_equal(fused.embeddings(np.arange(12)), dense.embeddings(np.arange(12)))
    if where == "frozen store":
        assert open_index(run, Fusion()).version == fused.version, "it is searched without BM25, too"
    other = Fusion(replace(run.config.fusion, k1=0.9), run.terms)
    assert open_index(run, other).manifest.lexical["k1"] == 0.9
    with pytest.raises(IndexRefused, match=r"contains BM25 of b 0.75, k1 1.5.*expected that of b 0.75, k1 0.9"):
        folder = fused.files["passages.index"].parent
        PassageIndex.open(folder, run.passages.fingerprint, lexical=other.lexical)


def test_versions_of_the_same_corpus_share_the_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = open_lexical(run)
    monkeypatch.setattr(LexicalIndex, "build", encode_nothing)
    first = open_index(run)
    shutil.copytree(run.folder / "initial" / "retriever", run.folder / "other")
    (run.folder / "other" / "note").touch()  # another checksum
    second = frozen_index(
        run.folder, run.folder / "other", run.passages, run.config.refresh, lambda line: None, Fusion.of(run)
    )
    assert second.files["passages.index"].parent.parent != first.files["passages.index"].parent.parent
    for name in (name for name in first.files if name.startswith("bm25/")):
        assert os.path.samefile(first.files[name], second.files[name])
        assert os.path.samefile(first.files[name], lexical_of_run(run.folder) / name)
    np.testing.assert_array_equal(baseline.scores(["tamba"]), second.lexical.scores(["tamba"]))  # type: ignore[union-attr]


def test_damaged_files_are_not_shared(run: Run) -> None:
    open_lexical(run)
    data = lexical_of_run(run.folder) / "bm25" / "data.csc.index.npy"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert open_index(run).files["bm25/data.csc.index.npy"].read_bytes() == content
    assert open_lexical(run).scores(["tamba"]).argmax() == 1, "they are built again"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_refresher_that_is_stopped_while_it_builds_bm25_continues(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Stopping(lexical._TermIds):
        def __iter__(self) -> Iterator[list[int]]:
            os.kill(os.getpid(), number)
            return super().__iter__()

    monkeypatch.setattr(lexical, "_TermIds", Stopping)
    with pytest.raises(Interrupted, match="rerun the command to continue"):
        open_index(run)
    monkeypatch.undo()
    assert not list(run.folder.glob("frozen/*/indexes/*"))
    monkeypatch.setattr(version_build, "encode_passages", encode_nothing)
    assert open_index(run).lexical is not None


def test_finished_bm25_outlives_a_refresher_that_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(version_build, "build_index", killed)
    with pytest.raises(KeyboardInterrupt):
        open_index(run)
    monkeypatch.undo()
    monkeypatch.setattr(LexicalIndex, "build", encode_nothing)
    assert open_index(run).lexical is not None
    assert not list(run.folder.glob("frozen/*/refresher/a01*"))


def test_bm25_grows_with_the_corpus_and_forgets_deleted_documents(tmp_path: Path) -> None:
    run = prepared_run(tmp_path, **FUSED, **REFRESH)
    build_initial_retriever(run)
    before = open_index(run)
    (tmp_path / "new.jsonl").write_text(
        json.dumps({"id": "new", "title": "Xanth", "text": "Xanth is a town on the river Wend."}) + "\n"
    )
    (tmp_path / "ids").write_text("town-2\n")
    assert (
        main(["index", "add", "--run", str(run.folder), str(tmp_path / "new.jsonl"), "--delete", str(tmp_path / "ids")])
        == 0
    )
    grown = Run(run.folder, run.config)
    index = open_index(grown)
    assert len(index) == 13 and index.version > before.version and index.lexical is not None
    for text in ("the river Wend", f"the river {RIVERS[2]}"):
        query = terms_of(grown, text)
        expected = LexicalIndex.build(PreparedCorpus.open(run.prepared / "passages"), grown.terms, 1.5, 0.75)
        np.testing.assert_array_equal(index.lexical.scores(query), expected.scores(query))
        assert index.lexical.scores(query)[2] == 0.0
    assert index.lexical.scores(terms_of(grown, "Wend")).argmax() == 12
    query_ids = [tokenize(grown.tokenizer, [f"the river {RIVERS[2]}"])[0][0]]
    found = Fusion.of(grown).retrieve(index, np.ones((1, index.manifest.dim), np.float32), query_ids, 13)
    assert sorted(found[0].tolist()) == [-2, 0, 1, *range(3, 13)]


def test_a_trainer_follows_versions_with_bm25_only(run: Run) -> None:
    retriever, encoder = run.folder / "initial" / "retriever", Version(start_attempt(run.folder), 0)
    open_index(run, Fusion())
    publish_frozen(run.folder, retriever, run.passages, run.config.refresh, encoder)
    lines: list[str] = []
    with IndexWatcher(
        run.folder, 1, run.passages.fingerprint, poll_s=0.02, log=lines.append, lexical=run.config.fusion.lexical
    ) as watcher:
        assert not watcher.wait_for(0, 0.3)
        assert len(lines) == 1 and "contains no BM25" in lines[0], "refused once"
        shutil.copytree(retriever, run.folder / "encoders" / encoder.name)
        assert main(["refresh", "--run", str(run.folder), "--once"]) == 0
        assert watcher.wait_for(0, 20.0)
        index = watcher.take()
        assert index is not None and index.lexical is not None and index.version == encoder.with_epoch(1)
        index.close()
    assert versions_in(run.folder / "indexes")[-1] == encoder.with_epoch(1)


def test_the_stemmer_of_the_config_is_used(run: Run) -> None:
    stemmed = Run(run.folder, replace(run.config, fusion=FusionConfig("ranks", stemmer="english", prefix=0)))
    index = open_index(stemmed)
    assert index.lexical is not None and index.manifest.lexical["stemmer"] == "english"
    assert index.lexical.scores(["found"]).any() and not index.lexical.scores(["founded"]).any()
    assert checksum(index.files["passages.index"]) == checksum(open_index(run).files["passages.index"])


def test_a_stage_that_retrieves_is_resumed_with_the_same_fusion(run: Run) -> None:
    other = Run(run.folder, replace(run.config, fusion=replace(run.config.fusion, weight=9.0)))
    dense = Run(run.folder, replace(run.config, fusion=FusionConfig(weight=9.0)))
    for stage in ("reader_pretraining", "pretrain", "finetune_retriever", "finetune"):
        assert run.settings(stage)["fusion"]["weight"] is None and other.settings(stage)["fusion"]["weight"] == 9.0
        assert "fusion" not in dense.settings(stage), "as in checkpoints from before there was fusion"
    assert other.settings("ict") == run.settings("ict")
