"""Fuzz target: annotated statements."""

import json
from pathlib import Path
from random import Random

from pretrain.masked_span_eval import load_annotated
from tests.fuzz.mutate import mutated_json
from tests.fuzz.targets import Case, Target, register
from tests.fuzz.text_targets import small_tokenizer

STATEMENT = {
    "text": "People settled in Alda in 1100.",
    "answer": {"text": "1100", "start": 26},
    "passage": "a",
    "split": "test",
}


class _Passages:
    """Stands for a prepared corpus whose only block has the id `a`."""

    def row_of_id(self, name: str) -> int:
        return {"a": 0}[name]


def _statements(rng: Random) -> Case:
    return Case(
        b"\n".join(
            mutated_json(rng, STATEMENT) if rng.random() < 0.5 else json.dumps(STATEMENT).encode() for _ in range(2)
        )
    )


def _read_statements(case: Case, folder: Path) -> int:
    path = folder / "a.jsonl"
    path.write_bytes(case.content)
    load_annotated(path, small_tokenizer(), _Passages(), 32)  # type: ignore[arg-type]
    return 0


register(Target("annotated-statements", _statements, _read_statements))
