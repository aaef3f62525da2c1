"""All stages in order, and what a person sees at the end. With `cli` the one place that knows
every package."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.answer import Answerer
from finetune.ask import print_answer
from finetune.evaluate import evaluate
from finetune.questions import load_questions
from finetune.train_reader import STAGE, train_finetune
from finetune.train_retriever import train_finetune_retriever
from index.frozen import FROZEN
from index.refresh import refresh
from pretrain.data import NULL
from pretrain.ict import train_ict
from pretrain.masked_span_eval import evaluate_stage_masked_spans, load_annotated, masked_accuracy, read_retrieved
from pretrain.reader_pretraining import train_reader_pretraining
from pretrain.realm import train_realm
from pretrain.search import FrozenSearch
from realm.corpus.documents import read_documents
from realm.corpus.formats import count_ignored, format_of
from realm.corpus.growth import grow_corpus
from realm.corpus.prepare import prepare_corpus
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.models.reader import load_reader
from realm.run.config import RealmConfig
from realm.run.folder import BUILTIN, STAGES, Run, source_path
from realm.run.report import draw_curves, print_next, print_summary
from realm.runtime.distributed import local_device
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import console, progress, read_metrics
from realm.spans.tagger import SpanTagger
from realm.text.tokenizer import obtain_tokenizer


def prepare(config: RealmConfig, skip_bad: bool = False) -> None:
    """Passages and statements to token arrays with salient spans; what is prepared already is
    left as it is."""
    corpus, prepared = config.corpus, Path(config.corpus.prepared)
    sources = {"passages": corpus.passages} | ({} if corpus.statements is None else {"statements": corpus.statements})
    if any(source.path.startswith(BUILTIN) for group in sources.values() for source in group):
        from realm.gazetteer import write_gazetteer

        summary = write_gazetteer(prepared / "gazetteer")
        console.print(
            f"  built-in corpus: {summary.entities} entities, {summary.facts} facts, {summary.passages} passages, {summary.statements} statements"
        )
    skip_bad = skip_bad or corpus.skip_bad
    resolved = {
        kind: [replace(source, path=str(source_path(source.path, prepared))) for source in corpus.limited(group)]
        for kind, group in sources.items()
    }
    for kind, group in resolved.items():
        for source in group:
            told, others = ", told by name or content" if source.format == "auto" else "", count_ignored(source)
            console.print(
                f"  {kind}: {source.path} ({format_of(source)}{told}{f'; {others:,} other files passed over' if others else ''})"
            )

    def texts() -> list[str]:
        return [
            f"{document.title} {document.text}"
            for group in resolved.values()
            for document in read_documents(group, skip_bad)
        ]

    tokenizer = obtain_tokenizer(config.tokenizer, prepared / "tokenizer", texts)
    tagger = SpanTagger.load(config.spans)
    for kind, group in resolved.items():
        with progress(f"prepare {kind}", 1, unit="document", every_s=config.engine.log_every_s) as ticker:
            ready = prepare_corpus(
                group, prepared / kind, tokenizer, corpus.block_tokens, tagger, corpus.num_workers, skip_bad, ticker.of
            )
        console.print(
            f"  {kind}: {len(ready):,} blocks of {ready.manifest['documents']:,} documents, {ready.manifest['spans']:,} salient spans "
            f"({tagger.name}), {ready.manifest['skipped']} records skipped"
        )


def add_documents(
    run: Run, sources: Sequence[SourceConfig], delete: Sequence[str], replace_: bool, skip_bad: bool
) -> None:
    """Grow the run's corpus, then complete the newest index of its newest encoder: only what is new
    is encoded.

    Raises UserError as `realm.corpus.growth.grow_corpus` does, and where no encoder was exported
    yet.
    """
    before, config = run.passages, run.config
    with progress("prepare", 1, unit="document", every_s=config.engine.log_every_s) as ticker:
        prepared, tagger = run.prepared / "passages", SpanTagger.load(config.spans)
        corpus = grow_corpus(
            prepared, sources, delete, replace_, run.tokenizer, tagger, config.corpus.num_workers, skip_bad, ticker.of
        )
    added, gone = len(corpus) - len(before), len(corpus.deleted) - len(before.deleted)
    console.print(f"  {added:,} blocks added, {gone:,} taken away; {len(corpus.rows):,} can be found now")
    stores = [
        store
        for store in (run.folder, *(path.parent for path in (run.folder / FROZEN).glob("*/encoders")))
        if (store / "encoders").is_dir()
    ]
    if not stores:
        console.print("  no encoder was exported yet; the index is built when the first one is")
    for store in stores:
        refresh(store, config.refresh, corpus, once=True, log=lambda line: console.print(f"  {line}"))


def run_all(config: RealmConfig, resume: bool = False) -> None:
    """Every stage whose `steps` is not 0, a probe after each, evaluation, a summary, a picture and
    a few answers.

    Raises UserError for a run that was begun before, unless `resume`.
    """
    if (Path(config.run) / "config.yaml").exists() and not resume:
        raise UserError(f"run folder {config.run} exists; add --resume to go on with it, or give another with --run.")
    for stage in ("finetune_retriever", "finetune"):
        steps = getattr(config, stage).steps
        if steps and config.data.train is None:
            raise UserError(
                f"{stage}.steps is {steps}, but data.train names no questions; name some, or set {stage}.steps to 0."
            )
    stage_times: dict[str, float] = {}
    began = time.monotonic()
    console.print("[bold]prepare[/bold]")
    prepare(config)
    stage_times["prepare"] = time.monotonic() - began
    run = Run.create(config)
    programs = {
        "ict": lambda: train_ict(run, resume),
        "reader_pretraining": lambda: train_reader_pretraining(run, resume),
        "pretrain": lambda: train_realm(run, resume, with_refresher=True),
        "finetune_retriever": lambda: train_finetune_retriever(run, resume),
        "finetune": lambda: train_finetune(run, resume),
    }
    probes: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        if getattr(config, stage).steps == 0:
            continue
        console.print(f"[bold]{stage}[/bold]")
        programs[stage]()
        stage_times[stage] = float((run.model(stage) / "seconds.txt").read_text())
        if stage in ("ict", "reader_pretraining", "pretrain"):
            probes[stage] = cached(
                run, f"masked-spans-{stage}", lambda stage=stage: evaluate_stage_masked_spans(run, stage)
            )  # type: ignore[misc]
    figures: dict[str, float] = {}
    if run.finished("finetune") and run.questions("test"):
        console.print("[bold]evaluate[/bold]")
        began = time.monotonic()
        figures = evaluate(run)[STAGE]
        stage_times["evaluate"] = time.monotonic() - began
    closed_book = cached(run, "closed-book", lambda: closed_book_accuracy(run)) if run.data("closed_book") else {}
    null = (
        cached(run, "null-passage", lambda: null_masses(run))
        if run.data("unsupported") and run.finished("pretrain")
        else {}
    )
    summary = summarize(run, stage_times, probes, figures, closed_book, null)
    write_json_atomic(run.folder / "summary.json", summary)
    draw_curves(run.folder, null)
    print_summary(run, stage_times, probes, figures, summary)
    if figures:
        show_answers(run)
    print_next(run)


def show_answers(run: Run, count: int = 3) -> None:
    """Answer some of the test questions where everyone can see it."""
    source = run.questions("test")
    assert source is not None
    answerer = Answerer(run)
    questions = load_questions(source, run, quiet=True)
    console.print("[bold]Some test questions[/bold]")
    for number in np.random.default_rng(run.config.seed).choice(
        len(questions), min(count, len(questions)), replace=False
    ):
        print_answer(answerer, questions[int(number)].text, run.config.evaluate.read)


def cached(run: Run, name: str, measure: object) -> dict:
    """The result of a measurement, made once a run and kept in `evaluations/NAME.json`."""
    path = run.folder / "evaluations" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json_atomic(path, measure())  # type: ignore[operator]
    return json.loads(path.read_text())


def closed_book_accuracy(run: Run) -> dict[str, float]:
    """Cloze closed book: the test questions' facts as statements, span masked, read with the
    null passage alone."""
    path, reader = run.data("closed_book"), run.latest("reader", before="finetune")
    assert path is not None
    if reader is None:
        return {}
    examples = [item.example for item in load_annotated(path, run, split="test")]
    return {
        "closed_book_accuracy": masked_accuracy(
            load_reader(reader).to(local_device()), run, examples, [NULL] * len(examples)
        )
    }


def null_masses(run: Run) -> dict[str, list[float]]:
    """p(null|x) of every statement whose fact stands in a passage (`known`) and of every one
    whose fact stands in none (`unsupported`)."""
    reader = load_reader(run.model("pretrain") / "reader").to(local_device())
    search = FrozenSearch(run, run.model("pretrain") / "retriever")
    masses = {}
    for name, field in (("known", "masked_spans"), ("unsupported", "unsupported")):
        path = run.data(field)
        if path is not None:
            examples = [item.example for item in load_annotated(path, run)]
            masses[name] = read_retrieved(
                run, search.retriever, reader, examples, search(examples, run.config.pretrain.candidates - 1)
            )[1].tolist()
    return masses


def summarize(
    run: Run,
    stage_times: dict[str, float],
    probes: dict[str, dict[str, float]],
    figures: dict[str, float],
    closed_book: dict[str, float],
    null: dict[str, list[float]],
) -> dict[str, float]:
    """What goes to `summary.json`: shares in percent, times in seconds; a figure that was not
    measured is left out."""
    metrics = read_metrics(run.folder / "metrics.jsonl")
    swaps = Counter(row["index"] for row in metrics.get("pretrain", []))
    summary: dict[str, float] = {
        name: figures[name]
        for name in (
            "em",
            "f1",
            "recall@1",
            "recall@5",
            "recall@20",
            "exact_recall@1",
            "exact_recall@5",
            "ceiling",
            "random_passage_em",
            "oracle_em",
        )
        if name in figures
    }
    summary |= closed_book
    for stage, short in (("ict", "ict"), ("pretrain", "realm")):
        for name in ("recall@1", "recall@5", "exact_recall@1", "exact_recall@5"):
            if name in probes.get(stage, {}):
                summary[f"masked_span_{name}_{short}"] = probes[stage][name]
    summary |= {f"null_mass_{name}": 100.0 * float(np.mean(values)) for name, values in null.items()}
    summary["index_versions_swapped"] = max(0, len(swaps) - 1)
    summary["train_seconds"] = sum(seconds for stage, seconds in stage_times.items() if stage in STAGES)
    summary["total_seconds"] = sum(stage_times.values())
    summary["seed"] = run.config.seed
    return {name: round(value, 2) for name, value in summary.items()}
