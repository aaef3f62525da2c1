"""Writes the files of the gazetteer; the output is deterministic."""

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from realm.gazetteer.entities import QUESTION_SPLITS, load_entities
from realm.gazetteer.render import Record, one_statement, render_article, render_passages, render_statement, with_answer

GAZETTEER_VERSION = 2


@dataclass(frozen=True)
class GazetteerSummary:
    """Counts of the content that `write_gazetteer` wrote.

    `facts` counts the facts with statements or held-out statements, without those of orphans.
    """

    entities: int
    facts: int
    held_out_facts: int
    unsupported_facts: int
    passages: int
    statements: int
    heldout_statements: int
    evaluation_statements: int
    unsupported_statements: int
    questions: dict[str, int]


def json_lines(records: Iterable[Record]) -> str:
    """Format records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def render_files() -> tuple[dict[str, str], GazetteerSummary]:
    """Render the text of every file, by relative path, and the counts."""
    entities = load_entities()
    passages: list[Record] = []
    statements: list[Record] = []
    heldout: list[Record] = []
    evaluation: list[Record] = []
    unsupported: list[Record] = []
    articles: dict[str, list[Record]] = {split: [] for split in QUESTION_SPLITS}
    num_questions = dict.fromkeys(QUESTION_SPLITS, 0)
    num_facts = num_held_out = 0
    for entity in entities:
        if not entity.has_passages:
            for fact in entity.facts:
                every = [render_statement(entity, fact, number) for number in range(len(fact.relation.statements))]
                if entity.split == "orphan":
                    unsupported += [with_answer(record, fact, start, None) for record, start in every]
                else:
                    statements += [record for record, _ in every]
            continue
        entity_passages = render_passages(entity)
        for passage in entity_passages:
            passages.append({"id": passage.id, "title": entity.name, "text": passage.text})
            for fact in passage.facts:
                num_facts += 1
                num_held_out += fact.held_out
                for number in range(len(fact.relation.statements)):
                    record, start = render_statement(entity, fact, number)
                    if fact.held_out:
                        heldout.append(with_answer(record, fact, start, passage.id))
                    else:
                        statements.append(record)
                if entity.split in ("validation", "test"):
                    evaluation.append({**one_statement(entity, fact, passage.id), "held_out": fact.held_out})
                if fact.relation.asked:
                    num_questions[entity.split] += len(fact.relation.questions)
        article = render_article(entity_passages)
        if article is not None:
            articles[entity.split].append(article)
    texts = {
        "passages.jsonl": json_lines(passages),
        "statements.jsonl": json_lines(statements),
        "heldout_statements.jsonl": json_lines(heldout),
        "evaluation_statements.jsonl": json_lines(evaluation),
        "unsupported_statements.jsonl": json_lines(unsupported),
    }
    for split in QUESTION_SPLITS:
        content = {"version": f"gazetteer-{GAZETTEER_VERSION}", "data": articles[split]}
        texts[f"questions/{split}.json"] = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    summary = GazetteerSummary(
        entities=sum(entity.has_passages for entity in entities),
        facts=num_facts,
        held_out_facts=num_held_out,
        unsupported_facts=len({record["fact"] for record in unsupported}),
        passages=len(passages),
        statements=len(statements),
        heldout_statements=len(heldout),
        evaluation_statements=len(evaluation),
        unsupported_statements=len(unsupported),
        questions=num_questions,
    )
    return texts, summary


def write_gazetteer(out: Path) -> GazetteerSummary:
    """Write passages, statements and questions to the folder `out` and return their counts.

    A new folder is created atomically by a rename; in an existing folder each file is replaced
    atomically. Repeated calls write the same bytes.
    """
    texts, summary = render_files()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        whole = Path(scratch, "gazetteer")
        for name, text in texts.items():
            path = whole / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        if not out.exists():
            whole.rename(out)
        else:
            for name in texts:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(whole / name, out / name)
    return summary
