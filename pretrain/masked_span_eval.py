"""Masked-span evaluation: recall of the retriever, and accuracy of the reader's heads by passage.

The accuracy with the null passage shows which facts the reader has memorized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pretrain.collate import MaskedCollator
from pretrain.masking import MaskedSentence, SpanSampler
from pretrain.search import FrozenSearch
from pretrain.selection import choose_candidates
from realm.corpus.collate import EMPTY, NULL, Collator, filled
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.records import BadRecord, BadRecords, Place, check_text, expect, expect_field
from realm.corpus.text_files import parse_object, parsed_lines
from realm.errors import UserError
from realm.models.objectives import candidate_log_prior
from realm.models.precision import Precision, autocast
from realm.models.predictions import best_span_is_right, predict_masked, predict_spans, read_joint
from realm.models.reader import Reader, load_reader
from realm.run.folder import STAGES, Run
from realm.runtime.distributed import local_device
from realm.text.tokenizer import tokenize
from realm.training.streams import RunStream, run_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTHS = (1, 5)
"""Depths of the recall reported."""
MIN_HELD_OUT = 100
"""With fewer held-out blocks, masked sentences are drawn from all."""


@dataclass(frozen=True)
class MaskedSpanItem:
    """A masked sentence and the passage that states its fact, if it is known."""

    example: MaskedSentence
    passage: int | None
    """Row of the passage, or None."""


class Accuracies(NamedTuple):
    """Percentages of spans that each head predicts correctly."""

    masked: float
    """Masked-language head: all wordpieces are the most probable ones."""
    span: float
    """Span head: the most probable span of the passages is the masked one."""


class RetrievedReading(NamedTuple):
    """What is read in the null passage and the retrieved ones, by example."""

    masked_correct: np.ndarray
    """Whether the masked-language head's prediction with the largest p(z|x) p(y|z,x) is right."""
    span_correct: np.ndarray
    """Whether the span with the largest p(z|x) p(s|z,x) is the masked one."""
    null_mass: np.ndarray
    """p(null|x)."""
    absent_mass: np.ndarray
    """Σ_z p(z|x) p(absent|z,x), the span head's probability that no passage contains the span."""


class _Statement(NamedTuple):
    """An annotated statement: its answer is `text[start:end]`."""

    text: str
    start: int
    end: int
    passage: int | None
    split: object


def load_annotated(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    passages: PreparedCorpus,
    max_query_tokens: int,
    split: str | None = None,
) -> list[MaskedSpanItem]:
    """Read annotated statements from a JSONL file; only those of `split` if it is given.

    A line is `{"text", "answer": {"text", "start"}, "passage": optional id, "split": optional}`.
    Statements whose answer is not aligned with wordpieces or does not fit a query cannot be masked
    and are skipped. Raises UserError naming file and line of invalid records and unknown passages.
    """
    report = BadRecords()
    expected = 'one annotated statement per line, {"text": …, "answer": {"text": …, "start": …}}'
    annotated = list(parsed_lines(path, expected, report, partial(_annotated_statement, passages)))
    if report.total:
        raise UserError(f"{report}\nFix these statements, or remove them.")
    statements = [statement for statement in annotated if split is None or statement.split == split]
    items = []
    encoded = tokenize(tokenizer, [statement.text for statement in statements])
    longest = max_query_tokens - 2
    for (_, start, end, passage, _), (ids, offsets) in zip(statements, encoded, strict=True):
        inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end))
        aligned = len(inside) and offsets[inside[0], 0] == start and offsets[inside[-1], 1] == end
        if aligned and inside[-1] < longest:
            example = MaskedSentence(-1, ids[:longest], int(inside[0]), int(inside[-1]) + 1, 0)
            items.append(MaskedSpanItem(example, passage))
    return items


def _annotated_statement(passages: PreparedCorpus, place: Place, line: bytes) -> _Statement:
    record = parse_object(line)
    text = expect_field(record, "text", str, "the statement")
    span = expect_field(record, "answer", dict, "the statement")
    answer, start = expect_field(span, "text", str, "the answer"), expect_field(span, "start", int, "the answer")
    check_text(text)
    if not answer or start < 0 or not text.startswith(answer, start):
        raise BadRecord("the answer is not in the text at answer.start", f" ({answer!r}, {start})")
    passage, row = record.get("passage"), None
    if passage is not None:
        try:
            row = passages.row_of_id(expect(passage, str, '"passage"'))
        except KeyError:
            raise BadRecord("unknown passage", f": {passage!r} is not the id of a block of the corpus") from None
    return _Statement(text, start, start + len(answer), row, record.get("split"))


