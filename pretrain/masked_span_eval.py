"""Measuring masked spans: does the retriever find the passage, does the reader read it, does
anyone know the answer without."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain.data import NULL, MaskedSentence, SpanSampler, choose_candidates
from pretrain.search import FrozenSearch
from pretrain.stage import batch_maker
from realm.errors import UserError
from realm.models.modules import read_masked
from realm.models.objectives import candidate_log_prior
from realm.models.precision import autocast
from realm.models.reader import Reader, load_reader
from realm.models.retriever import Retriever
from realm.run.folder import Run
from realm.runtime.distributed import local_device
from realm.text.tokenizer import tokenize


@dataclass(frozen=True)
class MaskedSpanItem:
    """A masked sentence and the passage that states it, where that is known."""

    example: MaskedSentence
    passage: int | None
    """Row of the passage, or None."""


def load_annotated(path: Path, run: Run, split: str | None = None) -> list[MaskedSpanItem]:
    """Annotated statements: JSONL of `{"text", "answer": {"text", "start"}, "passage": id or
    absent, "split": optional}`; those of `split` if given.

    Raises UserError naming file and line for a broken record or an unknown passage. Statements
    whose answer does not align with wordpieces, or does not fit the query, cannot be masked and are
    left out.
    """
    maker, records = batch_maker(run), []
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # and at no other sign that Python takes for the end of a line
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); check data.masked_spans, data.unsupported and data.closed_book."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            start, answer = record["answer"]["start"], record["answer"]["text"]
            aligned = record["text"][start : start + len(answer)] == answer
            passage = None if record.get("passage") is None else run.passages.row_of_id(record["passage"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: no annotated statement with a known passage ({error!r}); it needs text, answer.text and answer.start."
            ) from error
        if not aligned:
            raise UserError(
                f"{path}:{number}: the answer {answer!r} does not stand at answer.start ({start}) of the text."
            )
        if split is not None and record.get("split") != split:
            continue
        records.append((record["text"], start, start + len(answer), passage))
    items = []
    for (_, begin, finish, passage), (ids, offsets) in zip(
        records, tokenize(run.tokenizer, [record[0] for record in records]), strict=True
    ):
        inside = np.flatnonzero((offsets[:, 0] >= begin) & (offsets[:, 1] <= finish))
        if (
            len(inside)
            and offsets[inside[0], 0] == begin
            and offsets[inside[-1], 1] == finish
            and inside[-1] < maker.max_query - 2
        ):
            items.append(
                MaskedSpanItem(
                    MaskedSentence(-1, ids[: maker.max_query - 2], int(inside[0]), int(inside[-1]) + 1, 0), passage
                )
            )
    return items


def sample_items(run: Run, count: int = 500) -> list[MaskedSpanItem]:
    """Masked sentences of the run's own statements, where no annotated ones are given; the
    passage is their own if they come from one."""
    sampler = SpanSampler(
        run.statements, run.config.pretrain.max_span_tokens, run.config.retriever.max_query_tokens - 2
    )
    rng = np.random.default_rng(run.config.seed + 7)
    rows = rng.permutation(sampler.rows)[:count]
    return [MaskedSpanItem(sampler.draw(int(row), rng), None) for row in rows]


def masked_accuracy(
    reader: Reader, run: Run, examples: list[MaskedSentence], rows: list[int], batch_size: int = 64
) -> float:
    """Percent of masked spans whose every wordpiece the reader gets right from the given passage
    each (NULL: from nothing)."""
    if not examples:
        return float("nan")
    maker, right = batch_maker(run), 0
    device = next(reader.parameters()).device
    training = reader.training
    reader.eval()
    with torch.inference_mode(), autocast(device, run.config.engine.precision):
        for start in range(0, len(examples), batch_size):
            parts = [[maker.reading(row)] for row in rows[start : start + batch_size]]
            batch = maker.masked(examples[start : start + batch_size], parts).to(device)
            right += int(read_masked(reader, batch).right_BN.sum())
    reader.train(training)
    return 100.0 * right / len(examples)


def retrieval_recall(
    run: Run, items: list[MaskedSpanItem], retrieved: np.ndarray, depths: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """Percent of items with a passage that holds the span (`recall@k`), or the very passage that
    states it (`exact_recall@k`), in the top k."""
    maker = batch_maker(run)
    holds = np.array(
        [
            [maker.holds(maker.passage(int(row)), item.example.span_ids) for row in rows]
            for item, rows in zip(items, retrieved[:, : max(depths)], strict=True)
        ]
    )
    figures = {f"recall@{k}": 100.0 * float(holds[:, :k].any(1).mean()) for k in depths}
    if all(item.passage is not None for item in items):
        gold = np.array([item.passage for item in items])[:, None]
        figures |= {f"exact_recall@{k}": 100.0 * float((retrieved[:, :k] == gold).any(1).mean()) for k in depths}
    return figures


def evaluate_masked_spans(
    run: Run, items: list[MaskedSpanItem], retriever: Path | None, reader: Reader | None
) -> dict[str, float]:
    """All figures of a saved retriever and a reader, in percent (see `retrieval_recall`,
    `masked_accuracy`)."""
    figures: dict[str, float] = {}
    examples = [item.example for item in items]
    gold = [(item.example, item.passage) for item in items if item.passage is not None]
    if reader is not None:
        rng = np.random.default_rng(run.config.seed + 11)
        figures["accuracy_null"] = masked_accuracy(reader, run, examples, [NULL] * len(examples))
        figures["accuracy_random"] = masked_accuracy(
            reader, run, examples, rng.choice(run.passages.rows, len(examples)).tolist()
        )
        if gold:
            figures["accuracy_gold"] = masked_accuracy(
                reader, run, [example for example, _ in gold], [row for _, row in gold]
            )
    if retriever is not None:
        search = FrozenSearch(run, retriever)
        rows = search(examples, 5 + run.config.pretrain.extra_retrieved)
        retrieved = np.array([_five_best(run, example, mine) for example, mine in zip(examples, rows, strict=True)])
        figures |= retrieval_recall(run, items, retrieved)
        if reader is not None:
            right, null_mass = read_retrieved(run, search.retriever, reader, examples, retrieved)
            figures["accuracy_retrieved"] = 100.0 * float(right.mean())
            figures["null_mass"] = 100.0 * float(null_mass.mean())
    return figures


def _five_best(run: Run, example: MaskedSentence, retrieved_rows: np.ndarray) -> list[int]:
    """Of a sentence of the run's own statements without those in which it stands itself (see
    `choose_candidates`)."""
    if example.row < 0:
        return retrieved_rows[:5].tolist()
    return choose_candidates(retrieved_rows, example, 5, run.contexts, run.statements, run.wordpieces)


def read_retrieved(
    run: Run,
    retriever: Retriever,
    reader: Reader,
    examples: list[MaskedSentence],
    retrieved: np.ndarray,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Read the null passage and the retrieved ones; whether the span with the largest p(z|x)
    p(y|z,x) is right, and p(null|x), per example."""
    maker, rights, nulls = batch_maker(run), [], []
    device = next(reader.parameters()).device
    reader.eval()
    width = min(retrieved.shape[1], run.config.pretrain.candidates - 1)
    rng = np.random.default_rng(0)
    with torch.inference_mode(), autocast(device, run.config.engine.precision):
        for start in range(0, len(examples), batch_size):
            batch = maker.realm(
                examples[start : start + batch_size], retrieved[start : start + batch_size, :width], None, 0.0, rng
            ).to(device)
            query_emb_BD = retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
            passage_emb_UD = retriever.embed_passages(batch.passage_ids_UL, batch.passage_mask_UL)
            log_p_z_BN = candidate_log_prior(
                retriever.score(query_emb_BD, passage_emb_UD[batch.candidate_BN]), batch.valid_BN
            )
            reading = read_masked(reader, batch.masked)
            best_B1 = (log_p_z_BN + reading.best_log_p_BN).argmax(-1, keepdim=True)
            rights.append(reading.right_BN.gather(1, best_B1)[:, 0].cpu().numpy())
            nulls.append(log_p_z_BN[:, 0].exp().cpu().numpy())
    return np.concatenate(rights), np.concatenate(nulls)


def evaluate_stage_masked_spans(run: Run, stage: str) -> dict[str, float]:
    """Figures of what a finished stage left behind, together with the newest other half of
    earlier stages."""
    folder = run.model(stage)
    path = run.data("masked_spans")
    items = load_annotated(path, run) if path else sample_items(run)
    retriever = run.latest("retriever", until=stage)
    reader = load_reader(folder / "reader").to(local_device()) if (folder / "reader").exists() else None
    return evaluate_masked_spans(run, items, retriever, reader)
