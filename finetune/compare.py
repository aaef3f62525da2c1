"""`realm compare`: two evaluations of the same questions, question by question."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluate import RECALL_DEPTHS, values_of
from finetune.metrics import bootstrap_interval
from realm.errors import UserError
from realm.telemetry import console, print_table

Row = dict[str, Any]


def compare(first: Path, second: Path, seed: int = 0) -> list[Row]:
    """Means of both in percent and what the second has more, with the 95 % interval of a paired bootstrap; a row for each figure both have.

    `first` and `second` are `.predictions.jsonl` files as `realm evaluate` writes them. Raises UserError for other files, and for
    evaluations of different questions.
    """
    before, after = _read(first), _read(second)
    if before.keys() != after.keys():
        odd = next(iter(before.keys() ^ after.keys()))
        raise UserError(f"{first} and {second} are of different questions ({odd!r} stands in one alone); evaluate both on the same file.")
    rows: list[Row] = []
    for name in dict.fromkeys(name for record in before.values() for name in record):
        pairs = np.array([(before[id][name], after[id][name]) for id in before if name in before[id] and name in after[id]], dtype=np.float64)
        if len(pairs):
            low, high = bootstrap_interval(pairs[:, 1] - pairs[:, 0], seed)
            one, other = 100 * pairs.mean(0)
            rows.append({"figure": name, "questions": len(pairs), "first": one, "second": other, "low": 100 * low, "high": 100 * high})
    if not rows:
        raise UserError(f"{first} and {second} have no figure in common.")
    table = [
        [row["figure"], f"{row['questions']:,}", f"{row['first']:.1f}", f"{row['second']:.1f}", f"{row['second'] - row['first']:+.1f}",
         f"[{row['low']:+.1f}, {row['high']:+.1f}]"]
        for row in rows
    ]  # fmt: skip
    console.print(f"  first: {first}\n  second: {second}")
    print_table("Percent, and the difference with its paired 95 % interval", ["", "questions", "first", "second", "difference", "interval"], table)
    return rows


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Figures of each question by its id."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as predictions: {error}") from error
    questions: dict[str, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            questions[record["id"]] = values_of(record, RECALL_DEPTHS)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number} is no prediction as `realm evaluate` writes it ({error!r}).") from error
    if not questions:
        raise UserError(f"{path} holds no predictions.")
    return questions
