"""Nested settings, merged section by section."""

from typing import Any


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `over` in their places, sections merged likewise."""
    merged = dict(base)
    for key, value in over.items():
        # A section that names another `type` replaces the base's: the fields of one variant are not
        # those of another.
        same_kind = (
            isinstance(value, dict)
            and isinstance(merged.get(key), dict)
            and value.get("type", None) in (None, merged[key].get("type"))
        )
        merged[key] = merge(merged[key], value) if same_kind else value
    return merged
