"""Reading and writing configs: YAML files, dotted overrides, errors that name the field.

A file may contain `extends: other.yaml` (relative to itself); its keys override those of the
other file.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache, reduce
from pathlib import Path
from reprlib import Repr
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import draccus
import yaml

from realm.errors import UserError
from realm.run.config import RealmConfig
from realm.run.renamed_keys import renamed_keys
from realm.run.yaml_text import MAX_CHARACTERS, InvalidYaml, parse_yaml
from realm.runtime.nested import merge
from realm.runtime.section import PATH, InvalidSection

T = TypeVar("T")

_MAX_FILES = 20
"""Most files in a chain of `extends`."""
_MAX_BYTES = 4 * MAX_CHARACTERS
"""Largest config file."""
_MAX_PARTS = 20
"""Most parts of the name of an override."""

_MAX_PATH = 4096
"""Longest path: Linux accepts no longer one."""
_MAX_PROBLEMS, _MAX_SHOWN = 12, 400
"""Problems in a message, and characters of each."""

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def load_config(path: Path, overrides: Sequence[str] = ()) -> RealmConfig:
    """Read a YAML file with `--section.field value` overrides.

    Raises UserError naming the file, or the command line if the overrides are the cause, and all
    fields that are missing, unknown, renamed or invalid.
    """
    tree = read_config(path)
    config, problems = _build(RealmConfig, merge(tree, parse_overrides(overrides)))
    if config is not None:
        return config
    ours = _build(RealmConfig, tree)[1] if overrides else problems
    blamed = {
        str(path): [problem for problem in problems if problem in ours],
        "command line": [problem for problem in problems if problem not in ours],
    }
    raise UserError("; ".join(f"{where}: {_joined(found)}" for where, found in blamed.items() if found) + ".")


def parse_section(kind: type[T], text: str, where: str) -> T:
    """Parse a path or a YAML mapping to a config class with a `SHORTHAND`.

    Raises UserError with the prefix `where`.
    """
    if os.path.exists(text):
        return decode(kind, text, where)
    try:
        tree = parse_yaml(text)
    except InvalidYaml as error:
        raise UserError(
            f"{where}: {_short.repr(text)} is neither an existing path nor a YAML mapping ({error})."
        ) from error
    return decode(kind, tree if isinstance(tree, dict) else text, where)


def decode(kind: type[T], value: Any, where: str) -> T:
    """Build a config class from parsed YAML. Raises UserError with the prefix `where`."""
    section, problems = _build(kind, value)
    if section is None:
        raise UserError(f"{where}: {_joined(problems)}.")
    return section


def _joined(problems: Sequence[str]) -> str:
    """The first problems as one sentence; values in them are cut."""
    shown = [
        problem if len(problem) <= _MAX_SHOWN else f"{problem[:_MAX_SHOWN]}…" for problem in problems[:_MAX_PROBLEMS]
    ]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "; ".join(shown + more)


def _build(kind: type[T], value: Any) -> tuple[T | None, list[str]]:
    """A config class built from parsed YAML, or None and what is wrong, without full stops."""
    tree = normalize(kind, value)
    problems = list(renamed_keys(tree)) if kind is RealmConfig else []
    if problems := problems or list(find_errors(kind, tree)):
        return None, problems
    try:
        section: T = draccus.decode(kind, tree)
        return section, []
    except (draccus.utils.DraccusException, ValueError) as error:
        # The reason is in the config class's own error, which draccus wraps.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, InvalidSection):
            return None, cause.problems
        return None, [str(cause or error).strip().rstrip(".")]


def dump_config(config: RealmConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(draccus.encode(config), sort_keys=False)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse `["--pretrain.steps", "5"]` or `["--pretrain.steps=5"]`, to a tree of sections.

    Values are parsed as YAML. Raises UserError for arguments of another form.
    """
    tree: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        name = remaining.pop(0)
        if not name.startswith("--") or len(name) < 3:
            raise UserError(f"unexpected argument {_short.repr(name)}; overrides have the form --section.field value.")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{name[:80]} needs a value.")
            text = remaining.pop(0)
        try:
            value = parse_yaml(text)
        except InvalidYaml as error:
            raise UserError(f"--{name[:80]}: {_short.repr(text)} is not a YAML value ({error}).") from error
        parts = name.split(".")
        if len(parts) > _MAX_PARTS:
            raise UserError(f"--{name[:80]}… has {len(parts)} parts; no field is nested so deeply.")
        for part in reversed(parts):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def normalize(kind: Any, value: Any) -> Any:
    """Expand what YAML may abbreviate: a string for a section with a `SHORTHAND`, a single entry
    for a list of sections, and `~` in paths.

    `SHORTHAND` is the name of the field that the string is for.
    """
    if value is None:
        return None
    kind = _without_none(kind)
    if _is_path(kind) and isinstance(value, str):
        return os.path.expanduser(value)
    if get_origin(kind) is tuple and is_dataclass(entry := get_args(kind)[0]):
        return [normalize(entry, part) for part in (value if isinstance(value, list) else [value])]
    if is_dataclass(kind) and hasattr(kind, "SHORTHAND") and isinstance(value, str):
        value = {kind.SHORTHAND: value}
    if not is_dataclass(kind) or not isinstance(value, dict):
        return value
    variant: Any = _variant(kind, value) or kind
    known = _fields(variant)
    return {key: normalize(known[key], part) if key in known else part for key, part in value.items()}


