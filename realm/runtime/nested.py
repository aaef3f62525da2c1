"""Merging of nested settings."""

from typing import Any


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the fields of `overrides` applied; sections are merged recursively."""
    merged = dict(base)
    for key, value in overrides.items():
        # A section with a different `type` replaces the base section: variants have different
        # fields.
        same_kind = (
            isinstance(value, dict)
            and isinstance(merged.get(key), dict)
            and value.get("type", None) in (None, merged[key].get("type"))
        )
        merged[key] = merge(merged[key], value) if same_kind else value
    return merged
