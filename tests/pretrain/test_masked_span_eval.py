"""Masked-span evaluation: recall, trivial passages, and annotated statements."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretrain.masked_span_eval
from index.fusion import Fusion
from pretrain.collate import MaskedCollator
from pretrain.masked_span_eval import (
    DEPTHS,
    MaskedSpanItem,
    _without_trivial,
    evaluate_masked_spans,
    load_annotated,
    masked_accuracy,
    read_retrieved,
    retrieval_recall,
    sample_items,
)
from pretrain.masking import MaskedSentence
from pretrain.search import FrozenSearch
from realm.app.corpus import prepare
from realm.corpus.collate import EMPTY, NULL
from realm.errors import UserError
from realm.models.modules import ReaderPretrainingModel
from realm.models.reader import build_reader
from realm.models.retriever import build_retriever
from realm.run.config_file import load_config
from realm.run.folder import Run
from tests.tiny import write_config, write_sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose passages are also its statements."""
    folder = tmp_path_factory.mktemp("masked_spans")
    write_sources(folder)
    config = load_config(write_config(folder, corpus={"statements": None}, data={"masked_spans": None, "train": None}))
    prepare(config)
    return Run.create(config)


class OwnPassageFirst:
    """A search that returns the sentence's own passage first, then all others."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def open(cls, run: Run, folder: Path, collator: object) -> "OwnPassageFirst":
        return cls(run)

    def __call__(self, examples, k):
        every = range(len(self.run.passages))
        return np.array([[example.row, *(row for row in every if row != example.row)][:k] for example in examples])


def test_slots_in_which_a_search_found_nothing_are_empty(run: Run) -> None:
    (item, *_) = sample_items(run)
    unknown = replace(item.example, row=-1)
    rows = _without_trivial(run, unknown, np.array([3, 1, *[-1] * 30]))
    assert rows == [3, 1, *[EMPTY] * (max(DEPTHS) - 2)], "-1 would be read as the null passage"


def test_the_own_passage_of_a_sentence_does_not_count(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrain.masked_span_eval, "FrozenSearch", OwnPassageFirst)
    items = sample_items(run)
    collator = run.collator
    elsewhere = [
        any(
            collator.contains(collator.passage(row), item.example.span_ids)
            for row in range(len(run.passages))
            if row != item.example.row
        )
        for item in items
    ]
    assert len(items) > 10 and not all(elsewhere)
    figures = evaluate_masked_spans(run, items, tmp_path, None)
    assert figures["recall@5"] <= 100 * np.mean(elsewhere)


def test_the_span_head_is_right_if_its_best_span_of_all_passages_is_the_masked_one(run: Run) -> None:
    torch.manual_seed(0)
    collator = MaskedCollator(run.collator, 2)
    examples = [item.example for item in sample_items(run)]
    reader = build_reader(run.config.reader, run.tokenizer)[0]
    learned = examples[::2]  # half of the spans are learned by heart, so that some are found
    batch = collator.masked(learned, [[collator.inputs.in_context(example.row)] for example in learned])
    model, optimizer = ReaderPretrainingModel(reader, 1.0), torch.optim.Adam(reader.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(batch)["span_loss"].backward()
        optimizer.step()
    reader.eval()
    retriever = build_retriever(run.config.retriever, run.tokenizer).eval()
    others = [(example.row + 1) % len(run.passages) for example in examples]
    candidates = np.array([[example.row, other] for example, other in zip(examples, others, strict=True)])

    def best(example: MaskedSentence, row: int) -> tuple[float, bool, float]:
        """log p(s|z,x) of the best span, whether it is the masked one, and p(absent|z,x)."""
        batch = collator.masked([example], [[collator.inputs.in_context(row)]])
        (joint,), (spans,) = batch.joint, batch.spans
        hidden = reader(joint.ids_RL, joint.mask_RL, joint.type_RL)
        score_LW = reader.span_scores(hidden, spans.allowed_RLW)[0]
        absent = reader.absent_scores(hidden)
        (start, width), places = divmod(int(score_LW.argmax()), score_LW.shape[1]), spans.allowed_RLW[0]
        total = torch.cat((score_LW[places], absent)).logsumexp(0)
        right = joint.ids_RL[0, start : start + width + 1].tolist() == example.span_ids.tolist()
        return float(score_LW.max() - total), right, float((absent - total).exp())

    with torch.no_grad():
        single = [best(example, example.row)[1] for example in examples]
        accuracies = masked_accuracy(reader, collator, "fp32", examples, candidates[:, 0])
        assert accuracies.span == pytest.approx(100 * np.mean(single)) and 0 < accuracies.span < 100
        assert masked_accuracy(reader, collator, "fp32", examples, [NULL] * len(examples)).span == 0.0
        index: Any = None  # nothing is searched
        search = FrozenSearch(retriever, index, collator, "fp32", Fusion(), run.statements)
        reading = read_retrieved(search, reader, examples, candidates)
        for number, (example, rows) in enumerate(zip(examples, candidates.tolist(), strict=True)):
            query_emb_D = retriever.embed_queries(*collator.queries([example]))[0]
            parts = [collator.inputs.passage(row) for row in (NULL, *rows)]
            p_z = (retriever.embed_passages(*collator.inputs.passage_inputs(parts)) @ query_emb_D).softmax(0).tolist()
            found = [best(example, row) for row in rows]
            values = [np.log(p) + log_p for p, (log_p, _, _) in zip(p_z[1:], found, strict=True)]
            assert reading.span_correct[number] == found[int(np.argmax(values))][1]
            absent = p_z[0] + sum(p * p_absent for p, (_, _, p_absent) in zip(p_z[1:], found, strict=True))
            assert reading.absent_mass[number] == pytest.approx(absent, rel=1e-4)
            assert reading.null_mass[number] == pytest.approx(p_z[0], rel=1e-4)


def test_exact_recall_counts_the_known_passage(run: Run) -> None:
    items = [MaskedSpanItem(item.example, item.example.row) for item in sample_items(run, 3)]
    found = np.array([[item.example.row, (item.example.row + 1) % len(run.passages)] for item in items])
    assert retrieval_recall(run.collator, items, found, (1, 2))["exact_recall@1"] == 100.0
    assert retrieval_recall(run.collator, items, found[:, 1:], (1,))["exact_recall@1"] == 0.0


def test_statements_are_separated_by_newlines_only(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "statements.jsonl"
    record = {"text": "Alda was founded\u2028in 1100.", "answer": {"text": "1100", "start": 20}, "passage": "town-0"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n\n")
    assert [item.passage for item in load_annotated(path, run.tokenizer, run.passages, 32)] == [0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty; expected one annotated statement per line"),
        (b'{"text": "caf\xe9"}\n', "a.jsonl:1: not UTF-8"),
        (b'{"text": "A."', "a.jsonl:1: invalid JSON"),
        (b'{"text": "A.", "answer": {"text": "B", "start": 0}}', "a.jsonl:1: the answer is not in the text"),
        (b'{"text": "A.", "answer": {"text": "A", "start": -2}}', "a.jsonl:1: the answer is not in the text"),
        (b'{"text": "A.", "answer": {"text": "A", "start": 0}, "passage": "x"}', "a.jsonl:1: unknown passage: 'x'"),
        (b'{"text": "A\\ud800", "answer": {"text": "A", "start": 0}}', "a.jsonl:1: unpaired surrogate"),
    ],
)
def test_unusual_files_of_statements_raise_user_errors(tmp_path, run, content: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        load_annotated(path, run.tokenizer, run.passages, 32)
