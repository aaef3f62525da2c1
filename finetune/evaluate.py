"""Evaluation on questions: exact match, F1, retrieval recall, and reference figures.

Several retrievers can be compared on the same questions: stages of the run, BM25, and
sentence-transformers models.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from finetune.answer import INITIAL, Answerer
from finetune.baselines import PassageRetriever, load_baseline
from finetune.figures import CONVENTIONS, RECALL_DEPTHS, Figures, Intervals, Record, percent, rank_of_first, summarize
from finetune.metrics import answers_in_corpus, exact_match, f1, has_substring
from finetune.patterns import patterns_in_corpus
from finetune.questions import Question, load_questions
from finetune.train_reader import Finetuning
from realm.corpus.collate import filled
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.run.data_config import QuestionSource
from realm.run.folder import STAGES, Run
from realm.runtime.publish import write_json_atomic, write_text_atomic
from realm.runtime.telemetry import console, print_table, progress
from realm.training.sections import EvaluateConfig
from realm.training.streams import RunStream, run_generator

_NAME = re.compile(r"\w[\w.-]{0,99}")
_TABLE = ("em", "f1", "recall@1", "recall@5", "recall@20", "exact_recall@1", "exact_recall@5", "exact_recall@20", "mrr")


def evaluate(
    run: Run, split: str = "test", stage: str = Finetuning.name, compare: Sequence[str] = (), name: str = "test"
) -> dict[str, Figures]:
    """Evaluate the models of `stage`, and each retriever of `compare`, on the questions of a split.

    Returns percentages by retriever, `stage` first. `compare`: stages (`initial` is the retriever
    before any training), `bm25`, or sentence-transformers models. The reader of `stage` reads the
    passages that `bm25` and the models retrieve; other stages use their own reader if they have
    one. Writes the figures and their intervals to `evaluations/NAME.json`, and a line per question
    to `evaluations/NAME.RETRIEVER.predictions.jsonl`. `finetune.figures.CONVENTIONS` defines each
    figure.

    Raises UserError for unknown retrievers, if NAME exists with figures of other questions, and if
    another process is writing it.
    """
    source = run.questions(split)
    if source is None:
        raise UserError(f"data.{split} is not set; set it in the config, or pass --questions FILE.")
    _check_name(name)
    _check_retrievers((stage, *compare))
    with run.evaluation_lock(name):
        return _evaluate(run, source, stage, compare, name)


def _evaluate(run: Run, source: QuestionSource, stage: str, compare: Sequence[str], name: str) -> dict[str, Figures]:
    """`evaluate`, after its arguments are checked."""
    folder = run.folder / "evaluations"
    _check_same_questions(folder / f"{name}.json", source)
    answerer = Answerer(run, stage)
    questions = load_questions(source, run.passages, run.tokenizer, run.config.retriever.max_query_tokens)
    config = run.config.evaluate
    results: dict[str, Figures] = {}
    intervals: dict[str, Intervals] = {}
    folder.mkdir(exist_ok=True)
    # Loaded first, so that a model that cannot be loaded fails before any question is answered.
    names = [other for other in compare if other not in (INITIAL, *STAGES)]
    baselines = {other: load_baseline(other, run) for other in names}
    ceiling = percent(answerable(run.passages, questions, run.config.engine.log_every_s))
    for other, label in _labels((stage, *compare)).items():
        if other in baselines:
            records = answer_all(answerer, baselines[other], questions, config)
        else:
            own = answerer if other == stage else Answerer(run, other)
            records = answer_all(own, own, questions, config, with_reference_passages=other == stage)
        depths = [k for k in RECALL_DEPTHS if k <= config.retrieve]
        results[label], intervals[label] = summarize(records, depths, run.config.seed)
        results[label]["ceiling"] = ceiling
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text_atomic(folder / f"{name}.{label}.predictions.jsonl", text)
    report = {
        "questions": source.path,
        "count": len(questions),
        "passages": len(run.passages),
        "conventions": CONVENTIONS | {"nfd": config.normalize_nfd},
        "figures": results,
        "intervals": intervals,
    }
    write_json_atomic(folder / f"{name}.json", report)
    return results


def _check_name(name: str) -> None:
    """Raises UserError for a name that cannot be part of a file name."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name[:50]!r} cannot be used in a file name; use at most 100 letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit."
        )


def _check_retrievers(names: Sequence[str]) -> None:
    """Raise UserError for a name that is neither a stage nor BM25 nor a model."""
    for name in names:
        if name not in (INITIAL, "bm25", *STAGES) and not Path(name).exists() and "/" not in name:
            stages = ", ".join((INITIAL, *STAGES))
            raise UserError(
                f"{name!r} is not a retriever; give a stage ({stages}), bm25, or a sentence-transformers model."
            )


def _labels(retrievers: Sequence[str]) -> dict[str, str]:
    """A label for each retriever: the stage's name, or the shortest unique end of its path."""
    distinct = list(dict.fromkeys(retrievers))
    for parts in range(1, 1 + max(len(Path(name).parts) for name in distinct)):
        labels = {name: "-".join(part.strip("/") for part in Path(name).parts[-parts:]) for name in distinct}
        if len(set(labels.values())) == len(distinct):
            break
    return labels


