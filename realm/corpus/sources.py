"""The `corpus` section of the config: sources of documents and how they are prepared."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from realm.errors import UserError
from realm.runtime.section import MAX_PROCESSES, PathText, Section

FIELDS = ("id", "title", "text")
"""Fields of a document."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents; in YAML a plain path is short for `{path: …}`."""

    SHORTHAND: ClassVar[str] = "path"

    path: PathText
    """File or folder, `builtin:NAME` for a file of the built-in corpus, or a name on the Hugging
    Face hub (with `format: datasets`)."""
    format: str = "auto"
    """`jsonl`, `tsv` (DPR's passages), `parquet` or `text` (one document per file), each a file or
    a folder of files; `squad`, `timeqa` or `datasets`. `auto`: auto-detected from the suffix of the
    path, the content of a JSON file, or the files in a folder."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names of the fields to use as `id`, `title` and `text`, if different: `{text: contents}`. An
    id with `#` numbers the records: `{id: "wiki-#"}`."""
    name: str | None = None
    """Configuration of a dataset on the hub, such as `20231101.en` of `wikimedia/wikipedia`."""
    split: str | None = None
    """Split of a dataset on the hub or in a folder of splits; default: the only split."""
    limit: int | None = None
    """Maximum number of documents to read."""

    def __post_init__(self) -> None:
        if unknown := set(self.fields) - set(FIELDS):
            raise UserError(
                f"corpus: `fields` of {self.path} maps {', '.join(sorted(unknown))}; "
                "the fields of a document are id, title and text."
            )
        if self.limit is not None and self.limit < 0:
            raise UserError(f"corpus: `limit` of {self.path} must be 0 or more, got {self.limit}.")

    @property
    def id_template(self) -> str | None:
        """Template for ids, where `#` is the record number; None if the records have ids."""
        theirs = self.fields.get("id", "")
        return theirs if "#" in theirs else None

    def columns(self, available: Collection[str]) -> tuple[list[str], list[str]]:
        """The columns of a table that are read, and those that are missing.

        A title is optional unless it is mapped.
        """
        names = {name: self.fields.get(name, name) for name in FIELDS}
        wanted = set(names.values()) - {self.id_template}
        needed = wanted if "title" in self.fields else {names["id"], names["text"]} & wanted
        return [name for name in available if name in wanted], sorted(needed - set(available))


@dataclass(frozen=True)
class CorpusConfig(Section):
    """Passages to retrieve, sentences to pretrain on, and how both are prepared."""

    passages: tuple[SourceConfig, ...]
    """Sources of the passages, one or a list: a path such as `wiki.jsonl.gz`, or `{path: …,
    format: …, fields: …}`."""
    statements: tuple[SourceConfig, ...] | None = None
    """Sources of the sentences to mask in pretraining; default: the passages."""
    limit: int | None = None
    """Maximum number of documents to read from each source, to try a config on a subset."""
    prepared: PathText = "prepared"
    """Output folder of `realm prepare`."""
    block_tokens: int = 288
    """Maximum size of a block in wordpieces, as the encoder reads it: `[CLS] title [SEP] text
    [SEP]`, the three special tokens included."""
    context_tokens: int = 0
    """Maximum size of a context in wordpieces, title and special tokens included: the block and the
    whole blocks around it that the reader reads with it; 0: the block alone."""
    num_workers: int = 0
    """Number of processes that prepare the corpus; 0: one per CPU, fewer for a small corpus."""
    skip_bad: bool = False
    """Skip and count records that cannot be used instead of failing."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(1, "limit", "block_tokens")
        yield from self.at_least(0, "context_tokens", "num_workers")
        yield from self.at_most(MAX_PROCESSES, "num_workers")
        if not self.passages:
            yield "passages must contain at least one source"
        if self.statements is not None and not self.statements:
            yield "statements must contain at least one source; remove it to mask the passages"

    def limited(self, sources: Sequence[SourceConfig]) -> list[SourceConfig]:
        """Return `sources` with `limit` applied to each."""
        limits = [[limit for limit in (source.limit, self.limit) if limit is not None] for source in sources]
        return [replace(source, limit=min(some, default=None)) for source, some in zip(sources, limits, strict=True)]
