"""Preparing a corpus: blocks, spans, order, fingerprint, and errors."""

import gzip
import json
import multiprocessing
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import realm.corpus.prepare
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.shards import interrupts_left_to_parent
from realm.errors import UserError
from realm.spans.rules import SPAN_TYPES, SalientSpan
from realm.text.blocks import text_hash
from realm.text.tokenizer import TokenizerConfig, tokenize, train_wordpiece
from tests.realm.corpus.rivers import all_texts, file_contents, make_documents, prepare, river_tokenizer, write_jsonl
from tests.realm.corpus.stub_tagger import StubTagger


@pytest.fixture(scope="module")
def tokenizer():
    return river_tokenizer()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(realm.corpus.prepare, "CHUNK_DOCUMENTS", 20)


def test_prepared_corpus_contains_the_documents_in_order(tmp_path, tokenizer):
    documents = make_documents(55)
    corpus = prepare(tmp_path, tokenizer, documents)
    assert corpus.manifest["documents"] == 55 and corpus.manifest["blocks"] == len(corpus) > 55
    rows_of = {}
    for row in range(len(corpus)):
        rows_of.setdefault(corpus.document(row), []).append(row)
    assert [row for i in range(55) for row in rows_of[i]] == list(range(len(corpus)))
    for i, document in enumerate(documents):
        rows = rows_of[i]
        assert "".join(corpus.text(row) for row in rows) == document["text"]
        assert [corpus.place(row) for row in rows] == list(range(len(rows)))
        expected = [document["id"]] if len(rows) == 1 else [f"{document['id']}#{place}" for place in range(len(rows))]
        assert [corpus.ids[row] for row in rows] == expected
        assert {corpus.title(row) for row in rows} == {document["title"]}
        text_ids = tokenize(tokenizer, [document["text"]])[0][0]
        assert np.array_equal(np.concatenate([corpus.text_ids(row) for row in rows]), text_ids)
        for row in rows:
            assert np.array_equal(corpus.title_ids(row), tokenize(tokenizer, [document["title"]])[0][0])
            assert corpus.text_hash(row) == text_hash(corpus.text(row))
            assert corpus.row_of_id(corpus.ids[row]) == row
    assert corpus.lengths.tolist() == [
        len(corpus.title_ids(row)) + len(corpus.text_ids(row)) for row in range(len(corpus))
    ]
    assert corpus.lengths.max() + 3 <= 48
    assert tokenizer.mask_token_id not in np.concatenate([corpus.text_ids(row) for row in range(len(corpus))])
    assert list(corpus.ids) == [corpus.ids[row] for row in range(len(corpus))]
    assert corpus.ids[1:3] == [corpus.ids[1], corpus.ids[2]]


def test_spans_are_those_of_the_tagger(tmp_path, tokenizer):
    corpus = prepare(tmp_path, tokenizer, make_documents(30))
    num_spans = 0
    for row in range(len(corpus)):
        expected = next(iter(StubTagger().tag([corpus.text(row)])))
        _, offset_L2 = tokenize(tokenizer, [corpus.text(row)])[0]
        starts, ends, types = corpus.spans(row)
        found = [
            (offset_L2[start, 0], offset_L2[end - 1, 1], SPAN_TYPES[kind])
            for start, end, kind in zip(starts, ends, types, strict=True)
        ]
        assert found == list(expected)
        num_spans += len(found)
    assert corpus.manifest["spans"] == num_spans > 100
    assert corpus.manifest["spans_dropped"] == 0 and corpus.manifest["span_pipeline"] == "stub"


def test_spans_that_do_not_align_are_counted(tmp_path, tokenizer):
    class MisalignedTagger(StubTagger):
        def tag(self, texts):
            return ((SalientSpan(0, 3, "other"), SalientSpan(1, 3, "other")) for _ in texts)

    corpus = prepare(tmp_path, tokenizer, [{"id": 1, "text": "The cat sat."}], tagger=MisalignedTagger())
    assert (corpus.manifest["spans"], corpus.manifest["spans_dropped"]) == (1, 1)


def test_long_title_is_truncated(tmp_path, tokenizer):
    corpus = prepare(tmp_path, tokenizer, [{"id": 1, "title": "cat " * 100, "text": "The cat sat. " * 10}])
    assert corpus.lengths.max() + 3 <= 48
    assert len(corpus.title_ids(0)) == 22 and corpus.title(0) == "cat " * 100


def test_arrays_are_read_only_views(tmp_path, tokenizer):
    corpus = prepare(tmp_path, tokenizer, make_documents(3))
    for array in (corpus.text_ids(0), corpus.title_ids(0), corpus.sentence_starts(0), *corpus.spans(0)):
        assert not array.flags.owndata and not array.flags.writeable
    assert corpus.text_ids(0).dtype == np.int32
    for row in (-1, len(corpus)):
        with pytest.raises(IndexError, match=f"row {row} "):
            corpus.text_ids(row)
    with pytest.raises(KeyError):
        corpus.row_of_id("no such id")


