"""Write docs/configuration.md from the config classes and the docstrings under their fields.

    .venv/bin/python docs/make_configuration.py

`make docs` runs this and make_commands.py.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from realm.run.config import RealmConfig

PATH = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

<!-- Written by docs/make_configuration.py from the config classes; do not edit. -->

A run is described by one YAML file. Only `run` and `corpus.passages` are required:

```yaml
run: runs/my
corpus:
  passages: my.jsonl.gz
retriever:
  bert: {path: google-bert/bert-base-uncased}
pretrain:
  steps: 5000
```

- `extends: other.yaml` (relative to the file) inherits the fields of another file; the file's own
  fields override them.
- On the command line `--section.field value` overrides a field: `--pretrain.steps 1000`,
  `--reader.attention '{type: infini}'`. Values are YAML. With `--config` the override becomes part
  of the run; with `--run` it applies to that command only.
- A new run folder receives the resolved configuration as `config.yaml`. Later commands read it from
  there with `--run`.
- Unknown fields and invalid values are refused with an error that names the field.
- `~` at the start of a path is the home folder. A text that YAML reads as a number with a point or
  as a boolean is written in quotes: `name: "1.10"`.

Fields are listed by section, with type and default; `null` means "not set".
"""

TITLES = {"SourceConfig": "source of documents", "QuestionSource": "source of questions"}
"""Headings of classes that are used under several field names."""


def render() -> str:
    """Render the page."""
    sections = {entry.name: kind for entry, kind in config_fields(RealmConfig) if is_dataclass(kind)}
    shared = shared_classes(sections)
    links = shared | {kind: name for name, kind in sections.items()}
    top = [(entry, kind) for entry, kind in config_fields(RealmConfig) if entry.name not in sections]
    top_heading = enumeration([entry.name for entry, _ in top], "and")
    contents = ", ".join(f"[{name}](#{anchor(name)})" for name in (top_heading, *sections, *shared.values()))
    parts = [INTRODUCTION, wrapped(f"Sections: {contents}."), heading(top_heading), *entries(RealmConfig, top, links)]
    for name, kind in sections.items():
        parts += [heading(name), docstring(kind), *entries(kind, config_fields(kind), links)]
    for kind, name in shared.items():
        used = enumeration([f"`{path}`" for path, found in nested(RealmConfig) if found is kind], "and")
        parts += [heading(name), docstring(kind, f" Value of {used}.")]
        for choice, variant in getattr(kind, "get_known_choices", dict)().items():
            parts += [heading(f"type: {choice}", "###"), docstring(variant)]
            parts += entries(variant, config_fields(variant), links)
        parts += entries(kind, config_fields(kind), links)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def config_fields(kind: Any) -> list[tuple[Field[Any], Any]]:
    """Fields of a config class with their resolved types."""
    types = get_type_hints(kind)
    return [(entry, types[entry.name]) for entry in fields(kind)]


def config_class(kind: Any) -> Any:
    """The config class in a type such as `X | None` or `tuple[X, ...]`, or None."""
    if is_dataclass(kind):
        return kind
    return next((found for part in get_args(kind) if (found := config_class(part))), None)


def nested(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and classes of everything below a config class, depth first."""
    for entry, field_type in config_fields(kind):
        if found := config_class(field_type):
            yield f"{path}{entry.name}", found
            yield from nested(found, f"{path}{entry.name}.")


def shared_classes(sections: dict[str, Any]) -> dict[Any, str]:
    """Classes below the sections, with the heading of each: the names of its fields or a title."""
    names: dict[Any, list[str]] = {}
    for path, kind in nested(RealmConfig):
        if kind not in sections.values():
            names.setdefault(kind, []).append(path.rpartition(".")[2])
    return {
        kind: TITLES.get(kind.__name__, enumeration(list(dict.fromkeys(found)), "and")) for kind, found in names.items()
    }


def entries(kind: Any, listed: list[tuple[Field[Any], Any]], links: dict[Any, str]) -> list[str]:
    """One list item per field: name, type, default and docstring."""
    about = field_docstrings(kind)
    items = []
    for entry, field_type in listed:
        facts = ", ".join(filter(None, (type_name(field_type, links), default_of(entry, field_type))))
        items.append(wrapped(f"- **`{entry.name}`** ({facts}): {about[entry.name]}", "  "))
    return items


def field_docstrings(kind: Any) -> dict[str, str]:
    """The string under each field of a class, or of a base class that has the field."""
    found = {}
    for base in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def type_name(kind: Any, links: dict[Any, str]) -> str:
    """The name of a type in terms of the YAML values that users write."""
    if kind in links:
        return f"[{links[kind]}](#{anchor(links[kind])})"
    if get_origin(kind) is Literal:
        return enumeration([f"`{value}`" for value in get_args(kind)], "or")
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis:
            return f"list of {type_name(parts[0], links)}"
        return f"[{', '.join(type_name(part, links) for part in parts)}]"
    if get_origin(kind) is dict:
        return "mapping"
    if NoneType in get_args(kind):
        return " or ".join(type_name(part, links) for part in get_args(kind) if part is not NoneType)
    return str(kind.__name__)


def default_of(entry: Field[Any], kind: Any) -> str:
    """The default as YAML; for a section, only the values that differ from its class."""
    value: Any
    if entry.default_factory is not MISSING:
        value = entry.default_factory()
    elif entry.default is not MISSING:
        value = entry.default
    else:
        return "required"
    if is_dataclass(value):
        if hasattr(type(value), "get_known_choices"):
            names = {variant: name for name, variant in kind.get_known_choices().items()}
            return f"default `{{type: {names[type(value)]}}}`"
        plain = vars(config_class(kind)())
        changed = {name: part for name, part in vars(value).items() if part != plain[name]}
        return f"default `{yaml_value(changed)}`" if changed else ""
    return f"default `{yaml_value(value)}`"


def yaml_value(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {yaml_value(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(yaml_value, value))}]"
    if isinstance(value, float):  # PyYAML reads 3e-05 as a string
        return re.sub(r"^(-?\d+)(?:\.0)?e(-?)0?", r"\1.0e\2", repr(value))
    return value if isinstance(value, str) and value else json.dumps(value)


def heading(name: str, level: str = "##") -> str:
    return f"\n{level} {name}\n"


def docstring(kind: Any, more: str = "") -> str:
    """The docstring of a class as one paragraph."""
    return wrapped(f"{inspect.getdoc(kind)}{more}") + "\n"


def anchor(heading: str) -> str:
    """The anchor that GitHub generates for a heading."""
    return re.sub("[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


def enumeration(parts: list[str], last: str) -> str:
    """`a, b or c`."""
    return f" {last} ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def wrapped(text: str, indent: str = "") -> str:
    """The text in lines of at most 100 characters, `code` unbroken."""
    glued = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.fill(glued, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