def find_errors(kind: Any, value: Any, name: str = "") -> Iterator[str]:
    """Yield one clause per value of a normalized tree that does not have the type of its field, and
    per field that is missing or unknown.

    `kind` is the type of the field `name`, as in the annotations of the config classes.
    """
    if value is None:
        if kind is not Any and NoneType not in get_args(kind):
            yield f"`{name}` is empty; give it a value or remove it"
        return
    kind = _without_none(kind)
    origin = get_origin(kind)
    if is_dataclass(kind):
        yield from _section_errors(kind, value, name)
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"`{name}` must be a mapping of fields, got {_short.repr(value)}"
            return
        for key, part in value.items():
            yield from find_errors(get_args(kind)[1], part, f"{name}.{key}")
    elif origin is tuple:
        kinds = get_args(kind)
        if not isinstance(value, list):
            yield f"`{name}` must be a list, got {_short.repr(value)}"
        elif kinds[-1] is not Ellipsis and len(value) != len(kinds):
            yield f"`{name}` must be a list of {len(kinds)} values, got {len(value)}"
        else:
            for number, part in enumerate(value):
                yield from find_errors(kinds[0], part, f"{name}[{number}]")
    elif origin is Literal:
        if value not in get_args(kind):
            yield f"`{name}` must be one of {', '.join(get_args(kind))}, got {_short.repr(value)}"
    elif kind is not Any and (expected := _expected(kind, value)):
        yield f"`{name}` must be {expected}, got {_short.repr(value)}"


def _section_errors(kind: Any, value: Any, name: str) -> Iterator[str]:
    """Errors of a section and of everything inside it."""
    if not isinstance(value, dict):
        yield (
            f"`{name}` must be a mapping of fields, got {_short.repr(value)}"
            if name
            else "expected a mapping of fields"
        )
        return
    variant = _variant(kind, value)
    if variant is None:
        choices = ", ".join(kind.get_known_choices())
        yield f"`{name}.type` {_short.repr(value.get('type'))} is unknown; choose one of {choices}".replace("`.", "`")
        return
    prefix, known = f"{name}.".lstrip("."), _fields(variant)
    for key in value:
        if key in known:
            yield from find_errors(known[key], value[key], f"{prefix}{key}")
        elif variant is kind:
            yield _unknown(prefix, key, known, None)
        elif key != "type":
            yield _unknown(prefix, key, known, value.get("type", kind.default_choice_name()))
    for entry in fields(variant):
        if entry.name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            yield f"`{prefix}{entry.name}` is missing; add it"


