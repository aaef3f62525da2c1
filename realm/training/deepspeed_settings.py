"""The raw settings of `engine.deepspeed`, checked by DeepSpeed's own parser before any training."""

import logging
import os
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch
from pydantic import ValidationError

_IGNORED = {
    "gradient_accumulation_steps": "batch_size of the stage",
    "train_batch_size": "batch_size of the stage",
    "train_micro_batch_size_per_gpu": "batch_size of the stage",
    "optimizer": "optim of the stage",
    "scheduler": "optim of the stage",
}
"""Settings that the engine sets itself, and the fields to use instead."""
_READ_LATER = {"data_parallel_size", "sequence_parallel_size"}
"""Settings that DeepSpeed reads elsewhere."""


def import_deepspeed() -> Any:
    """Import DeepSpeed without its log output; returns the package."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def deepspeed_problems(settings: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence per setting that would be ignored or that DeepSpeed rejects.

    DeepSpeed ignores keys that it does not know. They are those that its parser never looks up.
    """
    if not settings:
        return
    ignored = [name for name in settings if name in _IGNORED]
    yield from (f"deepspeed.{name} would be ignored; set {_IGNORED[name]} instead" for name in ignored)
    if ignored:
        return
    config = import_deepspeed().runtime.config
    followed = _Followed(settings | {"train_micro_batch_size_per_gpu": 1})
    try:
        config.DeepSpeedConfig(followed)
    except Exception as error:  # DeepSpeed reports wrong values with exceptions of many types
        yield f"deepspeed is rejected by DeepSpeed ({_first_problem(error)})"
        return
    yield from _unread(followed, "deepspeed")


class _Followed(dict[str, Any]):
    """A dict that records which keys are looked up, in itself and in the dicts inside it."""

    def __init__(self, content: dict[str, Any]) -> None:
        inside = {key: _Followed(value) if isinstance(value, dict) else value for key, value in content.items()}
        super().__init__(inside)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.read.update(dict.keys(self))  # also called for `function(**settings)`
        return super().__iter__()

    def keys(self) -> Any:
        return self  # `key in settings.keys()`

    def __copy__(self) -> "_Followed":
        return self


def _unread(settings: _Followed, name: str) -> Iterator[str]:
    """Problems of the keys that nothing has looked up, in the settings and their sections."""
    for key, value in settings.items():
        if key not in settings.read | _READ_LATER:
            close = get_close_matches(key, settings.read, n=1)
            remedy = f"the closest is {name}.{close[0]}" if close else "remove it"
            yield f"{name}.{key} is not a setting of DeepSpeed; {remedy}"
        elif isinstance(value, _Followed) and name == "deepspeed" and value.read:
            yield from _unread(value, f"{name}.{key}")


def _first_problem(error: Exception) -> str:
    """The first problem of a pydantic error with its place, or the first line of another error."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{error.title}, {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
