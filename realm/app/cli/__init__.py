"""The command line: one subcommand a program, each importing what it needs when it runs, so that
`realm --help` answers at once."""

import argparse
import re
import sys
from collections.abc import Sequence

from realm.app.cli.bench import add_bench_commands
from realm.app.cli.common import EPILOG
from realm.app.cli.index import add_index_commands
from realm.app.cli.stages import add_stage_commands
from realm.errors import UserError

_DESCRIPTION = (
    "Retrieval-augmented pretraining: retriever and reader trained end to end beside an asynchronously refreshed index."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a mistake of the user, 130 after an
    interrupt that can be resumed."""
    rest, overrides = _dotted(list(sys.argv[1:] if arguments is None else arguments))
    options, others = _parser().parse_known_args(rest)
    overrides += others
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
        from realm.training.engine import Interrupted

        if isinstance(error, Interrupted):
            print(f"realm: {error}", file=sys.stderr)
            return 130
        raise
    return 0


def _dotted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments without overrides of the form `--section.field value`, and these: argparse would
    take such a value for one of its own."""
    rest, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if re.match(r"--\w+\.[\w.]+(=|$)", argument):
            overrides += (
                [argument]
                if "=" in argument
                else [argument, *([value] if (value := next(remaining, None)) is not None else [])]
            )
        else:
            rest.append(argument)
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="realm", description=_DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_stage_commands(commands)
    add_index_commands(commands)
    add_bench_commands(commands)
    return parser