def sample_items(run: Run, count: int = 500) -> list[MaskedSpanItem]:
    """Masked sentences drawn from the run's held-out statements, or from all if fewer than
    `MIN_HELD_OUT` are held out; no passage is known for them."""
    longest, span_tokens = run.config.retriever.max_query_tokens - 2, run.config.pretrain.max_span_tokens
    sampler = SpanSampler(run.statements, span_tokens, longest, run.statements.held_out_rows)
    if len(sampler.rows) < MIN_HELD_OUT:
        sampler = SpanSampler(run.statements, span_tokens, longest)
    rng = run_generator(run.config.seed, RunStream.MASKED_SPAN_ITEMS)
    rows = rng.permutation(sampler.rows)[:count]
    return [MaskedSpanItem(sampler.draw(int(row), rng), None) for row in rows]


def masked_accuracy(
    reader: Reader,
    collator: MaskedCollator,
    precision: Precision,
    examples: Sequence[MaskedSentence],
    rows: Sequence[int],
    batch_size: int = 64,
) -> Accuracies:
    """Percentages of spans that the reader's heads predict in full, reading one passage each.

    NULL in `rows` is the null passage, in which the span head finds nothing. NaN without examples.
    """
    if not examples:
        return Accuracies(float("nan"), float("nan"))
    masked_right = span_right = 0
    device = next(reader.parameters()).device
    training = reader.training
    reader.eval()
    with torch.inference_mode(), autocast(device, precision):
        for start in range(0, len(examples), batch_size):
            passages = [[collator.inputs.in_context(row)] for row in rows[start : start + batch_size]]
            batch = collator.masked(examples[start : start + batch_size], passages).to(device)
            hidden = read_joint(reader, batch)
            masked_right += int(predict_masked(reader, batch, hidden).correct_BN.sum())
            span_right += int(predict_spans(reader, batch, hidden).correct_BN.sum())
    reader.train(training)
    return Accuracies(100.0 * masked_right / len(examples), 100.0 * span_right / len(examples))


def retrieval_recall(
    collator: Collator, items: Sequence[MaskedSpanItem], retrieved: np.ndarray, depths: tuple[int, ...] = DEPTHS
) -> dict[str, float]:
    """Recall in percent of items, by depth k.

    `recall@k`: a passage in the top k contains the span. `exact_recall@k`: the passage that states
    the fact is in the top k; only if it is known for all items.
    """
    contains_span = np.array(
        [
            [collator.contains(collator.passage(int(row)), item.example.span_ids) for row in rows]
            for item, rows in zip(items, retrieved[:, : max(depths)], strict=True)
        ]
    )
    figures = {f"recall@{k}": 100.0 * float(contains_span[:, :k].any(1).mean()) for k in depths}
    if all(item.passage is not None for item in items):
        gold = np.array([item.passage for item in items])[:, None]
        figures |= {f"exact_recall@{k}": 100.0 * float((retrieved[:, :k] == gold).any(1).mean()) for k in depths}
    return figures


