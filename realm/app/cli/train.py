"""The commands that prepare and train a run."""

import argparse

from realm.app.cli.arguments import path_option, whole
from realm.app.cli.common import Commands, add_command, add_question_options, open_run, with_questions
from realm.errors import UserError

_RESUME = "continue from the newest checkpoint"


def add_training_commands(commands: Commands) -> None:
    """Add the subcommands and their options."""
    names = "prepare, ict, reader-pretraining, pretrain, finetune-retriever, finetune, evaluate"
    about = f"run all stages ({names}) and print a summary"
    everything = add_command(commands, "run", _run, about, "config")
    everything.add_argument("--resume", action="store_true", help="continue an existing run")

    about = "forecast time, memory and disk of a run on this machine, from a short measurement"
    plan = add_command(commands, "plan", _plan, about, "config")
    plan.add_argument(
        "--passages", type=whole(1), metavar="N", help="number of blocks of the corpus, if it is not prepared yet"
    )

    about = "tokenize documents and tag salient spans, once per corpus"
    prepare = add_command(commands, "prepare", _prepare, about, "config")
    prepare.add_argument("--skip-bad", action="store_true", help="skip and count records that cannot be used")

    for name, command, about in (
        ("ict", _train, "train the retriever on the inverse cloze task"),
        ("reader-pretraining", _train, "train the reader to copy spans from retrieved passages"),
        ("pretrain", _pretrain, "train retriever and reader (REALM) with an asynchronously refreshed index"),
    ):
        stage = add_command(commands, name, command, about, "config")
        stage.add_argument("--resume", action="store_true", help=_RESUME)
        stage.set_defaults(stage=name.replace("-", "_"))
        if name == "pretrain":
            stage.add_argument("--with-refresher", action="store_true", help="also start a refresher process")
            stage.add_argument(
                "--replay",
                type=path_option,
                metavar="RUN",
                help="in each step, search the same index as run RUN did according to its log; RUN may be this run",
            )

    about = "build indexes from exported encoders, as a separate process; can be killed and restarted at any time"
    refresh = add_command(commands, "refresh", _refresh, about, "run")
    refresh.add_argument("--once", action="store_true", help="exit when there is nothing left to do")

    about = "check all files of a run and of its prepared corpus, and print how to rebuild what is damaged"
    verify = add_command(commands, "verify", _verify, about, None)
    verify.add_argument("run", type=path_option, help="run folder")

    for name, about in (
        ("finetune-retriever", "finetune both towers of the retriever on questions with hard negatives"),
        ("finetune", "finetune reader and query tower on questions"),
    ):
        finetune = add_command(commands, name, _finetune, about, "run")
        add_question_options(finetune, "data.train of the run's config")
        finetune.add_argument("--resume", action="store_true", help=_RESUME)
        finetune.set_defaults(stage=name.replace("-", "_"))


def _run(options: argparse.Namespace) -> None:
    from realm.app.pipeline import run_all
    from realm.run.config_file import load_config

    run_all(load_config(options.config, options.overrides), options.resume)


def _plan(options: argparse.Namespace) -> None:
    from realm.app.plan import plan
    from realm.run.config_file import load_config

    plan(load_config(options.config, options.overrides), options.passages)


def _prepare(options: argparse.Namespace) -> None:
    from realm.app.corpus import prepare
    from realm.run.config_file import load_config

    prepare(load_config(options.config, options.overrides), options.skip_bad)


def _train(options: argparse.Namespace) -> None:
    from realm.app.stages import train

    train(open_run(options), options.stage, options.resume)


def _pretrain(options: argparse.Namespace) -> None:
    from functools import partial

    from pretrain.realm import LiveRealmPretraining
    from realm.app.stages import train

    open_stage = partial(LiveRealmPretraining.open, with_refresher=options.with_refresher, replay=options.replay)
    train(open_run(options), options.stage, options.resume, open_stage)


def _refresh(options: argparse.Namespace) -> None:
    from index.fusion import Fusion
    from index.refresh import refresh
    from index.workers import WorkerGroup
    from realm.run.folder import Run

    run, workers = Run.open(options.run, options.overrides), WorkerGroup.join()
    refresh(
        run.folder,
        run.config.refresh,
        run.passages,
        once=options.once,
        workers=workers,
        fusion=Fusion.of(run),
    )
    workers.leave()


def _verify(options: argparse.Namespace) -> None:
    from realm.app.verify import verify_run

    verify_run(options.run)


def _finetune(options: argparse.Namespace) -> None:
    from realm.app.stages import train

    run = with_questions(open_run(options), options, "train")
    unused = options.questions if options.questions is not None else " ".join(options.overrides)
    if unused and run.finished(options.stage):
        raise UserError(
            f"run {run.folder} is already finetuned, so {unused} would not be used; remove "
            f"{run.stage(options.stage)} or copy the run."
        )
    train(run, options.stage, options.resume)
