"""The command line: one subcommand a program, each importing what it needs when it runs, so that `realm --help` answers at once."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from realm.errors import UserError

if TYPE_CHECKING:
    from realm.run import Run

_DESCRIPTION = "Retrieval-augmented pretraining: retriever and reader trained end to end beside an asynchronously refreshed index."
_EPILOG = "Any field of the config can be overridden on the command line: --pretrain.steps 1000 --run runs/other."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a mistake of the user, 130 after an interrupt that can be resumed."""
    options, overrides = _parser().parse_known_args(arguments)
    if overrides and not options.takes_overrides:
        _parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    if getattr(options, "limit", None) is not None:
        overrides += ["--corpus.limit", str(options.limit)]
    options.overrides = overrides
    try:
        options.command(options)
    except UserError as error:
        print(f"realm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("realm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Imported late: the class lives beside torch.
        from realm.engine import Interrupted

        if isinstance(error, Interrupted):
            print(f"realm: {error}", file=sys.stderr)
            return 130
        raise
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="realm", description=_DESCRIPTION, epilog=_EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], about: str, source: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, epilog=_EPILOG if source else None, allow_abbrev=False)
        if source == "config":
            sub.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
            sub.add_argument("--limit", type=int, metavar="N", help="read no more than N documents of each source (corpus.limit), for trying")
        elif source == "run":
            sub.add_argument("--run", type=Path, required=True, help="run folder")
        sub.set_defaults(command=command, takes_overrides=bool(source))
        return sub

    everything = add("run", _run, "every stage in order, then a table: prepare, ict, reader-warmup, pretrain, finetune, evaluate", "config")
    everything.add_argument("--resume", action="store_true", help="go on with a run that was begun before")
    plan = add("plan", _plan, "time, memory and disk of a run on this machine, from a short calibration", "config")
    plan.add_argument("--passages", type=int, metavar="N", help="blocks of the whole corpus, where it is not prepared yet")
    prepare = add("prepare", _prepare, "corpus to token arrays and salient spans, once", "config")
    prepare.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be used, and count them")
    for name, command, about in (
        ("ict", _ict, "inverse cloze warm start of the retriever"),
        ("reader-warmup", _reader_warmup, "teach the reader to read retrieved passages"),
        ("pretrain", _pretrain, "REALM pretraining beside a refresher"),
    ):
        stage = add(name, command, about, "config")
        stage.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
        if name == "pretrain":
            stage.add_argument("--with-refresher", action="store_true", help="start a refresher process beside the trainer")
            stage.add_argument(
                "--replay", type=Path, metavar="RUN", help="search at each step the index that this run, or an earlier attempt of the same, searched"
            )
    refresh = add("refresh", _refresh, "the asynchronous index refresher: its own process; start, kill and restart it at any time", "run")
    refresh.add_argument("--once", action="store_true", help="end as soon as there is nothing left to do")
    for name, about in (
        ("finetune-retriever", "finetune both towers of the retriever on questions with hard negatives"),
        ("finetune", "finetune reader and query tower on questions"),
    ):
        finetune = add(name, _finetune, about, "run")
        finetune.add_argument("--questions", help="file of questions; default: data.train of the run's config")
        finetune.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
        finetune.set_defaults(stage=name.replace("-", "_"))
    evaluate = add("evaluate", _evaluate, "answer questions and count", "run")
    evaluate.add_argument("--questions", help="file of questions; default: those of --split")
    evaluate.add_argument("--format", default="auto", help="format of --questions: squad, jsonl, qas, webq, trec, timeqa or datasets")
    evaluate.add_argument("--name", help="name of the result under evaluations/ (default: the file's, or the split's)")
    evaluate.add_argument("--stage", default="finetune", help="stage whose models answer: start, or a training stage (default: finetune)")
    evaluate.add_argument(
        "--compare", nargs="+", default=[], metavar="RETRIEVER", help="put beside: other stages, bm25, sentence-transformers models"
    )
    evaluate.add_argument("--split", choices=("validation", "test"), default="test", help="questions of the run's config (default: test)")
    ask = add("ask", _ask, "answer one question from the corpus", "run")
    ask.add_argument("question", help="the question, in quotes")
    ask.add_argument("--passages", type=int, default=5, help="passages to read (default: 5)")
    index = commands.add_parser(
        "index", help="look after the index versions of a run", description="Index versions of a run: list, show, check, collect."
    )
    verbs = index.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command, about in (
        ("ls", _index_ls, "every version, its age, its size, and who needs it"),
        ("show", _index_show, "all that one version says of itself"),
        ("verify", _index_verify, "read every byte of the versions against their manifests"),
        ("gc", _index_gc, "remove what nobody needs and what crashes left behind"),
        ("add", _index_add, "add documents to the run's corpus, or take some away, and complete the newest index"),
    ):
        verb = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        verb.add_argument("--run", type=Path, required=True, help="run folder")
        verb.set_defaults(command=command, takes_overrides=True)
        if name == "show":
            verb.add_argument("version", help="such as a01-step-000500-e3")
        if name == "verify":
            verb.add_argument("version", nargs="*", help="such as a01-step-000500-e3; default: all")
        if name == "add":
            verb.add_argument("documents", nargs="*", help="files or folders of documents, as in corpus.passages")
            verb.add_argument("--format", default="auto", help="format of the documents (default: by name and content)")
            verb.add_argument("--delete", type=Path, metavar="FILE", help="file of ids of documents to take away, one a line")
            verb.add_argument("--replace", action="store_true", help="added documents take the place of those of the same id")
            verb.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be used, and count them")
        if name == "gc":
            verb.add_argument("--grace", type=float, metavar="S", help="seconds in which readers may still take one (default: refresh.grace_s)")
            verb.add_argument("--dry-run", action="store_true", help="say what would go")
    bench = commands.add_parser("bench", help="benchmarks", description="Benchmarks; each prints one table.")
    kinds = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    spans = kinds.add_parser("spans", add_help=False, help="salient spans against annotated text: precision, recall, F1, sentences a second")
    spans.set_defaults(command=_bench_spans, takes_overrides=True)
    store = kinds.add_parser("index", help="encoding beside sentence-transformers, approximate search beside exact, opening", allow_abbrev=False)
    store.add_argument("--run", type=Path, required=True, help="run folder; its newest index and encoder are used")
    store.add_argument("--passages", type=int, default=2000, help="passages to encode (default: 2000)")
    store.add_argument("--queries", type=int, default=256, help="queries to search (default: 256)")
    store.add_argument("--scale", type=int, default=0, metavar="N", help="search N rows, too: the embeddings repeated with jitter")
    store.add_argument("--synthetic", metavar="NxD", help="build and search an index of random vectors, too, such as 10000000x128")
    store.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    store.add_argument("--picture", type=Path, metavar="FILE", help="draw recall against speed")
    store.set_defaults(command=_bench_index, takes_overrides=True)
    swaps = kinds.add_parser("swaps", help="step times of a trainer with and without index versions swapped in")
    swaps.add_argument("--rows", type=int, default=1_000_000, help="rows of the index (default: 1,000,000)")
    swaps.add_argument("--dim", type=int, default=128, help="its dimensions (default: 128)")
    swaps.add_argument("--steps", type=int, default=1200, help="steps of each kind (default: 1200)")
    swaps.add_argument("--every", type=int, default=200, help="steps between two versions (default: 200)")
    swaps.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    swaps.set_defaults(command=_bench_swaps, takes_overrides=False)
    faults = kinds.add_parser("faults", help="kill -9 at random, flipped bits, frozen lease holders, a full disk: what the index store survives")
    faults.add_argument("--kills", type=int, default=500, help="kill -9 of refresher and trainer (default: 500)")
    faults.add_argument("--flips", type=int, default=1000, help="bit flips and cuts in the files of a version (default: 1000)")
    faults.add_argument("--seed", type=int, default=0)
    faults.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    faults.set_defaults(command=_bench_faults, takes_overrides=False)
    return parser


