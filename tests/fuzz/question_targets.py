"""Fuzz targets: questions in every format, regular expressions, and annotated statements."""

import json
from pathlib import Path
from random import Random

from finetune.metrics import exact_match, f1, has_answer
from finetune.patterns import AnswerPattern
from finetune.question_formats import read_questions
from realm.corpus.records import BadRecords
from realm.run.data_config import QuestionSource
from tests.fuzz.document_targets import dataset_case, write_dataset
from tests.fuzz.mutate import mutated_bytes, mutated_json
from tests.fuzz.targets import Case, Target, register

QUESTION = {"id": 1, "question": "who led it?", "answer": ["Ada", "Ada Moor"], "passage": "town-1", "context": "It."}
SQUAD_QUESTION = {
    "id": "a",
    "question": "Which?",
    "answers": [{"text": "Alda", "answer_start": 0}],
    "is_impossible": False,
}
PARAGRAPH = {"context": "Alda is old.", "passage": "p", "qas": [SQUAD_QUESTION, SQUAD_QUESTION]}
TREES = {
    "squad": {"data": [{"title": "Old_Towns", "paragraphs": [PARAGRAPH, PARAGRAPH]}]},
    "webq": [{"qId": "w1", "qText": "where is Alda?", "answers": ["Ister"]}],
    "timeqa": [
        {
            "index": "/wiki/Alda#P1",
            "link": "/wiki/Alda",
            "paras": ["Alda", "Ada Moor led it."],
            "questions": [["Who led Alda?", [{"para": 1, "from": 0, "end": 8, "answer": "Ada Moor"}]]],
        }
    ],
}
TABLES = {
    "qas": b'who led\t[\'Ada "the" Moor\', "O\'Neil"]\n"he said ""no"""\t"[""it\'s"", ""two""]"\n',
    "trec": b"17\tfactoid\tWhen was it?\tSept?(ember)?|Feb(ruary)?\n18\tfactoid\tWho?\t(Ada|Ben)\\s?Moor\n",
}
_PARTS = (
    "a",
    "B",
    "1",
    " ",
    ".",
    "\\s",
    "\\w",
    "\\d",
    "\\b",
    "(",
    ")",
    "[",
    "]",
    "[^",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "{1,3}",
    "{99999999999}",
    "^",
    "$",
    "(?i)",
    "(?u)",
    "(?a)",
    "(?:",
    "(?=",
    "(?<=",
    "(?P<n>",
    "(?P=n)",
    "\\1",
    "(a|aa)+",
    "(\\w+\\s?)+",
    "{1000}",
    "é",
    "\\",
    "(?R)",
    "{e<=1}",
    "[[:alpha:]]",
    "\\p{L}",
    "++",
    "(?>",
    "\\Z",
    "-",
    "x*",
    "(.*)*",
)
TEXTS = ("", "Ada Moor led it in September 1918.", "a" * 60, "word " * 30 + "!", "1" * 40)


def _read(case: Case, folder: Path) -> int:
    path = folder / case.settings["file"]
    path.write_bytes(case.content)
    return _read_source(QuestionSource(str(path), **case.settings.get("options", {})))


def _read_source(source: QuestionSource) -> int:
    report = BadRecords()
    for record in read_questions(source, report):
        for part in (record.id, record.text, *record.answers, record.document or ""):
            part.encode()
        if not record.is_pattern:
            exact_match("Ada", record.answers), f1("Ada", record.answers), has_answer("Ada Moor", record.answers)
    return report.total


def _jsonl(rng: Random) -> Case:
    lines = [mutated_json(rng, QUESTION) if rng.random() < 0.4 else json.dumps(QUESTION).encode() for _ in range(3)]
    fields = rng.choice(({}, {}, {"answers": "passage"}, {"question": "id"}, {"passage": "answer", "context": "id"}))
    options = {"fields": fields, "num_folds": 2, "use_folds": (0, 1)} if rng.random() < 0.3 else {"fields": fields}
    return Case(b"\n".join(lines), {"file": "a.jsonl", "options": options})


def _tree(rng: Random) -> Case:
    name = rng.choice(sorted(TREES))
    options = {"num_folds": 2, "use_folds": (0, 1)} if name != "webq" and rng.random() < 0.5 else {}
    options["format"] = rng.choice(("auto", name, "squad", "timeqa", "webq"))
    return Case(mutated_json(rng, TREES[name]), {"file": "a.json", "options": options})


def _table(rng: Random) -> Case:
    name = rng.choice(sorted(TABLES))
    return Case(
        mutated_bytes(rng, TABLES[name]), {"file": f"a.{name}.tsv", "options": {"format": rng.choice(("auto", name))}}
    )


def _literals(rng: Random) -> Case:
    tokens = (
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        "'a'",
        '"b"',
        ",",
        ":",
        "1",
        "-",
        "~",
        "not ",
        "f'{x}'",
        "b'x'",
        "...",
        "None",
        "\\",
        "lambda:",
        "9" * 5_000,
    )
    answers = "".join(rng.choice(tokens) * rng.choice((1, 1, 1, 2, 300)) for _ in range(rng.randint(1, 12)))
    return Case(f"who?\t{answers}\n".encode(), {"file": "a.tsv", "options": {"format": "qas"}})


def _pattern(rng: Random) -> Case:
    parts = [rng.choice(_PARTS) * rng.choice((1, 1, 1, 1, 2, 3, 40, 400)) for _ in range(rng.randint(1, 10))]
    return Case("".join(parts).encode())


def _match(case: Case, folder: Path) -> int:
    try:
        pattern = AnswerPattern(case.content.decode("utf-8", "replace"))
        pattern.check()
    except ValueError:
        return 1
    for text in TEXTS:
        pattern.is_answer(text), pattern.is_in(text), list(pattern.spans(text))
    return 0


def _read_dataset(case: Case, folder: Path) -> int:
    return _read_source(QuestionSource(write_dataset(case, folder), format="datasets", **case.settings["options"]))


register(Target("questions-jsonl", _jsonl, _read))
register(Target("questions-json", _tree, _read))
register(Target("questions-table", _table, _read))
register(Target("questions-literals", _literals, _read))
register(Target("questions-pattern", _pattern, _match, share=0.3))
register(Target("questions-dataset", dataset_case, _read_dataset))
