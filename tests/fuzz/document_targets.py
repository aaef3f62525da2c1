"""Fuzz targets: documents in every format, as `realm prepare` reads them."""

import gzip
import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from random import Random

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from realm.corpus.documents import read_documents
from realm.corpus.formats import count_ignored
from realm.corpus.records import BadRecords
from realm.corpus.sources import SourceConfig
from tests.fuzz.mutate import dumped, mutated_bytes, mutated_json, mutated_tree
from tests.fuzz.targets import Case, Target, register

DOCUMENTS = [
    {"id": "1", "title": "Danube", "text": "The Danube rises in the Black Forest. It ends in the Black Sea."},
    {"id": "2", "title": None, "text": "Zürich has\ta tab, and “quotes”."},
    {"id": 3, "title": "Rhône", "text": "東京 は 首都 。", "more": {"a": [1, None]}},
]
SQUAD = {"data": [{"title": "Old_Towns", "paragraphs": [{"context": "Alda is old.", "qas": []}, {"context": "B."}]}]}
TIMEQA = [{"link": "/wiki/Alda", "paras": ["Alda", "Ada Moor led it."]}, {"link": "/wiki/Elst", "paras": ["Elst."]}]
FIELDS = ({}, {}, {}, {"title": "more"}, {"text": "title"}, {"id": "wiki-#"}, {"id": "text", "text": "id"})


def read(case: Case, folder: Path) -> int:
    """Read a file, or a folder if the settings name a file in it, with bad records skipped."""
    path = folder / case.settings["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case.content)
    source = SourceConfig(str((case.settings.get("folder") and folder) or path), **case.settings.get("options", {}))
    count_ignored(source)
    report = BadRecords()
    for document in read_documents([source], skip_bad=True, report=report):
        (document.id + document.title + document.text).encode()
    return report.total


def _lines(rng: Random) -> bytes:
    return b"".join(
        (mutated_json(rng, document) if rng.random() < 0.3 else json.dumps(document).encode()) + b"\n"
        for document in DOCUMENTS
    )


def _jsonl(rng: Random) -> Case:
    content = _lines(rng)
    content = mutated_bytes(rng, content) if rng.random() < 0.3 else content
    return Case(content, {"file": "a.jsonl", "options": {"fields": rng.choice(FIELDS)}})


def _tsv(rng: Random) -> Case:
    content = 'id\ttext\ttitle\n1\tThe Danube.\tDanube\n2\t"A ""quoted"" text"\tT\n3\tZürich\t\n'.encode()
    return Case(mutated_bytes(rng, content), {"file": "a.tsv", "options": {"fields": rng.choice(FIELDS)}})


def _text(rng: Random) -> Case:
    content = "Ein Text über Flüsse.\r\n\r\nUnd noch ein Absatz.\n".encode()
    name = rng.choice(("a.txt", "a[1].md", "sub/a.txt"))
    return Case(mutated_bytes(rng, content), {"file": name, "folder": True, "options": {"format": "text"}})


def _whole_json(rng: Random) -> Case:
    content = mutated_json(rng, rng.choice((SQUAD, TIMEQA)))
    return Case(content, {"file": "a.json", "options": {"format": rng.choice(("auto", "squad", "timeqa"))}})


@cache
def _zstandard() -> pa.Codec:
    return pa.Codec("zstd")


def _compressed(rng: Random) -> Case:
    content, suffix = _lines(rng), rng.choice((".gz", ".zst"))
    if rng.random() < 0.1:
        content += b'{"id": "x", "text": "' + b"a" * rng.choice((1_000, 2_000_000)) + b'"}\n'
    packed = gzip.compress(content, 1) if suffix == ".gz" else _zstandard().compress(content, asbytes=True)
    if rng.random() < 0.2:
        packed += packed
    return Case(mutated_bytes(rng, packed, encodings=False), {"file": "a.jsonl" + suffix})


def _odd_table(rng: Random) -> pa.Table:
    """A table whose columns have types, or values, that documents do not have."""
    ids = pa.array(["1", "2", "3"])
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0\4\0\0\0\5\0\0\0"), pa.py_buffer(b"ab\xe9\xe9c")]
    )
    columns = [
        ids,
        broken,
        pa.array([1, None, 3]),
        pa.array([2**62, 1, -(2**62)], pa.timestamp("us")),
        pa.nulls(3),
        pa.array([2**62, 1, 2], pa.timestamp("ns", "Mars/Base")),
        pa.array([[1], None, []]),
        pa.array([b"\xff", b"", None]),
        pa.array(["a", "a", "b"]).dictionary_encode(),
        pa.array([{"a": 1}, None, {"a": 2}]),
        pa.array([1.5, float("nan"), None]),
        pa.array([2**31 - 1, 0, 5], pa.date32()),
        pa.array([2**62, 5, 6], pa.duration("s")),
        pa.array(["x", "\0", "\u2028"], pa.large_string()),
    ]
    names = ["id", "title", "text", rng.choice(("more", "text"))]
    odd = rng.randrange(len(names))
    return pa.table([rng.choice(columns) if n == odd else ids for n in range(len(names))], names=names)