def _open(options: argparse.Namespace) -> "Run":
    """The run of `--config` (created where new) or of `--run`."""
    from realm.config_file import load_config
    from realm.ranks import on_main, world_size
    from realm.run import Run

    if world_size() > 1:  # under a launcher
        from realm.engine import start_processes

        start_processes()
    if not hasattr(options, "config"):
        return Run.open(options.run, options.overrides)
    config = load_config(options.config, options.overrides)
    return on_main(lambda: Run.create(config))


def _run(options: argparse.Namespace) -> None:
    from realm.config_file import load_config
    from realm.pipeline import run_all

    run_all(load_config(options.config, options.overrides), options.resume)


def _plan(options: argparse.Namespace) -> None:
    from realm.config_file import load_config
    from realm.plan import plan

    plan(load_config(options.config, options.overrides), options.passages)


def _prepare(options: argparse.Namespace) -> None:
    from realm.config_file import load_config
    from realm.pipeline import prepare

    prepare(load_config(options.config, options.overrides), options.skip_bad)


def _ict(options: argparse.Namespace) -> None:
    from pretrain.ict import train_ict

    train_ict(_open(options), options.resume)


def _reader_warmup(options: argparse.Namespace) -> None:
    from pretrain.reader_warmup import train_reader_warmup

    train_reader_warmup(_open(options), options.resume)