def test_two_processes_share_memory(tmp_path, tokenizer):
    corpus = prepare(tmp_path, tokenizer, make_documents(30))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(all_texts, (corpus,)) == all_texts(corpus)
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped = [line.split()[1] for line in maps if line.endswith(str(corpus.path / "blocks.arrow"))]
        assert mapped and all("w" not in permissions for permissions in mapped), (
            "the file must be mapped read-only to be shared"
        )


def test_progress_counts_documents(tmp_path, tokenizer):
    seen = []
    prepare(tmp_path, tokenizer, make_documents(90), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(20, 90), (40, 90), (60, 90), (80, 90), (90, 90)]


def test_finished_folder_is_reused(tmp_path, tokenizer):
    corpus = prepare(tmp_path, tokenizer, make_documents(30))
    before = (tmp_path / "out/blocks.arrow").stat().st_mtime_ns
    (tmp_path / "out/shards").mkdir()  # as after a kill just before the last step
    again = prepare(tmp_path, tokenizer, progress=lambda done, total: pytest.fail("prepared again"))
    assert again.fingerprint == corpus.fingerprint
    assert (tmp_path / "out/blocks.arrow").stat().st_mtime_ns == before
    file_contents(tmp_path / "out")


CHANGES = {
    "documents": {"documents": make_documents(31)},
    "tokenizer": {},
    "block_tokens": {"block_tokens": 64},
    "span pipeline": {"tagger": StubTagger("another")},
}


@pytest.mark.parametrize("half_done", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_different_inputs_are_refused(tmp_path, tokenizer, what, half_done):
    class InterruptedTagger(StubTagger):
        def tag(self, texts):
            raise KeyboardInterrupt

    if half_done:
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, tokenizer, make_documents(30), tagger=InterruptedTagger())
    else:
        prepare(tmp_path, tokenizer, make_documents(30))
    if what == "tokenizer":
        tokenizer = train_wordpiece(["another text altogether"], TokenizerConfig(vocab_size=100))
    state = "partially prepared" if half_done else "prepared"
    message = f"{tmp_path / 'out'} contains a corpus that was {state} from different inputs: (.*); remove the folder"
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer, **CHANGES[what])
    match = re.match(message, str(caught.value))
    assert match is not None, str(caught.value)
    assert re.sub(r" \([^)]*\)", "", match[1]) == what, "only the input that differs is named"


def test_fingerprint_depends_on_content_only(tmp_path, tokenizer):
    documents = make_documents(5)
    fingerprints = {}

    def fingerprint(name, changed, **changes):
        return prepare(
            tmp_path, changes.pop("tokenizer", tokenizer), changed, out=name, name=f"{name}.jsonl", **changes
        ).fingerprint

    fingerprints["plain"] = fingerprint("plain", documents)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "plain.jsonl").read_bytes()))
    assert prepare(tmp_path, tokenizer, name="packed.jsonl.gz", out="packed").fingerprint == fingerprints["plain"]
    assert (
        prepare(tmp_path, tokenizer, name="plain.jsonl", out="tagged", tagger=StubTagger("b")).fingerprint
        == fingerprints["plain"]
    )
    fingerprints["order"] = fingerprint("order", documents[::-1])
    fingerprints["text"] = fingerprint("text", [documents[0] | {"text": "The cat."}, *documents[1:]])
    fingerprints["title"] = fingerprint("title", [documents[0] | {"title": "Cat"}, *documents[1:]])
    fingerprints["id"] = fingerprint("id", [documents[0] | {"id": "cat"}, *documents[1:]])
    fingerprints["shifted"] = fingerprint(
        "shifted", [documents[0] | {"id": "doc0R", "title": "iver 0"}, *documents[1:]]
    )
    fingerprints["block"] = fingerprint("block", documents, block_tokens=49)
    fingerprints["tokenizer"] = fingerprint(
        "tokenizer", documents, tokenizer=train_wordpiece(["the cat"], TokenizerConfig(vocab_size=100))
    )
    assert len(set(fingerprints.values())) == len(fingerprints)


