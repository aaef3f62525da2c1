"""The commands that answer questions with a trained run."""

import argparse
import re
from pathlib import Path

from realm.app.cli.arguments import path_option, whole
from realm.app.cli.common import Commands, add_command, add_question_options, open_run, with_questions
from realm.errors import UserError


def add_question_commands(commands: Commands) -> None:
    """Add the subcommands and their options."""
    evaluate = add_command(commands, "evaluate", _evaluate, "answer questions and compute metrics", "run")
    add_question_options(evaluate, "those of --split")
    evaluate.add_argument(
        "--name", help="name of the result in evaluations/ (default: name of the file or split, and of the stage)"
    )
    evaluate.add_argument(
        "--stage",
        help="stage whose models are evaluated: initial, or a training stage (default: the last finished stage)",
    )
    evaluate.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="RETRIEVER",
        help="also evaluate other stages, bm25, or sentence-transformers models",
    )
    evaluate.add_argument(
        "--split",
        choices=("validation", "test"),
        help="questions of the run's config to use (default: test)",
    )

    about = "compare two evaluations of the same questions: differences with paired intervals"
    compare = add_command(commands, "compare", _compare, about, None)
    compare.add_argument("first", type=path_option, help="….predictions.jsonl of an evaluation")
    compare.add_argument("second", type=path_option, help="….predictions.jsonl of another evaluation, of any run")

    ask = add_command(commands, "ask", _ask, "answer one question from the corpus", "run")
    ask.add_argument("question", help="the question, in quotes")
    ask.set_defaults(stray_hint="write the question in quotes")
    ask.add_argument("--passages", type=whole(1), help="passages to read (default: evaluate.read)")
    ask.add_argument("--stage", help="training stage whose models answer (default: the last finished stage)")


def _evaluate(options: argparse.Namespace) -> None:
    from finetune.evaluate import evaluate, print_results
    from finetune.train_reader import Finetuning

    if options.split is not None and options.questions is not None:
        raise UserError("--split selects questions of the run's config, which --questions replaces; give one of them.")
    split = options.split or "test"
    run = with_questions(open_run(options), options, split)
    source = run.questions(split)
    stage = options.stage or run.last_finished()
    name = split
    if options.questions is not None and source is not None:
        name = re.sub(r"[^\w-]+", "-", Path(source.path).name.split(".")[0]).strip("-") or split
    if stage != Finetuning.name:
        name += f"-{stage}"
    if options.name is not None:
        name = options.name
    print_results(run, evaluate(run, split, stage, options.compare, name), name)


def _compare(options: argparse.Namespace) -> None:
    from finetune.compare import compare

    compare(options.first, options.second)


def _ask(options: argparse.Namespace) -> None:
    from finetune.ask import ask

    run = open_run(options)
    passages = options.passages or run.config.evaluate.read
    ask(run, options.question, passages, options.stage or run.last_finished())
