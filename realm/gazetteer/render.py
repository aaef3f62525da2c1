"""Renders entities of the gazetteer as passages, statements and questions."""

from dataclasses import dataclass

from realm.gazetteer.entities import Entity, Fact, stable_number

Record = dict[str, object]


@dataclass(frozen=True)
class Passage:
    """A passage about one entity.

    `object_starts` maps the id of each fact in it to the character offset of the object in `text`.
    """

    id: str
    entity: Entity
    text: str
    object_starts: dict[str, int]
    facts: tuple[Fact, ...]


def fill_template(template: str, subject: str, object_: str) -> tuple[str, int]:
    """Insert subject and object into a template.

    Returns the sentence, which begins with a capital, and the character offset of the object.
    """
    before, _, after = template.partition("{object}")
    before, after = before.replace("{subject}", subject), after.replace("{subject}", subject)
    text = before + object_ + after
    return text[0].upper() + text[1:], len(before)


def context_sentence(entity: Entity, number: int) -> str:
    """Introduction `number` of an entity: the first names the entity, the others refer to it.

    The first template varies between entities. `contexts[0]` states what the entity is; a reference
    already says so, so it is used only as the first.
    """
    contexts = entity.table.contexts
    first = stable_number("context", entity.id) % len(contexts)
    others = [index for index in range(1, len(contexts)) if index != first] + [first] * (first != 0)
    if number == 0:
        template, subject = contexts[first], entity.in_text()
    else:
        template, subject = contexts[others[(number - 1) % len(others)]], entity.table.reference
    text = template.format(**{**entity.columns, "subject": subject})
    return text[0].upper() + text[1:]


def render_passages(entity: Entity) -> list[Passage]:
    """Render the passages of an entity; an orphan has none.

    Each consists of an introduction and a disjoint part of the facts. As in passages that are cut
    from an article, only the first sentence of the first passage names the entity; all others say
    "the country" or "the writer".
    """
    if not entity.has_passages:
        return []
    passages: list[Passage] = []
    num_contexts = 0
    for group in entity.table.passages:
        facts = tuple(fact for fact in entity.facts if fact.relation.name in group)
        if not facts:
            continue
        num_introductions = 2 if len(facts) == 1 else 1
        text = " ".join(context_sentence(entity, num_contexts + number) for number in range(num_introductions))
        num_contexts += num_introductions
        object_starts: dict[str, int] = {}
        for fact in facts:
            templates = fact.relation.passage
            template = templates[stable_number("passage", fact.id) % len(templates)]
            addition, start = fill_template(template, entity.table.reference, fact.objects[0])
            object_starts[fact.id] = len(text) + 1 + start
            text = f"{text} {addition}"
        passages.append(Passage(f"{entity.id}/{len(passages) + 1}", entity, text, object_starts, facts))
    return passages


def render_statement(entity: Entity, fact: Fact, number: int) -> tuple[Record, int]:
    """Render statement `number` of a fact, without the answer.

    Returns the statement and the character offset of the object.
    """
    text, start = fill_template(fact.relation.statements[number], entity.in_text(), fact.objects[0])
    record: Record = {
        "id": f"{fact.id}/s{number + 1}",
        "title": "",
        "text": text,
        "fact": fact.id,
        "subject": entity.name,
        "split": entity.split,
    }
    return record, start


def with_answer(record: Record, fact: Fact, start: int, passage_id: str | None) -> Record:
    """Add the object as answer and, unless the entity is an orphan, the passage with the fact."""
    evidence: Record = {} if passage_id is None else {"passage": passage_id}
    return {**record, "answer": {"text": fact.objects[0], "start": start}, **evidence}


def one_statement(entity: Entity, fact: Fact, passage_id: str | None) -> Record:
    """Render one statement of a fact with its answer; the template depends on the fact."""
    number = stable_number("statement", fact.id) % len(fact.relation.statements)
    record, start = render_statement(entity, fact, number)
    return with_answer(record, fact, start, passage_id)


def render_article(passages: list[Passage]) -> Record | None:
    """SQuAD article of one entity: its passages with their questions; None without questions."""
    paragraphs: list[Record] = []
    for passage in passages:
        qas: list[Record] = []
        for fact in passage.facts:
            if not fact.relation.asked:
                continue
            answers = [{"text": form, "answer_start": passage.object_starts[fact.id]} for form in fact.objects]
            for number, template in enumerate(fact.relation.questions):
                question = template.replace("{subject}", passage.entity.in_question())
                qas.append({"id": f"{fact.id}/q{number + 1}", "question": question, "answers": answers})
        if qas:
            paragraphs.append({"context": passage.text, "passage": passage.id, "qas": qas})
    return {"title": passages[0].entity.name, "paragraphs": paragraphs} if paragraphs else None
