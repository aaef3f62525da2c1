"""Question formats: auto-detection, records, skipped questions, and error messages."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.ask import ask
from finetune.question_formats import format_of, read_questions
from finetune.question_record import UNANSWERABLE, QuestionRecord
from finetune.questions import load_questions
from realm.corpus.records import BadRecords
from realm.errors import UserError
from realm.run.data_config import QuestionSource
from realm.run.folder import Run
from tests.tiny import FOUNDERS, TOWNS, prepared_run

SQUAD = {
    "data": [
        {
            "title": "Old_Towns",
            "paragraphs": [
                {
                    "context": "Alda is old. Brenno is older.",
                    "qas": [
                        {"id": "a", "question": "Which is old?", "answers": [{"text": "Alda", "answer_start": 0}] * 2},
                        {
                            "id": "b",
                            "question": "Which is new?",
                            "answers": [],
                            "is_impossible": True,
                            "plausible_answers": [{"text": "Alda"}],
                        },
                    ],
                }
            ],
        },
        {
            "title": "Rivers",
            "paragraphs": [{"context": "c", "qas": [{"id": "c", "question": "Why?", "answers": [{"text": "so"}]}]}],
        },
    ]
}
TIMEQA = [
    {
        "index": "/wiki/Alda#P1",
        "link": "/wiki/Alda",
        "paras": ["Alda", "Ada Moor led Alda from 1100 ."],
        "questions": [
            ["Who led Alda?", [{"para": 1, "from": 0, "end": 8, "answer": "Ada Moor"}]],
            ["Who led it then?", [{"para": 0, "from": 0, "end": 0, "answer": ""}]],
        ],
    }
]
FILES: dict[str, tuple[str, str, list[tuple[str, tuple[str, ...]]]]] = {
    "squad.json": (json.dumps(SQUAD), "squad", [("Which is old?", ("Alda",)), ("Why?", ("so",))]),
    "open.jsonl": (
        '{"question": "who led", "answer": ["Ada", "Ada Moor"]}\n\n{"question": "and then", "answers": "Ben"}\n',
        "jsonl",
        [("who led", ("Ada", "Ada Moor")), ("and then", ("Ben",))],
    ),
    "dev.qas.tsv": (
        'who led\t[\'Ada "the" Moor\', "O\'Neil"]\n"he said ""no"""\t"[""it\'s"", ""two""]"\n',
        "qas",
        [("who led", ('Ada "the" Moor', "O'Neil")), ('he said "no"', ("it's", "two"))],
    ),
    "webq.json": (
        json.dumps([{"qId": "w1", "qText": "where is Alda?", "answers": ["Ister"]}]),
        "webq",
        [("where is Alda?", ("Ister",))],
    ),
    "trec.tsv": (
        "17\tfactoid\tWhen was it?\tSept?(ember)?|Feb(ruary)?\n",
        "trec",
        [("When was it?", ("Sept?(ember)?|Feb(ruary)?",))],
    ),
    "timeqa.json": (json.dumps(TIMEQA), "timeqa", [("Who led Alda?", ("Ada Moor",))]),
}
"""Content of each file, its format, and the expected questions with their answers."""


def read(path: Path, **options: object) -> tuple[list[QuestionRecord], BadRecords]:
    report = BadRecords()
    return list(read_questions(QuestionSource(str(path), **options), report)), report  # type: ignore[arg-type]


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_is_auto_detected_and_read(tmp_path: Path, name: str, compressed: bool) -> None:
    content, expected_format, expected = FILES[name]
    path = tmp_path / (name + ".gz" if compressed else name)
    path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    assert format_of(QuestionSource(str(path))) == expected_format
    records, report = read(path)
    assert [(record.text, record.answers) for record in records] == expected
    assert set(report.counts) <= {UNANSWERABLE}
    assert all(record.is_pattern == (expected_format == "trec") for record in records)


def test_unanswerable_questions_are_counted_separately(tmp_path: Path) -> None:
    for name in ("squad.json", "timeqa.json"):
        (tmp_path / name).write_text(FILES[name][0])
        assert read(tmp_path / name)[1].counts == {UNANSWERABLE: 1}