def test_bad_records_write_nothing_or_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    source = write_jsonl(tmp_path / "corpus.jsonl", [*make_documents(25), {"id": "doc3", "text": "again"}])
    with pytest.raises(UserError, match=f"{source}:26: duplicate id 'doc3', first used on line 4"):
        prepare(tmp_path, tokenizer)
    assert not (tmp_path / "out").exists()
    corpus = prepare(tmp_path, tokenizer, skip_bad=True)
    assert (corpus.manifest["skipped"], corpus.manifest["documents"]) == (1, 25)
    assert f"{source}:26: duplicate id" in caplog.text
    with pytest.raises(UserError, match="duplicate id"):
        prepare(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_tokens": 15}, "block_tokens must be at least 16, got 15"),
        ({"num_workers": -1}, "num_workers must be 0 .* got -1"),
        ({"name": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"out": "corpus.jsonl"}, "corpus.jsonl is a file"),
        ({"out": "."}, "is not empty and does not contain a prepared corpus"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(tmp_path, tokenizer, changes, reason):
    write_jsonl(tmp_path / "corpus.jsonl", make_documents(2))
    with pytest.raises(UserError, match=reason) as caught:
        prepare(tmp_path, tokenizer, **changes)
    assert "\n" not in str(caught.value)


def test_modified_prepared_files_are_refused(tmp_path, tokenizer):
    prepare(tmp_path, tokenizer, make_documents(30))
    out = tmp_path / "out"
    blocks, manifest = out / "blocks.arrow", out / "manifest.json"
    whole, content = blocks.read_bytes(), json.loads(manifest.read_text())
    remedy = f"restore it from a copy, or remove {out} and run `realm prepare` again"
    blocks.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=f"{blocks} has {len(whole) - 10} bytes, .* says {len(whole)}; {remedy}"):
        PreparedCorpus.open(out)
    blocks.write_bytes(b"\0" * len(whole))
    with pytest.raises(UserError, match=f"is corrupt .*; {remedy}"):
        PreparedCorpus.open(out)
    blocks.write_bytes(whole)
    manifest.write_text(json.dumps(content | {"blocks": 3}))
    with pytest.raises(UserError, match=f"manifest.json was modified after it was published; {remedy}"):
        PreparedCorpus.open(out)
    del content["manifest_sha256"]  # as earlier versions wrote it
    manifest.write_text(json.dumps(content | {"blocks": 3}))
    with pytest.raises(UserError, match=f"rows, but its manifest says 3; {remedy}"):
        PreparedCorpus.open(out)
    manifest.unlink()
    for refused in (lambda: PreparedCorpus.open(out), lambda: prepare(tmp_path, tokenizer)):
        with pytest.raises(UserError, match=f"manifest.json is missing: {out} was copied only partially; {remedy}"):
            refused()


def test_flipped_bytes_are_found_at_the_first_use_of_their_record_batch(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(realm.corpus.prepare, "CHUNK_DOCUMENTS", 10)
    whole = prepare(tmp_path, tokenizer, make_documents(30))
    first_document = [whole.document(row) for row in range(len(whole))]
    first, second = first_document.index(0), first_document.index(10)
    blocks = tmp_path / "out/blocks.arrow"
    content = bytearray(blocks.read_bytes())
    at = content.index(whole.text(second).encode())
    assert at > content.index(whole.text(first).encode())
    content[at : at + 200] = bytes(byte ^ 1 for byte in content[at : at + 200])
    del whole
    blocks.write_bytes(content)
    corpus = PreparedCorpus.open(tmp_path / "out")
    corpus.text(first)
    for use in (
        lambda: corpus.text(second),
        lambda: corpus.lengths,
        lambda: corpus.places,
        lambda: corpus.row_of_id("x"),
        corpus.check,
        lambda: prepare(tmp_path, tokenizer),
    ):
        with pytest.raises(UserError, match=rf"{blocks} does not match the checksum .*; restore it"):
            use()


def test_a_corpus_of_an_earlier_version_has_no_checksums(tmp_path, tokenizer):
    texts = [prepare(tmp_path, tokenizer, make_documents(30)).text(row) for row in range(10)]
    manifest = tmp_path / "out/manifest.json"
    content = json.loads(manifest.read_text())
    assert PreparedCorpus.open(tmp_path / "out").has_checksums
    manifest.write_text(
        json.dumps({key: content[key] for key in content.keys() - {"files", "batches", "manifest_sha256"}})
    )
    corpus = prepare(tmp_path, tokenizer)
    corpus.check()
    assert not corpus.has_checksums and [corpus.text(row) for row in range(10)] == texts


@pytest.mark.real_data
def test_blocks_of_real_passages_are_complete(shared_data, tmp_path):
    from realm.text.tokenizer import load_tokenizer

    with gzip.open(shared_data / "wiki" / "passages.jsonl.gz", "rt", encoding="utf-8") as file:
        documents = [json.loads(line) for line, _ in zip(file, range(300), strict=False)]
    tokenizer = load_tokenizer(str(shared_data / "vocab" / "bert-base-uncased-vocab.txt"))
    corpus = prepare(tmp_path, tokenizer, documents, block_tokens=128)
    texts = [""] * 300
    for row in range(len(corpus)):
        texts[corpus.document(row)] += corpus.text(row)
    assert texts == [document["text"] for document in documents]
    alone = tokenize(tokenizer, [corpus.text(row) for row in range(len(corpus))])
    assert all(np.array_equal(ids, corpus.text_ids(row)) for row, (ids, _) in enumerate(alone))


def test_ctrl_c_is_left_to_the_parent_from_the_start_of_a_worker() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with interrupts_left_to_parent():
            future = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        assert signal.SIGINT in future.result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
