"""Comparison of two evaluations: differences, paired intervals, and invalid files."""

import json
from pathlib import Path

import pytest

from finetune.compare import compare
from realm.errors import UserError


def write(path: Path, rights: list[bool], ranks: list[int | None]) -> Path:
    records = [
        {
            "id": f"q{n % 90}",
            "retrieved": ["p"] * 5,
            "em": right,
            "f1": 0.5,
            "rank_of_answer": rank,
        }  # some ids occur twice
        for n, (right, rank) in enumerate(zip(rights, ranks, strict=True))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_differences_are_paired_by_question(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [False] * 50 + [True] * 50, [1] * 100)
    second = write(tmp_path / "b.jsonl", [True] * 20 + [False] * 30 + [True] * 50, [None] * 40 + [3] * 60)
    rows = {row["figure"]: row for row in compare(first, second)}
    assert (rows["em"]["first"], rows["em"]["second"]) == (50.0, 70.0)
    assert 12 < rows["em"]["low"] < 20 < rows["em"]["high"] < 29, (
        "every change is an improvement, so the interval is far narrower than unpaired ones"
    )
    assert (rows["f1"]["low"], rows["f1"]["high"]) == (0.0, 0.0)
    assert rows["recall@1"]["second"] == 0.0 and rows["recall@5"]["second"] == 60.0
    assert rows["em"]["questions"] == 100 and "recall@20" not in rows, "only five passages were retrieved"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected predictions"),
        ("\n", "contains no predictions"),
        ("{", r"b\.jsonl:1: invalid JSON"),
        ('{"id": "q0", "em": true, "retrieved": ["p"], "rank_of_document": 0}\n', r"b\.jsonl:1: not a prediction"),
        ('{"id": "other", "em": true, "retrieved": []}\n', "different questions"),
    ],
)
def test_invalid_files_and_different_questions_are_refused(tmp_path: Path, content: str, message: str) -> None:
    first = write(tmp_path / "a.jsonl", [True], [1])
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        compare(first, tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        compare(first, tmp_path / "none.jsonl")