def _check_same_questions(path: Path, source: QuestionSource) -> None:
    """Raise UserError if `path` contains the figures of other questions."""
    try:
        existing = json.loads(path.read_text())["questions"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if existing != source.path:
        raise UserError(
            f"{path} contains the figures of {existing}; choose another name for {source.path} with --name."
        )


def answerable(passages: PreparedCorpus, questions: Sequence[Question], log_every_s: float) -> np.ndarray:
    """Whether any passage contains an answer to each question, (questions,) bool."""
    found = np.zeros(len(questions), dtype=bool)
    plain = [number for number, question in enumerate(questions) if not question.is_pattern]
    patterns = [number for number, question in enumerate(questions) if question.is_pattern]
    if plain:
        with progress("search for answers", len(passages), unit="passage", every_s=log_every_s) as ticker:

            def texts() -> Iterator[str]:
                for row in passages.rows.tolist():
                    ticker.update(row + 1)
                    yield passages.text(row)

            found[plain] = answers_in_corpus(texts(), [questions[number].answers for number in plain])
    if patterns:
        every = [passages.text(row) for row in passages.rows.tolist()]
        found[patterns] = patterns_in_corpus(every, [questions[number].pattern for number in patterns])
    return found


def answer_all(
    answerer: Answerer,
    retriever: PassageRetriever,
    questions: Sequence[Question],
    config: EvaluateConfig,
    with_reference_passages: bool = False,
) -> list[Record]:
    """A record per question: the retrieved passages, the answer and its figures.

    `with_reference_passages`: also answer from a random passage, and from the question's own
    passage if it is known.
    """
    run, passages = answerer.run, answerer.run.passages
    depth = min(config.retrieve, len(passages.rows))
    rng = run_generator(run.config.seed, RunStream.EVALUATION_RANDOM_PASSAGES)
    records: list[Record] = []
    with progress("evaluate", len(questions), unit="question", every_s=run.config.engine.log_every_s) as ticker:
        for start in range(0, len(questions), config.batch_size):
            batch = questions[start : start + config.batch_size]
            retrieved = retriever.retrieve(batch, depth)
            rows = [_retrieval(answerer, question, found) for question, found in zip(batch, retrieved, strict=True)]
            if answerer.model is not None:
                _read(answerer, batch, retrieved[:, : config.read], rows, config)
                if with_reference_passages:
                    _read(answerer, batch, rng.choice(passages.rows, (len(batch), 1)), rows, config, "random_passage_")
                    _read_own_passages(answerer, batch, rows, config)
            records += rows
            ticker.update(len(records))
    return records


def _retrieval(answerer: Answerer, question: Question, rows: np.ndarray) -> Record:
    """A question's record with the retrieved passages and the ranks of the first hits."""
    passages = answerer.run.passages
    found = filled(rows)
    hits = [answerer.collator.contains_answer(question, row) for row in found]
    substrings = hits if question.is_pattern else [has_substring(passages.text(row), question.answers) for row in found]
    record: Record = {
        "id": question.id,
        "question": question.text,
        "answers": list(question.answers),
        "retrieved": [passages.ids[row] for row in found],
        "rank_of_answer": rank_of_first(hits),
        "rank_of_substring": rank_of_first(substrings),
    }
    if question.document is not None:
        record["rank_of_document"] = rank_of_first([passages.document(row) == question.document for row in found])
    return record


def _read_own_passages(
    answerer: Answerer, questions: Sequence[Question], records: Sequence[Record], config: EvaluateConfig
) -> None:
    """Add the figures of answers from the questions' own passages, if known, to the records."""
    known = [number for number, question in enumerate(questions) if question.passage is not None]
    if known:
        own = np.array([[questions[number].passage] for number in known])
        chosen = [questions[number] for number in known]
        _read(answerer, chosen, own, [records[number] for number in known], config, "oracle_")


def _read(
    answerer: Answerer,
    questions: Sequence[Question],
    rows: np.ndarray,
    records: Sequence[Record],
    config: EvaluateConfig,
    prefix: str = "",
) -> None:
    """Add the answers from the given passages to the records; `prefix`: of the figures' names."""
    for question, answer, record in zip(questions, answerer.read(questions, rows), records, strict=True):
        if question.is_pattern:
            right = question.pattern.is_answer(answer.text)
        else:
            right = exact_match(answer.text, question.answers, config.normalize_nfd)
        record[f"{prefix}em"] = right
        if not prefix:
            if not question.is_pattern:
                record["f1"] = f1(answer.text, question.answers, config.normalize_nfd)
            passage = None if answer.passage is None else answerer.run.passages.ids[answer.passage]
            record |= {"prediction": answer.text, "passage": passage, "p_passage": round(answer.probability, 4)}


def print_results(run: Run, results: dict[str, Figures], name: str) -> None:
    """Print a table of means and intervals with a row per retriever, and the names of the files."""
    report = json.loads((run.folder / "evaluations" / f"{name}.json").read_text())
    columns = [key for key in _TABLE if any(key in figures for figures in results.values())]
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
    title = f"{report['count']:,} questions over {report['passages']:,} passages, percent with 95 % intervals"
    print_table(title, ["retriever", *columns], rows)
    first = next(iter(results.values()))
    named = {
        "ceiling": "ceiling (answer in any passage)",
        "oracle_em": "EM from the question's own passage",
        "random_passage_em": "EM from a random passage",
    }
    console.print("  " + "; ".join(f"{title} {first[key]:.1f}" for key, title in named.items() if key in first))
    console.print(
        f"  figures and conventions: {run.folder}/evaluations/{name}.json; a line per question: "
        f"{name}.*.predictions.jsonl in the same folder"
    )
