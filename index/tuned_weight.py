"""The weight of BM25 that was tuned for a retriever on held-out questions
(`pretrain/held_out.py`)."""

from pathlib import Path

from realm.runtime.publish import checksum, read_json

HELD_OUT = "held-out"
"""Folder of a run with a file per measured retriever."""


def measurement_file(run: Path, retriever: Path) -> Path:
    """File with the measurement of the retriever saved in `retriever`, by its checksum."""
    return run / HELD_OUT / f"{checksum(retriever)[:12]}.json"


def tuned_weight(run: Path, retriever: Path) -> float | None:
    """The weight of BM25 for a retriever; None if it was not measured, or with too few
    questions."""
    path = measurement_file(run, retriever)
    if not path.exists():
        return None
    weight: float | None = read_json(path, "remove it, to measure the retriever again").get("weight")
    return weight
