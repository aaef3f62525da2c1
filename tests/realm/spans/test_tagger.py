"""Tagger, cache and benchmark of salient spans."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import spacy
from hypothesis import given
from hypothesis import strategies as st
from spacy.pipeline import EntityRuler

from realm.app.cli import main
from realm.bench.spans import bench_spans, read_conll
from realm.errors import UserError
from realm.spans.cache import SpanCache
from realm.spans.rules import SPAN_TYPES, SalientSpan, builtin_spans
from realm.spans.tagger import SpanConfig, SpanTagger

TEXTS = [f"In {1900 + i} Ada Quill came to Porto with {i} crates." for i in range(40)] + [
    "",
    "nothing here",
    "Mary Oduya.",
]

_TAGGER = SpanTagger.load(SpanConfig())


class CountingTagger(SpanTagger):
    """The built-in tagger; records the texts it was called with."""

    def __init__(self, name: str = "counting-1") -> None:
        loaded = SpanTagger.load(SpanConfig())
        super().__init__(loaded.nlp, name, loaded.config)
        self.seen: list[str] = []

    def tag(self, texts: Iterable[str]) -> Iterator[tuple[SalientSpan, ...]]:
        texts = list(texts)
        self.seen += texts
        return super().tag(texts)


@pytest.fixture(scope="module")
def tagger() -> SpanTagger:
    return _TAGGER


def _custom_pipeline(folder: Path) -> Path:
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    assert isinstance(ruler, EntityRuler)
    ruler.add_patterns(
        [
            {"label": "PERSON", "pattern": "Quill"},
            {"label": "DATE", "pattern": "1905"},
            {"label": "LAW", "pattern": "Act"},
        ]
    )
    nlp.to_disk(folder)
    return folder


def test_span_types_are_a_file_format() -> None:
    assert SPAN_TYPES == ("person", "place", "organisation", "date", "number", "other")


def test_tagger_streams_in_order(tagger: SpanTagger) -> None:
    tagged = list(tagger.tag(iter(TEXTS)))
    assert len(tagged) == len(TEXTS)
    for text, spans in zip(TEXTS[:40], tagged, strict=False):
        assert [text[span.start : span.end] for span in spans][:3] == [text[3:7], "Ada Quill", "Porto"]
    assert tagged[40:42] == [(), ()]


@given(st.text())
def test_spacy_entities_are_the_spans_of_the_rules(text: str) -> None:
    assert _TAGGER.nlp(text).text == text
    assert next(_TAGGER.tag([text])) == tuple(builtin_spans(text))


def test_result_does_not_depend_on_the_number_of_processes(tagger: SpanTagger) -> None:
    several = SpanTagger.load(SpanConfig(num_workers=2, batch_size=4))
    assert list(several.tag(TEXTS)) == list(tagger.tag(TEXTS))


def test_without_dates() -> None:
    without = SpanTagger.load(SpanConfig(dates=False))
    assert without.name != SpanTagger.load(SpanConfig()).name
    assert [span.type for span in next(without.tag([TEXTS[3]]))] == ["person", "place", "number"]


def test_a_spacy_pipeline_with_and_without_dates(tmp_path: Path) -> None:
    path = str(_custom_pipeline(tmp_path / "own"))
    text = "In 1905 and in May 1906 Quill read the Act."
    plain, dated = (SpanTagger.load(SpanConfig(pipeline=path, dates=dates)) for dates in (False, True))
    assert [(text[s.start : s.end], s.type) for s in next(plain.tag([text]))] == [
        ("1905", "date"),
        ("Quill", "person"),
        ("Act", "other"),
    ]
    assert [(text[s.start : s.end], s.type) for s in next(dated.tag([text]))] == [
        ("1905", "date"),
        ("May 1906", "date"),
        ("Quill", "person"),
        ("Act", "other"),
    ]
    assert plain.name != dated.name


def test_pipelines_with_the_same_name_are_distinguished_by_content(tmp_path: Path) -> None:
    first = SpanTagger.load(SpanConfig(pipeline=str(_custom_pipeline(tmp_path / "a")))).name
    nlp = spacy.load(tmp_path / "a")
    ruler = nlp.get_pipe("entity_ruler")
    assert isinstance(ruler, EntityRuler)
    ruler.add_patterns([{"label": "GPE", "pattern": "Porto"}])
    nlp.to_disk(tmp_path / "b")
    assert SpanTagger.load(SpanConfig(pipeline=str(tmp_path / "b"))).name != first


def test_invalid_pipelines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"en_not_there.*install"):
        SpanTagger.load(SpanConfig(pipeline="en_not_there"))
    spacy.blank("en").to_disk(tmp_path / "empty")
    with pytest.raises(UserError, match="does not set entities"):
        SpanTagger.load(SpanConfig(pipeline=str(tmp_path / "empty")))


def test_cache_tags_each_text_once_in_order(tmp_path: Path, tagger: SpanTagger) -> None:
    counting = CountingTagger()
    texts = TEXTS + TEXTS[::-1]
    expected = list(tagger.tag(texts))
    done: list[int] = []
    assert list(SpanCache(tmp_path, counting, chunk_size=7).tag(texts[:10], done.append)) == expected[:10]
    assert sum(done) == 10
    assert list(SpanCache(tmp_path, counting, chunk_size=1000).tag(iter(texts), done.append)) == expected
    assert sorted(counting.seen) == sorted(TEXTS)
    assert sum(done) == 10 + len(texts)
    cache = SpanCache(tmp_path, counting, chunk_size=9)
    assert list(cache.tag(texts)) == expected == list(cache.tag(texts))
    assert len(counting.seen) == len(TEXTS)


def test_cache_reads_one_chunk_at_a_time(tmp_path: Path) -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"Text {taken} of Porto"

    stream = SpanCache(tmp_path, CountingTagger(), chunk_size=5).tag(texts())
    for _ in range(7):
        next(stream)
    assert taken == 10


def test_taggers_have_separate_caches(tmp_path: Path) -> None:
    first, second = CountingTagger("one-1"), CountingTagger("two-1")
    list(SpanCache(tmp_path, first).tag(TEXTS))
    list(SpanCache(tmp_path, second).tag(TEXTS))
    assert second.seen == first.seen


@pytest.mark.parametrize("damage", ["truncated", "empty", "modified", "foreign"])
def test_damaged_shard_is_ignored(tmp_path: Path, tagger: SpanTagger, damage: str) -> None:
    list(SpanCache(tmp_path, CountingTagger(), chunk_size=10).tag(TEXTS[:30]))
    shard = sorted((tmp_path / "counting-1").glob("*.arrow"))[1]
    content = shard.read_bytes()
    middle = len(content) // 2
    shard.write_bytes(
        {
            "truncated": content[:middle],
            "empty": b"",
            "modified": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "foreign": b"not an Arrow file",
        }[damage]
    )
    counting = CountingTagger()
    assert list(SpanCache(tmp_path, counting, chunk_size=10).tag(TEXTS[:30])) == list(tagger.tag(TEXTS[:30]))
    assert len(counting.seen) == 10


def test_cache_is_valid_after_a_kill(tmp_path: Path, tagger: SpanTagger) -> None:
    program = (
        "import sys; from pathlib import Path; from itertools import count\n"
        "from realm.spans.cache import SpanCache\nfrom realm.spans.tagger import SpanConfig, SpanTagger\n"
        "cache = SpanCache(Path(sys.argv[1]), SpanTagger.load(SpanConfig()), chunk_size=3)\n"
        "for _ in cache.tag(f'In Porto, on 3 May 1921, Ada Quill counted {i} trees.' for i in count()): pass\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*/*.arrow"))) < 5 and writer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
    num_cached = 3 * len(list(tmp_path.glob("*/*.arrow")))
    assert num_cached >= 15
    counting = CountingTagger(tagger.name)
    texts = [f"In Porto, on 3 May 1921, Ada Quill counted {i} trees." for i in range(num_cached + 5)]
    assert list(SpanCache(tmp_path, counting).tag(texts)) == list(tagger.tag(texts))
    assert counting.seen == texts[num_cached:]


def test_only_old_temporary_files_are_removed(tmp_path: Path, tagger: SpanTagger) -> None:
    folder = tmp_path / tagger.name
    folder.mkdir()
    for name in ("old.tmp", "recent.tmp"):
        (folder / name).write_bytes(b"half")
    os.utime(folder / "old.tmp", (0, 0))
    SpanCache(tmp_path, tagger)
    assert [path.name for path in folder.iterdir()] == ["recent.tmp"]


CONLL = "Ada\tB-PER\nQuill\tI-PER\nleft\tO\nPorto\tB-LOC\n.\tO\n\nOn\tO\n3\tB-DATE\nMay\tI-DATE\n"


def test_read_conll_plain_and_gzip_with_and_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(CONLL, encoding="utf-8")
    sentences = list(read_conll(tmp_path / "a.conll"))
    assert [sentence.text for sentence in sentences] == ["Ada Quill left Porto .", "On 3 May"]
    assert sentences[0].spans == ((0, 9, "PER"), (15, 20, "LOC"))
    assert sentences[1].spans == ((3, 8, "DATE"),)
    with gzip.open(tmp_path / "b.gz", "wt", encoding="utf-8") as file:
        file.write("".join(f"{i}\t{line}\n" if line else "\n" for i, line in enumerate(CONLL.split("\n"))))
    assert list(read_conll(tmp_path / "b.gz")) == sentences


@pytest.mark.parametrize("line", ["Porto", "Porto\tLOC", "\tO", "a\tb\tc\tO", "Porto\tB-"])
def test_malformed_line_is_reported(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.conll"
    path.write_text(f"Ada\tO\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.conll, line 2"):
        list(read_conll(path))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.gz").write_text(CONLL, encoding="utf-8")
    (tmp_path / "latin.conll").write_bytes("Łódź\tO\n".encode("utf-16"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(CONLL.encode() * 9)[:-12])
    (tmp_path / "empty.conll").write_text("\n")
    for name in ("plain.gz", "latin.conll", "cut.gz", "missing.conll", "empty.conll"):
        with pytest.raises(UserError, match=name):
            bench_spans(tmp_path / name, None, SpanConfig())


def test_bench_counts_exact_spans_and_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.conll").write_text(
        "Ada\tB-PER\nQuill\tI-PER\nleft\tO\nPorto\tO\nin\tO\n1905\tO\n\nthe\tO\nsea\tB-LOC\n", encoding="utf-8"
    )
    (tmp_path / "dates.conll").write_text("In\tO\n1905\tB-DATE\nAda\tO\n", encoding="utf-8")
    arguments = [
        "bench",
        "spans",
        "--entities",
        str(tmp_path / "names.conll"),
        "--dates",
        str(tmp_path / "dates.conll"),
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(arguments) == 0
    names, dates = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (names["precision"], names["recall"], names["f1"], names["sentences"]) == (0.5, 0.5, 0.5, 2)
    assert (dates["precision"], dates["recall"], dates["f1"]) == (1, 1, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:2] == ["what", "pipeline"]
    assert main(["bench", "spans"]) == 2 and "--entities" in capsys.readouterr().err


@pytest.mark.real_data
def test_floors_of_the_builtin_rules_on_annotated_text(shared_data: Path) -> None:
    entities, dates = bench_spans(
        shared_data / "ner" / "wikineural-en-val.conllu.gz",
        shared_data / "ner" / "gum-dates" / "test.conll",
        SpanConfig(),
    )
    assert entities["f1"] >= 0.85
    assert dates["f1"] >= 0.80
