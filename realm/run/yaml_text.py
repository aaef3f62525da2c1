"""YAML for configs: mappings with text keys, lists and plain values, of bounded size."""

import re
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 17
"""Longest text that is read."""
MAX_NODES = 10_000
"""Most keys, values and lists of a text, with every alias counted as a copy of what it names."""
MAX_DEPTH = 50
"""Deepest nesting."""

_TAG = "tag:yaml.org,2002:"


class InvalidYaml(ValueError):
    """A text that is not YAML, or contains more of YAML than a config may; says why and where."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem if len(problem) <= 300 else f"{problem[:300]}…")


def parse_yaml(text: str) -> Any:
    """The content of a YAML text: dicts with str keys, lists, str, int, float, bool and None.

    Dates, octal and sexagesimal numbers are text. Raises InvalidYaml for duplicate keys, keys that
    are not text, tags such as `!!int`, characters that are not Unicode, values that contain
    themselves, and texts that are too large or too deep.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidYaml(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InvalidYaml(f"{place}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InvalidYaml(" ".join(str(error).split())) from error
    except (ValueError, OverflowError) as error:  # such as an escape sequence of a character that does not exist
        raise InvalidYaml(str(error)) from error


class _Loader(yaml.SafeLoader):
    """Checks every node before it is constructed."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (an attribute of PyYAML's class)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[str, int] = {}
        """Number of nodes under each anchor that is complete."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        alias = isinstance(event, yaml.AliasEvent)
        if not alias and event.tag is not None:
            self._refuse(event, f"the tag {event.tag!r} is not supported; remove it")
        if alias and event.anchor in self.anchors and event.anchor not in self._sizes:
            self._refuse(event, f"*{event.anchor} is a part of itself")
        before = self._nodes
        self._nodes += self._sizes.get(event.anchor, 0) if alias else 1
        if self._nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES:,} values, with aliases counted as copies")
        if self._depth == MAX_DEPTH:
            self._refuse(event, f"nested more than {MAX_DEPTH} levels deep")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if not alias and event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        if isinstance(node, yaml.ScalarNode) and not alias:
            node.value = _unicode(node.value)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if key.tag != f"{_TAG}str":
                self._refuse(key, f"the key {_shown(key)} is not text; put it in quotes")
            if key.value in seen:
                self._refuse(key, f"{key.value!r} appears twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _refuse(self, where: Any, problem: str) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


# PyYAML's own patterns, less those that turn text such as `2026-02-30`, `007` or `12:30` into
# something else or into an error.
for _name, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]{0,99}|0x[0-9a-fA-F]{1,99})", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _unicode(text: str) -> str:
    r"""Join the surrogate pairs that JSON's escapes (`"\ud83d\ude00"`) produce. Raises ValueError
    for others."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ValueError(f"{text!r} contains an unpaired surrogate") from None


def _shown(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else "that is a list or a mapping"
