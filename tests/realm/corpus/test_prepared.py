"""Reading documents: formats and every kind of bad record; errors of opening a prepared corpus."""

import gzip
import json
import random

import pyarrow as pa
import pytest

from realm.corpus.documents import Document
from realm.corpus.documents import read_documents as read_sources
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.records import BadRecords
from realm.corpus.sources import SourceConfig
from realm.errors import UserError

RECORDS = [
    {"id": "danube", "title": "Danube", "text": "The Danube rises in the Black Forest."},
    {"id": 7, "text": "Zürich has no title.", "note": "ignored"},
    {"id": "third", "title": None, "text": "  東京 は 首都 。\n"},
]
DOCUMENTS = [
    Document("danube", "Danube", "The Danube rises in the Black Forest."),
    Document("7", "", "Zürich has no title."),
    Document("third", "", "  東京 は 首都 。\n"),
]
PLAIN = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def read_documents(path, **options):
    return read_sources([SourceConfig(str(path))], **options)


def zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", PLAIN),
        ("a.jsonl.gz", gzip.compress(PLAIN)),
        ("two-members.jsonl.gz", gzip.compress(PLAIN[:60]) + gzip.compress(PLAIN[60:])),
        ("a.jsonl.zst", zstd(PLAIN)),
        ("two-frames.jsonl.zst", zstd(PLAIN[:60]) + zstd(PLAIN[60:])),
        ("no-last-newline.jsonl", PLAIN.rstrip(b"\n")),
        ("windows.jsonl", PLAIN.replace(b"\n", b"\r\n")),
        ("byte-order-mark.jsonl", b"\xef\xbb\xbf" + PLAIN),
        ("blank-lines.jsonl", b"\n" + PLAIN.replace(b"\n", b"\n  \n")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_same_documents_from_every_format(tmp_path, name, content):
    assert list(read_documents(write(tmp_path / name, content))) == DOCUMENTS


def line(**fields):
    return json.dumps(fields).encode()


GOOD = line(id="good", text="A good text.")
BAD = {
    "duplicate id": (line(id="good", text="x"), r"duplicate id 'good', first used on line 1"),
    "number as duplicate": (
        line(id=5, text="x") + b"\n" + line(id="5", text="x"),
        r":3: duplicate id '5', first used on line 2",
    ),
    "conflicting id": (line(id="good#0", text="x"), r"'good#0' \(blocks of a document A have the ids A#0, A#1"),
    "empty text": (line(id="a", text=" \n\t"), 'empty "text"'),
    "invisible text": (line(id="a", text="\u200b\x00\ufffd\u0301"), 'empty "text"'),
    "empty id": (line(id="", text="x"), 'empty "id"'),
    "invalid JSON": (b'{"id": "a", "text": ', "invalid JSON"),
    "deep JSON": (b'{"id": ' + b"[" * 200_000, "invalid JSON"),
    "list": (b"[1, 2]", "not a JSON object but a list"),
    "number": (b"3", "not a JSON object but a number"),
    "null": (b"null", "not a JSON object but null"),
    "no id": (line(title="t", text="x"), 'missing field "id"; the record has text, title'),
    "no text": (line(id="a", contents="x"), 'missing field "text"; the record has contents, id'),
    "empty object": (b"{}", 'missing field "id"; the record has no fields'),
    "text is a list": (line(id="a", text=["x"]), '"text" is not a string but a list'),
    "text is null": (line(id="a", text=None), '"text" is not a string but null'),
    "title is a number": (line(id="a", title=3, text="x"), '"title" is not a string but a number'),
    "id is true": (line(id=True, text="x"), '"id" is not a string but a boolean'),
    "id is a fraction": (line(id=1.5, text="x"), '"id" is not a string but a number'),
    "bad UTF-8": (b'{"id": "a", "text": "caf\xe9"}', "not UTF-8, byte 25 of the line"),
    "unpaired surrogate": (b'{"id": "a", "text": "x \\ud800"}', 'unpaired surrogate in "text"'),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_record_is_reported_with_file_line_and_reason(tmp_path, kind):
    content, reason = BAD[kind]
    path = write(tmp_path / "c.jsonl", GOOD + b"\n" + content + b"\n")
    with pytest.raises(UserError, match=reason) as caught:
        list(read_documents(path))
    assert f"{path}:{3 if kind == 'number as duplicate' else 2}: " in str(caught.value)


@pytest.mark.parametrize("kind", BAD)
def test_bad_record_is_skipped_and_counted(tmp_path, kind):
    after = line(id="after", text="Still read.")
    report = BadRecords()
    documents = list(
        read_documents(
            write(tmp_path / "c.jsonl", GOOD + b"\n" + BAD[kind][0] + b"\n" + after), skip_bad=True, report=report
        )
    )
    assert [document.id for document in documents if document.id != "5"] == ["good", "after"]
    assert report.total == 1


def test_conflicting_id_is_found_in_either_order(tmp_path):
    path = write(tmp_path / "c.jsonl", line(id="a#3", text="x") + b"\n" + line(id="a", text="x"))
    with pytest.raises(UserError, match=r"c.jsonl:2: id conflicts with block ids: .* is on line 1"):
        list(read_documents(path))
    harmless = write(
        tmp_path / "d.jsonl",
        line(id="a#3", text="x") + b"\n" + line(id="a#b", text="x") + b"\n" + line(id="b", text="x"),
    )
    assert len(list(read_documents(harmless))) == 3


def test_report_lists_twenty_records_and_counts_all(tmp_path):
    path = write(tmp_path / "c.jsonl", GOOD + b"\n" + b"{\n" * 30 + b"[]\n" * 5)
    with pytest.raises(UserError) as caught:
        list(read_documents(path))
    report = str(caught.value)
    assert (
        "35 records" in report
        and "and 15 more" in report
        and "30 x invalid JSON" in report
        and "5 x not a JSON object" in report
    )
    assert report.count(f"{path}:") == 20
    assert "--skip-bad" in report


def noise(num_lines):
    generator = random.Random(0)
    return b"".join(line(id=str(i), text=str(generator.getrandbits(400))) + b"\n" for i in range(num_lines))


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("cut", [0.5, 1])
def test_truncated_file_is_always_detected(tmp_path, suffix, compress, cut):
    content = compress(noise(2000))
    path = write(tmp_path / ("c.jsonl" + suffix), content[: min(int(len(content) * cut), len(content) - 1)])
    with pytest.raises(UserError, match=r"corrupt compressed data .*; the rest of the file is not read"):
        list(read_documents(path))
    report = BadRecords()
    documents = list(read_documents(path, skip_bad=True, report=report))
    assert 0 < len(documents) <= 2000 and report.total == 1
    assert [document.id for document in documents] == [str(i) for i in range(len(documents))]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_file_that_is_not_compressed_is_refused(tmp_path, suffix):
    path = write(tmp_path / ("c.jsonl" + suffix), PLAIN)
    with pytest.raises(UserError, match="1: corrupt compressed data"):
        list(read_documents(path))


def test_unusable_paths_are_refused_in_one_line(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    cases = {
        "nowhere.jsonl": "does not exist",
        "folder.jsonl": "is a folder with neither a saved dataset nor files ending in .jsonl",
        "c.unknown": r"cannot be auto-detected; set `format` to one of jsonl, tsv",
        "empty.jsonl": "is empty",
        "blank.jsonl": "no usable documents in",
    }
    write(tmp_path / "c.unknown", PLAIN)
    write(tmp_path / "empty.jsonl", b"")
    write(tmp_path / "blank.jsonl", b"\n\n")
    for name, reason in cases.items():
        with pytest.raises(UserError, match=reason) as caught:
            list(read_documents(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_source_with_only_bad_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="no usable documents in"):
        list(read_documents(write(tmp_path / "c.jsonl", b"{\n"), skip_bad=True))


def test_opening_a_folder_without_prepared_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist; run `realm prepare`"):
        PreparedCorpus.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a finished prepared corpus; run `realm prepare`"):
        PreparedCorpus.open(tmp_path)
    write(tmp_path / "manifest.json", b"{")
    with pytest.raises(UserError, match="not valid JSON"):
        PreparedCorpus.open(tmp_path)
    write(tmp_path / "manifest.json", b'{"format": 99}')
    with pytest.raises(UserError, match="layout"):
        PreparedCorpus.open(tmp_path)