def _unknown(prefix: str, key: str, known: Mapping[str, Any], variant: str | None) -> str:
    """The clause about a field that does not exist."""
    close = get_close_matches(key, known, n=1)
    where = f" with type {variant}" if variant else ""
    remedy = f"the closest is `{prefix}{close[0]}`" if close else "docs/configuration.md lists all fields"
    return f"there is no field `{prefix}{key[:200]}`{where}; {remedy}"


def _expected(kind: Any, value: Any) -> str | None:
    """What a value should be that is not of the type bool, int, float, str or a path; None if it
    is.

    Numbers may be texts, because YAML takes `1e-5` for one.
    """
    if _is_path(kind):
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str):
            return "a path in quotes" if isinstance(value, bool | float) else "one path"
        return _path_problem(text)
    if kind is str:
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return None
        return "a text in quotes" if isinstance(value, bool | float) else "one text"
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    assert kind in (int, float), kind
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool | list | dict) or (kind is int and isinstance(value, float)):
        return wanted
    try:
        kind(value)
    except (ValueError, OverflowError):
        return wanted
    return None


def _path_problem(text: str) -> str | None:
    """What a path should be that no system accepts, otherwise None."""
    if not text or "\0" in text:
        return "a path that is not empty and has no null characters"
    return f"a path of at most {_MAX_PATH:,} characters" if len(text) > _MAX_PATH else None


def _variant(kind: Any, value: Mapping[str, Any]) -> Any:
    """The class that a section's `type` names, the class itself if it has no variants, or None."""
    if not hasattr(kind, "get_known_choices"):
        return kind
    choice = value.get("type", kind.default_choice_name())
    return kind.get_known_choices().get(choice) if isinstance(choice, str) else None


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """The types of a config class's fields by name."""
    types = get_type_hints(kind, include_extras=True)
    return {entry.name: types[entry.name] for entry in fields(kind)}


def _without_none(kind: Any) -> Any:
    """The type `X` of `X | None`; other types unchanged."""
    members = [member for member in get_args(kind) if member is not NoneType]
    return members[0] if NoneType in get_args(kind) and len(members) == 1 else kind


def _is_path(kind: Any) -> bool:
    """Whether a type is `PathText`."""
    return get_origin(kind) is Annotated and PATH in kind.__metadata__


def read_config(path: Path) -> dict[str, Any]:
    """The tree of a config file, merged over those that it extends.

    Raises UserError if a file cannot be read, is not YAML, or is not a mapping.
    """
    trees = [_read_mapping(path)]
    seen = [os.path.realpath(path)]
    while (base := trees[-1].pop("extends", None)) is not None:
        if not isinstance(base, str) or _path_problem(base):
            raise UserError(f"config file {path}: `extends` must name a file, got {_short.repr(base)}.")
        path, extending = path.parent / os.path.expanduser(base), path
        if os.path.realpath(path) in seen:
            raise UserError(f"config file {path} extends itself through {extending}.")
        seen.append(os.path.realpath(path))
        if len(seen) > _MAX_FILES:
            raise UserError(f"config file {seen[0]} extends more than {_MAX_FILES} files; merge some of them.")
        trees.append(_read_mapping(path))
    return reduce(merge, reversed(trees))


def _read_mapping(path: Path) -> dict[str, Any]:
    """The content of one config file."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise InvalidYaml(f"longer than {_MAX_BYTES:,} bytes")
        tree = parse_yaml(content.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"config file {path} does not exist.") from error
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} cannot be read: byte {error.start + 1} is not UTF-8.") from error
    except InvalidYaml as error:
        raise UserError(f"config file {path} is not valid YAML ({error}).") from error
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"config file {path} must contain a mapping of sections, got {found}.")
    return tree