def _parquet(rng: Random) -> Case:
    whole = rng.random() < 0.5
    table = (
        _odd_table(rng)
        if whole
        else pa.table({name: [str(row.get(name)) for row in DOCUMENTS] for name in ("id", "text")})
    )
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer, compression=rng.choice(("none", "snappy", "zstd")))
    content = buffer.getvalue() if whole else mutated_bytes(rng, buffer.getvalue(), encodings=False)
    return Case(content, {"file": "a.parquet", "options": {"fields": rng.choice(FIELDS)}})


@cache
def saved_dataset(rows: int) -> dict[str, bytes]:
    """The files of a data set written by `save_to_disk`."""
    with tempfile.TemporaryDirectory() as folder:
        columns = {"id": ["1", "2"], "text": ["One.", "Two."], "question": ["a", "b"], "answers": [["x"], ["y"]]}
        data = datasets.Dataset.from_dict({name: values[:rows] for name, values in columns.items()})
        datasets.DatasetDict({"train": data}).save_to_disk(folder)
        return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def dataset_case(rng: Random) -> Case:
    """One damaged or missing file of a saved data set."""
    rows = rng.choice((0, 1, 2))
    files = saved_dataset(rows)
    name = rng.choice(sorted(files))
    content = files[name]
    if name.endswith(".json") and rng.random() < 0.7:
        content = dumped(rng, mutated_tree(rng, json.loads(content)))
    else:
        content = mutated_bytes(rng, content, encodings=False)
    options = {"split": rng.choice((None, "train", "test")), "name": rng.choice((None, None, None, "x"))}
    return Case(content, {"file": name, "rows": rows, "at_split": rng.random() < 0.3, "options": options})


def write_dataset(case: Case, folder: Path) -> str:
    """Write the data set with the damaged file; returns the folder of all splits, or of one."""
    for name, content in saved_dataset(case.settings["rows"]).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.content if name == case.settings["file"] else content)
    return str(folder / "train" if case.settings["at_split"] else folder)


def _read_dataset(case: Case, folder: Path) -> int:
    report = BadRecords()
    source = SourceConfig(write_dataset(case, folder), format="datasets", **case.settings["options"])
    list(read_documents([source], skip_bad=True, report=report))
    return report.total


def _folder_case(rng: Random) -> Case:
    """A folder with links, folders and files of several kinds; the content is the list of them."""
    kinds = (
        "file a.txt",
        "file b.jsonl",
        "link sub",
        "link .",
        "link ..",
        "dead c.txt",
        "folder sub",
        "folder d[",
        "pipe p.txt",
    )
    return Case("\n".join(rng.choice(kinds) for _ in range(rng.randint(0, 6))).encode())


def _read_folder(case: Case, folder: Path) -> int:
    import os

    root = folder / "root"
    root.mkdir()
    for number, line in enumerate(case.content.decode().split("\n")):
        kind, _, name = line.partition(" ")
        path = root / f"{number}{name}"
        match kind:
            case "file":
                path.write_text(json.dumps({"id": str(number), "text": "One."}) + "\n")
            case "link":
                (root / f"link{number}").symlink_to(root / name)
            case "dead":
                path.symlink_to(root / "nowhere")
            case "folder":
                (root / name).mkdir(exist_ok=True)
                (root / name / f"{number}.txt").write_text("Two.")
            case "pipe":
                os.mkfifo(path)
    report = BadRecords()
    documents = list(read_documents([SourceConfig(str(root))], skip_bad=True, report=report))
    assert len({document.id for document in documents}) == len(documents)
    shutil.rmtree(root)
    return report.total


register(Target("documents-jsonl", _jsonl, read))
register(Target("documents-tsv", _tsv, read))
register(Target("documents-text", _text, read))
register(Target("documents-json", _whole_json, read))
register(Target("documents-compressed", _compressed, read))
register(Target("documents-parquet", _parquet, read))
register(Target("documents-dataset", dataset_case, _read_dataset))
register(Target("documents-folder", _folder_case, _read_folder))
