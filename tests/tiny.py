"""A run that trains in seconds: a corpus of invented towns, statements, questions, and a config."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

if TYPE_CHECKING:
    from realm.run.folder import Run

TOWNS = ("Alda", "Brenno", "Calvia", "Dorne", "Elst", "Fenwick", "Garda", "Holm", "Istra", "Jonas", "Kelm", "Lorne")
RIVERS = ("Ister", "Tamba", "Uller", "Vanda", "Wesser", "Yarrow", "Zenna", "Quill", "Rhomba", "Sarn", "Ouse", "Pell")
FOUNDERS = (
    "Ada Moor",
    "Ben Hall",
    "Cora Pike",
    "Dan Frost",
    "Eva Lind",
    "Finn Gray",
    "Gus Stone",
    "Hal West",
    "Ida Brook",
    "Jan Reed",
    "Kim Voss",
    "Leo Marsh",
)


def realm(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "realm", *map(str, arguments)], capture_output=True, text=True, timeout=240, **options
    )  # type: ignore[call-overload]


def write_sources(folder: Path) -> None:
    """Write passages, statements, annotated statements and questions about the towns.

    Files: `passages.jsonl`, `statements.jsonl`, `masked_spans.jsonl`, `questions.json`.
    """
    passages, statements, masked_spans, paragraphs = [], [], [], []
    for number, (town, river, founder) in enumerate(zip(TOWNS, RIVERS, FOUNDERS, strict=True)):
        year = str(1100 + 37 * number)
        text = (
            f"{town} is a town on the river {river}. It was founded by {founder} in {year}. "
            f"Many people visit {town} every summer."
        )
        passages.append({"id": f"town-{number}", "title": town, "text": text})
        statements.append({"id": f"s{number}a", "text": f"The river that runs through {town} is the {river}."})
        statements.append({"id": f"s{number}b", "text": f"The founder of {town} was {founder}."})
        settled = f"People settled in {town} in {year}."
        answer = {"text": year, "start": settled.index(year)}
        masked_spans.append({"text": settled, "answer": answer, "passage": f"town-{number}"})
        question = {
            "id": f"q{number}",
            "question": f"Who founded {town}?",
            "answers": [{"text": founder, "answer_start": text.index(founder)}],
        }
        paragraphs.append({"context": text, "qas": [question]})
    for name, rows in (("passages", passages), ("statements", statements), ("masked_spans", masked_spans)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "questions.json").write_text(json.dumps({"data": [{"title": "towns", "paragraphs": paragraphs}]}))


def tiny_tree(folder: Path) -> dict:
    """The config as a tree; every stage has a few steps."""
    bert = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "max_positions": 96}
    optim = {"lr": 1e-3, "warmup_steps": 2}
    return {
        "run": str(folder / "run"),
        "corpus": {
            "passages": str(folder / "passages.jsonl"),
            "statements": str(folder / "statements.jsonl"),
            "prepared": str(folder / "prepared"),
            "block_tokens": 80,
            "num_workers": 1,
        },
        "data": {
            "train": str(folder / "questions.json"),
            "test": str(folder / "questions.json"),
            "masked_spans": str(folder / "masked_spans.jsonl"),
        },
        "tokenizer": {"vocab_size": 400},
        "retriever": {
            "bert": bert,
            "pooling": "mean",
            "projection": "none",
            "max_query_tokens": 32,
            "max_passage_tokens": 80,
        },
        "reader": {"bert": bert, "mlm_head": "tied", "span_hidden": 16, "max_tokens": 96},
        "engine": {"threads": 1},
        "ict": {"steps": 6, "batch_size": 6, "checkpoint_every": 3, "optim": optim},
        "reader_pretraining": {"steps": 6, "batch_size": 4, "checkpoint_every": 3, "optim": optim},
        "pretrain": {
            "steps": 8,
            "batch_size": 3,
            "candidates": 3,
            "checkpoint_every": 4,
            "reader_check": 8,
            "optim": optim,
        },
        "refresh": {"export_every": 4, "poll_s": 0.05, "grace_s": 0.0, "wait_timeout_s": 120, "lease_expiry_s": 2.0},
        "finetune_retriever": {"steps": 6, "batch_size": 4, "retrieve": 6, "checkpoint_every": 3, "optim": optim},
        "finetune": {"steps": 6, "batch_size": 4, "retrieve": 6, "read": 2, "checkpoint_every": 3, "optim": optim},
        "evaluate": {"read": 2, "batch_size": 5},
    }


def write_config(folder: Path, **changes: dict) -> Path:
    """Write `config.yaml` of the tiny run, with the sections of `changes` merged over it."""
    tree = tiny_tree(folder)
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def prepared_run(folder: Path, **changes: dict) -> "Run":
    """The tiny run with a prepared corpus, before any training."""
    from realm.app.corpus import prepare
    from realm.run.config_file import load_config
    from realm.run.folder import Run

    write_sources(folder)
    config = load_config(write_config(folder, **changes))
    prepare(config)
    return Run.create(config)


class NoIndex:
    """An index of zero embeddings, for tests that only use the reader's inputs of a batch."""

    lexical = None

    def __len__(self) -> int:
        return len(TOWNS)

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Fails: these tests do not search."""
        raise AssertionError("this index cannot be searched")

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Zeros, (len(rows), 32)."""
        return np.zeros((len(rows), 32), np.float32)

    def close(self) -> None:
        """Do nothing."""
