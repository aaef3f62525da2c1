"""Answer questions and count: exact match, F1, recall of retrieval, and the figures that show where the answers come from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.data import Question, QuestionBatches, load_questions
from finetune.metrics import exact_match, f1, has_answer
from finetune.train import STAGE, embed_queries
from index.frozen import index_for
from index.search import PassageIndex
from realm.config import EvaluateConfig
from realm.errors import UserError
from realm.model import OpenQaModel, QuestionBatch
from realm.objectives import NEVER
from realm.reader import load_reader
from realm.retriever import load_retriever
from realm.run import Run
from realm.telemetry import console, progress
from realm.tokenizer import encode_plain

RECALL_DEPTHS = (1, 5, 20)


@dataclass(frozen=True)
class Answer:
    """One answered question."""

    text: str
    """The answer as it stands in the passage."""
    passage: int
    """Row of the passage it was read from."""
    start: int
    """First character of the answer in the passage's text."""
    probability: float
    """p(z|x) of that passage among those read."""


class Answerer:
    """Retriever, index and reader of a finetuned run, ready to answer."""

    def __init__(self, run: Run, index: PassageIndex | None = None) -> None:
        folder = run.model(STAGE)
        if not folder.exists():
            raise UserError(f"run {run.folder} is not finetuned yet; run `realm finetune --run {run.folder}` first.")
        self.run = run
        self.retriever, _ = load_retriever(folder / "retriever")
        self.reader = load_reader(folder / "reader")
        self.model = OpenQaModel(self.retriever, self.reader).eval()
        self.index = index or self._open_index(folder)
        self.batches = QuestionBatches(run, self.index)

    def _open_index(self, folder: Path) -> PassageIndex:
        """The index the model was finetuned with, or, where it is gone, one built from the same retriever."""
        version = (folder / "index_version").read_text().strip()
        path = self.run.folder / "indexes" / version
        if path.exists():
            return PassageIndex.open(path, self.run.passages.fingerprint, self.retriever.dim)
        source = self.run.latest("retriever", before=STAGE)
        assert source is not None
        return index_for(self.run.folder, source, self.run.config.refresh, self.run.passages)

    def retrieve(self, questions: Sequence[Question], k: int) -> np.ndarray:
        """Rows of the `k` best passages per question, (B, k)."""
        return self.index.search(embed_queries(self.retriever, self.batches.queries(questions)), k)[1]

    def read(self, questions: Sequence[Question], rows: np.ndarray) -> list[Answer]:
        """The best span over the given passages, (B, N) rows."""
        query = self.batches.queries(questions)
        batch = self.batches.batch(questions, query, rows, rows)
        with torch.inference_mode():
            query_emb_BD = self.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
            span_score_BNS, read_score_BN = self.model.span_scores(batch, query_emb_BD)
        return self._best(batch, span_score_BNS, read_score_BN.softmax(-1), rows)

    def _best(self, batch: QuestionBatch, span_score_BNS: torch.Tensor, p_z_BN: torch.Tensor, rows: np.ndarray) -> list[Answer]:
        B, N, S = span_score_BNS.shape
        W = self.batches.width
        flat_B = span_score_BNS.masked_fill(~batch.allowed_QLW.view(B, N, S), NEVER).view(B, -1).argmax(-1)
        texts, places = [], []
        for b, best in enumerate(flat_B.tolist()):
            n, span = divmod(best, S)
            start, width = divmod(span, W)
            places.append((b, n, int(rows[b, n]), start, start + width))
            texts += [self.run.passages.title(int(rows[b, n])), self.run.passages.text(int(rows[b, n]))]
        offsets = [offsets for _, offsets in encode_plain(self.run.tokenizer, texts)]
        answers = []
        for number, (b, n, row, start, end) in enumerate(places):
            text_at = self._text_start(batch, b * N + n)
            title, text = texts[2 * number], texts[2 * number + 1]
            if start >= text_at:
                spots, source = offsets[2 * number + 1], text
                begin, finish = int(spots[start - text_at, 0]), int(spots[end - text_at, 1])
                answers.append(Answer(source[begin:finish], row, begin, float(p_z_BN[b, n])))
            else:
                title_at = int((batch.type_QL[b * N + n] == 0).int().cumprod(0).sum())
                spots = offsets[2 * number]
                answers.append(Answer(title[int(spots[start - title_at, 0]) : int(spots[end - title_at, 1])], row, -1, float(p_z_BN[b, n])))
        return answers

    def _text_start(self, batch: QuestionBatch, q: int) -> int:
        """Place of the first wordpiece of the text: after the second [SEP]."""
        return int((batch.ids_QL[q] == self.run.wordpieces.sep).nonzero()[1]) + 1