def _pretrain(options: argparse.Namespace) -> None:
    from pretrain.train import train_realm

    train_realm(_open(options), options.resume, options.with_refresher, options.replay)


def _refresh(options: argparse.Namespace) -> None:
    from index.refresh import refresh
    from index.workers import Workers
    from realm.run import Run

    run, workers = Run.open(options.run, options.overrides), Workers.join()
    refresh(run.folder, run.config.refresh, run.passages, once=options.once, workers=workers)
    workers.leave()


def _finetune(options: argparse.Namespace) -> None:
    from finetune.retriever import train_finetune_retriever
    from finetune.train import train_finetune

    if options.questions is not None:
        options.overrides = [*options.overrides, "--data.train", options.questions]
    run = _open(options)
    if options.questions is not None and run.finished(options.stage):
        raise UserError(
            f"run {run.folder} is finetuned already, and not again on {options.questions}; remove {run.stage(options.stage)} or copy the run."
        )
    train = {"finetune": train_finetune, "finetune_retriever": train_finetune_retriever}[options.stage]
    train(run, options.resume)


def _evaluate(options: argparse.Namespace) -> None:
    from finetune.evaluate import evaluate, print_results
    from realm.config import QuestionSource

    run = _open(options)
    source = None if options.questions is None else QuestionSource(options.questions, options.format)
    name = options.name or (options.split if source is None else Path(options.questions).name.split(".")[0])
    print_results(run, evaluate(run, source, options.split, options.stage, options.compare, name), name)


def _ask(options: argparse.Namespace) -> None:
    from finetune.ask import ask

    ask(_open(options), options.question, options.passages)


def _index_ls(options: argparse.Namespace) -> None:
    from index.manage import entries
    from realm.telemetry import print_table

    rows = [
        [entry.path.relative_to(options.run).as_posix(), entry.manifest and f"{entry.manifest.count:,}", entry.manifest and entry.manifest.factory,
         f"{entry.bytes / 2**20:,.1f}", entry.manifest and entry.manifest.created_at, entry.state] for entry in entries(_open(options).folder)
    ]  # fmt: skip
    print_table(f"Index versions of {options.run}", ["version", "passages", "factory", "MiB", "created (UTC)", "state"], rows)


def _index_show(options: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from index.manage import entry_named

    entry = entry_named(_open(options).folder, options.version)
    if entry.manifest is None:
        raise UserError(f"{entry.path} has no manifest that can be read; `realm index verify` says why, the refresher builds it again.")
    everything = {**asdict(entry.manifest), "bytes": entry.bytes, "state": entry.state, "holders": entry.holders}
    print(json.dumps(everything, indent=1))


def _index_verify(options: argparse.Namespace) -> None:
    from index.manage import entries, entry_named, verify

    folder = _open(options).folder
    chosen = [entry_named(folder, name) for name in options.version] or entries(folder)
    broken = [entry for entry in chosen if verify(entry, print) is not None]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(chosen)} index versions would be refused; readers pass them over; remove them to have them built anew."
        )


def _index_gc(options: argparse.Namespace) -> None:
    from index.manage import collect_garbage

    run = _open(options)
    grace_s = run.config.refresh.grace_s if options.grace is None else options.grace
    removed = collect_garbage(run.folder, run.config.refresh, grace_s, options.dry_run, print)
    for path in removed:
        print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    if not removed:
        print("nothing to remove")


def _index_add(options: argparse.Namespace) -> None:
    from realm.document_formats import SourceConfig
    from realm.files import read_names
    from realm.pipeline import add_documents

    sources = [SourceConfig(path, options.format) for path in options.documents]
    delete = [] if options.delete is None else read_names(options.delete)
    if not sources and not delete:
        raise UserError("nothing to add and nothing to take away; name files of documents, or a file of ids with --delete.")
    add_documents(_open(options), sources, delete, options.replace, options.skip_bad)


def _bench_spans(options: argparse.Namespace) -> None:
    from realm import bench_spans

    bench_spans.main(options.overrides)


def _bench_index(options: argparse.Namespace) -> None:
    from index.bench.store import bench_index

    bench_index(_open(options), options.passages, options.queries, options.scale, options.synthetic, options.json, options.picture)


def _bench_swaps(options: argparse.Namespace) -> None:
    from index.bench.swaps import bench_swaps

    bench_swaps(options.rows, options.dim, options.steps, options.every, options.json)


def _bench_faults(options: argparse.Namespace) -> None:
    from index.bench.faults import bench_faults

    report = bench_faults(options.kills, options.flips, options.seed, options.json)
    if report.violations:
        raise UserError(f"{len(report.violations)} violations.")
