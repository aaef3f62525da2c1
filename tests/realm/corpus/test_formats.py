"""Document formats: the same documents from each format, and positions in error messages."""

import csv
import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.corpus.documents import Document, read_documents
from realm.corpus.formats import count_ignored, format_of, source_files
from realm.corpus.records import BadRecords
from realm.corpus.sources import SourceConfig
from realm.corpus.tables import parsed_rows
from realm.corpus.text_files import parse_tsv
from realm.errors import UserError

DOCUMENTS = [
    Document("1", "Danube", 'The Danube rises in the "Black" Forest.'),
    Document("2", "", "Zürich has\ta tab, and no title."),
    Document("3", "Rhône", "東京 は 首都 。"),
]


def tsv(rows: list[list[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def table() -> pa.Table:
    return pa.table(
        {"id": [1, 2, 3], "title": ["Danube", None, "Rhône"], "text": [document.text for document in DOCUMENTS]}
    )


def write_all(folder: Path) -> dict[str, Path]:
    """Write the documents in each format; returns the paths by the name of the format."""
    names = {
        "jsonl": "a.jsonl",
        "tsv": "psgs_w100.tsv.gz",
        "parquet": "tables",
        "squad": "squad.json",
        "datasets": "saved",
    }
    paths = {name: folder / path for name, path in names.items()}
    paths["jsonl"].write_text("".join(json.dumps(document._asdict()) + "\n" for document in DOCUMENTS))
    rows = [["id", "text", "title"], *([document.id, document.text, document.title] for document in DOCUMENTS)]
    paths["tsv"].write_bytes(gzip.compress(tsv(rows).encode()))
    paths["parquet"].mkdir()
    for number in (1, 0):  # written in reverse: files are sorted by name
        part = table().slice(0, 2) if number == 0 else table().slice(2)
        pa.parquet.write_table(part, paths["parquet"] / f"part-{number}.parquet")
    import datasets

    datasets.Dataset(table()).save_to_disk(str(paths["datasets"]))
    return paths


def read(*sources: SourceConfig, **options: bool) -> list[Document]:
    return list(read_documents(sources, **options))


def test_the_same_documents_from_every_format(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    for name in ("jsonl", "tsv", "parquet", "datasets"):
        source = SourceConfig(str(paths[name]))
        assert format_of(source) == name
        assert read(source) == DOCUMENTS, name


def test_paragraphs_of_squad(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(
        json.dumps(
            {
                "data": [
                    {
                        "title": "Old_Towns",
                        "paragraphs": [{"context": "One.", "qas": []}, {"context": "Two.", "qas": []}],
                    }
                ]
            }
        )
    )
    assert read(SourceConfig(str(path), "squad")) == [
        Document("Old_Towns/0", "Old Towns", "One."),
        Document("Old_Towns/1", "Old Towns", "Two."),
    ]


def test_timeqa_articles_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "timeqa.json"
    article = {"link": "/wiki/Old_Town", "paras": ["Old Town", "It is old ."], "questions": []}
    path.write_text(json.dumps([article, {**article, "index": "another relation"}]))
    assert read(SourceConfig(str(path), "timeqa")) == [
        Document("/wiki/Old_Town", "Old Town", "Old Town\n\nIt is old .")
    ]


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b_note.txt").write_text("Second.")
    (tmp_path / "a.md").write_text("First.")
    (tmp_path / "deep" / "c.txt").write_bytes("\ufeffThird.".encode())
    (tmp_path / "ignored.pdf").write_bytes(b"%PDF")
    expected = [
        Document("a.md", "a", "First."),
        Document("b_note.txt", "b note", "Second."),
        Document("deep/c.txt", "c", "Third."),
    ]
    assert read(SourceConfig(str(tmp_path))) == expected
    assert [path.name for path in source_files(SourceConfig(str(tmp_path)))] == ["a.md", "b_note.txt", "c.txt"]
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"bad.txt: not UTF-8, byte 4"):
        read(SourceConfig(str(tmp_path)))
    assert read(SourceConfig(str(tmp_path)), skip_bad=True) == expected


def test_text_files_may_be_compressed_with_suffixes_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"One."))
    (tmp_path / "B.TXT").write_text("Two.")
    assert read(SourceConfig(str(tmp_path))) == [Document("B.TXT", "B", "Two."), Document("a.txt.gz", "a", "One.")]


def test_folder_of_jsonl_is_one_source_and_mixed_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in (1, 0):
        (tmp_path / "data" / f"part-{number}.jsonl").write_text(f'{{"text": "Number {number}."}}\n')
    source = SourceConfig(str(tmp_path), fields={"id": "part-#"})
    assert read(source) == [Document("part-0", "", "Number 0."), Document("part-1", "", "Number 1.")]
    (tmp_path / "README.md").write_text("About the data.")
    with pytest.raises(UserError, match="is a folder with jsonl and text files; set its `format` to one of"):
        read(source)
    assert len(read(replace(source, format="jsonl"))) == 2 and count_ignored(replace(source, format="jsonl")) == 1


def test_mapped_title_that_is_in_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1", "text": "One.", "title": "T"}\n{"id": "2", "text": "Two."}\n')
    with pytest.raises(UserError, match=r'missing field "heading" \(mapped to title\) in all records'):
        read(SourceConfig(str(path), fields={"title": "heading"}))
    (tmp_path / "a.tsv").write_text("id\ttext\ttitle\n1\tOne.\tT\n")
    with pytest.raises(UserError, match=r"the header has no column heading; map its columns .id, text, title."):
        read(SourceConfig(str(tmp_path / "a.tsv"), fields={"title": "heading"}))


def test_json_format_is_detected_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "One."}, {"qas": []}, {"context": "Two."}]}]})
    )
    assert [document.id for document in read(SourceConfig(str(tmp_path / "a.json")), skip_bad=True)] == [
        "T/0",
        "T/2",
    ], "one paragraph is skipped"
    (tmp_path / "b.json").write_text('{"id": 1, "text": "One."}\n{"id": 2, "text": "Two."}\n')
    with pytest.raises(UserError, match="set `format: jsonl` if it has one object per line"):
        read(SourceConfig(str(tmp_path / "b.json")))
    with pytest.raises(UserError, match=r"`fields` of .* the format squad has fixed fields"):
        read(SourceConfig(str(tmp_path / "a.json"), fields={"id": "x"}))


