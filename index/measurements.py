"""Measurements of retrievers on the held-out questions (`pretrain/held_out.py`), by retriever:
among them the weight of BM25 that was tuned for it."""

from pathlib import Path
from typing import Any

from realm.runtime.publish import MANIFEST, checksum, read_manifest, write_manifest

HELD_OUT = "held-out"
"""Folder of a run with a folder per measured retriever."""


def read_measurement(run: Path, retriever: Path) -> dict[str, Any] | None:
    """The measurement of the retriever saved in `retriever`; None if it was not measured. Raises
    UserError if its file is damaged."""
    folder = _folder(run, retriever)
    if not (folder / MANIFEST).exists():
        return None
    measurement = read_manifest(folder, f"remove {folder}, to measure the retriever again")
    return {name: value for name, value in measurement.items() if name != "files"}


def write_measurement(run: Path, retriever: Path, measurement: dict[str, Any]) -> None:
    """Keep the measurement of the retriever saved in `retriever`."""
    folder = _folder(run, retriever)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, measurement, ())


def tuned_weight(run: Path, retriever: Path) -> float | None:
    """The weight of BM25 for a retriever; None if it was not measured, or with too few
    questions."""
    measurement = read_measurement(run, retriever) if retriever.exists() else None
    weight: float | None = None if measurement is None else measurement.get("weight")
    return weight


def _folder(run: Path, retriever: Path) -> Path:
    return run / HELD_OUT / checksum(retriever)[:12]
