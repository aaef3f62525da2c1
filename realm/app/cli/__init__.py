"""The command line interface: one subcommand per program.

Each subcommand imports what it needs when it runs, so that `realm --help` is fast.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from realm.app.cli.bench import add_bench_commands
from realm.app.cli.common import EPILOG
from realm.app.cli.index import add_index_commands
from realm.app.cli.questions import add_question_commands
from realm.app.cli.train import add_training_commands
from realm.errors import UserError
from realm.runtime.signals import Interrupted, SignalWatch, watched_signals

_DESCRIPTION = (
    "Retrieval-augmented pretraining: retriever and reader are trained end to end while an index is refreshed "
    "asynchronously."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0, 2 after a user error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    with watched_signals() as signals:
        status = _run(arguments, signals)
        return status if signals.received is None else 128 + signals.received


def _run(arguments: Sequence[str] | None, signals: SignalWatch) -> int:
    """Run one command; returns its exit status, unless a signal interrupts it."""
    rest, overrides = _split_overrides(list(sys.argv[1:] if arguments is None else arguments))
    options, others = _parser().parse_known_args(rest)
    overrides += others
    if overrides and not options.takes_overrides:
        _parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    if getattr(options, "limit", None) is not None:
        overrides += ["--corpus.limit", str(options.limit)]
    options.overrides = overrides
    try:
        options.command(options)
    except Interrupted as error:
        print(f"realm: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("realm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if signals.received is not None:  # a library that a signal interrupts raises its own exception
            print(f"realm: interrupted ({error})", file=sys.stderr)
            return 130
        if not isinstance(error, UserError):
            raise
        print(f"realm: {error}", file=sys.stderr)
        return 2
    return 0


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate overrides of the form `--section.field value` from the other arguments.

    Returns the other arguments and the overrides. argparse would take an override's value for a
    positional argument.
    """
    rest, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if re.match(r"--\w+\.[\w.]+(=|$)", argument):
            value = None if "=" in argument else next(remaining, None)
            overrides += [argument] if value is None else [argument, value]
        else:
            rest.append(argument)
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="realm", description=_DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_training_commands(commands)
    add_question_commands(commands)
    add_index_commands(commands)
    add_bench_commands(commands)
    return parser