def test_fields_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"docid": "x", "contents": "Text one.", "text": "not this"}\n{"docid": "y", "contents": "Text two."}\n'
    )
    mapped = {"id": "docid", "text": "contents"}
    assert read(SourceConfig(str(path), fields=mapped)) == [
        Document("x", "", "Text one."),
        Document("y", "", "Text two."),
    ]
    numbered = {"id": "#", "text": "contents"}
    assert [document.id for document in read(SourceConfig(str(path), fields=numbered))] == ["0", "1"]
    with pytest.raises(
        UserError, match=r'a.jsonl:1: missing field "body" \(mapped to text\); the record has contents, docid, text'
    ):
        read(SourceConfig(str(path), fields={"text": "body"}))
    with pytest.raises(UserError, match="maps body; the fields of a document are id, title and text"):
        SourceConfig(str(path), fields={"body": "text"})


def test_sources_are_read_in_order_and_ids_are_unique_across_them(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"id": "1", "text": "One."}\n{"id": "2", "text": "Two."}\n')
    second.write_text('{"id": "3", "text": "Three."}\n{"id": "1", "text": "Four."}\n')
    with pytest.raises(UserError, match=re.escape(f"{second}:2: duplicate id '1', first used at {first}:1")):
        read(SourceConfig(str(first)), SourceConfig(str(second)))
    report = BadRecords()
    documents = list(
        read_documents([SourceConfig(str(first), limit=1), SourceConfig(str(second), limit=1)], report=report)
    )
    assert [document.id for document in documents] == ["1", "3"]


TSV_MISTAKES = {
    "no header": ("1\tText.\tTitle\n", "the header has no column"),
    "columns": ('id\ttext\ttitle\n1\ta\tb\n2\tc\n', ":3: expected 3 columns, got 2"),
    "quote": ('id\ttext\ttitle\n1\t"a\tb\n', ":2: invalid quoting"),
    "UTF-8": (b"id\ttext\ttitle\n1\tcaf\xe9\tb\n", ":2: not UTF-8, byte 6"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TSV_MISTAKES)
def test_errors_in_tables_are_reported_by_line(tmp_path: Path, mistake: str) -> None:
    content, reason = TSV_MISTAKES[mistake]
    path = tmp_path / "a.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=re.escape(reason)):
        read(SourceConfig(str(path)))


def test_errors_in_parquet_squad_and_saved_datasets(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no column text; map its columns \(id, body\) with `fields`"):
        read(SourceConfig(str(tmp_path / "a.parquet")))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="is not a readable Parquet file"):
        read(SourceConfig(str(tmp_path / "b.parquet")))
    (tmp_path / "squad.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="not in SQuAD format"):
        read(SourceConfig(str(tmp_path / "squad.json"), "squad"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="is not a usable dataset saved with `save_to_disk`"):
        read(SourceConfig(str(tmp_path / "saved")))


def test_format_that_cannot_be_detected_must_be_set(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be auto-detected; set `format` to one of jsonl, tsv, parquet"):
        read(SourceConfig(str(tmp_path / "x.json")))
    with pytest.raises(
        UserError,
        match=r"wikimedia/wikipedia does not exist; for a dataset on the Hugging Face hub set `format: datasets`",
    ):
        read(SourceConfig("wikimedia/wikipedia"))
    with pytest.raises(UserError, match="unknown format 'xml'"):
        read(SourceConfig("a.xml", "xml"))


def test_hub_name_without_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="dataset wikimedia/wikipedia is not on this machine"):
        read(SourceConfig("wikimedia/wikipedia", "datasets"))


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029\x85")),
        min_size=1,
        max_size=5,
    )
)
def test_table_lines_written_by_csv_are_parsed(values: list[str]) -> None:
    assert parse_tsv(tsv([values]).encode()) == values or values == [""]


def test_rows_of_tables_without_a_python_value_are_skipped_and_counted(tmp_path: Path) -> None:
    latin = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"caf\xe9ab")]
    )
    pa.parquet.write_table(pa.table({"id": ["1", "2"], "text": latin}), tmp_path / "a.parquet")
    times = pa.array([2**62, 1], pa.timestamp("us"))
    pa.parquet.write_table(pa.table({"id": ["1", "2"], "text": times}), tmp_path / "b.parquet")
    report = BadRecords()
    documents = list(read_documents([SourceConfig(str(tmp_path / "a.parquet"))], True, report))
    assert [document.id for document in documents] == ["2"]
    assert report.first == [f'{tmp_path / "a.parquet"}:1: not UTF-8 in "text"']
    with pytest.raises(UserError, match=r'b.parquet:1: "text" has no Python value[^\n]*\n.*"text" is not a string'):
        read(SourceConfig(str(tmp_path / "b.parquet")))


