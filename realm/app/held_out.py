"""The figures of a finished stage on the held-out questions, without labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.answer import Answerer
from finetune.metrics import exact_match, f1
from finetune.questions import Question
from index.fusion import open_lexical
from index.measurements import read_measurement
from pretrain.held_out import measure_retriever
from pretrain.held_out_questions import HeldOutQuestions, held_out_questions
from pretrain.masking import MaskedSentence
from realm.corpus.prepared import PreparedCorpus
from realm.run.folder import STAGES, Run
from realm.run.initial import build_initial_retriever
from realm.runtime.bootstrap import bootstrap_interval
from realm.text.tokenizer import tokenize

DEPTHS = (1, 5, 20)
"""Depths of the recall."""
MAX_READ = 300
"""Maximum number of questions that are answered by the reader."""
CONVENTIONS = {
    "questions": "made from sentences of held-out documents, at most held_out.questions",
    "source_recall@k": "the passage of the question's sentence is in the top k of held_out.passages passages",
    "supporting_recall@k": "another passage with the answer and a second entity of the question is in the top k, "
    "without the passage of the sentence; only questions with such a passage",
    "mrr": "mean reciprocal rank",
    "fused": "the inner product plus BM25, by fusion.method, or by the best weight if it is none",
    "source_em": "the reader's answer from the passage of the sentence; SQuAD normalization",
    "em": "its answer from the evaluate.read passages retrieved from the whole corpus",
    "interval": "95 % percentile bootstrap over questions, 1,000 resamples",
}

Figures = dict[str, dict[str, Any]]


def held_out_figures(run: Run, stage: str) -> Figures:
    """Figures in percent and intervals of a finished stage's models: `dense`, `bm25` and `fused`
    retrieval, and `reader` if the stage has one. Empty with too few held-out questions.

    If the stage has no retriever, that of the latest earlier stage is used.
    """
    measured = measure_retriever(run, run.latest("retriever", until=stage) or build_initial_retriever(run))
    if measured is None:
        return {}
    values = retrieval_values(measured["ranks"])
    if "reader" in STAGES[stage].models:
        values["reader"] = _reader_values(run, stage)
    means = {way: {name: 100.0 * float(np.mean(column)) for name, column in of.items()} for way, of in values.items()}
    intervals = {way: {name: _interval(column) for name, column in of.items()} for way, of in values.items()}
    return {
        "means": means,
        "intervals": intervals,
        "counts": {"questions": measured["count"], "supporting": len(values["dense"]["supporting_mrr"])},
        "weight": {"tuned": measured["weight"]},
        "conventions": CONVENTIONS,
    }


def figures_before_training(run: Run) -> dict[str, dict[str, float]]:
    """Retrieval figures of the retriever before any training, if it was measured."""
    folder = run.folder / "initial" / "retriever"
    if not folder.exists() or read_measurement(run.folder, folder) is None:
        return {}
    measured = measure_retriever(run, folder)
    values = {} if measured is None else retrieval_values(measured["ranks"])
    return {way: {name: 100.0 * float(np.mean(column)) for name, column in of.items()} for way, of in values.items()}


def retrieval_values(ranks: Mapping[str, Mapping[str, Sequence[int | None]]]) -> dict[str, dict[str, np.ndarray]]:
    """Recall and reciprocal rank of each question, by way of scoring and figure; no figure of a
    target that no question has."""
    values: dict[str, dict[str, np.ndarray]] = {}
    for target, by_way in ranks.items():
        for way, of in by_way.items():
            rank_B = np.array([rank for rank in of if rank is not None])
            if len(rank_B):
                recalls = {f"{target}_recall@{k}": (rank_B <= k).astype(float) for k in DEPTHS}
                values.setdefault(way, {}).update({**recalls, f"{target}_mrr": 1.0 / rank_B})
    return values


def _interval(values: np.ndarray) -> list[float]:
    low, high = bootstrap_interval(values)
    return [100.0 * low, 100.0 * high]


def _reader_values(run: Run, stage: str) -> dict[str, np.ndarray]:
    """EM and F1 of each question, from its source and from retrieved passages."""
    asked = held_out_questions(run, open_lexical(run))
    questions = as_questions(run, asked)[:MAX_READ]
    answerer, config = Answerer(run, stage), run.config.evaluate
    values: dict[str, list[float]] = {}
    for start in range(0, len(questions), config.batch_size):
        batch = questions[start : start + config.batch_size]
        rows = {"": answerer.retrieve(batch, min(config.read, len(run.passages.rows)))}
        if all(question.passage is not None for question in batch):
            rows["source_"] = np.array([[question.passage] for question in batch])
        for prefix, row_BN in rows.items():
            for question, answer in zip(batch, answerer.read(batch, row_BN), strict=True):
                em = exact_match(answer.text, question.answers, config.normalize_nfd)
                values.setdefault(f"{prefix}em", []).append(em)
                values.setdefault(f"{prefix}f1", []).append(f1(answer.text, question.answers, config.normalize_nfd))
    return {name: np.array(column, float) for name, column in values.items()}


def as_questions(run: Run, asked: HeldOutQuestions) -> list[Question]:
    """Held-out questions with the text of their answers, for a reader."""
    questions = []
    for number, (example, row) in enumerate(zip(asked.examples, asked.source, strict=True)):
        assert example.question is not None
        answer, known = answer_text(run, example), row >= 0
        questions.append(
            Question(
                f"held-out-{number}",
                str(run.tokenizer.decode(example.question)),
                (answer,),
                example.question,
                (example.span_ids,),
                row if known else None,
                run.passages.document(row) if known else None,
            )
        )
    return questions


def answer_text(run: Run, example: MaskedSentence) -> str:
    """The answer as it is written in its block."""
    corpus: PreparedCorpus = run.statements
    text, sentence = corpus.text(example.row), example.sentence_ids
    ((ids, offsets),) = tokenize(run.tokenizer, [text])
    (at, *_) = run.wordpieces.find(ids, sentence, whole_words=False)
    return text[offsets[at + example.start, 0] : offsets[at + example.end - 1, 1]]
