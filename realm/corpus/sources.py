"""Where documents come from: one entry of `corpus.passages` or `corpus.statements`."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from realm.errors import UserError

FIELDS = ("id", "title", "text")
"""What a document has."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents; in YAML its path alone may stand for it."""

    SHORTHAND: ClassVar[str] = "path"

    path: str
    """File or folder, `builtin:NAME` for a file of the built-in corpus, or (format `datasets`) a name on the Hugging Face hub."""
    format: str = "auto"
    """`jsonl`, `tsv` (DPR's passages), `parquet`, `text` (a document a file), each one file or a folder of them, `squad`, `timeqa` or
    `datasets`; `auto`: by the path's suffix, of JSON by its content, or by what a folder holds."""
    fields: dict[str, str] = field(default_factory=dict)
    """Where `id`, `title` and `text` stand if not under these names: `{text: contents}`. An id with `#` numbers the records: `{id: "wiki-#"}`."""
    name: str | None = None
    """Configuration of a data set on the hub, such as `20231101.en` of `wikimedia/wikipedia`."""
    split: str | None = None
    """Split of a data set on the hub or in a folder of splits; none: the only one there is."""
    limit: int | None = None
    """Read no more than this many documents."""

    def __post_init__(self) -> None:
        if unknown := set(self.fields) - set(FIELDS):
            raise UserError(f"corpus: `fields` of {self.path} maps {', '.join(sorted(unknown))}; a document has id, title and text.")
        if self.limit is not None and self.limit < 0:
            raise UserError(f"corpus: `limit` of {self.path} must be 0 or more, got {self.limit}.")

    @property
    def id_template(self) -> str | None:
        """What ids are made from by putting a number for `#`, or None where records bring their own."""
        theirs = self.fields.get("id", "")
        return theirs if "#" in theirs else None

    def columns(self, there: Collection[str]) -> tuple[list[str], list[str]]:
        """Of a table's columns those that are read, and those that are missing: a title need not be there unless it is mapped."""
        wanted = {self.fields.get(name, name) for name in FIELDS} - {self.id_template}
        optional = set() if "title" in self.fields else {"title"}
        return [name for name in there if name in wanted], sorted(wanted - set(there) - optional)
