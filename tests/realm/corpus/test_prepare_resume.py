"""Resuming an interrupted or killed preparation: the result equals that of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import realm.corpus.prepare
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from tests.realm.corpus.rivers import file_contents, make_documents, prepare, river_tokenizer, write_jsonl
from tests.realm.corpus.stub_tagger import StubTagger

REPOSITORY = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def tokenizer():
    return river_tokenizer()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(realm.corpus.prepare, "CHUNK_DOCUMENTS", 20)


class InterruptedTagger(StubTagger):
    """Raises KeyboardInterrupt in the third chunk."""

    chunks = 0

    def tag(self, texts):
        self.chunks += 1
        if self.chunks == 3:
            raise KeyboardInterrupt
        return super().tag(texts)


def shards_of(out):
    return {path.name: path.stat().st_ino for path in (out / "shards").glob("0*.arrow")}


def resume(tmp_path, tokenizer):
    """Resume `killed/out` and compare the result with that of an uninterrupted run.

    Also checks that finished shards are kept. Returns the numbers of finished and of all shards.
    """
    prepare(tmp_path, tokenizer, out="whole/out")
    out = tmp_path / "killed/out"
    finished, after = shards_of(out), {}
    prepare(tmp_path, tokenizer, out="killed/out", progress=lambda done, total: after.update(shards_of(out)))
    assert finished.items() <= after.items(), "finished shards were recreated"
    assert file_contents(out) == file_contents(tmp_path / "whole/out")
    return len(finished), len(after)


def test_resume_after_an_interrupt(tmp_path, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, tokenizer, make_documents(90), out="killed/out", tagger=InterruptedTagger())
    assert resume(tmp_path, tokenizer) == (2, 5)


def test_resume_after_an_interrupt_before_the_manifest(tmp_path, tokenizer, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(realm.corpus.prepare, "write_manifest", interrupted)
        prepare(tmp_path, tokenizer, make_documents(90), out="killed/out")
    with pytest.raises(UserError, match="not a finished prepared corpus"):
        PreparedCorpus.open(tmp_path / "killed/out")
    assert resume(tmp_path, tokenizer) == (5, 5)


PROGRAM = """
import sys
from pathlib import Path
from realm.corpus.sources import SourceConfig
import realm.corpus.prepare
from realm.text.tokenizer import load_tokenizer
from tests.realm.corpus.rivers import all_texts, make_documents, river_tokenizer, write_jsonl
from tests.realm.corpus.stub_tagger import StubTagger
if __name__ == "__main__":
    source, out, tokenizer, log = sys.argv[1:]
    realm.corpus.prepare.CHUNK_DOCUMENTS = 20
    tagger, tokenizer = StubTagger(delay=0.02, log=log), load_tokenizer(tokenizer)
    realm.corpus.prepare.prepare_corpus([SourceConfig(source)], Path(out), tokenizer, 48, tagger, num_workers=2)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_resume_after_a_kill_with_worker_processes(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "program.py").write_text(PROGRAM)
    out, log = tmp_path / "killed/out", tmp_path / "log"
    arguments = [sys.executable, *map(str, (tmp_path / "program.py", source, out, tmp_path / "tokenizer", log))]
    process = subprocess.Popen(arguments, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(shards_of(out)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = set(log.read_text().split())
    assert str(process.pid) not in workers
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes are still running after their parent was killed"
        time.sleep(0.05)
    num_finished, num_all = resume(tmp_path, tokenizer)
    assert 3 <= num_finished < num_all == 10
