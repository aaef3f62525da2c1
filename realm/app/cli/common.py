"""Functions shared by several commands: adding subparsers, and opening a run."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from realm.app.cli.arguments import path_option, whole
from realm.errors import UserError

if TYPE_CHECKING:
    from realm.run.folder import Run

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Command: TypeAlias = Callable[[argparse.Namespace], None]

EPILOG = "Override any field of the config on the command line, for example: --pretrain.steps 1000 --run runs/other."
_QUESTIONS = (
    "file of questions, or a mapping as in data.train: '{path: rajpurkar/squad, format: datasets, split: validation}'"
)
_FORMAT = "format of --questions: squad, jsonl, qas, webq, trec, timeqa or datasets (default: auto-detected)"


def add_command(
    commands: Commands, name: str, command: Command, about: str, needs: Literal["config", "run"] | None
) -> argparse.ArgumentParser:
    """Add a subcommand that needs a config file, a run folder, or neither."""
    parser = commands.add_parser(name, help=about, description=about, epilog=EPILOG if needs else None)
    if needs == "config":
        parser.add_argument("--config", type=path_option, required=True, help="YAML file, see configs/")
        parser.add_argument(
            "--limit",
            type=whole(1),
            metavar="N",
            help="read at most N documents per source (corpus.limit), to try a config",
        )
    elif needs == "run":
        parser.add_argument("--run", type=path_option, required=True, help="run folder")
    parser.set_defaults(command=command, takes_overrides=needs is not None)
    return parser


def add_question_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--questions` and `--format`; `default` describes the default questions."""
    parser.add_argument("--questions", help=f"{_QUESTIONS}; default: {default}")
    parser.add_argument("--format", help=_FORMAT)


def open_run(options: argparse.Namespace) -> "Run":
    """Open the run of `--run`, or the run of `--config`, which is created if it does not exist."""
    from realm.run.config_file import load_config
    from realm.run.folder import Run
    from realm.runtime.distributed import on_rank_zero, world_size

    if world_size() > 1:  # started by a launcher
        from realm.training.engine import start_processes

        start_processes()
    if not hasattr(options, "config"):
        return Run.open(options.run, options.overrides)
    config = load_config(options.config, options.overrides)
    return on_rank_zero(lambda: Run.create(config))


def with_questions(run: "Run", options: argparse.Namespace, field: str) -> "Run":
    """The run with `data.FIELD` replaced by `--questions`, if given."""
    from realm.run.config_file import parse_section
    from realm.run.data_config import QuestionSource

    if options.questions is None:
        if options.format is not None:
            raise UserError(f"--format applies to --questions only; add --questions, or set data.{field}.format.")
        return run
    source = parse_section(QuestionSource, options.questions, "--questions")
    if options.format is not None:
        if source.format not in ("auto", options.format):
            raise UserError(
                f"--questions has format: {source.format}, but --format is {options.format}; give one of them."
            )
        source = replace(source, format=options.format)
    data = replace(run.config.data, **{field: source})  # type: ignore[arg-type]
    return replace(run, config=replace(run.config, data=data))
