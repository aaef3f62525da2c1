"""Random damage of bytes, and of JSON trees."""

import copy
import json
from random import Random
from typing import Any

_PIECES = (
    *(b"\0", b"\r", b"\n", b"\t", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b"#", b"(", b"|", b"*", b"?"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b"\x80", b"\xe9", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80"),
    *(
        b"\\ud800",
        b"\\u0000",
        b"\x1b[31m",
        b"1e999",
        b"-1",
        b"NaN",
        b"null",
        b"&a",
        b"*a",
        b"<<: ",
        b"!!int ",
        b"9" * 5_000,
    ),
    *(b"[" * 2_000, b'{"a":' * 2_000, b"(" * 5_000, b"a" * 200_000),
)
"""Bytes that readers of text stumble over."""
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 5, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf")),
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "a\udfffb",
        "\ufeff",
        "\ufffd",
        "\u2028",
        "\x1b[2J",
        "#",
        "a#0",
        "\\\\\\",
        "..",
        "../../x",
    ),
    *("nan", "1e5", "x" * 20_000, "e\u0301" * 300, "\u0130\u0131\u1e9e\ufb01"),
    *([], [[]], {}, {"text": []}, [None], [5], ["a", None], [{}]),
)
"""Values of a type or size that no field expects."""


def mutated_bytes(rng: Random, content: bytes, encodings: bool = True) -> bytes:
    """Damage `content` once to four times: flips, cuts, repetitions, exchanges, insertions; with
    `encodings`, sometimes all of it in another encoding."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        content = _mutated_once(rng, content, encodings)
    return content


def _mutated_once(rng: Random, content: bytes, encodings: bool) -> bytes:
    start = rng.randint(0, len(content))
    end = min(len(content), start + rng.choice((1, 2, 8, 60, 1_000)))
    chunk = content[start:end]
    match rng.randrange(9 if encodings else 8):
        case 0:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 4, 40)) if content else 0):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 1:
            return content[:start]
        case 2:
            return content[start:]
        case 3:
            return content[:start] + content[end:]
        case 4:
            return content[:end] + chunk * rng.choice((1, 1, 3, 50)) + content[end:]
        case 5:
            return content[end:] + chunk + content[:start]
        case 6:
            return content[:start] + rng.choice(_PIECES) + content[start:]
        case 7:
            return content[:start] + rng.randbytes(rng.choice((1, 3, 40))) + content[end:]
        case _:
            text = content.decode("utf-8", "replace")
            return text.encode(rng.choice(("latin-1", "cp1252", "utf-16", "utf-32", "utf-8-sig", "cp037")), "replace")


def mutated_tree(rng: Random, tree: Any) -> Any:
    """A copy of a JSON tree in which up to three values were exchanged, removed, repeated, moved or
    nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return rng.choice(ODD_VALUES)
        parent, key = rng.choice(places)
        other, other_key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            case 3:
                del parent[key]
            case 4:
                parent[key] = copy.deepcopy(other[other_key])
            case _:
                if isinstance(parent, list):
                    parent.insert(rng.randint(0, len(parent)), copy.deepcopy(parent[key]))
                else:
                    parent[rng.choice(("", "text", "\ud800", "x" * 300, str(key).upper()))] = parent.pop(key)
    if rng.random() < 0.1 and (places := list(_places(tree))):
        parent, key = rng.choice(places)
        for _ in range(rng.choice((1, 2, 300, 3_000))):
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"text": parent[key]}
    return tree


def _places(tree: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every container with each of its keys, not deeper than 40 levels."""
    keys = range(len(tree)) if isinstance(tree, list) else list(tree) if isinstance(tree, dict) else ()
    found = [(tree, key) for key in keys]
    if depth < 40:
        for key in keys:
            found += _places(tree[key], depth + 1)
    return found


def dumped(rng: Random, tree: Any) -> bytes:
    """The JSON text of a tree, sometimes with duplicate keys, unescaped or in another encoding."""
    try:
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    except (RecursionError, ValueError):
        return b"[" * 100_000
    if rng.random() < 0.05:
        text = text.replace("{", '{"text": 1, "id": 2, ', rng.randint(1, 3))
    return text.encode("utf-8", "surrogatepass")


def mutated_json(rng: Random, tree: Any) -> bytes:
    """JSON text of `tree`, damaged as a tree, as bytes, or both."""
    how = rng.random()
    content = dumped(rng, mutated_tree(rng, tree) if how < 0.7 else tree)
    return mutated_bytes(rng, content) if how > 0.55 else content
