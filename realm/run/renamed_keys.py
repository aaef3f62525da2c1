"""Config keys of version 0.1 that were renamed."""

from collections.abc import Iterator
from typing import Any

_SECTIONS = {"reader_warmup": "reader_pretraining", "start": "init_from"}
_FIELDS = {
    "reader.context_tokens": "corpus.context_tokens",
    "ict.keep_sentence": "ict.keep_sentence_prob",
    "ict.mask_spans": "ict.mask_span_prob",
    "ict.null_share": "ict.null_prob",
    "reader_pretraining.substitution": "reader_pretraining.substitution_prob",
    "reader_pretraining.topic_share": "reader_pretraining.title_span_prob",
    "reader_pretraining.null_share": "reader_pretraining.null_prob",
    "pretrain.substitution": "pretrain.substitution_prob",
    "finetune.substitution": "finetune.substitution_prob",
    "*.optim.clip": "*.optim.max_grad_norm",
    "*.optim.final_lr_share": "*.optim.final_lr_ratio",
    "refresh.every_steps": "refresh.export_every",
    "refresh.drift_every_steps": "refresh.drift_every",
    "refresh.probe_passages": "refresh.drift_passages",
    "data.probe": "data.masked_spans",
    "data.orphans": "data.unsupported",
    "data.*.folds": "data.*.num_folds",
    "data.*.take": "data.*.use_folds",
}
"""Old to new names, with the sections already renamed; `*` matches the same part in both."""


def renamed_keys(tree: dict[str, Any]) -> Iterator[str]:
    """Yield one clause with the new name for each old key in a config tree."""
    for old, new in _SECTIONS.items():
        if old in tree:
            yield f"`{old}` is now `{new}`"
    for key in _keys(tree):
        section, dot, rest = key.partition(".")
        current = f"{_SECTIONS.get(section, section)}{dot}{rest}"
        for old, new in _FIELDS.items():
            if _matches(current.split("."), old.split(".")):
                yield f"`{key}` is now `{_fill(new, current)}`"


def _keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and fields."""
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _matches(key: list[str], pattern: list[str]) -> bool:
    """Whether each part of a key is that of the pattern, or the pattern's is `*`."""
    return len(key) == len(pattern) and all(old in ("*", part) for part, old in zip(key, pattern, strict=True))


def _fill(pattern: str, key: str) -> str:
    """Fill `*` in the new name with the parts of the old key."""
    parts = zip(pattern.split("."), key.split("."), strict=True)
    return ".".join(old if new == "*" else new for new, old in parts)
