"""The programs of a run, one subcommand each: prepare, train, refresh, evaluate, ask."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from realm.app.cli.common import EPILOG, open_run
from realm.errors import UserError

if TYPE_CHECKING:
    from realm.run.folder import Run

_QUESTIONS = (
    "file of questions, or a mapping as in data.train: '{path: rajpurkar/squad, format: datasets, split: validation}'"
)
_FORMAT = "format of --questions: squad, jsonl, qas, webq, trec, timeqa or datasets (default: told by name and content)"


def add_stage_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommands and their options."""

    def add(
        name: str, command: Callable[[argparse.Namespace], None], about: str, source: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=about, description=about, epilog=EPILOG if source else None, allow_abbrev=False
        )
        if source == "config":
            sub.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
            sub.add_argument(
                "--limit",
                type=int,
                metavar="N",
                help="read no more than N documents of each source (corpus.limit), for trying",
            )
        elif source == "run":
            sub.add_argument("--run", type=Path, required=True, help="run folder")
        sub.set_defaults(command=command, takes_overrides=bool(source))
        return sub

    everything = add(
        "run",
        _run,
        "every stage in order, then a table: prepare, ict, reader-pretraining, pretrain, finetune, evaluate",
        "config",
    )
    everything.add_argument("--resume", action="store_true", help="go on with a run that was begun before")
    plan = add("plan", _plan, "time, memory and disk of a run on this machine, from a short calibration", "config")
    plan.add_argument(
        "--passages", type=int, metavar="N", help="blocks of the whole corpus, where it is not prepared yet"
    )
    prepare = add("prepare", _prepare, "corpus to token arrays and salient spans, once", "config")
    prepare.add_argument(
        "--skip-bad", action="store_true", help="leave out records that cannot be used, and count them"
    )
    for name, command, about in (
        ("ict", _ict, "inverse cloze warm start of the retriever"),
        ("reader-pretraining", _reader_pretraining, "teach the reader to read retrieved passages"),
        ("pretrain", _pretrain, "REALM pretraining beside a refresher"),
    ):
        stage = add(name, command, about, "config")
        stage.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
        if name == "pretrain":
            stage.add_argument(
                "--with-refresher", action="store_true", help="start a refresher process beside the trainer"
            )
            stage.add_argument(
                "--replay",
                type=Path,
                metavar="RUN",
                help="search at each step the index that this run, or an earlier attempt of the same, searched",
            )
    refresh = add(
        "refresh",
        _refresh,
        "the asynchronous index refresher: its own process; start, kill and restart it at any time",
        "run",
    )
    refresh.add_argument("--once", action="store_true", help="end as soon as there is nothing left to do")
    for name, about in (
        ("finetune-retriever", "finetune both towers of the retriever on questions with hard negatives"),
        ("finetune", "finetune reader and query tower on questions"),
    ):
        finetune = add(name, _finetune, about, "run")
        finetune.add_argument("--questions", help=f"{_QUESTIONS}; default: data.train of the run's config")
        finetune.add_argument("--format", help=_FORMAT)
        finetune.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
        finetune.set_defaults(stage=name.replace("-", "_"))
    evaluate = add("evaluate", _evaluate, "answer questions and count", "run")
    evaluate.add_argument("--questions", help=f"{_QUESTIONS}; default: those of --split")
    evaluate.add_argument("--format", help=_FORMAT)
    evaluate.add_argument(
        "--name",
        help="name of the result under evaluations/ (default: that of the file or the split, and of the stage)",
    )
    evaluate.add_argument(
        "--stage",
        default="finetune",
        help="stage whose models answer: initial, or a training stage (default: finetune)",
    )
    evaluate.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="RETRIEVER",
        help="put beside: other stages, bm25, sentence-transformers models",
    )
    evaluate.add_argument(
        "--split", choices=("validation", "test"), default="test", help="questions of the run's config (default: test)"
    )
    compare = add("compare", _compare, "two evaluations of the same questions: differences with paired intervals", "")
    compare.add_argument("first", type=Path, help="…predictions.jsonl of one evaluation")
    compare.add_argument("second", type=Path, help="…predictions.jsonl of another, of this or another run")
    ask = add("ask", _ask, "answer one question from the corpus", "run")
    ask.add_argument("question", help="the question, in quotes")
    ask.add_argument("--passages", type=int, default=5, help="passages to read (default: 5)")


def _run(options: argparse.Namespace) -> None:
    from realm.app.pipeline import run_all
    from realm.run.config_file import load_config

    run_all(load_config(options.config, options.overrides), options.resume)


def _plan(options: argparse.Namespace) -> None:
    from realm.app.plan import plan
    from realm.run.config_file import load_config

    plan(load_config(options.config, options.overrides), options.passages)


def _prepare(options: argparse.Namespace) -> None:
    from realm.app.pipeline import prepare
    from realm.run.config_file import load_config

    prepare(load_config(options.config, options.overrides), options.skip_bad)


def _ict(options: argparse.Namespace) -> None:
    from pretrain.ict import train_ict

    train_ict(open_run(options), options.resume)


def _reader_pretraining(options: argparse.Namespace) -> None:
    from pretrain.reader_pretraining import train_reader_pretraining

    train_reader_pretraining(open_run(options), options.resume)


def _pretrain(options: argparse.Namespace) -> None:
    from pretrain.realm import train_realm

    train_realm(open_run(options), options.resume, options.with_refresher, options.replay)


def _refresh(options: argparse.Namespace) -> None:
    from index.refresh import refresh
    from index.workers import Workers
    from realm.run.folder import Run

    run, workers = Run.open(options.run, options.overrides), Workers.join()
    refresh(run.folder, run.config.refresh, run.passages, once=options.once, workers=workers)
    workers.leave()


def _finetune(options: argparse.Namespace) -> None:
    from finetune.train_reader import train_finetune
    from finetune.train_retriever import train_finetune_retriever

    run = _asked(open_run(options), options, "train")
    if options.questions is not None and run.finished(options.stage):
        raise UserError(
            f"run {run.folder} is finetuned already, and not again on {options.questions}; remove {run.stage(options.stage)} or copy the run."
        )
    train = {"finetune": train_finetune, "finetune_retriever": train_finetune_retriever}[options.stage]
    train(run, options.resume)


def _evaluate(options: argparse.Namespace) -> None:
    from finetune.evaluate import STAGE, evaluate, print_results

    run = _asked(open_run(options), options, options.split)
    source = run.questions(options.split)
    name = options.name or (
        options.split if options.questions is None or source is None else Path(source.path).name.split(".")[0]
    )
    if options.name is None and options.stage != STAGE:
        name += f"-{options.stage}"
    print_results(run, evaluate(run, options.split, options.stage, options.compare, name), name)


def _asked(run: "Run", options: argparse.Namespace, field: str) -> "Run":
    """The run with the questions of `--questions` in the place of `data.FIELD`."""
    from realm.run.config import QuestionSource
    from realm.run.config_file import parse_section

    if options.questions is None:
        if options.format is not None:
            raise UserError(f"--format says how --questions are read; give them too, or set data.{field}.format.")
        return run
    source = parse_section(QuestionSource, options.questions, "--questions")
    if options.format is not None:
        source = replace(source, format=options.format)
    data = replace(run.config.data, **{field: source})  # type: ignore[arg-type]
    return replace(run, config=replace(run.config, data=data))


def _compare(options: argparse.Namespace) -> None:
    from finetune.compare import compare

    compare(options.first, options.second)


def _ask(options: argparse.Namespace) -> None:
    from finetune.ask import ask

    ask(open_run(options), options.question, options.passages)
