"""`realm compare`: paired comparison of two evaluations of the same questions."""

from pathlib import Path
from typing import Any

import numpy as np

from finetune.figures import RECALL_DEPTHS, values_of
from realm.corpus.records import BadRecord, BadRecords, Place
from realm.corpus.text_files import parse_object, parsed_lines
from realm.errors import UserError
from realm.runtime.bootstrap import bootstrap_interval
from realm.runtime.telemetry import console, print_table

Row = dict[str, Any]
Key = tuple[str, int]
"""Id of a question, and its number among questions with the same id."""


def compare(first: Path, second: Path, seed: int = 0) -> list[Row]:
    """Compare two `.predictions.jsonl` files written by `realm evaluate`, and print a table.

    Returns a row per figure that both contain: both means in percent, and the 95 % interval of the
    difference (second minus first) from a paired bootstrap. Raises UserError for other files, and
    if the questions differ.
    """
    before, after = read_predictions(first), read_predictions(second)
    if before.keys() != after.keys():
        odd, _ = next(iter(before.keys() ^ after.keys()))
        raise UserError(
            f"{first} and {second} are evaluations of different questions ({odd!r} is in only one of them); "
            "evaluate both on the same file."
        )
    rows: list[Row] = []
    for name in dict.fromkeys(name for record in before.values() for name in record):
        pairs = np.array(
            [(before[key][name], after[key][name]) for key in before if name in before[key] and name in after[key]],
            dtype=np.float64,
        )
        if len(pairs):
            low, high = bootstrap_interval(pairs[:, 1] - pairs[:, 0], seed)
            one, other = 100 * pairs.mean(0)
            rows.append(
                {
                    "figure": name,
                    "questions": len(pairs),
                    "first": one,
                    "second": other,
                    "low": 100 * low,
                    "high": 100 * high,
                }
            )
    if not rows:
        raise UserError(f"{first} and {second} have no figures in common.")
    table = [
        [
            row["figure"],
            f"{row['questions']:,}",
            f"{row['first']:.1f}",
            f"{row['second']:.1f}",
            f"{row['second'] - row['first']:+.1f}",
            f"[{row['low']:+.1f}, {row['high']:+.1f}]",
        ]
        for row in rows
    ]
    console.print(f"  first: {first}\n  second: {second}")
    print_table(
        "Percent; difference with paired 95 % interval",
        ["", "questions", "first", "second", "difference", "interval"],
        table,
    )
    return rows


def read_predictions(path: Path) -> dict[Key, dict[str, float]]:
    """Read the figures of each question of an evaluation; recall only up to the retrieved depth.

    Raises UserError if the file contains other records, or no records.
    """
    report = BadRecords()
    records = list(parsed_lines(path, "predictions written by `realm evaluate`", report, _prediction))
    if report.total:
        raise UserError(f"{report}\n{path} is not a predictions file of `realm evaluate`; rerun the evaluation.")
    if not records:
        raise UserError(f"{path} contains no predictions.")
    depth = max(len(record["retrieved"]) for record in records)
    seen: dict[str, int] = {}
    questions: dict[Key, dict[str, float]] = {}
    for record in records:
        name = str(record["id"])
        seen[name] = seen.get(name, -1) + 1
        questions[name, seen[name]] = values_of(record, [k for k in RECALL_DEPTHS if k <= depth])
    return questions


def _prediction(place: Place, line: bytes) -> Row:
    record = parse_object(line)
    try:
        values_of(record, RECALL_DEPTHS)
        len(record["retrieved"]), record["id"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadRecord("not a prediction", f" ({error!r})") from None
    return record
