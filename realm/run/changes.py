"""Settings of a run that can still change, because nothing in its folder has used them yet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_USED_BY = {
    "evaluate": (),
    "data.test": (),
    "data.validation": (),
    "data.train": ("finetune_retriever", "finetune"),
    "data.masked_spans": ("evaluations/masked-spans-*.json", "evaluations/null-passage.json"),
    "data.unsupported": ("evaluations/null-passage.json",),
    "data.closed_book": ("evaluations/closed-book.json",),
    "finetune_retriever": ("finetune_retriever",),
    "finetune": ("finetune",),
}
"""Sections and fields that can change, and the paths in the run folder that show their use."""


def changed_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields in which two config trees differ."""
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changed_fields(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}"


def is_used(field: str, folder: Path) -> bool:
    """Whether something in the run folder depends on a field."""
    for name, patterns in _USED_BY.items():
        if f"{field}.".startswith(f"{name}."):
            return any(any(folder.glob(pattern)) for pattern in patterns)
    return True