def test_articles_are_selected_by_title_with_underscores_or_spaces(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(FILES["squad.json"][0])
    assert [record.id for record in read(path, articles=("Old Towns",))[0]] == ["a"]
    assert [record.id for record in read(path, exclude_articles=("Old_Towns",))[0]] == ["c"]
    with pytest.raises(UserError, match="has no article 'Lakes'"):
        read(path, articles=("Lakes",))


def test_folds_split_questions_by_document(tmp_path: Path) -> None:
    articles = [
        {
            "title": f"Town {a}",
            "paragraphs": [{"context": f"c{a}{p}", "qas": [squad_entry(f"{a}-{p}")]} for p in range(3)],
        }
        for a in range(40)
    ]
    path = tmp_path / "many.json"
    path.write_text(json.dumps({"data": articles}))
    parts = [{record.id for record in read(path, num_folds=4, use_folds=(fold,))[0]} for fold in range(4)]
    assert all(parts) and sum(map(len, parts)) == 120 == len(set().union(*parts))
    assert all(len({id.split("-")[0] for id in part}) * 3 == len(part) for part in parts), (
        "all questions of an article are in the same fold"
    )
    assert {record.id for record in read(path, num_folds=4, use_folds=(1, 3))[0]} == parts[1] | parts[3]
    (tmp_path / "open.jsonl").write_text('{"question": "who?", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"open\.jsonl:1: `use_folds` splits questions by document"):
        read(tmp_path / "open.jsonl", num_folds=2, use_folds=(0,))


def squad_entry(id: str) -> dict:
    return {"id": id, "question": "Who led it?", "answers": [{"text": "Ada", "answer_start": 0}]}


def test_timeqa_answer_offsets_are_relative_to_the_whole_article(tmp_path: Path) -> None:
    path = tmp_path / "timeqa.json"
    path.write_text(FILES["timeqa.json"][0])
    (record,), _ = read(path)
    whole = "\n\n".join(TIMEQA[0]["paras"])  # type: ignore[arg-type]
    assert record.passage == "/wiki/Alda"
    assert [whole[start:].startswith("Ada Moor") for start in record.starts] == [True]


BROKEN = {
    "open.jsonl": [
        ("{", "invalid JSON"),
        ('{"q": 1, "answer": "x"}', 'missing field "question"'),
        ('{"question": "a", "answer": 3}', "answers are not a list"),
        ('{"question": " ", "answer": ["x"]}', "empty question"),
        ('{"question": null, "answer": ["x"]}', "question is not a string but null"),
    ],
    "dev.qas.tsv": [
        ("a\tb\tc", "expected 2 columns, got 3"),
        ("who\t[1, 2", "answers are not a list"),
        ("who\t[1]", "answers are not a list of strings"),
        ("\"who\t['a']", "invalid quoting"),
    ],
    "trec.tsv": [
        ("1\tfactoid\tWhen?\t(", "invalid regular expression"),
        ("1\tWhen?\tx", "expected 4 columns"),
        ("1\tf\tWhen?\tx*", "matches the empty string"),
    ],
}
"""Invalid lines of each file, with the expected reasons."""


@pytest.mark.parametrize(
    ("name", "line", "reason"), [(name, *case) for name, cases in BROKEN.items() for case in cases]
)
def test_invalid_lines_are_reported_with_file_and_line(
    tmp_path: Path, run: Run, name: str, line: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_text(FILES[name][0] + line + "\n")
    kind = FILES[name][1]
    number = len((FILES[name][0] + line).splitlines())
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        load_questions(QuestionSource(str(path), kind), run.passages, run.tokenizer, 32)
    assert f"{path}:{number}: " in str(caught.value) and "skip_bad" in str(caught.value)
    kept = load_questions(QuestionSource(str(path), kind, skip_bad=True), run.passages, run.tokenizer, 32)
    assert len(kept) == len(FILES[name][2])


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip), min_size=1, max_size=4
    ),
    st.data(),
)
def test_any_answers_can_be_read_from_dpr_tables(answers: list[str], data: st.DataObject) -> None:
    import csv
    import io
    import tempfile

    question = data.draw(
        st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1).filter(str.strip)
    )
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t", lineterminator="\n").writerow([question, repr(answers)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.qas.tsv"
        path.write_text(buffer.getvalue(), encoding="utf-8")
        records, report = read(path, format="qas")
    assert not report.total
    assert [(record.text, record.answers) for record in records] == [(question, tuple(dict.fromkeys(answers)))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("questions"), corpus={"block_tokens": 24})


