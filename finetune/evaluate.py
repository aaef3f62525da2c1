"""Answer questions and count: exact match, F1, recall of retrieval, and the figures that show where
the answers come from.

Several retrievers can be put beside each other on the same questions: stages of the run, BM25, any
sentence-transformers model.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.answer import INITIAL, Answerer
from finetune.baselines import PassageRetriever, load_baseline
from finetune.metrics import (
    answers_in_corpus,
    bootstrap_interval,
    exact_match,
    f1,
    has_substring,
    pattern_match,
    patterns_in_corpus,
)
from finetune.questions import Question, load_questions
from finetune.train_reader import STAGE
from realm.errors import UserError
from realm.run.config import QuestionSource
from realm.run.folder import STAGES, Run
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import console, print_table, progress
from realm.training.sections import EvaluateConfig

RECALL_DEPTHS = (1, 5, 20)
_CONVENTIONS = {
    "em": "SQuAD normaliser; a pattern must match the whole prediction",
    "recall@k": "an answer stands in the top k by whole tokens (DPR)",
    "substring_recall@k": "an answer stands in the top k as a substring (ORQA)",
    "exact_recall@k": "the document the question was asked about is in the top k; questions without one are left out",
    "mrr": "mean reciprocal rank of that document, 0 beyond the passages retrieved",
    "ceiling": "an answer stands anywhere in the corpus, by the rule of recall@k",
    "interval": "95 % percentile bootstrap over questions, 1,000 resamples",
}

Figures = dict[str, float]
Record = dict[str, object]


def evaluate(
    run: Run, split: str = "test", stage: str = STAGE, compare: Sequence[str] = (), name: str = "test"
) -> dict[str, Figures]:
    """Answer the questions of a split with what `stage` left, and with each retriever of `compare`;
    returns percentages by retriever, `stage` first.

    `compare` names stages (`initial` is the retriever before any training), `bm25`, or
    sentence-transformers models. What they retrieve is read by the model of `stage`, other stages
    read for themselves where they have a reader. `evaluations/NAME.json` receives the figures with
    their intervals, `NAME.RETRIEVER.predictions.jsonl` a line per question. See `_CONVENTIONS` for
    what each figure counts.
    """
    source = run.questions(split)
    if source is None:
        raise UserError(f"no questions given: pass --questions FILE or set data.{split} in the config.")
    for other in (stage, *compare):
        if other not in (INITIAL, "bm25", *STAGES) and not Path(other).exists() and "/" not in other:
            stages = ", ".join((INITIAL, *STAGES))
            raise UserError(
                f"{other!r} is no retriever to evaluate: name a stage ({stages}), bm25, or a sentence-transformers model."
            )
    folder = run.folder / "evaluations"
    _refuse_other(folder / f"{name}.json", source)
    answerer = Answerer(run, stage)
    questions = load_questions(source, run)
    config = run.config.evaluate
    results: dict[str, Figures] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    folder.mkdir(exist_ok=True)
    baselines = {
        other: load_baseline(other, run) for other in compare if other not in (INITIAL, *STAGES)
    }  # what cannot be loaded is refused first
    ceiling = percent(stands_in_corpus(run, questions))
    for other, label in _labels((stage, *compare)).items():
        if other in baselines:
            records = answer_all(answerer, baselines[other], questions, config, floors=False)
        else:
            reading = answerer if other == stage else Answerer(run, other)
            records = answer_all(reading, reading, questions, config, floors=other == stage)
        results[label], intervals[label] = figures_of(records, config, run.config.seed)
        results[label]["ceiling"] = ceiling
        (folder / f"{name}.{label}.predictions.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
        )
    report = {
        "questions": source.path,
        "count": len(questions),
        "passages": len(run.passages),
        "conventions": _CONVENTIONS | {"nfd": config.normalize_nfd},
        "figures": results,
        "intervals": intervals,
    }
    write_json_atomic(folder / f"{name}.json", report)
    return results


def _labels(retrievers: Sequence[str]) -> dict[str, str]:
    """A label for each retriever: a stage's name, of a path its last part, or as many as tell it
    from the others."""
    distinct = list(dict.fromkeys(retrievers))
    for parts in range(1, 1 + max(len(Path(name).parts) for name in distinct)):
        labels = {name: "-".join(part.strip("/") for part in Path(name).parts[-parts:]) for name in distinct}
        if len(set(labels.values())) == len(distinct):
            break
    return labels


def _refuse_other(path: Path, source: QuestionSource) -> None:
    """Raises UserError where figures of other questions stand under this name."""
    try:
        there = json.loads(path.read_text())["questions"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if there != source.path:
        raise UserError(f"{path} holds the figures of {there}; give those of {source.path} another name with --name.")


def stands_in_corpus(run: Run, questions: Sequence[Question]) -> np.ndarray:
    """Whether an answer of each question stands in any passage, (questions,) bool."""
    passages = run.passages
    found = np.zeros(len(questions), dtype=bool)
    plain = [number for number, question in enumerate(questions) if not question.is_pattern]
    patterns = [number for number, question in enumerate(questions) if question.is_pattern]
    if plain:
        with progress(
            "look for answers", len(passages), unit="passage", every_s=run.config.engine.log_every_s
        ) as ticker:

            def texts():  # type: ignore[no-untyped-def]
                for row in passages.rows.tolist():
                    ticker.update(row + 1)
                    yield passages.text(row)

            found[plain] = answers_in_corpus(texts(), [questions[number].answers for number in plain])
    if patterns:
        every = [passages.text(row) for row in passages.rows.tolist()]
        found[patterns] = patterns_in_corpus(every, [questions[number].pattern for number in patterns])
    return found


def answer_all(
    answerer: Answerer, retriever: PassageRetriever, questions: Sequence[Question], config: EvaluateConfig, floors: bool
) -> list[Record]:
    """A record per question: what was retrieved, what was read; with `floors` also from the own
    passage and from a random one."""
    run, passages = answerer.run, answerer.run.passages
    depth = min(config.retrieve, len(passages.rows))
    rng = np.random.default_rng(run.config.seed + 13)
    records: list[Record] = []
    with progress("evaluate", len(questions), unit="question", every_s=run.config.engine.log_every_s) as ticker:
        for start in range(0, len(questions), config.batch_size):
            batch = questions[start : start + config.batch_size]
            retrieved = retriever.retrieve(batch, depth)
            rows = [_retrieval(answerer, question, found) for question, found in zip(batch, retrieved, strict=True)]
            if answerer.model is not None:
                _read(answerer, batch, retrieved[:, : config.read], rows, config)
                if floors:
                    _read(answerer, batch, rng.choice(passages.rows, (len(batch), 1)), rows, config, "random_passage_")
                    gold = [number for number, question in enumerate(batch) if question.passage is not None]
                    if gold:
                        own = np.array([[batch[number].passage] for number in gold])
                        _read(
                            answerer,
                            [batch[number] for number in gold],
                            own,
                            [rows[number] for number in gold],
                            config,
                            "oracle_",
                        )
            records += rows
            ticker.update(len(records))
    return records


def _retrieval(answerer: Answerer, question: Question, rows: np.ndarray) -> Record:
    passages = answerer.run.passages
    found = [int(row) for row in rows if row >= 0]
    holds = [answerer.batches.holds(question, row) for row in found]
    substring = holds if question.is_pattern else [has_substring(passages.text(row), question.answers) for row in found]
    record: Record = {
        "id": question.id,
        "question": question.text,
        "answers": list(question.answers),
        "retrieved": [passages.ids[row] for row in found],
        "rank_of_answer": _first(holds),
        "rank_of_substring": _first(substring),
    }
    if question.document is not None:
        record["rank_of_document"] = _first([passages.document(row) == question.document for row in found])
    return record


def _read(
    answerer: Answerer,
    questions: Sequence[Question],
    rows: np.ndarray,
    records: Sequence[Record],
    config: EvaluateConfig,
    kind: str = "",
) -> None:
    """Add the answers read from the given passages to the records, their figures under names
    that begin with `kind`."""
    for question, answer, record in zip(questions, answerer.read(questions, rows), records, strict=True):
        if question.is_pattern:
            right = pattern_match(answer.text, question.pattern)
        else:
            right = exact_match(answer.text, question.answers, config.normalize_nfd)
        record[f"{kind}em"] = right
        if not kind:
            if not question.is_pattern:
                record["f1"] = f1(answer.text, question.answers, config.normalize_nfd)
            passage = None if answer.passage is None else answerer.run.passages.ids[answer.passage]
            record |= {"prediction": answer.text, "passage": passage, "p_passage": round(answer.probability, 4)}


def figures_of(
    records: Sequence[Record], config: EvaluateConfig, seed: int
) -> tuple[Figures, dict[str, tuple[float, float]]]:
    """Means in percent, each over the records that have the value, and their bootstrap intervals."""
    depths = [k for k in RECALL_DEPTHS if k <= config.retrieve]
    columns: dict[str, list[float]] = {}
    for record in records:
        for key, value in values_of(record, depths).items():
            columns.setdefault(key, []).append(value)
    figures = {key: percent(values) for key, values in columns.items()}
    intervals = {
        key: tuple(100.0 * end for end in bootstrap_interval(np.array(values), seed)) for key, values in columns.items()
    }
    return figures | {"count": float(len(records))}, intervals  # type: ignore[return-value]


def values_of(record: Record, depths: Sequence[int]) -> dict[str, float]:
    """The figures of one question, each between 0 and 1; those that its record has."""
    values: dict[str, float] = {
        key: float(record[key])  # type: ignore[arg-type]
        for key in ("em", "f1", "random_passage_em", "oracle_em")
        if key in record
    }
    for key, title in (
        ("rank_of_answer", "recall"),
        ("rank_of_substring", "substring_recall"),
        ("rank_of_document", "exact_recall"),
    ):
        if key in record:
            values |= {f"{title}@{k}": float(_within(record[key], k)) for k in depths}  # type: ignore[arg-type]
    if "rank_of_document" in record:
        rank = record["rank_of_document"]
        values["mrr"] = 0.0 if rank is None else 1.0 / float(rank)  # type: ignore[arg-type]
    return values


def _first(hits: Sequence[bool]) -> int | None:
    return hits.index(True) + 1 if True in hits else None


def _within(rank: int | None, k: int) -> bool:
    """Whether a rank counted from 1 (None: not found) is at most k."""
    return rank is not None and rank <= k


def percent(values: Sequence[float] | np.ndarray) -> float:
    """Mean as a percentage."""
    return 100.0 * float(np.mean(np.asarray(values, dtype=np.float64)))


def print_results(run: Run, results: dict[str, Figures], name: str) -> None:
    """One table, a row per retriever, intervals behind the means; where the records lie."""
    report = json.loads((run.folder / "evaluations" / f"{name}.json").read_text())
    wanted = (
        "em",
        "f1",
        "recall@1",
        "recall@5",
        "recall@20",
        "exact_recall@1",
        "exact_recall@5",
        "exact_recall@20",
        "mrr",
    )
    columns = [key for key in wanted if any(key in figures for figures in results.values())]
    rows: list[list[object]] = []
    for label, figures in results.items():
        cells: list[object] = [label]
        for key in columns:
            if key in figures:
                low, high = report["intervals"][label][key]
                cells.append(f"{figures[key]:.1f} [{low:.1f}, {high:.1f}]")
            else:
                cells.append(None)
        rows.append(cells)
    first = next(iter(results.values()))
    print_table(
        f"{report['count']:,} questions over {report['passages']:,} passages, percent with 95 % intervals",
        ["retriever", *columns],
        rows,
    )
    extra = [f"{title} {first[key]:.1f}" for key, title in (("ceiling", "ceiling (answer in any passage)"), ("oracle_em", "EM from the own passage"),
             ("random_passage_em", "from a random one")) if key in first]  # fmt: skip
    console.print("  " + "; ".join(extra))
    console.print(
        f"  figures and conventions: {run.folder}/evaluations/{name}.json; a line per question: {name}.*.predictions.jsonl beside it"
    )