def test_missing_and_repeated_columns_are_refused(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"id": ["1"], "text": ["One."]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column title; map its columns \(id, text\)"):
        read(SourceConfig(str(tmp_path / "a.parquet"), fields={"text": "title"}))
    (tmp_path / "a.tsv").write_text("id\ttext\ttext\n1\tOne.\tTwo.\n")
    with pytest.raises(UserError, match=r"a.tsv:1: the header has two columns text"):
        read(SourceConfig(str(tmp_path / "a.tsv")))


@pytest.mark.parametrize("damage", ["no rows", "[]", '{"_data_files": 5}', "null"])
def test_damaged_saved_datasets_are_refused(tmp_path: Path, damage: str) -> None:
    import datasets

    saved = tmp_path / "saved"
    rows = [] if damage == "no rows" else ["One."]
    datasets.Dataset.from_dict({"id": [str(n) for n in range(len(rows))], "text": rows}).save_to_disk(str(saved))
    if rows:
        (saved / "state.json").write_text(damage)
    with pytest.raises(UserError, match="it has no rows" if not rows else "is not a usable dataset"):
        read(SourceConfig(str(saved)))


def test_a_split_or_name_that_has_no_effect_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"id": ["1"], "text": ["One."]}).save_to_disk(str(tmp_path / "saved"))
    for options, reason in (
        ({"split": "x"}, "is not divided into splits, but `split` is 'x'"),
        ({"name": "en"}, "`name`"),
    ):
        with pytest.raises(UserError, match=reason):
            read(SourceConfig(str(tmp_path / "saved"), **options))
        (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "One."}\n')
        with pytest.raises(UserError, match=f"`{next(iter(options))}` of .* is only for the format datasets"):
            read(SourceConfig(str(tmp_path / "a.jsonl"), **options))


def test_duplicate_keys_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "One.", "text": "Two."}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: duplicate key: two values for 'text'"):
        read(SourceConfig(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.json").write_text('{"data": [{"title": "a", "title": "b", "paragraphs": []}]}')
    with pytest.raises(UserError, match=r"a.json has an object with two values for 'title'; remove one"):
        read(SourceConfig(str(tmp_path / "a.json")))


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path, text in ((folder / "sub" / "a.txt", "One."), (other / "b.txt", "Two."), (other / "c.pdf", "x")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, target in (("linked", other), ("again", other), ("sub/loop", folder), ("sub2", folder / "sub")):
        (folder / name).symlink_to(target)
    source = SourceConfig(str(folder))
    assert [(document.id, document.text) for document in read(source)] == [
        ("again/b.txt", "Two."),
        ("sub/a.txt", "One."),
    ]
    assert count_ignored(source) == 1
    (folder / "d.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"d.txt cannot be read"):
        read(source)


def test_timeqa_articles_with_values_of_other_types_are_reported(tmp_path: Path) -> None:
    good = {"link": "/wiki/A", "paras": ["One."]}
    (tmp_path / "a.json").write_text(json.dumps([{"link": ["x"], "paras": []}, {"link": "x", "paras": "abc"}, good]))
    report = BadRecords()
    documents = list(read_documents([SourceConfig(str(tmp_path / "a.json"))], True, report))
    assert [document.text for document in documents] == ["One."]
    assert report.counts == {'"link" is not a string': 1, '"paras" is not a list': 1}


def test_offsets_outside_of_a_column_are_refused() -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\0\0\0\x70\5\0\0\0")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abcde")])
    with pytest.raises(pa.ArrowInvalid, match=r"[Oo]ffset"):
        list(parsed_rows([pa.record_batch([column], ["text"])], "a", BadRecords(), lambda place, row: row))
