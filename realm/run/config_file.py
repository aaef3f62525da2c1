"""Reading and writing configs: YAML files, dotted overrides, errors that name the field.

A file may contain `extends: other.yaml` (relative to itself); its keys override those of the
other file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import draccus
import yaml
from draccus.utils import DraccusException

from realm.errors import UserError
from realm.run.config import RealmConfig
from realm.run.renamed_keys import renamed_keys
from realm.runtime.nested import merge

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; PyYAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RealmConfig:
    """Read a YAML file with `--section.field value` overrides.

    Raises UserError naming the file and all fields that are missing, unknown, renamed or invalid.
    """
    tree = merge(_read_yaml(path), parse_overrides(overrides))
    if renamed := list(renamed_keys(tree)):
        raise UserError(f"{path}: {'; '.join(renamed)}.")
    return decode(RealmConfig, tree, str(path))


def parse_section(kind: type[T], text: str, where: str) -> T:
    """Parse a path or a YAML mapping to a config class with a `SHORTHAND`.

    Raises UserError with the prefix `where`.
    """
    try:
        tree = text if Path(text).exists() else yaml.safe_load(text)
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{where}: {text!r} is neither an existing path nor a YAML mapping.") from error
    return decode(kind, tree if isinstance(tree, dict) else text, where)


def decode(kind: type[T], value: Any, where: str) -> T:
    """Build a config class from parsed YAML. Raises UserError with the prefix `where`."""
    tree = expand_shorthands(kind, value)
    if complaints := list(find_type_errors(kind, tree)):
        raise UserError(f"{where}: {'; '.join(complaints)}.")
    try:
        section: T = draccus.decode(kind, tree)
        return section
    except (DraccusException, ValueError) as error:
        # The reason is in the config class's own error, which draccus wraps.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is not None:
            raise UserError(f"{where}: {cause}") from error
        raise UserError(
            f"{where}: {str(error).strip().rstrip('.')}; docs/configuration.md lists all fields."
        ) from error


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
            raise UserError(f"unexpected argument {name!r}; overrides have the form --section.field value.")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{name} needs a value.")
            text = remaining.pop(0)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--{name}: {text!r} is not a YAML value.") from error
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def expand_shorthands(kind: Any, value: Any) -> Any:
    """Expand shorthands: a string for a section with a `SHORTHAND`, a single entry for a list.

    `SHORTHAND` is the name of the field that the string is for.
    """
    if value is None:
        return None
    kind = _without_none(kind)
    if get_origin(kind) is tuple and is_dataclass(entry := get_args(kind)[0]):
        return [expand_shorthands(entry, part) for part in (value if isinstance(value, list) else [value])]
    if is_dataclass(kind) and hasattr(kind, "SHORTHAND") and isinstance(value, str):
        return {kind.SHORTHAND: value}
    if not is_dataclass(kind) or not isinstance(value, dict):
        return value
    fields = get_type_hints(kind)
    return {key: expand_shorthands(fields[key], part) if key in fields else part for key, part in value.items()}


def _without_none(kind: Any) -> Any:
    """The type `X` of `X | None`; other types unchanged."""
    members = [member for member in get_args(kind) if member is not NoneType]
    return members[0] if NoneType in get_args(kind) and len(members) == 1 else kind


def find_type_errors(kind: Any, value: Any, name: str = "") -> Iterator[str]:
    """Find errors that draccus accepts, or reports without the name of the field.

    These are empty values, sections that are not mappings, values that are not lists or numbers,
    and unknown variants.
    """
    if value is None:
        if kind is not Any and NoneType not in get_args(kind):
            yield f"`{name}` is empty; give it a value or remove it"
        return
    kind = _without_none(kind)
    if get_origin(kind) is tuple and is_dataclass(entry := get_args(kind)[0]):
        for number, part in enumerate(value):
            yield from find_type_errors(entry, part, f"{name}[{number}]")
        return
    if get_origin(kind) is tuple and not isinstance(value, list | tuple):
        yield f"`{name}` must be a list, got {value!r}"
        return
    if isinstance(value, bool) and kind in (int, float):
        yield f"`{name}` must be a number, got {value!r}"
        return
    section = is_dataclass(kind) or get_origin(kind) is dict
    if section != isinstance(value, dict) and kind is not Any:
        yield f"`{name}` must be {'a mapping of fields' if section else 'a value'}, got {value!r}"
        return
    if section and hasattr(kind, "get_known_choices"):
        choice, known = value.get("type", kind.default_choice_name()), kind.get_known_choices()
        if choice not in known:
            yield f"`{name}.type` {choice!r} is unknown; choose one of {', '.join(known)}"
            return
        kind = known[choice]
    fields = get_type_hints(kind) if is_dataclass(kind) else {}
    for key in value if fields else ():
        if key in fields:
            yield from find_type_errors(fields[key], value[key], f"{name}.{key}".lstrip("."))


def _read_yaml(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a subclass of SafeLoader
    except FileNotFoundError as error:
        raise UserError(f"config file {path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} must contain a mapping of sections, got {type(tree).__name__}.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"config file {path}: `extends` must name a file, got {base!r}.")
    if path.resolve() in extending:
        raise UserError(f"config file {path} extends itself through {extending[-1]}.")
    return merge(_read_yaml(path.parent / base, (*extending, path.resolve())), tree)
