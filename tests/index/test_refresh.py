"""The refresher: what it builds next, in which order, and with which configuration."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from fake_refresher import (
    CONFIG,
    FakeCorpus,
    assert_equals_direct_encoding,
    direct_embeddings,
    export,
    indexes,
    load,
    refresh_once,
)

from index.encode import Encoder
from index.refresh import TRAINING_ENDED
from index.refresher_process import start_refresher
from index.search import PassageIndex
from realm.errors import UserError
from realm.runtime.versions import start_attempt


def test_an_export_is_indexed_once(run: Path, corpus: FakeCorpus) -> None:
    lines = refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1"]
    assert_equals_direct_encoding(run, "a01-step-000500-e1", corpus)
    assert len(lines) == 1 and "a01-step-000500-e1 published: 60 passages" in lines[0]
    entry = json.loads((run / "refresher" / "log.jsonl").read_text())
    assert entry["version"] == "a01-step-000500-e1" and set(entry["seconds"]) == {
        "load",
        "encode",
        "build",
        "drift",
        "publish",
    }
    assert not (run / "refresher" / "a01-step-000500").exists()
    assert refresh_once(run, corpus) == [], "an export with an index is not indexed again"


def test_bf16_is_close_to_fp32(run: Path, corpus: FakeCorpus) -> None:
    refresh_once(run, corpus, replace(CONFIG, precision="bf16"))
    index = faiss.read_index(str(run / "indexes" / "a01-step-000500-e1" / "passages.index"))
    direct_ND = direct_embeddings(run / "encoders" / "a01-step-000500", corpus)
    assert np.abs(index.reconstruct_n(0, index.ntotal) - direct_ND).max() < 0.05 * np.abs(direct_ND).max()


def test_another_corpus_gets_a_new_index(run: Path, corpus: FakeCorpus) -> None:
    refresh_once(run, corpus)
    refresh_once(run, FakeCorpus(seed=1))
    assert indexes(run) == ["a01-step-000500-e1", "a01-step-000500-e2"]


def test_the_newest_export_of_the_newest_attempt_is_indexed(run: Path, corpus: FakeCorpus) -> None:
    export(run, 1, 1000)
    attempt = start_attempt(run, parent=1, parent_step=500)
    refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1"], "step 1000 was abandoned by the resume"
    export(run, attempt, 900)
    export(run, attempt, 700)
    refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1", "a02-step-000900-e2"]


def test_the_last_index_is_built_after_training_has_ended(run: Path, corpus: FakeCorpus) -> None:
    (run / TRAINING_ENDED).touch()
    refresh_once(run, corpus, once=False)
    assert indexes(run) == ["a01-step-000500-e1"]


class ExportingWhileEncoding:
    """Loads encoders; each of the first `num_exports` loads is followed by a new export."""

    def __init__(self, run: Path, num_exports: int) -> None:
        self.run, self.num_exports, self.loaded = run, num_exports, [""]

    def __call__(self, folder: Path) -> Encoder:
        self.loaded.append(folder.name)
        if len(self.loaded) - 1 <= self.num_exports:
            export(self.run, 1, 10_000 * (len(self.loaded) - 1))
        return load(folder)


def test_a_newer_export_supersedes_a_build_unless_it_is_the_first(run: Path, corpus: FakeCorpus) -> None:
    lines = refresh_once(run, corpus, replace(CONFIG, keep_last=100), load=ExportingWhileEncoding(run, 5))
    published = ["a01-step-000500-e1", "a01-step-020000-e1", "a01-step-040000-e1", "a01-step-050000-e1"]
    assert [line.split()[1] for line in lines if "published" in line] == published
    assert [line.split()[2] for line in lines if "dropped" in line] == ["a01-step-010000", "a01-step-030000"], (
        "never two builds in a row"
    )


def test_the_build_of_an_abandoned_attempt_is_dropped(run: Path, corpus: FakeCorpus) -> None:
    start_attempt(run, parent=1, parent_step=400)  # attempt 1 exported nothing up to step 400
    assert refresh_once(run, corpus) == []

    def resume_while_loading(folder: Path) -> Encoder:
        start_attempt(run, parent=2, parent_step=0)
        return load(folder)

    export(run, 2, 600)
    lines = refresh_once(run, corpus, load=resume_while_loading)
    assert indexes(run) == [] and "attempt 3 abandoned it" in lines[0]


def test_old_versions_are_removed_unless_referenced(run: Path, corpus: FakeCorpus) -> None:
    checkpoint = run / "pretrain" / "checkpoints" / "step-000500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index_version").write_text("a01-step-000500-e1")
    for step in (500, 1000, 1500, 2000):
        if step > 500:
            export(run, 1, step)
        refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e1", "a01-step-001500-e3", "a01-step-002000-e4"]


def test_a_resume_gets_an_index_no_staler_than_its_checkpoint_allows(run: Path, corpus: FakeCorpus) -> None:
    """A trainer that bounds staleness would otherwise wait for an index that nobody can build: its
    own next export comes later."""
    refresh_once(run, corpus)
    checkpoint = run / "pretrain" / "checkpoints" / "step-001100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index_version").write_text(indexes(run)[0])
    for step in (1000, 1500, 2000, 2500):
        export(run, 1, step)
        refresh_once(run, corpus)
    assert [name[:15] for name in indexes(run)] == ["a01-step-000500", "a01-step-002000", "a01-step-002500"]
    start_attempt(run, parent=1, parent_step=1100)
    refresh_once(run, corpus)
    assert indexes(run)[-1].startswith("a01-step-001000"), "the index of the newest export before the checkpoint"


@pytest.mark.parametrize(("factory", "words"), [("Flut", "Flut"), ("IVF5000,Flat", "clusters")])
def test_an_invalid_factory_stops_it_with_the_reason(run: Path, corpus: FakeCorpus, factory: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        refresh_once(run, corpus, replace(CONFIG, factory=factory))
    assert indexes(run) == [] and not list(run.rglob(".tmp-*"))
    refresh_once(run, corpus)
    assert indexes(run) == ["a01-step-000500-e2"], "the lease was released"


def test_an_encoder_with_another_tokenizer_is_refused(run: Path, corpus: FakeCorpus) -> None:
    with pytest.raises(UserError, match="different tokenizer"):
        refresh_once(run, corpus, load=lambda folder: load(folder)._replace(tokenizer_fingerprint="other"))


def test_the_started_process_does_not_inherit_launcher_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@"\nenv\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "GROUP_RANK",
    )
    for name in launcher:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "7")
    process = start_refresher(tmp_path / "run", tmp_path / "logs" / "refresher.log")
    assert process.wait(timeout=10) == 0
    lines = (tmp_path / "logs" / "refresher.log").read_text().splitlines()
    assert lines[0] == f"-m realm refresh --run {tmp_path / 'run'}"
    assert "KEPT=7" in lines
    assert not [line for line in lines if line.split("=")[0] in launcher]


def test_search_parameters_are_part_of_the_version(run: Path, corpus: FakeCorpus) -> None:
    queries = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    exact = direct_embeddings(run / "encoders" / "a01-step-000500", corpus)
    expected = np.argsort(-(queries @ exact.T), axis=1)[:, :5]
    recalls = []
    for parameters in ("", "nprobe=6"):
        refresh_once(run, corpus, replace(CONFIG, factory="IVF6,Flat", search_parameters=parameters, keep_last=10))
        index = PassageIndex.open(run / "indexes" / indexes(run)[-1], corpus.fingerprint)
        recalls.append(float((index.search(queries, 5)[1] == expected).mean()))
        np.testing.assert_allclose(index.embeddings(np.arange(60)), exact, rtol=1e-5, atol=1e-6)
    assert len(indexes(run)) == 2 and recalls[0] < recalls[1] == 1.0, "other parameters need another index"
