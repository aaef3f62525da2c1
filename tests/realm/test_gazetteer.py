"""The built-in corpus: minimum sizes, offsets, splits, and held-out facts."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from realm.gazetteer import GazetteerSummary, write_gazetteer
from realm.gazetteer.entities import load_entities, load_templates, read_rows

Record = dict[str, Any]
SPLITS = ("train", "validation", "test")


class Gazetteer(NamedTuple):
    folder: Path
    summary: GazetteerSummary
    passages: dict[str, Record]
    statements: dict[str, list[Record]]
    articles: dict[str, list[Record]]

    def questions(self, split: str) -> list[tuple[Record, Record]]:
        """Pairs of a paragraph and one of its questions."""
        return [
            (paragraph, qa)
            for article in self.articles[split]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fact_of(question_id: str) -> str:
    return question_id.rpartition("/")[0]


def occurrences(name: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text, flags=re.IGNORECASE))


@pytest.fixture(scope="module")
def gazetteer(tmp_path_factory: pytest.TempPathFactory) -> Gazetteer:
    folder = tmp_path_factory.mktemp("gazetteer") / "out"
    summary = write_gazetteer(folder)
    kinds = ("statements", "heldout_statements", "evaluation_statements", "unsupported_statements")
    return Gazetteer(
        folder,
        summary,
        {passage["id"]: passage for passage in read_lines(folder / "passages.jsonl")},
        {kind: read_lines(folder / f"{kind}.jsonl") for kind in kinds},
        {
            split: json.loads((folder / f"questions/{split}.json").read_text(encoding="utf-8"))["data"]
            for split in SPLITS
        },
    )


def test_minimum_sizes(gazetteer: Gazetteer) -> None:
    summary = gazetteer.summary
    assert summary.entities >= 450
    assert summary.facts >= 2000
    assert summary.passages >= 1000
    assert summary.unsupported_statements >= 150
    assert summary.statements >= 2.9 * (summary.facts - summary.held_out_facts)
    assert abs(summary.held_out_facts - summary.facts / 10) <= 1


def test_summary_counts_what_was_written(gazetteer: Gazetteer) -> None:
    summary = gazetteer.summary
    assert summary.passages == len(gazetteer.passages)
    for kind, records in gazetteer.statements.items():
        assert getattr(summary, kind) == len(records), kind
    assert summary.questions == {split: len(gazetteer.questions(split)) for split in SPLITS}


def test_writing_again_gives_the_same_bytes(gazetteer: Gazetteer, tmp_path: Path) -> None:
    fresh, existing = tmp_path / "fresh", tmp_path / "existing"
    existing.mkdir()
    (existing / "passages.jsonl").write_text("old\n")
    write_gazetteer(fresh)
    write_gazetteer(existing)
    names = {path.relative_to(gazetteer.folder) for path in gazetteer.folder.rglob("*") if path.is_file()}
    for folder in (fresh, existing):
        assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == names
        for name in names:
            assert (folder / name).read_bytes() == (gazetteer.folder / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"fresh", "existing"}, "the temporary folder is removed"


def test_tables_are_well_formed() -> None:
    tables, relations = load_templates()
    used = {name for table in tables for group in table.passages for name in group}
    assert used == set(relations), "every relation appears in the passages of a table"
    for table in tables:
        for row in read_rows(table):
            assert all(cell is not None and cell == cell.strip() for cell in row.values()), row
            assert None not in row, row
    for relation in relations.values():
        assert len(relation.passage) >= 2
        assert len(relation.statements) == 3
        assert len(relation.questions) == (3 if relation.asked else 0)
        assert all(template.count("{object}") == 1 for template in relation.passage + relation.statements)
        assert all("{subject}" in template for template in relation.statements + relation.questions)


def test_objects_look_like_names_and_do_not_appear_in_the_entity() -> None:
    for entity in load_entities():
        for fact in entity.facts:
            assert fact.objects[0][0].isupper() or fact.objects[0][0].isdigit(), fact.id
            assert occurrences(fact.objects[0], entity.name) == 0, fact.id
            assert len(fact.objects[0].split()) <= 4, fact.id


def test_entity_names_and_ids_are_unique() -> None:
    entities = load_entities()
    assert len({entity.name for entity in entities}) == len({entity.id for entity in entities}) == len(entities)


def test_ids_are_unique(gazetteer: Gazetteer) -> None:
    assert len(gazetteer.passages) == len(read_lines(gazetteer.folder / "passages.jsonl"))
    for kind, records in gazetteer.statements.items():
        assert len({record["id"] for record in records}) == len(records), kind
    questions = [qa["id"] for split in SPLITS for _, qa in gazetteer.questions(split)]
    assert len(set(questions)) == len(questions)


def test_first_passages_name_their_subject_once_and_all_are_short(gazetteer: Gazetteer) -> None:
    for passage in gazetteer.passages.values():
        named = occurrences(passage["title"], passage["text"])
        assert named == (1 if passage["id"].endswith("/1") else 0), passage["id"]
        sentences = passage["text"].split(". ")
        assert len(set(sentences)) == len(sentences), passage["id"]
        assert 20 <= len(passage["text"].split()) <= 75, passage["id"]
        assert "{" not in passage["text"], passage["id"]
    assert set(Counter(passage["title"] for passage in gazetteer.passages.values()).values()) <= {2, 3}
    assert len({(passage["title"], passage["text"]) for passage in gazetteer.passages.values()}) == len(
        gazetteer.passages
    )


def test_statements_name_their_subject(gazetteer: Gazetteer) -> None:
    for records in gazetteer.statements.values():
        for record in records:
            assert occurrences(record["subject"], record["text"]) == 1, record["id"]
            assert "{" not in record["text"], record["id"]


def test_offsets_of_statement_answers(gazetteer: Gazetteer) -> None:
    for kind in ("heldout_statements", "evaluation_statements", "unsupported_statements"):
        for record in gazetteer.statements[kind]:
            answer, start = record["answer"]["text"], record["answer"]["start"]
            assert record["text"][start : start + len(answer)] == answer, record["id"]
            if kind == "unsupported_statements":
                assert "passage" not in record
            else:
                passage = gazetteer.passages[record["passage"]]
                assert passage["title"] == record["subject"]
                assert occurrences(answer, passage["text"]) == 1, record["id"]


def test_offsets_of_question_answers(gazetteer: Gazetteer) -> None:
    for split in SPLITS:
        for paragraph, qa in gazetteer.questions(split):
            assert paragraph["context"] == gazetteer.passages[paragraph["passage"]]["text"]
            first = qa["answers"][0]
            start = first["answer_start"]
            assert paragraph["context"][start : start + len(first["text"])] == first["text"], qa["id"]
            assert occurrences(first["text"], paragraph["context"]) == 1, qa["id"]
            assert all(answer["answer_start"] == start for answer in qa["answers"])
            assert occurrences(gazetteer.passages[paragraph["passage"]]["title"], qa["question"]) == 1, qa["id"]


def test_questions_are_split_by_entity_within_each_table(gazetteer: Gazetteer) -> None:
    titles = {split: {article["title"] for article in gazetteer.articles[split]} for split in SPLITS}
    assert (
        not titles["train"] & titles["validation"]
        and not titles["train"] & titles["test"]
        and not titles["validation"] & titles["test"]
    )
    entities = [entity for entity in load_entities() if entity.has_passages]
    split_of = {entity.name: entity.split for entity in entities}
    assert all(split_of[title] == split for split in SPLITS for title in titles[split])
    for table in {entity.table.name for entity in entities}:
        counts = Counter(entity.split for entity in entities if entity.table.name == table)
        assert set(counts) == set(SPLITS), table
        assert abs(counts["train"] / counts.total() - 0.7) < 0.05, table
    counts = Counter(split_of.values())
    assert abs(counts["test"] / counts.total() - 0.2) < 0.02 and abs(counts["validation"] / counts.total() - 0.1) < 0.02


def test_held_out_facts_are_never_stated(gazetteer: Gazetteer) -> None:
    stated = {record["fact"] for record in gazetteer.statements["statements"] if record["split"] != "stated-orphan"}
    held_out = {record["fact"] for record in gazetteer.statements["heldout_statements"]}
    orphans = {record["fact"] for record in gazetteer.statements["unsupported_statements"]}
    assert len(held_out) == gazetteer.summary.held_out_facts
    assert not stated & held_out and not orphans & (stated | held_out)
    assert len(stated | held_out) == gazetteer.summary.facts
    assert len({fact.split("/")[0] for fact in held_out}) == len({fact.split("/")[0] for fact in stated | held_out})
    assert {record["split"] for record in gazetteer.statements["heldout_statements"]} == set(SPLITS)
    texts = {record["text"] for record in gazetteer.statements["statements"]}
    assert not texts & {record["text"] for record in gazetteer.statements["heldout_statements"]}


def test_evaluation_statements_cover_the_facts_of_validation_and_test(gazetteer: Gazetteer) -> None:
    evaluation = gazetteer.statements["evaluation_statements"]
    held_out = {record["fact"] for record in gazetteer.statements["heldout_statements"]}
    expected = {
        fact.id for entity in load_entities() if entity.split in ("validation", "test") for fact in entity.facts
    }
    assert {record["fact"] for record in evaluation} == expected and len(evaluation) == len(expected)
    assert all(record["held_out"] == (record["fact"] in held_out) for record in evaluation)


def test_orphans_appear_in_no_passage(gazetteer: Gazetteer) -> None:
    titles = {passage["title"] for passage in gazetteer.passages.values()}
    for record in gazetteer.statements["unsupported_statements"]:
        assert record["subject"] not in titles
        both = [
            passage["id"]
            for passage in gazetteer.passages.values()
            if occurrences(record["subject"], passage["text"])
            and occurrences(record["answer"]["text"], passage["text"])
        ]
        assert not both, (record["id"], both)


def test_some_pretraining_statements_have_no_passage(gazetteer: Gazetteer) -> None:
    titles = {passage["title"] for passage in gazetteer.passages.values()}
    statements = gazetteer.statements["statements"]
    unsupported = [record for record in statements if record["subject"] not in titles]
    assert {record["split"] for record in unsupported} == {"stated-orphan"}
    assert 0.04 < len(unsupported) / len(statements) < 0.10
    assert not {record["subject"] for record in unsupported} & {
        record["subject"] for record in gazetteer.statements["unsupported_statements"]
    }


def test_frequent_answers_are_rarely_correct(gazetteer: Gazetteer) -> None:
    answers: Counter[str] = Counter()
    train: dict[str, Counter[str]] = {}
    for split in SPLITS:
        for paragraph, qa in gazetteer.questions(split):
            answer = qa["answers"][0]["text"]
            answers[answer] += 1
            relation = paragraph["passage"].partition("/")[0] + "/" + fact_of(qa["id"]).rpartition("/")[2]
            if split == "train":
                train.setdefault(relation, Counter())[answer] += 1
    assert max(answers.values()) / answers.total() < 0.02
    right = total = 0
    for paragraph, qa in gazetteer.questions("test"):
        relation = paragraph["passage"].partition("/")[0] + "/" + fact_of(qa["id"]).rpartition("/")[2]
        right += qa["answers"][0]["text"] == train[relation].most_common(1)[0][0]
        total += 1
    assert right / total < 0.08, "the most frequent training answer to the same kind of question"