def evaluate(run: Run, questions_path: Path | None = None, split: str = "test") -> dict[str, float]:
    """Answer all questions; returns percentages and writes `evaluations/SPLIT.json` with a line per question in `SPLIT.predictions.jsonl`.

    `em`, `f1`: over the top passages; `recall@k`: an answer stands in the top k; `exact_recall@k`: the question's own passage is among them;
    `oracle_em`: the reader given that passage; `random_passage_em`: given a random one.
    """
    path = questions_path or run.data(split)
    if path is None:
        raise UserError(f"no questions given: pass --questions FILE or set data.{split} in the config.")
    answerer = Answerer(run)
    questions = load_questions(path, run)
    config = run.config.evaluate
    figures, predictions = score(answerer, questions, config)
    folder = run.folder / "evaluations"
    folder.mkdir(exist_ok=True)
    name = path.stem if questions_path else split
    (folder / f"{name}.predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
    (folder / f"{name}.json").write_text(json.dumps({"questions": str(path), **figures}, indent=1) + "\n")
    return figures


def score(answerer: Answerer, questions: list[Question], config: EvaluateConfig) -> tuple[dict[str, float], list[dict]]:
    """Figures in percent and one record per question."""
    run, passages = answerer.run, answerer.run.passages
    depths = [k for k in RECALL_DEPTHS if k <= len(answerer.index)]
    rng = np.random.default_rng(run.config.seed + 13)
    records: list[dict] = []
    with progress("evaluate", len(questions), unit="question", every_s=run.config.engine.log_every_s) as ticker:
        for start in range(0, len(questions), config.batch_size):
            batch = questions[start : start + config.batch_size]
            retrieved = answerer.retrieve(batch, max(depths))
            answers = answerer.read(batch, retrieved[:, : config.read])
            random = answerer.read(batch, rng.integers(len(passages), size=(len(batch), 1)))
            gold = [question for question in batch if question.passage is not None]
            oracle = dict(zip([q.id for q in gold], answerer.read(gold, np.array([[q.passage] for q in gold])), strict=True)) if gold else {}
            for question, answer, other, rows in zip(batch, answers, random, retrieved, strict=True):
                holds = [has_answer(passages.text(int(row)), question.answers) for row in rows]
                record = {
                    "id": question.id,
                    "question": question.text,
                    "answers": list(question.answers),
                    "prediction": answer.text,
                    "em": exact_match(answer.text, question.answers, config.normalize_nfd),
                    "f1": f1(answer.text, question.answers, config.normalize_nfd),
                    "passage": passages.ids[answer.passage],
                    "p_passage": round(answer.probability, 4),
                    "random_passage_em": exact_match(other.text, question.answers, config.normalize_nfd),
                    "first_with_answer": holds.index(True) + 1 if True in holds else None,
                }
                if question.passage is not None:
                    place = np.flatnonzero(rows == question.passage)
                    record["rank_of_passage"] = int(place[0]) + 1 if len(place) else None
                    record["oracle_em"] = exact_match(oracle[question.id].text, question.answers, config.normalize_nfd)
                records.append(record)
            ticker.update(len(records))
    figures = {name: percent([record[name] for record in records]) for name in ("em", "f1", "random_passage_em")}
    figures |= {f"recall@{k}": percent([within(record["first_with_answer"], k) for record in records]) for k in depths}
    known = [record for record in records if "oracle_em" in record]
    if known:
        figures["oracle_em"] = percent([record["oracle_em"] for record in known])
        figures |= {f"exact_recall@{k}": percent([within(record["rank_of_passage"], k) for record in known]) for k in depths}
    return figures | {"count": float(len(records))}, records


def within(place: int | None, k: int) -> bool:
    """Whether a rank counted from 1 (None: not found) is at most k."""
    return place is not None and place <= k


def percent(values: Sequence[float]) -> float:
    """Mean as a percentage."""
    return 100.0 * float(np.mean(np.asarray(values, dtype=np.float64)))


def print_figures(figures: dict[str, float]) -> None:
    """One line per figure."""
    for name, value in figures.items():
        console.print(f"  {name:<20} {value:8.1f}" if name != "count" else f"  {'questions':<20} {value:8.0f}")