def test_a_question_gets_the_block_of_its_paragraph_that_contains_the_answer(run: Run) -> None:
    source = run.questions("train")
    assert source is not None
    questions = load_questions(source, run.passages, run.tokenizer, 32)
    assert len(run.passages) > len(TOWNS), "paragraphs are split into several blocks here"
    for question, founder in zip(questions, FOUNDERS, strict=True):
        assert question.passage is not None and founder in run.passages.text(question.passage)
        assert question.document == run.passages.document(question.passage)


def test_an_unknown_passage_is_refused(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text('{"question": "who", "answer": ["x"], "passage": "town-99"}\n')
    with pytest.raises(UserError, match=r"open.jsonl:1: document 'town-99' is not in the corpus"):
        load_questions(QuestionSource(str(path)), run.passages, run.tokenizer, 32)


def test_saved_datasets_are_read(tmp_path: Path, run: Run) -> None:
    import datasets

    rows = [{"id": "1", "question": "who", "context": "none", "answers": {"text": ["Ada"], "answer_start": [0]}}]
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    source = QuestionSource(str(tmp_path / "saved"), split="validation")
    (question,) = load_questions(source, run.passages, run.tokenizer, 32)
    assert question.answers == ("Ada",) and question.passage is None
    assert len(load_questions(QuestionSource(str(tmp_path / "saved")), run.passages, run.tokenizer, 32)) == 1, (
        "the only split is the default"
    )
    with pytest.raises(UserError, match="no split 'train'; choose one of validation"):
        load_questions(replace(source, split="train"), run.passages, run.tokenizer, 32)
    two = {name: datasets.Dataset.from_list(rows) for name in ("train", "test")}
    datasets.DatasetDict(two).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"has several splits \(train, test\); choose one with `split`"):
        load_questions(QuestionSource(str(tmp_path / "two")), run.passages, run.tokenizer, 32)


def test_dpr_tables_of_patterns_need_an_explicit_format(tmp_path: Path) -> None:
    path = tmp_path / "curatedtrec-test.qas.csv"
    path.write_text("where?\t['New\\\\s?York', 'Albany']\nwhen?\t[\"18[0-9]+\"]\nwho?\t[Aa]da\n")
    with pytest.raises(UserError, match="set `format` to trec for regular expressions or to qas for answers"):
        format_of(QuestionSource(str(path)))
    records, report = read(path, format="trec")
    assert [record.answers[0] for record in records] == [
        r"(?:New\s?York)|(?:Albany)",
        "18[0-9]+",
        "[Aa]da",
    ] and not report.total


def test_unanswerable_questions_do_not_hide_an_invalid_line(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text('{"question": "a", "answer": []}\n' * 30 + "{broken\n")
    with pytest.raises(UserError, match=r"1 record cannot be used:\n.*open.jsonl:31: invalid JSON"):
        load_questions(QuestionSource(str(path)), run.passages, run.tokenizer, 32)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"fields": {"qestion": "q"}}, "maps 'qestion'; the fields of a question are id, question, answers"),
        ({"limit": 0}, "`limit` of .* must be at least 1"),
        ({"num_folds": 5}, "`use_folds` is empty"),
    ],
)
def test_options_without_effect_are_refused(source: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        QuestionSource("a.jsonl", **source)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("open.jsonl", {"articles": ("x",)}),
        ("open.jsonl", {"split": "x"}),
        ("open.jsonl", {"name": "x"}),
        ("squad.json", {"fields": {"question": "q"}}),
    ],
)
def test_options_of_another_format_are_refused(tmp_path: Path, name: str, option: dict) -> None:
    (tmp_path / name).write_text(FILES[name][0])
    with pytest.raises(UserError, match=r"is only for the format .*; remove it"):
        read(tmp_path / name, **option)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"question": "a", "answer": [1%s]}' % ("0" * 5000), "invalid JSON"),
        ("a.jsonl", '{"question": "a\\ud800", "answer": ["x"]}', "unpaired surrogate"),
        (
            "a.jsonl",
            '{"question": "a", "answer": [1969]}',
            "answers are not a list of strings: the list contains a number",
        ),
        ("a.qas", "a\t{[]: 1}", "answers are not a list"),
        ("a.qas", "a\t" + "[" * 5000, "answers are not a list"),
        ("a.json", '{"data": [{"title": null, "paragraphs": [{"context": "c"}]}]}', 'missing field "qas"'),
    ],
)
def test_unusual_content_raises_user_errors(tmp_path: Path, run: Run, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason):
        load_questions(QuestionSource(str(tmp_path / name)), run.passages, run.tokenizer, 32)


