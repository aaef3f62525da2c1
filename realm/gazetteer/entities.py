"""Loads the tables and templates of the gazetteer and splits its entities and facts."""

import csv
import hashlib
import re
import tomllib
import unicodedata
from dataclasses import dataclass
from importlib.resources import files

ALIAS_SEPARATOR = " / "
ORPHAN_FRACTION = 0.12
"""Fraction of entities without passages; half of these orphans have statements for pretraining."""
TRAIN_FRACTION = 0.7
VALIDATION_FRACTION = 0.1
HELD_OUT_EVERY = 10
SEED = "gazetteer-2"
QUESTION_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Relation:
    """A column of a table that contains facts, with templates for statements and questions.

    `column` is the column name in the TSV file. `asked` is false for a relation with few distinct
    objects: it has statements but no questions.
    """

    name: str
    column: str
    asked: bool
    passage: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Templates for the entities of one TSV file.

    `subject` and `asked_as` are format strings with `name`: the entity's form in text and in
    questions. `reference` refers to an entity that was already named. `passages` groups the
    relations that appear in the same passage. `contexts` are sentences that introduce the entity
    from its other columns; the first one states what the entity is.
    """

    name: str
    subject: str
    reference: str
    asked_as: str
    lower: bool
    passages: tuple[tuple[str, ...], ...]
    contexts: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A cell of a table: `objects[0]` is used in texts, the others are also accepted as answers."""

    id: str
    relation: Relation
    objects: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True)
class Entity:
    """A row of a table.

    `split` is train, validation or test, or for an entity without passages: stated-orphan (its
    statements are used for pretraining) or orphan (they are not).
    """

    id: str
    name: str
    table: Table
    split: str
    columns: dict[str, str]
    facts: tuple[Fact, ...]

    @property
    def has_passages(self) -> bool:
        """Whether the entity has passages."""
        return self.split in QUESTION_SPLITS

    def in_text(self) -> str:
        """The entity's name within a sentence, with its article if it has one."""
        return self.table.subject.format(name=self.name.lower() if self.table.lower else self.name)

    def in_question(self) -> str:
        """The entity's name in questions, which is unambiguous without a passage."""
        return self.table.asked_as.format(name=self.name.lower() if self.table.lower else self.name)


def stable_number(*parts: str) -> int:
    """64-bit hash of the parts that is the same in every process, for reproducible choices."""
    return int.from_bytes(hashlib.sha256("\0".join((SEED, *parts)).encode()).digest()[:8], "big")


def slug(name: str) -> str:
    """Convert a name to lower-case ASCII with hyphens, for ids."""
    plain = (
        unicodedata.normalize("NFKD", name.translate(str.maketrans("øØłŁ", "oOlL"))).encode("ascii", "ignore").decode()
    )
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def load_templates() -> tuple[list[Table], dict[str, Relation]]:
    """Load the tables, sorted by name, and the relations by name from `templates/*.toml`."""
    tables: list[Table] = []
    relations: dict[str, Relation] = {}
    for path in sorted(files(__package__).joinpath("templates").iterdir(), key=lambda entry: entry.name):
        if not path.name.endswith(".toml"):
            continue
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, fields in content["tables"].items():
            subject = f"{fields['article']} {{name}}" if "article" in fields else "{name}"
            tables.append(
                Table(
                    name=name,
                    subject=subject,
                    reference=fields["reference"],
                    asked_as=fields.get("asked_as", subject),
                    lower=fields.get("lower", False),
                    passages=tuple(tuple(group) for group in fields["passages"]),
                    contexts=tuple(fields["contexts"]),
                )
            )
        for name, fields in content["relations"].items():
            assert name not in relations, f"relation {name} appears in two template files"
            relations[name] = Relation(
                name=name,
                column=fields.get("column", name),
                asked=fields["asked"],
                passage=tuple(fields["passage"]),
                statements=tuple(fields["statements"]),
                questions=tuple(fields["questions"]),
            )
    return sorted(tables, key=lambda table: table.name), relations


def read_rows(table: Table) -> list[dict[str, str]]:
    """Read the rows of `tables/<name>.tsv`; an empty cell means that there is no such fact."""
    text = files(__package__).joinpath("tables", f"{table.name}.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True))


def assign_split(position: int, num_orphans: int, num_entities: int) -> str:
    """Split of the entity at `position` in the hash order of its table.

    Orphans of both kinds come first; the rest is split 70/10/20.
    """
    if position < num_orphans:
        return "orphan" if position % 2 == 0 else "stated-orphan"
    num_rest = num_entities - num_orphans
    num_train, num_validation = round(TRAIN_FRACTION * num_rest), max(1, round(VALIDATION_FRACTION * num_rest))
    rest = position - num_orphans
    if rest < num_train:
        return "train"
    return "validation" if rest < num_train + num_validation else "test"


def load_entities() -> list[Entity]:
    """Load all entities in the order of tables and rows, split by entity within each table.

    A tenth of the facts in passages is held out from the statements: every tenth in the order of
    table, split and hash, so that held-out facts are spread evenly over tables and splits.
    """
    tables, relations = load_templates()
    drafts: list[tuple[str, Table, str, dict[str, str], list[tuple[str, Relation, tuple[str, ...]]]]] = []
    for table in tables:
        rows = read_rows(table)
        order = sorted(rows, key=lambda row: stable_number("split", table.name, row["name"]))
        num_orphans = max(1, round(ORPHAN_FRACTION * len(rows)))
        splits = {row["name"]: assign_split(position, num_orphans, len(rows)) for position, row in enumerate(order)}
        for row in rows:
            entity_id = f"{table.name}/{slug(row['name'])}"
            stated = [relations[name] for group in table.passages for name in group]
            facts = [
                (f"{entity_id}/{relation.column}", relation, tuple(row[relation.column].split(ALIAS_SEPARATOR)))
                for relation in stated
                if row[relation.column]
            ]
            drafts.append((entity_id, table, splits[row["name"]], row, facts))
    ranked = sorted(
        (table.name, split, stable_number("held out", fact_id), fact_id)
        for _, table, split, _, facts in drafts
        for fact_id, _, _ in facts
        if split in QUESTION_SPLITS
    )
    held_out = {fact_id for rank, (*_, fact_id) in enumerate(ranked) if rank % HELD_OUT_EVERY == HELD_OUT_EVERY // 2}
    return [
        Entity(
            id=entity_id,
            name=row["name"],
            table=table,
            split=split,
            columns=row,
            facts=tuple(Fact(fact_id, relation, objects, fact_id in held_out) for fact_id, relation, objects in facts),
        )
        for entity_id, table, split, row, facts in drafts
    ]
