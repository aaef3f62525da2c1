"""Passages, statements and questions written from the gazetteer's entities."""

from dataclasses import dataclass

from realm.gazetteer.entities import Entity, Fact, stable_number

Record = dict[str, object]


@dataclass(frozen=True)
class Passage:
    """A passage about one entity. `places` gives for each fact it states the character offset of
    the object in `text`."""

    id: str
    entity: Entity
    text: str
    places: dict[str, int]
    facts: tuple[Fact, ...]


def sentence(template: str, subject: str, object_: str) -> tuple[str, int]:
    """The template with both names in place and a capital at its head, and the character offset
    of the object."""
    before, _, after = template.partition("{object}")
    before, after = before.replace("{subject}", subject), after.replace("{subject}", subject)
    text = before + object_ + after
    return text[0].upper() + text[1:], len(before)


def context_sentence(entity: Entity, number: int) -> str:
    """The entity's `number`-th introduction: the first names the entity, the others refer to it.

    Which template is first differs between entities. `contexts[0]` says what the entity is, which a
    reference says already, so it serves only as the first.
    """
    contexts = entity.table.contexts
    first = stable_number("context", entity.id) % len(contexts)
    others = [place for place in range(1, len(contexts)) if place != first] + [first] * (first != 0)
    if number == 0:
        template, subject = contexts[first], entity.in_text()
    else:
        template, subject = contexts[others[(number - 1) % len(others)]], entity.table.reference
    text = template.format(**{**entity.columns, "subject": subject})
    return text[0].upper() + text[1:]


def render_passages(entity: Entity) -> list[Passage]:
    """The entity's passages, each an introduction and a disjoint part of its facts; none for an
    orphan.

    As in passages cut from an article, the first sentence of the first names the entity and all
    others say "the country", "the writer".
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
        places: dict[str, int] = {}
        for fact in facts:
            templates = fact.relation.passage
            template = templates[stable_number("passage", fact.id) % len(templates)]
            addition, start = sentence(template, entity.table.reference, fact.objects[0])
            places[fact.id] = len(text) + 1 + start
            text = f"{text} {addition}"
        passages.append(Passage(f"{entity.id}/{len(passages) + 1}", entity, text, places, facts))
    return passages


def render_statement(entity: Entity, fact: Fact, number: int) -> tuple[Record, int]:
    """The fact's `number`-th statement without its answer, and the character offset of the
    object in it."""
    text, start = sentence(fact.relation.statements[number], entity.in_text(), fact.objects[0])
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
    """The statement with the object as its answer and, unless it is an orphan, the passage that
    states the fact."""
    evidence: Record = {} if passage_id is None else {"passage": passage_id}
    return {**record, "answer": {"text": fact.objects[0], "start": start}, **evidence}


def one_statement(entity: Entity, fact: Fact, passage_id: str | None) -> Record:
    """One statement of the fact, with its answer, in a template that depends on the fact."""
    number = stable_number("statement", fact.id) % len(fact.relation.statements)
    record, start = render_statement(entity, fact, number)
    return with_answer(record, fact, start, passage_id)


def render_article(passages: list[Passage]) -> Record | None:
    """The SQuAD article of one entity: its passages with the questions on them; None where
    nothing is asked."""
    paragraphs: list[Record] = []
    for passage in passages:
        qas: list[Record] = []
        for fact in passage.facts:
            if not fact.relation.asked:
                continue
            answers = [{"text": form, "answer_start": passage.places[fact.id]} for form in fact.objects]
            for number, template in enumerate(fact.relation.questions):
                question = template.replace("{subject}", passage.entity.in_question())
                qas.append({"id": f"{fact.id}/q{number + 1}", "question": question, "answers": answers})
        if qas:
            paragraphs.append({"context": passage.text, "passage": passage.id, "qas": qas})
    return {"title": passages[0].entity.name, "paragraphs": paragraphs} if paragraphs else None
