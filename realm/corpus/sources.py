"""Where documents come from, and how they become a corpus: the `corpus` section of the
configuration."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from realm.errors import UserError

FIELDS = ("id", "title", "text")
"""What a document has."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents; in YAML its path alone may stand for it."""

    SHORTHAND: ClassVar[str] = "path"

    path: str
    """File or folder, `builtin:NAME` for a file of the built-in corpus, or (format `datasets`) a
    name on the Hugging Face hub."""
    format: str = "auto"
    """`jsonl`, `tsv` (DPR's passages), `parquet`, `text` (a document a file), each one file or a
    folder of them, `squad`, `timeqa` or `datasets`; `auto`: by the path's suffix, of JSON by its
    content, or by what a folder holds."""
    fields: dict[str, str] = field(default_factory=dict)
    """Where `id`, `title` and `text` stand if not under these names: `{text: contents}`. An id
    with `#` numbers the records: `{id: "wiki-#"}`."""
    name: str | None = None
    """Configuration of a data set on the hub, such as `20231101.en` of `wikimedia/wikipedia`."""
    split: str | None = None
    """Split of a data set on the hub or in a folder of splits; none: the only one there is."""
    limit: int | None = None
    """Read no more than this many documents."""

    def __post_init__(self) -> None:
        if unknown := set(self.fields) - set(FIELDS):
            raise UserError(
                f"corpus: `fields` of {self.path} maps {', '.join(sorted(unknown))}; a document has id, title and text."
            )
        if self.limit is not None and self.limit < 0:
            raise UserError(f"corpus: `limit` of {self.path} must be 0 or more, got {self.limit}.")

    @property
    def id_template(self) -> str | None:
        """What ids are made from by putting a number for `#`, or None where records bring their
        own."""
        theirs = self.fields.get("id", "")
        return theirs if "#" in theirs else None

    def columns(self, there: Collection[str]) -> tuple[list[str], list[str]]:
        """Of a table's columns those that are read, and those that are missing: a title need not
        be there unless it is mapped."""
        wanted = {self.fields.get(name, name) for name in FIELDS} - {self.id_template}
        optional = set() if "title" in self.fields else {"title"}
        return [name for name in there if name in wanted], sorted(wanted - set(there) - optional)


@dataclass(frozen=True)
class CorpusConfig:
    """What is retrieved, what is pretrained on, and how it is prepared."""

    passages: tuple[SourceConfig, ...]
    """Where the passages are, one source or a list: a path such as `wiki.jsonl.gz`, or `{path:
    …, format: …, fields: …}`."""
    statements: tuple[SourceConfig, ...] | None = None
    """Sentences to mask in pretraining, given likewise; without it the passages themselves."""
    limit: int | None = None
    """Read no more than this many documents of each source, to try a config on a part."""
    prepared: str = "prepared"
    """Folder that `realm prepare` writes."""
    block_tokens: int = 288
    """A block's wordpieces at most, counted as the encoder reads it: `[CLS] title [SEP] text
    [SEP]`, the three special tokens included."""
    context_tokens: int = 0
    """Wordpieces of a block together with the whole blocks around it in its document that the
    reader reads, title and special tokens included; 0: the block alone."""
    num_workers: int = 0
    """Processes that prepare; 0: one per CPU, fewer for a small corpus."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and say how many, instead of refusing the file."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"corpus.limit must be at least 1 document of each source, got {self.limit}.")
        if not self.passages:
            raise UserError("corpus.passages names no source; give at least one path.")

    def limited(self, sources: Sequence[SourceConfig]) -> list[SourceConfig]:
        """Sources of this corpus with `limit` applied to each."""
        limits = [[limit for limit in (source.limit, self.limit) if limit is not None] for source in sources]
        return [replace(source, limit=min(some, default=None)) for source, some in zip(sources, limits, strict=True)]