def evaluate_masked_spans(
    run: Run, items: Sequence[MaskedSpanItem], retriever: Path | None, reader: Reader | None
) -> dict[str, float]:
    """All figures of a saved retriever and a reader, in percent.

    See `retrieval_recall`, `masked_accuracy` and `read_retrieved`; figures of the span head begin
    with `span_`.
    """
    figures: dict[str, float] = {}
    config, precision = run.config.pretrain, run.config.engine.precision
    collator = MaskedCollator(run.collator, config.reader_buckets)
    examples = [item.example for item in items]

    def accuracies(reader: Reader, chosen: Sequence[MaskedSentence], rows: Sequence[int]) -> Accuracies:
        return masked_accuracy(reader, collator, precision, chosen, rows)

    if reader is not None:
        rng = run_generator(run.config.seed, RunStream.MASKED_SPAN_RANDOM_PASSAGES)
        random_rows = rng.choice(run.passages.rows, len(examples)).tolist()
        figures["accuracy_null"] = accuracies(reader, examples, [NULL] * len(examples)).masked
        figures["accuracy_random"] = accuracies(reader, examples, random_rows).masked
        gold = [(item.example, item.passage) for item in items if item.passage is not None]
        if gold:
            from_gold = accuracies(reader, [example for example, _ in gold], [row for _, row in gold])
            figures |= {"accuracy_gold": from_gold.masked, "span_accuracy_gold": from_gold.span}
    if retriever is not None:
        search = FrozenSearch.open(run, retriever, collator)
        found = search(examples, max(DEPTHS) + config.extra_retrieved)
        best = [_without_trivial(run, example, rows) for example, rows in zip(examples, found, strict=True)]
        retrieved = np.array(best)
        figures |= retrieval_recall(run.collator, items, retrieved)
        if reader is not None:
            candidates = retrieved[:, : config.candidates - 1]
            reading = read_retrieved(search, reader, examples, candidates)
            figures["accuracy_retrieved"] = 100.0 * float(reading.masked_correct.mean())
            figures["span_accuracy_retrieved"] = 100.0 * float(reading.span_correct.mean())
            figures["null_mass"] = 100.0 * float(reading.null_mass.mean())
            figures["absent_mass"] = 100.0 * float(reading.absent_mass.mean())
    return figures


def _without_trivial(run: Run, example: MaskedSentence, rows: np.ndarray) -> list[int]:
    """The best retrieved passages, without trivial ones for the run's own statements."""
    count = max(DEPTHS)
    if example.row < 0:
        kept = filled(rows)[:count]
        return kept + [EMPTY] * (count - len(kept))
    return choose_candidates(rows, example, count, run.contexts, run.statements, run.wordpieces)


def read_retrieved(
    search: FrozenSearch,
    reader: Reader,
    examples: Sequence[MaskedSentence],
    retrieved: np.ndarray,
    batch_size: int = 32,
) -> RetrievedReading:
    """Read the null passage and the passages retrieved by `search`, (len(examples), N − 1) rows."""
    parts, retriever = [], search.retriever
    device = next(reader.parameters()).device
    reader.eval()
    rng = np.random.default_rng(0)
    with torch.inference_mode(), autocast(device, search.precision):
        for start in range(0, len(examples), batch_size):
            chosen, rows = examples[start : start + batch_size], retrieved[start : start + batch_size]
            batch = search.collator.realm(chosen, rows, None, 0.0, rng, search.scores(chosen, rows)).to(device)
            query_emb_BD = retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
            passage_emb_UD = retriever.embed_passages(batch.passage_ids_UL, batch.passage_mask_UL)
            score_BN = retriever.score(query_emb_BD, passage_emb_UD[batch.candidate_BN], batch.lexical_BN)
            log_p_z_BN = candidate_log_prior(score_BN, batch.valid_BN)
            hidden = read_joint(reader, batch.masked)
            masked = predict_masked(reader, batch.masked, hidden)
            spans = predict_spans(reader, batch.masked, hidden)
            best_B1 = (log_p_z_BN + masked.best_log_p_BN).argmax(-1, keepdim=True)
            masked_correct_B = masked.correct_BN.gather(1, best_B1)[:, 0]
            span_correct_B = best_span_is_right(log_p_z_BN, spans, batch.masked.read_slot_BN)
            p_BN = log_p_z_BN.exp()
            absent_B = (p_BN * spans.log_p_absent_BN.exp()).sum(-1)
            parts.append([value.cpu().numpy() for value in (masked_correct_B, span_correct_B, p_BN[:, 0], absent_B)])
    return RetrievedReading(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def annotated_items(run: Run, field: str, split: str | None = None) -> list[MaskedSpanItem]:
    """The annotated statements of a field of `data` in the config; empty if it is not set."""
    path = run.data(field)
    longest = run.config.retriever.max_query_tokens
    return [] if path is None else load_annotated(path, run.tokenizer, run.passages, longest, split)


def evaluate_stage_masked_spans(run: Run, stage: str) -> dict[str, float]:
    """Figures of a finished stage's models.

    If the stage has no retriever, that of the latest earlier stage is used.
    """
    items = annotated_items(run, "masked_spans") if run.data("masked_spans") else sample_items(run)
    folder = run.latest("reader", until=stage) if "reader" in STAGES[stage].models else None
    reader = None if folder is None else load_reader(folder).to(local_device())
    return evaluate_masked_spans(run, items, run.latest("retriever", until=stage), reader)
