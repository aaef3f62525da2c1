"""Changing the config of a run: only settings that nothing in its folder has used yet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realm.errors import UserError
from realm.run.config_file import read_config
from realm.run.yaml_text import parse_yaml
from realm.runtime.publish import write_text_atomic
from realm.runtime.telemetry import log_line

_USED_BY = {
    "held_out": ("ict", "reader_pretraining", "pretrain", "held-out", "evaluations/*"),
    "engine.keep_checkpoints": (),
    "engine.log_every_s": (),
    "engine.threads": (),
    "pretrain.threads": (),
    "refresh.threads": (),
    "evaluate": (),
    "data.test": (),
    "data.validation": (),
    "data.train": ("finetune_retriever", "finetune"),
    "data.masked_spans": ("evaluations/masked-spans-*.json", "evaluations/null-passage.json"),
    "data.unsupported": ("evaluations/null-passage.json",),
    "data.closed_book": ("evaluations/closed-book.json",),
    "fusion": ("reader_pretraining", "pretrain", "finetune_retriever", "finetune", "evaluations/*"),
    "pseudo_questions": ("ict", "reader_pretraining", "pretrain"),
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


def existing_config(path: Path) -> dict[str, Any]:
    """The tree of a run's config. Raises UserError if the file is damaged."""
    try:
        return read_config(path)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; restore it from a copy, or choose another run folder.") from error


def update_config(path: Path, text: str) -> None:
    """Replace a run's config with `text`. Raises UserError if a field that is in use has
    changed."""
    changed = list(changed_fields(existing_config(path), parse_yaml(text)))
    used = [field for field in changed if is_used(field, path.parent)]
    if used:
        more = f" and {len(used) - 4} more" if len(used) > 4 else ""
        raise UserError(
            f"run folder {path.parent} already exists with a different config (changed: {', '.join(used[:4])}{more}); "
            "choose another folder with --run, or restore the old config."
        )
    if changed:
        write_text_atomic(path, text)
        log_line(f"config.yaml updated: {', '.join(changed)}")
