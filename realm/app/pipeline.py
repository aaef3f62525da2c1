"""`realm run`: all stages in order, masked-span evaluation after each, and a summary at the end."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune.answer import Answerer
from finetune.ask import print_answer
from finetune.evaluate import evaluate
from finetune.questions import load_questions
from finetune.train_reader import Finetuning
from pretrain.collate import MaskedCollator
from pretrain.masked_span_eval import annotated_items, evaluate_stage_masked_spans, masked_accuracy, read_retrieved
from pretrain.realm import LiveRealmPretraining
from pretrain.search import FrozenSearch
from realm.app.checks import check_inputs
from realm.app.corpus import prepare
from realm.app.held_out import Figures, figures_before_training, held_out_figures
from realm.app.stages import train
from realm.corpus.collate import NULL
from realm.errors import UserError
from realm.models.reader import load_reader
from realm.run.config import RealmConfig
from realm.run.curves import draw_curves
from realm.run.folder import STAGES, Run
from realm.run.report import print_held_out, print_next, print_summary
from realm.runtime.distributed import local_device, world_size
from realm.runtime.publish import read_json, write_json_atomic
from realm.runtime.telemetry import console, read_metrics

_SUMMARY_FIGURES = (
    "em", "f1", "recall@1", "recall@5", "recall@20", "exact_recall@1", "exact_recall@5", "ceiling", "random_passage_em",
    "oracle_em",
)  # fmt: skip
_MASKED_SPAN_STAGES = ("ict", "reader_pretraining", "pretrain")
"""Stages after which masked spans are evaluated."""
_HELD_OUT_FIGURES = ("source_recall@5", "supporting_recall@5", "source_em", "em")
_RECALL_STAGES = {"ict": "ict", "pretrain": "realm"}
"""Stages whose masked-span recall is in the summary, and their names there."""


def run_all(config: RealmConfig, resume: bool = False) -> None:
    """Run every stage whose `steps` is not 0 and evaluate; write and print a summary.

    Also draws `curves.png` and prints a few answers. Raises UserError if the run was already
    started, unless `resume`, and if another process is training it.
    """
    if world_size() > 1:
        raise UserError(
            "realm run starts a single process; run `realm prepare` without a launcher, and each stage with it."
        )
    if (Path(config.run) / "config.yaml").exists() and not resume:
        raise UserError(
            f"run folder {config.run} already exists; rerun with --resume to continue, "
            "or choose another folder with --run."
        )
    for name in ("finetune_retriever", "finetune"):
        steps = getattr(config, name).steps
        if steps and config.data.train is None:
            raise UserError(
                f"{name}.steps is {steps}, but data.train is not set; set data.train, or set {name}.steps to 0."
            )
    began = time.monotonic()
    console.print("prepare", style="bold")
    prepare(config)
    stage_times = {"prepare": time.monotonic() - began}
    run = Run.create(config)
    check_inputs(run)
    with run.train_lock():
        _run_stages(run, resume, stage_times)


def _run_stages(run: Run, resume: bool, stage_times: dict[str, float]) -> None:
    """The stages and evaluations of `run_all`; adds the seconds of each stage to `stage_times`."""
    config = run.config
    masked_spans: dict[str, dict[str, float]] = {}
    held_out: dict[str, Figures] = {}
    for name in STAGES:
        if getattr(config, name).steps == 0:
            continue
        console.print(name, style="bold")
        train(run, name, resume, _open_stage(name))
        stage_times[name] = run.seconds(name)
        if name in _MASKED_SPAN_STAGES:
            masked_spans[name] = _cached(run, f"masked-spans-{name}", partial(evaluate_stage_masked_spans, run, name))
            held_out[name] = _cached(run, f"held-out-{name}", partial(held_out_figures, run, name))
    questions: dict[str, float] = {}
    if run.finished(Finetuning.name) and run.questions("test"):
        console.print("evaluate", style="bold")
        began = time.monotonic()
        questions = evaluate(run)[Finetuning.name]
        stage_times["evaluate"] = time.monotonic() - began
    closed_book = _cached(run, "closed-book", partial(closed_book_accuracy, run)) if run.data("closed_book") else {}
    null = {}
    if run.data("unsupported") and run.finished("pretrain"):
        null = _cached(run, "null-passage", partial(null_masses, run))
    summary = _summarize(run, stage_times, masked_spans, held_out, questions | closed_book, null)
    write_json_atomic(run.folder / "summary.json", summary)
    draw_curves(run.folder, null)
    print_held_out(figures_before_training(run), held_out)
    print_summary(run, stage_times, masked_spans, questions, summary)
    if questions:
        _print_some_answers(run)
    print_next(run)


def _open_stage(name: str) -> Callable[[Run], Any] | None:
    """REALM pretraining starts a refresher; None: the function of the registry."""
    return partial(LiveRealmPretraining.open, with_refresher=True) if name == LiveRealmPretraining.name else None


def _print_some_answers(run: Run, count: int = 3) -> None:
    """Print the answers to some of the test questions."""
    source = run.questions("test")
    assert source is not None
    answerer = Answerer(run)
    questions = load_questions(source, run.passages, run.tokenizer, run.config.retriever.max_query_tokens, quiet=True)
    console.print("Sample answers to test questions", style="bold")
    numbers = np.random.default_rng(run.config.seed).choice(len(questions), min(count, len(questions)), replace=False)
    for number in numbers.tolist():
        print_answer(answerer, questions[number].text, run.config.evaluate.read)


def _cached(run: Run, name: str, measure: Callable[[], dict]) -> dict:
    """The result of `measure`, computed once per run and kept in `evaluations/NAME.json`."""
    path = run.folder / "evaluations" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json_atomic(path, measure())
    figures = read_json(path, remedy := "remove it, and rerun with --resume to measure again")
    if not isinstance(figures, dict):
        raise UserError(f"{path} contains no figures; {remedy}.")
    return figures


def closed_book_accuracy(run: Run) -> dict[str, float]:
    """Closed-book cloze test: accuracy on the test questions' facts without any passage.

    The facts are statements with the answer masked, and are read with the null passage. Empty if
    the run has no reader.
    """
    reader = run.latest("reader", before=Finetuning.name)
    if reader is None:
        return {}
    examples = [item.example for item in annotated_items(run, "closed_book", split="test")]
    collator = MaskedCollator(run.collator, run.config.pretrain.reader_buckets)
    loaded, precision = load_reader(reader).to(local_device()), run.config.engine.precision
    accuracies = masked_accuracy(loaded, collator, precision, examples, [NULL] * len(examples))
    return {"closed_book_accuracy": accuracies.masked}


def null_masses(run: Run) -> dict[str, list[float]]:
    """p(null|x) of statements whose fact is in a passage (`known`) or in none (`unsupported`)."""
    config, folder = run.config.pretrain, run.model("pretrain")
    collator = MaskedCollator(run.collator, config.reader_buckets)
    reader = load_reader(folder / "reader").to(local_device())
    search = FrozenSearch.open(run, folder / "retriever", collator)
    masses = {}
    for name, field in (("known", "masked_spans"), ("unsupported", "unsupported")):
        examples = [item.example for item in annotated_items(run, field)]
        if examples:
            retrieved = search(examples, config.candidates - 1)
            reading = read_retrieved(search, reader, examples, retrieved)
            masses[name] = reading.null_mass.tolist()
    return masses


def _summarize(
    run: Run,
    stage_times: dict[str, float],
    masked_spans: dict[str, dict[str, float]],
    held_out: dict[str, Figures],
    questions: dict[str, float],
    null: dict[str, list[float]],
) -> dict[str, float]:
    """The content of `summary.json`: the measured figures, in percent and seconds."""
    metrics = read_metrics(run.folder / "metrics.jsonl")
    versions = {row.get("index") for row in metrics.get("pretrain", [])}
    summary = {name: questions[name] for name in _SUMMARY_FIGURES if name in questions}
    summary |= {name: value for name, value in questions.items() if name == "closed_book_accuracy"}
    for stage, short in _RECALL_STAGES.items():
        recalls = {name: value for name, value in masked_spans.get(stage, {}).items() if "recall@" in name}
        summary |= {f"masked_span_{name}_{short}": value for name, value in recalls.items()}
    way = "dense" if run.config.fusion.method == "none" else "fused"
    for stage, measured in held_out.items():
        figures = measured.get("means", {})
        chosen = {**figures.get(way, {}), **figures.get("reader", {})}
        summary |= {f"held_out_{name}_{stage}": chosen[name] for name in _HELD_OUT_FIGURES if name in chosen}
    summary |= {f"null_mass_{name}": 100.0 * float(np.mean(values)) for name, values in null.items()}
    summary["index_versions_swapped"] = max(0, len(versions) - 1)
    summary["train_seconds"] = sum(seconds for stage, seconds in stage_times.items() if stage in STAGES)
    summary["total_seconds"] = sum(stage_times.values())
    summary["seed"] = run.config.seed
    return {name: round(value, 2) for name, value in summary.items()}
