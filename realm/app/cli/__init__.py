"""The command line interface: one subcommand per program.

Each subcommand imports what it needs when it runs, so that `realm --help` is fast.
"""

import argparse
import io
import sys
from collections.abc import Sequence

from realm.app.cli.arguments import Parser, parse_arguments
from realm.app.cli.bench import add_bench_commands
from realm.app.cli.common import EPILOG
from realm.app.cli.failures import describe_os_error
from realm.app.cli.index import add_index_commands
from realm.app.cli.questions import add_question_commands
from realm.app.cli.train import add_training_commands
from realm.errors import UserError
from realm.runtime.printable import printable
from realm.runtime.signals import Interrupted, SignalWatch, watched_signals

_DESCRIPTION = (
    "Retrieval-augmented pretraining: retriever and reader are trained end to end while an index is refreshed "
    "asynchronously."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0, 2 after an error of the user or of the file system, 130 after
    Ctrl-C, 143 after SIGTERM. Other exceptions are errors of this program, and are raised.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with watched_signals() as signals:
        status = _run(sys.argv[1:] if arguments is None else arguments, signals)
        return status if signals.received is None else 128 + signals.received


def _run(arguments: Sequence[str], signals: SignalWatch) -> int:
    """Run one command; returns its exit status, unless a signal interrupts it."""
    try:
        options = parse_arguments(_parser(), arguments)
        options.command(options)
    except Interrupted as error:
        return _fail(str(error), 130)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if signals.received is not None:  # a library that a signal interrupts raises its own exception
            return _fail(f"interrupted ({error})", 130)
        if isinstance(error, UserError):
            return _fail(str(error), 2)
        if isinstance(error, OSError):
            return _fail(describe_os_error(error), 2)
        raise
    return 0


def _fail(message: str, status: int) -> int:
    """Print a message on standard error; returns `status`."""
    print(f"realm: {printable(message)}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(prog="realm", description=_DESCRIPTION, epilog=EPILOG)
    parser.set_defaults(takes_overrides=False, stray_hint=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_training_commands(commands)
    add_question_commands(commands)
    add_index_commands(commands)
    add_bench_commands(commands)
    return parser