PUBLISHED = {
    "qa/nq-dev.qas.tsv.gz": ("qas", 8757),
    "qa/trivia-dev.qas.tsv.gz": ("qas", 8837),
    "qa/webq-train.json": ("webq", 2834),
    "qa/curatedtrec-train.tsv": ("trec", 430),
    "squad/dev-v1.1.json.gz": ("squad", 10570),
    "long/timeqa-human-train.json.gz": ("timeqa", 1171),
}
"""Published files: format and number of questions, including those without an answer."""


@pytest.mark.real_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_completely(shared_data: Path, name: str) -> None:
    expected_format, count = PUBLISHED[name]
    records, report = read(shared_data / name)
    assert format_of(QuestionSource(str(shared_data / name))) == expected_format
    assert len(records) + report.total == count and set(report.counts) <= {UNANSWERABLE}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": 5}, "context is not a string but a number"),
        ({"context": "a\ud800"}, "unpaired surrogate"),
        ({"qas": 5}, '"qas" is not a list but a number'),
        ({"qas": [{"id": "a", "question": "b", "answers": {}}]}, '"answers" is not a list but an object'),
    ],
)
def test_values_of_other_types_are_reported(tmp_path: Path, change: dict, reason: str) -> None:
    paragraph = {"context": "c", "qas": [squad_entry("x")]}
    tree = {"data": [{"title": "T", "paragraphs": [paragraph | change, paragraph]}]}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    records, report = read(tmp_path / "a.json", num_folds=1, use_folds=(0,))
    assert [record.id for record in records] == ["x"] and reason in report.first[0]


def test_timeqa_questions_are_checked_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    questions = [["Who?", [{"para": 7, "from": 0, "end": 1, "answer": "A"}]], TIMEQA[0]["questions"][0]]  # type: ignore[index]
    path.write_text(json.dumps([TIMEQA[0] | {"link": ["x"]}, TIMEQA[0] | {"questions": questions}]))
    records, report = read(path, num_folds=1, use_folds=(0,))
    assert [record.text for record in records] == ["Who led Alda?"]
    assert report.counts == {'"link" is not a string': 1, "the answer is in no paragraph": 1}


def test_questions_without_wordpieces_are_bad_records_and_long_ones_are_counted(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "open.jsonl"
    rows = [{"question": text, "answer": "x"} for text in ("who", "\u200b", "who " * 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"open.jsonl:2: question without wordpieces"):
        load_questions(QuestionSource(str(path)), run.passages, run.tokenizer, 32)
    assert len(load_questions(QuestionSource(str(path), skip_bad=True), run.passages, run.tokenizer, 32)) == 2
    assert "1 truncated to retriever.max_query_tokens (32)" in capsys.readouterr().out


def test_ask_refuses_a_question_without_wordpieces_and_warns_about_a_long_one(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="the tokenizer drops all characters of the question"):
        ask(run, "\u200b", 5)
    with pytest.raises(UserError, match="has not finished stage finetune"):
        ask(run, "who " * 40, 5)
    assert "it has 120 wordpieces, and retriever.max_query_tokens is 32" in capsys.readouterr().out
