"""Separating a command's options from overrides of config fields, and types of option values."""

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from realm.errors import UserError

_OPTION = re.compile(r"(--[A-Za-z_][\w.-]*)(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated options: they could be confused with config fields."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings, allow_abbrev=False)  # type: ignore[arg-type]

    def _print_message(self, message: str, file: object = None) -> None:
        from realm.runtime.printable import printable

        super()._print_message(printable(message), file)  # type: ignore[arg-type]


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `overrides` of the result are the overrides of config fields.

    Raises UserError for arguments that are neither, and for those that are not valid UTF-8.
    """
    for argument in arguments:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(
                f"the argument {argument[:80]!r} is not valid UTF-8; rename the file, or change the locale."
            )
    command = command_parser(parser, arguments)
    rest, overrides = split_overrides(command, arguments)
    options, stray = parser.parse_known_args(rest)
    if stray:
        hint = options.stray_hint or (
            "overrides have the form --section.field value" if options.takes_overrides else f"see {command.prog} --help"
        )
        raise UserError(f"unexpected argument {stray[0][:80]!r}; {hint}.")
    if getattr(options, "limit", None) is not None and options.takes_overrides:
        overrides += ["--corpus.limit", str(options.limit)]
    options.overrides = overrides
    return options


def command_parser(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that the first arguments name, or of the group of commands."""
    for argument in arguments:
        choices = _subcommands(parser)
        if argument not in choices:
            break
        parser = choices[argument]
    return parser


def split_overrides(command: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate overrides of the form `--section.field value` from the other arguments.

    Returns the other arguments and the overrides. argparse would take an override's value for a
    positional argument. Raises UserError for an option that the command does not have.
    """
    if _subcommands(command):  # no command, or an unknown one
        return list(arguments), []
    rest: list[str] = []
    overrides: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            return [*rest, argument, *remaining], overrides
        option = _OPTION.fullmatch(argument)
        if option is None or option[1] in command._option_string_actions:
            rest.append(argument)
            continue
        _check_override(command, option[1])
        overrides.append(argument)
        if option[2] is None:
            if not remaining or _OPTION.fullmatch(remaining[0]):
                raise UserError(f"{option[1][:80]} needs a value.")
            overrides.append(remaining.pop(0))
    return rest, overrides


def _check_override(command: argparse.ArgumentParser, name: str) -> None:
    """Raise UserError if an option is not the name of a config field, as far as its first part."""
    known = {option for option in command._option_string_actions if option.startswith("--")}
    if command.get_default("takes_overrides"):
        from dataclasses import fields

        from realm.run.config import RealmConfig

        sections = {f"--{entry.name}" for entry in fields(RealmConfig)}
        if name.partition(".")[0] in sections:
            return
        known |= sections
    close = get_close_matches(name.partition(".")[0], sorted(known), n=1)
    remedy = f"the closest is {close[0]}" if close else f"see {command.prog} --help"
    raise UserError(f"{command.prog} has no option {name[:80]}; {remedy}.")


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a group by name."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for group in groups for name, command in group.choices.items()}


def path_option(text: str) -> Path:
    """Type of an option that is a path; expands `~`."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(os.path.expanduser(text))


def whole(least: int) -> Callable[[str], int]:
    """Type of an option that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"-?[0-9]{1,10}", text) else None
        if number is None or not least <= number < 2**31:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least} and less than 2^31, got {text[:80]!r}"
            )
        return number

    return parse


def shape(text: str) -> tuple[int, int]:
    """Type of an option of the form NxD: rows and dimension of an index."""
    match = re.fullmatch(r"([0-9]{1,10})[xX]([0-9]{1,5})", text)
    if match is None or int(match[1]) < 1000 or int(match[2]) < 1:
        raise argparse.ArgumentTypeError(
            f"must have the form NxD, such as 10000000x128, with at least 1000 rows, got {text[:80]!r}"
        )
    return int(match[1]), int(match[2])


def seconds(text: str) -> float:
    """Type of an option that is a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"must be a number of seconds of at least 0, got {text[:80]!r}")
    return number
